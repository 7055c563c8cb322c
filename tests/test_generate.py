"""generate.py: what a run folder writes, from the command line."""
import contextlib
import json
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import tokens
from test_train import command, few_records  # noqa: F401

import data
import generate
import lora
import train
from checkpoints import tokenizers
from checkpoints.pretrained import from_pretrained, save_pretrained
from evaluation import evaluate
from methods import METHODS

RECORD = "name : The Mill | food : Italian"


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """A finished run of a method, made once for each set of flags."""
    made = {}

    def of(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("run") / "out"
            train.main(command(base, made[flags], *flags))
        return made[flags]
    return of


def written(capsys, *argv):
    """(what generate.py returns, what it prints)"""
    capsys.readouterr()
    found = generate.main([str(a) for a in argv])
    return found, capsys.readouterr().out


@pytest.mark.parametrize("method", [name for name in METHODS if name != "head"])
def test_every_run_writes_merged_and_unmerged(run, capsys, method):
    """The text streamed for a record is that of the merged model; the method's own layers, with the
    weights that the run kept, give the unmerged one, the same for exact methods."""
    folder = run("--method", method, "--save-merged", "--lr", "0.1")
    idx = tokens(V=320)[0]
    merged, settings, source = generate.load_run(folder)
    assert not any(isinstance(m, lora.LoRALinear) for m in merged.modules())
    torch.testing.assert_close(merged(idx)[0], from_pretrained(folder / "merged")(idx)[0],
                               rtol=1e-4, atol=1e-5)
    assert (merged(idx)[0] - from_pretrained(source)(idx)[0]).abs().max() > 1e-3
    unmerged, _, _ = generate.load_run(folder, unmerged=True)
    _, task = data.task("restaurants", source, unmerged, settings["context"])
    args = train.parse(command(source, folder))
    loss = evaluate.evaluate(unmerged, task.encode(data.load("restaurants")["test"])[0], task,
                             args.device, args.amp)[0]
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert loss == pytest.approx(metrics["trained" if method == "full" else "unmerged"]["loss"],
                                 abs=1e-5)
    texts = [written(capsys, folder, RECORD, "--max-new", "12", *flags)[1]
             for flags in ((), ("--unmerged",))]
    assert texts[0] == texts[1] or method == "reslora"


@pytest.mark.parametrize("of, dataset, method", [
    *(("small_roberta", "reviews", method) for method in ("reslora", "dylora", "lokr", "full")),
    *(("small_llama", "restaurants", method) for method in ("deltalora", "loha", "lokr", "full"))])
def test_a_run_is_read_whatever_the_base_and_the_form_of_its_adapter(
        tmp_path, request, method, of, dataset):
    """PEFT's own LoHa and LoKr too, which only GPT-2 has as a plain LoRA."""
    source = request.getfixturevalue(of)
    flags = "--dataset", dataset, "--method", method, "--save-merged", "--lr", "0.1"
    train.main(command(source, tmp_path, *flags))
    model = from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours, _, _ = generate.load_run(tmp_path)
    idx, near, q = tokens(V=320)[0], 1e-4, "h.0.attn.q.weight"
    assert not any(isinstance(m, lora.LoRALinear) for m in ours.modules())
    if of == "small_llama":  # a base in bf16: merged/ is rounded
        ours, near = ours.bfloat16().float(), 1e-2
    torch.testing.assert_close(ours(idx)[0], model(idx)[0], rtol=near, atol=near)
    assert not any(m.training for m in generate.load_run(tmp_path)[0].modules())
    moved = ours.state_dict()[q] - from_pretrained(source).state_dict()[q]
    assert moved.abs().max() > 1e-2


def test_a_run_on_masked_tokens_does_not_write(tmp_path, capsys, small_roberta):
    """A RoBERTa without classes: one line, with a text, with beams and without a text."""
    train.main(command(small_roberta, tmp_path, "--dataset", "opinions"))
    for argv in (["a text"], ["a text", "--beams", "2"], ["a text", "--unmerged"], []):
        assert (f"{tmp_path} predicts masked tokens: it cannot write texts"
                in refused(capsys, tmp_path, *argv))


def test_pairs_and_single_texts_are_classified_in_one_call(tmp_path, capsys, small_roberta):
    """Each as if it stood alone."""
    train.main(command(small_roberta, tmp_path, "--dataset", "reviews"))
    alone = [written(capsys, tmp_path, text)[1].strip() for text in ("good || bad", "good")]
    both = written(capsys, tmp_path, "good || bad", "good")[1]
    assert both == f"good || bad\n  -> {alone[0]}\ngood\n  -> {alone[1]}\n" and alone[0] != alone[1]


def test_the_first_of_two_bars_separates_two_texts(small_roberta):
    """"good || bad || fine" is the pair of "good" and "bad || fine", framed as RoBERTa's pairs."""
    tok, read = tokenizers.RobertaTokenizer(small_roberta, 325), []

    def model(idx):
        read.extend(idx.tolist())
        return torch.zeros(1, 2), None
    settings = {"labels": ["no", "yes"], "context": 64}
    args = Namespace(device="cpu", amp=contextlib.nullcontext())
    generate.classify(model, tok, ["good || bad || fine"], settings, args)
    a, b = tok.encode_ordinary("good"), tok.encode_ordinary("bad || fine")
    assert read == [[0, *a, 2, 2, *b, 2]]


def test_a_dylora_run_writes_at_any_rank(run):
    """--cut b is alpha / b times the first b ranks of what was trained; merged or not."""
    folder = run("--method", "dylora", "--lr", "0.1")
    idx, found = tokens(V=320)[0], []
    for cut in (1, 2, 4):
        merged, unmerged = (generate.load_run(folder, unmerged, cut)[0](idx)[0]
                            for unmerged in (False, True))
        torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-5)
        found.append(merged)
    assert (found[0] - found[1]).abs().max() > 1e-4
    torch.testing.assert_close(found[2], generate.load_run(folder)[0](idx)[0], rtol=1e-4, atol=1e-5)


def test_a_split_is_written_scored_and_kept(run, capsys, monkeypatch):
    """One line a record with its text and all its references, in the order of the split, whatever
    the batches; the scores of the dataset and of translation."""
    folder = run("--method", "lora")
    real = data.load

    def load(*args):
        found = real(*args)
        found["test"] += [(record, text + " indeed") for record, text in found["test"][:3]]
        return found
    monkeypatch.setattr(data, "load", load)
    one, out = written(capsys, folder, "--batch-size", "1", "--max-new", "9", "--out",
                       folder / "one.jsonl")
    many, _ = written(capsys, folder, "--batch-size", "5", "--max-new", "9")
    assert one == many and {"slots", "names", "BLEU", "NIST", "ROUGE_L"} <= set(one)
    rows = [json.loads(line) for line in open(folder / "predictions-test.jsonl")]
    assert rows == [json.loads(line) for line in open(folder / "one.jsonl")]
    test = load("restaurants")["test"]
    assert [row["record"] for row in rows] == list(dict.fromkeys(record for record, _ in test))
    assert rows[0]["references"] == [test[0][1],
                                     test[0][1] + " indeed"] and "12 records, 15 references" in out
    few, _ = written(capsys, folder, "--first", "2", "--split", "validation", "--max-new", "3")
    assert len(open(folder / "predictions-validation.jsonl").readlines()) == 2 and few["BLEU"] >= 0


def test_texts_stay_beside_their_records(run, capsys, monkeypatch):
    """Decoded sorted by length, in batches: a model that says its prompt again shows that none is
    mixed up."""
    folder = run("--method", "lora")
    monkeypatch.setattr(generate.decoding, "generate", lambda model, prompts, *rest, **how: prompts)
    written(capsys, folder, "--batch-size", "5")
    rows = [json.loads(line) for line in open(folder / "predictions-test.jsonl")]
    assert len({row["text"] for row in rows}) == 12
    assert all(row["text"] == f"<|endoftext|>{row['record']} ||" for row in rows)


def test_the_weights_that_were_kept_are_those_that_write(tmp_path, base, monkeypatch):
    """Not the last ones: after a better validation at step 2 of 6, the unmerged model is that of
    step 2."""
    losses = iter([0, 1, 2, 3, 0, 0])

    def rising(*args, real=evaluate.evaluate):
        loss, logits = real(*args)
        return loss + next(losses), logits
    monkeypatch.setattr(evaluate, "evaluate", rising)
    assert train.main(command(base, tmp_path, "--lr", "0.1"))["selected"]["step"] == 2
    idx = tokens(V=320)[0]
    merged, unmerged = (generate.load_run(tmp_path, unmerged)[0](idx)[0]
                        for unmerged in (False, True))
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-5)


def test_flags_stand_anywhere_and_a_seed_draws_its_texts(run, capsys, tmp_path):
    """Before, between and behind the texts. The same seed is the same texts over a whole split,
    which is written in batches, and another seed others."""
    folder, n = run("--method", "lora"), ["--max-new", "3"]
    texts = [written(capsys, *argv)[1] for argv in (
        (folder, RECORD, "x", *n), (*n, folder, RECORD, "x"), (folder, *n, RECORD, "x"))]
    assert texts[0] == texts[1] == texts[2] and texts[0].count("\n") == 2
    drawn = []
    for seed in (1, 1, 2):
        written(capsys, folder, "--first", 6, "--batch-size", 2, "--max-new", 8, "--temperature", 3,
                "--seed", seed, "--out", tmp_path / "a.jsonl")
        drawn.append((tmp_path / "a.jsonl").read_text())
    assert drawn[0] == drawn[1] != drawn[2]


def test_streamed_text_is_the_text(run, capsys):
    """What comes token by token is what decoding gives as a whole, characters of several tokens
    whole too; drawing with a seed repeats itself; beams print theirs at the end."""
    folder = run("--method", "lora")
    for flags in ((), ("--temperature", "2", "--seed", "3"),
                  ("--temperature", "2", "--top-k", "40", "--seed", "4"),
                  ("--beams", "3", "--length-penalty", ".9")):
        out = written(capsys, folder, RECORD, "--max-new", "40", *flags)[1]
        assert out == written(capsys, folder, RECORD, "--max-new", "40", *flags)[1] and out.strip()
    model, _, source = generate.load_run(folder)
    tokenizer, task = data.task("restaurants", source, model, 256)
    prompt = [tokenizer.bos, *tokenizer.encode_ordinary(RECORD + " ||")]
    assert task.prompt(RECORD) == prompt
    ids = generate.decoding.generate(model, [prompt], 40, tokenizer.eos, temperature=2.0, seed=3)[0]
    out = written(capsys, folder, RECORD, "--max-new", "40", "--temperature", "2", "--seed", "3")[1]
    assert out == tokenizer.decode(ids).lstrip() + "\n"


@pytest.mark.parametrize("flags, message", [(["--max-new", "0"], "--max-new must be 1 or more, not "
                                             "0"), (["--beams", "2", "--temperature", "1"],
                                                    "choose one"),
                                            (["--temperature", "-1"], "--temperature -1.0"),
                                            (["--temperature", "nan"], "--temperature nan"),
                                            (["--top-k", "5"],
                                             "says nothing without --temperature"),
                                            (["--length-penalty", "1e9"], "--length-penalty"),
                                            (["--cut", "2"], "--cut 2 is for a DyLoRA run"),
                                            (["--dataset", "reviews"],
                                             "is not one of texts to write"),
                                            (["--dataset", "stdlib"], "has no records"),
                                            (["a text", "--dataset", "e2e"], "not both"),
                                            (["--split", "dev"], "invalid choice: 'dev'"),
                                            (["x " * 900], "leaves no room in a context of 256"),
                                            (["--data-dir", "."], "restaurants is generated"),
                                            (["--out", "/proc/none"],
                                             "/proc/none cannot be written"),
                                            (["--beams", "101"], "--beams must be at most 100"),
                                            (["--seed", "-1"], "--seed must be in 0..2^62 - 1, not "
                                             "-1"), (["--out", "."], "--out . cannot be written"),
                                            (["--out", "no/such"],
                                             "--out no/such cannot be written"),
                                            (["a text", "--split", "test"], "not both")])
def test_bad_flags(run, capsys, flags, message):
    """One line, exit code 2."""
    assert message in refused(capsys, run("--method", "lora"), *flags)


def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        generate.main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("generate.py: ") and err.count("\n") == 1, err
    return err


def test_predictions_stand_in_the_run_folder_and_never_replace_the_run(run, capsys):
    """Under their own name, given in full; the names of the run's own files are refused."""
    folder = run("--method", "lora")
    file = folder / "predictions-test.jsonl"
    written(capsys, folder, "--first", "1", "--max-new", "2", "--out", file)
    assert len(file.read_text().splitlines()) == 1
    for name in ("result.json", "resume.safetensors", "log.csv", "adapter_model.safetensors"):
        assert "is a file of the run itself" in refused(capsys, folder, "--out", folder / name)


def test_a_run_is_found_from_elsewhere(tmp_path, base, capsys, monkeypatch):
    """--model and --init-from by relative paths; an adapter that has changed since is refused, as
    is --out in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    train.main(command("base", "first"))
    flags = ["--model", "base", "--init-from", "first", "--steps", "2", "--batch-size", "4"]
    train.main([*flags, "--out", "second"])
    monkeypatch.chdir("/")
    assert written(capsys, tmp_path / "second", RECORD, "--max-new", "3", "--unmerged")
    config = tmp_path / "first/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 2'))
    assert "has changed since" in refused(capsys, tmp_path / "second", RECORD, "--unmerged")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", "first"])
    assert "--init-from first lies in the run folder" in capsys.readouterr().err and config.exists()


@pytest.mark.parametrize("change, message", [
    ({"method": "qlora"}, "not known here"), ({"dataset": "poems"}, "not known here"),
    ({"pre_num": "x"}, "wrong kind"), ({"shortcut": None}, "shortcut None is not one of"),
    ({"shortcut": ...}, "needs shortcut"), ({"rank": None}, "needs rank"),
    ({"dataset": "pairs", "metric": "x"}, "metric 'x' is not one of"),
    (None, "holds no settings"), ("labels", "labels [1] are no labels of a run")])
def test_a_setting_that_is_missing_or_of_another_kind(run, tmp_path, capsys, change, message):
    """A line that names it."""
    folder = shutil.copytree(run("--method", "reslora"), tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    if change == "labels":
        result["labels"] = [1]
    else:
        changed = {**result["settings"], **(change or {})}
        changed = {name: value for name, value in changed.items() if value is not ...}
        result = {"settings": changed} if change else {}
    (folder / "result.json").write_text(json.dumps(result))
    flags = ["--unmerged"] * ("metric" not in (change or {}))
    assert message in refused(capsys, folder, RECORD, *flags)


def test_folders_that_are_no_run(run, tmp_path, base, capsys, small_roberta):
    """Nothing there, damaged files, a classifier without texts, a base that has changed since."""
    assert "result.json does not exist" in refused(capsys, tmp_path, RECORD)
    shutil.copytree(run("--method", "lora"), tmp_path / "run")
    file = tmp_path / "run/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in refused(capsys, tmp_path / "run", RECORD)
    (tmp_path / "run/resume.safetensors").unlink()
    assert "resume.safetensors does not" in refused(capsys, tmp_path / "run", RECORD, "--unmerged")
    train.main(command(small_roberta, tmp_path / "label", "--dataset", "reviews"))
    assert "is a classifier: give it texts" in refused(capsys, tmp_path / "label")
    shutil.copytree(base, tmp_path / "base")
    train.main(command(tmp_path / "base", tmp_path / "other"))
    model = from_pretrained(base)
    model.wte.weight.data *= 1.5
    save_pretrained(model, tmp_path / "base")
    assert "has other weights than those" in refused(capsys, tmp_path / "other", RECORD)
