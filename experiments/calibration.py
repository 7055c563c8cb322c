"""How many tokens does merging by regression need? The loss of a merged ResLoRA against what it was
calibrated on.

    python -m experiments.calibration [--quick]
        writes experiments/results/calibration.csv and .png

The models are those of experiments/merges.py, trained if they are not there. Each is merged after
it was calibrated on one text of the training split, on two, and so on up to 1,024, three times with
different texts. The loss is that of the test split. train.py itself takes 512 texts, of `reviews`
8,192.
"""
import argparse
import copy

from compare import RESULTS, ROOT, STYLES, cell, groups, mean, pool, trained, write_csv
from evaluation.plots import picture
from experiments import tables
from experiments.merges import EVERY, ROWS
from experiments.tables import RATES

TEXTS = 1, 2, 4, 8, 16, 64, 256, 1024
DRAWS = 3  # different texts, of each size


def flags_of(dataset, label):
    return ["--dataset", dataset, "--rank", "16", "--eval-every", EVERY.get(dataset, "30"),
            *ROWS[label].split(), "--lr", f"{float(RATES[dataset]):g}", "--seed", "0"]


def merged(dataset, label):
    """One trained model: [{dataset, row, texts, draw, tokens, merged loss, ...}]"""
    import lora
    import reslora
    from evaluation import evaluate
    flags = flags_of(dataset, label)
    losses = {stage: round(values["loss"], 5) for stage, values in cell(flags)["metrics"].items()}
    run = trained(flags)
    examples = run.data.examples["train"]
    # batches: all. No run is trained after this
    evaluate.CALIBRATION = evaluate.CALIBRATION_LABELLED = max(TEXTS)
    rows = []
    for texts in TEXTS:
        for number in range(DRAWS):
            model = copy.deepcopy(run.model)
            run.data.examples["train"] = examples[number * texts:(number + 1) * texts]
            calibration = run.calibration(model)
            calibration["batches"] = list(calibration["batches"])
            tokens = sum(calibration["real"](batch).sum().item()
                         for batch in calibration["batches"])
            reslora.calibrate(model, **calibration)
            loss = run.report(lora.merge(model))["loss"]
            rows.append({"dataset": dataset, "row": label, "texts": texts, "draw": number,
                         "tokens": tokens, "merged loss": round(loss, 5),
                         "unmerged loss": losses["unmerged"],
                         "merged by none loss": losses["merged by none"],
                         "base loss": losses["base"]})
    return rows


def draw(rows, path):
    """What merging adds against tokens, both axes logarithmic; a band of the draws."""
    with picture(path, figsize=(6.4, 4.4)) as (figure, axis):
        for (dataset, label), same in groups(rows, "dataset", "row").items():
            colour, marker, line = STYLES[label.split(",")[0]]
            sizes = groups(same, "texts").values()
            tokens = [mean([r["tokens"] for r in at]) for at in sizes]
            cost = [[max(r["merged loss"] - r["unmerged loss"], 1e-4) for r in at] for at in sizes]
            axis.plot(tokens, [mean(at) for at in cost], line, color=colour, marker=marker,
                      fillstyle="full" if dataset == "restaurants" else "none",
                      label=f"{dataset}: {label}")
            axis.fill_between(tokens, list(map(min, cost)), list(map(max, cost)), color=colour,
                              alpha=0.15, lw=0)
        axis.set(xscale="log", yscale="log", xlabel="tokens of the training split that the "
                 "regression saw", ylabel="loss added by merging (nats)")
        axis.grid(alpha=0.25, which="both")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def main(datasets, where):
    keys = [(dataset, label) for dataset in datasets for label in ("input, m 1", "middle, all")]
    with pool(2) as workers:
        list(workers.map(cell, [flags_of(*key) for key in keys]))
        rows = [row for found in workers.map(merged, *zip(*keys, strict=True)) for row in found]
    write_csv(where / "calibration.csv", rows)
    draw(rows, where / "calibration.png")
    print(*tables.calibration(where), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="restaurants only, into out/quick")
    quick = parser.parse_args().quick
    main(["restaurants"] if quick else ["restaurants", "reviews"],
         ROOT / "out/quick" if quick else RESULTS)
