"""Models that are not ours: chains, causality, gradients, merging and PEFT on encoder-decoders,
image models and a UNet."""
import copy
import re

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from conftest import every_variant, factors, tiny_gpt, tiny_llama

import lora
from checkpoints.adapters import save_adapter
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
    "bert": (bert, ["query", "value"], lambda: dict(input_ids=text(9)), "last_hidden_state")}


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


@pytest.mark.parametrize("name", MODELS)
@every_variant
def test_start_gradients_merge_and_peft(name, method, hparams, tmp_path):
    """At its start a method computes what the base does, gradients reach every factor, and PEFT
    gives what the merged model gives."""
    torch.manual_seed(0)
    model, layers, inputs, run = adapted(name, method, hparams)
    base = MODELS[name][0]()
    base.load_state_dict({key: t for key, t in model.state_dict().items()
                          if key in base.state_dict()})
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
