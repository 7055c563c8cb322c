"""The papers' sets that are nothing but prompt, completion and a metric, a row of a table each.

    e2e          restaurant records and what crowd workers wrote about them (Novikova et al. 2017,
                 arXiv:1706.09254; CC BY-SA 4.0); the record is used as the dataset writes it
    gsm8k        grade school mathematics, a question and a worked solution that ends with
                 "#### 42" (Cobbe et al. 2021, arXiv:2110.14168)
    svamp        word problems, a number (Patel et al. 2021, arXiv:2103.07191)
    mathqa       word problems, one of five letters (Amini et al. 2019, arXiv:1905.13319)
    metamathqa   worked solutions, tested on GSM8K (Yu et al. 2023, arXiv:2309.12284)
    webnlg       triples and sentences that say them (Gardent et al. 2017, WebNLG challenge)
    xsum         an article and its summary in one sentence (Narayan et al. 2018, arXiv:1808.08745)
    hellaswag    how a text goes on, one of four endings (Zellers et al. 2019, arXiv:1905.07830):
                 trained to write the right one, judged by the likeliest. hellaswag-generated
                 writes its number, as ResLoRA's paper does
    openorca     answers of GPT-4 (Mukherjee et al. 2023, arXiv:2306.02707): the first 20,000,
                 streamed, judged by perplexity, as rsLoRA's paper does

From the Hugging Face hub, or with --data-dir from a folder with the splits and the hub's columns.
Where a set has no validation or test split, a tenth of train, at most 500 rows, is held out for
each.
"""
import random
import re
from dataclasses import dataclass, field

from data import files
from evaluation import metrics

PARQUET = "refs/convert/parquet"  # where the hub keeps the conversion of a set that is a script


@dataclass
class Set:
    """Stands in for a dataset's file, hence the capitals."""
    HUB: str
    FILES: dict  # {split: its files there}
    rows: object  # (row, where) -> [(prompt, target)]
    judge: object = None  # (texts, their references) -> {metric: value}
    METRICS: tuple = ()
    MAX_NEW: int = 96
    REVISION: str = None
    FIRST: int = None  # so many rows of each split
    SPLITS: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.judge is None:
            self.score = None  # nothing is decoded

    def tables(self, data_dir):
        """{split: [(where, row)]}"""
        if data_dir is None:
            return files.hub_rows(self.HUB, self.FILES, self.REVISION, self.FIRST)
        return {split: files.read_rows(data_dir, split)[:self.FIRST] for split in self.FILES}

    def load(self, data_dir=None):
        """{split: [(prompt, target)]}; ValueError, with file and line, for a row that is not as the
        hub's."""
        splits = {split: [pair for where, row in table for pair in self.rows(row, where)]
                 for split, table in self.tables(data_dir).items()}
        self.SPLITS = {split: split for split in NAMES}
        for split in [split for split in ("validation", "test") if split not in splits]:
            train = splits["train"]
            held = set(random.Random(0).sample(range(len(train)),
                                               min(500, max(1, len(train) // 10))))
            splits[split] = [train[i] for i in sorted(held)]
            splits["train"] = [row for i, row in enumerate(train) if i not in held]
            self.SPLITS[split] = f"{len(held)} rows of train"
            self.SPLITS["train"] = f"{len(splits['train'])} rows of train"
        self.targets = metrics.grouped(splits)
        return {split: splits[split] for split in NAMES}

    def score(self, pairs, texts):
        """{metric: value}; a text is judged by all targets of its prompt."""
        return self.judge(*metrics.beside(pairs, texts, self.targets))


def texts_of(*columns):
    """rows of a set whose columns hold prompt and target as they are."""
    return lambda row, where: [tuple(files.check_row(row, columns, where)[c] for c in columns)]


def gsm8k(row, where):
    files.check_row(row, ("question", "answer"), where)
    if not re.fullmatch(r"(?s).*####\s*\$?-?[\d,]{,30}\.?\d+\s*", row["answer"]):
        raise ValueError(f"{where}: answer must end with #### and a number, not "
                         f"{row['answer'][-30:]!r}")
    return [(row["question"], row["answer"])]


def svamp(row, where):
    files.check_row(row, ("Body", "Question"), where)
    number = last_number(files.text_of(row, "Answer", where))
    if number is None:
        raise ValueError(f"{where}: Answer must be a number, not {row['Answer']!r}")
    end = "" if row["Body"].rstrip()[-1] in ".,!?" else "."
    return [(f"{row['Body'].rstrip()}{end} {row['Question']}", f"{number:g}")]


def mathqa(row, where):
    files.check_row(row, ("Problem", "options", "correct"), where)
    if row["correct"].strip() not in tuple("abcde"):
        raise ValueError(f"{where}: correct must be a letter of a to e, not {row['correct']!r}")
    return [(f"{row['Problem']} {row['options']}", row["correct"].strip())]


def metamathqa(row, where):
    """With the prompt of PEFT's method comparison. The rows of train are MetaMathQA's, those of
    test GSM8K's."""
    (query, response), = (gsm8k(row, where) if "answer" in row
                          else texts_of("query", "response")(row, where))
    return [(f"Question: {query} Think step by step.\nAnswer:", response)]


def webnlg(row, where):
    """One pair for each reference; in train a row has one, its target."""
    triples, references = row.get("input"), row.get("references") or [row.get("target")]
    for name, texts in (("input", triples), ("references", references)):
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"{where}: {name} must be a list of texts, not {texts!r}")
        for text in texts:
            files.check_row({name: text}, (name,), where)
    return [(" && ".join(triples), text) for text in references]


def openorca(row, where):
    files.check_row(row, ("question", "response"), where)
    files.check_row(row, ("system_prompt",), where, empty=True)
    return [(f"{row['system_prompt']}\n{row['question']}".strip(), row["response"])]


def hellaswag(row, where):
    """The text and its ending, cleaned as by lm-evaluation-harness."""
    query, endings, label = swag(row, where)
    return [(query, endings[label])]


def swag(row, where):
    """(text, its four endings, the number of the right one)"""
    files.check_row(row, ("activity_label", "ctx_a"), where)
    files.check_row(row, ("ctx_b",), where, empty=True)
    endings, label = row.get("endings"), files.text_of(row, "label", where)
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError(f"{where}: endings must be a list of four texts, not {endings!r:.60}")
    if label not in tuple("0123"):
        raise ValueError(f"{where}: label must be a number of 0 to 3, not {label!r}")
    for text in endings:
        files.check_row({"endings": text}, ("endings",), where)
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return cleaned(query), [cleaned(text) for text in endings], int(label)


def cleaned(text):
    """Without the marks of WikiHow's pages."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag_generated(row, where):
    query, endings, label = swag(row, where)
    listed = " ".join(f"{i}) {text}" for i, text in enumerate(endings, 1))
    return [(f"{query} {listed}", f"The answer is {label + 1}.")]


def last_number(text):
    """The last number of a text, or None: "1,200 apples" is 1200.0."""
    numbers = re.findall(r"-?(?:\d[\d,]*)?\.?\d+", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def final_number(text):
    """The number after the last ####, or None; "$1,200" and "1200.0" are equal."""
    numbers = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def solution(text):
    """The number of a solution: that after the last "The answer is", or "####"."""
    numbers = re.findall(r"The answer is:?\s*\$?(-?[\d,]*\.?\d+)", text)
    return float(numbers[-1].replace(",", "")) if numbers else final_number(text)


def letter(text):
    match = re.search(r"\b[a-e]\b", text)
    return match and match[0]


def exact(read):
    """A judge: the share of texts out of which `read` takes the same as out of a target."""
    def judge(texts, references):
        right = [read(text) in map(read, group)
                 for text, group in zip(texts, references, strict=True)]
        return {"exact_match": sum(right) / len(right)}
    return judge


def translated(texts, references):
    """BLEU and TER of WebNLG's challenge."""
    return {"bleu": metrics.bleu(texts, references), "ter": metrics.ter(texts, references)}


class MetaMathQA(Set):
    """Trained on its own rows, tested on GSM8K's."""
    BETWEEN = ""  # the prompt says where the answer begins

    def tables(self, data_dir):
        if data_dir is not None:
            return {split: files.read_rows(data_dir, split) for split in ("train", "test")}
        return {**super().tables(None),
                **files.hub_rows("openai/gsm8k", {"test": "main/test-*.parquet"})}


class WebNLG(Set):
    """Its test split has categories that train has not: their scores stand beside those of all."""

    def tables(self, data_dir):
        tables = super().tables(data_dir)
        seen = {row.get("category") for _, row in tables["train"]}
        self.unseen = {self.rows(row, where)[0][0] for where, row in tables["test"]
                       if row.get("category") not in seen}
        return tables

    def score(self, pairs, texts):
        """Of all, and of seen and unseen categories where there are both."""
        scores_of = super().score(pairs, texts)
        for name, wanted in (("seen", False), ("unseen", True)):
            part = [i for i, (prompt, _) in enumerate(pairs) if (prompt in self.unseen) == wanted]
            if 0 < len(part) < len(pairs):
                scores = super().score([pairs[i] for i in part], [texts[i] for i in part])
                scores_of.update({f"{metric} ({name})": value for metric, value in scores.items()})
        return scores_of


class HellaSwag(Set):
    """Its test split has no labels: validation is reported."""

    def tables(self, data_dir):
        tables = super().tables(data_dir)
        return {"train": tables["train"], "test": tables["validation"]}

    def load(self, data_dir=None):
        splits = super().load(data_dir)
        self.SPLITS["test"] = "validation"
        return splits


class Choices(HellaSwag):
    """Judged by which ending is the likeliest: options is {prompt: (endings, number of the right
    one)}."""
    BETWEEN = ""  # the ending follows its text as in a text
    score = None

    def tables(self, data_dir):
        tables = super().tables(data_dir)
        rows = (swag(row, where) for table in tables.values() for where, row in table)
        self.options = {query: (endings, label) for query, endings, label in rows}
        return tables


NAMES = "train", "validation", "test"
SETS = {"e2e": Set("tuetschek/e2e_nlg", {s: f"default/{s}/*.parquet" for s in NAMES},
                   texts_of("meaning_representation", "human_reference"), REVISION=PARQUET),
        "gsm8k": Set("openai/gsm8k", {s: f"main/{s}-*.parquet" for s in ("train", "test")}, gsm8k,
                     exact(final_number), ("exact_match",), 256),
        "svamp": Set("ChilleD/SVAMP", {s: f"data/{s}-*.parquet" for s in ("train", "test")}, svamp,
                     exact(last_number), ("exact_match",), 16),
        "mathqa": Set("regisss/math_qa", {s: f"data/{s}-*.parquet" for s in NAMES}, mathqa,
                      exact(letter), ("exact_match",), 8),
        "metamathqa": MetaMathQA("meta-math/MetaMathQA", {"train": "default/train/*.parquet"},
                                 metamathqa, exact(solution), ("exact_match",), 300, PARQUET),
        "webnlg": WebNLG("GEM/web_nlg", {s: f"en/{s}/*.parquet" for s in NAMES}, webnlg, translated,
                         (), 96, PARQUET),
        "xsum": Set("EdinburghNLP/xsum", {s: f"default/{s}/*.parquet" for s in NAMES},
                    texts_of("document", "summary"), metrics.rouge, (), 64, PARQUET),
        "openorca": Set("Open-Orca/OpenOrca", {"train": "1M-GPT4-Augmented.parquet"}, openorca,
                        FIRST=20000),
        "hellaswag": Choices("Rowan/hellaswag", {s: f"default/{s}/*.parquet" for s in NAMES[:2]},
                             hellaswag, None, ("acc_norm", "acc"), 96, PARQUET),
        "hellaswag-generated": HellaSwag("Rowan/hellaswag",
                                         {s: f"default/{s}/*.parquet" for s in NAMES[:2]},
                                         hellaswag_generated, exact(last_number), ("exact_match",),
                                         8, PARQUET),}


if __name__ == "__main__":
    import sys

    name, *folder = sys.argv[1:] or ["e2e"]
    for split, pairs in SETS[name].load(*folder).items():
        print(f"{split:10} {len(pairs):6} pairs; {pairs[0]}")
