"""What the best runs of experiments/real_base.sh write, and what they have forgotten: each row's best rate, seed 0.

    python -m experiments.real_texts SMOLLM2 E2E      the folders that real_base.sh was given

Writes real-texts.csv, a row at a time, and goes on from those that it has. Texts are decoded greedily for all records
of the test set. Forgetting is the loss on stdlib, Python's prose, before and after. A run whose folder is lost is
trained again, and its test loss then stands beside that of real-base.csv. Writes real-characters.csv too: how many
tokens of each base's vocabulary the test texts have, since losses in nats per token do not compare.
"""
import argparse
import contextlib
import io
import shlex
from concurrent.futures import as_completed

import torch

import generate
from checkpoints.pretrained import MODELS, from_pretrained, locate
from data import Dataset
from experiments.compare import RESULTS, cell, folder, pool, read_csv, write_csv

PLAIN = "stdlib"


def measured(row, data_dir):
    """A row of real-base.csv -> a row of real-texts.csv"""
    flags = [data_dir if word == "FOLDER" else word for word in shlex.split(row["flags"])]
    result = cell(flags, PLAIN)
    with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):
        scores = generate.generate(generate.parse([str(folder(flags))]))
    last = result["metrics"].get("merged") or result["metrics"]["trained"]  # full fine-tuning has nothing to merge
    plain = {f"{stage} loss on {PLAIN}": result[f"{stage} loss on {PLAIN}"] for stage in ("base", "merged")}
    values = {**scores, "merged loss": last["loss"], **plain}
    return {**{name: row[name] for name in ("row", "lr", "seed")},
            **{name: round(value, 5) for name, value in values.items()}, "run": row["run"]}


def characters(base, data_dir):
    """The size of the 256 test texts of real_base.sh in the vocabulary of a base."""
    source = locate(base)
    dataset = Dataset("e2e", data_dir, 256).encode(source, from_pretrained(source), 256)
    return {"base": base if base in MODELS else "SmolLM2-135M", "texts": len(dataset.pairs["test"]),
            "targets": sum(len(ids) - start for ids, start in dataset.examples["test"]),
            "characters": sum(len(text) for _, text in dataset.pairs["test"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smollm2", help="the folder of SmolLM2-135M")
    parser.add_argument("e2e", help="the folder of E2E")
    args = parser.parse_args()
    write_csv(RESULTS / "real-characters.csv", [characters(base, args.e2e) for base in ("tiny-gpt", args.smollm2)])
    file = RESULTS / "real-texts.csv"
    chosen = {row["run"]: row for row in read_csv(RESULTS / "real-base.csv")
              if row["best"] == "1" and row["seed"] == "0" and row["merged loss"]}
    found = {row["run"]: row for row in read_csv(file)} if file.exists() else {}
    with pool(2) as workers:
        jobs = [workers.submit(measured, row, args.e2e) for run, row in chosen.items() if run not in found]
        for job in as_completed(jobs):
            row = job.result()
            found[row["run"]] = row
            write_csv(file, [found[run] for run in chosen if run in found])


if __name__ == "__main__":
    main()
