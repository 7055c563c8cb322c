"""text: any plain UTF-8 text, for language modelling. Special tokens such as <|endoftext|> are
ordinary text in it.

--data-dir FILE: its first 80 % are for training, the next 10 % for validation, the last 10 % for
testing. --data-dir FOLDER: train.txt, validation.txt and test.txt.
"""
from pathlib import Path

from checkpoints.files import read_text

PLAIN = True


def read(path):
    """The text of a file; ValueError, with the line, for what is not UTF-8."""
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
    if path.is_dir():
        files = {split: path / f"{split}.txt" for split in ("train", "validation", "test")}
        for file in files.values():
            if not file.is_file():
                raise ValueError(f"{file} does not exist")
        return {split: [("", read(file))] for split, file in files.items()}
    text = read(path)
    a, b = len(text) * 8 // 10, len(text) * 9 // 10
    if a == 0 or a == b:
        raise ValueError(f"{path}: {len(text)} characters are too few to split into train, "
                         "validation and test")
    return {"train": [("", text[:a])], "validation": [("", text[a:b])], "test": [("", text[b:])]}
