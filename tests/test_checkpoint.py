"""The run folder: PEFT loads the adapter, `transformers` the merged model, and a resumed run is the
same run."""
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
    factors,
    head_of,
    one_step,
    tiny_gpt,
    tiny_llama,
    tiny_roberta,
    tokens,
    train_steps,
)
from safetensors.torch import load_file, save_file

import lora
from checkpoints import adapters, tokenizers
from checkpoints.pretrained import from_pretrained, save_merged, save_pretrained
from methods import METHODS
from run import folder

QV, LINEARS = ("q", "v"), ("q", "k", "v", "o", "up", "down")
# what the hub calls the blocks and the linears of our models
HUB = {tiny_gpt: ("transformer.h.", dict(q="attn.c_attn", k="attn.c_attn", v="attn.c_attn",
                                         o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj")),
       tiny_llama: ("model.layers.", {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
           name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}),
       tiny_roberta: ("roberta.encoder.layer.", dict(
           q="attention.self.query", k="attention.self.key", v="attention.self.value",
           o="attention.output.dense", up="intermediate.dense", down="output.dense"))}


def oracle(name):
    return pytest.importorskip(name, reason="the oracle, in [dev]")


def peft_logits(folder, adapter, idx, dtype=torch.float32):
    """Logits of transformers + peft for a base folder and an adapter folder; and the model."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    base = getattr(oracle("transformers"), kind).from_pretrained(folder).eval()
    model = oracle("peft").PeftModel.from_pretrained(base, adapter).eval().to(dtype)
    with torch.no_grad():
        return model(idx, attention_mask=idx != (1 if "Roberta" in kind else -1)).logits, model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def config_of(folder, **changes):
    """What an adapter folder's config says, once the changes are written into it."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return json.loads(path.read_text())


@every_model
@every_variant
@pytest.mark.parametrize("targets", [QV, LINEARS], ids=["q+v", "all"])
def test_peft_loads_the_adapter_and_gives_the_merged_models_logits(
        tmp_path, method, hparams, targets, tiny):
    """base + adapter folder in PEFT = our merged model (1e-5 relative) = the folder loaded here
    again; exact methods = our unmerged model too. A classifier's head, changed by the training,
    travels along. It is what the fp32 files hold that is compared, so the forwards are in float64.
    """
    model = tiny(torch.float32)
    save_pretrained(model, tmp_path / "base")
    idx = batch(model)[0]
    base_logits = model(idx)[0]
    layers = adapt(model, method, hparams, targets)
    train_steps(model, layers, 4)
    calibrated(model.eval(), layers)
    unmerged = copy.deepcopy(model).double()(idx)[0]
    adapters.save_adapter(tmp_path / "run", model, tmp_path / "base")
    exact = all(layer.exact_merge for layer in layers)
    merged = lora.merge(model).double()(idx)[0]
    found, _ = peft_logits(tmp_path / "base", tmp_path / "run", idx, torch.float64)
    assert relative(base_logits, found) > 1e-2
    assert relative(found, merged) < 1e-5
    if exact:
        assert relative(found, unmerged) < 1e-5
    kind = config_of(tmp_path / "run")["peft_type"]
    assert kind == ("LORA" if tiny is tiny_gpt else layers[0].peft_type)
    if kind == "LORA":
        again = from_pretrained(tmp_path / "base")
        adapters.load_adapter(again, tmp_path / "run")
        assert relative(again.double()(idx)[0], merged) < 1e-5


def adapted_by_peft(theirs):
    """Names of the modules that carry a layer of PEFT's."""
    return {name.removeprefix("base_model.model.") for name, m in theirs.named_modules()
            if hasattr(m, "lora_A")}


@every_model
@pytest.mark.parametrize("targets", [QV, ("attn.q",), ("k",), ("o",), ("down",), LINEARS],
                         ids="+".join)
def test_peft_adapts_exactly_the_modules_that_we_adapted(tmp_path, tiny, targets):
    """Also where a name is the end of another, as "output.dense" of "attention.output.dense": at
    B = 0 no logit shows an adapter too many. Once B is not 0, the logits are ours as well."""
    model = tiny(torch.float32)
    save_pretrained(model, tmp_path / "base")
    targets += ("gate",) * (targets == LINEARS and tiny is tiny_llama)
    layers = adapt(model, "lora", {}, targets)
    adapters.save_adapter(tmp_path / "run", model, tmp_path / "base")
    logits, theirs = peft_logits(tmp_path / "base", tmp_path / "run", idx := batch(model)[0])
    blocks, names = HUB[tiny]
    assert adapted_by_peft(theirs) == {f"{blocks}{i}.{names[target.rpartition('.')[2]]}"
                                       for i in range(4) for target in targets}
    assert relative(logits, model(idx)[0]) < 1e-5
    adapters.load_adapter(again := from_pretrained(tmp_path / "base"), tmp_path / "run")
    count = sum(isinstance(m, lora.LoRALinear) for m in again.modules())
    assert count == (len(layers) if tiny is not tiny_gpt or targets != ("attn.q",) else 4)


OUTPUTS = "0.output.dense", "1.output.dense"  # and not attention.output.dense


@pytest.mark.parametrize("targets", [
    QV, ("key",), ("attention.output.dense",), OUTPUTS, OUTPUTS[:1],
    ("query", "key", "value", "attention.output.dense", "intermediate.dense", *OUTPUTS)],
    ids="+".join)
def test_peft_adapts_exactly_the_modules_of_their_roberta_that_we_adapted(tmp_path, targets):
    """The same on a model of `transformers`."""
    transformers = oracle("transformers")
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32))
    model.save_pretrained(tmp_path / "base")
    targets = [{"q": "query", "v": "value"}.get(target, target) for target in targets]
    lora.apply(model, lora.LoRALinear, targets, r=2, alpha=4)
    ours = {name for name, m in model.named_modules() if isinstance(m, lora.LoRALinear)}
    adapters.save_adapter(tmp_path / "run", model, tmp_path / "base")
    assert adapted_by_peft(peft_logits(tmp_path / "base", tmp_path / "run", tokens()[0])[1]) == ours
    again = type(model).from_pretrained(tmp_path / "base")
    adapters.load_adapter(again, tmp_path / "run")
    assert {name for name, m in again.named_modules() if isinstance(m, lora.LoRALinear)} == ours


@pytest.mark.parametrize("tiny, task, shapes", [
    (tiny_gpt, "CAUSAL_LM", {"attn.c_attn": (8, 48)}),
    (tiny_llama, "CAUSAL_LM", {"self_attn.q_proj": (4, 32), "self_attn.v_proj": (4, 16)}),
    (tiny_roberta, "SEQ_CLS", {"attention.self.query": (4, 16), "attention.self.value": (4, 16)})])
def test_the_adapter_folder_is_small_and_named_as_peft_names_it(tmp_path, tiny, task, shapes):
    """No base weights; names, shapes and config of q and v: of GPT-2 one c_attn of rank 2 r, its
    scale unchanged. The head of a classifier lies beside them."""
    model = tiny(torch.float32)
    layers = adapt(model, "rslora", {}, r=4, alpha=6)
    adapters.save_adapter(tmp_path, model, "some/base")
    tensors, expected = load_file(tmp_path / "adapter_model.safetensors"), {}
    for name, (rank, d_out) in shapes.items():
        for i in range(4):
            place = f"base_model.model.{HUB[tiny][0]}{i}.{name}.lora_"
            expected |= {f"{place}A.weight": (rank, 16), f"{place}B.weight": (d_out, rank)}
    head = {f"base_model.model.classifier.{name}": t for name, t in (
        model.classifier.state_dict() if tiny is tiny_roberta else {}).items()}
    assert {name: t.shape for name, t in tensors.items() if name not in head} == expected
    assert all(torch.equal(tensors[name], t) for name, t in head.items())
    config = config_of(tmp_path)
    assert config["task_type"] == task and config["target_modules"] == list(shapes)
    assert config["modules_to_save"] == (["classifier", "score"] if head else None)
    assert config["fan_in_fan_out"] == (tiny is tiny_gpt)
    assert config["base_model_name_or_path"] == "some/base"
    assert config["lora_alpha"] / config["r"] == layers[0].scaling == 3.0


GPT_ADAPTERS = [(["c_attn"], {}), (["c_attn", "mlp.c_proj"], dict(use_rslora=True)),
                (["attn.c_proj"], dict(lora_alpha=3)),
                (["c_attn"],
                 dict(r=2, rank_pattern={"h.1.attn.c_attn": 5},
                      alpha_pattern={"h.2.attn.c_attn": 7})), (["c_attn"], dict(r=20))]
ROBERTA_ADAPTERS = [(["query", "value"], {}), (["query"], dict(r=20)),
                    (["dense"], dict(use_rslora=True, exclude_modules="classifier.dense"))]
LLAMA_ADAPTERS = [
    ("all-linear", {}), (["q_proj", "down_proj"], dict(use_rslora=True)),
    (r".*\.(gate|o)_proj", {}),
    (["q_proj", "v_proj"], dict(layers_to_transform=[0, 2], layers_pattern="layers"))]


@pytest.mark.parametrize("tiny, targets, config", [(tiny_gpt, *case) for case in GPT_ADAPTERS] + [
    (tiny_roberta, *case) for case in ROBERTA_ADAPTERS] + [(tiny_llama, *case)
                                                           for case in LLAMA_ADAPTERS])
def test_an_adapter_made_by_peft_loads_here(tmp_path, tiny, targets, config):
    """Whatever it says of targets, alpha / r, use_rslora, patterns, ranks beyond the width: same
    logits."""
    model, theirs = made_by_peft(tmp_path, tiny, target_modules=targets, **config)
    idx = batch(model)[0]
    base = model(idx)[0]
    layers = adapters.load_adapter(model, tmp_path / "adapter")
    expected = theirs(idx, attention_mask=idx != (1 if tiny is tiny_roberta else -1)).logits
    assert relative(base, expected) > 1e-3 and relative(model(idx)[0], expected) < 1e-5
    assert {p for layer in layers for p in (layer.lora_A, layer.lora_B)} | set(head_of(model)) == {
        p for p in model.parameters() if p.requires_grad}


def made_by_peft(folder, tiny, **config):
    """(our model, PEFT's of the same weights with random factors), its adapter in folder /
    "adapter"."""
    model = tiny(torch.float32)
    save_pretrained(model, folder / "base")
    kind, = json.loads((folder / "base/config.json").read_text())["architectures"]
    task = "SEQ_CLS" if tiny is tiny_roberta else "CAUSAL_LM"
    config = oracle("peft").LoraConfig(**{**dict(
        r=3, lora_alpha=6, fan_in_fan_out=tiny is tiny_gpt, task_type=task), **config})
    theirs = oracle("peft").get_peft_model(
        getattr(oracle("transformers"), kind).from_pretrained(folder / "base"), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(folder / "adapter")
    return model, theirs


GENERAL, SPECIAL = "query", r"layer\.[12]\..*query"
ANCHORED = "^roberta.encoder.layer.2.*(query|value)"


@pytest.mark.parametrize("ranks", [(GENERAL, SPECIAL), (SPECIAL, GENERAL),
                                   (ANCHORED, SPECIAL, GENERAL),
                                   ("2.attention.self.query", ANCHORED, "value"), ("uery", "self")],
                         ids="before".join)
@pytest.mark.filterwarnings("ignore:.*pattern")  # PEFT's, of a key that is no whole name
@pytest.mark.parametrize("alphas", [(), (SPECIAL, ANCHORED, "self.value"),
                                    ("value|query", SPECIAL)])
def test_of_two_patterns_that_match_the_one_of_peft_is_taken(tmp_path, ranks, alphas):
    """Every layer has the rank and the scale that PeftModel.from_pretrained gives it, whatever
    the order in the file (PEFT writes them sorted, people do not) and whatever its other table
    says."""
    patterns = dict(rank_pattern={key: 5 + i for i, key in enumerate(ranks)},
                    alpha_pattern={key: 10 + 3 * i for i, key in enumerate(alphas)})
    model, _ = made_by_peft(tmp_path, tiny_roberta, target_modules=["query", "value"], **patterns)
    config_of(tmp_path / "adapter", **patterns)
    adapters.load_adapter(model, tmp_path / "adapter")
    theirs = peft_logits(tmp_path / "base", tmp_path / "adapter", batch(model)[0])[1]
    found = set()
    for i, block in enumerate(theirs.base_model.model.roberta.encoder.layer):
        for ours, other in ((model.h[i].attn.q, block.attention.self.query),
                            (model.h[i].attn.v, block.attention.self.value)):
            assert (ours.r, ours.scaling) == (other.r["default"], other.scaling["default"])
            found.add((ours.r, ours.scaling))
    assert len(found) > 1 or ranks[0] == "uery"  # which matches nothing, as it is no whole name


@every_model
@pytest.mark.filterwarnings("ignore:.*pattern")
def test_layers_of_unequal_scales_go_out_as_they_came_in(tmp_path, tiny):
    """An adapter of PEFT whose layers have scales and ranks of their own, loaded and written again:
    PEFT gives the logits that it gave before. On GPT-2 q, k and v share a module there."""
    names = {"GPT": "c_attn", "Llama": "v_proj", "RoBERTa": "value"}
    name = names[type(tiny(torch.float32)).__name__]
    target = rf".*\.1\..*{name}"
    model, _ = made_by_peft(tmp_path, tiny, target_modules=[name], r=2,
                            alpha_pattern={target: 40}, rank_pattern={target: 3})
    adapters.load_adapter(model, tmp_path / "adapter")
    assert len({layer.scaling for _, layer in adapters.adapters(model)}) == 2
    adapters.save_adapter(tmp_path / "again", model, tmp_path / "base")
    idx = batch(model)[0]
    before, after = (peft_logits(tmp_path / "base", tmp_path / folder, idx)[0]
                     for folder in ("adapter", "again"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_model_without_adapters_has_none_to_write(tmp_path):
    """After merging, say: a line, and no folder."""
    for tiny in (tiny_gpt, tiny_roberta):
        with pytest.raises(ValueError, match="holds none"):
            adapters.save_adapter(tmp_path / "a", tiny(), "base")
    assert not (tmp_path / "a").exists()


@every_model
def test_every_module_stays_in_training_or_in_evaluation(tmp_path, tiny):
    """A loaded model trains throughout. Loading and merging an adapter leave each module's mode,
    and a layer with its dropout has that of the linear whose place it takes."""
    save_pretrained(tiny(torch.float32), tmp_path)
    model = from_pretrained(tmp_path)
    assert all(m.training for m in model.modules())
    for i, m in enumerate(model.modules()):
        m.training = i % 3 > 0
    modes = {name: m.training for name, m in model.named_modules()}
    assert {m.training for m in model.modules() if type(m) is nn.Linear} == {True, False}
    adapt(other := from_pretrained(tmp_path), "lora", {}, LINEARS)
    adapters.save_adapter(tmp_path / "run", other, tmp_path)
    assert all(m.training for m in other.modules())
    for layer in adapters.load_adapter(model, tmp_path / "run", dropout=0.5):
        assert layer.drop.training == layer.training
    assert modes.items() <= {name: m.training for name, m in model.named_modules()}.items()
    assert {name: m.training for name, m in lora.merge(model).named_modules()} == modes


def test_an_untrained_adapter_loads_too(tmp_path):
    """B = 0 in all of c_attn: q, k and v all get the file's A, a zero B, and the dropout that is
    asked for."""
    model = tiny_gpt(torch.float32)
    for layer in adapt(model, "lora", {}, targets=["q"], random=False):
        nn.init.zeros_(layer.lora_B)
    adapters.save_adapter(tmp_path, model, "some/base")
    A = model.h[2].attn.q.lora_A.detach()
    layers = adapters.load_adapter(fresh := tiny_gpt(torch.float32), tmp_path, dropout=0.3)
    assert len(layers) == 12 and all(layer.drop.p == 0.3 and not layer.lora_B.any()
                                     for layer in layers)
    assert all(torch.equal(linear.lora_A, A)
               for linear in (fresh.h[2].attn.q, fresh.h[2].attn.k, fresh.h[2].attn.v))


def test_q_and_v_come_back_out_of_c_attn_with_their_own_rank(tmp_path):
    """One c_attn of rank 2 r holds both; loading gives each the r rows of A that its part of B
    uses, and k nothing: the same numbers, in fp32 on a base in bf16 too."""
    model = tiny_gpt(torch.float32)
    adapt(model, "lora", {}, r=3)
    adapters.save_adapter(tmp_path, model, "some/base")
    for dtype in (torch.float32, torch.bfloat16):
        layers = adapters.load_adapter(fresh := tiny_gpt(dtype), tmp_path)
        assert len(layers) == 8 and {layer.r for layer in layers} == {3}
        for factor in ("lora_A", "lora_B"):
            found = getattr(fresh.h[1].attn.v, factor)
            assert found.dtype == torch.float32
            assert torch.equal(found, getattr(model.h[1].attn.v, factor))
        assert type(fresh.h[1].attn.k) is nn.Linear


HEAD_BIAS = "base_model.model.classifier.dense.bias"
QUERY = "base_model.model.roberta.encoder.layer.2.attention.self.query.lora_"
BAD_CONFIGS = [
    ("peft_type 'LOHA' is not supported", {"peft_type": "LOHA"}),
    ("use_dora True", {"use_dora": True}),
    ("bias 'all'", {"bias": "all"}), ("init_lora_weights 'pissa'", {"init_lora_weights": "pissa"}),
    ("alora_invocation_tokens", {"alora_invocation_tokens": [5]}), ("says r 3", {"r": 3}),
    ("rank_pattern .* is not a valid", {"rank_pattern": ["a"]}),
    ("rank_pattern .* is not a valid", {"rank_pattern": {"(": 1}}),
    ("lora_alpha '8'", {"lora_alpha": "8"}),
    ("lora_alpha", {"lora_alpha": 10**400})]
BAD_TENSORS = [
    ("lacks .*query.lora_B.weight", {QUERY + "B.weight": None}),
    ("unexpected .*query.lora_B.weight", {QUERY + "A.weight": None}),
    ("unexpected .*9.attention", {QUERY.replace("2", "9") + "A.weight": torch.ones(4, 16)}),
    (r"shape \(4, 15\), not \(4, 16\)", {QUERY + "A.weight": torch.ones(4, 15)}),
    ("holds NaN or inf", {QUERY + "A.weight": torch.full((4, 16), torch.nan)}),
    ("which is no matrix", {QUERY + "A.weight": torch.tensor(1.0)}),
    (f"head, lacks {HEAD_BIAS}", {HEAD_BIAS: None}),
    ("does not begin with base_model.model.", {"more": torch.ones(1)})]


def test_a_bad_adapter_folder_is_refused(tmp_path):
    """Missing, unexpected, mis-shaped, another kind, a config that lies about ranks: the model
    stays as it was."""
    model = tiny_roberta(torch.float32)
    adapt(model, "lora", {}, r=4)
    adapters.save_adapter(tmp_path, model, "some/base")
    tensors = tmp_path / "adapter_model.safetensors"
    whole, good = load_file(tensors), config_of(tmp_path)

    def refused(message, change=None, settings=None):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**good, **(settings or {})}))
        if tensors.exists():
            save_file({k: v for k, v in {**whole, **(change or {})}.items() if v is not None},
                      tensors)
        fresh = tiny_roberta(torch.float32)
        modules, before = list(fresh.modules()), copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=message):
            adapters.load_adapter(fresh, tmp_path)
        assert list(fresh.modules()) == modules and all(p.requires_grad for p in fresh.parameters())
        assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    for message, settings in BAD_CONFIGS:
        refused(message, settings=settings)
    for message, change in BAD_TENSORS:
        refused(message, change)
    refused("holds no adapter for this model", {name: None for name in whole if "lora" in name})
    tensors.unlink()
    refused("adapter_model.safetensors does not exist")


def test_the_merged_checkpoint_loads_in_transformers(tmp_path, base):
    """merged/ is a checkpoint of its own, with the tokenizer beside it."""
    model, idx = from_pretrained(base), tokens(V=320)[0]
    adapt(model, "lora", {})
    lora.merge(model)
    save_merged(tmp_path, model, base, tokenizers.load(base, 320))
    theirs = oracle("transformers").GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert relative(theirs(idx).logits, model(idx)[0]) < 1e-5
    assert (tmp_path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_model_is_what_was_saved_in_bf16(tmp_path, small_llama):
    """Behind the save of a merged model on a bf16 base: every parameter in memory is that of the
    file, so that what is measured then is what others load."""
    model = from_pretrained(small_llama)
    adapt(model, "lora", {})
    lora.merge(model)
    W = model.h[1].attn.q.weight.clone()
    assert save_merged(tmp_path, model, small_llama, tokenizers.load(small_llama, 320))
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.layers.1.self_attn.q_proj.weight"], W.bfloat16())
    assert not torch.equal(model.h[1].attn.q.weight, W)
    again = from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


def test_a_chat_template_outlives_a_tokenizer_that_is_written_anew(tmp_path, base):
    """A tokenizer_config.json that is there stays as it is, and transformers reads it beside the
    new tokenizer.json."""
    ours, path = tokenizers.load(base, 320), tmp_path / "tokenizer_config.json"
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}!"}
    path.write_text(json.dumps(said))
    ours.save(tmp_path, roberta=False)
    assert json.loads(path.read_text()) == said
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == "{{ messages }}!"
    assert theirs("a cheap pub")["input_ids"] == ours.encode_ordinary("a cheap pub")


# Resuming

def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, fused=True)


def test_the_best_step_is_that_of_the_metric_then_of_the_loss():
    """Without a metric the lowest validation loss; with one the highest value, among equals the
    lowest loss."""
    losses = [(2, 0.9), (4, 0.5), (5, None), (6, 0.7)]
    assert folder.best_step([dict(step=step, val_loss=loss) for step, loss in losses]) == 4
    for accuracies, best in (((0.5, 0.6, None, 0.8), 6), ((0.8, 0.6, None, 0.8), 6),
                             ((0.9, 0.6, None, 0.8), 2)):
        assert folder.best_step([dict(step=step, val_loss=loss, val_accuracy=accuracy)
                                 for (step, loss), accuracy in zip(losses, accuracies,
                                                                   strict=True)]) == best


@every_model
@every_variant
def test_resuming_restores_everything_that_training_changes(tmp_path, method, hparams, tiny):
    """Adapters, a head, buffers, a moved W, Adam's moments and the random state come back bit for
    bit, also where a factor lies in memory column by column, as one from an SVD does."""
    def start():
        torch.manual_seed(0)
        model = tiny()
        layers = adapt(model, method, hparams, random=False)
        for p in factors(layers):
            p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
        return model, layers

    def steps(model, layers, optimizer, numbers):
        for step in numbers:
            # random tokens: the random state matters
            one_step(model, layers, optimizer, step, batch(model))
    file = tmp_path / "resume.safetensors"
    model, layers = start()
    optimizer = optimizer_of(model)
    layers[0].begin(layers, 6)
    steps(model, layers, optimizer, range(1, 4))
    rows = [dict(step=3, train_loss=1.5, val_loss=1.0, seconds=1.0)]
    folder.save_state(file, model, optimizer, 3, {"lr": 1e-2}, rows)
    steps(model, layers, optimizer, range(4, 7))
    expected = model.state_dict()

    model, layers = start()
    optimizer = optimizer_of(model)
    layers[0].begin(layers, 6, done=3)
    assert folder.load_state(file, model, optimizer)[:2] == (3, rows)
    steps(model, layers, optimizer, range(4, 7))
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_a_delta_lora_run_that_is_loaded_exports_the_motion_of_its_W(tmp_path):
    """Without another step, as a finished run that is resumed to merge anew: the adapter that it
    exports is the one that it exported before, and all of W_T - W_0 + s B_T A_T is in it."""
    model, file = tiny_gpt(), tmp_path / "resume.safetensors"
    layers = adapt(model, "deltalora", dict(delta_start=2), random=False)
    W_0 = [layer.weight.clone() for layer in layers]
    train_steps(model, layers, 6)
    row = dict(step=6, val_loss=1.0, seconds=1.0)
    folder.save_state(file, model, torch.optim.SGD(factors(layers)), 6, {}, [row])
    fresh = tiny_gpt()
    again = adapt(fresh, "deltalora", dict(delta_start=2))
    folder.load_state(file, fresh, torch.optim.SGD(factors(again)))
    for layer, other, start in zip(layers, again, W_0, strict=True):
        (A, B), theirs = other.as_lora(), layer.as_lora()
        assert torch.equal(A, theirs[0]) and torch.equal(B, theirs[1])
        torch.testing.assert_close(layer.scaling * B @ A, layer.weight + layer.delta() - start)


@every_variant
def test_the_state_is_adapter_sized(method, hparams):
    """What is saved are the adapters, their buffers and weights that the method moves; not the
    frozen base."""
    model = tiny_gpt()
    layers = adapt(model, method, hparams)
    names = set(folder.changing(model))
    expected = {f"h.{i}.attn.{t}.{name}" for i in range(4) for t in "qv"
                for name in layers[0].state_dict() if name != "bias"
                and (name != "weight" or layers[0].moves_weight)}
    assert names == expected


def test_an_adapter_sized_checkpoint_restores_the_W_of_delta_lora():
    """{A_T, B_T, A_K, B_K} and W_0 give W_T: the exported LoRA of rank 2 r says all of the
    motion."""
    model = tiny_gpt()
    layers = adapt(model, "deltalora", dict(delta_start=2), random=False)
    W_0 = [layer.weight.clone() for layer in layers]
    train_steps(model, layers, 6)
    for layer, start in zip(layers, W_0, strict=True):
        A, B = layer.as_lora()
        A_T, A_K = A.split(layer.r)
        B_T, B_K = B[:, :layer.r] / (1 + 2.0), B[:, layer.r:] / -2.0
        assert (layer.weight - start).abs().max() > 1e-4
        torch.testing.assert_close(layer.weight,
                                   start + 2.0 * layer.scaling * (B_T @ A_T - B_K @ A_K))


def test_a_bad_state_is_refused(tmp_path):
    """Absent, cut short, another configuration, missing, unexpected or mis-shaped tensors: nothing
    is loaded."""
    model, file = tiny_gpt(), tmp_path / "resume.safetensors"
    adapt(model, "lora", {})
    optimizer = optimizer_of(model)
    model(*tokens())[1].backward()
    optimizer.step()

    def refused(message):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            folder.load_state(file, model, optimizer)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    refused("nothing to resume")
    row = dict(step=1, val_loss=1.0, seconds=1.0)
    folder.save_state(file, model, optimizer, 1, {"rank": 3}, [row])
    with pytest.raises(ValueError, match="rank is 4 now, and it began with 3"):
        folder.check_resume(tmp_path, {"rank": 4, "steps": 2}, METHODS["lora"])
    whole, tensors, key = file.read_bytes(), load_file(file), "model.h.0.attn.q.lora_A"
    for size in (4, len(whole) - 50):
        file.write_bytes(whole[:size])
        refused("damaged")
    good = {"step": "1", "settings": '{"rank": 3}', "rows": json.dumps([row])}
    for change, message in (({key: None}, "lacks h.0.attn.q.lora_A"),
                            ({"model.more": torch.ones(1)}, "unexpected more"),
                            ({key: torch.full((3, 16), torch.nan)}, "damaged.*lora_A holds NaN or "
                             "inf"), ({"rng.cpu": None}, "lacks rng.cpu"),
                            ({"optimizer.3.exp_avg": None}, "lacks 3.exp_avg"),
                            ({"optimizer.3.exp_avg": torch.ones(1)}, r"3.exp_avg has shape \(1,\), "
                             r"not"),
                            ({key: torch.ones(2, 16)}, r"shape \(2, 16\), not \(3, 16\)")):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, file, good)
        refused(message)
    rows = [[], [row, row], [{**row, "step": 2}, row], [{**row, "step": 0}],
            [{**row, "seconds": "1"}],
            [{**row, "step": 0.5, "more": 1}, row]]
    for bad in ({"step": "2"}, {"settings": "[]"}, *({"rows": json.dumps(some)} for some in rows)):
        save_file(tensors, file, {**good, **bad})
        refused("damaged")
    save_file(tensors, file)
    refused("damaged")


def test_every_method_of_the_registry_has_a_class_that_is_a_lora():
    """methods.py: adapters share the surgery of lora.py; `full` is the entry without a class."""
    assert [name for name, method in METHODS.items() if not method.adapter] == ["full", "head"]
    assert all(issubclass(method.adapter, lora.LoRALinear) for method in METHODS.values()
               if method.adapter)
    assert all(set(method.merge_only_flags) <= set(method.flags) for method in METHODS.values())
