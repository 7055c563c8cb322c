"""glue: eight tasks of the GLUE benchmark (Wang et al. 2018, arXiv:1804.07461), as LoRA, ResLoRA
and Delta-LoRA use it.

From the Hugging Face hub (nyu-mll/glue), or with --data-dir from a folder with train and validation
(MNLI: validation_matched and validation_mismatched) as .jsonl, .csv or .parquet and the hub's
columns. GLUE's test labels are secret. So a tenth of the training split, at most 1,000 rows, is
held out to select on, and the validation split is reported. The papers train on all of train and
select on validation: their figures are a little kinder. For MRPC and QQP they report the accuracy;
here it stands beside F1.
"""
import random
from dataclasses import dataclass

from data import files

HUB = "nyu-mll/glue"


@dataclass
class Task:
    """One task. It stands in for a dataset's file, hence the capitals: the same names as in such a
    file."""
    COLUMNS: tuple  # the hub's names of the texts
    LABELS: tuple  # names of the classes 0, 1, …; a single name: a number is asked for
    METRICS: tuple  # the first selects
    key: str = ""  # the hub's name of the task
    TESTS = {"test": "validation"}  # our split -> the hub's

    @property
    def SPLITS(self):
        held = "a tenth of train, at most 1,000 rows"
        return {"train": f"train without {held}", "validation": held, **self.TESTS}

    def load(self, data_dir=None):
        """{split: [((text,) or (a, b), label)]}; ValueError, with file and line, for a bad column
        or label."""
        names = "train", *self.TESTS.values()
        tables = (files.hub_rows(HUB, {name: f"{self.key}/{name}-*.parquet" for name in names})
                  if data_dir is None
                  else {name: files.read_rows(data_dir, name) for name in names})
        rows = {split: [self.row(row, where) for where, row in tables[split]] for split in tables}
        train = rows["train"]
        if len(train) < 2:
            raise ValueError(f"{tables['train'][0][0]}: a single row cannot be split into train "
                             "and validation")
        held = set(random.Random(0).sample(range(len(train)), min(max(1, len(train) // 10), 1000)))
        return {"train": [row for i, row in enumerate(train) if i not in held],
                "validation": [train[i] for i in sorted(held)],
                **{ours: rows[theirs] for ours, theirs in self.TESTS.items()}}

    def row(self, row, where):
        """(texts, label) of a row; csv has its numbers as text."""
        files.check_row(row, self.COLUMNS, where, empty=True)  # QQP asks an empty question or two
        if "label" not in row:
            raise ValueError(f"{where}: no column 'label', only {', '.join(map(str, row))}")
        try:
            label = float("true" if isinstance(row["label"], bool) else row["label"])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: label must be a number, not {row['label']!r}") from None
        if len(self.LABELS) == 1:
            if not 0 <= label <= 5:
                raise ValueError(f"{where}: label must be in 0..5, not {row['label']!r}")
        elif label not in range(len(self.LABELS)):
            names = ", ".join(f"{i} {name}" for i, name in enumerate(self.LABELS))
            raise ValueError(f"{where}: label must be one of {names}; not {row['label']!r}")
        return tuple(row[c] for c in self.COLUMNS), label if len(self.LABELS) == 1 else int(label)


class MNLI(Task):
    TESTS = {"test": "validation_matched", "mismatched": "validation_mismatched"}


PAIR, ENTAILS = ("sentence1", "sentence2"), ("entailment", "not entailment")
TASKS = {
    # is it grammatical
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    # what a critic thinks of a film
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    # do two sentences say the same
    "mrpc": Task(PAIR, ("not equivalent", "equivalent"), ("f1", "accuracy")),
    # how similar are two sentences, 0 to 5
    "stsb": Task(PAIR, ("similarity",), ("pearson", "spearman")),
    # is it one question
    "qqp": Task(("question1", "question2"), ("not duplicate", "duplicate"), ("f1", "accuracy")),
    # does the second sentence follow
    "mnli": MNLI(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                 ("accuracy",)),
    "rte": Task(PAIR, ENTAILS, ("accuracy",)),
    # does the sentence answer the question
    "qnli": Task(("question", "sentence"), ENTAILS, ("accuracy",)),
}
for key, task in TASKS.items():
    task.key = key


if __name__ == "__main__":
    import sys

    name, *folder = sys.argv[1:] or ["sst2"]
    for split, rows in TASKS[name].load(*folder).items():
        print(f"{split:12} {len(rows):7} rows; {rows[0]}")
