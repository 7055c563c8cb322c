"""gsm8k: grade school mathematics, a question and a worked solution (Cobbe et al. 2021, arXiv:2110.14168).

From the Hugging Face hub (openai/gsm8k), or with --data-dir from a folder with train and test as .jsonl, .csv or
.parquet and the hub's columns. 500 training rows, or a tenth if that is less, are held out to select on. A solution
ends with "#### 42"; it is right if that number is.
"""
import random
import re

from data import files
from data.metrics import exact_match

COLUMNS = "question", "answer"
METRICS = ("exact_match",)
SPLITS = {"train": "train without 500 rows", "validation": "500 rows of train", "test": "test"}
MAX_NEW = 256  # tokens of a solution


def load(data_dir=None):
    """{split: [(question, solution)]}"""
    names = "train", "test"
    patterns = {name: f"main/{name}-*.parquet" for name in names}
    tables = (files.hub_rows("openai/gsm8k", patterns) if data_dir is None else
              {name: files.read_rows(data_dir, name) for name in names})
    rows = {}
    for split in names:
        rows[split] = []
        for where, row in tables[split]:
            files.check_row(row, COLUMNS, where)
            if not re.fullmatch(r"(?s).*####\s*\$?-?[\d,]{,30}\.?\d+\s*", row["answer"]):
                raise ValueError(f"{where}: answer must end with #### and a number, not {row['answer'][-30:]!r}")
            rows[split].append(tuple(row[c] for c in COLUMNS))
    held = set(random.Random(0).sample(range(len(rows["train"])), min(500, max(1, len(rows["train"]) // 10))))
    return {"train": [row for i, row in enumerate(rows["train"]) if i not in held],
            "validation": [rows["train"][i] for i in sorted(held)], "test": rows["test"]}


def final_number(text):
    """The number after the last ####, or None; "$1,200" and "1200.0" are equal."""
    numbers = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def score(pairs, texts):
    """{"exact_match": share of the solutions that end with the right number}"""
    return {"exact_match": exact_match(list(map(final_number, texts)), [final_number(answer) for _, answer in pairs])}


if __name__ == "__main__":
    import sys

    for split, pairs in load(*sys.argv[1:]).items():
        print(f"{split:10} {len(pairs):5} questions; {pairs[0]}")
