"""text: any plain UTF-8 text, for language modelling. Special tokens such as <|endoftext|> are
ordinary text in it.

--data-dir FILE: its first 80 % are for training, the next 10 % for validation, the last 10 % for
testing. --data-dir FOLDER: train.txt, validation.txt and test.txt. A table (.jsonl, .csv, …) has a
column `text`, whose rows follow each other.
"""
from pathlib import Path

from checkpoints.files import read_text
from data import files

PLAIN = True


def read(path):
    """The text of a file; ValueError, with the line, for what is not UTF-8."""
    if files.reader(path):
        rows = files.reader(path)(path)
        text = "\n".join(files.check_row(row, ("text",), where)["text"] for where, row in rows)
    else:
        text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def load(data_dir=None):
    """{split: [("", text)]}"""
    path = Path(data_dir) if data_dir else None
    if path is None or not path.exists():
        raise ValueError("dataset text needs --data-dir with a text file or a folder of them, not "
                         f"{data_dir}")
    if path.is_dir() and not (path / "train.txt").exists():
        splits = [split for split in ("train", "validation", "test")
                  if files.files_of(path, split)]
        if splits == ["train"] and len(files.files_of(path, "train")) == 1:
            path, = files.files_of(path, "train")  # as a file
    if path.is_dir():
        texts = {split: path / f"{split}.txt" for split in ("train", "validation", "test")}
        for split, file in texts.items():
            tables = [] if file.is_file() else files.files_of(path, split)
            if not file.is_file() and not tables:
                raise ValueError(f"{file} does not exist")
            texts[split] = "\n".join(map(read, tables or [file]))
        return {split: [("", text)] for split, text in texts.items()}
    text = read(path)
    a, b = len(text) * 8 // 10, len(text) * 9 // 10
    if a == 0 or a == b:
        raise ValueError(f"{path}: {len(text)} characters are too few to split into train, "
                         "validation and test")
    return {"train": [("", text[:a])], "validation": [("", text[a:b])], "test": [("", text[b:])]}
