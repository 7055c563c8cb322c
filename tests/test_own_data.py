"""Somebody who comes with a file of their own: pairs, labelled texts, a book."""
import csv
import itertools
import json
import math
import random
import re
import shlex

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT

import compare
import data
import generate
import train
from checkpoints import tokenizers
from checkpoints.pretrained import from_pretrained
from data.labels import Labels
from data.pairs import Pairs

COLOURS = "red green blue black white yellow brown grey pink orange".split()
PAIRS = [{"prompt": f"colour {i} of {c}", "completion": f"the colour is {c}"} for i in range(20)
         for c in COLOURS]
TEXTS = [{"text": f"{word} number {i}", "label": kind} for i in range(40) for word, kind in
         (("a fox", "animal"), ("an oak", "plant"), ("a rock", "stone"))]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path, rows, between=","):
    """Rows in a file, of the kind that its ending names."""
    if path.suffix == ".jsonl":
        return jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as f:
            table = csv.DictWriter(f, rows[0], delimiter="\t" if path.suffix == ".tsv" else between)
            table.writeheader()
            table.writerows(rows)
    return path


def run(out, *flags):
    return train.main(["--out", str(out), "--rank", "4", "--steps", "12", "--batch-size", "16",
                       "--lr", "2e-2", "--save-merged", *map(str, flags)])


def ask(capsys, *words):
    capsys.readouterr()
    generate.main(list(map(str, words)))
    return capsys.readouterr().out.strip()


# --------------------------------------------------------------------------------------------------
# As a new user would

def test_pairs_train_merge_and_write(tmp_path, base, capsys):
    """200 pairs in one file: a tenth each is held out, and result.json says so; the merged model
    writes."""
    file = jsonl(tmp_path / "my.jsonl", PAIRS)
    result = run(tmp_path / "out", "--model", base, "--dataset", "pairs", "--data-dir", file)
    assert result["splits"] == {"train": "train without validation and test",
                                "validation": "a tenth of train's texts",
                                "test": "a tenth of train's texts"}
    assert result["metrics"]["merged"]["loss"] < result["metrics"]["base"]["loss"]
    assert ask(capsys, tmp_path / "out", "colour 3 of red", "--max-new", 8)
    assert "20 records, 20 references" in ask(capsys, tmp_path / "out", "--max-new", 3)


def test_pairs_are_judged_by_what_was_asked_for(tmp_path, base):
    """--metric exact: decoded texts are compared, and select the checkpoint; columns of other
    names."""
    rows = [{"q": "one", "more": str(i), "a": "no"} for i in range(40)]
    result = run(tmp_path / "out", "--model", base, "--dataset", "pairs", "--metric", "exact",
                 "--columns", "q,more,a", "--data-dir", write(tmp_path / "my.csv", rows))
    assert result["selected"]["by"] == "validation exact_match"
    assert 0 <= result["metrics"]["merged"]["exact_match"] <= 1
    assert result["settings"]["columns"] == ["q", "more", "a"]


def test_a_decoded_text_may_be_as_long_as_the_longest_completion(tmp_path, base, monkeypatch):
    """Of those that are not trained on, with its end; else no long answer is ever right."""
    long = " ".join(["a"] * 150)
    for split, completion in (("train", "b"), ("validation", "b"), ("test", long)):
        jsonl(tmp_path / f"{split}.jsonl", [{"prompt": "x", "completion": completion}])
    model = from_pretrained(base)
    dataset = data.Dataset("pairs", tmp_path).encode(base, model, 256)
    longest = len(dataset.tokenizer.encode_ordinary(" " + long)) + 1
    assert dataset.max_new == longest > 128
    assert data.Dataset("chat", tmp_path, None, None, None, False, False, True).encode(
        base, model, 256).max_new >= longest - 1
    run(tmp_path / "out", "--model", base, "--dataset", "pairs", "--data-dir", tmp_path)
    allowed = []
    monkeypatch.setattr(generate.decoding, "generate", lambda model, prompts, max_new, *_, **__:
                        allowed.append(max_new) or [[5]] * len(prompts))
    generate.main([str(tmp_path / "out")])
    assert allowed == [longest]


def test_labels_train_merge_and_answer(tmp_path, capsys):
    """A csv with three names: the merged classifier tells them, and transformers' pipeline by the
    same names."""
    transformers = pytest.importorskip("transformers")
    file = write(tmp_path / "my.csv", TEXTS)
    result = run(tmp_path / "out", "--dataset", "labels", "--context", 32, "--data-dir", file,
                 "--steps", 50, "--lr", 1e-2)
    assert result["labels"] == ["animal", "plant",
                                "stone"] and result["metrics"]["merged"]["accuracy"] > 0.9
    classes = result["classes"]  # accuracy is the mean recall over the texts
    assert sum(c["recall"] * c["texts"] for c in classes.values()) == pytest.approx(
        result["metrics"]["merged"]["accuracy"] * sum(c["texts"] for c in classes.values()))
    assert "of each label" in capsys.readouterr().out and list(classes) == result["labels"]
    said = ask(capsys, tmp_path / "out", "an oak number 7")
    assert said.startswith("plant  (animal 0.") and ", stone 0." in said
    merged = from_pretrained(tmp_path / "out/merged")
    tokenizer = tokenizers.for_model(tmp_path / "out/merged", merged.config)
    ids = tokenizer.build(tokenizer.encode_ordinary("an oak number 7"))
    logits = merged(torch.tensor([ids]))[0][0].softmax(0)
    assert said == "plant  (" + ", ".join(f"{name} {p:.4f}" for name, p in zip(
        result["labels"], logits.tolist(), strict=True)) + ")"
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "out/merged"),
                                 device="cpu")
    assert pipe("an oak number 7")[0]["label"] == "plant"


def test_numbers_and_two_texts_train_and_answer(tmp_path, small_roberta, capsys):
    """--regression: labels are numbers, judged by their correlation; a second text stands behind
    ||."""
    rows = [{"text": f"x {i}", "text2": f"y {j}", "label": i - j / 2} for i in range(8)
            for j in range(6)]
    result = run(tmp_path / "out", "--model", small_roberta, "--dataset", "labels", "--regression",
                 "--context", 32, "--data-dir", write(tmp_path / "my.tsv", rows))
    assert result["selected"]["by"] == "validation pearson" and result["labels"] == ["number"]
    said = float(ask(capsys, tmp_path / "out", "x 3 || y 2"))
    merged = from_pretrained(tmp_path / "out/merged")
    tokenizer = tokenizers.for_model(tmp_path / "out/merged", merged.config)
    ids = tokenizer.build(tokenizer.encode_ordinary("x 3"), tokenizer.encode_ordinary("y 2"))
    assert said == pytest.approx(merged(torch.tensor([ids]))[0].item(), abs=1e-3)
    assert "x 1\n  -> " in ask(capsys, tmp_path / "out", "x 1", "x 2")


# --------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_all_kinds_of_files_hold_the_same_rows(tmp_path, ending):
    """One file, a folder of three, parts as the hub names them, with the names that people give to
    splits."""
    rows = [{"prompt": f"naïve {i}, \"q\"", "completion": f"日本\t{i}"} for i in range(30)]
    found = Pairs().load(write(tmp_path / ("a" + ending), rows))
    assert found == Pairs().load(write(tmp_path / "a.jsonl", rows))
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 24, "validation": 3,
                                                                     "test": 3}
    assert sorted(p for pairs in found.values()
                  for p in pairs) == sorted((r["prompt"], r["completion"]) for r in rows)
    for name, part in (("train", rows[:20]), ("dev", rows[20:25]), ("test", rows[25:])):
        write(tmp_path / (name + ending), part)
    assert {split: len(pairs) for split, pairs in Pairs().load(tmp_path).items()} == {
        "train": 20, "validation": 5, "test": 5}
    (tmp_path / ("train" + ending)).unlink()
    for i in (0, 1):
        write(tmp_path / f"train-0000{i}-of-00002{ending}", rows[10 * i:10 * i + 10])
    assert [p for p, _ in Pairs().load(tmp_path)["train"]] == [row["prompt"] for row in rows[:20]]
    (tmp_path / f"train-00000-of-00002{ending}").unlink()
    with pytest.raises(ValueError, match="has 1 of the 2 parts of train"):
        Pairs().load(tmp_path)


def test_what_is_held_out_is_no_text_of_train(tmp_path):
    """A prompt with several completions goes as a whole, the same ones every time; a split that is
    there is used."""
    rows = [{"prompt": f"p {i % 30}", "completion": f"c {i}"} for i in range(300)]
    random.Random(1).shuffle(rows)
    jsonl(tmp_path / "train.jsonl", rows)
    found = Pairs().load(tmp_path)
    prompts = {split: {p for p, _ in pairs} for split, pairs in found.items()}
    assert [len(prompts[split]) for split in ("train", "validation", "test")] == [24, 3, 3]
    assert prompts["validation"] == {"p 2", "p 12", "p 29"} and "p 17" in prompts["test"]
    assert sum(map(len, found.values())) == 300 and len(set.union(*prompts.values())) == 30
    assert found == Pairs().load(tmp_path)
    jsonl(tmp_path / "test.jsonl", [{"prompt": "x", "completion": "y"}])
    own = Pairs()
    found = own.load(tmp_path)
    assert found["test"] == [("x", "y")] and len({p for p, _ in found["train"]}) == 27
    assert own.SPLITS == {"train": "train without validation",
                          "validation": "a tenth of train's texts", "test": "test"}


@pytest.mark.parametrize("row, pair",
                         [({"instruction": "Add", "input": "1 2", "output": 3}, ("Add\n1 2", "3")),
                          ({"instruction": "Add", "input": "", "output": "3"}, ("Add", "3")),
                          ({"instruction": "Add", "output": 2.5}, ("Add", "2.5")),
                          ({"instruction": "a", "input": None, "output": "b"}, ("a", "b")),
                          ({"prompt": "is it", "completion": True}, ("is it", "true")),
                          ({"prompt": 1.0, "completion": "x"}, ("1", "x"))])
def test_the_columns_that_fine_tuning_files_have(row, pair):
    assert Pairs().row(row, "here") == pair


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("dataset, name, content, message",
                         [("pairs", "a.jsonl", [GOOD, {"prompt": "a", "completion": None}],
                           "line 2: completion must be text, not None"),
                          ("pairs", "a.jsonl", [GOOD, {"prompt": "a", "completion": math.nan}],
                           "line 2: completion must be text, not nan"),
                          ("pairs", "a.jsonl", [GOOD, {"question": "a"}], "line 2: no columns "
                           "prompt and completion, only question"),
                          ("pairs", "a.json", "[{\"prompt\": \"a\", \"completion\": \"b\"}, 3]",
                           "item 2: a JSON object is needed, not int"),
                          ("pairs", "a.json", "[1, 2", "a.json: not JSON"),
                          ("pairs", "a.json", "[]", "a.json is empty"),
                          ("pairs", "a.csv", "prompt;completion\na;\n", "line 2: completion must "
                           "be text"),
                          ("pairs", "a.csv", "prompt,completion\na,b\n".encode("utf-16"),
                           "line 1: not UTF-8 (it begins as UTF-16 does)"),
                          ("pairs", "a.jsonl", [GOOD, GOOD], "1 different texts to train on cannot "
                           "be split"), ("pairs", "a.txt", "hello", "a.txt is not one of .jsonl"),
                          ("pairs", "folder", None, "has no train.jsonl, .json"),
                          ("labels", "a.csv", "text,label\na,x\nb,\n",
                           "line 3: label must be text"),
                          ("labels", "a.jsonl", [{"text": "a", "label": "x"},
                                                 {"text": "a", "text2": "b", "label": "y"}],
                           "line 2: 2 texts, the rows before have 1"),
                          ("labels", "a.csv", "text,label\na,x\nb,x\n", "have the label 'x': "
                           "nothing to tell apart"),
                          ("labels", "a.csv", "text,label\na,1.5\nb,2.5\nc,3.5\n",
                           "for numbers say --regression"),
                          ("regression", "a.csv", "text,label\na,1.5\nb,high\n", "line 3: label "
                           "'high' is not a number"),
                          ("regression", "a.csv", "text,label\na,1.5\nb,inf\n", "line 3: label "
                           "'inf' is not a number"),
                          ("labels", "a.csv", "word,label\na,x\nb,y\n", "line 2: no columns text "
                           "and label, only word, label: name two with --columns")])
def test_a_bad_file_is_a_line_with_its_place(tmp_path, base, small_roberta, capsys, dataset, name,
                                             content, message):
    """Exit code 2, one line with file and line, no run folder."""
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif isinstance(content, list):
        jsonl(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--dataset", "labels", "--regression"] if dataset == "regression" else ["--dataset",
                                                                                     dataset]
    with pytest.raises(SystemExit) as e:
        train.main([*flags, "--data-dir", str(path), "--out", str(tmp_path / "out"), "--model",
                    str(base if dataset == "pairs" else small_roberta)])
    said = capsys.readouterr().err.strip().splitlines()
    assert (e.value.code == 2 and len(said) == 1 and message in said[0]
            and not (tmp_path / "out").exists())


def test_a_label_that_train_lacks_is_named(tmp_path):
    write(tmp_path / "train.csv", TEXTS)
    write(tmp_path / "validation.csv", [TEXTS[0], {"text": "a cloud", "label": "weather"}])
    with pytest.raises(ValueError, match="validation.csv, line 3: label 'weather' is not one of "
                       "train's: animal,"):
        Labels().load(tmp_path)


@pytest.mark.parametrize("labels, expected",
                         [([10, 9, 2], ("2", "9", "10")), (["b", "a", "10"], ("10", "a", "b")),
                          ([1.0, 0.0, 1.0], ("0", "1")), ([True, False, True], ("false", "true"))])
def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet(tmp_path, labels, expected):
    own = Labels()
    own.load(jsonl(tmp_path / "a.jsonl",
                   [{"text": f"t {i}", "label": label} for i in range(4) for label in labels]))
    assert own.LABELS == expected


@pytest.mark.parametrize("columns", [
    ("prompt", "completion"), ("a;b", "c"), ("a;b,c;d,e|f;g,h", "c"), ("p", "x\ty,z;|", "q, r")])
def test_what_separates_the_columns_is_found_beside_quoted_names(tmp_path, columns):
    """A comma, a semicolon, a tab or a |: a quoted name may hold any of them, and more of them than
    separate the columns; so may the fields."""
    rows = [[f"{name} {i}, {i};{i}\t|" for name in columns] for i in range(10)]
    for between, ending in itertools.product(",;\t|", (".csv", ".tsv")):
        quoted = [between.join(f'"{field}"' for field in row) for row in [columns, *rows]]
        plain = [name if not set(name) & set(",;\t|") else f'"{name}"' for name in columns]
        for lines in (quoted, [between.join(plain), *quoted[1:]]):
            file = tmp_path / f"a{ending}"
            file.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
            found = sum(Pairs(columns).load(file).values(), [])
            assert sorted(found) == [("\n".join(row[:-1]), row[-1]) for row in rows]


def test_files_as_programs_write_them(tmp_path):
    """Five megabytes in one line, a blank line, line ends and byte order marks of all kinds."""
    long = {"prompt": "p", "completion": "x" * 5_000_000}
    file = jsonl(tmp_path / "a.jsonl", [GOOD, long, {**GOOD, "prompt": "c"}])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\n") + b" \n")
    found = sum(Pairs().load(file).values(), [])
    assert sorted(found) == [("a", "b"), ("c", "b"), ("p", long["completion"])]


def test_a_table_with_nulls_names_the_row(tmp_path):
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["x", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 2: completion must be text, not None"):
        Pairs().load(tmp_path / "a.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet.*two columns have the same name"):
        Pairs().load(tmp_path / "b.parquet")


# --------------------------------------------------------------------------------------------------
# Longer than the context

def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path, base):
    """The example is in neither texts nor tokens, and the split says it; where none is left it is
    an error."""
    rows = [{"prompt": f"p {i} " + "x " * (60 * (i == 3)), "completion": "c " * 40}
            for i in range(6)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "validation.jsonl", rows[:1])
    jsonl(tmp_path / "test.jsonl", rows[:1])
    found = data.Dataset("pairs", tmp_path).encode(base, from_pretrained(base), 32)
    assert len(found.pairs["train"]) == len(found.examples["train"]) == 5 and found.cut == 7
    assert found.splits["train"] == "train, 1 of 6 dropped: longer than 32 tokens"
    jsonl(tmp_path / "test.jsonl", rows[3:4])
    with pytest.raises(ValueError, match="every record of test leaves no room for its text in a "
                       "context of 32 tokens"):
        data.Dataset("pairs", tmp_path).encode(base, from_pretrained(base), 32)


def test_generate_leaves_out_what_leaves_no_room(tmp_path, base, capsys):
    rows = [{"prompt": f"p {i} " + "x " * (300 * (i == 3)), "completion": "c"} for i in range(6)]
    for split in ("train", "validation", "test"):
        jsonl(tmp_path / f"{split}.jsonl", rows)
    run(tmp_path / "out", "--model", base, "--dataset", "pairs", "--data-dir", tmp_path)
    said = ask(capsys, tmp_path / "out", "--max-new", 3)
    assert ("1 of 6 records leave no room in a context of 256 tokens: left out" in said
            and "5 records, 5 ref" in said)
    jsonl(tmp_path / "test.jsonl", rows[3:4])
    with pytest.raises(SystemExit):
        generate.main([str(tmp_path / "out"), "--max-new", "3"])
    assert "no record of test leaves room for a text" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [(["--columns", "a,b"], "--columns is for --dataset "
                                             "pairs and chat and labels, not for restaurants"),
                                            (["--metric", "bleu"],
                                             "--metric is for --dataset pairs"),
                                            (["--regression"], "--regression is for --dataset "
                                             "labels"),
                                            (["--dataset", "pairs", "--columns", "a"],
                                             "--columns a: two names are needed"),
                                            (["--dataset", "labels", "--columns", "a,b,c,d"],
                                             "two names are needed, or three"),
                                            (["--dataset", "pairs"], "data of your own need "
                                             "--data-dir"),
                                            (["--dataset", "pairs", "--data-dir", "nowhere"],
                                             "data folder nowhere does not exist"),
                                            (["--dataset", "labels", "--regression",
                                              "--label-smoothing", ".1", "--data-dir", "x"],
                                             "is for classes")])
def test_flags_that_do_not_fit_are_a_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        train.main([*flags, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert (e.value.code == 2 and len(said) == 1 and message in said[0]
            and not (tmp_path / "out").exists())


def test_the_page_on_own_data_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """Its files and its commands, with few steps: pairs, conversations, labels and a book."""
    page = (ROOT / "data/README.md").read_text()
    files = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    for name, text in [*files, ("book.txt", "It was the best of times , it was the worst . " * 99)]:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
                for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        _, script, *flags = shlex.split(command)
        if script == "compare.py":  # its runs have tests of their own
            assert set(compare.parse(flags).rows) > {"lora", "reslora input"}
            continue
        (train if script == "train.py"
         else generate).main([*flags, *["--steps", "2"] * (script == "train.py"),
                              *(["--max-new", "3"] if script == "generate.py"
                                and "opinions" not in command else [])])
    assert capsys.readouterr().out.count("everything is in") == 4


def test_what_moves_a_terminal_s_cursor_is_written_out(tmp_path, capsys):
    """A foreign file's control characters, in a message that quotes it."""
    rows = [{"text": "a", "label\x1b[2J\x07": "x"}, {"text": "b", "label\x1b[2J\x07": "y"}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        train.main(["--dataset", "labels", "--data-dir", str(path), "--out", str(tmp_path / "o")])
    said = capsys.readouterr().err
    assert said.rstrip("\n").isprintable() and "label\\x1b[2J\\x07" in said


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--grad-accum"])
def test_a_number_that_nobody_means_is_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} must be at most"):
        train.parse([flag, str(10**12)])
