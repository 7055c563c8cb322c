"""What a GPU computes is what the CPU computes in float64: `python -m pytest -m gpu -n 0`, seen by
no other command.

DEVICE=cpu runs the same tests where there is no GPU, but for those of CUDA's own. Tolerances are
shares of a tensor's norm: 1e-5 in fp32, 1e-3 where merging by regression solves a system. In bf16 a
number is rounded by up to 4e-3 of itself, and a gradient through four blocks is off by some of
these: 0.1.
"""
import copy
import functools
import os

import pytest
import torch
from conftest import (
    adapt,
    batch,
    every_model,
    every_variant,
    factors,
    head_of,
    real,
    tiny_gpt,
    tiny_llama,
    tokens,
)
from safetensors.torch import load_file

import lora
import train
from evaluation import decoding, plots
from experiments import bench
from lora import LoRALinear
from loss import vocabulary_loss
from methods import METHODS
from model import GPT, GPTConfig
from run import machine

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.gpu
if CUDA and not torch.cuda.is_available():
    pytest.skip("no GPU, or no -m gpu", allow_module_level=True)
only_cuda = pytest.mark.skipif(not CUDA, reason="of CUDA's own")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
both = pytest.mark.parametrize("dtype", TOLERANCE)


def autocast(dtype):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16")


def close(found, expected, tolerance, what=""):
    """The difference has at most that share of the norm."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert (found - expected).norm() / (expected.norm() + 1e-12) <= tolerance, what


def twins(tiny, method, hparams, **more):
    """(model in float64 on the CPU, its layers), and the same in fp32 on the device."""
    exact = tiny()
    adapt(exact, method, hparams, **more)
    return [(model, [m for m in model.modules() if isinstance(m, LoRALinear)])
            for model in (exact, copy.deepcopy(exact).float().to(DEVICE))]


@every_model
@every_variant
@both
def test_a_step_and_a_merge_are_those_of_the_cpu(tiny, method, hparams, dtype):
    """Loss, gradients, weights after a step with all that the method does around it, logits, logits
    once merged."""
    (exact, _), (model, _) = pair = twins(tiny, method, hparams)
    some, tolerance = batch(exact), TOLERANCE[dtype]
    found = []
    for m, layers in pair:
        torch.manual_seed(1)  # DyLoRA draws ranks
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, fused=True)
        layers[0].begin(layers, 5)
        idx = some[0].to(m.wte.weight.device)
        with autocast(dtype if m is model else None):
            loss = m(idx, some[1])[1]
        loss.backward()
        gradients = [p.grad.clone() for p in factors(layers) + head_of(m)]
        for step in (1, 2, 3):  # the first moves A and B, Delta-LoRA's W follows later
            layers[0].before_step(layers, step)
            optimizer.step()
            layers[0].after_step(layers, step)
        weights = [p for layer in layers for p in layer.parameters()]
        m.eval()
        with torch.no_grad(), autocast(dtype if m is model else None):
            logits = m(idx)[0]
        found.append((loss, gradients, weights, logits))
    for name, ours, theirs in zip(("loss", "gradient", "weight", "logits"), *found[::-1],
                                  strict=True):
        for a, b in zip(*([x] if torch.is_tensor(x) else x for x in (ours, theirs)), strict=True):
            close(a, b, tolerance, name)
    for m, layers in pair:
        idx = some[0].to(m.wte.weight.device)
        layers[0].prepare_merge(m, layers[0].merges[0], dict(batches=[idx], real=real(m)))
        lora.merge(m)
    approximate = 1e-3 if hparams.get("shortcut") in ("input", "middle") else 1e-5
    with torch.no_grad():
        close(model(some[0].to(DEVICE))[0], exact(some[0])[0], max(tolerance, approximate),
              "merged logits")


@every_variant
def test_checkpointed_activations_change_no_gradient(method, hparams):
    _, (model, layers) = twins(tiny_llama, method, hparams)
    idx, targets = tokens()
    gradients = []
    for recompute in (None, layers[0].recompute):
        model.recompute = recompute
        gradients.append(torch.autograd.grad(model(idx.to(DEVICE), targets)[1], factors(layers)))
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("method, hparams",
                         [("lora", {}), ("dylora", {"frozen": False, "cut": None})]
                         + [("reslora", {"shortcut": shortcut, "pre_num": 1})
                            for shortcut in ("input", "block", "middle")], ids=str)
@both
def test_compiled_blocks_are_the_model(method, hparams, dtype):
    """With code that torch generates, for batches of two shapes."""
    _, (model, layers) = twins(tiny_gpt, method, hparams)
    compiled = machine.compiled(model)
    for shape in ((4, 9), (3, 12)):
        idx, targets = tokens(*shape)
        with autocast(dtype):
            found = [m(idx.to(DEVICE), targets)[1] for m in (compiled, model)]
        close(*found, TOLERANCE[dtype])
        for a, b in zip(*(torch.autograd.grad(loss, factors(layers)) for loss in found),
                        strict=True):
            close(a, b, TOLERANCE[dtype])
    torch._dynamo.reset()


@pytest.mark.parametrize("tiny", [tiny_gpt, tiny_llama], ids=["gpt", "llama"])
def test_the_same_tokens_are_written(tiny):
    """By ResLoRA's own layers: greedily, with beams, prompts of different lengths, past the end of
    the shorter."""
    (exact, _), (model, _) = twins(tiny, "reslora", {"shortcut": "middle"})
    prompts = [[5, 4, 3], [7], [9, 1, 2, 8, 6]]
    for m in (exact, model):
        m.eval()
    for write in (decoding.generate, functools.partial(decoding.beam_search, beams=3)):
        assert write(model, prompts, 9, 0) == write(exact, prompts, 9, 0)


@pytest.mark.parametrize("dtypes",
                         [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
                         ids=str)
def test_logits_in_bf16_are_not_rounded(dtypes):
    """At logits near -70, where rounding would cost thousandths of a nat."""
    x, W, b = (torch.randn(64, 32).bfloat16(), torch.randn(999, 32).bfloat16(),
               torch.full((999,), -70.0))
    targets = torch.randint(0, 999, (64,))
    exact = [t.double().requires_grad_() for t in (x, W, b)]
    theirs = vocabulary_loss(*exact, targets)
    given = [t.to(DEVICE, kind).requires_grad_()
             for t, kind in zip((x, W, b), (*dtypes, torch.float32), strict=True)]
    with autocast("bfloat16"):
        ours = vocabulary_loss(*given, targets.to(DEVICE))
    close(ours, theirs, 1e-5)
    for a, e in zip(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, exact),
                    strict=True):
        close(a, e, 1e-2)


# --------------------------------------------------------------------------------------------------
# train.py

RUN = ["--steps", "6", "--eval-every", "3", "--batch-size", "4", "--warmup", "1", "--schedule",
       "constant", "--device", DEVICE.type, "--test-texts", "16"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("evaluation.evaluate.SCORED", 0)
    monkeypatch.setattr(train, "print_examples", lambda *_: None)
    monkeypatch.setattr(plots, "draw_curve", lambda *_: None)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "head"])
@both
def test_a_run_learns_and_its_reports_agree(tmp_path, base, method, dtype):
    """Every method: where merging is exact, the merged model's loss is the unmerged one's to 1e-4,
    in bf16 too."""
    metrics = train.main(["--method", method, "--model", str(base), "--out", str(tmp_path / "run"),
                          "--dtype", dtype, *RUN, *["--rank", "3"] * (method != "full")])["metrics"]
    if method != "full":
        assert METHODS[method].adapter is not None
        tolerance = 1e-4 if method != "reslora" else 0.1
        assert metrics["merged"]["loss"] == pytest.approx(metrics["unmerged"]["loss"],
                                                          abs=tolerance)
    assert metrics.get("unmerged", metrics.get("trained"))["loss"] < metrics["base"]["loss"]


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path, base):
    """With dropout, whose random numbers are the GPU's."""
    flags = ["--model", str(base), "--rank", "3", "--dropout", "0.2", "--dtype", "float32", *RUN]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    train.main([*flags, "--out", str(tmp_path / "parts"), "--steps", "3"])
    train.main([*flags, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (load_file(tmp_path / name / "resume.safetensors")
                    for name in ("whole", "parts"))
    for name, t in whole.items():
        if t.is_floating_point():
            close(parts[name], t, 1e-4, name)


def test_a_seed_gives_the_same_adapter_on_every_device(tmp_path, base):
    found = []
    for device in ("cpu", DEVICE.type):
        flags = ["--model", str(base), "--rank", "3", "--out", str(tmp_path / device), *RUN,
                 "--device", device]
        found.append([p.cpu() for p in train.Run(train.parse(flags)).params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@only_cuda
@pytest.mark.parametrize("row", [row for row, change in bench.ROWS.items() if change is not None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_the_gpu(row, dtype):
    """CUDA raises an error where a step would make the CPU wait."""
    args = bench.parse(["--rank", "3", "--device", "cuda", "--dtype", dtype])
    base = GPT(GPTConfig(61, 16, 16, 2, 2)).to(DEVICE).requires_grad_(False)
    one, _ = bench.our_step(*bench.adapted(base, bench.ROWS[row], args), args)
    idx, targets = tokens()
    batches = [(idx, targets, 0.5), (idx, targets, 0.5)]
    one(batches)  # the optimizer makes its state
    torch.cuda.set_sync_debug_mode("error")
    try:
        one(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_cuda
def test_bf16_is_taken_where_the_card_computes_it():
    device, dtype, _ = machine.pick_device("auto", "auto")
    assert device.type == "cuda"
    assert (dtype == "bfloat16") == (torch.cuda.get_device_capability()[0] >= 8)
