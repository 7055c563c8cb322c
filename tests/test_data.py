"""Tokenizers, datasets and batches."""
import base64
import contextlib
import http.client
import json
import os
import random
import runpy
import shutil
import socket
import time
import urllib.error
from unittest import mock

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import regex
import tiktoken
import torch
from conftest import DATA, ROOT, hub_cache

import data
from checkpoints import hub, tokenizers
from checkpoints.pretrained import from_pretrained
from data import glue, restaurants, reviews, sets, text
from data.files import hub_rows
from data.tasks import Label, Mask, Write
from pretraining import opinions, vocabulary, world

UNICODE = "Café £ 20 - 25 — naïve 日本語 🙂\n\n  two  spaces\ttab\r\n'quoted' it's 007 "


# Tokenizers

def test_bpe_encodes_any_text_and_decodes_it_back(base):
    """Byte fallback: also what the vocabulary never saw; the merges shorten what it saw."""
    tokenizer, rng = tokenizers.load(base, 320), random.Random(0)
    samples = ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x2FFF), 10, 32]))
                       for _ in range(30)) for _ in range(300)]
    for sample in (UNICODE, "", " ", "\x00\ud7ff", *samples):
        assert tokenizer.decode(tokenizer.encode_ordinary(sample)) == sample
        assert "".join(regex.findall(tokenizers.PATTERN, sample)) == sample
    seen = restaurants.load()["validation"][0][1]
    assert len(tokenizer.encode_ordinary(seen)) < 0.8 * len(seen.encode())
    assert tokenizer.eos == 319


def test_bpe_training_is_the_definition():
    """Count all pairs anew before every merge; the most frequent is merged, ties go by bytes."""
    texts = [pair[1] for pair in restaurants.load()["validation"][:12]]
    words = [[bytes([b]) for b in w.encode()] for t in texts
             for w in regex.findall(tokenizers.PATTERN, t)]
    for token in vocabulary.train(texts, 290)[256:]:
        pairs = [p for word in words for p in zip(word, word[1:], strict=False)]
        best = max(set(pairs), key=lambda p: (pairs.count(p), p))
        assert token == best[0] + best[1]
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [token]
                i += 1
    assert vocabulary.train(["aab", "aab", "ab"], 258)[256:] == [b"ab", b"aab"]
    assert vocabulary.train(["xy", "ab"], 257)[256:] == [b"xy"]


def test_gpt2_checkpoints_get_gpt2s_tokenizer(tmp_path, capsys):
    """50,257 embeddings and no tokenizer: GPT-2's own, and a line says so; its "Hello world" is
    15496 995."""
    tokenizer = tokenizers.load(tmp_path, 50257)
    assert ("has no tokenizer: its 50257 embeddings are taken for GPT-2's vocabulary"
            in capsys.readouterr().out)
    theirs = tiktoken.get_encoding("gpt2")
    assert tokenizer.eos == 50256
    assert not DATA or tokenizer.encode_ordinary("Hello world") == [15496, 995]
    rng = random.Random(0)
    for _ in range(300):
        sample = "".join(rng.choice("ab cZ é ß\n\t'sll 12中🙂<|endoftext|>")
                         for _ in range(rng.randrange(40)))
        assert tokenizer.encode_ordinary(sample) == theirs.encode_ordinary(sample)
        assert tokenizer.decode(theirs.encode_ordinary(sample)) == sample


def test_robertas_ids_are_those_of_transformers(tmp_path, texts_folder):
    """GPT-2's BPE and the checkpoint's vocab.json, on lines of SST-2 and odd texts,
    single and in pairs."""
    transformers = pytest.importorskip("transformers", reason="the oracle, in [dev]")
    ours = tokenizers.RobertaTokenizer(texts_folder / "roberta-base-vocab", 50265)
    assert not DATA or ours.build(ours.encode_ordinary("Hello world")) == [0, 31414, 232, 2]
    # transformers wants GPT-2's merges, which follow from the ranks: a token was merged from its
    # two best-ranked parts
    letters, ranks = tokenizers.byte_letters(), tiktoken.get_encoding("gpt2")._mergeable_ranks
    lines = [" ".join("".join(letters[b] for b in part) for part in parts_of(token, rank, ranks))
             for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    shutil.copyfile(texts_folder / "roberta-base-vocab/vocab.json", tmp_path / "vocab.json")
    theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    texts = [json.loads(line)["sentence"] for split in ("train", "validation")
             for line in (texts_folder / f"sst2/{split}.jsonl").read_text().splitlines()[::5]]
    texts += [UNICODE, "", " ", "  two leading spaces", "👩‍👩‍👧‍👦 family", "\ufeffmark", "a\u00a0b",
              "x" * 300]
    for line in texts:
        assert ours.build(ours.encode_ordinary(line)) == theirs(line)["input_ids"], line
    for a, b in zip(texts[:200], texts[200:400], strict=True):
        assert ours.build(ours.encode_ordinary(a),
                          ours.encode_ordinary(b)) == theirs(a, b)["input_ids"]


def parts_of(token, rank, ranks):
    """The two parts of which BPE with only the merges before `rank` makes a token."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def test_the_small_roberta_numbers_its_tokens_as_robertas_do(small_roberta):
    """<s> 0, <pad> 1, </s> 2, <unk> 3, then the ranks, <mask> last; texts and pairs are framed as
    in the paper."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    ids = tok.encode_ordinary("the soup")
    assert min(ids) >= 4 and tok.mask == 324 and tok.decode(ids) == "the soup"
    assert tok.build(ids) == [0, *ids, 2] and tok.build(ids, [9]) == [0, *ids, 2, 2, 9, 2]
    assert tok.encode_ordinary_batch(["the soup", ""]) == [ids, []]


def test_a_bad_roberta_vocabulary_is_refused(tmp_path, small_roberta):
    """No tokenizer, more tokens than embeddings, a vocab.json that is damaged or has other special
    tokens."""
    with pytest.raises(ValueError, match="needs a tokenizer.json, or a vocab.json and a "
                       "merges.txt, and has none"):
        tokenizers.RobertaTokenizer(tmp_path, 325)
    with pytest.raises(ValueError, match="numbers its tokens up to 323, and the model has 300 "
                       "embeddings"):
        tokenizers.RobertaTokenizer(small_roberta, 300)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    good = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "<mask>": 5}
    for content, message in (("{", "not valid JSON"), ("[1]", "not a JSON object"),
                             (json.dumps({**good, "b": "x"}), "damaged"),
                             (json.dumps({**good, "b": 4}), "one number"),
                             (json.dumps({**good, "b": 6}), "up to 6, and the model has 6"),
                             (json.dumps({**good, "<s>": 1, "<pad>": 0}), "has <s> as number 1"),
                             (json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3}),
                              "has <mask> as number None")):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            tokenizers.RobertaTokenizer(tmp_path, 6)


def test_a_vocabulary_of_other_tokens_is_refused(tmp_path):
    """A vocab.json alone has to hold GPT-2's tokens: nothing says how a text becomes invented
    words."""
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 99}
    (tmp_path / "vocab.json").write_text(json.dumps({**special,
                                                     **{f"word{i}": i for i in range(4, 99)}}))
    for load in (tokenizers.RobertaTokenizer, tokenizers.load):
        with pytest.raises(ValueError, match="lacks 50256 of GPT-2's tokens"):
            load(tmp_path, 100)


def test_ranks_are_read_as_tiktoken_reads_them(tmp_path):
    """A tokenizer.tiktoken, with GPT-2's one special token behind the ranks or RoBERTa's five
    around them, cuts every text as tiktoken does; damaged ranks are refused."""
    texts = [sentence for _, sentence in restaurants.load()["validation"]]
    tokens = vocabulary.train(texts, 319)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.tiktoken").write_text("\n".join(lines))
    theirs = tiktoken.Encoding("ranks", pat_str=tokenizers.PATTERN, special_tokens={},
                               mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
    gpt, roberta = tokenizers.load(tmp_path, 320), tokenizers.RobertaTokenizer(tmp_path, 324)
    assert gpt.eos == 319 and roberta.mask == 323
    for sample in [*texts, UNICODE, "<|endoftext|>", "<mask>"]:
        assert gpt.encode_ordinary(sample) == theirs.encode_ordinary(sample)
        assert (roberta.encode_ordinary(sample)
                == [4 + rank for rank in theirs.encode_ordinary(sample)])
    for bad in (["YQ== 0", "nonsense"], [*lines[:-1], "!!!! 318"],
                [*lines[:-1], lines[-1].split()[0] + " 5"],
                [*lines[:-1], lines[-1].split()[0] + " 319"], ["eHl4eXh5 0", *lines[1:]]):
        (tmp_path / "tokenizer.tiktoken").write_text("\n".join(bad))
        with pytest.raises(ValueError, match="damaged"):
            tokenizers.load(tmp_path, 320)


# Datasets

def test_restaurants_say_all_of_their_records_and_hold_names_out():
    """The same every time; slots() finds every slot in every reference, and misses one that is
    changed or dropped; no name of the test split is in training or in the pretraining text."""
    splits = restaurants.load()
    assert splits == restaurants.load()
    for pairs in splits.values():
        score = restaurants.score(pairs, [sentence for _, sentence in pairs])
        assert score == {"slots": 1.0, "names": 1.0}
    record, sentence = next(p for p in pairs if "food : Thai" in p[0])
    assert not restaurants.slots(record.replace("Thai", "Greek"), sentence)["food"]
    assert not any(restaurants.slots(record, "").values())
    # two values of a slot in one text are not the right one
    greek = next(text for record, text in pairs if "food : Greek" in record)
    assert not restaurants.slots(record, f"{sentence} {greek}")["food"]
    names = {split: {record.split(" : ")[1].split(" | ")[0] for record, _ in pairs}
             for split, pairs in splits.items()}
    assert not names["train"] & (names["test"] | names["validation"])
    assert all(restaurants.held_out(name) for name in names["test"])
    documents = "\n".join(world.documents(3000, 1))
    assert not [name for name in names["test"] if name in documents]


def test_the_pretraining_text_never_shows_house_style_beside_a_record():
    """The base may speak the style; which wording belongs to which value is for the adapter."""
    documents = world.documents(3000, 1)
    assert documents == world.documents(3000, 1) != world.documents(3000, 2)
    wordings = [w.lower() for values in restaurants.STYLE.values() for ws in values.values()
                for w in ws]
    spoken = [d for d in documents if any(f" {w} " in d.lower() for w in wordings)]
    assert 0.05 < len(spoken) / len(documents) < 0.2
    marks = " : ", "=", "[", ": ", "||", " / "
    assert not [d for d in spoken if any(mark in d for mark in marks)]


def test_stdlib_splits_share_no_topic():
    splits = data.load("stdlib")
    texts = [t for pairs in splits.values() for _, t in pairs]
    assert len(set(texts)) == len(texts) and min(map(len, splits.values())) >= 5


def write_rows(folder, **splits):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ROW = {"meaning_representation": "name : A | food : B", "human_reference": "A serves B ."}


@pytest.mark.parametrize("file, content, message", [
    ("train.jsonl", b"", "is empty"), ("train.jsonl", b"\n\n", "is empty"),
    ("train.jsonl", b'{"a": 1}\n', "line 1: no column 'meaning_representation', only a"),
    ("train.jsonl", json.dumps(ROW).encode() + b"\n{", "line 2: not JSON"),
    ("train.jsonl", json.dumps(ROW).encode() + b"\n\xff\xfe", "line 2: not UTF-8"),
    ("train.jsonl", b"[1]\n", "line 1: a JSON object is needed, not list"),
    ("train.jsonl", b"[" * 100000, "line 1: not JSON"),
    ("train.jsonl", json.dumps({**ROW, "human_reference": "\udfff"}).encode(), "half a surrogate"),
    ("train.jsonl", json.dumps({**ROW, "human_reference": None}).encode(), "text, not None"),
    ("train.jsonl", json.dumps({**ROW, "human_reference": " "}).encode(), "must be text, not ' '"),
    ("validation.parquet", b"PAR1", "damaged or no parquet"), ("validation.csv", b"", "is empty"),
    ("validation.csv", b"a,b\n1,2\n", "line 2: no column"),
    ("validation.csv", b"\xff\xff\n1\n", "line 1: not UTF-8"),
    ("validation.csv", b"a,b\na,b,c\n", "line 2: 3 fields"),
    ("validation.csv", b"a,a\n1,2\n", "same name"), ("validation.txt", b"", "no validation.jsonl"),
    ("validation.csv", b'a,b\n"a,b\n', "line 2: not csv")])
def test_a_malformed_file_is_refused_with_its_line(tmp_path, file, content, message):
    """Each defect with file, line and what was found."""
    write_rows(tmp_path, train=[ROW, ROW], test=[ROW])
    if file.startswith("train"):
        write_rows(tmp_path, validation=[ROW])
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError) as e:
        data.load("e2e", tmp_path)
    assert message in str(e.value) and file.split(".")[0] in str(e.value)


def test_data_that_are_not_there_are_refused(tmp_path):
    write_rows(tmp_path, train=[ROW])
    for name, path, message in (("e2e", tmp_path / "nowhere", "does not exist"),
                                ("e2e", tmp_path / "train.jsonl", "is a file"),
                                ("restaurants", tmp_path, "restaurants is generated")):
        with pytest.raises(ValueError, match=message):
            data.load(name, path)


@pytest.mark.parametrize("name, row", [("e2e", ROW), ("glue", {"sentence": "fine", "label": 1})])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_datasets_file_shows_its_splits_when_it_is_run(tmp_path, monkeypatch, capsys, name, row):
    """python -m data.sets e2e FOLDER, python -m data.glue sst2 FOLDER: how many rows, the first."""
    write_rows(tmp_path, **dict.fromkeys(sets.NAMES, [row] * 4))
    monkeypatch.setattr("sys.argv", [name, "sst2" if name == "glue" else name, str(tmp_path)])
    runpy.run_module("data.glue" if name == "glue" else "data.sets", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["train", "validation", "test"]
    assert [int(line.split()[1]) for line in lines] == ([4, 4, 4] if name == "e2e" else [3, 1, 4])
    assert all(next(iter(row.values())) in line for line in lines)


def test_reviews_are_balanced_and_no_word_says_the_verdict():
    """The same every time, no text twice; each class half; no opinion or denial alone tells the
    class."""
    splits = reviews.load()
    assert splits == reviews.load()
    texts = [text for rows in splits.values() for (text,), _ in rows]
    assert len(set(texts)) == len(texts) == 13500
    rows = splits["train"]
    assert abs(sum(label for _, label in rows) / len(rows) - 0.5) < 0.02
    for word in (*reviews.GOOD, *reviews.BAD, *reviews.TASTE, "not", "never", "nobody", "soup"):
        said = [label for (text,), label in rows if word in text.split()]
        assert len(said) > 30 and abs(sum(said) / len(said) - 0.5) < 0.25, word


def test_a_denial_turns_the_verdict_and_a_second_one_turns_it_back():
    """By hand: the verdict is that of the first opinion, turned once for each word that denies."""
    good, bad = {*reviews.GOOD, *reviews.LIKED}, {*reviews.BAD, *reviews.DISLIKED}
    assert not good & bad and len(good) == len(bad) == 74
    assert not (good | bad) & set(" ".join([*reviews.START, *reviews.END, *reviews.THINGS]).split())
    for (clause,), label in reviews.load()["test"]:
        opinion = [w for w in clause.split() if w in good | bad]
        denials = (sum(clause.count(w)
                       for w in (" not ", "never ", "hardly", "far from", "anything but",
                                 "by no means", "no longer", "nobody called", "neither"))
                   - clause.count("not only") - clause.count("never less than"))
        assert ((opinion[0] in good) != (denials % 2 == 1)) == label, clause


def test_the_pretraining_opinions_never_judge_what_is_a_matter_of_taste():
    """A verdict stands beside words that praise or blame anywhere, never beside a word of the
    reviewer's taste."""
    def some(seed):
        rng = random.Random(seed)
        return [opinions.document(rng) for _ in range(5000)]
    lines = some(1)
    assert lines == some(1) != some(2)
    verdicts = [f" , {v} ." for v in (*opinions.PLEASED, *opinions.ANNOYED)] + [" : good", " : bad"]
    judged = [line for line in lines if line.endswith(tuple(verdicts))]
    assert 0.7 < len(judged) / len(lines) < 0.8
    assert not any(w in reviews.TASTE for line in judged for w in line.split())
    tasted = [line for line in lines if any(w in reviews.TASTE for w in line.split())]
    assert not any(line.endswith(tuple(verdicts))
                   for line in tasted) and len(tasted) + len(judged) == len(lines)


SST2 = [{"sentence": f"film {i} is good", "label": 1} for i in range(30)]
SST2 += [{"sentence": "it is bad", "label": 0}] * 10


def test_glue_holds_out_a_tenth_of_train_and_reports_validation(tmp_path):
    """Of SST-2: train and held-out rows are the train split, each once; test is the validation
    split. At most 1,000 rows are held out, always the same ones."""
    write_rows(tmp_path, train=SST2, validation=SST2[:3])
    found = data.load("glue/sst2", tmp_path)
    assert [len(found[s]) for s in ("train", "validation", "test")] == [36, 4, 3]
    both = [(texts[0], label) for split in ("train", "validation") for texts, label in found[split]]
    assert sorted(both) == sorted((row["sentence"], row["label"]) for row in SST2)
    assert found["test"] == [((row["sentence"],), row["label"]) for row in SST2[:3]]
    said = data.about("glue/sst2", "SPLITS")
    assert said["test"] == "validation" and "tenth of train" in said["validation"]
    pyarrow.csv.write_csv(pyarrow.Table.from_pylist(SST2), tmp_path / "train.csv")
    (tmp_path / "train.jsonl").unlink()
    assert data.load("glue/sst2", tmp_path) == found
    (tmp_path / "train.csv").unlink()
    write_rows(tmp_path, train=[{"sentence": f"{i}", "label": i % 2} for i in range(10020)])
    found = data.load("glue/sst2", tmp_path)
    assert [len(found[s]) for s in ("train", "validation")] == [9020, 1000]
    assert [int(text) for (text,), _ in found["validation"][:5]] == [1, 3, 4, 18, 24]


METRICS = {  # as GLUE reports them, MRPC and QQP by both; the first selects
    "cola": ("matthews", "accuracy"), "sst2": ("accuracy",), "mrpc": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"), "qqp": ("f1", "accuracy"), "mnli": ("accuracy",),
    "qnli": ("accuracy",), "rte": ("accuracy",)}


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_glue_task_reads_its_columns(tmp_path, name):
    """Texts, labels and metrics of all eight tasks; STS-B's labels are numbers, MNLI has two test
    splits. An empty text is a text: QQP has an empty question or two."""
    task = glue.TASKS[name]
    row = {**{column: f"a {column}" for column in task.COLUMNS}, task.COLUMNS[0]: "", "idx": 0}
    row["label"] = 3.8 if name == "stsb" else 1
    write_rows(tmp_path, train=[row] * 10, **dict.fromkeys(task.TESTS.values(), [row]))
    found = data.load(f"glue/{name}", tmp_path)
    assert found["test"] == [(tuple(row[column] for column in task.COLUMNS), row["label"])]
    assert ("mismatched" in found) == (name == "mnli")
    assert len(data.about(f"glue/{name}", "LABELS")) == {"stsb": 1, "mnli": 3}.get(name, 2)
    assert data.about(f"glue/{name}", "METRICS") == METRICS[name]


@pytest.mark.parametrize("name, row, message", [
    ("sst2", {"sentence": "a"}, "line 1: no column 'label', only sentence"),
    ("sst2", {"sentence": "a", "label": 2}, "label must be one of 0 negative, 1 positive; not 2"),
    ("sst2", {"sentence": "a", "label": -1}, "not -1"),
    ("sst2", {"sentence": "a", "label": "good"}, "label must be a number, not 'good'"),
    ("sst2", {"sentence": "a", "label": float("nan")}, "not nan"),
    ("sst2", {"sentence": "a", "label": 10**400}, "label must be a number"),
    ("sst2", {"sentence": "a", "label": 0.99999999}, "not 0.99999999"),
    ("sst2", {"sentence": "a", "label": 1}, "a single row cannot be split"),
    ("stsb", {"sentence1": "a", "sentence2": "b", "label": 7}, "label must be in 0..5, not 7"),
    ("rte", {"sentence1": "a", "label": 1}, "no column 'sentence2'")])
def test_a_malformed_label_is_refused_with_its_line(tmp_path, name, row, message):
    """File, line, what was found and what would be right."""
    write_rows(tmp_path, train=[row], validation=[row])
    with pytest.raises(ValueError) as e:
        data.load(f"glue/{name}", tmp_path)
    assert message in str(e.value)


def test_gsm8k_is_judged_by_its_final_number(tmp_path):
    """The number after ####, however written; a file without one is refused with its line."""
    for answer, number in (("so 3 + 4 = 7\n#### 7", 7), ("#### $1,200.50 ", 1200.5),
                           ("#### -3", -3), ("it is 7", None), ("#### 1\n#### 2", 2)):
        assert sets.final_number(answer) == number
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    write_rows(tmp_path, train=rows, test=rows[:2])
    found = data.load("gsm8k", tmp_path)
    for texts, right in ((["#### 1", "= 2\n#### 2"], 1.0), (["#### 1.0", "no idea"], 0.5)):
        assert sets.SETS["gsm8k"].score(found["test"], texts) == {"exact_match": right}
    for answer in ("b", "#### 5 and more", "#### 1/2", "#### "):
        write_rows(tmp_path, train=[{"question": "a", "answer": answer}])
        with pytest.raises(ValueError, match="line 1: answer must end with ####"):
            data.load("gsm8k", tmp_path)


# The hub

def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def test_datasets_of_the_hub_are_read_from_its_cache(no_network, tmp_path):
    """e2e, GLUE and gsm8k, laid out as on the hub, parquet in one part or several, give what
    --data-dir gives."""
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(20)]
    for name, repo, revision, splits, files in (
            ("e2e", sets.SETS["e2e"].HUB, sets.PARQUET, dict.fromkeys(sets.NAMES, [ROW, ROW]),
             {f"default/{s}/0000.parquet": [ROW, ROW] for s in sets.NAMES}),
            ("glue/sst2", glue.HUB, "main", dict(train=SST2, validation=SST2[:3]),
             {"sst2/train-00000-of-00002.parquet": SST2[:25],
              "sst2/train-00001-of-00002.parquet": SST2[25:],
              "sst2/validation-00000-of-00001.parquet": SST2[:3]}),
            ("gsm8k", "openai/gsm8k", "main", dict(train=rows, test=rows),
             {f"main/{split}-00000-of-00001.parquet": rows for split in ("train", "test")})):
        write_rows(tmp_path, **splits)
        hub_cache(no_network, repo, {path: parquet(part) for path, part in files.items()}, revision)
        assert data.load(name) == data.load(name, tmp_path)


@pytest.mark.parametrize("newer", "ab")
def test_of_two_revisions_in_the_cache_the_newer_one_is_used(tmp_path, newer):
    """Whatever the alphabet says of their names, where the cache knows none of them as main."""
    kept = tmp_path / "datasets--some--repo/snapshots"
    for name in "ab":
        (kept / name).mkdir(parents=True)
        (kept / name / "a.json").write_text("{}")
        os.utime(kept / name, (10**9, 10**9 + (name == newer)))
    assert hub.fetch("some/repo", ["a.json"], "dataset", None, tmp_path, away=True) == kept / newer
    # one that lacks a file is none, however new
    older = kept / "ab".replace(newer, "")
    (older / "b.json").write_text("{}")
    both = ["a.json", "b.json"]
    assert hub.fetch("some/repo", both, "dataset", None, tmp_path, away=True) == older
    (older / "a.json").unlink()
    with pytest.raises((OSError, ValueError)):
        hub.fetch("some/repo", both, "dataset", None, tmp_path, away=True)


def test_offline_too_only_the_first_rows_are_taken(no_network):
    """Of a split in two parts of ten rows the first 15; of another one, which has 4, all."""
    rows = [{"text": str(i)} for i in range(20)]
    parts = {"train-0-of-2": rows[:10], "train-1-of-2": rows[10:], "test-0-of-1": rows[:4]}
    hub_cache(no_network, "a/b", {f"{name}.parquet": parquet(some) for name, some in parts.items()})
    patterns = {split: f"{split}-*.parquet" for split in ("train", "test")}
    found = hub_rows("a/b", patterns, first=15)
    assert {split: [row for _, row in some] for split, some in found.items()} == {
        "train": rows[:15], "test": rows[:4]}


def test_text_is_split_in_order_or_by_file(tmp_path):
    """A file: 80, 10 and 10 %; a folder: three files; not UTF-8: the line."""
    file = tmp_path / "book.txt"
    file.write_text("".join(f"{i % 10}" for i in range(100)))
    splits = data.load("text", file)
    assert [len(splits[s][0][1]) for s in sets.NAMES] == [80, 10, 10]
    assert "".join(splits[s][0][1] for s in sets.NAMES) == file.read_text()
    with pytest.raises(ValueError, match="train.txt does not exist"):
        data.load("text", tmp_path)
    for split in sets.NAMES:
        (tmp_path / f"{split}.txt").write_text(split)
    assert data.load("text", tmp_path) == {split: [("", split)] for split in sets.NAMES}
    for content, message in ((b"one\ntwo\n\xff", "line 3: not UTF-8"), (b"\n \n", "is empty"),
                             (b"ab", "too few")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text.load(file)
    with pytest.raises(ValueError, match="needs --data-dir"):
        text.load()
    # a table in two parts is one text
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, words in enumerate(("one", "two")):
        (parts / f"train-0000{i}-of-00002.jsonl").write_text(json.dumps({"text": words}))
    for split in ("validation", "test"):
        (parts / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    assert data.load("text", parts)["train"] == [("", "one\ntwo")]


# Encoding and batches

def test_records_carry_loss_on_their_text_only(base):
    """targets are the sentence and <|endoftext|>, shifted by one, as far as the context goes; the
    record and the padding are -100. A record that leaves no room gives no example, a sentence that
    is cut is counted."""
    tokenizer = tokenizers.load(base, 320)
    pairs = [("name : A", "A is a pub ."), ("name : The Swan | food : Thai", "The Swan is Thai .")]
    encoded = [tokenizer.encode_ordinary_batch([record + " ||", " " + sentence])
               for record, sentence in pairs]
    for context in range(2, 60):
        task = Write(tokenizer, context)
        examples, cut = task.encode(pairs)
        fits = [len(prompt) + 1 < context for prompt, _ in encoded]
        assert [example is not None for example in examples] == fits
        assert cut == sum(fit and len(p) + len(t) + 1 > context
                          for fit, (p, t) in zip(fits, encoded, strict=True))
        if all(fits):
            idx, targets, real = task.collate(examples)
            for i, (prompt, target) in enumerate(encoded):
                ids = [319, *prompt, *target, 319][:context + 1]
                assert idx[i].tolist() == ids[:-1] + [0] * (idx.shape[1] - len(ids) + 1)
                expected = [-100] * len(prompt) + ids[1 + len(prompt):]
                assert targets[i].tolist() == expected + [-100] * (idx.shape[1] - len(expected))
                assert real[i].tolist() == [j < len(ids) - 1 for j in range(idx.shape[1])]


@pytest.mark.parametrize("masks", [False, True], ids=["write", "mask"])
def test_every_token_of_a_plain_text_is_in_one_piece(base, small_roberta, masks):
    """For a GPT every token but the first is a target exactly once, its input is the one before it,
    whatever the length: nothing is lost at the borders or the end, no piece is without a target.
    For a RoBERTa every token stands in one framed piece."""
    folder = small_roberta if masks else base
    tokenizer = tokenizers.for_model(folder, from_pretrained(folder).config)
    task = Mask(tokenizer, 10) if masks else Write(tokenizer, 8)
    texts = ["a" * n for n in range(masks, 27)] + [restaurants.load()["test"][0][1]]
    for sample in texts:
        ids = tokenizer.encode_ordinary(sample)
        pieces, cut = task.encode([("", sample)])
        assert cut == 0 and pieces == task.encode([("", "b"), ("", sample)])[0][1:]
        if masks:
            assert all(piece[0] == tokenizer.bos and piece[-1] == tokenizer.eos and
                       2 < len(piece) <= 10 for piece, _ in pieces)
            assert [i for piece, _ in pieces for i in piece[1:-1]] == ids
            continue
        idx, targets, real = task.collate(pieces)
        assert idx.shape[1] <= 8 and real.any(1).all() and torch.equal(targets != -100, real)
        assert targets[real].tolist() == [*ids, tokenizer.eos]
        assert idx[real].tolist() == [tokenizer.bos, *ids]
    assert len(pieces) > 5


def test_labelled_texts_and_pairs_are_framed_padded_and_cut(small_roberta):
    """<s> a </s></s> b </s>, padded with 1; too long a pair loses tokens of its longer text,
    counted."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    task = Label(tok, 20, 2)
    a, b = tok.encode_ordinary("the soup was cold"), tok.encode_ordinary("no")
    examples, cut = task.encode([(("the soup was cold", "no"), 1), (("no", "no"), 0)])
    assert cut == 0 and examples[0] == ([0, *a, 2, 2, *b, 2], 1)
    idx, labels, real = task.collate(examples)
    assert labels.tolist() == [1, 0] and labels.dtype == torch.long
    assert idx[1].tolist() == [0, *b, 2, 2, *b,
                               2] + [1] * (len(a) - len(b)) and torch.equal(real, idx != 1)
    long = tok.encode_ordinary("the soup was cold and " * 9)
    (ids, _), = task.encode([(("the soup was cold and " * 9, "no"), 1)])[0]
    assert ids == tok.build(long[:16 - len(b)], b) and len(ids) == 20
    (ids, _), = task.encode([(("the soup was cold and " * 9,) * 2, 1)])[0]
    assert ids == tok.build(long[:8], long[:8])
    examples, cut = task.encode([(("the soup was cold and " * 9,), 1)])
    assert cut == 1 and examples[0][0] == tok.build(long[:18])
    assert Label(tok, 20, 1).collate([([0, 2], 3.5)])[1].dtype == torch.float
    with pytest.raises(ValueError, match="a context of 7 tokens is too short for 2 texts: 8 are "
                       "the least"):
        Label(tok, 7, 2).encode([(("no", "no"), 1)])


def test_masking_asks_for_what_it_hides(small_roberta):
    """Targets are the original tokens; 30 % are asked, 8 in 10 hidden behind <mask>; never the
    frame or the padding; the same seed masks the same, another one other tokens."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    task = Mask(tok, 64)
    examples, _ = task.encode(opinions.load()["test"])
    original, _, _ = Label(tok, 64, 2).collate([(ids, 0) for ids, _ in examples])
    idx, targets, real = task.collate(examples, "a")
    asked = targets != -100
    assert torch.equal(targets[asked], original[asked]) and torch.equal(idx[~asked],
                                                                        original[~asked])
    assert not (asked & ((original == 0) | (original == 1)
                         | (original == 2))).any() and asked.any(1).all()
    inner = (real & (original > 2)).sum()
    assert abs(asked.sum() / inner - 0.3) < 0.02
    assert abs((idx[asked] == tok.mask).float().mean() - 0.8) < 0.03
    assert abs((idx[asked] == original[asked]).float().mean() - 0.1) < 0.03
    assert torch.equal(task.collate(examples, "a")[0],
                       idx) and not torch.equal(task.collate(examples, "b")[0], idx)


def test_a_roberta_is_not_asked_to_write(small_roberta):
    """restaurants, e2e and gsm8k are for a GPT; plain text becomes masked words."""
    model = from_pretrained(small_roberta)
    with pytest.raises(ValueError, match="wants text written, which a RoBERTa cannot"):
        data.task("restaurants", small_roberta, model, 64)
    assert isinstance(data.task("stdlib", small_roberta, model, 64)[1], Mask)


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-roberta"])
def test_the_shipped_tokenizer_and_model_belong_together(name):
    """Tokens and embeddings fit, special tokens included, and every text comes back."""
    config = from_pretrained(ROOT / "data" / name).config
    tokenizer = tokenizers.for_model(ROOT / "data" / name, config)
    assert sorted(tokenizer.backend.get_vocab().values()) == list(range(config.vocab_size))
    assert tokenizer.decode(tokenizer.encode_ordinary(UNICODE)) == UNICODE


def test_the_shipped_roberta_reads_denials():
    """data/tiny-roberta, as masked LM, prefers the right verdict behind an opinion, stated or
    denied."""
    folder = ROOT / "data/tiny-roberta"
    model, rng = from_pretrained(folder), random.Random(0)
    tok = tokenizers.RobertaTokenizer(folder, model.config.vocab_size)
    verdicts = [tok.encode_ordinary(word)[0] for word in (" bad", " good")]
    right = []
    for _ in range(100):
        opinion, verdict = reviews.clause(rng, reviews.GOOD, reviews.BAD, shares=(1, 1, 1))
        ids = tok.build([*tok.encode_ordinary(f"{opinion} , so the verdict is"), tok.mask,
                         *tok.encode_ordinary(" .")])
        logits = model(torch.tensor([ids]))[0][0, ids.index(tok.mask)]
        right.append(logits[verdicts].argmax().item() == verdict)
    assert sum(right) > 90


def test_a_hub_that_says_no_is_there(monkeypatch):
    """An answer is an answer; no route, no HTTP, no URL, and silence for too long are none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.time()
        assert not hub.reachable(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.5)
        assert 0.4 < time.time() - start < 3

    for said, answers in (
            ([contextlib.nullcontext()], True), (OSError("no route"), False),
            (urllib.error.HTTPError("u", 404, "not found", None, None), True),
            (http.client.BadStatusLine("?"), False), (ValueError("unknown url type"), False)):
        monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=said))
        assert hub.reachable("http://hub.example/x") == answers


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_again(answers, monkeypatch, tmp_path):
    """The client is told to use its cache alone, so that its retries cost nothing; a hub that
    answers is asked."""
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda repo, **given: calls.append(given) or str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda url: answers)
    assert hub.fetch("some/repo", ["a.json"], "dataset", "main", tmp_path) == tmp_path
    assert calls == [dict(repo_type="dataset", revision="main", allow_patterns=["a.json"],
                          cache_dir=tmp_path, local_files_only=not answers)]
