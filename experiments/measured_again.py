"""Do the --quick scripts give the committed csv's values? Compares their losses row by row.

    python -m experiments.measured_again      after some --quick scripts; writes experiments/results/measured-again.csv

One line for each row and rate that both have: the test loss in experiments/results and the one in out/quick.
"""
from experiments.compare import RESULTS, ROOT, read_csv, write_csv

FILES = ("reslora-pre-num", "reslora-curves-best", "rslora-adamw", "deltalora", "merge-at-restaurants",
         "merges-restaurants", "methods-reviews", "dylora", "deltalora-weights")
KEYS = "row", "adapter", "rank", "lr", "seed"


def main():
    rows = {}
    for name in FILES:
        if not (ROOT / f"out/quick/{name}.csv").exists():
            continue
        weights = name == "deltalora-weights"  # its rank is a result
        before, again = ({tuple(r.get(k, "") for k in KEYS if not (weights and k == "rank")): r for r in read_csv(file)}
                         for file in (RESULTS / f"{name}.csv", ROOT / f"out/quick/{name}.csv"))
        for key in again.keys() & before.keys():
            column = next(c for c in ("merged loss", "loss", "unmerged loss") if c in again[key])
            rows[name, key] = {"file": name, "row": key[0] or key[1], "rank": "" if weights else again[key]["rank"],
                               "lr": again[key]["lr"], "before": before[key][column], "again": again[key][column]}
    write_csv(RESULTS / "measured-again.csv", [rows[key] for key in sorted(rows)])


if __name__ == "__main__":
    main()
