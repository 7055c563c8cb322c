"""QLoRA: the bytes are those of bitsandbytes, every method whose W stands computes on 4 bits what
it computes on the dequantised W, and nothing of W lives from forward to backward."""
import copy
import json
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from conftest import (
    ROOT,
    adapt,
    batch,
    calibrated,
    factors,
    tiny_gpt,
    tiny_llama,
    variants,
)
from safetensors.torch import load_file

import generate
import lora
import qlora
import train
from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.pretrained import load, save_pretrained
from lora import LoRALinear
from methods import METHODS
from qlora import NF4, dequantise, quantise, to_nf4

bnb = pytest.importorskip("bitsandbytes")  # [dev] has it, but on macOS
theirs = bnb.functional
standing = pytest.mark.parametrize("method, hparams", [
    v for v in variants() if not METHODS[v.values[0]].adapter.moves_weight])


def bitsandbytes(W):
    """(packed bytes, QuantState) of bitsandbytes' CPU path. W goes there as one row: version 0.50.2
    takes the absmax of other blocks where rows are no multiple of 64 wide, with AVX-512."""
    return theirs.quantize_4bit(W.flatten(), blocksize=64, compress_statistics=True,
                                quant_type="nf4")


def with_zeros(W):
    """The first block and the last numbers are zero."""
    W = W.clone()
    W.flatten()[:64], W.flatten()[-70:] = 0, 0
    return W


def test_the_sixteen_values_are_the_quantiles_of_the_normal_distribution():
    constants = theirs.get_4bit_type("nf4", "cpu")
    assert torch.equal(torch.tensor(qlora.NF4_VALUES), constants)
    assert (qlora.normal_float() - constants.double()).abs().max() < 5e-7
    # by Python's own normal distribution, for the largest negative and the smallest positive
    from statistics import NormalDist
    Q, top = NormalDist().inv_cdf, 1 - (1 / 32 + 1 / 30) / 2
    assert constants[8].item() == pytest.approx(Q(0.5 + (top - 0.5) / 8) / Q(top), abs=5e-7)
    assert constants[1].item() == pytest.approx(-Q(0.5 + (top - 0.5) * 6 / 7) / Q(top), abs=5e-7)
    assert torch.equal(qlora.dynamic_map(), theirs.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("W", [
    torch.randn(64, 64, generator=torch.Generator().manual_seed(1)),
    torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)) * 0.02,
    with_zeros(torch.randn(100, 130, generator=torch.Generator().manual_seed(3))),
    torch.randn(3, 7, generator=torch.Generator().manual_seed(4)),
    torch.randn(33, 31, generator=torch.Generator().manual_seed(5)) * 1e4,
    torch.randn(16, 24, generator=torch.Generator().manual_seed(6)), torch.zeros(16, 24),
    torch.ones(8, 8)], ids=lambda W: f"{tuple(W.shape)}")
def test_the_bytes_are_those_of_bitsandbytes(W, dtype):
    W = W.to(dtype)
    packed, state = bitsandbytes(W)
    ours = to_nf4(W)
    assert torch.equal(ours.code, packed.flatten())
    assert torch.equal(ours.c_2, state.absmax)
    assert torch.equal(ours.c_1, state.state2.absmax)
    assert ours.mean == state.offset
    for out in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = out
        back = theirs.dequantize_4bit(packed, state)
        assert torch.equal(ours.dequantise(out), back.view(W.shape))


def test_the_bytes_of_a_trained_base_are_those_of_bitsandbytes():
    state = load_file(ROOT / "data/tiny-gpt/model.safetensors")
    for name, W in state.items():
        if W.dim() == 2:
            packed, theirs_ = bitsandbytes(W)
            ours = to_nf4(W)
            assert torch.equal(ours.code, packed.flatten()), name
            assert torch.equal(ours.c_2, theirs_.absmax), name


def test_half_a_byte_and_a_little_for_each_weight():
    W = torch.randn(1024, 1024)
    size = sum(p.numel() * p.element_size() for p in to_nf4(W).parameters())
    # 4 bits, 8 bits for 64 of them, 32 bits for 64 * 256, and one mean
    assert size == W.numel() // 2 + W.numel() // 64 + 4 * W.numel() // (64 * 256) + 4
    assert size < 0.30 * 2 * W.numel()


@pytest.mark.parametrize("bad", [torch.full((8, 8), torch.nan), torch.full((8, 8), torch.inf),
                                 torch.ones(8, 8, dtype=torch.uint8)], ids=str)
def test_what_has_no_4_bit_form_is_refused(bad):
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(bad, requires_grad=False)
    with pytest.raises(ValueError, match="cannot be turned to 4 bits"):
        quantise(linear)
    assert linear.weight is linear._parameters["weight"]


@standing
@pytest.mark.parametrize("tiny", [tiny_gpt, tiny_llama], ids=["gpt", "llama"])
def test_every_method_computes_on_4_bits_what_it_computes_on_the_dequantised_w(tiny, method,
                                                                              hparams):
    model = tiny(torch.float32)
    quantise(model.h)
    plain = dequantise(copy.deepcopy(model), torch.float32)
    results = []
    for each in (model, plain):
        torch.manual_seed(1)
        layers = adapt(each, method, hparams)
        each.double()
        torch.manual_seed(2)
        layers[0].begin(layers, 4)
        torch.manual_seed(3)
        loss = each(*batch(each))[1]
        loss.backward()
        results.append((loss, [p.grad for p in factors(layers)]))
        merged = calibrated(each, layers)
        torch.manual_seed(4)
        before = each.eval()(batch(each)[0])[0]
        lora.merge(each)
        torch.manual_seed(4)
        after = each(batch(each)[0])[0]
        if all(layer.exact_merge for layer in merged):
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    (loss, gradients), (expected, wanted) = results
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for g, w in zip(gradients, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    linear = quantise(nn.Linear(6, 5))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: F.linear(x, linear.weight, b), (x, bias))
    assert torch.autograd.gradcheck(lambda x: F.linear(x, linear.weight), (x,))


def test_nothing_of_w_lives_from_forward_to_backward(monkeypatch):
    """Neither among what autograd saves nor anywhere else."""
    made, saved, real = [], [], NF4.dequantise

    def watched(self, *args):
        W = real(self, *args)
        made.append(weakref.ref(W))
        return W
    monkeypatch.setattr(NF4, "dequantise", watched)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    quantise(model)
    lora.apply(model, LoRALinear, ["0", "1", "2", "3"], r=2, alpha=4)
    x = torch.randn(5, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t,
                                                  lambda t: t):
        loss = model(x).square().sum()
    assert len(made) == 4 and not any(ref() is not None for ref in made)
    assert max(saved) < 64 * 64
    loss.backward()
    assert len(made) == 7  # not for the first layer, whose x needs no gradient


def test_autocast_computes_in_its_own_type():
    linear = nn.Linear(64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    packed = quantise(copy.deepcopy(linear))
    linear.weight.data = packed.weight.dequantise()
    with torch.autocast("cpu", torch.bfloat16):
        h, expected = packed(x), linear(x)
    assert h.dtype == torch.bfloat16 and torch.equal(h, expected)
    h.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_change_of_dtype_leaves_the_constants_alone():
    linear = quantise(nn.Linear(64, 64))
    before = linear.weight.dequantise(torch.float32)
    linear.to(torch.bfloat16)
    assert torch.equal(linear.weight.dequantise(torch.float32), before)
    assert linear(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_tied_weight_stays_as_it_is():
    model = nn.ModuleDict({"wte": nn.Embedding(8, 8), "out": nn.Linear(8, 8, bias=False),
                           "fc": nn.Linear(8, 8)})
    model["out"].weight = model["wte"].weight
    quantise(model)
    assert model["out"].weight is model["wte"].weight and isinstance(model["fc"].weight, NF4)


# What has to refuse

def test_a_method_that_moves_w_refuses_4_bits():
    model = quantise(tiny_gpt(torch.float32))
    with pytest.raises(ValueError, match="h.0.attn.q has its weight in 4 bits"):
        lora.apply(model, METHODS["deltalora"].adapter, ["q"], r=2, alpha=4)
    for method in ("deltalora", "full"):
        with pytest.raises(ValueError, match=f"--base-bits 4 .*{method}"):
            train.parse(["--method", method, "--base-bits", "4"])


def test_a_linear_of_somebody_else_s_is_refused_by_name(tmp_path):
    """Its weight is packed, so its product is not ours to compute."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2))
    plain = copy.deepcopy(llama)
    lora.apply(plain, LoRALinear, ["q_proj"], r=2, alpha=4)
    save_adapter(tmp_path, plain, "base")
    llama.model.layers[0].self_attn.q_proj = bnb.nn.Linear4bit(64, 64, bias=False)
    for put in (lambda: lora.apply(llama, LoRALinear, ["q_proj"], r=2, alpha=4),
                lambda: load_adapter(llama, tmp_path)):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a Linear4bit"):
            put()


# Folders

@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """(a Llama's folder, the same folder in 4 bits as bitsandbytes writes it through transformers,
    the model that wrote it)"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nf4")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=quantization, dtype=torch.float32)
    packed.save_pretrained(folder / "packed")
    return folder / "base", folder / "packed", packed.eval()


@pytest.mark.parametrize("which", [0, 1], ids=["in 32 bits", "in 4 bits"])
def test_a_folder_gives_the_logits_that_bitsandbytes_gives(four_bits, which):
    idx = torch.randint(0, 320, (2, 20))
    model, _ = load(four_bits[which], bits=4)
    torch.testing.assert_close(model(idx)[0], four_bits[2](idx).logits, rtol=1e-4, atol=1e-5)


def test_a_folder_in_4_bits_is_refused_where_nobody_asked_for_4_bits(four_bits):
    with pytest.raises(ValueError, match="in 4 bits, as bitsandbytes writes them: --base-bits 4"):
        load(four_bits[1])


@pytest.mark.parametrize("change", [
    lambda c: c["quantization_config"].update(bnb_4bit_quant_type="fp4"),
    lambda c: c["quantization_config"].update(bnb_4bit_use_double_quant=False),
    lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})],
    ids=["fp4", "without double quantisation", "gptq"])
def test_other_ways_to_quantise_are_refused(four_bits, tmp_path, change):
    config = json.loads((four_bits[1] / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config"):
        load(tmp_path, bits=4)


def test_an_adapter_gives_the_same_logits_in_peft_on_a_base_of_bitsandbytes(four_bits, tmp_path):
    import peft
    base, _, packed = four_bits
    model, _ = load(base, bits=4)
    layers = lora.apply(model, LoRALinear, ["q", "v", "down"], r=4, alpha=8)
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(tmp_path, model, base)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path).eval()
    # where nobody asks for a gradient, bitsandbytes computes in bf16 on some CPUs
    other.enable_input_require_grads()
    idx = torch.randint(0, 320, (2, 20))
    expected = other(idx).logits
    assert (expected - packed(idx).logits).abs().max() > 0.01
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-4, atol=1e-5)


# A run

def metrics_of(folder):
    return json.loads((folder / "result.json").read_text())["metrics"]


@pytest.mark.parametrize("method, base_of", [
    ("lora", "base"), ("reslora --shortcut middle --checkpoint-activations", "small_llama")])
def test_a_run_on_4_bits_goes_on_writes_and_merges(method, base_of, request, tmp_path):
    base = request.getfixturevalue(base_of)
    flags = ["--base-bits", "4", "--model", str(base), "--rank", "2", "--targets", "q,v",
             "--eval-every", "2", "--save-merged", "--test-texts", "8", "--batch-size", "4"]
    flags = ["--method", *method.split(), *flags, "--schedule", "constant"]
    train.main([*flags, "--steps", "6", "--out", str(tmp_path / "whole")])
    whole = metrics_of(tmp_path / "whole")
    train.main([*flags, "--steps", "4", "--out", str(tmp_path / "parts")])
    train.main(["--resume", "--steps", "6", "--out", str(tmp_path / "parts")])
    assert metrics_of(tmp_path / "parts") == whole
    assert {"merged, in 4 bits again", "merged into W before 4 bits",
            "merged, saved in bfloat16"} <= whole.keys()
    if method == "lora":
        assert whole["merged"]["loss"] == pytest.approx(whole["unmerged"]["loss"], rel=1e-5)
    # what is written is a plain checkpoint in bf16: the merged model, rounded
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole/merged")
    assert again.dtype == torch.bfloat16 and not hasattr(again.config, "quantization_config")
    generate.main([str(tmp_path / "whole"), "name :", "--max-new", "3", "--unmerged"])


def test_the_head_of_a_classifier_comes_along_into_w_before_4_bits(small_roberta, tmp_path):
    """It was trained beside the adapter: without it that row would be one of a random head."""
    rows = [{"text": f"{word} {i}", "label": word} for i in range(40) for word in ("good", "bad")]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = train.main(["--base-bits", "4", "--model", str(small_roberta), "--dataset", "labels",
                          "--data-dir", str(file), "--rank", "2", "--steps", "60", "--lr", "2e-2",
                          "--out", str(tmp_path / "out")])["metrics"]
    assert metrics["merged"]["accuracy"] == 1.0
    assert metrics["merged into W before 4 bits"]["loss"] < 0.3


@pytest.mark.parametrize("width", [64, 63])
def test_a_module_has_as_many_numbers_in_4_bits(width):
    module = nn.Sequential(nn.Linear(width, 3), nn.LayerNorm(3))
    number = qlora.total(module)
    assert number == 3 * width + 3 + 6 and qlora.total(qlora.quantise(module)) == number


def test_the_three_merges_are_what_they_say(base, tmp_path):
    """Each row again, by hand."""
    out = tmp_path / "run"
    flags = ["--base-bits", "4", "--model", str(base), "--rank", "2", "--steps", "12", "--out",
             str(out), "--targets", "down", "--lr", "0.3", "--test-texts", "8"]
    metrics = train.main(flags)["metrics"]
    adapter = load_file(out / "adapter_model.safetensors")
    run = train.Run(train.parse([*flags, "--out", str(tmp_path / "other")]))
    original, _ = load(base)
    for bits, again, row in ((4, False, "merged"), (4, True, "merged, in 4 bits again"),
                             (None, False, "merged into W before 4 bits")):
        model = copy.deepcopy(original)
        for n, block in enumerate(model.h):
            A, B = (adapter[f"base_model.model.transformer.h.{n}.mlp.c_proj.lora_{f}.weight"]
                    for f in "AB")
            for name, m in block.named_modules():
                if isinstance(m, nn.Linear):
                    if bits:
                        m.weight.data = rounded(m.weight.data)
                    if name == "mlp.down":
                        m.weight.data += 8 * B @ A  # s = alpha / r = 16 / 2
                        if again:
                            m.weight.data = rounded(m.weight.data)
        assert run.report(model)["loss"] == pytest.approx(metrics[row]["loss"], rel=1e-6), row


def rounded(W):
    """W in 4 bits and back, by bitsandbytes"""
    packed, state = bitsandbytes(W)
    return theirs.dequantize_4bit(packed, state).view(W.shape)


def test_loading_holds_one_matrix_at_a_time(tmp_path, monkeypatch):
    """No linear is there in more than 4 bits when the next one is rounded."""
    save_pretrained(tiny_gpt(torch.float32), tmp_path)
    alive, real = [], qlora.to_nf4

    def watched(W):
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(W))
        return real(W)
    monkeypatch.setattr(qlora, "to_nf4", watched)
    model, _ = load(tmp_path, bits=4)
    assert len(alive) == 4 * 6
    assert sum(isinstance(m, NF4) for m in model.modules()) == 4 * 6


def test_the_report_of_a_base_in_other_bits_is_not_taken_over(base, tmp_path):
    """A neighbour's report serves for the same base in the same bits alone."""
    flags = ["--model", str(base), "--steps", "1", "--test-texts", "8", "--rank", "2"]
    plain = train.main([*flags, "--out", str(tmp_path / "plain")])["metrics"]["base"]
    packed = train.main([*flags, "--base-bits", "4", "--out", str(tmp_path / "packed")])["metrics"]
    assert packed["base"]["loss"] != plain["loss"]
    assert packed["base"]["loss"] == pytest.approx(packed["unmerged"]["loss"], abs=2e-3)


def test_a_model_with_adapters_is_not_quantised():
    """The adapters' own W would silently stay as it is."""
    model = tiny_gpt()
    lora.apply(model, lora.LoRALinear, ["q"], r=2, alpha=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="quantise first, then lora.apply"):
        qlora.quantise(model.h)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
