"""One csv row for each finished run folder: python runs/collect.py out/difficulty/* > results/difficulty.csv"""
import csv
import json
import sys
from pathlib import Path

SETTINGS = "dataset", "method", "rank", "alpha", "rs", "lr", "steps", "batch_size", "seed"

rows = []
for folder in map(Path, sys.argv[1:]):
    result = json.loads((folder / "result.json").read_text())
    with open(folder / "log.csv") as f:
        validation = list(csv.DictReader(f))[-1]["val_loss"]
    metrics = {f"{stage} {name}": round(value, 5) for stage, values in result["metrics"].items()
               for name, value in values.items() if stage in ("base", "trained", "merged")}
    metrics = {key.replace("trained", "final").replace("merged", "final"): value for key, value in metrics.items()}
    rows.append({**{key: result["settings"][key] for key in SETTINGS}, "validation loss": round(float(validation), 5),
                 **metrics, "training seconds": result["seconds"]["training"]})
table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
table.writeheader()
table.writerows(rows)
