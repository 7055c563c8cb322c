"""pairs: prompts and completions of your own.

--data-dir FILE or FOLDER (see files.py). The columns are `prompt` and `completion`, or
`instruction`, `input` where there is one, and `output`, or `messages`, a list of one turn of the
user and the answer, a system's turn before them. Others are named by --columns: the last is the
completion, the ones before it are the prompt. The loss is on the completion. --metric judges
decoded texts, and then selects the checkpoint.
"""
from data import files
from evaluation import metrics

METRICS = {"exact": ("exact_match", metrics.same_text), "bleu": ("bleu", metrics.bleu),
           "rouge": ("rouge_l", metrics.rouge_l)}


class Pairs:
    """Stands in for a dataset's file, hence the capitals. columns: their names, or None; metric: a
    name of METRICS."""
    MAX_NEW, LONGEST = 128, True  # tokens of a decoded text, or those of the longest completion

    def __init__(self, columns=None, metric=None):
        self.columns, self.metric = columns, metric
        if metric not in (None, *METRICS):  # the parser knows them, a file may not
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        self.METRICS = (METRICS[metric][0],) if metric else ()
        self.SPLITS = {}
        if metric:
            self.score = self.judge

    def load(self, data_dir=None):
        """{split: [(prompt, completion)]}; ValueError, with file and line, for a row without."""
        rows = {split: [self.row(row, where) for where, row in table] for split, table in
                files.own_rows(data_dir).items()}
        rows, self.SPLITS = files.hold_out(rows, data_dir)
        self.completions = metrics.grouped(rows)
        return rows

    def row(self, row, where):
        if self.columns:
            *prompt, completion = self.columns
        elif "messages" in row:
            return turns(row["messages"], where)
        elif "instruction" in row and "output" in row:
            prompt, completion = ("instruction",
                                  *["input"] * (row.get("input") not in (None, ""))), "output"
        elif "prompt" in row and "completion" in row:
            prompt, completion = ("prompt",), "completion"
        else:
            raise ValueError(f"{where}: no columns prompt and completion, only "
                             f"{', '.join(map(str, row))}: name two with --columns")
        # what has no text, an empty `input` say, is as if it were not there
        parts = [files.text_of(row, column, where, empty=True) for column in prompt]
        if not any(part.strip() for part in parts):
            raise ValueError(f"{where}: {' and '.join(prompt)} must be text, not "
                             f"{row[prompt[0]]!r}")
        return ("\n".join(part for part in parts if part.strip()),
                files.text_of(row, completion, where))

    def judge(self, pairs, texts):
        """{metric: value}; a text is judged by all completions of its prompt."""
        name, measure = METRICS[self.metric]
        return {name: measure(*metrics.beside(pairs, texts, self.completions))}


def turns(messages, where):
    """[{"role": …, "content": …}, …] -> (prompt, completion)"""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: messages must be a list of turns, not {messages!r:.60}")
    if messages[:1] and messages[0].get("role") == "system" and messages[0].get("content") == "":
        messages = messages[1:]
    roles = [m.get("role") for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"{where}: messages must be a user's turn and the assistant's, not those "
                         f"of {', '.join(map(str, roles)) or 'nobody'}")
    *prompt, completion = (files.text_of(m, "content", where) for m in messages)
    return "\n".join(prompt), completion


if __name__ == "__main__":
    import sys

    for split, rows in Pairs().load(*sys.argv[1:2]).items():
        print(f"{split:10} {len(rows):6} pairs; {rows[0]}")
