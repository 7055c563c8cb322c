"""Tokenizers, datasets and batches."""
import json
import os
import random

import pytest
import tiktoken
from conftest import ROOT

import data
from data import bpe, e2e, restaurants, text, world

UNICODE = "Café £ 20 - 25 — naïve 日本語 🙂\n\n  two  spaces\ttab\r\n'quoted' it's 007 "


# Tokenizers

def test_bpe_encodes_any_text_and_decodes_it_back(base):
    """Byte fallback: also what the vocabulary never saw; the trained merges shorten what it saw."""
    tokenizer = bpe.load(base, 320)
    for sample in (UNICODE, "", " ", "\x00\ud7ff", restaurants.load()["test"][0][1]):
        assert tokenizer.decode(tokenizer.encode_ordinary(sample)) == sample
    seen = restaurants.load()["validation"][0][1]
    assert len(tokenizer.encode_ordinary(seen)) < 0.8 * len(seen.encode())
    assert tokenizer.eot_token == 319


def test_bpe_merges_the_most_frequent_pair_first():
    """By hand: in "aab aab ab" the pair (a, b) stands three times, then (a, ab) twice; ties go by bytes."""
    assert bpe.train(["aab", "aab", "ab"], 258)[256:] == [b"ab", b"aab"]
    assert bpe.train(["xy", "ab"], 257)[256:] == [b"xy"]


def test_bpe_training_is_the_definition():
    """Against the plain algorithm: count all pairs anew before every merge."""
    texts = [pair[1] for pair in restaurants.load()["validation"][:20]]
    words = [[bytes([b]) for b in w.encode()] for t in texts for w in bpe.regex.findall(bpe.PATTERN, t)]
    for token in bpe.train(texts, 300)[256:]:
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
        assert "".join(bpe.regex.findall(bpe.PATTERN, sample)) == sample


def test_gpt2_checkpoints_get_gpt2s_tokenizer(tmp_path):
    """50,257 embeddings and no own ranks: tiktoken's gpt2, "Hello world" is 15496 995."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder that holds it")
    tokenizer = bpe.load(tmp_path, 50257)
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995] and tokenizer.eot_token == 50256


def test_a_bad_tokenizer_is_refused(tmp_path, base):
    """Ranks that do not fit the embeddings, damaged ranks, or none for a vocabulary that is not GPT-2's."""
    with pytest.raises(ValueError, match="319 ranks, the model's 400 embeddings need 399"):
        bpe.load(base, 400)
    with pytest.raises(ValueError, match="has no tokenizer.tiktoken"):
        bpe.load(tmp_path, 320)
    lines = (base / bpe.FILE).read_text().splitlines()
    for bad in (["YQ== 0", "nonsense"], [*lines[:-1], "!!!! 318"], [*lines[:-1], lines[-1].split()[0] + " 5"],
                [*lines[:-1], lines[-1].split()[0] + " 319"], ["eHl4eXh5 0", *lines[1:]]):
        (tmp_path / bpe.FILE).write_text("\n".join(bad))
        with pytest.raises(ValueError, match="damaged"):
            bpe.load(tmp_path, 320)


# Datasets

def test_every_reference_says_all_of_its_record():
    """slots() finds every slot in every reference, and misses one that is changed or dropped."""
    for split, pairs in restaurants.load().items():
        score = restaurants.score(*zip(*pairs, strict=True))
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


def write_e2e(folder, rows=(ROW, ROW), splits=e2e.SPLITS):
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_e2e_from_jsonl_csv_and_parquet(tmp_path):
    """The three formats of --data-dir give the same pairs."""
    from datasets import Dataset
    write_e2e(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "test.jsonl").read_bytes() + b"\r\n\n")
    expected = {split: [tuple(ROW.values())] * 2 for split in e2e.SPLITS}
    assert data.load("e2e", tmp_path) == expected
    for split in e2e.SPLITS[:2]:
        (tmp_path / f"{split}.jsonl").unlink()
    Dataset.from_list([ROW, ROW]).to_csv(tmp_path / "train.csv", index=False)
    Dataset.from_list([ROW, ROW]).to_parquet(tmp_path / "validation.parquet")
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
    with pytest.raises(ValueError, match="no validation.jsonl, validation.csv or validation.parquet"):
        data.load("e2e", tmp_path)
    (tmp_path / "validation.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged or no parquet"):
        data.load("e2e", tmp_path)
    (tmp_path / "validation.parquet").unlink()
    for content, message in ((b"", "is empty"), (b"a,b\n1,2\n", "line 2: no column"), (b"\xff\xff\n1\n", "not UTF-8"),
                             (b"meaning_representation,human_reference\na,b,c\n", "line 2: more fields"),
                             (b'meaning_representation,human_reference\n"a,b\n', "line 1: not csv")):
        (tmp_path / "validation.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load("e2e", tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        data.load("e2e", tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="restaurants is generated"):
        data.load("restaurants", tmp_path)


def test_text_is_split_in_order_or_by_file(tmp_path):
    """A file: 80, 10 and 10 %; a folder: three files; not UTF-8: the line."""
    file = tmp_path / "book.txt"
    file.write_text("".join(f"{i % 10}" for i in range(100)))
    splits = data.load("text", file)
    assert [len(splits[s][0][1]) for s in e2e.SPLITS] == [80, 10, 10]
    assert "".join(splits[s][0][1] for s in e2e.SPLITS) == file.read_text()
    with pytest.raises(ValueError, match="train.txt does not exist"):
        data.load("text", tmp_path)
    for split in e2e.SPLITS:
        (tmp_path / f"{split}.txt").write_text(split)
    assert data.load("text", tmp_path) == {split: [("", split)] for split in e2e.SPLITS}
    for content, message in ((b"one\ntwo\n\xff", "line 3: not UTF-8"), (b"\n \n", "is empty"), (b"ab", "too few")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text.load(file)
    with pytest.raises(ValueError, match="needs --data-dir"):
        text.load()


# Encoding and batches

def test_records_carry_loss_on_their_text_only(base):
    """targets are the sentence and <|endoftext|>, shifted by one; the record and the padding are -100."""
    tokenizer = bpe.load(base, 320)
    pairs = [("name : A", "A is a pub ."), ("name : The Swan | food : Thai", "The Swan is Thai .")]
    examples, cut = data.encode(pairs, tokenizer, 100)
    idx, targets = data.collate(examples)
    assert cut == 0
    for i, (record, sentence) in enumerate(pairs):
        prompt, target = tokenizer.encode_ordinary(record + " ||"), tokenizer.encode_ordinary(" " + sentence)
        ids = [319, *prompt, *target, 319]
        assert idx[i].tolist() == ids[:-1] + [0] * (idx.shape[1] - len(ids) + 1)
        assert targets[i][targets[i] != -100].tolist() == [*target, 319]
        first = (targets[i] != -100).nonzero()[0].item()
        assert first == len(prompt)


def test_texts_longer_than_the_context_are_cut_and_counted(base):
    """A record's sentence is cut at the context and counted; a record that fills it alone is refused."""
    tokenizer = bpe.load(base, 320)
    examples, cut = data.encode([("name : A", "A is a pub . " * 50), ("name : A", "A .")], tokenizer, 30)
    assert cut == 1 and [len(ids) for ids, _ in examples][0] == 31
    with pytest.raises(ValueError, match="leaves no room"):
        data.encode([("name : A " * 30, "A .")], tokenizer, 30)


def test_plain_text_predicts_every_token_once(base):
    """Pieces overlap by one token: the targets of all pieces, in order, are the text and <|endoftext|>."""
    tokenizer = bpe.load(base, 320)
    sample = restaurants.load()["test"][0][1] * 3
    examples, _ = data.encode([("", sample)], tokenizer, 16)
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


def test_the_shipped_tokenizer_and_model_belong_together():
    """data/tiny-gpt: ranks and embeddings fit, and the file is what tiktoken reads."""
    folder = ROOT / "data/tiny-gpt"
    tokenizer = bpe.load(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    ranks = tiktoken.load.load_tiktoken_bpe(str(folder / bpe.FILE))
    assert {tokenizer.decode_single_token_bytes(i): i for i in range(len(ranks))} == ranks
    assert tokenizer.decode(tokenizer.encode_ordinary(UNICODE)) == UNICODE
