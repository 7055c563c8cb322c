"""Models that are not ours: chains, causality, gradients, merging and PEFT on encoder-decoders,
image models and a UNet."""
import copy
import json
import re

import diffusers
import peft
import pytest
import torch
import torch.nn as nn
import transformers
from conftest import every_variant, factors, tiny_gpt, tiny_llama
from safetensors.torch import load_file

import lora
from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.families import family
from lora import LoRALinear
from methods import METHODS
from reslora import ResLoRALinear


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None)).eval()


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=3, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)).eval()


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)).eval()


def bert():
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)).eval()


def unet():
    """Of two widths, and two attentions a stage."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=2, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=8,
        attention_head_dim=4).eval()


def noisy():
    draw = torch.Generator().manual_seed(0)
    return dict(sample=torch.randn(2, 3, 8, 8, generator=draw), timestep=torch.tensor([3, 7]),
                encoder_hidden_states=torch.randn(2, 5, 8, generator=draw))


def text(length=9, seed=0):
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(seed))


# {name: (model, targets, inputs, what its output is)}
MODELS = {
    "bart": (bart, ["q_proj", "v_proj"],
             lambda: dict(input_ids=text(7), decoder_input_ids=text(9, 1), use_cache=False),
             "logits"),
    "t5": (t5, ["q", "v"],
           lambda: dict(input_ids=text(7), decoder_input_ids=text(9, 1), use_cache=False),
           "logits"),
    "vit": (vit, ["q_proj", "v_proj"],
            lambda: dict(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator()
                                                  .manual_seed(0))), "logits"),
    "bert": (bert, ["query", "value"], lambda: dict(input_ids=text(9)), "last_hidden_state"),
    "unet": (unet, ["attn1.to_q", "attn2.to_v", "attn2.to_out.0"], noisy, "sample")}


def names_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def chains(names, targets, shape=(4, 4)):
    linears = {name: nn.Linear(*shape[::-1], device="meta") for name in names}
    target_of = {name: target for target in targets for name in names
                 if lora.matches(name, target)}
    return lora.chains_of(target_of, linears)


# What a chain is

def test_names_that_differ_in_numbers_alone_are_a_chain():
    names = [f"{part}.layers.{n}.{attention}.v_proj" for part, attention in (
        ("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn"))
        for n in range(3)]
    found = chains(names, ["v_proj"])
    assert list(found) == ["encoder.layers.*.self_attn.v_proj", "decoder.layers.*.self_attn.v_proj",
                           "decoder.layers.*.encoder_attn.v_proj"]
    assert [len(chain) for chain in found.values()] == [3, 3, 3]
    assert found["decoder.layers.*.self_attn.v_proj"] == names[3:6]


def test_three_targets_may_be_one_chain():
    assert chains(["0", "2", "4"], ["4", "0", "2"]).keys() == {"*"}
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layers = lora.apply(model, ResLoRALinear, ["4", "0", "2"], r=2, alpha=2)
    assert layers == [model[0], model[2], model[4]]  # in the order of the model
    assert [layer.earlier for layer in layers] == [[], [model[0]], [model[2]]]


def test_where_two_numbers_differ_the_last_counts_the_layers():
    names = [f"down.{stage}.attentions.{n}.blocks.0.attn1.to_q" for stage in (1, 2) for n in (0, 1)]
    assert chains(names, ["to_q"]) == {"down.1.attentions.*.blocks.0.attn1.to_q": names[:2],
                                       "down.2.attentions.*.blocks.0.attn1.to_q": names[2:]}
    # with one attention a stage a single number differs
    assert chains(names[::2], ["to_q"]) == {"down.*.attentions.0.blocks.0.attn1.to_q": names[::2]}


def test_digits_within_a_word_are_no_number():
    names = [f"blocks.{n}.{leaf}" for n in (0, 1) for leaf in ("fc1", "fc2")]
    assert chains(names, ["fc1", "fc2"]) == {"blocks.*.fc1": names[::2],
                                             "blocks.*.fc2": names[1::2]}


def test_experts_stand_side_by_side():
    names = [f"layers.{n}.mlp.experts.{e}.up" for n in range(2) for e in range(3)]
    assert chains(names, ["up"]) == {f"layers.*.mlp.experts.{e}.up": names[e::3] for e in range(3)}


def test_another_shape_is_another_chain():
    names = [f"layers.{n}.fc" for n in range(4)]
    linears = {name: nn.Linear(4, 4 + n // 2) for n, name in enumerate(names)}
    found = lora.chains_of(dict.fromkeys(names, "fc"), linears)
    assert list(found.values()) == [names[:2], names[2:]]


def test_a_pattern_with_several_stars_is_one_chain():
    names = [f"stages.{s}.layers.{n}.q" for s in range(2) for n in range(2)]
    assert list(chains(names, ["stages.*.layers.*.q"]).values()) == [names]
    assert chains(names, ["layers.*.q"]).keys() == {"stages.0.layers.*.q", "stages.1.layers.*.q"}
    assert list(chains(names, ["stages.1.layers.*.q"]).values()) == [names[2:]]


@pytest.mark.parametrize("target, message", [
    ("decoder.layers.*.self_attn.w", r"matches no linear.*q_proj"),
    ("layer.*.q_proj", r"matches no linear.*q_proj"),
    ("self_attn", r"self_attn is a BartAttention")])
def test_a_pattern_that_matches_nothing_says_what_there_is(target, message):
    with pytest.raises(ValueError, match=message):
        lora.apply(bart(), LoRALinear, [target], r=2, alpha=2)


def test_a_module_that_two_targets_mean_is_refused():
    with pytest.raises(ValueError, match="is meant by an earlier target already"):
        lora.apply(bart(), LoRALinear, ["q_proj", "decoder.layers.*.self_attn.q_proj"], r=2,
                   alpha=2)


def test_a_conv1d_of_transformers_is_no_linear():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="c_attn is a Conv1D"):
        lora.apply(gpt2, LoRALinear, ["c_attn"], r=2, alpha=2)
    with pytest.raises(ValueError, match="its linears are: .*q"):
        lora.apply(tiny_gpt(), LoRALinear, ["q_proj"], r=2, alpha=2)


def test_layers_on_sequences_of_other_lengths_are_named():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList(
                nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(1))}) for _ in range(2))

        def forward(self, x):
            for stage in self.stages:
                x = stage["blocks"][0]["q"](x)[:, ::2]
            return x
    for shortcut in ("input", "middle"):
        model = Stages()
        lora.apply(model, ResLoRALinear, ["q"], r=2, alpha=2, shortcut=shortcut)
        with pytest.raises(RuntimeError, match=re.escape(
                "stages.0.blocks.0.q was called on a sequence of shape (2, 6, ") + ".*" + re.escape(
                "stages.1.blocks.0.q on (2, 3, ") + ".*'stages.1.blocks.*.q'"):
            model(torch.randn(2, 6, 4))


# Every method on every model

def adapted(name, method, hparams):
    """(model, its layers, with random factors, its inputs, what it computes)"""
    make, targets, inputs, output = MODELS[name]
    model = make()
    layers = lora.apply(model, METHODS[method].adapter, targets, r=2, alpha=3, **hparams)
    return model, layers, inputs(), lambda m, i: m(**i)[output]


def randomised(layers):
    for p in factors(layers):
        nn.init.normal_(p, std=0.3)


@pytest.mark.filterwarnings("ignore:ResLoRA. .* is a single layer")
@pytest.mark.parametrize("name", MODELS)
@every_variant
def test_start_gradients_merge_and_peft(name, method, hparams, tmp_path):
    """At its start a method computes what the base does, gradients reach every factor, and PEFT
    gives what the merged model gives."""
    torch.manual_seed(0)
    base = MODELS[name][0]()
    torch.manual_seed(0)  # the same weights again: a method may have others at its start, as PiSSA
    model, layers, inputs, run = adapted(name, method, hparams)
    if method != "adalora":  # whose start is tested in its own file
        torch.testing.assert_close(run(model, inputs), run(base, inputs), rtol=1e-4, atol=1e-5)
    randomised(layers)
    torch.manual_seed(1)
    layers[0].begin(layers, 9)
    run(model.train(), inputs).square().mean().backward()
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in factors(layers)]
    assert all(reached) or method == "dylora"
    model.eval()
    layers[0].prepare_merge(model, layers[0].merges[0],
                            dict(batches=[inputs], run=lambda batch: run(model, batch)))
    save_adapter(tmp_path, model, "base")
    before = run(model, inputs)
    merged = run(lora.merge(model), inputs)
    if all(layer.exact_merge for layer in layers) and method != "dylora":
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(run(theirs, inputs), merged, rtol=1e-4, atol=1e-4)


CAUSAL = {"gpt": (lambda: tiny_gpt(torch.float32), ["q", "v"]),
          "llama": (lambda: tiny_llama(torch.float32), ["q", "v"]),
          "bart": (bart, ["q_proj", "v_proj", "k_proj"]), "t5": (t5, ["q", "v", "k"])}


@pytest.mark.parametrize("name", CAUSAL)
@every_variant
def test_no_position_sees_a_later_one(name, method, hparams):
    """Logits of a position do not change when later tokens do, also where source and target are of
    one length."""
    make, targets = CAUSAL[name]
    model = make()
    layers = lora.apply(model, METHODS[method].adapter, targets, r=2, alpha=3, **hparams)
    randomised(layers)
    model.eval()
    early, late = text(10), text(10)
    late[:, 6:] = text(4, 7)
    with torch.no_grad():
        if name in ("gpt", "llama"):
            a, b = (model(idx)[0] for idx in (early, late))
        else:
            a, b = (model(input_ids=text(10, 3), decoder_input_ids=idx, use_cache=False).logits
                    for idx in (early, late))
    assert (a[:, 6:] - b[:, 6:]).abs().max() > 1e-4
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make, targets", [(bart, ["q_proj", "v_proj", "k_proj"]),
                                           (t5, ["q", "k", "v"])], ids=["bart", "t5"])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_an_unmerged_encoder_decoder_generates_with_a_cache_what_it_does_without(make, targets,
                                                                               shortcut):
    torch.manual_seed(0)
    model = make()
    randomised(lora.apply(model, ResLoRALinear, targets, r=2, alpha=3, shortcut=shortcut))
    with_cache, without = (model.generate(text(7), max_new_tokens=6, do_sample=False, use_cache=use)
                           for use in (True, False))
    assert torch.equal(with_cache, without)


# What leaves the house

@pytest.mark.parametrize("method, hparams", [
    ("reslora", dict(shortcut="block", pre_num=2)), ("reslora", dict(shortcut="block", pre_num=-1)),
    ("adalora", dict(init_rank=4)), ("lora", {}), ("deltalora", dict(delta_start=0))], ids=str)
@pytest.mark.parametrize("make, targets", [
    (bart, ["q_proj", "v_proj", "fc1"]), (lambda: tiny_llama(torch.float32), ["q", "k", "up"])],
    ids=["bart", "llama"])
def test_other_loaders_read_the_same_delta(make, targets, method, hparams, tmp_path):
    """PEFT takes the scale from its patterns; llama.cpp divides lora_alpha by the rank of each
    tensor; vLLM by r."""
    torch.manual_seed(0)
    model = make()
    layers = lora.apply(model, METHODS[method].adapter, targets, r=3, alpha=5, **hparams)
    randomised(layers)
    if method == "adalora":  # ranks of their own
        for n, layer in enumerate(layers):
            with torch.no_grad():
                layer.mask[n % 3 + 1:], layer.lora_E[n % 3 + 1:] = 0, 0
    save_adapter(tmp_path, model, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not config["alpha_pattern"] and not config["use_rslora"]
    by_delta = {layer.name: layer.delta() for layer in layers}
    seen = 0
    for name, layer in zip(by_delta, layers, strict=True):
        module = family(model).module(name)[0]
        A, B = (tensors[f"base_model.model.{module}.lora_{f}.weight"] for f in "AB")
        delta = config["lora_alpha"] / len(A) * (B @ A)  # llama.cpp's
        torch.testing.assert_close(delta, by_delta[name], rtol=1e-4, atol=1e-5)
        if len(A) == config["r"]:
            seen += 1
            vllm = config["lora_alpha"] / config["r"] * (B @ A)
            torch.testing.assert_close(vllm, by_delta[name], rtol=1e-4, atol=1e-5)
        else:  # no side is long enough
            assert len(A) == min(layer.weight.shape) < config["r"]
            assert config["rank_pattern"][module] == len(A)
    assert seen


@pytest.mark.parametrize("wrap", [
    lambda m: m, torch.compile, nn.DataParallel,
    lambda m: torch.compile(nn.DataParallel(m)), lambda m: nn.DataParallel(torch.compile(m))],
    ids=["plain", "compiled", "data parallel", "compiled outside", "compiled inside"])
def test_a_wrapper_leaves_no_trace_in_the_names(wrap, tmp_path):
    model = bart()
    randomised(lora.apply(model, LoRALinear, ["q_proj"], r=2, alpha=2))
    save_adapter(tmp_path / "plain", model, "base")
    save_adapter(tmp_path / "wrapped", wrap(model), "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert ((tmp_path / "plain" / file).read_bytes()
                == (tmp_path / "wrapped" / file).read_bytes())
    fresh = bart()
    assert len(load_adapter(wrap(fresh), tmp_path / "plain")) == 9


def test_a_model_of_peft_is_refused(tmp_path):
    inside = peft.get_peft_model(bart(), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    lora.apply(inside, LoRALinear, ["q_proj"], r=2, alpha=2)
    with pytest.raises(ValueError, match="PEFT's PeftModel: take its adapters out first"):
        save_adapter(tmp_path, inside, "base")
    injected = bart()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["v_proj"]), injected)
    lora.apply(injected, LoRALinear, ["q_proj"], r=2, alpha=2)
    with pytest.raises(ValueError, match="v_proj is PEFT's Linear"):
        save_adapter(tmp_path, injected, "base")


def test_what_cannot_be_loaded_says_why(tmp_path):
    model = bart()
    lora.apply(model, LoRALinear, ["q_proj"], r=2, alpha=2)
    save_adapter(tmp_path / "ours", model, "base")
    with pytest.raises(ValueError, match="the model has adapters already"):
        load_adapter(model, tmp_path / "ours")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    peft.get_peft_model(copy.deepcopy(gpt2), peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path / "conv1d")
    with pytest.raises(ValueError, match="h.0.attn.c_attn, which is a Conv1D"):
        load_adapter(gpt2, tmp_path / "conv1d")
    embedding = peft.get_peft_model(bart(), peft.LoraConfig(r=2, target_modules=["shared"]))
    embedding.save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError):
        load_adapter(bart(), tmp_path / "embedding")


def test_a_tied_weight_that_trains_beside_the_adapters_is_refused(tmp_path):
    """PEFT would load it into the embedding and not into the output."""
    model = bart()
    lora.apply(model, LoRALinear, ["q_proj"], r=2, alpha=2)
    model.model.shared.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.shared.weight trains beside .* is tied"):
        save_adapter(tmp_path, model, "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make, auto, kind", [
    (bart, "AutoPeftModelForSeq2SeqLM", "PeftModelForSeq2SeqLM"),
    (t5, "AutoPeftModelForSeq2SeqLM", "PeftModelForSeq2SeqLM"),
    (vit, "AutoPeftModel", "PeftModel"), (bert, "AutoPeftModel", "PeftModel")],
    ids=["bart", "t5", "vit", "bert"])
def test_autopeft_makes_the_model_that_it_was(make, auto, kind, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    target = "q" if make is t5 else "query" if make is bert else "q_proj"
    lora.apply(model, LoRALinear, [target], r=2, alpha=2)
    save_adapter(tmp_path / "adapter", model, tmp_path / "base")
    found = getattr(peft, auto).from_pretrained(tmp_path / "adapter")
    assert type(found).__name__ == kind
    assert type(found.get_base_model()) is type(model)
