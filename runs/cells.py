"""What the scripts here share: a training run that is not repeated when it has been done, and several at a time."""
import csv
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def cell(out, flags):
    """One run of train.py into out/<out>; its result.json. A finished run with the same flags is read back."""
    import train
    out, flags = ROOT / "out" / out, list(map(str, flags))
    done = out / "flags.json"
    if not (done.exists() and json.loads(done.read_text()) == flags):
        train.main([*flags, "--out", str(out)])
        done.write_text(json.dumps(flags))
    return json.loads((out / "result.json").read_text())


def validation(out):
    """The validation loss of the checkpoint that a run kept."""
    step = json.loads((ROOT / "out" / out / "result.json").read_text())["selected"]["step"]
    with open(ROOT / "out" / out / "log.csv") as f:
        return next(float(row["val_loss"]) for row in csv.DictReader(f) if int(row["step"]) == step)


def pool(jobs):
    """Processes for `jobs` runs at a time, one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    return ProcessPoolExecutor(jobs)


def write_csv(path, rows):
    """[{column: value}] -> results/<path>"""
    (ROOT / "results").mkdir(exist_ok=True)
    with open(ROOT / "results" / path, "w", newline="") as f:
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
