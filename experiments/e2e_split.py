"""The E2E split of RESULTS.md from the public file, so that anybody can rerun it.

    python -m experiments.e2e_split valid.txt FOLDER

valid.txt is examples/NLG/data/e2e/valid.txt of github.com/microsoft/LoRA: E2E's development set, lines `record||text`.
Split by record: of the sorted distinct records, shuffled with seed 0, the first tenth are test, the second validation.
"""
import json
import random
import sys
from pathlib import Path


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: python -m experiments.e2e_split valid.txt FOLDER")
    source, folder = map(Path, sys.argv[1:])
    pairs = [line.split("||", 1) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [(record.strip(), text.strip()) for record, text in pairs]
    records = sorted({record for record, _ in pairs})
    random.Random(0).shuffle(records)
    n = len(records)
    splits = {"test": records[:n // 10], "validation": records[n // 10:2 * n // 10], "train": records[2 * n // 10:]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in splits.items():
        chosen = set(chosen)
        rows = [{"meaning_representation": r, "human_reference": t} for r, t in pairs if r in chosen]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                              encoding="utf-8")
        print(f"{split:10} {len(rows):5} texts of {len(chosen):4} records")


if __name__ == "__main__":
    main()
