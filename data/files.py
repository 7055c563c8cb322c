"""Rows of a dataset, with line numbers: from files, or from the hub.

A split is FOLDER/SPLIT.jsonl, .json (a list), .csv, .tsv or .parquet, or several parts of it as the
hub names them: SPLIT-00000-of-00003.csv, …, or SPLIT/0000.parquet, …, in the folder or in its
data/. Endings may be in capitals, and .gz may stand behind them. Text is UTF-8, with or without a
byte order mark, and every line in it ends in a line feed.
"""
import csv
import json
import math
import random
import re
from pathlib import Path

from checkpoints import hub
from checkpoints.files import one_kind_of_line_end, read_bytes, read_text

# what people call the splits of their own data
ALSO = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"),
        "test": ("test",)}
NO_ROWS = "dataset_info.json", "dataset_dict.json", "state.json"  # stand beside somebody's rows


def read_rows(folder, split):
    """[(where, row)] of one split; ValueError with file and line for what cannot be read."""
    folder = Path(folder)
    if folder.is_file() and split == "train" and reader(folder):
        return read_files([folder])
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} "
                         f"{'is a file' if folder.exists() else 'does not exist'}")
    files = files_of(folder, split)
    if not files:
        raise ValueError(f"{folder} has no {names_of(split)}")
    return read_files(files)


def reader(file):
    """What reads a file, by its ending; None for a name that is no table's."""
    ending = "".join(file.suffixes[-2:] if file.suffix.lower() == ".gz" else file.suffixes[-1:])
    return None if file.name in NO_ROWS else READERS.get(ending.lower().removesuffix(".gz"))


def read_files(files):
    """[(where, row)] of files, one after another."""
    rows = [row for file in files for row in reader(file)(file)]
    if not rows:
        raise ValueError(f"{files[0]} is empty")
    return rows


def files_of(folder, split):
    """The file of a split, or its parts. ValueError where several could be meant."""
    tables = [file for file in sorted(folder.iterdir()) if file.is_file() and reader(file)]
    single = [file for file in tables if file.name.partition(".")[0] == split]
    if len(single) > 1:
        raise ValueError(f"{folder} has {single[0].name} and {single[1].name}: which one is "
                         f"{split}? Keep one of them there")
    if single:
        return single
    for place in (folder, folder / "data"):
        parts = {}
        for file in sorted(place.glob("*")) if place.is_dir() else ():
            if reader(file) and (name := re.match(rf"{split}-\d+-of-(\d+)\.", file.name)):
                parts.setdefault(int(name[1]), []).append(file)
        for total, files in parts.items():
            if len(files) != total or len(parts) > 1:
                raise ValueError(f"{folder} has {len(files)} of the {total} parts of {split}: "
                                 f"{files[0].name}, …")
        if parts:
            return files
    inside = sorted((folder / split).glob("*")) if (folder / split).is_dir() else []
    if any(file.suffix == ".arrow" for file in inside):
        raise ValueError(f"{folder / split} was written by save_to_disk of datasets: "
                         f"datasets.load_from_disk(…).to_json writes a {split}.jsonl")
    return [file for file in inside if file.is_file() and reader(file)]


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
        if not reader(path):
            raise ValueError(f"{path} is not one of {', '.join(READERS)}")
        return {"train": read_files([path])}
    if not path.is_dir():
        raise ValueError(f"data folder {path} " + ("is neither a file nor a folder"
                                                   if path.exists() else "does not exist"))
    tables = {}
    for split, names in ALSO.items():
        files = {name: files for name in names if (files := files_of(path, name))}
        if len(files) > 1:
            one, other, *_ = (chosen[0].name for chosen in files.values())
            raise ValueError(f"{path} has {one} and {other}: which one is {split}? Keep one of "
                             "them there")
        for chosen in files.values():
            tables[split] = read_files(chosen)
    if "train" not in tables:
        raise ValueError(f"{path} has no {names_of('train')}")
    return tables


def hold_out(splits, where, by_label=False):
    """({split: rows}, {split: what it is}): where validation or test is missing, a tenth of train's
    different texts, always the same ones, with all of their rows. by_label: of each label a tenth,
    so that a rare one occurs. where: the data's file or folder."""
    missing = [split for split in ("validation", "test") if split not in splits]
    texts = {}  # {text: its label}
    for text, label in splits["train"]:
        texts.setdefault(text, label if by_label else None)
    if len(texts) <= len(missing):
        raise ValueError(f"{where}: {len(texts)} different texts to train on cannot be split into "
                         f"train, {', '.join(missing)}")
    place, rng = {}, random.Random(0)
    for label in dict.fromkeys(texts.values()):
        same = [text for text, other in texts.items() if other == label]
        number = len(missing) * max(1, len(same) // 10)
        if number < len(same):  # at least one stays to train on
            drawn = rng.sample(same, number)
            place.update({text: missing[i % len(missing)] for i, text in enumerate(drawn)})
    rows = {"train": [], "validation": [], "test": [],
            **{s: r for s, r in splits.items() if s != "train"}}
    for row in splits["train"]:
        rows[place.get(row[0], "train")].append(row)
    about = {"train": f"train without {' and '.join(missing)}" if missing else "train"}
    return rows, {**about, **{split: "a tenth of train's texts" if split in missing else split
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
        raise ValueError(f"dataset {repo}: {hub.reason(e)}; or give --data-dir a folder with "
                         f"{names}") from None
    files = {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}
    for split, parts in files.items():
        if not parts:
            raise ValueError(f"dataset {repo} of the hub has no {patterns[split]}, where its "
                             f"{split} split should be")
    return {split: [row for part in parts for row in reader(part)(part)][:first]
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
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
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
    """A list of objects, which are counted, or an object with one such list in it, as
    {"data": […]}. Some write an object a line into a .json."""
    try:
        rows = json.loads(read_text(file))
    except (ValueError, RecursionError) as e:
        if read_text(file).lstrip().startswith("["):
            raise ValueError(f"{file}: not JSON ({e})") from None
        rows = {}
    if isinstance(rows, dict):
        lists = [value for value in rows.values()
                 if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) != 1 or "messages" in rows or "conversations" in rows:
            yield from jsonl_rows(file)
            return
        rows, = lists
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, item {number}: a JSON object is needed, not "
                             f"{type(row).__name__}")
        yield f"{file}, item {number}", row


def csv_rows(file):
    """The first line names the columns. It also says what stands between them: a comma, a tab, a
    semicolon or a |. Quotes enclose a field; between tabs, where they would swallow other rows,
    they are letters."""
    csv.field_size_limit(2**31 - 1)  # else a field may have 131,072 characters
    lines = read_text(file).split("\n")
    between = max(",\t;|", key=re.sub(r'"[^"]*"', "", lines[0]).count)
    quoting = csv.QUOTE_MINIMAL
    if between == "\t":
        try:
            whole = csv.reader((line + "\n" for line in lines), strict=True, delimiter=between)
            swallowed = any("\n" in field and "\t" in field for row in whole for field in row)
        except csv.Error:
            swallowed = True
        quoting = csv.QUOTE_NONE if swallowed else quoting
    reader = csv.reader((line + "\n" for line in lines), strict=True, delimiter=between,
                        quoting=quoting)
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
