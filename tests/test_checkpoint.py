"""The run folder: PEFT loads the adapter, `transformers` the merged model, and a resumed run is the same run."""
import json

import pytest
import torch
from conftest import adapt, calibrated, every_variant, tiny_gpt, tokens, train_steps
from safetensors.torch import load_file, save_file

import checkpoint
import lora
from methods import METHODS
from model import from_pretrained

ALL = ("q", "k", "v", "o", "up", "down")


def peft_logits(folder, adapter, idx):
    """Logits of transformers + peft for a base folder and an adapter folder; and the model."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    peft = pytest.importorskip("peft", reason="the oracle; pip install -r requirements-dev.txt")
    base = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return model(idx).logits, model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@every_variant
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ALL], ids="+".join)
def test_peft_loads_the_adapter_and_gives_the_merged_models_logits(tmp_path, method, hparams, targets):
    """base + adapter folder in PEFT = our merged model (1e-5 relative); exact methods = our unmerged model too."""
    model = tiny_gpt(torch.float32)
    model.save_pretrained(tmp_path / "base")
    idx = tokens()[0]
    base_logits = model(idx)[0]
    layers = adapt(model, method, hparams, targets=targets)
    train_steps(model, layers, 4)
    unmerged = model(idx)[0]
    calibrated(model, layers)
    (tmp_path / "run").mkdir()
    checkpoint.save_adapter(tmp_path / "run", model, tmp_path / "base")
    exact = all(layer.exact_merge for layer in layers)
    merged = lora.merge(model)(idx)[0]
    found, _ = peft_logits(tmp_path / "base", tmp_path / "run", idx)
    assert relative(base_logits, found) > 1e-2
    assert relative(found, merged) < 1e-5
    if exact:
        assert relative(found, unmerged) < 1e-5


def test_the_adapter_folder_is_small_and_named_as_peft_names_it(tmp_path):
    """No base weights; keys, shapes and config of q and v on GPT-2: one c_attn of rank 2 r, its scale unchanged."""
    model = tiny_gpt(torch.float32)
    layers = adapt(model, "rslora", {}, r=4, alpha=6)
    checkpoint.save_adapter(tmp_path, model, "some/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.2.attn.c_attn."
    assert len(tensors) == 8
    assert tensors[prefix + "lora_A.weight"].shape == (8, 16) and tensors[prefix + "lora_B.weight"].shape == (48, 8)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["target_modules"] == ["attn.c_attn"]
    assert config["lora_alpha"] / config["r"] == layers[0].scaling == 3.0


def test_the_merged_checkpoint_loads_in_transformers(tmp_path, base):
    """merged/ is a checkpoint of its own, with the tokenizer beside it."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    model, idx = from_pretrained(base), tokens(V=320)[0]
    adapt(model, "lora", {})
    lora.merge(model)
    checkpoint.save_merged(tmp_path, model, base)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert relative(theirs(idx).logits, model(idx)[0]) < 1e-5
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == (base / "tokenizer.tiktoken").read_bytes()


# Resuming

def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


@every_variant
def test_resuming_restores_everything_that_training_changes(tmp_path, method, hparams):
    """Adapters, buffers, a moved W, Adam's moments and the random state come back bit for bit."""
    def start():
        torch.manual_seed(0)
        model = tiny_gpt()
        return model, adapt(model, method, hparams, random=False)

    def steps(model, layers, optimizer, numbers):
        for step in numbers:
            model(*tokens())[1].backward()  # random tokens: the random state matters
            optimizer.step()
            optimizer.zero_grad()
            layers[0].after_step(layers, step)
    file = tmp_path / "resume.safetensors"
    model, layers = start()
    optimizer = optimizer_of(model)
    steps(model, layers, optimizer, range(1, 4))
    rows = [dict(step=3, train_loss=1.5, val_loss=None)]
    checkpoint.save_state(file, model, optimizer, 3, {"lr": 1e-2}, rows)
    steps(model, layers, optimizer, range(4, 7))
    expected = model.state_dict()

    model, layers = start()
    optimizer = optimizer_of(model)
    assert checkpoint.load_state(file, model, optimizer, {"lr": 1e-2}) == (3, rows)
    steps(model, layers, optimizer, range(4, 7))
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@every_variant
def test_the_state_is_adapter_sized(method, hparams):
    """What is saved are the adapters, their buffers and weights that the method moves; not the frozen base."""
    model = tiny_gpt()
    layers = adapt(model, method, hparams)
    names = set(checkpoint.changing(model))
    expected = {f"h.{i}.attn.{t}.{name}" for i in range(4) for t in "qv" for name in layers[0].state_dict()
                if name != "bias" and (name != "weight" or layers[0].moves_weight)}
    assert names == expected


def test_an_adapter_sized_checkpoint_restores_the_W_of_delta_lora():
    """{A_T, B_T, A_S, B_S} and W_0 give W_T: the exported LoRA of rank 2 r says all of the motion."""
    model = tiny_gpt()
    layers = adapt(model, "deltalora", dict(delta_start=2), random=False)
    W_0 = [layer.weight.clone() for layer in layers]
    train_steps(model, layers, 6)
    for layer, start in zip(layers, W_0, strict=True):
        A, B = layer.as_lora()
        A_T, A_S = A.split(layer.r)
        B_T, B_S = B[:, :layer.r] / (1 + 2.0), B[:, layer.r:] / -2.0
        assert (layer.weight - start).abs().max() > 1e-4
        torch.testing.assert_close(layer.weight, start + 2.0 * layer.scaling * (B_T @ A_T - B_S @ A_S))


def test_a_bad_state_is_refused(tmp_path):
    """Absent, cut short, another configuration, missing, unexpected or mis-shaped tensors: nothing is loaded."""
    model = tiny_gpt()
    adapt(model, "lora", {})
    optimizer = optimizer_of(model)
    file = tmp_path / "resume.safetensors"
    model(*tokens())[1].backward()
    optimizer.step()

    def refused(message, settings=None):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            checkpoint.load_state(file, model, optimizer, settings or {"rank": 3})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    refused("nothing to resume")
    checkpoint.save_state(file, model, optimizer, 1, {"rank": 3}, [dict(step=1)])
    refused("with rank 4: it began with 3", {"rank": 4})
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    refused("damaged")
    file.write_bytes(whole[:4])
    refused("damaged")
    metadata = {"step": "1", "settings": '{"rank": 3}', "rows": '[{"step": 1}]'}
    file.write_bytes(whole)
    tensors = load_file(file)
    key = "model.h.0.attn.q.lora_A"
    for change, message in (({key: None}, "lacks h.0.attn.q.lora_A"),
                            ({"model.more": torch.ones(1)}, "unexpected more"),
                            ({"rng.cpu": None}, "lacks rng.cpu"), ({"optimizer.3.exp_avg": None}, "lacks 3.exp_avg"),
                            ({"optimizer.3.exp_avg": torch.ones(1)}, r"3.exp_avg has shape \(1,\), not"),
                            ({key: torch.ones(2, 16)}, r"shape \(2, 16\), not \(3, 16\)")):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, file, metadata)
        refused(message)
    for bad in (None, {**metadata, "step": "2"}, {**metadata, "settings": "[]"}, {**metadata, "rows": "[]"}):
        save_file(tensors, file, bad)
        refused("damaged")


def test_every_method_of_the_registry_has_a_class_that_is_a_lora():
    """methods.py: adapters share the surgery of lora.py; `full` is the entry without a class."""
    assert METHODS["full"] == (None, {})
    assert all(issubclass(adapter, lora.LoRALinear) for adapter, _ in METHODS.values() if adapter)
