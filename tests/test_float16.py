"""float16, whose numbers end at 65504: the gradient is scaled up, and a step that overflows changes
nothing, in no method."""
import csv
import json

import pytest
import torch
from conftest import METHODS
from safetensors.torch import load_file

import train
from run import machine
from run.folder import changing

SCALER = torch.amp.GradScaler
RUN = ["--dtype", "float16", "--rank", "2", "--test-texts", "8", "--batch-size", "4",
       "--eval-every", "3", "--lr", "0.005"]


def log_of(folder):
    with open(folder / "log.csv") as f:
        return list(csv.DictReader(f))


def overflow_at(monkeypatch, step):
    """Put an inf into the gradient of this step, where a product in float16 would have."""
    calls, real = [], SCALER.unscale_

    def unscale(self, optimizer):
        calls.append(1)
        if len(calls) == step:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = torch.inf
        return real(self, optimizer)
    monkeypatch.setattr(SCALER, "unscale_", unscale)


@pytest.mark.parametrize("method", [
    "lora", "reslora", "deltalora --delta-start 5", "deltalora --delta-start 2",
    "adalora --budget-warmup 4 --budget-final 3", "dylora --frozen", "full"])
def test_a_step_that_overflows_changes_nothing(method, base, tmp_path, monkeypatch):
    overflow_at(monkeypatch, 5)
    seen, steps, real = {}, [], train.one_step

    def watched(forward, params, optimizer, scaler, adapter, layers, batches, step, settings):
        def state():
            moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
            return [t.detach().clone() for t in changing(forward).values()] + moments
        before = state()
        result = real(forward, params, optimizer, scaler, adapter, layers, batches, step, settings)
        steps.append(step)
        if result is None:
            seen["same"] = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        return result
    monkeypatch.setattr(train, "one_step", watched)
    result = train.main([*RUN, "--method", *method.split(), "--model", str(base), "--steps", "9",
                         "--out", str(tmp_path)])
    assert seen == {"same": True}
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]  # the method does not count it
    assert [row["skipped"] for row in log_of(tmp_path)] == ["0", "1", "1"]
    assert load_file(tmp_path / "resume.safetensors")["scaler.scale"] == 2**15
    metrics = result["metrics"]
    if "merged" in metrics and METHODS[method.split()[0]].adapter.merges == ("exact",):
        assert metrics["merged"]["loss"] == pytest.approx(metrics["unmerged"]["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "adalora --budget-warmup 4 --budget-final 3"])
def test_the_gradient_is_unscaled_before_the_hooks_and_clipping(method, base, tmp_path):
    for dtype in ("float16", "float32"):
        train.main([*RUN, "--dtype", dtype, "--method", *method.split(), "--model", str(base),
                    "--steps", "9", "--out", str(tmp_path / dtype), "--clip", "0.01"])
    half, exact = (log_of(tmp_path / dtype) for dtype in ("float16", "float32"))
    for a, b in zip(half, exact, strict=True):
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=0.02)
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=0.02)


def test_a_resumed_run_goes_on_with_the_scale(base, tmp_path, monkeypatch):
    run = [*RUN, "--model", str(base), "--schedule", "constant"]
    with monkeypatch.context() as patch:
        overflow_at(patch, 2)
        train.main([*run, "--steps", "9", "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        overflow_at(patch, 2)
        train.main([*run, "--steps", "3", "--out", str(tmp_path / "parts")])
    train.main(["--resume", "--steps", "9", "--out", str(tmp_path / "parts")])
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text())["metrics"]
                    for name in ("whole", "parts"))
    assert whole == parts
    assert [row["skipped"] for row in log_of(tmp_path / "parts")] == ["1", "1", "1"]
    scales = [load_file(tmp_path / name / "resume.safetensors")["scaler.scale"]
              for name in ("whole", "parts")]
    assert scales == [2**15, 2**15]


def test_a_run_whose_every_step_overflows_ends(base, tmp_path, monkeypatch, capsys):
    """With a loss that is not finite, or else at the latest when its scale is used up."""
    real = SCALER.unscale_

    def unscale(self, optimizer):
        optimizer.param_groups[0]["params"][0].grad.fill_(torch.nan)
        return real(self, optimizer)
    monkeypatch.setattr(SCALER, "unscale_", unscale)
    with pytest.raises(SystemExit) as end:
        train.main([*RUN, "--model", str(base), "--steps", "60", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "float16" in capsys.readouterr().err


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bfloat16"), ((8, 0), "bfloat16"),
                                               ((7, 5), "float16"), ((7, 0), "float16"),
                                               ((6, 1), "float32")])
def test_a_gpu_gets_the_fastest_type_that_it_has(capability, dtype):
    assert machine.fastest(capability) == dtype
