"""labels: texts of your own, each with a class or a number.

--data-dir FILE or FOLDER (see files.py). The columns are `text`, `text2` where a row has a second
text, and `label`; others are named by --columns, the label last. The classes are those of the
training file, in the order of numbers or of the alphabet. With --regression a label is a number.
Beside the accuracy stands the macro F1, which rare classes count in as much as frequent ones.
--metric f1 or matthews selects the checkpoint by it.
"""
import re

from data import files

METRICS = {"f1": "macro_f1", "matthews": "matthews"}  # by which --metric calls them


class Labels:
    """Stands in for a dataset's file, hence the capitals. LABELS are known once `load` has read the
    training file."""

    def __init__(self, columns=None, regression=False, metric=None):
        self.columns, self.regression = columns, regression
        if metric not in (None, *METRICS) or metric and regression:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)} of classes")
        first = METRICS.get(metric, "accuracy")
        self.METRICS = ("pearson", "spearman") if regression else tuple(
            dict.fromkeys((first, "accuracy", "macro_f1")))
        self.LABELS = ("number",) if regression else ("first", "second")
        self.SPLITS, self.width = {}, 0  # width: how many texts a row has

    def load(self, data_dir=None):
        """{split: [((text,) or (text, text2), label)]}; ValueError, with file and line, for a row
        without text or label, or with a label that train does not have."""
        tables = files.own_rows(data_dir)
        rows = {split: [(where, *self.row(row, where)) for where, row in table]
                for split, table in tables.items()}
        if not self.regression:
            self.LABELS = classes([label for _, _, label in rows["train"]], rows["train"][0][0])
            number = {name: i for i, name in enumerate(self.LABELS)}
            for where, _, label in (row for table in rows.values() for row in table):
                if label not in number:
                    raise ValueError(f"{where}: label {label!r} is not one of train's: "
                                     f"{', '.join(self.LABELS)}")
            rows = {split: [(where, texts, number[label]) for where, texts, label in table]
                    for split, table in rows.items()}
        rows, self.SPLITS = files.hold_out({split: [row[1:] for row in table]
                                            for split, table in rows.items()}, data_dir,
                                           by_label=not self.regression)
        for split, table in rows.items() if not self.regression else ():
            known = {label for _, label in table}
            lacking = [name for i, name in enumerate(self.LABELS) if i not in known]
            if lacking:
                self.SPLITS[split] += f", without {', '.join(lacking[:5])}"
                print(f"labels   {split} has no text of {', '.join(lacking[:5])}")
        return rows

    def row(self, row, where):
        """(texts, label as text or as a number)"""
        *names, label = self.columns or ("text", *["text2"] * ("text2" in row), "label")
        if not self.columns and not {*names, label} <= row.keys():
            raise ValueError(f"{where}: no columns text and label, only "
                             f"{', '.join(map(str, row))}: name two with --columns")
        texts = tuple(files.text_of(row, name, where) for name in names)
        if len(texts) != self.width and self.width:
            raise ValueError(f"{where}: {len(texts)} texts, the rows before have {self.width}")
        self.width = len(texts)
        label = files.text_of(row, label, where).strip()
        if not self.regression:
            return texts, one_spelling(label)
        try:
            number = float(label)
        except ValueError:
            number = float("nan")
        if not abs(number) < 1e6:  # the squared error of larger ones is nothing but theirs
            raise ValueError(f"{where}: label {label[:60]!r} is not a number below a million: "
                             "scale them")
        return texts, number


def one_spelling(label):
    """1.0 and 1 are one class, so are True and true."""
    if label.lower() in ("true", "false"):
        return label.lower()
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label)


def classes(labels, where):
    """The different labels, by number or by name."""
    names = list(dict.fromkeys(labels))
    if len(names) == 1:
        raise ValueError(f"{where} and all that follow have the label {names[0]!r}: nothing to "
                         "tell apart")
    if len(names) == len(labels) > 2:
        raise ValueError(f"{where} and all that follow have labels of their own: for numbers say "
                         "--regression")
    if max(map(len, names)) > 200:
        raise ValueError(f"{where} or a row that follows has a label of {max(map(len, names))} "
                         "characters: which column is it? See --columns")
    by_number = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return tuple(sorted(names, key=int) if by_number else sorted(names))


if __name__ == "__main__":
    import sys

    for split, rows in Labels().load(*sys.argv[1:2]).items():
        print(f"{split:10} {len(rows):6} texts; {rows[0]}")
