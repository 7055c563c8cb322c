"""labels: texts of your own, each with a class or a number.

--data-dir FILE or FOLDER (see files.py). The columns are `text`, `text2` where a row has a second
text, and `label`; others are named by --columns, the label last. The classes are those of the
training file, in the order of numbers or of the alphabet. With --regression a label is a number.
"""
from data import files


class Labels:
    """Stands in for a dataset's file, hence the capitals. LABELS are known once `load` has read the
    training file."""

    def __init__(self, columns=None, regression=False):
        self.columns, self.regression = columns, regression
        self.METRICS = ("pearson", "spearman") if regression else ("accuracy",)
        self.LABELS = ("number",) if regression else ("first", "second")
        self.SPLITS = {}

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
                                            for split, table in rows.items()})
        return rows

    def row(self, row, where):
        """(texts, label as text or as a number)"""
        *texts, label = self.columns or ("text", *["text2"] * ("text2" in row), "label")
        texts, label = tuple(files.text_of(row, name, where)
                             for name in texts), files.text_of(row, label, where)
        if not self.regression:
            return texts, label.strip()
        try:
            number = float(label)
        except ValueError:
            number = float("nan")
        if not abs(number) < float("inf"):
            raise ValueError(f"{where}: label {label!r} is not a number")
        return texts, number


def classes(labels, where):
    """The different labels, by number or by name."""
    found = list(dict.fromkeys(labels))
    if len(found) == 1:
        raise ValueError(f"{where} and all that follow have the label {found[0]!r}: nothing to "
                         "tell apart")
    if len(found) == len(labels) > 2:
        raise ValueError(f"{where} and all that follow have labels of their own: for numbers say "
                         "--regression")
    by_number = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int) if by_number else sorted(found))


if __name__ == "__main__":
    import sys

    for split, rows in Labels().load(*sys.argv[1:2]).items():
        print(f"{split:10} {len(rows):6} texts; {rows[0]}")
