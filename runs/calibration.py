"""How many tokens does merging by regression need? The loss of a merged ResLoRA against what it was calibrated on.

    python runs/calibration.py [--quick]      writes results/calibration.csv and .png; --quick is restaurants

The models are those of runs/merges.py (trained if they are not there), at the seed and rate that it has; each is
merged again and again, from one text of the training split to a thousand. Loss on the test split.
"""
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from merges import EVERY, RATES, ROWS  # noqa: E402

from compare import ROOT, STYLES, cell, groups, pool, trained, write, write_csv  # noqa: E402

TEXTS = (1, 2, 4, 8, 16, 64, 256, 1024)


def merged(dataset, label):
    """One model: [{dataset, row, texts, tokens, merged loss, ...}]"""
    import lora
    import train
    flags = ["--dataset", dataset, "--rank", "16", "--eval-every", EVERY.get(dataset, "30"), *ROWS[label].split(),
             "--lr", f"{float(RATES[dataset]):g}", "--seed", "0"]
    losses = {stage: values["loss"] for stage, values in cell(flags)["metrics"].items()}
    run = trained(flags)
    train.CALIBRATION = train.CALIBRATION_LABELLED = max(TEXTS)  # batches: all there are
    rows = []
    for texts in TEXTS:
        model, tokens = copy.deepcopy(run.model), 0

        def batches(model=model, texts=texts):
            nonlocal tokens
            for real, M in train.calibration(model, run.train[:texts], run.task, run.args):
                tokens += real.sum().item()
                yield real, M
        run.Adapter.calibrate([m for m in model.modules() if isinstance(m, run.Adapter)], batches)
        loss = run.report(lora.merge(model))["loss"]
        rows.append({"dataset": dataset, "row": label, "texts": texts, "tokens": tokens, "merged loss": round(loss, 5),
                     **{f"{stage} loss": round(losses[stage], 5) for stage in ("base", "unmerged", "merged by none")},
                     "kept": round((losses["base"] - loss) / (losses["base"] - losses["unmerged"]), 4)})
    return rows


def draw(rows, path):
    """What merging adds against tokens, both axes logarithmic."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (dataset, label), same in groups(rows, "dataset", "row").items():
        colour, marker, line = STYLES[label.split(",")[0]]
        axis.plot([r["tokens"] for r in same], [max(r["merged loss"] - r["unmerged loss"], 1e-4) for r in same], line,
                  color=colour, marker=marker, fillstyle="full" if dataset == "restaurants" else "none",
                  label=f"{dataset}: {label}")
    axis.set(xscale="log", yscale="log", xlabel="tokens of the training split that the regression saw",
             ylabel="loss added by merging (nats)")
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False, fontsize=9)
    write(path, lambda part: figure.savefig(part, dpi=150, format="png"))


def main(datasets, to):
    with pool(2) as workers:
        keys = [(dataset, label) for dataset in datasets for label in ("input, m 1", "middle, all")]
        rows = [row for found in workers.map(merged, *zip(*keys, strict=True)) for row in found]
    write_csv(to / "calibration.csv", rows)
    draw(rows, to / "calibration.png")
    for (dataset, label), same in groups(rows, "dataset", "row").items():
        print(f"{dataset:12} {label:12} unmerged {same[0]['unmerged loss']:.4f}; "
              + "  ".join(f"{r['tokens']:,}: {r['merged loss']:.4f}" for r in same))


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    main(["restaurants"] if quick else ["restaurants", "reviews"], ROOT / ("out/quick" if quick else "results"))
