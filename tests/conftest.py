"""Tiny models and the list of method variants that the parametrised tests run over."""
import itertools
import json
import os
import random
import sys
from pathlib import Path

if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a test sees a GPU only with -m gpu; read by torch
# for tensors this small threads cost more than they bring; read by torch
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import tiktoken
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402
from checkpoints import hub, tokenizers  # noqa: E402
from checkpoints.pretrained import save_pretrained  # noqa: E402
from data import restaurants, reviews  # noqa: E402
from methods import METHODS  # noqa: E402
from model import GPT, GPTConfig, Llama, LlamaConfig, RoBERTa, RobertaConfig  # noqa: E402
from pretraining import vocabulary  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="many more kills and a thousand cases of "
                     "each fuzz")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


# A folder with real texts (e2e, sst2, gsm8k, svamp, webnlg), GPT-2's vocabulary (tiktoken_cache)
# and RoBERTa's (roberta-base-vocab). Without it the same tests run on what `texts_folder` and
# `made_gpt2` make.
DATA = os.environ.get("DATA")
if DATA:
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", f"{DATA}/tiktoken_cache")


def made_gpt2():
    """A vocabulary of GPT-2's size and with its pattern: all bytes, and 50,000 pairs of bytes."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens = [bytes([b]) for b in range(256)] + random.Random(0).sample(pairs, 50000)
    return tiktoken.Encoding("gpt2", pat_str=pattern, special_tokens={"<|endoftext|>": 50256},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


if not os.environ.get("TIKTOKEN_CACHE_DIR"):
    GPT2 = made_gpt2()
    tiktoken.get_encoding = lambda name: GPT2


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory):
    """DATA, or a folder like it with texts of the embedded datasets."""
    if DATA:
        return Path(DATA)
    folder = tmp_path_factory.mktemp("texts")
    names = tokenizers.name_tokens(tokenizers.gpt2_tokens())
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264}
    ids = iter(random.Random(1).sample(range(4, 50264), 50256))
    write_rows = {"sst2": ((f"{split}.jsonl",
                            [{"sentence": texts[0], "label": label} for texts, label in pairs])
                           for split, pairs in reviews.load().items() if split != "test"),
                  "e2e": ((f"{split}.jsonl",
                           [{"meaning_representation": record, "human_reference": text}
                            for record, text in pairs])
                          for split, pairs in restaurants.load().items()),
                  "gsm8k": [("train.jsonl",
                             [{"question": text, "answer": f"{text} #### {n}"}
                              for n, (_, text) in enumerate(restaurants.load()["train"])])]}
    for name, files in write_rows.items():
        (folder / name).mkdir()
        for file, rows in files:
            (folder / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "roberta-base-vocab").mkdir()
    (folder / "roberta-base-vocab/vocab.json").write_text(
        json.dumps({**special, **{name: next(ids) for name in names}}))
    return folder


def variants():
    """Every adapter of the registry, with every choice of its flags: (name, hparams) as pytest
    parameters.

    A new line in methods.py is covered from that moment on.
    """
    own_values = {"pre_num": (1, 2, -1), "delta_start": (0, 2), "merge": ("regression",),
                  "delta_lambda": (2.0,), "budget_warmup": (1,), "budget_final": (1,),
                  "budget_every": (1,), "frozen": (False, True), "cut": (None, 2)}
    for name, (adapter, flags, *_) in METHODS.items():
        if adapter:
            values = [own_values.get(flag, spec.get("choices") or (spec.get("default"),))
                      for flag, spec in flags.items()]
            for chosen in itertools.product(*values):
                hparams = dict(zip(flags, chosen, strict=True))
                yield pytest.param(name, hparams, id=" ".join([name, *map(str, chosen)]))


every_variant = pytest.mark.parametrize("method, hparams", list(variants()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_gpt(dtype=torch.float64, n_layer=4):
    """A GPT of 4 layers and 16 channels whose weights are large enough that everything matters."""
    model = GPT(GPTConfig(vocab_size=61, n_positions=16, n_embd=16, n_layer=n_layer,
                          n_head=2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tiny_roberta(dtype=torch.float64, n_layer=4):
    """The same for a RoBERTa that tells three classes apart."""
    model = RoBERTa(RobertaConfig(vocab_size=61, max_position_embeddings=18, hidden_size=16,
                                  num_hidden_layers=n_layer, num_attention_heads=2,
                                  intermediate_size=64), num_labels=3).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tiny_llama(dtype=torch.float64, n_layer=4, **config):
    """The same for a Llama: two heads share their keys, and the heads are wider than the channels
    that they are of."""
    shape = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=n_layer,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                 max_position_embeddings=16)
    model = Llama(LlamaConfig(**{**shape, **config})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


every_model = pytest.mark.parametrize("tiny", [tiny_gpt, tiny_llama, tiny_roberta],
                                      ids=["gpt", "llama", "roberta"])


def adapt(model, method, hparams, targets=("q", "v"), r=3, alpha=5, dropout=0.0, random=True):
    """Apply a method; with `random` the adapter does something: no factor is zero or nearly so, and
    where none was at the start, as in PiSSA, all have moved."""
    layers = lora.apply(model, METHODS[method].adapter, targets, r=r, alpha=alpha, dropout=dropout,
                        **hparams)
    if random:
        small = [p for p in factors(layers) if p.std() < 0.05]
        for p in small or factors(layers):
            nn.init.normal_(p, std=0.4)
    if model.classifier:
        model.classifier.requires_grad_(True)
    return layers


def factors(layers):
    """What the adapters train: A and B, or what a method has in their place."""
    return [p for layer in layers for name, p in layer.named_parameters()
            if name not in ("weight", "bias") and p.requires_grad]


def head_of(model):
    """Parameters of the head that is trained with the adapter."""
    return list(model.classifier.parameters()) if model.classifier else []


def tokens(B=3, T=10, V=61):
    """(idx, targets) of random tokens, half of the positions without a target."""
    idx = torch.randint(0, V, (B, T))
    targets = torch.randint(0, V, (B, T))
    targets[torch.rand(B, T) < 0.5] = -100
    return idx, targets


def batch(model, B=3, T=10):
    """(idx, targets) as a model wants them: `tokens` for a GPT or a Llama, framed and padded texts
    with labels for a RoBERTa."""
    if model.causal:
        return tokens(B, T)
    idx = torch.randint(3, 61, (B, T))
    idx[:, 0] = 0
    for i in range(B):
        idx[i, T - i % 3:] = 1
    return idx, torch.randint(0, 3, (B,))


def train_steps(model, layers, steps, lr=1e-2):
    """A few real optimizer steps with the contract's calls; returns the losses."""
    some = batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    layers[0].begin(layers, steps)
    return [one_step(model, layers, optimizer, step, some) for step in range(1, steps + 1)]


def unscaled():
    """The scaler of float16, as it is in other types: it does nothing."""
    return torch.amp.GradScaler("cpu", enabled=False)


def one_step(model, layers, optimizer, step, some):
    """One optimizer step with the contract's calls; returns the loss."""
    loss = model(*some)[1]
    optimizer.zero_grad()
    loss.backward()
    layers[0].before_step(layers, step)
    optimizer.step()
    layers[0].after_step(layers, step)
    return loss.item()


def real(model):
    """Which tokens of a batch `calibrate` should count: all but a RoBERTa's padding."""
    return lambda idx: idx != getattr(model.config, "pad_token_id", -1)


def calibrated(model, layers, merge=None):
    """Calibrate on random tokens and return the layers."""
    batches = [batch(model, 16)[0], batch(model, 16)[0]]
    layers[0].prepare_merge(model, merge or layers[0].merges[0],
                            dict(batches=batches, real=real(model)))
    return layers


@pytest.fixture(scope="session")
def small_roberta(tmp_path_factory):
    """A checkpoint folder as data/tiny-roberta is one: 2 layers, 16 channels, 320 ranks and 5
    special tokens."""
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    model = RoBERTa(RobertaConfig(vocab_size=325, max_position_embeddings=66, hidden_size=16,
                                  num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    save_pretrained(model, folder)
    vocabulary.make([text for (text,), _ in reviews.load()["validation"]], 320, folder,
                    roberta=True)
    return folder


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory):
    """A checkpoint folder in bf16 with its tokenizer: 2 layers, 32 channels, 4 heads that share 2
    keys, 320 tokens."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    save_pretrained(Llama(LlamaConfig(320, 32, 48, 2, 4, 2, 8, 256)), folder, torch.bfloat16)
    vocabulary.make([text for _, text in restaurants.load()["validation"]], 319, folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint folder as data/tiny-gpt is one: 2 layers, 16 channels, a vocabulary of 320."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=320, n_positions=256, n_embd=16, n_layer=2, n_head=2))
    save_pretrained(model, folder)
    vocabulary.make([text for _, text in restaurants.load()["validation"]], 319, folder)
    return folder


# The hub

def hub_cache(cache, repo, files, revision="main", kind="datasets"):
    """Lay files out as the Hugging Face client keeps them; `files`: {path: bytes}."""
    folder = cache / f"{kind}--{repo.replace('/', '--')}"
    (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text("c0ffee")
    for path, content in files.items():
        file = folder / "snapshots/c0ffee" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """A machine whose hub does not answer, with a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "fetch", lambda *args, real=hub.fetch, **more: real(
        *args, cache_dir=tmp_path / "cache", **more))
    return tmp_path / "cache"
