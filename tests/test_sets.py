"""The papers' sets: rows as the hub has them, and scores as the reference implementations give
them."""
import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext

import fake_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import DATA, ROOT

import data
import train
from checkpoints import hub
from checkpoints.pretrained import from_pretrained
from data import sets
from evaluation import decoding, evaluate, metrics

# one row of each split, as the hub's
ROWS = {"svamp": [{"ID": "chal-1", "Body": "Dan has 8 pens and lost 2 pens.",
                   "Question": "How many has he?", "Equation": "( 8.0 - 2.0 )", "Answer": "6.0",
                   "Type": "Subtraction"}], "mathqa": [{"Problem": "a train runs 100 m in 5 s . "
                                                        "its speed ?", "Rationale": "100 / 5 = 20",
                                                        "correct": "c", "options": "a ) 5 , b ) 10 "
                                                        ", c ) 20 , d ) 50 , e ) none",
                                                        "annotated_formula": "divide(100, 5)",
                                                        "linear_formula": "divide(n0,n1)|",
                                                        "category": "physics"}],
        "metamathqa": [{"type": "GSM_Rephrased", "query": "What is 2 + 2?",
                        "original_question": "What is 2 + 2?", "response": "2 + 2 = 4.\n#### "
                        "4\nThe answer is: 4"}],
        "webnlg": [{"input": ["A | capital | B", "B | country | C"], "target": "B, in C, is the "
                    "capital of A.", "references": [], "category": "City",
                    "webnlg_id": "train/City/1"}],
        "xsum": [{"document": "A long article. It goes on.", "summary": "An article.", "id": "1"}]}
SWAG = {"activity_label": "Making tea", "ctx_a": "A pot [title] stands here.", "ctx_b": "he",
        "source_id": "x", "endings": ["pours it.", "eats  the pot.", "sings [step] loud.", "goes."],
        "label": "2", "split": "val"}
ROWS["openorca"] = [{"system_prompt": "Be kind.", "question": "Who?", "response": "You."}]
ROWS["e2e"] = [{"meaning_representation": "name[A], food[B]", "human_reference": "A serves B."}]
ROWS["gsm8k"] = [{"question": "1 + 1 ?", "answer": "1 + 1 = 2\n#### 2"}]
ROWS |= {"hellaswag": [SWAG], "hellaswag-generated": [SWAG]}
PAIR = {"svamp": ("Dan has 8 pens and lost 2 pens. How many has he?", "6"),
        "mathqa": ("a train runs 100 m in 5 s . its speed ? a ) 5 , b ) 10 , c ) 20 , d ) 50 , e ) "
                   "none", "c"), "metamathqa": ("Question: What is 2 + 2? Think step by "
                                                "step.\nAnswer:", "2 + 2 = 4.\n#### 4\nThe answer "
                                                "is: 4"), "webnlg": ("A | capital | B && B | "
                                                                     "country | C", "B, in C, is "
                                                                     "the capital of A."),
        "xsum": ("A long article. It goes on.", "An article."),
        "openorca": ("Be kind.\nWho?", "You."), "e2e": ("name[A], food[B]", "A serves B."),
        "gsm8k": ("1 + 1 ?", "1 + 1 = 2\n#### 2"), "hellaswag": ("Making tea: A pot. stands here. "
                                                                 "He", "sings loud."),
        "hellaswag-generated": ("Making tea: A pot. stands here. He 1) pours it. 2) eats the pot. "
                                "3) sings loud. 4) goes.", "The answer is 3.")}
# texts, and how many of them are right
TEXTS = {"svamp": (["6", "It is 6.0 .", "1 or 7", "none"], 2),
         "mathqa": (["c", "c ) 20", "a", "20"], 2),
         "metamathqa": (["So #### 4", "The answer is: 4.0", "The answer is: $5", "4"], 2)}


def folder(tmp_path, name, rows):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(seed, n):
    rng = random.Random(seed)
    some = "the a cat dog sat on mat hat and red".split()
    return [" ".join(rng.choice(some) for _ in range(rng.randint(4, 12))) for _ in range(n)]


@pytest.mark.parametrize("name", sets.SETS)
def test_a_row_of_the_hub_is_a_prompt_and_its_target(tmp_path, name):
    """Ten rows a split; where the hub has no validation or no test split a tenth of train is held
    out for it, and the splits say so."""
    found = data.load(name, folder(tmp_path, name, ROWS[name] * 10))
    assert set(found["test"]) == {PAIR[name]}
    sizes = {"openorca": [8, 1, 1]}.get(name, [9, 1, 10] if name in (
        "gsm8k", "svamp", "metamathqa", "hellaswag", "hellaswag-generated") else [10, 10, 10])
    assert [len(found[split]) for split in sets.NAMES] == sizes
    said = data.about(name, "SPLITS")
    assert said["validation"] == ("validation" if sizes[0] == 10 else "1 rows of train")
    assert said["train"] == ("train" if sizes[0] == 10 else f"{sizes[0]} rows of train")


def test_what_is_held_out_is_at_most_500_rows_and_always_the_same(tmp_path):
    """Of 5,020 rows; each row is in one split, and train keeps its order."""
    rows = [{**ROWS["openorca"][0], "response": f"answer {i}"} for i in range(5020)]
    found = data.load("openorca", folder(tmp_path, "openorca", rows))
    numbers = {split: [int(text.split()[1]) for _, text in found[split]] for split in sets.NAMES}
    assert [len(numbers[split]) for split in sets.NAMES] == [5020 - 500 - 452, 500, 452]
    assert sorted(sum(numbers.values(), [])) == list(range(5020))
    assert all(some == sorted(some) for some in numbers.values())
    assert numbers["validation"][:4] == [0, 1, 9, 12] and numbers["test"][:4] == [2, 3, 13, 16]


def test_hellaswag_is_judged_by_the_likeliest_ending(tmp_path, base, monkeypatch):
    """acc and acc_norm of ten rows, by hand: each ending alone behind its text, the sum of its log
    probabilities."""
    rows = [{**SWAG, "ctx_a": f"A pot {i} stands", "label": i % 4, "endings": words(i, 4)}
            for i in range(10)]
    dataset = data.Dataset("hellaswag",
                           folder(tmp_path, "hellaswag", rows)).encode(base, from_pretrained(base),
                                                                       64)
    model = from_pretrained(base)
    with torch.no_grad():
        model.wte.weight.mul_(5)
    found = evaluate.choose(model, dataset, dataset.pairs["test"], torch.device("cpu"),
                            nullcontext())
    hits = {"acc_norm": 0, "acc": 0}
    for row in rows:
        query = f"Making tea: {row['ctx_a']} He"
        scores = []
        for ending in row["endings"]:
            ids = [319, *dataset.tokenizer.encode_ordinary(f"{query} {ending}")]
            start = 1 + len(dataset.tokenizer.encode_ordinary(query))
            logp = model(torch.tensor([ids]))[0][0].log_softmax(1)
            scores.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
        for name, values in (("acc", scores),
                             ("acc_norm",
                              [s / len(e) for s, e in zip(scores, row["endings"], strict=True)])):
            hits[name] += max(range(4), key=values.__getitem__) == row["label"]
        encoded, _ = dataset.task.encode([(query, ending) for ending in row["endings"]])
        encoded = [(ids[:-1], start) for ids, start in encoded]
        nats = evaluate.log_likelihoods(
            model, encoded, dataset.task, torch.device("cpu"), nullcontext())
        assert nats == pytest.approx(scores, abs=1e-3)
    assert found == {name: n / 10 for name, n in hits.items()} and found["acc"] != found["acc_norm"]
    asked = []
    monkeypatch.setattr(evaluate, "log_likelihoods", lambda _, encoded, *more: (
        asked.extend(encoded) or [0] * 4))
    evaluate.choose(model, dataset, dataset.pairs["test"][:1], torch.device("cpu"), nullcontext())
    assert len(asked) == 4 and all(ids[-1] != dataset.tokenizer.eos for ids, _ in asked)


def test_a_run_on_hellaswag_selects_by_acc_norm(tmp_path, base):
    rows = [{**SWAG, "ctx_a": f"A pot {i} stands", "label": str(i % 4)} for i in range(20)]
    result = train.main(["--dataset", "hellaswag", "--data-dir",
                         str(folder(tmp_path, "hellaswag", rows)), "--model", str(base), "--rank",
                         "2", "--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "out")])
    assert result["selected"]["by"] == "validation acc_norm"
    assert result["metrics"]["merged"].keys() >= {"loss", "acc", "acc_norm"}


@pytest.mark.parametrize("name", TEXTS)
def test_a_right_answer_is_the_number_or_the_letter_that_it_ends_with(tmp_path, name):
    data.load(name, folder(tmp_path, name, ROWS[name] * 10))
    texts, right = TEXTS[name]
    for text, expected in zip(texts, [1.0] * right + [0.0] * (len(texts) - right), strict=True):
        assert data.module(name).score([PAIR[name]], [text]) == {"exact_match": expected}, text


def test_metamathqa_is_tested_on_gsm8k(tmp_path):
    folder(tmp_path, "metamathqa", ROWS["metamathqa"] * 10)
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1 + 1 ?",
                                                     "answer": "1 + 1 = 2\n#### 2"}))
    found = data.load("metamathqa", tmp_path)
    assert found["test"] == [("Question: 1 + 1 ? Think step by step.\nAnswer:",
                              "1 + 1 = 2\n#### 2")]
    assert data.module("metamathqa").score(found["test"],
                                           ["... The answer is: 2"]) == {"exact_match": 1.0}


def test_what_is_decoded_begins_as_what_was_trained(tmp_path, base, monkeypatch):
    """MetaMathQA has no " ||" behind its prompts, neither in training nor where its texts are
    written and judged."""
    model, begun = from_pretrained(base), []
    monkeypatch.setattr(decoding, "generate",
                        lambda model, batch, *args: begun.extend(batch) or [[] for _ in batch])
    found = data.Dataset("metamathqa",
                         folder(tmp_path, "metamathqa",
                                ROWS["metamathqa"] * 10)).encode(base, model, 64)
    evaluate.measure(model, found, "test", torch.device("cpu"), nullcontext())
    assert begun == [ids[:start] for ids, start in found.examples["test"]] and len(begun) == 10


def test_webnlg_is_judged_by_all_references_and_by_category(tmp_path):
    """A record with several references is one record; scores of seen and unseen categories are
    those of their parts."""
    folder(tmp_path, "webnlg", ROWS["webnlg"] * 3)
    test = [{"input": [f"A{i} | capital | B"], "target": "x",
             "category": "City" if i % 2 else "Airport",
             "references": [f"B is the capital of A{i} .", f"the capital of A{i} is B ."]}
            for i in range(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    pairs = data.load("webnlg", tmp_path)["test"]
    assert len(pairs) == 12
    # every second text is that of the second reference of a record, and is not looked at
    texts = [f"the capital of A{i // 2} is {'C' if i in (0, 8) else 'B'} ." if i % 2 == 0 else "no"
             for i in range(12)]
    found = data.module("webnlg").score(pairs, texts)
    references = [row["references"] for row in test]
    assert found["bleu"] == metrics.bleu(texts[::2],
                                         references) and found["ter"] == metrics.ter(texts[::2],
                                                                                     references)
    for name, part in (("unseen", slice(0, None, 2)), ("seen", slice(1, None, 2))):
        assert found[f"bleu ({name})"] == metrics.bleu(texts[::2][part], references[part])
    assert found["bleu (unseen)"] < found["bleu"] < found["bleu (seen)"]


@pytest.mark.parametrize("name, change, message", [
    ("svamp", {"Answer": "six"}, "line 1: Answer must be a number, not 'six'"),
    ("svamp", {"Body": ""}, "line 1: Body must be text"),
    ("mathqa", {"correct": "f"}, "line 1: correct must be a letter"),
    ("webnlg", {"input": "A | b | C"}, "line 1: input must be a list of texts"),
    ("webnlg", {"target": None}, "line 1: references must be text, not None"),
    ("hellaswag", {"endings": ["a"]}, "line 1: endings must be a list of four texts"),
    ("hellaswag", {"label": ""}, "line 1: label must be text"),
    ("hellaswag", {"label": 4}, "line 1: label must be a number of 0"),
    ("xsum", {"summary": None}, "line 1: summary must be text"),
    ("openorca", {"system_prompt": None}, "line 1: system_prompt must be text"),
    ("metamathqa", {"query": 3}, "line 1: query must be text")])
def test_a_bad_row_is_named(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, folder(tmp_path, name, [{**ROWS[name][0], **change}] * 3))


@pytest.mark.skipif(not DATA, reason="the released sets: set DATA to a folder with svamp/ and "
                    "webnlg/")
def test_the_real_sets(tmp_path):
    """As released: SVAMP's 700 and 300, WebNLG's references."""
    found = data.load("svamp", f"{DATA}/svamp")
    assert [len(found[split]) for split in ("train", "validation", "test")] == [630, 70, 300]
    assert all(float(target) >= 0 for _, target in found["test"])
    found = data.load("webnlg", f"{DATA}/webnlg")
    assert (len(found["train"]) == 1702 and len({prompt for prompt, _ in found["test"]}) <= 108
            < len(found["test"]))


# --------------------------------------------------------------------------------------------------
# The hub

LOAD = """import json, sys
from data import sets
for name in sys.argv[1:]:
    try:
        found = {split: (len(rows), rows[0]) for split, rows in sets.SETS[name].load().items()}
    except ValueError as e:
        found = str(e)
    print("found", json.dumps(found))"""


def from_hub(address, cache, *names):
    """[the splits of a set, or the error] in a fresh process that may ask the hub."""
    ask = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
           "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", LOAD, *names], cwd=ROOT, capture_output=True,
                          text=True, timeout=100, env={**os.environ, **ask})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")]


def test_a_set_comes_from_the_hub_and_afterwards_from_its_cache(tmp_path):
    """By `datasets`, of a revision where there is one; without the hub the files that it has kept;
    where there are none, and after a stream, which keeps nothing, one line."""
    names = {"svamp": "data/{}-00000-of-00001.parquet", "xsum": "default/{}/0000.parquet",
             "openorca": "1M-GPT4-Augmented.parquet"}
    for name, file in names.items():
        for split in sets.SETS[name].FILES:
            path = tmp_path / "repo" / file.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[name] * 30), path)
    with fake_hub.serve(tmp_path / "repo") as (address, asked):
        found = from_hub(address, tmp_path / "cache", *names)
    sizes = {"svamp": (27, 3, 30), "xsum": (30, 30, 30), "openorca": (25, 3, 2)}
    assert found == [{split: [n, list(PAIR[name])] for split, n in zip(
        sets.NAMES, sizes[name], strict=True)} for name in names]
    converted = [path for path in asked if "refs%2Fconvert%2Fparquet" in path]
    assert converted and all("xsum" in path for path in converted)
    gone = [f"dataset {sets.SETS[name].HUB}: the hub does not answer" for name in names]
    again = from_hub(address, tmp_path / "cache", *names)
    assert again[:2] == found[:2] and again[2].startswith(gone[2])
    for said, start in zip(from_hub(address, tmp_path / "empty", *names), gone, strict=True):
        assert said.startswith(start) and "or give --data-dir a" in said


@pytest.mark.parametrize("name, file", [("svamp", "train"), ("glue/mnli", "validation_matched")])
def test_a_hub_that_does_not_answer_is_waited_for_once(no_network, monkeypatch, name, file):
    """Five seconds at most, not five for each of the ways to ask; then a line says what to do."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda url: asked.append(url))
    with pytest.raises(ValueError, match=f"give --data-dir a folder with .*{file}.jsonl"):
        data.load(name)
    assert len(asked) == 1 and asked[0].startswith("http://127.0.0.1:9/api/datasets/")
