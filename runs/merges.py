"""What merging keeps of ResLoRA: base, LoRA, unmerged and every merge, for each structure, on two datasets.

    python runs/merges.py --e2e FOLDER [--seeds 3] [--jobs 2]      writes results/merges.csv and results/merges.png

Learning rates: a low one, as the papers use, the one of RATES at which plain LoRA has the lowest validation loss (seed
0), and half of that. Every row of the csv is one ResLoRA run; `lora` is the LoRA run of the same dataset, learning rate
and seed, and so of the same data order. A loss is nats per target token on the test split.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import ROOT, cell, mean, pool, validation, write_csv  # noqa: E402

DATASETS = "restaurants", "e2e"
LOW, RATES = 1e-3, (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)
STRUCTURES = ("input", 1), ("input", 3), ("middle", 1), ("middle", 3)
MERGES = "none", "input", "weight", "regression"
RANK = 16


def losses_of_one(dataset, lr, seed, structure, data_dir, steps):
    """One run; its losses."""
    out = "merges/" + "-".join(map(str, (dataset, lr, seed, *(structure or ("lora",)))))
    flags = ["--dataset", dataset, "--rank", RANK, "--lr", lr, "--seed", seed]
    flags += ["--data-dir", data_dir] if dataset == "e2e" else []
    flags += ["--steps", steps] if steps else []
    if structure:
        shortcut, m = structure
        # the paper's weight merge of the input shortcut is defined for one earlier layer
        merges = [how for how in reversed(MERGES) if (shortcut, how) != ("input", "weight") or m == 1]
        flags += ["--method", "reslora", "--shortcut", shortcut, "--pre-num", m, "--merge", ",".join(merges)]
    metrics = cell(out, flags)["metrics"]
    losses = {stage.removeprefix("merged by "): values["loss"] for stage, values in metrics.items()}
    losses["regression"] = losses.pop("merged")
    losses["validation"] = validation(out)[0]
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", help="folder of the real E2E data; without it only restaurants")
    parser.add_argument("--seeds", type=int, default=3, help="at the best rate")
    parser.add_argument("--other-seeds", type=int, default=1, help="at the low rate and at half of the best")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, help="instead of train.py's default")
    args = parser.parse_args()
    datasets = [name for name in DATASETS if name != "e2e" or args.e2e]
    with pool(args.jobs) as workers:
        def losses_of(keys):
            cells = [workers.submit(losses_of_one, *key, args.e2e, args.steps) for key in keys]
            return {key: future.result() for key, future in zip(keys, cells, strict=True)}
        tried = losses_of([(name, lr, 0, None) for name in datasets for lr in RATES])
        best = {name: min(RATES, key=lambda lr: tried[name, lr, 0, None]["validation"]) for name in datasets}
        for (name, lr, *_), losses in tried.items():
            print(f"LoRA on {name} at {lr:g}: validation {losses['validation']:.4f}" + " <- best" * (lr == best[name]))
        half = {name: best[name] / 2 for name in datasets}  # a shortcut doubles the branch: its own best may be lower
        low = dict.fromkeys(datasets, LOW)
        results = losses_of([(name, rate[name], seed, structure) for rate, seeds in
                             ((best, args.seeds), (low, args.other_seeds), (half, args.other_seeds))
                             for seed in range(seeds) for name in datasets for structure in (None, *STRUCTURES)])
    rows = []
    for (name, lr, seed, structure), losses in results.items():
        if structure:
            lora = results[name, lr, seed, None]["regression"]  # LoRA's merge is exact
            rows.append(dict(dataset=name, lr=lr, seed=seed, shortcut=structure[0], pre_num=structure[1], rank=RANK,
                             base=losses["base"], lora=lora, unmerged=losses["unmerged"],
                             **{how: losses.get(how, "") for how in MERGES}))
    write_csv(ROOT / "results/merges.csv", rows)
    print_table(rows)
    draw(rows, best)


def groups(rows):
    """{(dataset, lr, shortcut, pre_num): rows of all seeds}"""
    out = {}
    for row in rows:
        out.setdefault((row["dataset"], row["lr"], row["shortcut"], row["pre_num"]), []).append(row)
    return out


def print_table(rows):
    """Markdown: mean losses over the seeds, and how much of the gain over the base and over LoRA merging keeps."""
    print("\n| dataset | rate | structure | seeds | base | LoRA | unmerged | none | input | weight | **regression** "
          "| kept of the gain over the base | (LoRA - merged) / (LoRA - unmerged) |")
    print("|---" * 13 + "|")
    for (name, lr, shortcut, m), same in groups(rows).items():
        def column(key, same=same):
            values = [float(row[key]) for row in same if row[key] != ""]
            return f"{mean(values):.3f}" if values else "-"
        kept = [(r["base"] - r["regression"]) / (r["base"] - r["unmerged"]) for r in same]
        over = [r["lora"] - r["regression"] for r in same], [r["lora"] - r["unmerged"] for r in same]
        ratio = f"{mean(over[0]) / mean(over[1]):.2f}" if mean(over[1]) > 0 else "unmerged > LoRA"
        print(f"| {name} | {lr:g} | {shortcut}, m {m} | {len(same)} | "
              + " | ".join(map(column, ("base", "lora", "unmerged", *MERGES))) + f" | {mean(kept):.1%} | {ratio} |")


def draw(rows, best):
    """What each merge adds to the loss of the unmerged model, at LoRA's best rate; a mark a seed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    styles = {"regression": ("C2", "o", "regression (ours)"), "weight": ("C3", "D", "weight (paper)"),
              "input": ("C1", "s", "input (paper)"), "none": ("0.45", "x", "shortcut dropped")}
    figure, axes = plt.subplots(1, len(best), figsize=(8, 3.3), layout="constrained", sharey=True, squeeze=False)
    for axis, (name, lr) in zip(axes[0], best.items(), strict=True):
        for y, structure in enumerate(STRUCTURES):
            same = [r for r in rows if (r["dataset"], r["lr"], r["shortcut"], r["pre_num"]) == (name, lr, *structure)]
            for how, (colour, marker, label) in styles.items():
                cost = [r[how] - r["unmerged"] for r in same if r[how] != ""]
                axis.plot(cost, [y] * len(cost), marker, color=colour, ms=7, ls="", alpha=0.8,
                          label=label if y == 0 else None)
        axis.set(xscale="log", title=f"{name}, learning rate {lr:g}", ylim=(len(STRUCTURES) - 0.5, -0.5))
        axis.set_yticks(range(len(STRUCTURES)), [f"{shortcut}, m = {m}" for shortcut, m in STRUCTURES])
        axis.grid(axis="x", which="both", alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("loss added by merging ResLoRA (nats per token, log scale)", fontsize=10)
    figure.savefig(ROOT / "results/merges.png", dpi=160)


if __name__ == "__main__":
    main()
