"""The E2E splits of RESULTS.md from the public files, so that anybody can rerun them.

    python -m experiments.e2e_split valid.txt FOLDER
        a tenth of its records each for validation and test
    python -m experiments.e2e_split valid.txt FOLDER test.txt
        the official test set; train has the other tenth

The files are examples/NLG/data/e2e/valid.txt and test.txt of github.com/microsoft/LoRA: E2E's
development set and its official test set, lines `record||text`. Split by record: of the sorted
distinct records, shuffled with seed 0, the first tenth are test, the second validation.
"""
import json
import random
import sys
from pathlib import Path


def read(path):
    """[(record, text)]"""
    pairs = [line.split("||", 1) for line in Path(path).read_text(encoding="utf-8").splitlines()
             if line.strip()]
    return [(record.strip(), text.strip()) for record, text in pairs]


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m experiments.e2e_split valid.txt FOLDER [test.txt]")
    source, folder, *official = sys.argv[1:]
    pairs, folder = read(source), Path(folder)
    records = sorted({record for record, _ in pairs})
    random.Random(0).shuffle(records)
    n = len(records)
    splits = {"test": records[:n // 10], "validation": records[n // 10:2 * n // 10],
              "train": records[2 * n // 10:]}
    if official:
        splits["train"] += splits.pop("test")
    rows = {split: [pair for pair in pairs if pair[0] in chosen] for split, chosen in
            ((split, set(chosen)) for split, chosen in splits.items())}
    if official:
        rows["test"] = read(official[0])
        both = {record for record, _ in rows["test"]} & set(splits["train"] + splits["validation"])
        if both:
            sys.exit(f"{official[0]} and {source} share {len(both)} records: is it the official "
                     "test set?")
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in rows.items():
        lines = [json.dumps({"meaning_representation": record, "human_reference": text},
                            ensure_ascii=False) + "\n" for record, text in chosen]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split:10} {len(chosen):5} texts of {len({record for record, _ in chosen}):4} "
              "records")


if __name__ == "__main__":
    main()
