"""The plane of learning rates: plain LoRA r 16 whose A and B learn at rates of their own, on
SmolLM2-135M and E2E with its official test set.

    python -m experiments.plane PART SMOLLM2 E2E [--device cuda]

SMOLLM2 and E2E are folders of experiments/smollm2.py and, with test.txt, e2e_split.py. PART is

    same     rsLoRA, LoRA with 3 alpha and Delta-LoRA from the first step, beside the cells of the
             plane that they are under Adam: without clipping and weight decay, and with both
    grid     lr_A 2.5e-4 to 1.6e-2 by lr_B 4e-3 to 1.28e-1, each a factor of two apart, one seed
    seeds    the lowest cell, and the best of the diagonal lr_A = lr_B, at five seeds that chose
             neither
    ranks    the ratio lr_B / lr_A alone, at r 4 and r 64

Of `grid` and `ranks` all cells are validated, and the best cell of each ratio is tested.
Each part writes experiments/results/plane-PART.csv run by run, and goes on from it. A run takes
minutes on a CPU. The validation is on 256 texts drawn from all records: the first of the file
belong to a few. A step's batch is 8 texts, a run 50 steps.
"""
import argparse
import random
import shutil
from pathlib import Path

from checkpoints.files import read_text, write_text
from compare import RESULTS, ROOT, compare, parse, read_csv
from evaluation import evaluate

A_RATES = [2.5e-4 * 2**i for i in range(7)]
B_RATES = [4e-3 * 2**i for i in range(6)]
EXACT = "--clip 0 --weight-decay 0"


def more_texts():
    """In every process of a grid: all 256 texts of the validation."""
    evaluate.EVAL_EXAMPLES = 256


def drawn(folder):
    """The data as it is used, in a folder under out/: of the validation 256 texts."""
    to = ROOT / "out/plane-e2e"
    to.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        shutil.copyfile(folder / f"{split}.jsonl", to / f"{split}.jsonl")
    rows = [line for line in read_text(folder / "validation.jsonl").split("\n") if line.strip()]
    write_text(to / "validation.jsonl", "".join(f"{row}\n" for row in random.Random(0).sample(
        rows, 256)))
    return to


def by_ratio(cells):
    """{ratio: [lr_A]} of cells (lr_A, lr_B): a row of the grid has one ratio."""
    rows = {}
    for a, b in cells:
        rows.setdefault(round(b / a, 6), []).append(a)
    return {ratio: sorted(rates) for ratio, rates in sorted(rows.items())}


def row(label, flags, rates):
    return ["--row", f"{label}: {flags} --lr {' '.join(f'{rate:g}' for rate in rates)}"]


def best_cells():
    """((lr_A, ratio) of the lowest cell, of the best one of the diagonal), by validation."""
    cells = {(float(r["lr"]), float(r["row"].split()[-1])): float(r["validation loss"])
             for r in read_csv(RESULTS / "plane-grid.csv") if not r.get("diverged")}
    return (min(cells, key=cells.get),
            min((cell for cell in cells if cell[1] == 1), key=cells.get))


def rows_of(part):
    """The words of compare.py for a part."""
    if part == "same":
        plans = {"rsLoRA": "--method rslora", "ratio 4": "--method lora --lr-ratio 4",
                 "3 alpha": "--method lora --alpha 48", "ratio 3": "--method lora --lr-ratio 3",
                 "Delta-LoRA K 0": "--method deltalora --delta-lambda 2 --delta-start 0"}
        return [word for name, flags in plans.items() for what, more in (("exact", EXACT), ("", ""))
                for word in row(f"{name} {what}".strip(), f"{flags} {more}", [2e-3])]
    if part == "grid":
        cells = [(a, b) for a in A_RATES for b in B_RATES]
        return [word for ratio, rates in by_ratio(cells).items()
                for word in row(f"ratio {ratio:g}", f"--method lora --lr-ratio {ratio:g}", rates)]
    if part == "seeds":
        return ["--seeds", "6", *(word for name, (a, ratio) in zip(
            ("lowest", "diagonal"), best_cells(), strict=True)
            for word in row(f"{name}, ratio {ratio:g}", f"--method lora --lr-ratio {ratio:g}",
                            [a]))]
    (a, best), _ = best_cells()
    return ["--rank", "4", "64", *(
        word for ratio in (best / 8, best / 4, best / 2, best, 2 * best, 4 * best)
        for word in row(f"ratio {ratio:g}", f"--method lora --lr-ratio {ratio:g}",
                        [a / 2, a, 2 * a]))]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("same", "grid", "seeds", "ranks"))
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    rank = [] if args.part == "ranks" else ["--rank", "16"]
    best = ["--best-lr"] if args.part in ("grid", "ranks") else []
    compare(parse([str(RESULTS / f"plane-{args.part}"), *rows_of(args.part), "--lr", "2e-3",
                   *best, "--long", "--plot", "rank" if args.part == "ranks" else "none", "--",
                   "--model", str(args.model), "--dataset", "e2e", "--data-dir",
                   str(drawn(args.folder)), *rank, "--alpha", "16", "--steps", "50",
                   "--batch-size", "8", "--eval-every", "50", "--test-texts", "512", "--device",
                   args.device]), setup=more_texts)


if __name__ == "__main__":
    main()
