"""Rows of a dataset, with line numbers: from files, or from the hub.

A split is FOLDER/SPLIT.jsonl, .json (a list), .csv, .tsv or .parquet, or several parts of it as the
hub names them: SPLIT-00000-of-00003.csv, …, or SPLIT/0000.parquet, …, in the folder or in its
data/. In all of them text is UTF-8, with or without a byte order mark, and every line in it ends in
a line feed.
"""
import csv
import json
import math
import random
import re
from pathlib import Path

from checkpoints import hub
from checkpoints.files import one_kind_of_line_end, read_text

# what people call the splits of their own data
ALSO = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def read_rows(folder, split):
    """[(where, row)] of one split; ValueError with file and line for what cannot be read."""
    folder = Path(folder)
    if folder.is_file() and split == "train" and folder.suffix in READERS:
        return read_files([folder])
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} "
                         f"{'is a file' if folder.exists() else 'does not exist'}")
    files = files_of(folder, split)
    if not files:
        raise ValueError(f"{folder} has no {names_of(split)}")
    return read_files(files)


def read_files(files):
    """[(where, row)] of files, one after another."""
    rows = [row for file in files for row in READERS[file.suffix](file)]
    if not rows:
        raise ValueError(f"{files[0]} is empty")
    return rows


def files_of(folder, split):
    """The file of a split, or its parts."""
    for ending in READERS:
        if (folder / (split + ending)).is_file():
            return [folder / (split + ending)]
    for ending in READERS:
        for pattern in (f"{split}-*-of-*{ending}", f"data/{split}-*-of-*{ending}",
                        f"{split}/*{ending}"):
            files = sorted(folder.glob(pattern))
            of = re.search(r"-of-(\d+)", files[0].name) if files else None
            if of and len(files) != int(of[1]):
                raise ValueError(f"{folder} has {len(files)} of the {int(of[1])} parts of {split}: "
                                 f"{files[0].name}, …")
            if files:
                return files
    return []


def names_of(split):
    """train.jsonl, .json, .csv, .tsv or .parquet"""
    *endings, last = READERS
    return f"{split}{', '.join(endings)} or {last}"


def own_rows(path):
    """{split: [(where, row)]} of somebody's own data: a file, which is train, or a folder with
    train, and validation and test where they are there."""
    if path is None:
        raise ValueError("data of your own need --data-dir with a file or a folder")
    path = Path(path)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path} is not one of {', '.join(READERS)}")
        return {"train": read_files([path])}
    if not path.is_dir():
        raise ValueError(f"data folder {path} does not exist")
    files_of_split = {split: next(filter(None, (files_of(path, name) for name in names)), [])
             for split, names in ALSO.items()}
    if not files_of_split["train"]:
        raise ValueError(f"{path} has no {names_of('train')}")
    return {split: read_files(files) for split, files in files_of_split.items() if files}


def hold_out(splits):
    """({split: rows}, {split: what it is}): where validation or test is missing, a tenth of train's
    different texts, always the same ones, with all of their rows."""
    missing = [split for split in ("validation", "test") if split not in splits]
    texts = list(dict.fromkeys(text for text, _ in splits["train"]))
    if len(texts) <= len(missing):
        raise ValueError(f"{len(texts)} different texts to train on cannot be split into train, "
                         f"{', '.join(missing)}")
    drawn = random.Random(0).sample(texts, len(missing) * max(1, len(texts) // 10))
    place = {text: missing[i % len(missing)] for i, text in enumerate(drawn)}
    rows = {"train": [], "validation": [], "test": [],
            **{s: r for s, r in splits.items() if s != "train"}}
    for row in splits["train"]:
        rows[place.get(row[0], "train")].append(row)
    said = {"train": f"train without {' and '.join(missing)}" if missing else "train"}
    return rows, {**said, **{split: "a tenth of train's texts" if split in missing else split
                             for split in ("validation", "test")}}


def text_of(row, column, where, empty=False):
    """The text of a field: text as it is, a number or a truth as JSON writes it. ValueError for
    anything else."""
    value = row.get(column)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, (bool, int)) or isinstance(value, float) and math.isfinite(value):
        row = {**row, column: json.dumps(value)}
    return check_row(dict(row), (column,), where, empty)[column]


def hub_rows(repo, patterns, revision=None, first=None):
    """{split: [(where, row)]} of a dataset on the Hugging Face hub; patterns: {split: its files
    there}. first: only so many rows of each. Where the hub cannot be reached, from the files that
    are in its cache on this machine."""
    try:
        if not hub.offline(repo, "dataset"):
            return {split: [(f"{repo}, {split}, row {number}", row)
                            for number, row in enumerate(rows, 1)]
                    for split, rows in hub.tables(repo, patterns, revision, first).items()}
        folder = hub.fetch(repo, list(patterns.values()), "dataset", revision, away=True)
    except (OSError, ValueError) as e:
        names = ", ".join(f"{split}.jsonl" for split in patterns)
        raise ValueError(f"dataset {repo} is not on the hub ({type(e).__name__}): give --data-dir "
                         f"a folder with {names}") from None
    files = {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}
    for split, parts in files.items():
        if not parts:
            raise ValueError(f"dataset {repo} of the hub has no {patterns[split]}, where its "
                             f"{split} split should be")
    return {split: [row for part in parts for row in READERS[part.suffix](part)][:first]
            for split, parts in files.items()}


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
            raise ValueError(f"{where}: {column} holds half a surrogate pair, which "
                             "is no text") from None
        row[column] = one_kind_of_line_end(row[column].removeprefix("\ufeff"))
    return row


def jsonl_rows(file):
    """An object a line; blank lines are skipped, byte order marks too, also that of a second file
    in one."""
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


def json_rows(file):
    """A list of objects, which are counted. Some write an object a line into a .json."""
    text = read_text(file)
    if not text.lstrip().startswith("["):
        yield from jsonl_rows(file)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not JSON ({e})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, item {number}: a JSON object is needed, not "
                             f"{type(row).__name__}")
        yield f"{file}, item {number}", row


def csv_rows(file):
    """The first line names the columns. It also says what stands between them: a comma, a tab, a
    semicolon or a |."""
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
                raise ValueError(f"{where}: {len(fields)} fields, the first line has "
                                 f"{len(columns)} columns")
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
        columns = pyarrow.parquet.read_schema(file).names
        if len(set(columns)) < len(columns):
            raise ValueError("two columns have the same name")
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        raise ValueError(f"{file} is damaged or no parquet file: "
                         f"{str(e).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{file}, row {number}", row


READERS = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows,
           ".parquet": parquet_rows}
