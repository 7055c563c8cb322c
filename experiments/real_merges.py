"""What merging keeps of ResLoRA on a base that was really pretrained: SmolLM2-135M on E2E, all
merges, one seed.

    python -m experiments.real_merges SMOLLM2 E2E
        folders of experiments/smollm2.py and of experiments/e2e_split.py

Writes real-merges.csv and .png, a trained structure at a time, and goes on from those that the csv
has. Each is trained for 25 steps of 8 texts, all at one rate, and measured on 48 test texts. The
paper's merges are calibrated on 64 texts, the regression on 4, 16 and 64. Four texts have fewer
tokens than a layer has inputs (576): there only eps makes the regression solvable, so eps is
varied.
"""
import argparse
import copy
import random
import shlex
import tempfile
from pathlib import Path

import lora
import reslora
import train
from checkpoints.files import check_writable
from compare import RESULTS, groups, read_csv, write_csv
from evaluation import evaluate
from evaluation.plots import picture
from experiments.merges import ROWS

FLAGS = ("--dataset e2e --rank 16 --lr 2e-3 --steps 25 --batch-size 8 --eval-every 25 --test-texts "
         "48")
# (merge, calibration texts, eps)
WAYS = [("none", 0, None), ("bi", 64, None), ("bw", 64, None),
        *[("regression", n, 1e-3) for n in (4, 16, 64)], ("regression", 4, 1e-1),
        ("regression", 4, 1e-5)]


def merged(label, base, folder):
    """One trained structure: [{row, merge, texts, tokens, eps, merged loss, ...}]"""
    flags = [*shlex.split(FLAGS), *ROWS[label].split()]
    with tempfile.TemporaryDirectory() as out:
        run = train.Run(train.parse([*flags, "--model", base, "--data-dir", folder, "--out",
                                     f"{out}/run"]))
        losses = {"base loss": run.report(run.model)["loss"]}  # at B = 0 the model is the base
        check_writable(run.settings.out)
        train.fit(run)
    losses["unmerged loss"] = run.report(run.model)["loss"]
    examples = run.data.examples["train"]
    random.Random(0).shuffle(examples)  # neighbours in the file describe the same restaurant
    evaluate.CALIBRATION = max(texts for _, texts, _ in WAYS)  # batches: all
    rows = []
    for how, texts, eps in WAYS:
        if how not in run.layers[0].merges:
            continue
        model = copy.deepcopy(run.model)
        run.data.examples["train"] = examples[:texts]
        calibration = run.calibration(model)
        calibration["batches"] = list(calibration["batches"])
        tokens = sum(calibration["real"](batch).sum().item() for batch in calibration["batches"])
        more = {"eps": eps} if how == "regression" else {}
        reslora.calibrate(model, merge=how, **calibration, **more)
        found = {**losses, "merged loss": run.report(lora.merge(model))["loss"]}
        rows.append({"row": label, "merge": how, "texts": texts, "tokens": tokens, "eps": eps,
                     **{name: round(value, 5) for name, value in found.items()},
                     "flags": shlex.join(flags)})
    return rows


def draw(rows, path):
    """What each merge adds to the loss, a mark for each, on a log axis: a gain stands at its left
    end."""
    styles = {("regression", 64): ("C2", "o", "regression, 64 texts"),
              ("regression", 16): ("C2", "^", "16 texts"),
              ("regression", 4): ("C2", "v", "4 texts"), ("bw", 64): ("C3", "D", "paper: merge_bw"),
              ("bi", 64): ("C1", "s", "paper: merge_bi"),
              ("none", 0): ("0.45", "x", "shortcut dropped")}
    labels = list(groups(rows, "row"))
    with picture(path, figsize=(7, 3.6)) as (figure, axis):
        for (how, texts), (colour, marker, label) in styles.items():
            same = [r for r in rows if (r["merge"], int(r["texts"])) == (how, texts)
                    and r["eps"] in ("", "0.001")]
            cost = [max(float(r["merged loss"]) - float(r["unmerged loss"]), 1e-4) for r in same]
            axis.plot(cost, [labels.index((r["row"],)) for r in same], marker, color=colour, ms=7,
                      alpha=0.85, fillstyle="none" if texts in (4, 16) else "full", label=label)
        axis.set(xscale="log", ylim=(len(labels) - 0.5, -0.5),
                 xlabel="loss added by merging (nats per target token, log scale)")
        axis.set_yticks(range(len(labels)), [label for label, in labels])
        axis.grid(axis="x", which="both", alpha=0.25)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the folder of SmolLM2-135M")
    parser.add_argument("e2e", help="the folder of E2E")
    args = parser.parse_args()
    file = RESULTS / "real-merges.csv"
    for label in sorted(ROWS, key=lambda label: "m 2" in label):  # what says least comes last
        rows = read_csv(file) if file.exists() else []
        if (label,) not in groups(rows, "row"):
            rows += merged(label, args.base, str(Path(args.e2e)))
            write_csv(file, sorted(rows, key=lambda row: list(ROWS).index(row["row"])))
    draw(read_csv(file), RESULTS / "real-merges.png")


if __name__ == "__main__":
    main()
