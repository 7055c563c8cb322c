"""Rows of a dataset, with line numbers: from FOLDER/SPLIT.jsonl, .csv or .parquet, or from parquet files on the hub."""
import csv
import json
from pathlib import Path

from checkpoints import hub


def read_rows(folder, split):
    """[(where, row)] of one split; ValueError with file and line for what cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    readers = {".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}
    files = [folder / (split + ending) for ending in readers if (folder / (split + ending)).is_file()]
    if not files:
        raise ValueError(f"{folder} has no {split}.jsonl, {split}.csv or {split}.parquet")
    rows = list(readers[files[0].suffix](files[0]))
    if not rows:
        raise ValueError(f"{files[0]} is empty")
    return rows


def hub_rows(repo, patterns, revision=None):
    """{split: [(where, row)]} from the parquet files, {split: pattern}, of a dataset on the Hugging Face hub."""
    try:
        folder = hub.fetch(repo, list(patterns.values()), "dataset", revision)
    except (OSError, ValueError) as e:
        raise ValueError(f"dataset {repo} is not to be had from the hub ({type(e).__name__}): give --data-dir a folder "
                         f"with {', '.join(f'{split}.jsonl' for split in patterns)}") from None
    files = {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}
    for split, parts in files.items():
        if not parts:
            raise ValueError(f"dataset {repo} of the hub has no {patterns[split]}, where its {split} split should be")
    return {split: [row for part in parts for row in parquet_rows(part)] for split, parts in files.items()}


def check_row(row, columns, where, empty=False):
    """The row, if every column is there and holds text; `empty`: or no text."""
    for column in columns:
        if column not in row:
            raise ValueError(f"{where}: no column {column!r}, only {', '.join(map(str, row))}")
        if not isinstance(row[column], str) or not (row[column].strip() or empty):
            raise ValueError(f"{where}: {column} must be text, not {row[column]!r}")
        try:
            row[column].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {column} holds half a surrogate pair, which is no text") from None
    return row


def jsonl_rows(file):
    """An object a line; blank lines are skipped, a byte order mark at the start too."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8") from None
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where}: not JSON ({e})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield where, row


def csv_rows(file):
    """The first line names the columns."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            for row in reader:
                if len(row) < len(reader.fieldnames):
                    raise ValueError(f"{file}, line 1: two columns have the same name")
                if None in row:
                    raise ValueError(f"{file}, line {reader.line_num}: more fields than columns")
                yield f"{file}, line {reader.line_num}", row
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8") from None
    except csv.Error as e:
        raise ValueError(f"{file}, line {reader.line_num}: not csv ({e})") from None


def parquet_rows(file):
    """Rows have no lines there: they are counted."""
    import pyarrow
    import pyarrow.parquet
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        raise ValueError(f"{file} is damaged or no parquet file: {str(e).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{file}, row {number}", row
