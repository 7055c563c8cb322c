"""Reading and writing single files. A file appears by rename, so it is whole or not there."""
import csv
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file


def write(path, write_to):
    """Let `write_to(temporary path)` write a file, then rename it to `path`. The temporary file is
    a new one, NAME.xxxxxxxx.part. OSError if it cannot be written."""
    try:
        handle, part = tempfile.mkstemp(".part", path.name + ".", path.parent)
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e.strerror or e}") from None
    os.close(handle)
    part = Path(part)
    try:
        write_to(part)
        part.chmod(0o644)  # safetensors would leave it 0600
        os.replace(part, path)
    except (OSError, SafetensorError) as e:  # a full disk is either of them
        raise OSError(f"{path} cannot be written: {e}") from None
    finally:
        if part.is_file():
            part.unlink()


def check_new(path, ours):
    """ValueError if what stands at a path would be lost: a link, or a file that `ours(path)` does
    not know as one that this program wrote."""
    if path.is_symlink() or path.exists() and not (path.is_file() and ours(path)):
        raise ValueError(f"{path} was not written by this program, and is kept: choose another "
                         "name, or remove it")


def write_text(path, text):
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path, rows):
    """[{column: value}] -> a file; a column that only some rows have stays empty in the others."""
    columns = dict.fromkeys(column for row in rows for column in row)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write_to(part):
        with open(part, "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    write(path, write_to)


def read_csv(path):
    """[{column: text}]"""
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def read_bytes(path):
    """The bytes of a file, unpacked if its name ends in .gz. ValueError for what does not exist and
    for pipes and devices, whose end may never come."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is damaged: {e}") from None


def read_text(path):
    """The text of a file, whatever the locale: UTF-8, without a byte order mark, every line ending
    in a line feed. ValueError, with the line, for what is not UTF-8, and for what does not exist.
    """
    data = read_bytes(path)
    try:
        return one_kind_of_line_end(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        utf16 = " (it begins as UTF-16 does)" * data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(f"{path}, line {data[:e.start].count(10) + 1}: not UTF-8{utf16}") from None


def one_kind_of_line_end(text):
    """Windows' and old Macs' line ends become line feeds, as when Python opens a file."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path):
    """The JSON object in a file; ValueError if it holds none."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_safetensors(path):
    """{name: tensor} of one file; ValueError when it is missing, cut short or no safetensors at
    all."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file: {e}") from None
    for name, t in tensors.items():
        if t.is_complex():
            raise ValueError(f"{path}: {name} is of complex numbers")
    return tensors


def check_keys(tensors, wanted, where, named=str):
    """Refuse a state dict with missing, unexpected or mis-shaped entries, naming the first of them.
    named: our name -> the one in the file."""
    for what, keys in (("lacks", wanted.keys() - tensors.keys()),
                       ("holds unexpected", tensors.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{where} {what} {named(min(keys))}{more}")
    for key, t in wanted.items():
        if tensors[key].shape != t.shape:
            raise ValueError(f"{where}: {named(key)} has shape {tuple(tensors[key].shape)}, not "
                             f"{tuple(t.shape)}")


def fingerprint(content):
    """16 hex digits that change with a file's bytes, or with the repr of anything else."""
    if isinstance(content, Path):
        with open(content, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def check_writable(folder):
    """Make a folder and see that it can be written to, before hours are spent; ValueError if it
    cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"--out {folder} cannot be written to: {e.strerror or e}") from None
