"""Several processes, and several accumulations, end where one large batch ends."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from methods import METHODS
from run import machine

# (`middle` is the Llama's below; what DyLoRA puts back without --frozen it puts back with it too)
RUNS = ["lora", "lora --base-bits 4", "reslora --shortcut input", "deltalora --delta-start 2",
        "adalora --budget-warmup 1 --budget-final 3", "dylora --frozen", "full"]
# DDP averages those: nothing else happens in a step
ONLY_GRADIENTS = {"rslora", "loha", "lokr", "head"}
# a new method, as it is by default
RUNS += sorted(METHODS.keys() - {run.split()[0] for run in RUNS} - ONLY_GRADIENTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, small_roberta, small_llama):
    """{kind: folder} of the same runs in one process, with accumulation, and in two processes."""
    folder = tmp_path_factory.mktemp("processes")
    kinds = {"one": (8, 1, []), "accumulated": (2, 4, []), "two": (4, 1, ["--nproc-per-node", "2"]),
             "two-accumulated": (2, 2, ["--nproc-per-node", "2"])}
    for kind, (batch, accumulate, processes) in kinds.items():
        some = RUNS if kind in ("one", "two") else [run for run in RUNS
                                                    if run.startswith(("lora", "adalora"))]
        lines = [f"--method {run}{' --rank 3' * (run != 'full')} --model {base} --out "
                 f"{folder}/{kind}/{i}" for i, run in enumerate(some)]
        lines += [f"--method lora --rank 3 --model {small_roberta} --context 64 --dataset {name} "
                  f"--out {folder}/{kind}/{name}" for name in ("reviews", "stdlib")]
        lines += [f"--method reslora --shortcut middle --rank 3 --model {small_llama} --out "
                  f"{folder}/{kind}/llama --checkpoint-activations"]
        shared = (f" --steps 9 --eval-every 5 --lr 1e-2 --batch-size {batch} --grad-accum "
                  f"{accumulate}")
        (folder / f"{kind}.txt").write_text("".join(line + shared + "\n" for line in lines))
        start = ["-m", "torch.distributed.run", *processes] if processes else []
        done = subprocess.run([sys.executable, *start, ROOT / "tests/float64_runs.py",
                               folder / f"{kind}.txt"], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def compare(one, other):
    """Weights, moved ones too, the log and the metrics of two run folders to 1e-5."""
    a, b = (load_file(folder / "resume.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        if not name.startswith("rng"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-8)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for stage, values in results[0]["metrics"].items():
        assert results[1]["metrics"][stage] == pytest.approx(values, rel=1e-5)
    assert results[0].get("ranks") == results[1].get("ranks")
    logs = [[line.split(",")[:4] for line in (folder / "log.csv").read_text().splitlines()]
            for folder in (one, other)]
    for row, same in zip(*logs, strict=True):
        assert row[0] == same[0] and (row[0] == "step" or [float(x) for x in row] == pytest.approx(
            [float(x) for x in same], rel=1e-5))


@pytest.mark.parametrize("i", range(len(RUNS)), ids=RUNS)
def test_two_processes_end_where_one_ends(runs, i):
    """Half the batch each, every method: the hooks of all processes move the same things by the
    same amount. 60 examples in batches of 8: the last batch of an epoch is a small one."""
    compare(runs / "one" / str(i), runs / "two" / str(i))


@pytest.mark.parametrize("dataset", ["reviews", "stdlib", "llama"])
def test_two_processes_and_accumulation_for_a_roberta_and_a_llama(runs, dataset):
    """A head that is trained too; masked words, where all must mask the same ones; activation
    checkpointing."""
    for kind in ("two", "accumulated", "two-accumulated"):
        compare(runs / "one" / dataset, runs / kind / dataset)


def test_accumulating_equals_the_large_batch(runs):
    """Four accumulations of 2, and two in each of two processes, are a batch of 8."""
    chosen = [i for i, run in enumerate(RUNS) if run.startswith(("lora", "adalora"))]
    for place, i in enumerate(chosen):
        for kind in ("accumulated", "two-accumulated"):
            compare(runs / "one" / str(i), runs / kind / str(place))


def test_a_process_draws_its_own_numbers_and_others_once_it_is_resumed(monkeypatch):
    """Dropout of process 1 and of process 2, of another seed, and behind step 50, is not that of
    process 1 at its start; the same run again has the same. The first process keeps its numbers,
    which are saved."""
    def drawn(rank, *seed):
        monkeypatch.setattr(machine, "RANK", rank)
        torch.manual_seed(7)
        machine.parallel(torch.nn.Linear(2, 2), seed)
        return torch.rand(4).tolist()
    start = drawn(1, 0, 0)
    assert start == drawn(1, 0, 0)
    assert start not in (drawn(2, 0, 0), drawn(1, 3, 0), drawn(1, 0, 50))
    assert drawn(0, 0, 0) == drawn(0, 0, 50)
