"""model.py against `transformers`: logits, loss, both directions of the checkpoint, decoding."""
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, every_model, hub_cache, tokens
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from checkpoints.pretrained import from_pretrained, save_pretrained
from experiments import bench
from loss import vocabulary_loss
from model import GPT, GPTConfig, Llama, LlamaConfig, RoBERTa, RobertaConfig

transformers = pytest.importorskip("transformers", reason="the oracle, in [dev]")


def matter(theirs, folder):
    """Save a model of transformers in evaluation, with biases and LayerNorms that matter."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.eval().save_pretrained(folder)
    return theirs


def their_gpt2(folder, **config):
    """A random tiny GPT2LMHeadModel."""
    shape = dict(vocab_size=97, n_positions=32, n_embd=24, n_layer=3, n_head=4)
    return matter(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **config})),
                  folder)


def their_roberta(folder, kind="RobertaForSequenceClassification", **config):
    """A random tiny RoBERTa."""
    shape = dict(vocab_size=97, max_position_embeddings=34, hidden_size=24, num_hidden_layers=3,
                 num_attention_heads=4, intermediate_size=40, type_vocab_size=1,
                 layer_norm_eps=1e-5, num_labels=3)
    return matter(getattr(transformers, kind)(transformers.RobertaConfig(**{**shape, **config})),
                  folder)


def padded_texts(T=32):
    """(idx, attention_mask): four texts of different lengths, padding (1) behind them or before, as
    some do it."""
    idx = torch.randint(3, 97, (4, T))
    idx[:, 0] = 0
    idx[1, 20:], idx[2, 5:] = 1, 1
    idx[3] = idx[3].roll(4)
    idx[3, :4] = 1
    return idx, (idx != 1).long()


@pytest.mark.parametrize("config",
                         [{}, dict(n_inner=40), dict(layer_norm_epsilon=1e-3), dict(n_head=1)])
def test_logits_and_loss_equal_transformers(tmp_path, config):
    """A checkpoint saved by transformers gives the same logits here, within 1e-5, and the same
    loss."""
    theirs, ours = their_gpt2(tmp_path, **config), from_pretrained(tmp_path)
    idx = torch.randint(0, 97, (3, 32))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
    torch.testing.assert_close(ours(idx)[0], expected.logits, rtol=0, atol=1e-5)
    shifted = torch.cat([idx[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(ours(idx, shifted)[1], expected.loss)


SMALL = GPTConfig(61, 16, 16, 2, 2), RobertaConfig(61, 18, 16, 2, 2, 32)


@pytest.mark.parametrize("kind, labels", [("GPT2LMHeadModel", None), ("RobertaForMaskedLM", 0),
                                          ("RobertaForSequenceClassification", 1),
                                          ("RobertaForSequenceClassification", 3)])
def test_what_we_save_is_what_transformers_reads(tmp_path, kind, labels):
    """save_pretrained -> transformers, no key missing or unexpected, equal logits; and we read our
    own file exactly."""
    model = GPT(SMALL[0]) if labels is None else RoBERTa(SMALL[1], labels)
    save_pretrained(model, tmp_path)
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    idx = batch(model)[0]
    real = slice(None) if labels or model.causal else idx != 1
    mask = idx != (-1 if model.causal else 1)
    torch.testing.assert_close(theirs.eval()(idx, attention_mask=mask).logits[real],
                               model(idx)[0][real], rtol=0,
                               atol=1e-5)
    found, saved = from_pretrained(tmp_path).state_dict(), model.state_dict()
    assert found.keys() == saved.keys() and all(torch.equal(t, saved[key])
                                                for key, t in found.items())


def bare_gpt2(state):
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    return {**state, "h.0.attn.bias": torch.ones(1, 1, 32, 32),
            "h.0.attn.masked_bias": torch.tensor(-1e4)}


WORDS, WTE = "roberta.embeddings.word_embeddings.weight", "transformer.wte.weight"


def old_roberta(state):
    return {**state, "lm_head.decoder.weight": state[WORDS].clone(),
            "lm_head.decoder.bias": state["lm_head.bias"].clone(),
            "roberta.pooler.dense.weight": torch.ones(24, 24),
            "roberta.pooler.dense.bias": torch.ones(24),
            "roberta.embeddings.position_ids": torch.arange(34)[None]}


@pytest.mark.parametrize("make, change", [
    (their_gpt2, bare_gpt2),
    (their_gpt2, lambda state: {**state, "lm_head.weight": state[WTE].clone()}),
    (lambda folder: their_roberta(folder, "RobertaForMaskedLM"), old_roberta)])
def test_what_old_files_carry_along_changes_nothing(tmp_path, make, change):
    """No prefix, a stored causal mask, stored ties, a pooler, position ids, as gpt2 and
    roberta-base of the hub."""
    make(tmp_path)
    expected, file = from_pretrained(tmp_path).state_dict(), tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file)
    found = from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v)
                                                   for k, v in expected.items())


@pytest.mark.parametrize("model", [GPT(SMALL[0]), RoBERTa(SMALL[1])])
def test_the_loss_is_that_of_the_positions_with_a_target(model):
    """It is F.cross_entropy of their logits, smoothed too, and NaN as there where nothing has a
    target."""
    idx, targets = tokens()
    targets[0, :3] = -100
    logits, where = model(idx)[0], targets != -100
    for eps in (0.0, 0.1):
        expected = F.cross_entropy(logits[where], targets[where], label_smoothing=eps)
        torch.testing.assert_close(model(idx, targets, label_smoothing=eps)[1], expected)
    assert model(idx, torch.full_like(targets, -100))[1].isnan()


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 150, 10**6])
def test_the_vocabulary_loss_is_cross_entropy(eps, chunk, monkeypatch):
    """Loss and the gradients of x, W and b, in float64, are those of F.linear and F.cross_entropy,
    whatever the size of a chunk: a row, several with a rest, all. In fp32 it neither overflows nor
    underflows at logits of +-1000."""
    monkeypatch.setattr("loss.CHUNK", chunk)
    x, W, b = (torch.randn(s, dtype=torch.float64, requires_grad=True)
               for s in ((7, 5), (50, 5), (50,)))
    targets = torch.randint(0, 50, (7,))
    for bias in (b, None):
        given = [t for t in (x, W, bias) if t is not None]
        ours = vocabulary_loss(x, W, bias, targets, eps)
        theirs = F.cross_entropy(F.linear(x, W, bias), targets, label_smoothing=eps)
        torch.testing.assert_close(ours, theirs)
        found = torch.autograd.grad(3 * ours, given), torch.autograd.grad(3 * theirs, given)
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(vocabulary_loss(x, W, None, targets, eps), theirs)
    x = torch.eye(5)[:2].mul(1000).requires_grad_()
    W = torch.tensor([[1.0, -1], [-1, 1], [0, 0]]) @ torch.eye(2, 5)
    t = torch.tensor([0, 0])
    ours = vocabulary_loss(x, W, None, t, eps)
    theirs = F.cross_entropy(F.linear(x, W), t, label_smoothing=eps)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_tokens_of_one_chunk_may_have_logits_hundreds_of_nats_apart():
    """In fp32: rows of logits near 300, near 0 and near -300 have the loss of F.cross_entropy in
    float64, and its gradients."""
    x = torch.cat([torch.tensor([[300.0], [0.0], [-300.0]]), torch.randn(3, 4)], 1)
    W = torch.cat([torch.ones(50, 1), torch.randn(50, 4)], 1)
    given = [t.requires_grad_() for t in (x, W, torch.randn(50))]
    exact = [t.detach().double().requires_grad_() for t in given]
    targets = torch.randint(0, 50, (3,))
    ours, theirs = vocabulary_loss(*given, targets), F.cross_entropy(F.linear(*exact), targets)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(ours, given), torch.autograd.grad(theirs, exact)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtypes",
                         [(torch.float32, torch.float32, True),
                          (torch.float32, torch.bfloat16, True),
                          (torch.bfloat16, torch.bfloat16, False)], ids=str)
def test_in_bf16_the_factors_are_rounded_and_the_logits_are_not(dtypes):
    """Under autocast with W in fp32 or bf16, and on a model in bf16 without it: at logits near -70,
    where neighbours in bf16 are half a nat apart, loss and gradients are those of fp32 products of
    the same factors."""
    *kinds, autocast = dtypes
    x, W, b = torch.randn(20, 8).bfloat16(), torch.randn(50, 8).bfloat16(), torch.full((50,), -70.0)
    targets = torch.randint(0, 50, (20,))
    exact = [t.float().requires_grad_() for t in (x, W, b)]
    theirs = F.cross_entropy(F.linear(*exact), targets)
    given = [t.to(kind).requires_grad_()
             for t, kind in zip((x, W, b), (*kinds, kinds[0]), strict=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = vocabulary_loss(*given, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    rounded = F.cross_entropy(F.linear(*exact).bfloat16().float(), targets)
    assert (rounded - theirs).abs() > 1e-3  # what rounding the logits would cost
    gradients = torch.autograd.grad(ours, given), torch.autograd.grad(theirs, exact)
    for found, expected, t in zip(*gradients, given, strict=True):
        assert found.dtype == t.dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=1e-4)


def test_the_logits_of_a_batch_never_stand_whole_in_memory(monkeypatch):
    """No tensor of a training step has more numbers than a chunk of logits, where a batch has 6 x
    10 x 500, and no two chunks stand beside each other; a frozen vocabulary gets no gradient."""
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, (tuple, list)) else [out])
                    if torch.is_tensor(t)]
            self.size = max([self.size,
                             *(t.numel() for t in made if t.data_ptr()
                               != model.wte.weight.data_ptr())])
            return out

    monkeypatch.setattr("loss.CHUNK", 5000)
    model = GPT(GPTConfig(vocab_size=500, n_positions=16, n_embd=12, n_layer=1, n_head=2))
    lora.apply(model, lora.LoRALinear, ["q"], r=2, alpha=4)
    idx = torch.randint(0, 500, (6, 10))
    with Largest() as largest:
        model(idx, idx)[1].backward()
    assert largest.size <= 5000
    x, W = torch.randn(4000, 4, requires_grad=True), torch.randn(500, 4)
    args, nothing = SimpleNamespace(device=torch.device("cpu")), torch.nn.ReLU()
    monkeypatch.setattr("loss.CHUNK", 500_000)
    targets = torch.zeros(4000, dtype=torch.long)
    found, _ = bench.peak(lambda: vocabulary_loss(x, W, None, targets), nothing,
                          torch.optim.SGD([x]), args)
    assert 4 * 500_000 < found < 1.2 * 4 * 500_000


@every_model
def test_padding_behind_a_text_changes_nothing(tiny):
    """Real tokens do not see what stands behind them; in a RoBERTa nobody sees it."""
    model = tiny()
    idx = batch(model, 1, 9)[0]
    padded = torch.cat([idx, torch.ones(1, 5, dtype=torch.long)], 1)
    found = model(padded)[0]
    torch.testing.assert_close(found[:, :9] if model.causal else found, model(idx)[0])


@every_model
def test_a_text_longer_than_the_context_is_refused(tiny):
    """17 tokens do not fit 16 positions: an error, not an index out of range; 16 fit."""
    tiny()(torch.full((1, 16), 5))
    with pytest.raises(ValueError, match="17 tokens do not fit the model's context of 16"):
        tiny()(torch.full((1, 17), 5))


@pytest.mark.parametrize("config", [GPTConfig(500, 16, 128, 8, 2),
                                    LlamaConfig(500, 128, 256, 8, 2, 2, 64, 16),
                                    RobertaConfig(500, 18, 128, 8, 2, 256)])
def test_a_fresh_model_starts_as_in_its_paper(config):
    """Matrices are N(0, .02^2); in GPT-2 and Llama those that write into the residual stream,
    two in each of n blocks, smaller by sqrt(2 n); biases are 0 and norms 1. So the loss is that
    of knowing nothing, log V."""
    model = {"gpt2": GPT, "llama": Llama, "roberta": RoBERTa}[config.model_type](config)
    for name, p in model.named_parameters():
        writes = model.causal and name.endswith(("attn.o.weight", "mlp.down.weight"))
        if p.dim() == 2 and p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02 / (4 if writes else 1), rel=0.06), name
        elif p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, not name.endswith("bias"))), name
    idx = torch.randint(3, 500, (8, 14))
    assert model(idx, idx.roll(1))[1].item() == pytest.approx(math.log(500), abs=0.05)


@pytest.mark.parametrize("kind", ["RobertaForSequenceClassification", "RobertaForMaskedLM",
                                  "RobertaModel"])
@pytest.mark.parametrize("config", [{}, dict(layer_norm_eps=1e-3), dict(num_attention_heads=1)],
                         ids=str)
def test_roberta_equals_transformers(tmp_path, kind, config):
    """A checkpoint saved by transformers gives the same logits here within 1e-5, padded or not, and
    the same loss."""
    theirs, ours = their_roberta(tmp_path, kind, **config), from_pretrained(tmp_path)
    idx, mask = padded_texts()
    with torch.no_grad():
        if kind == "RobertaModel":  # no head: what the blocks give
            torch.testing.assert_close(ours.hidden(idx)[mask == 1],
                                       theirs(idx, mask).last_hidden_state[mask == 1], rtol=0,
                                       atol=1e-5)
            return
        if kind == "RobertaForMaskedLM":
            labels = torch.where((torch.rand(idx.shape) < 0.3) & (idx > 2), idx, -100)
            found, real = ours(idx)[0], mask == 1
        else:
            labels = torch.tensor([0, 2, 1, 1])
            # a text padded in front has no <s> at its beginning
            found, real = ours(idx[:3])[0], slice(0, 3)
            idx, mask, labels = idx[:3], mask[:3], labels[:3]
        expected = theirs(idx, mask, labels=labels)
        torch.testing.assert_close(found[real], expected.logits[real], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(idx, labels)[1], expected.loss)


def test_a_regression_is_the_mean_squared_error(tmp_path):
    """One label: transformers' loss for real numbers."""
    theirs = their_roberta(tmp_path, "RobertaForSequenceClassification", num_labels=1,
                           problem_type="regression")
    idx, mask = padded_texts()
    idx, mask, labels = idx[:3], mask[:3], torch.tensor([0.5, 3.0, 4.8])
    torch.testing.assert_close(from_pretrained(tmp_path)(idx, labels)[1],
                               theirs(idx, mask, labels=labels).loss)


def test_heads_are_kept_where_they_fit_and_fresh_where_not(tmp_path, capsys):
    """The base is loaded whatever head stands on it; a fresh head is announced, one of the right
    size is not."""
    found = {}
    for kind, labels, fresh in (("RobertaModel", 2, True), ("RobertaModel", None, True),
                                ("RobertaForMaskedLM", 3, True),
                                ("RobertaForMaskedLM", None, False),
                                ("RobertaForSequenceClassification", 3, False),
                                ("RobertaForSequenceClassification", None, False),
                                ("RobertaForSequenceClassification", 2, True),
                                ("RobertaForSequenceClassification", 0, True)):
        torch.manual_seed(0)
        theirs = their_roberta(tmp_path, kind)
        ours = from_pretrained(tmp_path, labels)
        said = capsys.readouterr().out
        assert ("a fresh one is trained from scratch" in said) == fresh, (kind, labels, said)
        body = getattr(theirs, "roberta", theirs)
        assert torch.equal(ours.h[1].attn.q.weight,
                           body.encoder.layer[1].attention.self.query.weight)
        wanted = (labels if labels is not None
                  else {"RobertaForSequenceClassification": 3}.get(kind, 0))
        assert (ours.classifier is None) == (wanted == 0) and ours.num_labels == wanted
        found[kind, labels] = ours
    kept = found["RobertaForSequenceClassification", 3].classifier.out_proj.weight
    assert torch.equal(kept, found["RobertaForSequenceClassification",
                                   None].classifier.out_proj.weight)


@pytest.mark.parametrize("kind", ["GPT", "RobertaForMaskedLM", "RobertaForSequenceClassification"])
def test_a_base_in_bf16_has_norms_and_a_head_in_fp32(tmp_path, kind):
    """Linears and embeddings are rounded, norms are not, nor is the head of a classifier, which
    trains."""
    their_gpt2(tmp_path) if kind == "GPT" else their_roberta(tmp_path, kind)
    half, exact = from_pretrained(tmp_path, dtype=torch.bfloat16), from_pretrained(tmp_path)
    for name, p in half.named_parameters():
        whole = name.startswith("classifier.") or "ln" in name or "layer_norm" in name
        assert p.dtype == (dtype := torch.float32 if whole else torch.bfloat16), name
        assert torch.equal(p, exact.get_parameter(name).to(dtype)), name


def test_a_fresh_head_is_drawn_from_the_seed(tmp_path):
    """N(0, .02^2) with biases of 0; another seed draws another, and what draws nothing is the
    rest of the model."""
    their_roberta(tmp_path, "RobertaModel", hidden_size=48)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(from_pretrained(tmp_path, 50).classifier)
    assert torch.equal(heads[0].dense.weight, heads[1].dense.weight)
    assert not torch.equal(heads[0].dense.weight, heads[2].dense.weight)
    for linear in (heads[0].dense, heads[0].out_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()


# The hub

def test_models_of_the_hub_are_read_from_its_cache(tmp_path, no_network):
    """A hub id laid out in the client's cache loads without a network, tokenizer and all; RoBERTa
    and GPT-2."""
    for name, make in (("a/gpt", their_gpt2),
                       ("FacebookAI/roberta-tiny", lambda f: their_roberta(f, "RobertaModel"))):
        make(tmp_path / "saved")
        files = {n: (tmp_path / "saved" / n).read_bytes()
                 for n in ("config.json", "model.safetensors")}
        hub_cache(no_network, name, {**files, "vocab.json": b"{}"}, kind="models")
        expected = from_pretrained(tmp_path / "saved", 0).state_dict()
        found = from_pretrained(name, 0).state_dict()
        same = [torch.equal(found[k], v) for k, v in expected.items()
                if not k.startswith("lm_head")]
        assert len(same) > 30 and all(same)


def test_a_model_that_is_not_to_be_had_says_what_to_do(no_network):
    """Not cached, not reachable: within seconds, one line that asks for a local folder."""
    start = time.time()
    with pytest.raises(ValueError, match="'FacebookAI/roberta-base' is no folder here, and the hub "
                       ".*; or give --model a folder with config.json and model.safetensors"):
        from_pretrained("FacebookAI/roberta-base", 2)
    assert time.time() - start < 10


# Damaged and foreign checkpoints

def edit_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
    return change


def edit_weights(tensors):
    """Put tensors in, or with None take one out."""
    def change(folder):
        state = {**load_file(folder / "model.safetensors"), **tensors}
        save_file({name: t for name, t in state.items() if t is not None},
                  folder / "model.safetensors")
    return change


def with_file(name, content):
    def change(folder):
        file = folder / name
        file.unlink() if content is None else file.write_bytes(content)
    return change


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BAD_GPT2 = [(edit_config(model_type="mamba"), "model_type 'mamba' is not supported, only 'gpt2' or "
             "'roberta' or 'llama'"),
            (edit_config(activation_function="relu"), "activation_function 'relu'"),
            (edit_config(tie_word_embeddings=False), "tie_word_embeddings False"),
            (edit_config(n_head=5), "n_embd 24 is not a multiple of n_head 5"),
            (edit_config(n_layer=4), "lacks transformer.h.3.attn.c_attn.bias and 11 more"),
            (edit_config(n_layer=2),
             "holds unexpected transformer.h.2.attn.c_attn.bias and 11 more"),
            (edit_config(n_positions=16),
             r"transformer.wpe.weight has shape (32, 24), not (16, 24)"),
            (edit_config(quantization_config={"load_in_8bit": True}), "quantization_config "
             "{'load_in_8bit': True} is not"), (edit_config(n_embd="24"), "n_embd"),
            (edit_config(n_layer=-1), "n_layer"), (edit_config(n_head=True), "n_head"),
            (edit_config(n_layer=10**7), "n_layer must be a whole number in 1..1000"),
            (edit_config(vocab_size=10**12), "vocab_size must be"),
            (edit_config(layer_norm_epsilon=1e300), "must be in (0, 1)"),
            (edit_config(n_inner=10), "has shape"), (edit_config(n_inner=0), "n_inner must be a "
                                                     "whole number"),
            (edit_config(n_embd=None), "n_embd must be"),
            (edit_weights({"transformer.h.0.attn.c_attn.bias": torch.ones(7)}),
             "transformer.h.0.attn.c_attn.bias has shape (7,), not (72,)"),
            (edit_weights({"transformer.ln_f.bias": None}), "lacks transformer.ln_f.bias"),
            (edit_weights({"transformer.extra": torch.ones(1)}), "holds unexpected "
             "transformer.extra"),
            (edit_weights({"lm_head.bias": torch.ones(97)}), "holds unexpected lm_head.bias"),
            (edit_weights({"lm_head.weight": torch.ones(97, 24)}), "lm_head.weight differs"),
            (edit_weights({"module.transformer.ln_f.bias": torch.ones(24)}), "holds both"),
            (truncate, "damaged"),
            (with_file("model.safetensors", b"\x80\x04pickle"), "damaged or no safetensors"),
            (with_file("model.safetensors", None), "has no model.safetensors"),
            (with_file("config.json", b"{"), "not valid JSON"),
            (with_file("config.json", b"[]"), "not a JSON object"),
            (with_file("config.json", None), "holds no config.json"),]
BAD_ROBERTA = [(edit_config(hidden_act="relu"), "hidden_act 'relu' is not supported, only 'gelu'"),
               (edit_config(type_vocab_size=2), "type_vocab_size 2"),
               (edit_config(is_decoder=True), "is_decoder True"),
               (edit_config(model_type="bert"), "model_type 'bert' is not supported, only 'gpt2' "
                "or 'roberta'"), (edit_config(model_type=None), "model_type None"),
               (edit_config(model_type=["roberta"]), "model_type ['roberta']"),
               (edit_config(num_attention_heads=5), "hidden_size 24 is not a multiple of "
                "num_attention_heads 5"),
               (edit_config(num_hidden_layers=4),
                "lacks roberta.encoder.layer.3.attention.output.LayerNorm.bias and 15 more"),
               (with_file("config.json", b'{"model_type": "roberta"}'), "lacks hidden_size"),
               (edit_config(pad_token_id=0), "pad_token_id 0 is not supported, only 1"),
               (edit_config(eos_token_id=7), "eos_token_id 7 is not supported, only 2"),
               (edit_config(max_position_embeddings=3), "max_position_embeddings 3 or vocab_size "
                "97 leaves nothing"),
               (edit_config(max_position_embeddings=40),
                "roberta.embeddings.position_embeddings.weight has shape (34, 24)"),
               (edit_config(layer_norm_eps="small"), "layer_norm_eps must be in (0, 1)"),
               (edit_weights({"classifier.dense.bias": None}), "lacks classifier.dense.bias"),
               (edit_weights({"roberta.a\nb.weight": torch.ones(1)}),
                "unexpected roberta.a\nb.weight"),
               (edit_weights({"classifier.dense.bias": torch.ones(24) * 1j}),
                "is of complex numbers"),
               (edit_weights({"roberta.encoder.layer.0.odd": torch.ones(1)}),
                "unexpected roberta.encoder."),
               (edit_weights({"lm_head.decoder.weight": torch.ones(97, 24)}),
                f"lm_head.decoder.weight differs from {WORDS}"),]


@pytest.mark.parametrize("make, change, message", [(their_gpt2, *case) for case in BAD_GPT2] + [
    (their_roberta, *case) for case in BAD_ROBERTA],
    ids=[case[1] for case in BAD_GPT2 + BAD_ROBERTA])
def test_a_bad_checkpoint_is_refused_with_its_reason(tmp_path, make, change, message):
    """Nothing is loaded halfway: each defect is named, with the file."""
    make(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as e:
        from_pretrained(tmp_path)
    assert message in str(e.value)


def test_a_folder_that_is_not_there(tmp_path):
    """A path that looks like a folder is never looked up on the hub."""
    with pytest.raises(ValueError, match="does not exist"):
        from_pretrained(tmp_path / "nowhere")
