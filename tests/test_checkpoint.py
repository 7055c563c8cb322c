"""The run folder: PEFT loads the adapter, `transformers` the merged model, and a resumed run is the same run."""
import copy
import json

import pytest
import torch
import torch.nn as nn
from conftest import (
    adapt,
    batch,
    calibrated,
    every_model,
    every_variant,
    head_of,
    one_step,
    tiny_gpt,
    tiny_roberta,
    tokens,
    train_steps,
)
from safetensors.torch import load_file, save_file

import lora
from checkpoints import adapters, state, tokenizers
from checkpoints.pretrained import from_pretrained, save_pretrained
from methods import METHODS

ALL = ("q", "k", "v", "o", "up", "down")


def peft_logits(folder, adapter, idx, dtype=torch.float32):
    """Logits of transformers + peft for a base folder and an adapter folder; and the model."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    peft = pytest.importorskip("peft", reason="the oracle; pip install -r requirements-dev.txt")
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    base = getattr(transformers, kind).from_pretrained(folder).eval()
    model = peft.PeftModel.from_pretrained(base, adapter).eval().to(dtype)
    with torch.no_grad():
        return model(idx, attention_mask=idx != (1 if "Roberta" in kind else -1)).logits, model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@every_model
@every_variant
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("down",), ALL], ids="+".join)
def test_peft_loads_the_adapter_and_gives_the_merged_models_logits(tmp_path, method, hparams, targets, tiny):
    """base + adapter folder in PEFT = our merged model (1e-5 relative) = the folder loaded here again; exact methods =
    our unmerged model too. A classifier's head, changed by the training, travels along. It is what the fp32 files hold
    that is compared, so the forwards are in float64."""
    model = tiny(torch.float32)
    save_pretrained(model, tmp_path / "base")
    idx = batch(model)[0]
    base_logits = model(idx)[0]
    layers = adapt(model, method, hparams, targets=targets)
    train_steps(model, layers, 4)
    calibrated(model.eval(), layers)
    unmerged = copy.deepcopy(model).double()(idx)[0]
    (tmp_path / "run").mkdir()
    adapters.save_adapter(tmp_path / "run", model, tmp_path / "base")
    exact = all(layer.exact_merge for layer in layers)
    merged = lora.merge(model).double()(idx)[0]
    found, _ = peft_logits(tmp_path / "base", tmp_path / "run", idx, torch.float64)
    assert relative(base_logits, found) > 1e-2
    assert relative(found, merged) < 1e-5
    if exact:
        assert relative(found, unmerged) < 1e-5
    kind = json.loads((tmp_path / "run/adapter_config.json").read_text())["peft_type"]
    assert kind == ("LORA" if tiny is tiny_gpt else layers[0].peft_type)
    if kind == "LORA":
        again = from_pretrained(tmp_path / "base")
        adapters.load_adapter(again, tmp_path / "run")
        assert relative(again.double()(idx)[0], merged) < 1e-5


def test_the_adapter_folder_is_small_and_named_as_peft_names_it(tmp_path):
    """No base weights; keys, shapes and config of q and v on GPT-2: one c_attn of rank 2 r, its scale unchanged."""
    model = tiny_gpt(torch.float32)
    layers = adapt(model, "rslora", {}, r=4, alpha=6)
    adapters.save_adapter(tmp_path, model, "some/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.2.attn.c_attn."
    assert len(tensors) == 8
    assert tensors[prefix + "lora_A.weight"].shape == (8, 16) and tensors[prefix + "lora_B.weight"].shape == (48, 8)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["target_modules"] == ["attn.c_attn"]
    assert config["lora_alpha"] / config["r"] == layers[0].scaling == 3.0


def test_the_head_of_a_classifier_is_in_the_adapter_folder(tmp_path):
    """RoBERTa: SEQ_CLS, q and v by their names in `transformers`, nn.Linear orientation, the head beside them."""
    model = tiny_roberta(torch.float32)
    adapt(model, "lora", {}, r=4)
    adapters.save_adapter(tmp_path, model, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "score"]
    assert config["target_modules"] == ["attention.self.query", "attention.self.value"] and not config["fan_in_fan_out"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.roberta.encoder.layer.2.attention.self.query.lora_"
    assert tensors[prefix + "A.weight"].shape == (4, 16) and tensors[prefix + "B.weight"].shape == (16, 4)
    assert torch.equal(tensors["base_model.model.classifier.out_proj.weight"], model.classifier.out_proj.weight)
    assert len(tensors) == 2 * 2 * 4 + 4


@pytest.mark.parametrize("targets, config", [
    (["c_attn"], {}), (["c_attn", "mlp.c_proj"], dict(use_rslora=True)), (["attn.c_proj"], dict(lora_alpha=3)),
    (["c_attn"], dict(r=2, rank_pattern={"h.1.attn.c_attn": 5}, alpha_pattern={"h.2.attn.c_attn": 7})),
    (["c_attn"], dict(r=20)), (["query", "value"], {}), (["dense"], dict(use_rslora=True)), (["query"], dict(r=20))])
def test_an_adapter_made_by_peft_loads_here(tmp_path, targets, config):
    """PEFT's adapter on GPT-2 or RoBERTa: alpha / r, use_rslora, patterns, ranks beyond the width: same logits."""
    peft = pytest.importorskip("peft", reason="the oracle; pip install -r requirements-dev.txt")
    import transformers
    gpt = targets[0].startswith(("c_", "attn"))
    model = (tiny_gpt if gpt else tiny_roberta)(torch.float32)
    save_pretrained(model, tmp_path / "base")
    kind = transformers.GPT2LMHeadModel if gpt else transformers.RobertaForSequenceClassification
    config = peft.LoraConfig(**{**dict(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=gpt,
                                       task_type="CAUSAL_LM" if gpt else "SEQ_CLS"), **config})
    if targets == ["dense"]:
        config.exclude_modules = "classifier.dense"
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    idx = batch(model)[0]
    base = model(idx)[0]
    layers = adapters.load_adapter(model, tmp_path / "adapter")
    expected = theirs.eval()(idx, attention_mask=idx != (-1 if gpt else 1)).logits
    assert relative(base, expected) > 1e-3 and relative(model(idx)[0], expected) < 1e-5
    assert {p for layer in layers for p in (layer.lora_A, layer.lora_B)} | set(head_of(model)) == {
        p for p in model.parameters() if p.requires_grad}


def test_an_untrained_adapter_loads_too(tmp_path):
    """B = 0 in all of c_attn: q, k and v all get the file's A, a zero B, and the dropout that is asked for."""
    model = tiny_gpt(torch.float32)
    for layer in adapt(model, "lora", {}, targets=["q"], random=False):
        nn.init.zeros_(layer.lora_B)
    adapters.save_adapter(tmp_path, model, "some/base")
    A = model.h[2].attn.q.lora_A.detach()
    layers = adapters.load_adapter(fresh := tiny_gpt(torch.float32), tmp_path, dropout=0.3)
    assert len(layers) == 12 and all(layer.drop.p == 0.3 and not layer.lora_B.any() for layer in layers)
    assert all(torch.equal(linear.lora_A, A) for linear in (fresh.h[2].attn.q, fresh.h[2].attn.k, fresh.h[2].attn.v))


def test_q_and_v_come_back_out_of_c_attn_with_their_own_rank(tmp_path):
    """One c_attn of rank 2 r holds both; loading gives each the r rows of A that its part of B uses, and k nothing."""
    model = tiny_gpt(torch.float32)
    adapt(model, "lora", {}, targets=["q", "v"], r=3)
    adapters.save_adapter(tmp_path, model, "some/base")
    assert len(load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]) == 6
    layers = adapters.load_adapter(fresh := tiny_gpt(torch.float32), tmp_path)
    assert len(layers) == 8 and {layer.r for layer in layers} == {3}
    assert torch.equal(fresh.h[1].attn.v.lora_A, model.h[1].attn.v.lora_A)
    assert torch.equal(fresh.h[1].attn.v.lora_B, model.h[1].attn.v.lora_B)
    assert type(fresh.h[1].attn.k) is nn.Linear


def test_a_bad_adapter_folder_is_refused(tmp_path):
    """Missing, unexpected, mis-shaped, another kind, a config that lies about ranks: the model stays as it was."""
    model = tiny_roberta(torch.float32)
    adapt(model, "lora", {}, r=4)
    adapters.save_adapter(tmp_path, model, "some/base")
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole, good = load_file(tensors), json.loads(config.read_text())
    query = "base_model.model.roberta.encoder.layer.2.attention.self.query.lora_"

    def refused(message, settings=(), change=()):
        config.write_text(json.dumps({**good, **dict(settings)}))
        save_file({k: v for k, v in {**whole, **dict(change)}.items() if v is not None}, tensors)
        fresh = tiny_roberta(torch.float32)
        modules, before = list(fresh.modules()), {k: v.clone() for k, v in fresh.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            adapters.load_adapter(fresh, tmp_path)
        assert list(fresh.modules()) == modules
        assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    refused("peft_type 'LOHA' is not supported", {"peft_type": "LOHA"})
    refused("use_dora True", {"use_dora": True})
    refused("bias 'all'", {"bias": "all"})
    refused("init_lora_weights 'pissa' is not supported", {"init_lora_weights": "pissa"})
    refused("alora_invocation_tokens", {"alora_invocation_tokens": [5]})
    refused("rank_pattern .* is none", {"rank_pattern": ["a"]})
    refused("rank_pattern .* is none", {"rank_pattern": {"(": 1}})
    refused("its config says r 3", {"r": 3})
    refused("lora_alpha '8'", {"lora_alpha": "8"})
    refused("lacks .*query.lora_B.weight", change={query + "B.weight": None})
    refused("unexpected .*query.lora_B.weight", change={query + "A.weight": None})
    more = query.replace("2", "9") + "A.weight"
    refused(f"unexpected {more}", change={more: torch.ones(4, 16)})
    refused(r"shape \(4, 15\), not \(4, 16\)", change={query + "A.weight": torch.ones(4, 15)})
    refused("holds NaN or inf", change={query + "A.weight": torch.full((4, 16), torch.nan)})
    refused("which is no matrix", change={query + "A.weight": torch.tensor(1.0)})
    refused("lora_alpha", {"lora_alpha": 10**400})
    more = "base_model.model.classifier.dense.bias"
    refused(f"head, lacks {more}", change={more: None})
    refused("does not begin with base_model.model.", change={"more": torch.ones(1)})
    config.write_text(json.dumps(good))
    save_file({k: v for k, v in whole.items() if "classifier" in k}, tensors)
    with pytest.raises(ValueError, match="holds no adapter for this model"):
        adapters.load_adapter(tiny_roberta(), tmp_path)
    tensors.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors does not exist"):
        adapters.load_adapter(tiny_roberta(), tmp_path)


def test_the_merged_checkpoint_loads_in_transformers(tmp_path, base):
    """merged/ is a checkpoint of its own, with the tokenizer beside it."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    model, idx = from_pretrained(base), tokens(V=320)[0]
    adapt(model, "lora", {})
    lora.merge(model)
    state.save_merged(tmp_path, model, base, tokenizers.load(base, 320))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert relative(theirs(idx).logits, model(idx)[0]) < 1e-5
    assert (tmp_path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


# Resuming

def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def test_the_best_step_is_that_of_the_metric_then_of_the_loss():
    """Without a metric the lowest validation loss; with one the highest value, among equals the lowest loss."""
    losses = [(2, 0.9), (4, 0.5), (5, None), (6, 0.7)]
    assert state.best_step([dict(step=step, val_loss=loss) for step, loss in losses]) == 4
    for accuracies, best in (((0.5, 0.6, None, 0.8), 6), ((0.8, 0.6, None, 0.8), 6), ((0.9, 0.6, None, 0.8), 2)):
        assert state.best_step([dict(step=step, val_loss=loss, val_accuracy=accuracy) for (step, loss), accuracy
                                     in zip(losses, accuracies, strict=True)]) == best


@every_model
@every_variant
def test_resuming_restores_everything_that_training_changes(tmp_path, method, hparams, tiny):
    """Adapters, a head, buffers, a moved W, Adam's moments and the random state come back bit for bit."""
    def start():
        torch.manual_seed(0)
        model = tiny()
        return model, adapt(model, method, hparams, random=False)

    def steps(model, layers, optimizer, numbers):
        for step in numbers:
            one_step(model, layers, optimizer, step, batch(model))  # random tokens: the random state matters
    file = tmp_path / "resume.safetensors"
    model, layers = start()
    optimizer = optimizer_of(model)
    layers[0].begin(layers, 6)
    steps(model, layers, optimizer, range(1, 4))
    rows = [dict(step=3, train_loss=1.5, val_loss=1.0, seconds=1.0)]
    state.save_state(file, model, optimizer, 3, {"lr": 1e-2}, rows)
    steps(model, layers, optimizer, range(4, 7))
    expected = model.state_dict()

    model, layers = start()
    optimizer = optimizer_of(model)
    layers[0].begin(layers, 6, done=3)
    assert state.load_state(file, model, optimizer)[:2] == (3, rows)
    steps(model, layers, optimizer, range(4, 7))
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@every_variant
def test_the_state_is_adapter_sized(method, hparams):
    """What is saved are the adapters, their buffers and weights that the method moves; not the frozen base."""
    model = tiny_gpt()
    layers = adapt(model, method, hparams)
    names = set(state.changing(model))
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

    def refused(message):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            state.load_state(file, model, optimizer)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    refused("nothing to resume")
    state.save_state(file, model, optimizer, 1, {"rank": 3}, [dict(step=1, val_loss=1.0, seconds=1.0)])
    with pytest.raises(ValueError, match="rank is 4 now, and it began with 3"):
        state.check_resume(tmp_path, {"rank": 4, "steps": 2}, METHODS["lora"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    refused("damaged")
    file.write_bytes(whole[:4])
    refused("damaged")
    metadata = {"step": "1", "settings": '{"rank": 3}', "rows": '[{"step": 1, "val_loss": 1.0, "seconds": 1.0}]'}
    file.write_bytes(whole)
    tensors = load_file(file)
    key = "model.h.0.attn.q.lora_A"
    for change, message in (({key: None}, "lacks h.0.attn.q.lora_A"),
                            ({"model.more": torch.ones(1)}, "unexpected more"),
                            ({key: torch.full((3, 16), torch.nan)}, "damaged.*lora_A holds NaN or inf"),
                            ({"rng.cpu": None}, "lacks rng.cpu"), ({"optimizer.3.exp_avg": None}, "lacks 3.exp_avg"),
                            ({"optimizer.3.exp_avg": torch.ones(1)}, r"3.exp_avg has shape \(1,\), not"),
                            ({key: torch.ones(2, 16)}, r"shape \(2, 16\), not \(3, 16\)")):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, file, metadata)
        refused(message)
    row = json.loads(metadata["rows"])[0]
    rows = [[row, row], [{**row, "step": 2}, row], [{**row, "step": 0}], [{**row, "seconds": "1"}],
            [{**row, "step": 0.5, "more": 1}, row]]
    for bad in (None, {**metadata, "step": "2"}, {**metadata, "settings": "[]"}, {**metadata, "rows": "[]"},
                *({**metadata, "rows": json.dumps(some)} for some in rows)):
        save_file(tensors, file, bad)
        refused("damaged")


def test_every_method_of_the_registry_has_a_class_that_is_a_lora():
    """methods.py: adapters share the surgery of lora.py; `full` is the entry without a class."""
    assert [name for name, method in METHODS.items() if not method.adapter] == ["full", "head"]
    assert all(issubclass(method.adapter, lora.LoRALinear) for method in METHODS.values() if method.adapter)
    assert all(set(method.for_merging) <= set(method.flags) for method in METHODS.values())
