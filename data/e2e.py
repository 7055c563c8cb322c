"""e2e: the E2E NLG challenge, restaurant records and what crowd workers wrote about them (Novikova et al. 2017,
arXiv:1706.09254; CC BY-SA 4.0).

From the Hugging Face hub, or with --data-dir from a folder with train, validation and test as .jsonl, .csv or .parquet
and the hub's columns. The record is used as the dataset writes it.
"""
from data import files

COLUMNS = "meaning_representation", "human_reference"
NAMES = "train", "validation", "test"
# The hub's dataset is a script, which nothing runs any more; its parquet conversion lives at this revision.
HUB, REVISION = "tuetschek/e2e_nlg", "refs/convert/parquet"


def load(data_dir=None):
    """{split: [(meaning representation, sentence)]}"""
    rows = (files.hub_rows(HUB, {s: f"default/{s}/*.parquet" for s in NAMES}, REVISION) if data_dir is None else
            {s: files.read_rows(data_dir, s) for s in NAMES})
    return {split: [tuple(files.check_row(row, COLUMNS, where)[c] for c in COLUMNS) for where, row in rows[split]]
            for split in NAMES}


if __name__ == "__main__":
    import sys

    for split, pairs in load(*sys.argv[1:]).items():
        print(f"{split:10} {len(pairs):6} sentences, {len({p for p, _ in pairs}):5} records; {pairs[0]}")
