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
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import regex
import tiktoken
import torch
from conftest import REAL, ROOT, hub_cache, needs_real

import data
from checkpoints import hub, tokenizers
from checkpoints.pretrained import from_pretrained
from data import glue, opinions, restaurants, reviews, sets, text, world
from data.tasks import Label, Mask, Write
from experiments import vocabulary

UNICODE = "Café £ 20 - 25 — naïve 日本語 🙂\n\n  two  spaces\ttab\r\n'quoted' it's 007 "


# Tokenizers

def test_bpe_encodes_any_text_and_decodes_it_back(base):
    """Byte fallback: also what the vocabulary never saw; the trained merges shorten what it saw."""
    tokenizer = tokenizers.load(base, 320)
    for sample in (UNICODE, "", " ", "\x00\ud7ff", restaurants.load()["test"][0][1]):
        assert tokenizer.decode(tokenizer.encode_ordinary(sample)) == sample
    seen = restaurants.load()["validation"][0][1]
    assert len(tokenizer.encode_ordinary(seen)) < 0.8 * len(seen.encode())
    assert tokenizer.eos == 319


def test_bpe_merges_the_most_frequent_pair_first():
    """By hand: in "aab aab ab" the pair (a, b) stands three times, then (a, ab) twice; ties go by bytes."""
    assert vocabulary.train(["aab", "aab", "ab"], 258)[256:] == [b"ab", b"aab"]
    assert vocabulary.train(["xy", "ab"], 257)[256:] == [b"xy"]


def test_bpe_training_is_the_definition():
    """Against the plain algorithm: count all pairs anew before every merge."""
    texts = [pair[1] for pair in restaurants.load()["validation"][:20]]
    words = [[bytes([b]) for b in w.encode()] for t in texts for w in regex.findall(tokenizers.PATTERN, t)]
    for token in vocabulary.train(texts, 300)[256:]:
        pairs = [p for word in words for p in zip(word, word[1:], strict=False)]
        best = max(set(pairs), key=lambda p: (pairs.count(p), p))
        assert token == best[0] + best[1]
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [token]
                i += 1


def test_the_pattern_loses_nothing():
    """The pieces of the pre-tokenizer, joined, are the text."""
    rng = random.Random(0)
    for _ in range(300):
        sample = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x2FFF), 10, 32])) for _ in range(30))
        assert "".join(regex.findall(tokenizers.PATTERN, sample)) == sample


def test_gpt2_checkpoints_get_gpt2s_tokenizer(tmp_path, capsys):
    """50,257 embeddings and no tokenizer: GPT-2's own, and a line says so; "Hello world" is 15496 995."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder that holds it")
    tokenizer = tokenizers.load(tmp_path, 50257)
    assert "has no tokenizer: its 50257 embeddings are taken for GPT-2's vocabulary" in capsys.readouterr().out
    theirs = tiktoken.get_encoding("gpt2")
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995] and tokenizer.eos == 50256
    rng = random.Random(0)
    for _ in range(300):
        sample = "".join(rng.choice("ab cZ é ß\n\t'sll 12中🙂<|endoftext|>") for _ in range(rng.randrange(40)))
        assert tokenizer.encode_ordinary(sample) == theirs.encode_ordinary(sample)
        assert tokenizer.decode(theirs.encode_ordinary(sample)) == sample


@needs_real
def test_robertas_ids_are_those_of_transformers(tmp_path):
    """GPT-2's BPE and the checkpoint's vocab.json, on every line of SST-2 and on odd texts, single and in pairs."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    ours = tokenizers.RobertaTokenizer(Path(REAL) / "roberta-base-vocab", 50265)
    assert ours.build(ours.encode_ordinary("Hello world")) == [0, 31414, 232, 2]
    # transformers wants GPT-2's merges, which follow from the ranks: a token was merged from its two best-ranked parts
    letters, ranks = tokenizers.byte_letters(), tiktoken.get_encoding("gpt2")._mergeable_ranks
    lines = [" ".join("".join(letters[b] for b in part) for part in parts_of(token, rank, ranks))
             for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    shutil.copyfile(Path(REAL) / "roberta-base-vocab/vocab.json", tmp_path / "vocab.json")
    theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    texts = [json.loads(line)["sentence"] for split in ("train", "validation")
             for line in (Path(REAL) / f"sst2/{split}.jsonl").read_text().splitlines()]
    texts += [UNICODE, "", " ", "  two leading spaces", "👩‍👩‍👧‍👦 family", "\ufeffmark", "a\u00a0b", "x" * 300]
    for line in texts:
        assert ours.build(ours.encode_ordinary(line)) == theirs(line)["input_ids"], line
    for a, b in zip(texts[:200], texts[200:400], strict=True):
        assert ours.build(ours.encode_ordinary(a), ours.encode_ordinary(b)) == theirs(a, b)["input_ids"]


def parts_of(token, rank, ranks):
    """The two parts of which BPE with only the merges before `rank` makes a token."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def test_the_small_roberta_numbers_its_tokens_as_robertas_do(small_roberta):
    """<s> 0, <pad> 1, </s> 2, <unk> 3, then the ranks, <mask> last; texts and pairs are framed as in the paper."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    ids = tok.encode_ordinary("the soup")
    assert min(ids) >= 4 and tok.mask == 324 and tok.decode(ids) == "the soup"
    assert tok.build(ids) == [0, *ids, 2] and tok.build(ids, [9]) == [0, *ids, 2, 2, 9, 2]
    assert tok.encode_ordinary_batch(["the soup", ""]) == [ids, []]


def test_a_bad_roberta_vocabulary_is_refused(tmp_path, small_roberta):
    """No tokenizer, more tokens than embeddings, a vocab.json that is damaged or has other special tokens."""
    with pytest.raises(ValueError, match="needs a tokenizer.json, or a vocab.json and a merges.txt, and has none"):
        tokenizers.RobertaTokenizer(tmp_path, 325)
    with pytest.raises(ValueError, match="numbers its tokens up to 323, and the model has 300 embeddings"):
        tokenizers.RobertaTokenizer(small_roberta, 300)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    good = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "<mask>": 5}
    for content, message in (("{", "not valid JSON"), ("[1]", "not a JSON object"),
                             (json.dumps({**good, "b": "x"}), "damaged"), (json.dumps({**good, "b": -1}), "damaged"),
                             (json.dumps({**good, "b": 4}), "one number"),
                             (json.dumps({**good, "b": 6}), "up to 6, and the model has 6"),
                             (json.dumps({**good, "<s>": 1, "<pad>": 0}), "has <s> as number 1"),
                             (json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3}), "has <mask> as number None")):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            tokenizers.RobertaTokenizer(tmp_path, 6)


@needs_real
def test_a_vocabulary_of_other_tokens_is_refused(tmp_path):
    """A vocab.json alone has to hold GPT-2's tokens: nothing says how a text becomes invented words."""
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 99}
    (tmp_path / "vocab.json").write_text(json.dumps({**special, **{f"word{i}": i for i in range(4, 99)}}))
    for load in (tokenizers.RobertaTokenizer, tokenizers.load):
        with pytest.raises(ValueError, match="lacks 50256 of GPT-2's tokens"):
            load(tmp_path, 100)


def test_ranks_are_read_as_tiktoken_reads_them(tmp_path):
    """A tokenizer.tiktoken, with GPT-2's one special token behind the ranks or RoBERTa's five around them, cuts every
    text as tiktoken does; damaged ranks are refused."""
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
        assert roberta.encode_ordinary(sample) == [4 + rank for rank in theirs.encode_ordinary(sample)]
    for bad in (["YQ== 0", "nonsense"], [*lines[:-1], "!!!! 318"], [*lines[:-1], lines[-1].split()[0] + " 5"],
                [*lines[:-1], lines[-1].split()[0] + " 319"], ["eHl4eXh5 0", *lines[1:]]):
        (tmp_path / "tokenizer.tiktoken").write_text("\n".join(bad))
        with pytest.raises(ValueError, match="damaged"):
            tokenizers.load(tmp_path, 320)


# Datasets

def test_every_reference_says_all_of_its_record():
    """slots() finds every slot in every reference, and misses one that is changed or dropped."""
    for split, pairs in restaurants.load().items():
        score = restaurants.score(pairs, [sentence for _, sentence in pairs])
        assert score == {"slots": 1.0, "names": 1.0}, split
    record, sentence = next(p for p in pairs if "food : Thai" in p[0])
    assert not restaurants.slots(record.replace("Thai", "Greek"), sentence)["food"]
    assert not restaurants.slots(record, "")["name"]
    assert not any(restaurants.slots(record, "").values())


def test_restaurants_are_the_same_every_time_and_their_names_held_out():
    """Two loads are equal; no name of the test split occurs in training or in the pretraining text."""
    once, again = restaurants.load(), restaurants.load()
    assert once == again
    names = {split: {record.split(" : ")[1].split(" | ")[0] for record, _ in pairs} for split, pairs in once.items()}
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]
    assert all(restaurants.held_out(name) for name in names["test"])
    documents = "\n".join(world.documents(3000, 1))
    assert not [name for name in names["test"] if name in documents]


def test_the_pretraining_text_never_shows_house_style_beside_a_record():
    """The base may speak the style; which wording belongs to which value is for the adapter to learn."""
    documents = world.documents(3000, 1)
    assert documents == world.documents(3000, 1) != world.documents(3000, 2)
    wordings = [w.lower() for values in restaurants.STYLE.values() for ws in values.values() for w in ws]
    spoken = [d for d in documents if any(f" {w} " in d.lower() for w in wordings)]
    assert 0.05 < len(spoken) / len(documents) < 0.2
    assert not [d for d in spoken if any(mark in d for mark in (" : ", "=", "[", ": ", "||", " / "))]


def test_stdlib_splits_share_no_topic():
    """The running Python's topics, each in one split."""
    splits = data.load("stdlib")
    texts = [t for pairs in splits.values() for _, t in pairs]
    assert len(set(texts)) == len(texts) and min(map(len, splits.values())) >= 5


ROW = {"meaning_representation": "name : A | food : B", "human_reference": "A serves B ."}


def write_e2e(folder, rows=(ROW, ROW), splits=sets.NAMES):
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_e2e_from_jsonl_csv_and_parquet(tmp_path):
    """The three formats of --data-dir give the same pairs."""
    write_e2e(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "test.jsonl").read_bytes() + b"\r\n\n")
    expected = {split: [tuple(ROW.values())] * 2 for split in sets.NAMES}
    assert data.load("e2e", tmp_path) == expected
    for split in sets.NAMES[:2]:
        (tmp_path / f"{split}.jsonl").unlink()
    table = pyarrow.Table.from_pylist([ROW, ROW])
    pyarrow.csv.write_csv(table, tmp_path / "train.csv")
    pyarrow.parquet.write_table(table, tmp_path / "validation.parquet")
    assert data.load("e2e", tmp_path) == expected


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b'{"a": 1}\n', "train.jsonl, line 1: no column 'meaning_representation', only a"),
    (json.dumps(ROW).encode() + b"\n{", "line 2: not JSON"),
    (json.dumps(ROW).encode() + b"\n\xff\xfe", "line 2: not UTF-8"),
    (b"[1]\n", "line 1: a JSON object is needed, not list"), (b"\n\n", "is empty"), (b"[" * 100000, "line 1: not JSON"),
    (json.dumps({**ROW, "human_reference": "\udfff"}).encode(), "half a surrogate pair"),
    (json.dumps({**ROW, "human_reference": None}).encode(), "human_reference must be text, not None"),
    (json.dumps({**ROW, "human_reference": " "}).encode(), "human_reference must be text, not ' '")])
def test_a_malformed_file_is_refused_with_its_line(tmp_path, content, message):
    """Each defect with file, line and what was found."""
    write_e2e(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as e:
        data.load("e2e", tmp_path)
    assert message in str(e.value)


def test_missing_data_is_refused(tmp_path):
    """A folder that is not there, a split that is not there, a damaged parquet."""
    with pytest.raises(ValueError, match="does not exist"):
        data.load("e2e", tmp_path / "nowhere")
    write_e2e(tmp_path, splits=("train", "test"))
    with pytest.raises(ValueError, match="no validation.jsonl, .json, .csv, .tsv or .parquet"):
        data.load("e2e", tmp_path)
    (tmp_path / "validation.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged or no parquet"):
        data.load("e2e", tmp_path)
    (tmp_path / "validation.parquet").unlink()
    for content, message in ((b"", "is empty"), (b"a,b\n1,2\n", "line 2: no column"), (b"\xff\xff\n1\n", "not UTF-8"),
                             (b"meaning_representation,human_reference\na,b,c\n", "line 2: 3 fields, the first"),
                             (b"a,a\n1,2\n", "two columns have the same name"),
                             (b'meaning_representation,human_reference\n"a,b\n', "line 2: not csv")):
        (tmp_path / "validation.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load("e2e", tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        data.load("e2e", tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="restaurants is generated"):
        data.load("restaurants", tmp_path)


def test_an_empty_question_is_a_question(tmp_path):
    """QQP has an empty one or two; a record that is empty is refused."""
    row = {"question1": "", "question2": "why ?", "label": 0}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    assert data.load("glue/qqp", tmp_path)["test"] == [(("", "why ?"), 0)] * 4


@pytest.mark.parametrize("name, rows", [
    ("e2e", ROW), ("gsm8k", {"question": "1 + 1 ?", "answer": "#### 2"}), ("glue", {"sentence": "fine", "label": 1})])
def test_a_datasets_file_shows_its_splits_when_it_is_run(tmp_path, monkeypatch, capsys, name, rows):
    """python -m data.sets e2e FOLDER, python -m data.glue sst2 FOLDER: how many rows, and the first."""
    for split in sets.NAMES:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(rows) + "\n" for _ in range(4)))
    monkeypatch.setattr("sys.argv", [name, "sst2" if name == "glue" else name, str(tmp_path)])
    runpy.run_module("data.glue" if name == "glue" else "data.sets", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["train", "validation", "test"]
    assert [int(line.split()[1]) for line in lines] == ([4, 4, 4] if name == "e2e" else [3, 1, 4])
    assert all(next(iter(rows.values())) in line for line in lines)


def test_reviews_are_balanced_and_no_word_says_the_verdict():
    """The same every time, no text twice; each class half; no opinion or denial alone tells the class."""
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
        denials = sum(clause.count(w) for w in (
            " not ", "never ", "hardly", "far from", "anything but", "by no means", "no longer", "nobody called",
            "neither")) - clause.count("not only") - clause.count("never less than")
        assert ((opinion[0] in good) != (denials % 2 == 1)) == label, clause


def test_the_pretraining_opinions_never_judge_what_is_a_matter_of_taste():
    """A verdict stands beside words that praise or blame anywhere, never beside a word of the reviewer's taste."""
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
    assert not any(line.endswith(tuple(verdicts)) for line in tasted) and len(tasted) + len(judged) == len(lines)


SST2 = [{"sentence": f"film {i} is good", "label": 1} for i in range(30)] + [{"sentence": "it is bad", "label": 0}] * 10


def write_rows(folder, **splits):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_glue_holds_out_a_tenth_of_train_and_reports_validation(tmp_path):
    """SST-2 from files: train and held-out rows are the train split, each once; test is the validation split."""
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


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_glue_task_reads_its_columns(tmp_path, name):
    """Texts, labels and metrics of all eight tasks; STS-B's labels are numbers, MNLI has two test splits."""
    task = glue.TASKS[name]
    row = {**{column: f"a {column}" for column in task.COLUMNS}, "label": 3.8 if name == "stsb" else 1, "idx": 0}
    tests = dict.fromkeys(task.TESTS.values(), [row])
    write_rows(tmp_path, train=[row] * 10, **tests)
    found = data.load(f"glue/{name}", tmp_path)
    assert found["test"] == [(tuple(f"a {column}" for column in task.COLUMNS), row["label"])]
    assert ("mismatched" in found) == (name == "mnli")
    assert len(data.about(f"glue/{name}", "LABELS")) == {"stsb": 1, "mnli": 3}.get(name, 2)
    first = {"cola": "matthews", "stsb": "pearson", "mrpc": "f1", "qqp": "f1"}.get(name, "accuracy")
    assert data.about(f"glue/{name}", "METRICS")[0] == first


@pytest.mark.parametrize("name, row, message", [
    ("sst2", {"sentence": "a"}, "line 1: no column 'label', only sentence"),
    ("sst2", {"sentence": "a", "label": 2}, "label must be one of 0 negative, 1 positive; not 2"),
    ("sst2", {"sentence": "a", "label": -1}, "not -1"), ("sst2", {"sentence": "a", "label": 0.5}, "not 0.5"),
    ("sst2", {"sentence": "a", "label": "good"}, "label must be a number, not 'good'"),
    ("sst2", {"sentence": "a", "label": float("nan")}, "not nan"),
    ("sst2", {"sentence": "a", "label": True}, "label must be a number, not True"),
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
    for answer, number in (("so 3 + 4 = 7\n#### 7", 7), ("#### $1,200.50 ", 1200.5), ("#### -3", -3), ("it is 7", None),
                           ("#### 1\n#### 2", 2)):
        assert sets.final_number(answer) == number
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(20)]
    write_rows(tmp_path, train=rows, test=rows[:2])
    found = data.load("gsm8k", tmp_path)
    assert [len(found[s]) for s in ("train", "validation", "test")] == [18, 2, 2]
    assert not set(found["train"]) & set(found["validation"])
    answers = [answer for _, answer in found["test"]]
    assert sets.SETS["gsm8k"].score(found["test"], answers) == {"exact_match": 1.0}
    assert sets.SETS["gsm8k"].score(found["test"], ["#### 1", "no idea"]) == {"exact_match": 0.5}
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
    """e2e, GLUE and gsm8k, laid out as on the hub, parquet in one part or several, give what --data-dir gives."""
    write_e2e(tmp_path)
    hub_cache(no_network, sets.SETS["e2e"].HUB, {f"default/{s}/0000.parquet": parquet([ROW, ROW]) for s in sets.NAMES},
              sets.PARQUET)
    assert data.load("e2e") == data.load("e2e", tmp_path)
    write_rows(tmp_path, train=SST2, validation=SST2[:3])
    hub_cache(no_network, glue.HUB, {"sst2/train-00000-of-00002.parquet": parquet(SST2[:25]),
                                     "sst2/train-00001-of-00002.parquet": parquet(SST2[25:]),
                                     "sst2/validation-00000-of-00001.parquet": parquet(SST2[:3])})
    assert data.load("glue/sst2") == data.load("glue/sst2", tmp_path)
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(20)]
    write_rows(tmp_path, train=rows, test=rows)
    hub_cache(no_network, "openai/gsm8k", {f"main/{split}-00000-of-00001.parquet": parquet(rows)
                                           for split in ("train", "test")})
    assert data.load("gsm8k") == data.load("gsm8k", tmp_path)


@pytest.mark.parametrize("name", ["e2e", "gsm8k", "glue/mnli"])
def test_a_dataset_that_is_not_to_be_had_says_what_to_do(no_network, name):
    """Within seconds, in one line that names --data-dir and its files."""
    start = time.time()
    with pytest.raises(ValueError, match=r"is not to be had from the hub .*give --data-dir a folder with train.jsonl"):
        data.load(name)
    assert time.time() - start < 10


def test_a_server_that_never_answers_is_given_up():
    """A host that takes the connection and stays silent is unreachable after the time limit; nonsense is at once."""
    assert not hub.reachable("foo") and not hub.reachable("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.time()
        assert not hub.reachable(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.5)
        assert 0.4 < time.time() - start < 3


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
    for content, message in ((b"one\ntwo\n\xff", "line 3: not UTF-8"), (b"\n \n", "is empty"), (b"ab", "too few")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text.load(file)
    with pytest.raises(ValueError, match="needs --data-dir"):
        text.load()


# Encoding and batches

def test_records_carry_loss_on_their_text_only(base):
    """targets are the sentence and <|endoftext|>, shifted by one; the record and the padding are -100."""
    tokenizer = tokenizers.load(base, 320)
    pairs = [("name : A", "A is a pub ."), ("name : The Swan | food : Thai", "The Swan is Thai .")]
    task = Write(tokenizer, 100)
    examples, cut = task.encode(pairs)
    idx, targets, real = task.collate(examples)
    assert cut == 0
    for i, (record, sentence) in enumerate(pairs):
        prompt, target = tokenizer.encode_ordinary(record + " ||"), tokenizer.encode_ordinary(" " + sentence)
        ids = [319, *prompt, *target, 319]
        assert idx[i].tolist() == ids[:-1] + [0] * (idx.shape[1] - len(ids) + 1)
        assert targets[i][targets[i] != -100].tolist() == [*target, 319]
        first = (targets[i] != -100).nonzero()[0].item()
        assert first == len(prompt) and real[i].sum() == len(ids) - 1


def test_texts_longer_than_the_context_are_cut_and_counted(base):
    """A record's sentence is cut at the context and counted; a record that fills it alone gives no example."""
    tokenizer = tokenizers.load(base, 320)
    task = Write(tokenizer, 30)
    examples, cut = task.encode([("name : A", "A is a pub . " * 50), ("name : A", "A .")])
    assert cut == 1 and [len(ids) for ids, _ in examples][0] == 31
    assert task.encode([("name : A " * 30, "A .")]) == ([None], 0)


def test_plain_text_predicts_every_token_once(base):
    """Pieces overlap by one token: the targets of all pieces, in order, are the text and <|endoftext|>."""
    tokenizer = tokenizers.load(base, 320)
    sample = restaurants.load()["test"][0][1] * 3
    examples, _ = Write(tokenizer, 16).encode([("", sample)])
    assert max(len(ids) for ids, _ in examples) == 17
    targets = [t for ids, start in examples for t in ids[start:]]
    assert targets == [*tokenizer.encode_ordinary(sample), 319]


def test_batches_hold_every_example_once_and_neighbours_in_length():
    """An epoch is a permutation, the same for the same seed; within a batch lengths are alike."""
    rng = random.Random(0)
    examples = [([0] * rng.randrange(5, 200), 1) for _ in range(1000)]
    batches = data.epoch_batches(examples, 16, "0/0")
    assert sorted(i for b in batches for i in b) == list(range(1000))
    assert batches == data.epoch_batches(examples, 16, "0/0") != data.epoch_batches(examples, 16, "0/1")
    lengths = [[len(examples[i][0]) for i in b] for b in batches]
    padding = sum(max(b) * len(b) - sum(b) for b in lengths) / sum(map(sum, lengths))
    assert padding < 0.1


def test_labelled_texts_and_pairs_are_framed_padded_and_cut(small_roberta):
    """<s> a </s></s> b </s>, padded with 1; too long a pair loses tokens of its longer text, counted."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    task = Label(tok, 20, 2)
    a, b = tok.encode_ordinary("the soup was cold"), tok.encode_ordinary("no")
    examples, cut = task.encode([(("the soup was cold", "no"), 1), (("no", "no"), 0)])
    assert cut == 0 and examples[0] == ([0, *a, 2, 2, *b, 2], 1)
    idx, labels, real = task.collate(examples)
    assert labels.tolist() == [1, 0] and labels.dtype == torch.long
    assert idx[1].tolist() == [0, *b, 2, 2, *b, 2] + [1] * (len(a) - len(b)) and torch.equal(real, idx != 1)
    long = tok.encode_ordinary("the soup was cold and " * 9)
    (ids, _), = task.encode([(("the soup was cold and " * 9, "no"), 1)])[0]
    assert ids == tok.build(long[:16 - len(b)], b) and len(ids) == 20
    (ids, _), = task.encode([(("the soup was cold and " * 9,) * 2, 1)])[0]
    assert ids == tok.build(long[:8], long[:8])
    examples, cut = task.encode([(("the soup was cold and " * 9,), 1)])
    assert cut == 1 and examples[0][0] == tok.build(long[:18])
    assert Label(tok, 20, 1).collate([([0, 2], 3.5)])[1].dtype == torch.float
    with pytest.raises(ValueError, match="a context of 7 tokens is too short for 2 texts: 8 are the least"):
        Label(tok, 7, 2).encode([(("no", "no"), 1)])


def test_masking_asks_for_what_it_hides(small_roberta):
    """Targets are the original tokens; 30 % are asked, 8 in 10 hidden behind <mask>; never the frame or the padding;
    the same seed masks the same, another one other tokens."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    task = Mask(tok, 64)
    examples, _ = task.encode(opinions.load()["test"])
    original, _, _ = Label(tok, 64, 2).collate([(ids, 0) for ids, _ in examples])
    idx, targets, real = task.collate(examples, "a")
    asked = targets != -100
    assert torch.equal(targets[asked], original[asked]) and torch.equal(idx[~asked], original[~asked])
    assert not (asked & ((original == 0) | (original == 1) | (original == 2))).any() and asked.any(1).all()
    inner = (real & (original > 2)).sum()
    assert abs(asked.sum() / inner - 0.3) < 0.02
    assert abs((idx[asked] == tok.mask).float().mean() - 0.8) < 0.03
    assert abs((idx[asked] == original[asked]).float().mean() - 0.1) < 0.03
    assert torch.equal(task.collate(examples, "a")[0], idx) and not torch.equal(task.collate(examples, "b")[0], idx)


def test_plain_text_for_masking_is_cut_into_pieces_that_hold_every_token_once(small_roberta):
    """Each piece framed; together, in order, they are the text."""
    tok = tokenizers.RobertaTokenizer(small_roberta, 325)
    sample = "the soup was cold and the waiter was kind . " * 9
    examples, cut = Mask(tok, 20).encode([("", sample)])
    assert cut == 0 and max(len(ids) for ids, _ in examples) == 20
    assert all(ids[0] == tok.bos and ids[-1] == tok.eos for ids, _ in examples)
    assert [i for ids, _ in examples for i in ids[1:-1]] == tok.encode_ordinary(sample)


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
    """data/tiny-roberta, as masked LM, prefers the right verdict behind an opinion, stated or denied."""
    folder = ROOT / "data/tiny-roberta"
    model, rng = from_pretrained(folder), random.Random(0)
    tok = tokenizers.RobertaTokenizer(folder, model.config.vocab_size)
    verdicts = [tok.encode_ordinary(word)[0] for word in (" bad", " good")]
    right = []
    for _ in range(200):
        opinion, verdict = reviews.clause(rng, reviews.GOOD, reviews.BAD, shares=(1, 1, 1))
        ids = tok.build([*tok.encode_ordinary(f"{opinion} , so the verdict is"), tok.mask, *tok.encode_ordinary(" .")])
        logits = model(torch.tensor([ids]))[0][0, ids.index(tok.mask)]
        right.append(logits[verdicts].argmax().item() == verdict)
    assert sum(right) > 180


@pytest.mark.parametrize("error, answers", [
    (None, True), (urllib.error.HTTPError("u", 404, "not found", None, None), True), (OSError("no route"), False),
    (http.client.BadStatusLine("?"), False), (ValueError("unknown url type"), False)])
def test_a_hub_that_says_no_is_there(error, answers, monkeypatch):
    """An answer is an answer; no route, no HTTP and no URL are none."""
    def urlopen(*_, **__):
        if error:
            raise error
        return contextlib.nullcontext()
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert hub.reachable("http://hub.example/x") == answers


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_again(answers, monkeypatch, tmp_path):
    """The client is told to use its cache alone, so that its retries cost nothing; a hub that answers is asked."""
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **given: calls.append(given) or str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda url: answers)
    assert hub.fetch("some/repo", ["a.json"], "dataset", "main", tmp_path) == tmp_path
    assert calls == [dict(repo_type="dataset", revision="main", allow_patterns=["a.json"], cache_dir=tmp_path,
                          local_files_only=not answers)]
