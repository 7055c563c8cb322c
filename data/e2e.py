"""e2e: the E2E NLG challenge, restaurant records and what crowd workers wrote about them (Novikova et al. 2017,
arXiv:1706.09254; CC BY-SA 4.0).

From the Hugging Face hub, or with --data-dir from a folder with train, validation and test as .jsonl, .csv or .parquet
and the hub's columns. The record is used as the dataset writes it.
"""
import json
from pathlib import Path

COLUMNS = "meaning_representation", "human_reference"
SPLITS = "train", "validation", "test"
# The hub's dataset is a script, which `datasets` no longer runs; its parquet conversion lives at this revision.
HUB, REVISION = "tuetschek/e2e_nlg", "refs/convert/parquet"


def load(data_dir=None):
    """{split: [(meaning representation, sentence)]}"""
    if data_dir is None:
        return {split: pairs_of(rows, f"{HUB} {split}") for split, rows in from_hub().items()}
    return {split: pairs_of(*rows_of(Path(data_dir), split)) for split in SPLITS}


def from_hub():
    from datasets import load_dataset
    try:
        files = {split: f"hf://datasets/{HUB}@{REVISION}/default/{split}/0000.parquet" for split in SPLITS}
        return load_dataset("parquet", data_files=files)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{HUB} is not to be had from the hub ({type(e).__name__}): give --data-dir a folder with "
                         "train.jsonl, validation.jsonl and test.jsonl") from None


def rows_of(folder, split):
    """The rows of one split, as dicts, and the file they are from."""
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    found = [folder / f"{split}{ending}" for ending in (".jsonl", ".csv", ".parquet")]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(f"{folder} has no {split}.jsonl, {split}.csv or {split}.parquet")
    if found[0].suffix == ".jsonl":
        return rows_of_jsonl(found[0]), found[0]
    from datasets import Dataset
    from datasets.exceptions import DatasetsError
    reader = Dataset.from_csv if found[0].suffix == ".csv" else Dataset.from_parquet
    try:
        return list(reader(str(found[0]), keep_in_memory=True)), found[0]
    except (DatasetsError, ValueError, OSError) as e:
        raise ValueError(f"{found[0]} cannot be read: {str(e).splitlines()[0]}") from None


def rows_of_jsonl(file):
    """One dict a line; ValueError with the number of a line that is not."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            raise ValueError(f"{file}, line {number}: not UTF-8") from None
        except json.JSONDecodeError as e:
            raise ValueError(f"{file}, line {number}: not JSON ({e})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: a JSON object is needed, not {type(row).__name__}")
        rows.append(row)
    return rows


def pairs_of(rows, source):
    """Rows -> (record, sentence); ValueError with the row's number where a column is missing or holds no text."""
    pairs = []
    for number, row in enumerate(rows, 1):
        for column in COLUMNS:
            if column not in row:
                raise ValueError(f"{source}, line {number}: no column {column!r}, only {', '.join(map(str, row))}")
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(f"{source}, line {number}: {column} must be text, not {row[column]!r}")
        pairs.append(tuple(row[column] for column in COLUMNS))
    if not pairs:
        raise ValueError(f"{source} is empty")
    return pairs


if __name__ == "__main__":
    import sys

    for split, pairs in load(*sys.argv[1:]).items():
        print(f"{split:10} {len(pairs):6} sentences, {len({p for p, _ in pairs}):5} records; {pairs[0]}")
