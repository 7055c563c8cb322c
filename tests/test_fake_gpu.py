"""Whole runs on a GPU that computes nothing: no tensor is left on the CPU, and no step waits for
the GPU."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from methods import METHODS

ALL = "regression,bi,bw,none"
RUNS = ["lora", "reslora --shortcut block", f"reslora --shortcut input --merge {ALL}",
        "deltalora --delta-start 1", "dylora --frozen",
        "adalora --budget-warmup 1 --budget-final 1"]
# a new method, as it is by default
RUNS += sorted(METHODS.keys() - {run.split()[0] for run in RUNS} - {"head", "rslora"})
RUNS += [f"{run} --model LLAMA"
         for run in ("lora --dropout 0.1", "reslora --checkpoint-activations --base-bits 4",
                     f"reslora --shortcut middle --pre-num -1 --merge {ALL}")]
RUNS += [f"{run} --model ROBERTA --context 64" for run in (
    "lora --dataset stdlib", "reslora --dataset reviews", "head --dataset reviews")]
# generate.py: number of the run, flags
TEXTS = ["0", "0 --beams 3", "2 --unmerged", "2 --unmerged --beams 2"]


@pytest.fixture(scope="module")
def held(tmp_path_factory, base, small_llama, small_roberta):
    """{command: its traceback, "" if it held}, from one process, in which the GPU is of a kind of
    its own."""
    folder = tmp_path_factory.mktemp("gpu")
    places, lines = {"LLAMA": small_llama, "ROBERTA": small_roberta}, {}
    for i, run in enumerate(RUNS):
        line = f"train.py --method {run} --out {folder}/{i} --steps 3 --eval-every 2"
        line += " --batch-size 4 --grad-accum 2"
        line += " --rank 3" * (METHODS[run.split()[0]].adapter is not None)
        line += f" --model {base}" * ("--model" not in run)
        lines[run] = " ".join(str(places.get(word, word)) for word in line.split(" "))
    lines |= {text: f"generate.py {folder}/{text}" for text in TEXTS}
    (folder / "commands.txt").write_text("".join(line + "\n" for line in lines.values()))
    done = subprocess.run([sys.executable, ROOT / "tests/fake_gpu.py", folder / "commands.txt"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "commands.json").read_text())
    return {name: found[line] for name, line in lines.items()}


@pytest.mark.parametrize("run", RUNS + TEXTS)
def test_a_run_leaves_no_tensor_on_the_cpu_and_waits_in_no_step(held, run):
    """Base report, steps with accumulation, validation, every way to merge with its calibration,
    the reports, the adapter folder, decoded texts; texts written greedily and with beams, by the
    merged model and by the method's own layers."""
    assert not held[run]
