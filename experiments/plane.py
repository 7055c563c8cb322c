"""The plane of learning rates: plain LoRA r 16 whose A and B learn at rates of their own, on
SmolLM2-135M and E2E with its official test set.

    python -m experiments.plane PART SMOLLM2 E2E [--device cuda]
    python -m experiments.plane picture

SMOLLM2 and E2E are folders of experiments/smollm2.py and, with test.txt, e2e_split.py. PART is

    same     rsLoRA, LoRA with 3 alpha and Delta-LoRA from the first step, beside the cells of the
             plane that they are under Adam: without clipping and weight decay, and with both
    grid     lr_A 2.5e-4 to 1.6e-2 by lr_B 4e-3 to 1.28e-1, each a factor of two apart, one seed
    seeds    the lowest cell, and the best of the diagonal lr_A = lr_B, at five seeds that chose
             neither
    methods  the methods on the same data: three rates each, five seeds at the best
    ranks    the ratio lr_B / lr_A alone, at r 4 and r 64

Each part writes experiments/results/plane-PART.csv run by run, and goes on from it. `picture` draws
plane-grid.png. Of `grid` and `ranks` all cells are validated, and the best cell of each ratio is
tested. The validation is on 256 texts drawn from all records: the first of the file belong to a
few. A run has 50 steps of 8 texts, and takes minutes on a CPU.
"""
import argparse
import math
import random
import shutil
from pathlib import Path

from checkpoints.files import read_text, write_text
from compare import RESULTS, ROOT, compare, parse, read_csv
from evaluation import evaluate
from evaluation.plots import picture

A_RATES = [2.5e-4 * 2**i for i in range(7)]
B_RATES = [4e-3 * 2**i for i in range(6)]
EXACT = "--clip 0 --weight-decay 0"
# methods whose points lie on a line lr_B = ratio lr_A, by the identity in lora.py, at r 16
LINES = {1: ("LoRA, one rate", "-"), 2: ("LoRA 2 alpha", ":"),
         3: ("LoRA 3 alpha, Delta-LoRA K 0", "-."), 4: ("rsLoRA", "--"), 16: ("LoRA+", (0, (1, 1)))}


# the middle one of three rates was the best of an earlier grid (LOG.md)
METHODS = {"ResLoRA input": ("--method reslora", [2e-3, 4e-3, 8e-3]),
           "rsLoRA": ("--method rslora", [2e-3, 4e-3, 8e-3]),
           "Delta-LoRA": ("--method deltalora", [2e-3, 4e-3, 8e-3]),
           "LoRA, 3 alpha": ("--method lora --alpha 48", [2e-3, 4e-3, 8e-3]),
           "full fine-tuning": ("--method full", [1e-4, 2e-4, 4e-4]),
           "LoRA r 3 on all linears": ("--method lora --rank 3 --targets q,k,v,o,gate,up,down",
                                       [2e-3, 4e-3, 8e-3]),
           "ResLoRA block": ("--method reslora --shortcut block", [4e-3, 8e-3, 1.6e-2]),
           "ResLoRA middle": ("--method reslora --shortcut middle", [4e-3, 8e-3, 1.6e-2]),
           "LoRA r 32, 2 alpha": ("--method lora --rank 32 --alpha 32", [4e-3, 8e-3, 1.6e-2])}


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


def cells_of_grid():
    """{(lr_A, ratio): validation loss} of the grid."""
    return {(float(r["lr"]), float(r["row"].split()[-1])): float(r["validation loss"])
            for r in read_csv(RESULTS / "plane-grid.csv") if not r.get("diverged")}


def best_cells():
    """((lr_A, ratio) of the lowest cell, of the best one of the diagonal), by validation."""
    cells = cells_of_grid()
    return (min(cells, key=cells.get),
            min((cell for cell in cells if cell[1] == 1), key=cells.get))


def size(flags=""):
    """The flags of r and alpha, where a method has them."""
    return "" if "full" in flags else "--rank 16 --alpha 16"


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
    if part == "methods":
        return ["--seeds", "6", *(word for label, (flags, rates) in METHODS.items()
                                  for word in row(label, f"{size(flags)} {flags}", rates))]
    (a, best), _ = best_cells()
    return ["--rank", "4", "64", *(
        word for ratio in (best / 8, best / 4, best / 2, best, 2 * best, 4 * best)
        for word in row(f"ratio {ratio:g}", f"--method lora --lr-ratio {ratio:g}",
                        [a / 2, a, 2 * a]))]


def draw(path):
    """Contours of the validation loss over (lr_A, lr_B), both axes in factors of two, and the lines
    on which the methods lie."""
    cells = {(a, round(a * ratio, 9)): loss for (a, ratio), loss in cells_of_grid().items()}
    x, y = [math.log2(a) for a in A_RATES], [math.log2(b) for b in B_RATES]
    losses = [[cells.get((a, round(b, 9)), math.nan) for a in A_RATES] for b in B_RATES]
    low = min(cells, key=cells.get)
    levels = [cells[low] + step for step in (0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)]
    with picture(path, figsize=(7.2, 5)) as (figure, axis):
        filled = axis.contourf(x, y, losses, levels, cmap="Blues", extend="max")
        axis.contour(x, y, losses, levels[1:], colors="0.35", linewidths=0.7)
        figure.colorbar(filled, label="validation loss (nats per target token)", format="%.3f")
        axis.plot(*zip(*((a, b) for a in x for b in y), strict=True), ".", color="0.35", ms=3)
        for ratio, (name, line) in LINES.items():
            start, end = max(x[0], y[0] - math.log2(ratio)), min(x[-1], y[-1] - math.log2(ratio))
            axis.plot([start, end], [start + math.log2(ratio), end + math.log2(ratio)], ls=line,
                      color="black", lw=1.6, label=f"{name}: lr_B = {ratio} lr_A")
        axis.plot(*map(math.log2, low), "*", color="white", mec="black", ms=17, ls="",
                  label="lowest cell")
        axis.set_xticks(x, [f"{a:g}" for a in A_RATES])
        axis.set_yticks(y, [f"{b:g}" for b in B_RATES])
        axis.set(xlabel="learning rate of A", ylabel="learning rate of B", xlim=(x[0], x[-1]),
                 ylim=(y[0], y[-1]))
        axis.set_title("LoRA r 16, alpha 16 on SmolLM2-135M, E2E, 50 steps, one seed", fontsize=10,
                       loc="left")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("same", "grid", "seeds", "methods", "ranks",
                                         "picture"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.part == "picture":
        draw(RESULTS / "plane-grid.png")
        return
    if not args.folder:
        parser.error(f"{args.part} needs SMOLLM2 and E2E")
    sizes = {"ranks": "--alpha 16", "methods": ""}.get(args.part, size())
    best = ["--best-lr"] if args.part in ("grid", "methods", "ranks") else []
    compare(parse([str(RESULTS / f"plane-{args.part}"), *rows_of(args.part), "--lr", "2e-3",
                   *best, "--long", "--plot", "rank" if args.part == "ranks" else "none", "--",
                   "--model", str(args.model), "--dataset", "e2e", "--data-dir",
                   str(drawn(args.folder)), *sizes.split(), "--steps", "50",
                   "--batch-size", "8", "--eval-every", "50", "--test-texts", "512", "--device",
                   args.device]), setup=more_texts)


if __name__ == "__main__":
    main()
