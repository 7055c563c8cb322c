"""What merging keeps of ResLoRA: input and middle, with every merge, on three datasets and with
--e2e on a fourth.

    python -m experiments.merges [--e2e FOLDER] [--quick]

Writes merges-<dataset>.csv and merges.png. One seed, and one rate for all rows of a dataset.
(experiments/reslora.sh has restaurants at three rates, experiments/methods.sh has e2e and reviews
at each structure's best rate with three seeds.) A loss is nats per target token on the test split,
for `reviews` nats per text. "all" means all earlier layers: up to five of six, of `reviews` up to
three of four. `block` is not here, because it merges exactly.
"""
import argparse

from compare import RESULTS, ROOT, compare, parse, read_csv
from evaluation.plots import picture
from experiments import tables
from experiments.tables import MERGES, RATES, loss

EVERY = {"reviews": "100"}  # steps between validations; else 30
SOME = "input, m 1", "middle, m 1", "middle, all"  # for --quick
ROWS = {}
for shortcut in "input", "middle":
    for name, m in (("m 1", 1), ("m 2", 2), ("all", -1)):
        # the paper's merge_bw of input is defined for one earlier layer
        merges = [how for how in MERGES if (shortcut, how) != ("input", "bw") or m == 1]
        also = ["--shortcut middle"] * (shortcut == "middle") + [f"--pre-num {m}"] * (m != 1)
        ROWS[f"{shortcut}, {name}"] = " ".join(["--method reslora", *also, "--merge",
                                                ",".join(merges)])


def grid(dataset, folder, quick):
    """The rows of one dataset."""
    rows = [word for label, flags in ROWS.items()
            for word in ("--row" if label in SOME else "--also", f"{label}: {flags}")]
    flags = ["--dataset", dataset, "--rank", "16", "--eval-every", EVERY.get(dataset, "30")]
    return compare(parse([str(RESULTS / f"merges-{dataset}"), *rows, "--lr", RATES[dataset],
                          "--plot", "none", *["--quick"] * quick, "--", *flags,
                          *(["--data-dir", folder] if folder else [])]))


def draw(found, path):
    """What each merge adds to the loss of the unmerged model; a panel for each dataset, both axes
    shared."""
    styles = {"regression": ("C2", "o", "regression (ours)"), "bw": ("C3", "D", "paper: merge_bw"),
              "bi": ("C1", "s", "paper: merge_bi"), "none": ("0.45", "x", "shortcut dropped")}
    shape = (1, 1) if len(found) == 1 else (2, 2)
    labels = [row["row"] for row in next(iter(found.values()))]
    with picture(path, *shape, figsize=(8, 2.7 * shape[0]), sharex=True, sharey=True,
                 squeeze=False) as (figure, axes):
        for axis, (dataset, rows) in zip(axes.flat[:len(found)], found.items(), strict=True):
            for row in rows:
                for down, (how, (colour, marker, label)) in enumerate(styles.items()):
                    if loss(row, how) is not None:
                        # a gain has no place on a log axis
                        cost = max(loss(row, how) - loss(row, "unmerged"), 1e-4)
                        axis.plot(cost, labels.index(row["row"]) + 0.15 * (down - 1.5), marker,
                                  color=colour, ms=7, alpha=0.85,
                                  label=label if row["row"] == "middle, all" else None)
            axis.set_title(dataset, fontsize=10)
            axis.set(xscale="log", ylim=(len(labels) - 0.5, -0.5))
            axis.set_yticks(range(len(labels)), labels)
            axis.tick_params(labelbottom=True)
            axis.grid(axis="x", which="both", alpha=0.25)
        for axis in axes.flat[len(found):]:
            axis.set_visible(False)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                      frameon=False)
        figure.supxlabel("loss added by merging ResLoRA (nats per target token or text, log scale)",
                         fontsize=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", help="folder of the real E2E data (python -m "
                        "experiments.e2e_split)")
    parser.add_argument("--quick", action="store_true", help="three rows of restaurants, into "
                        "out/quick")
    args = parser.parse_args()
    for dataset in ["restaurants"] if args.quick else RATES:
        if dataset != "e2e" or args.e2e:
            grid(dataset, args.e2e if dataset == "e2e" else None, args.quick)
    where = ROOT / "out/quick" if args.quick else RESULTS
    files = {dataset: where / f"merges-{dataset}.csv" for dataset in RATES}
    draw({dataset: read_csv(file) for dataset, file in files.items() if file.exists()},
         where / "merges.png")
    print(*tables.merges(where), sep="\n")


if __name__ == "__main__":
    main()
