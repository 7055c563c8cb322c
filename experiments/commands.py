"""README's first commands as a newcomer runs them: what they print at the end, and how long they take.

    python -m experiments.commands --e2e FOLDER      writes experiments/results/commands.csv; three minutes on two cores
"""
import argparse
import json
import subprocess
import sys
import time

from experiments.compare import RESULTS, ROOT, write_csv

COMMANDS = ("train.py --method reslora --rank 64",
            "train.py --method reslora --rank 16 --model tiny-roberta --dataset reviews",
            "train.py --method reslora --rank 16 --lr 2.4e-2 --dataset e2e --data-dir FOLDER --out out/e2e",
            "generate.py out/e2e", "generate.py out/e2e --beams 10 --length-penalty .9")


def scores(command, folder):
    """Run it; [{command, what, value}]"""
    began = time.time()
    words = [folder if word == "FOLDER" else word for word in command.split()]
    said = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
    found = {"seconds": round(time.time() - began, 1)}
    if words[0] == "train.py":
        out = next(line for line in said.splitlines() if "everything is in" in line).split()[-1]
        result = json.loads((ROOT / out / "result.json").read_text(encoding="utf-8"))
        found["training seconds"] = result["seconds"]["training"]
        for stage, values in result["metrics"].items():
            found.update({f"{stage} {metric}": round(value, 4) for metric, value in values.items()})
    else:
        names, values = said.splitlines()[-2:]
        found.update(zip(names.split(), values.split(), strict=True))
    return [{"command": f"python {command}", "what": what, "value": value} for what, value in found.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", required=True, help="folder of the real E2E data (python -m experiments.e2e_split)")
    args = parser.parse_args()
    rows = [row for command in COMMANDS for row in scores(command, args.e2e)]
    write_csv(RESULTS / "commands.csv", rows)
    for row in rows:
        print("  ".join(map(str, row.values())))
