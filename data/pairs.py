"""pairs: prompts and completions of your own.

--data-dir FILE or FOLDER (see files.py). The columns are `prompt` and `completion`, or
`instruction`, `input` where there is one, and `output`. Others are named by --columns: the last is
the completion, the ones before it are the prompt. The loss is on the completion. --metric judges
decoded texts, and then selects the checkpoint. Rows that are conversations are read as `chat` reads
them, see chat.py.
"""
from data import chat, files
from evaluation import metrics

METRICS = {"exact": ("exact_match", metrics.same_text), "bleu": ("bleu", metrics.bleu),
           "rouge": ("rouge_l", metrics.rouge_l)}


class Pairs:
    """Stands in for a dataset's file, hence the capitals. columns: their names, or None; metric: a
    name of METRICS. CHAT: whether the rows are conversations; of `pairs` the first row says it.
    WHERE: {conversation: its file and line}. last_turn, chatml: see `Converse` of tasks.py."""
    MAX_NEW, LONGEST = 128, True  # tokens of a decoded text, or those of the longest completion

    def __init__(self, columns=None, metric=None, chat=None, last_turn=False, chatml=False):
        self.columns, self.metric = columns, metric
        self.CHAT, self.last_turn, self.chatml, self.WHERE = chat, last_turn, chatml, {}
        if metric not in (None, *METRICS):  # the parser knows them, a file may not
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        self.METRICS = (METRICS[metric][0],) if metric else ()
        self.SPLITS = {}
        if metric:
            self.score = self.judge

    def load(self, data_dir=None):
        """{split: [(prompt, completion)]}; ValueError, with file and line, for a row without. Of a
        conversation the prompt is all turns before the last answer."""
        rows = {split: [self.row(row, where) for where, row in table] for split, table in
                files.own_rows(data_dir).items()}
        rows, self.SPLITS = files.hold_out(rows, data_dir)
        if not self.CHAT and (self.last_turn or self.chatml):
            raise ValueError(f"--{'last-turn' if self.last_turn else 'chatml'} is for "
                             f"conversations: --dataset chat reads {data_dir} as such")
        self.completions = metrics.grouped(rows)
        return rows

    def row(self, row, where):
        """(prompt, completion), of a conversation (turns, answer)."""
        turns = None if self.columns else chat.turns(row, where)
        if self.CHAT is None:
            self.CHAT = turns is not None
        if turns is None:
            prompt, completion = self.pair(row, where)
            if not self.CHAT:
                return prompt, completion
            turns = ("user", prompt), ("assistant", completion)
        elif not self.CHAT:
            raise ValueError(f"{where}: a conversation, and the rows before are pairs: --dataset "
                             "chat reads both")
        found = chat.record(turns)
        self.WHERE.setdefault(found, where)
        return found

    def pair(self, row, where):
        if self.columns:
            *prompt, completion = self.columns
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
        # of a conversation that was cut, or taken apart, the answer that it has now
        of = {**metrics.grouped({"": pairs}), **self.completions}
        return {name: measure(*metrics.beside(pairs, texts, of))}


if __name__ == "__main__":
    import sys

    for split, rows in Pairs().load(*sys.argv[1:2]).items():
        print(f"{split:10} {len(rows):6} pairs; {rows[0]}")
