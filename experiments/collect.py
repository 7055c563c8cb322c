"""One csv row for each finished run folder of one dataset: python -m experiments.collect FOLDER… > FILE.csv"""
import csv
import json
import sys
from pathlib import Path

SETTINGS = "dataset", "method", "rank", "alpha", "rs", "lr", "steps", "batch_size", "seed"


def main():
    rows = []
    for folder in map(Path, sys.argv[1:]):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        with open(folder / "log.csv", encoding="utf-8") as f:
            log = {int(row["step"]): row for row in csv.DictReader(f)}
        kept = log[result["selected"]["step"]]  # the checkpoint that was kept
        metrics = {f"{stage} {name}": round(value, 5) for stage, values in result["metrics"].items()
                   for name, value in values.items() if stage in ("base", "trained", "merged")}
        metrics = {key.replace("trained", "final").replace("merged", "final"): value for key, value in metrics.items()}
        validation = {key.replace("val_", "validation "): round(float(kept[key]), 5) for key in kept if "val_" in key}
        rows.append({**{key: result["settings"][key] for key in SETTINGS}, "kept step": kept["step"], **validation,
                     **metrics, "training seconds": result["seconds"]["training"]})
    table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


if __name__ == "__main__":
    main()
