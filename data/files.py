"""Rows of a dataset, with line numbers: from FOLDER/SPLIT.jsonl, .csv, .tsv or .parquet, or from the hub.

In all of them text is UTF-8, with or without a byte order mark, and every line in it ends in a line feed.
"""
import csv
import json
import re
from pathlib import Path

from checkpoints import hub
from checkpoints.files import one_kind_of_line_end, read_text


def read_rows(folder, split):
    """[(where, row)] of one split; ValueError with file and line for what cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    readers = {".jsonl": jsonl_rows, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}
    files = [folder / (split + ending) for ending in readers if (folder / (split + ending)).is_file()][:1]
    files = files or parquet_parts(folder, split)
    if not files:
        raise ValueError(f"{folder} has no {split}.jsonl, {split}.csv, {split}.tsv or {split}.parquet")
    rows = [row for file in files for row in readers[file.suffix](file)]
    if not rows:
        raise ValueError(f"{files[0]} is empty")
    return rows


def parquet_parts(folder, split):
    """The parquet files of a split as the hub names them, in the folder or in its data/: SPLIT-00000-of-00003.parquet,
    …, or SPLIT/0000.parquet, …"""
    for pattern in (f"{split}-*-of-*.parquet", f"data/{split}-*-of-*.parquet", f"{split}/*.parquet"):
        files = sorted(folder.glob(pattern))
        of = re.search(r"-of-(\d+)", files[0].name) if files else None
        if of and len(files) != int(of[1]):
            raise ValueError(f"{folder} has {len(files)} of the {int(of[1])} parts of {split}: {files[0].name}, …")
        if files:
            return files
    return []


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
        row[column] = one_kind_of_line_end(row[column].removeprefix("\ufeff"))
    return row


def jsonl_rows(file):
    """An object a line; blank lines are skipped, byte order marks too, also that of a second file in one."""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        line = line.removeprefix(b"\xef\xbb\xbf")
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
    """The first line names the columns. It also says what stands between them: a comma, a tab, a semicolon or a |."""
    csv.field_size_limit(2**31 - 1)  # else a field may have 131,072 characters
    lines = read_text(file).split("\n")
    between = max(",\t;|", key=re.sub(r'"[^"]*"', "", lines[0]).count)
    reader = csv.reader((line + "\n" for line in lines), strict=True, delimiter=between)
    start = 1  # the line where a row begins: it may go over several
    try:
        columns = next(reader)
        if len(set(columns)) < len(columns):
            raise ValueError(f"{file}, line 1: two columns have the same name")
        start = reader.line_num + 1
        for fields in reader:
            where = f"{file}, line {start}"
            if fields and len(fields) != len(columns):
                raise ValueError(f"{where}: {len(fields)} fields, the first line has {len(columns)} columns")
            if fields:
                yield where, dict(zip(columns, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{file}, line {start}: not csv ({e})") from None


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
