"""The Llama family against `transformers`: logits, gradients, names, config.json, tokenizers, and a
base in bf16."""
import copy
import dataclasses
import functools
import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import DATA, batch, every_variant, factors, tiny_llama, tokens, variants
from conftest import adapt as adapted
from safetensors.torch import load_file, save_file
from test_model import padded_texts, their_gpt2, their_roberta

import data
import generate
import lora
import model
import train
from checkpoints import adapters, configs, tokenizers
from checkpoints.pretrained import from_pretrained, save_pretrained
from data import Dataset, restaurants
from data.tasks import Write
from evaluation import evaluate, plots
from methods import METHODS
from model import GPTConfig, Llama, LlamaConfig, rotary, rotate

transformers = pytest.importorskip("transformers", reason="the oracle, in [dev]")
peft = pytest.importorskip("peft", reason="the oracle, in [dev]")

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
# what one of their models has in its config beside its sizes
THEIRS = {"llama": {}, "llama, eps": dict(rms_norm_eps=0.3),
          "llama, tied": dict(tie_word_embeddings=True),
          "llama, one head each": dict(num_key_value_heads=4),
          "llama, one head for all": dict(num_key_value_heads=1),
          "llama, own head_dim": dict(head_dim=12),
          "llama, rope_theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
          "llama, linear": dict(rope_parameters={"rope_type": "linear", "factor": 2.5,
                                                 "rope_theta": 1e4}),
          "llama, llama3": dict(rope_parameters={**LLAMA3, "rope_theta": 500000.0}),
          "mistral": dict(sliding_window=None), "mistral, window": dict(sliding_window=40),
          "qwen2": {}, "qwen2, tied": dict(tie_word_embeddings=True), "qwen3": dict(head_dim=12),}


def their_llama(folder, kind="llama", dtype=None, **config):
    """A random tiny model of the family, saved by transformers, with biases and norms that
    matter."""
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                 max_position_embeddings=64, rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=1,
                 eos_token_id=2, tie_word_embeddings=False)
    config = transformers.AutoConfig.for_model(kind, **{**shape, **config})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return model.float()


def edit_config(folder, **changes):
    """Change config.json; None takes a key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", THEIRS)
def test_logits_and_loss_equal_transformers_both_ways(tmp_path, name):
    """Their folder read here and our folder read there give the same logits, within 1e-5 of the
    largest, and loss."""
    theirs, ours = their_llama(tmp_path, name.split(",")[0],
                               **THEIRS[name]), from_pretrained(tmp_path)
    idx = torch.randint(0, 97, (3, 40))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
    close = dict(rtol=0, atol=1e-5 * expected.logits.abs().max().item())
    torch.testing.assert_close(ours(idx)[0], expected.logits, **close)
    shifted = torch.cat([idx[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(ours(idx, shifted)[1], expected.loss)
    save_pretrained(ours, tmp_path / "back")
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(idx).logits, expected.logits, **close)
    assert again.config.architectures == theirs.config.architectures
    assert all(torch.equal(t, ours.state_dict()[key])
               for key, t in from_pretrained(tmp_path / "back").state_dict().items())


@pytest.mark.parametrize("style", ["transformers 4", "older", "transformers 5"])
def test_positions_are_read_from_old_and_new_config_files(tmp_path, style):
    """rope_theta and rope_scaling, with rope_type or the older type, or both in rope_parameters:
    the same model."""
    their_llama(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    expected = from_pretrained(tmp_path).config
    if style == "transformers 5":
        edit_config(tmp_path, rope_theta=10000.0)  # the newer key goes before the top level
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_theta"] == 500000.0
    else:
        scaling = dict(LLAMA3)
        if style == "older":
            scaling["type"] = scaling.pop("rope_type")
        edit_config(tmp_path, rope_parameters=None, rope_theta=500000, rope_scaling=scaling)
    found = from_pretrained(tmp_path).config
    assert found == expected and found.rope_theta == 500000.0 and found.rope_scaling == LLAMA3


def test_rotary_positions_are_their_equation():
    """In float64 by complex numbers: channels i and i + hs / 2 of a head are one number, turned by
    position times theta^(-2 i / hs). So the product of q and k depends on their distance alone."""
    config = tiny_llama(head_dim=8).config
    q, k = torch.randn(2, 1, 12, 3, 8, dtype=torch.float64)
    cos, sin = rotary(torch.arange(12), config)
    turned = rotate(q, cos, sin)
    numbers = torch.complex(q[..., :4], q[..., 4:])
    for t in range(12):
        for i in range(4):
            expected = numbers[0, t, :, i] * complex(math.cos(t * 1e5 ** (-i / 4)),
                                                     math.sin(t * 1e5 ** (-i / 4)))
            found = torch.complex(turned[0, t, :, i], turned[0, t, :, 4 + i])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    q, k = (x[:, :1].expand(-1, 12, -1, -1) for x in (q, k))
    scores = torch.einsum("bthd,bshd->hts", rotate(q, cos, sin), rotate(k, cos, sin))
    torch.testing.assert_close(scores[:, 3, 1], scores[:, 11, 9], rtol=0, atol=1e-5)


def test_absent_keys_mean_what_they_mean_there(tmp_path):
    """Llama 2's config.json has no rope_theta, head_dim or attention_bias; Mistral v0.1's says
    nothing of heads' width; null key and value heads are as many as the heads. The window of a
    Mistral is where its context ends."""
    theirs = their_llama(tmp_path, num_key_value_heads=4)
    absent = "rope_parameters", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"
    edit_config(tmp_path, **dict.fromkeys(absent))
    path, idx = tmp_path / "config.json", torch.randint(0, 97, (2, 20))
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": None}))
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(idx)[0], theirs(idx).logits, rtol=0,
                                   atol=1e-4)
    their_llama(tmp_path, "mistral", max_position_embeddings=8192)
    for window, context in ((None, 4096), ("null", 8192), (9000, 8192), (40, 40)):
        edit_config(tmp_path, sliding_window=window)
        path.write_text(path.read_text().replace('"null"', "null"))
        assert (model := from_pretrained(tmp_path)).context == context
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3"):
        Llama(LlamaConfig(num_attention_heads=4, num_key_value_heads=3))
    with pytest.raises(ValueError, match="41 tokens do not fit"):
        model(torch.zeros(1, 41, dtype=torch.long))


@pytest.mark.parametrize("kind", configs.KINDS)
def test_an_absent_key_of_config_json_has_the_value_of_transformers(kind):
    """What we take for a key that is not there is the default of its config class, by family; sizes
    that have another default there must stand in the file."""
    Config, _, required, expected = configs.KINDS[kind]
    theirs = transformers.AutoConfig.for_model(kind)
    for key, (value, *_) in expected.items():
        if hasattr(theirs, key) and key != "type_vocab_size":  # where 2 fails by the weights' shape
            assert getattr(theirs, key) == value, key
    for field in dataclasses.fields(Config):
        derived = "head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "sliding_window"
        if field.name not in (*required, *derived, "tie_word_embeddings", "model_type"):
            assert getattr(theirs, field.name) == field.default, field.name


# values of keys that mean something else than what is computed
OTHER_MODELS = {
    "llama": dict(model_type="phi3", hidden_act="gelu", attention_bias=True, mlp_bias=True,
                  attention_dropout=0.1, partial_rotary_factor=0.5, rope_interleaved=True,
                  quantization_config={"bits": 4}),
    "qwen2": dict(attention_bias=False, use_sliding_window=True, use_mrope=True),
    "qwen3": dict(layer_types=["full_attention", "sliding_attention", "full_attention"])}
REFUSED = [*((kind, {key: value}, f"{key} {value!r} is not supported")
             for kind, keys in OTHER_MODELS.items() for key, value in keys.items()),
           ("llama", dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor"),
           ("qwen3", dict(layer_types="sliding_attention"), "layer_types"),
           ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type 'yarn' "
            "is not supported"),
           ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_parameters=None),
            "'dynamic' is not"),
           ("llama", dict(rope_scaling={**LLAMA3, "factor": 4.0}, rope_parameters=LLAMA3),
            "contradicts"),
           ("llama", dict(rope_scaling={"rope_type": "llama3", "factor": 8.0},
                          rope_parameters=None), "low_freq_factor of"),
           ("llama", dict(rope_parameters={**LLAMA3, "factor": 0.5}), "needs factor >= 1"),
           ("llama", dict(rope_parameters={**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor < "
            "high_freq_factor"),
           ("llama", dict(rope_parameters={**LLAMA3, "factor": "8"}), "must be a number above 0, "
            "not '8'"), ("llama", dict(rope_parameters=None, rope_theta=-1), "rope_theta must be a "
                         "number above 0"), ("llama", dict(rope_parameters=[1]), "must be objects"),
           ("llama", dict(num_attention_heads=5, head_dim=None), "hidden_size 32 is not a multiple "
            "of num_attention_heads 5"),
           ("llama", dict(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of "
            "num_key_value_heads 3"), ("llama", dict(head_dim=7), "head_dim 7 is odd"),
           ("llama", dict(head_dim=0), "head_dim must be a whole number"),
           ("llama", dict(num_key_value_heads=0), "num_key_value_heads must be a whole number"),
           ("llama", dict(rms_norm_eps=None), "lacks rms_norm_eps"),
           ("qwen3", dict(head_dim=None), "lacks head_dim"),
           ("mistral", dict(num_key_value_heads=None), "lacks num_key_value_heads"),
           ("llama", dict(rms_norm_eps=2), "rms_norm_eps must be in (0, 1)"),
           ("llama", dict(vocab_size=True), "vocab_size must be a whole number"),
           ("llama", dict(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
           ("mistral", dict(sliding_window=-1), "sliding_window must be a whole number"),
           ("llama", dict(intermediate_size=44), "has shape"),
           ("llama", dict(num_hidden_layers=4), "lacks model.layers.3"),
           ("llama", dict(tie_word_embeddings=True), "only tied heads are supported"),]


@pytest.mark.parametrize("kind, changes, message", REFUSED,
                         ids=[message for *_, message in REFUSED])
def test_what_is_not_computed_is_refused(tmp_path, kind, changes, message):
    """One line that names the file, the key and its value."""
    their_llama(tmp_path, kind, **(dict(head_dim=8) if kind == "qwen3" else {}))
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        from_pretrained(tmp_path)
    assert (message in str(error.value) and str(tmp_path) in str(error.value)
            and "\n" not in str(error.value))


def test_weights_under_other_names_are_read(tmp_path):
    """A bare LlamaModel's names, stored rotations, a stored tied head. Whole numbers are no
    weights, and an untied model needs its head."""
    their_llama(tmp_path, tie_word_embeddings=True)
    expected, file = from_pretrained(tmp_path).state_dict(), tmp_path / "model.safetensors"
    state = load_file(file)
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    bare = {key.removeprefix("model."): t for key, t in state.items()}
    for variant in (old, bare,
                    {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}):
        save_file(variant, file)
        found = from_pretrained(tmp_path).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], t)
                                                       for k, t in expected.items())
    save_file({**state, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match=r"model.norm.weight is of torch.int8"):
        from_pretrained(tmp_path)
    save_file(state, file)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lacks lm_head.weight"):
        from_pretrained(tmp_path)


OF_BLOCKS = dict(q="self_attn.q_proj", v="self_attn.v_proj", gate="mlp.gate_proj")
ADAPTED = {"gpt2": ("transformer.h", dict(o="attn.c_proj", up="mlp.c_fc")),
           "roberta": ("roberta.encoder.layer",
                       dict(q="attention.self.query", v="attention.self.value",
                                                     up="intermediate.dense")),
           **{kind: ("model.layers", OF_BLOCKS) for kind in ("llama", "mistral", "qwen2", "qwen3")}}


@pytest.mark.parametrize("kind", ADAPTED)
def test_the_gradients_of_adapters_are_pefts(tmp_path, kind):
    """Same weights, same factors, same batch: dL/dA and dL/dB equal transformers + peft's within
    1e-4 relative."""
    blocks, names = ADAPTED[kind]
    if kind == "roberta":
        theirs = their_roberta(tmp_path, "RobertaForSequenceClassification")
        (idx, mask), labels = padded_texts(), torch.tensor([0, 2, 1])
        inputs, others = (idx[:3], labels), dict(attention_mask=mask[:3], labels=labels)
    else:
        theirs = their_gpt2(tmp_path) if kind == "gpt2" else their_llama(tmp_path, kind)
        idx = torch.randint(0, 97, (3, 16))
        inputs = idx, torch.cat([idx[:, 1:], torch.full((3, 1), -100)], 1)
        others = dict(labels=idx)
    ours = from_pretrained(tmp_path)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[*names.values()], fan_in_fan_out=kind == "gpt2"))
    pairs = []
    for layer in lora.apply(ours, lora.LoRALinear, list(names), r=3, alpha=6):
        _, i, name = {m: place for place, m in ours.named_modules()}[layer].split(".", 2)
        other = theirs.get_submodule(f"base_model.model.{blocks}.{i}.{names[name.split('.')[1]]}")
        with torch.no_grad():
            other.lora_B["default"].weight.normal_(std=0.3)
            for factor in ("lora_A", "lora_B"):
                getattr(layer, factor).copy_(getattr(other, factor)["default"].weight)
                pairs.append((getattr(layer, factor), getattr(other, factor)["default"].weight))
    loss, expected = ours(*inputs)[1], theirs(input_ids=inputs[0], **others).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert len(pairs) == 3 * 2 * len(names)
    for a, b in pairs:
        assert b.grad.abs().max() > 0 and (a.grad - b.grad).abs().max() < 1e-4 * b.grad.abs().max()


# --------------------------------------------------------------------------------------------------
# Models of `transformers` as they are

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
             intermediate_size=40, max_position_embeddings=64)


def their_bert(folder):
    """A random tiny BertForSequenceClassification, saved by transformers."""
    config = transformers.BertConfig(num_labels=3, **SMALL)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


OF_TRANSFORMERS = pytest.mark.parametrize("make, targets",
                                          [(their_llama, ["q_proj", "v_proj", "down_proj"]),
                                           (their_bert, ["query", "attention.output.dense"])],
                                          ids=["llama", "bert"])


def put_in(model, method, hparams, targets, std):
    """The adapters of a method in one of their models, with factors that matter."""
    layers = lora.apply(model, METHODS[method].adapter, targets, r=3, alpha=5, **hparams)
    small = [p for p in factors(layers) if p.std() < 0.05]
    for p in small or factors(layers):  # PiSSA's are all large
        torch.nn.init.normal_(p, std=std)
    return layers


def calibrate(model, layers, idx):
    """Prepare the merge from one batch."""
    layers[0].prepare_merge(model, layers[0].merges[0], dict(batches=[idx]))


@OF_TRANSFORMERS
@every_variant
@torch.no_grad()
def test_adapters_on_models_of_transformers_are_saved_and_loaded(tmp_path, method, hparams, make,
                                                                 targets):
    """The folder has the model's own module paths. PEFT over the same base, and load_adapter, give
    the logits of the merged model; a head that trains travels along."""
    model, idx = make(tmp_path / "base"), torch.randint(3, 97, (2, 12))
    layers = put_in(model, method, hparams, targets, 0.4)
    if make is their_bert:
        model.classifier.requires_grad_(True)
        torch.nn.init.normal_(model.classifier.weight)
    calibrate(model, layers, idx)
    adapters.save_adapter(tmp_path / "adapter", model, tmp_path / "base")
    expected = lora.merge(model)(idx).logits
    close = dict(rtol=0, atol=1e-4 * expected.abs().max().item())
    base, again = (type(model).from_pretrained(tmp_path / "base").eval() for _ in range(2))
    assert (base(idx).logits - expected).abs().max() > 1e-2 * expected.abs().max()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(idx).logits, expected, **close)
    if layers[0].peft_type == "LORA":
        adapters.load_adapter(again, tmp_path / "adapter")
        torch.testing.assert_close(again(idx).logits, expected, **close)
        torch.testing.assert_close(lora.merge(again)(idx).logits, expected, **close)


@OF_TRANSFORMERS
@every_variant
def test_models_of_transformers_in_bf16_train_and_merge(tmp_path, method, hparams, make, targets):
    """Outside autocast: forward, gradients of fp32 factors, and a merge within bf16's rounding of
    the logits."""
    model, idx = make(tmp_path / "base").bfloat16(), torch.randint(3, 97, (2, 12))
    layers = put_in(model, method, hparams, targets, 0.2)
    model(idx).logits.float().square().mean().backward()
    grads = [p.grad for p in factors(layers)]
    assert all(g.dtype == torch.float32 and g.isfinite().all()
               for g in grads) and any(g.any() for g in grads)
    model.eval()
    with torch.no_grad():
        calibrate(model, layers, idx)
        unmerged = model(idx).logits.float()
        exact = all(layer.exact_merge for layer in layers)
        # Delta-LoRA's W is fp32 until here
        merged = lora.merge(model).bfloat16()(idx).logits.float()
    assert merged.isfinite().all()
    if exact and hparams.get("cut") is None:
        assert (merged - unmerged).abs().max() < 0.06 * unmerged.abs().max()


@pytest.mark.parametrize("cls", ["BertForSequenceClassification",
                                 "RobertaForSequenceClassification"])
def test_the_new_head_of_their_classifier_trains_with_the_adapters(tmp_path, cls):
    """Every number of it has a gradient and changes, as do A and B and nothing else. It is
    saved, and loaded into another base with another head, where it goes on training."""
    config = transformers.AutoConfig.for_model(cls[:-len("ForSequenceClassification")].lower(),
                                               num_labels=3, **SMALL)
    model, other = (getattr(transformers, cls)(config).eval() for _ in range(2))
    other.base_model.load_state_dict(model.base_model.state_dict())
    layers = put_in(model, "lora", {}, ["query", "value"], 0.4)
    model.classifier.requires_grad_(True)
    idx, labels = torch.randint(3, 97, (8, 12)), torch.arange(8) % 3
    before = copy.deepcopy(model.state_dict())
    learn(model, idx, labels)
    head = {name: p for name, p in model.named_parameters() if name.startswith("classifier")}
    trained = {*head.values(), *factors(layers)}
    for name, p in model.named_parameters():
        changed = not torch.equal(p, before[name])
        assert (p in trained) == p.requires_grad == (p.grad is not None) == changed, name
    adapters.save_adapter(tmp_path, model, "some/base")
    loaded = adapters.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(idx).logits, model(idx).logits)
    assert all(torch.equal(other.get_parameter(name), p) for name, p in head.items())
    learn(other, idx, labels)
    assert {p for p in other.parameters() if p.grad is not None} == {
        *factors(loaded), *map(other.get_parameter, head)}
    assert not any(torch.equal(other.get_parameter(name), p) for name, p in head.items())


def learn(model, idx, labels):
    """One large step of SGD on what may change; it leaves the gradients."""
    model.zero_grad()
    model(idx, labels=labels).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    """A BERT's adapter on a Llama, and a head that the model lacks: nothing is changed."""
    model = their_bert(tmp_path / "base")
    lora.apply(model, lora.LoRALinear, ["query"], r=2, alpha=2)
    model.classifier.requires_grad_(True)
    adapters.save_adapter(tmp_path / "adapter", model, tmp_path / "base")
    other = their_llama(tmp_path / "llama")
    with pytest.raises(ValueError, match="holds unexpected .*classifier"):
        adapters.load_adapter(other, tmp_path / "adapter")
    assert not any(isinstance(m, lora.LoRALinear) for m in other.modules())


def test_an_adapter_with_an_output_of_its_own_is_refused(tmp_path, small_llama):
    """A trained lm_head, as PEFT's modules_to_save has it: without it the texts would be others."""
    model = from_pretrained(small_llama)
    lora.apply(model, lora.LoRALinear, ["q"], r=2, alpha=2)
    adapters.save_adapter(tmp_path, model, small_llama)
    file = tmp_path / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.ones(320, 32)}
    save_file({**load_file(file), **head}, file)
    other = from_pretrained(small_llama)
    with pytest.raises(ValueError, match="holds unexpected .*lm_head"):
        adapters.load_adapter(other, tmp_path)
    assert not any(isinstance(m, lora.LoRALinear) for m in other.modules())


@pytest.mark.parametrize("shortcut, fails", [("input", True), ("middle", True), ("block", False)])
def test_their_gradient_checkpointing_fails_with_its_name(tmp_path, shortcut, fails):
    """It runs blocks again out of order: ResLoRA's input and middle say so, block reads nothing of
    other layers."""
    model = their_llama(tmp_path).train()
    put_in(model, "reslora", dict(shortcut=shortcut), ["q_proj", "v_proj"], 0.4)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    idx = torch.randint(0, 97, (2, 12))
    with pytest.raises(RuntimeError, match="checkpointing") if fails else nullcontext():
        model(idx, labels=idx).loss.backward()


# --------------------------------------------------------------------------------------------------
# bf16, and activation checkpointing

def test_a_base_in_bf16_stays_so(tmp_path):
    """Linears and embeddings are the file's numbers, norms are fp32, adapters and a W that moves
    too. Under autocast the loss is near that in fp32."""
    their_llama(tmp_path, dtype=torch.bfloat16)
    model, exact = from_pretrained(tmp_path, dtype=torch.bfloat16), from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        norm = name.startswith("ln_f") or ".ln_" in name
        assert p.dtype == (torch.float32 if norm else torch.bfloat16), name
        assert torch.equal(p.float(), exact.get_parameter(name)), name
    idx, targets = tokens(4, 20, 97)
    moved = adapted(copy.deepcopy(model), "deltalora", {"delta_lambda": 2.0, "delta_start": 0})
    assert {layer.weight.dtype for layer in moved} == {torch.float32}
    layers = adapted(model, "lora", {})
    again = adapted(exact, "lora", {})
    for layer, other in zip(layers, again, strict=True):
        assert (layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype
                == torch.bfloat16)
        other.load_state_dict({**other.state_dict(), "lora_A": layer.lora_A,
                               "lora_B": layer.lora_B})
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(idx).dtype == torch.float32  # what the blocks write is summed in fp32
        loss = model(idx, targets)[1]
        loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32
                                               for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(loss, exact(idx, targets)[1], rtol=0.02, atol=0)


# an approximate merge solves a system first
EXACT = [case for case in variants() if case.values[1].get("shortcut", "block") == "block"
         and case.values[1].get("cut") is None]


@pytest.mark.parametrize("method, hparams", EXACT)
def test_a_merge_into_large_weights_in_bf16_is_rounded_once(method, hparams):
    """Weights of 30 to 300, where neighbours in bf16 are up to 2 apart: merged, each is W +
    Delta W in float64, rounded once. (The factors are short binary fractions, so that fp32 has
    the exact sum, but of a method that divides, as DoRA by its norm: there nearly all are equal.)
    Where the method moves W, it is that sum in fp32."""
    model = tiny_llama(torch.bfloat16)
    layers = adapted(model, method, hparams, ("q", "v", "down"), r=4, alpha=8)
    with torch.no_grad():
        for layer in layers:
            size = torch.randint(30, 300, layer.weight.shape)
            layer.weight.copy_(size * torch.randn(size.shape).sign())
            for p in factors([layer]):
                p.copy_(torch.randint(-24, 25, p.shape) / 8)
    exact, bits = copy.deepcopy(model).double(), torch.bfloat16
    if METHODS[method].adapter.moves_weight:
        bits = torch.float32
    expected, seen = {}, 0
    for name, layer in exact.named_modules():
        if isinstance(layer, lora.LoRALinear):
            W, delta = layer.weight, layer.delta()
            expected[name] = (W + delta).to(bits)
            seen += (W.bfloat16() + delta.bfloat16() != (W + delta).bfloat16()).sum()
    lora.merge(model)
    assert seen > 5 and len(expected) == len(layers)  # where rounding twice would show
    for name, W in expected.items():
        assert model.get_submodule(name).weight.dtype == bits
        same = (model.get_submodule(name).weight == W).double().mean()
        plain = METHODS[method].adapter.as_lora is lora.LoRALinear.as_lora
        assert same == 1 or same > 0.95 and not plain, name


@every_variant
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(method, hparams, dropout):
    """In float64 they are the same numbers, with dropout too, also of ResLoRA, whose layers read
    those of earlier blocks; and no activation stays behind."""
    if dropout and method == "deltalora":
        pytest.skip("Delta-LoRA has no dropout")
    model = tiny_llama()
    layers = adapted(model, method, hparams, dropout=dropout)
    layers[0].begin(layers, 10)
    params = [p for p in model.parameters() if p.requires_grad]
    inputs, found = batch(model), []
    for model.recompute in (None, layers[0].recompute):
        torch.manual_seed(1)
        loss = model.train()(*inputs)[1]
        found.append(torch.autograd.grad(loss, params))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not any(layer.inbox or layer.outbox for layer in layers if method == "reslora")


def test_activation_checkpointing_keeps_less(monkeypatch):
    """What autograd saves for the backward shrinks to the inputs of the blocks."""
    def saved(recompute):
        kept = {}
        model = tiny_llama(torch.float32)
        layers = adapted(model, "reslora", dict(shortcut="middle", pre_num=1, merge="regression"))
        model.recompute = layers[0].recompute if recompute else None

        def pack(t):
            kept[t.data_ptr()] = t.numel()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(*batch(model, 8))[1].backward()
        return sum(kept.values())
    assert saved(True) < 0.5 * saved(False)


# --------------------------------------------------------------------------------------------------
# Tokenizers

def sentencepiece_like(folder, bos=True):
    """A tokenizer.json as Llama 2's: a space before every text, no cuts, bytes for what it does not
    know, and <s>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    lines = ([row["question"] for row in map(json.loads, open(f"{DATA}/gsm8k/train.jsonl"))][:300]
             if DATA else [])
    lines += ["The Mill serves Italian food.", "a b c", "name : The Mill || It is cheap."] * 20
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                                           max_token_length=8,
                                                           special_tokens=["<unk>", "<s>", "</s>",
                                                                           *bytes_]))
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B",
                                                               [("<s>", 1)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>"}))
    return folder


@pytest.mark.parametrize("bos", [True, False])
def test_texts_begin_and_end_as_the_tokenizer_says(tmp_path, bos):
    """With the token that it puts there itself, else with the one that ends a text; add_bos_token
    overrules."""
    folder = sentencepiece_like(tmp_path, bos)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    nameless = {key: name for key, name in names.items() if key != "eos_token"}
    several = {"eos_token_id": [2, 1]}  # as an instruction-tuned model has it
    for said, config, begin in ((names, {}, 1 if bos else 2),
                                ({**names, "add_bos_token": True}, {}, 1),
                                ({**names, "add_bos_token": False}, {}, 2),
                                (nameless, several, 1 if bos else 2)):
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        (folder / "config.json").write_text(json.dumps(config))
        found = tokenizers.load(folder, 1000, None)
        assert (found.bos, found.eos) == (begin, 2)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no token that ends a text, and neither"):
        tokenizers.load(folder, 1000, None)


def test_the_end_of_a_text_is_what_the_files_of_a_llama_say(tmp_path, small_llama):
    """A chat model has <|endoftext|> too, but ends its texts otherwise; a GPT-2 ends them with
    <|endoftext|>."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_llama / name, tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["added_tokens"].append({**file["added_tokens"][-1], "id": 320, "content": "<|im_end|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for config, end in ((LlamaConfig(321), 320), (GPTConfig(321), 319)):
        found = tokenizers.for_model(tmp_path, config)
        assert found.bos == found.eos == end


def test_a_record_and_its_text_are_encoded_as_one(tmp_path):
    """Apart, each would get a space of its own in front. The loss begins where the record ends, and
    decoding the rest gives the text. A tokenizer that joins the two is refused."""
    tokenizer = tokenizers.load(sentencepiece_like(tmp_path), 1000, None)
    pairs = [("name : The Mill", "It is cheap."), ("a", "b </s> c")]
    examples, cut = Write(tokenizer, 64).encode(pairs)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for (ids, start), (record, text) in zip(examples, pairs, strict=True):
        assert tokenizer.decode(ids[start:-1]) == text and ids[0] == 1 and ids[-1] == 2 and cut == 0
        if "</s>" not in text:
            assert ids[:-1] == theirs(f"{record} || {text}").input_ids
        assert 2 not in ids[:-1]  # the letters </s> in a text are ordinary text
    joins = json.loads((tmp_path / "tokenizer.json").read_text())
    joins["model"]["vocab"].setdefault("|▁", len(joins["model"]["vocab"]))
    joins["model"]["merges"].insert(0, ["|", "▁"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(joins))
    with pytest.raises(ValueError, match="joins the end of a record with the text behind it"):
        Write(tokenizers.load(tmp_path, 1000, None), 64).encode(pairs)


def lines_of(texts_folder):
    """Every line of the data sets, as texts."""
    import pyarrow.parquet
    for path in sorted(path for name in ("e2e", "gsm8k", "sst2")
                       for path in (texts_folder / name).glob("*")):
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) if path.suffix == ".jsonl" else {"": line} for line in lines]
        yield from (value for row in rows for value in row.values() if isinstance(value, str))


def test_token_ids_of_a_sentencepiece_like_vocabulary_are_those_of_transformers(tmp_path,
                                                                                texts_folder):
    """On every third line of E2E, GSM8K and SST-2."""
    ours = tokenizers.load(sentencepiece_like(tmp_path), 1000, None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = list(lines_of(texts_folder))[::3]
    assert len(texts) > 5000
    assert ours.encode_ordinary_batch(texts) == theirs(texts, add_special_tokens=False).input_ids


# --------------------------------------------------------------------------------------------------
# The command line

@pytest.fixture
def run(small_llama, tmp_path, monkeypatch):
    """One run of train.py on a few restaurants, in tmp_path / name; its result."""
    monkeypatch.setattr(data, "load", lambda *args: dict(part(*args)))
    monkeypatch.setattr(evaluate, "EVAL_EXAMPLES", 16)
    monkeypatch.setattr(evaluate, "SCORED", 4)
    monkeypatch.setattr(restaurants, "MAX_NEW", 12, raising=False)
    # untrained models write to the end of their room
    monkeypatch.setattr(train, "print_examples", lambda *_: None)
    monkeypatch.setattr(plots, "draw_curve", lambda *_: None)

    def run(name, *flags, steps=12, folder=small_llama):
        return train.main(list(map(str, [
            "--model", folder, "--out", tmp_path / name, "--steps", steps, "--rank", 4,
            "--batch-size", 8,
            "--lr", 1e-2, "--test-texts", 20, "--eval-every", 6, *flags])))
    return run


@functools.cache
def part(*args, real=data.load):
    """The first texts of each split."""
    return {split: pairs[:200 if split == "train" else 60] for split, pairs in real(*args).items()}


def same(a, b):
    return all(abs(a[name] - b[name]) <= 1e-4 * abs(b[name]) for name in a)


@pytest.mark.parametrize("flags", [("--method", "lora", "--targets", "q,k,v,o,gate,up,down"),
                                   ("--method", "reslora", "--shortcut", "block"),
                                   ("--method", "deltalora"),
                                   ("--method", "adalora", "--lr", ".05")], ids=lambda f: f[1])
def test_a_run_on_a_llama_merges_exactly_and_peft_loads_it(tmp_path, small_llama, run, flags,
                                                           capsys):
    """The loss falls, merged reports what unmerged does, PEFT over the same folder computes our
    merged logits, and generate.py writes the same with the adapter merged and not."""
    found = run("run", *flags)["metrics"]
    assert found["unmerged"]["loss"] < found["base"]["loss"] and same(found["merged"],
                                                                      found["unmerged"])
    ours, idx = from_pretrained(small_llama), torch.randint(0, 320, (2, 30))
    base = transformers.AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    adapters.load_adapter(ours, tmp_path / "run")
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()(idx).logits
        assert (ours(idx)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    capsys.readouterr()
    texts = []
    for how in ([], ["--unmerged"]):
        generate.main([str(tmp_path / "run"), "name : The Mill | food : Italian", "--max-new", "12",
                       *how])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()


def test_a_run_with_activation_checkpointing_has_the_numbers_of_one_without(run, monkeypatch):
    """Of ResLoRA's middle, with dropout; every block of every step goes through torch's
    checkpoint."""
    flags, blocks = ("--method", "reslora", "--shortcut", "middle", "--dropout", "0.1"), []
    monkeypatch.setattr("model.checkpoint", lambda block, *inputs, real=model.checkpoint, **more: (
        blocks.append(block), real(block, *inputs, **more))[1])
    whole = run("whole", *flags, steps=6)["metrics"]
    assert not blocks
    less = run("less", *flags, "--checkpoint-activations", steps=6)["metrics"]
    assert whole == less and len(blocks) == 2 * 6


def test_a_merged_bf16_base_is_saved_in_bf16_and_measured(tmp_path, small_llama, run, capsys):
    """merged/ has the base's type, a line and a row of result.json say so, and what is saved
    computes that row."""
    found = run("run", "--method", "lora", "--save-merged")["metrics"]
    assert "merged is in bfloat16, as the base is" in capsys.readouterr().out
    merged = load_file(tmp_path / "run/merged/model.safetensors")
    exact = from_pretrained(small_llama)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    adapters.load_adapter(exact, tmp_path / "run")
    W, name = lora.merge(exact).h[1].attn.q.weight, "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(merged[name], W.bfloat16()) and not torch.equal(merged[name].float(), W)
    assert not torch.equal(merged[name], load_file(small_llama / "model.safetensors")[name])
    config = json.loads((tmp_path / "run/merged/config.json").read_text())
    # <|endoftext|> begins and ends its texts
    assert config["bos_token_id"] == config["eos_token_id"] == 319
    again = run("again", "--method", "lora", steps=1, folder=tmp_path / "run/merged")["metrics"]
    assert same(again["base"], found["merged, saved in bfloat16"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged",
                                                               dtype=torch.float32)
    idx = torch.randint(0, 320, (2, 30))
    with torch.no_grad():
        ours = from_pretrained(tmp_path / "run/merged")(idx)[0]
        torch.testing.assert_close(theirs(idx).logits, ours, rtol=0,
                                   atol=1e-5 * ours.abs().max().item())


def test_a_report_on_a_part_of_the_test_split(tmp_path, small_llama, run, capsys):
    """--test-texts: the same texts whatever the seed, and result.json says how many of how many.
    The base is measured once for runs side by side, and again for another part or other data."""
    first = run("a", steps=1)
    assert "evaluate the base: the loss of 20 test examples" in capsys.readouterr().out
    rows = data.load("restaurants")["test"]
    assert first["splits"]["test"] == f"test, 20 of {len(rows)} texts"
    assert first["settings"]["test_texts"] == 20
    chosen = Dataset("restaurants", None, 20).encode(small_llama, from_pretrained(small_llama), 256)
    assert (len(chosen.pairs["test"]) == len(chosen.examples["test"]) == 20
            != len(chosen.pairs["validation"]))
    places = [rows.index(pair) for pair in chosen.pairs["test"]]
    assert places == sorted(places) and places[-1] > len(rows) / 2  # from all over the split
    second = run("b", "--seed", 3, steps=1)
    assert (f"evaluate the base: its report is that of {tmp_path / 'a/result.json'}"
            in capsys.readouterr().out)
    other = run("c", "--test-texts", 9, steps=1)
    assert "its report" not in capsys.readouterr().out
    # a damaged neighbour is not this run's business
    (tmp_path / "a/result.json").write_text('{"metrics": 3}')
    (tmp_path / "b/result.json").unlink()
    again = run("d", steps=1)
    first, second, other, again = (result["metrics"]["base"]
                                   for result in (first, second, other, again))
    assert first == second == again != other


def test_a_bad_folder_ends_in_one_line(tmp_path, small_llama, run, capsys):
    """Exit code 2, the reason, and nothing is written."""
    for key, value, message in (("model_type", "gemma", "model_type 'gemma' is not supported"),
                                ("num_key_value_heads", 3,
                                 "is not a multiple of num_key_value_heads 3"),
                                ("vocab_size", 100, "has shape")):
        shutil.copytree(small_llama, tmp_path / "bad", dirs_exist_ok=True)
        edit_config(tmp_path / "bad", **{key: value})
        with pytest.raises(SystemExit) as end:
            run("out", folder=tmp_path / "bad")
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_bf16_arithmetic_trains(run):
    """--dtype bfloat16: the base is in bf16, and the run ends near that in fp32. Reports are in
    fp32, so an exact merge is exact; what is saved is rounded, and measured."""
    exact = run("exact", "--method", "reslora", steps=6)["metrics"]
    found = run("run", "--method", "reslora", "--dtype", "bfloat16", "--save-merged",
                steps=6)["metrics"]
    assert abs(found["unmerged"]["loss"] / exact["unmerged"]["loss"] - 1) < 0.02
    assert "merged, saved in bfloat16" in found
    for method in ("lora", "deltalora"):
        found = run(method, "--method", method, "--dtype", "bfloat16", steps=3)["metrics"]
        assert abs(found["merged"]["loss"]
                   - found["unmerged"]["loss"]) < 1e-5 * found["merged"]["loss"]
    full = run("full", "--method", "full", "--dtype", "bfloat16", "--lr", "1e-3",
               steps=3)["metrics"]
    assert full["trained"]["loss"] < full["base"]["loss"]


def test_a_base_with_a_fresh_head_is_measured_in_every_run(tmp_path, run, small_roberta, capsys):
    """Each run has a head of its own, so what one measured says nothing of another."""
    for seed in "0", "1":
        train.main(["--model", str(small_roberta), "--dataset", "reviews", "--method", "head",
                    "--context", "64", "--steps", "1", "--test-texts", "20", "--seed", seed,
                    "--out", f"{tmp_path / seed}"])
        assert "its report is that of" not in capsys.readouterr().out


def test_what_trains_is_fp32_whatever_the_arithmetic():
    """A frozen base has the type of the arithmetic; weights that AdamW moves a little at a time are
    fp32."""
    for method, dtype in (("lora", torch.bfloat16), ("deltalora", torch.bfloat16),
                          ("full", torch.float32)):
        assert train.parse(["--method", method, "--dtype", "bfloat16", "--device",
                            "cpu"]).base_dtype == dtype
        assert train.parse(["--method", method, "--device", "cpu"]).base_dtype == torch.float32
