"""What no equation says: flags that are passed on, defaults, notes, limits, and what an earlier run
leaves."""
import contextlib
import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_roberta
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_own_data import PAIRS, jsonl
from test_train import command, few_records, weights  # noqa: F401

import compare
import data
import generate
import train
from checkpoints.files import read_csv
from checkpoints.pretrained import from_pretrained, save_pretrained
from evaluation import evaluate
from run import flags, folder
from run.owner import AGAIN, LOG, STATE


def test_the_default_in_a_help_is_the_default():
    """(.06) at the end of a flag's help."""
    found = {}
    for action in flags.parser("")._actions:
        said = re.search(r"\((\.?\d[\d.]*)\)$", action.help or "")
        if said and isinstance(action.default, (int, float)):
            found[action.dest] = (float(said[1]), action.default)
    assert len(found) > 5 and all(said == default for said, default in found.values()), found


def test_a_dataset_takes_the_small_model_that_fits_it(capsys):
    """Texts to classify, and lines with masked tokens, go to the RoBERTa. A flag that does nothing
    says so, once it is given, and only then."""
    for dataset, model in (("opinions", "roberta"), ("reviews", "roberta"), ("stdlib", "gpt")):
        assert train.parse(["--dataset", dataset]).model == f"tiny-{model}"
    train.parse(["--method", "full"])
    assert "does nothing" not in capsys.readouterr().out
    train.parse(["--method", "full", "--rank", "4"])
    out = capsys.readouterr().out
    assert "--rank does nothing" in out and out.count("does nothing") == 1


def test_clip_0_is_no_clipping(tmp_path, base):
    """As the largest norm would be; a small one changes the run."""
    flags = "--optimizer", "sgd", "--lr", "1"
    runs = [train.main(command(base, tmp_path / clip, *flags, "--clip", clip))
            and weights(tmp_path / clip) for clip in ("0", "1e9", "1e-3")]
    same = [all(torch.equal(runs[0][name], other[name]) for name in other) for other in runs[1:]]
    assert same == [True, False]


def test_what_a_run_writes_and_what_it_is_made_longer_to(tmp_path, base):
    """The last of five steps is validated whatever the interval, everybody may read the files
    (safetensors alone would be readable by their owner only), PEFT trains on with this dropout and
    --init-from with its own. 64 texts, 8 a step: --epochs 2 makes it a run of 16 steps."""
    train.main(command(base, tmp_path, "--steps", "5", "--dropout", "0.25"))
    assert [row["step"] for row in read_csv(tmp_path / "log.csv")] == ["2", "4", "5"]
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir() if file.is_file()}
    assert modes == {0o644}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    again = {"init_from": tmp_path, "dropout": 0.5}
    assert {layer.drop.p for layer in folder.adapters_of(from_pretrained(base), again)[1]} == {0.5}
    train.main(["--resume", "--out", str(tmp_path), "--epochs", "2"])
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["steps"] == 16


def test_a_base_is_measured_again_in_another_context_or_by_another_metric(tmp_path, base, capsys):
    """Beside a run of the same context and metric its report is taken over."""
    jsonl(tmp_path / "pairs.jsonl", PAIRS[:60])
    flags = "--dataset", "pairs", "--data-dir", tmp_path / "pairs.jsonl"
    for name, taken, *own in (("a", False), ("b", True), ("c", False, "--context", "32"),
                              ("d", False, "--metric", "exact")):
        result = train.main(command(base, tmp_path / name, *flags, *own))
        assert ("its report is that of" in capsys.readouterr().out) == taken, name
        assert ("exact_match" in result["metrics"]["base"]) == (name == "d")


def test_a_base_is_measured_again_with_another_adapter_or_none(tmp_path, base):
    """A run that goes on from an adapter begins at the loss that this adapter was merged with,
    whatever the runs beside it began with; one without an adapter begins at that of the base."""
    first = {None: None}
    for seed in "1", "2":
        made = train.main(command(base, tmp_path / seed / "out", "--seed", seed))["metrics"]
        first |= {seed: made["merged"]["loss"], None: made["base"]["loss"]}
    assert len(set(first.values())) == 3
    for name, seed in ("a", "1"), ("b", "2"), ("c", None), ("d", "1"):
        flags = ["--init-from", tmp_path / seed / "out"] if seed else ["--rank", "4"]
        flags += ["--model", base, "--steps", "1", "--out", tmp_path / "beside" / name]
        found = train.main(list(map(str, flags)))["metrics"]["base"]["loss"]
        assert found == pytest.approx(first[seed], abs=1e-5), name


@pytest.mark.parametrize("again", [(), ("--resume", "--merge", "none")])
def test_what_an_earlier_run_or_merge_has_left_is_gone(tmp_path, base, again):
    """Texts, pictures and a merged model of other weights must not stand beside the new adapter."""
    flags = command(base, tmp_path, "--method", "reslora")
    train.main([*flags, "--save-merged"])
    generate.main([str(tmp_path), "--max-new", "1"])
    old = ["predictions-test.jsonl", *["merged/config.json", "merged"] * (not again)]
    assert all((tmp_path / name).exists() for name in old)
    train.main(["--out", str(tmp_path), *again] if again else flags)
    assert not [name for name in old if (tmp_path / name).exists()]


def test_a_finished_run_stays_until_another_has_finished(tmp_path, base, monkeypatch):
    """The same run again, stopped between two validations: every file of the first one is as it
    was, and generate.py uses it; the second goes on with --resume, and takes its place."""
    flags = command(base, tmp_path)
    train.main(flags)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix}
    validate, calls = train.evaluate.validate, []

    def stopping(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args)
        return validate(*args)
    monkeypatch.setattr(train.evaluate, "validate", stopping)
    with pytest.raises(SystemExit):
        train.main(flags)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix}
    assert {file.name for file in (tmp_path / AGAIN).iterdir()} == {STATE, LOG}
    generate.load_run(tmp_path, unmerged=True)
    monkeypatch.setattr(train.evaluate, "validate", validate)
    again = train.main(["--resume", "--out", str(tmp_path)])
    assert not (tmp_path / AGAIN).exists() and again["seconds"] != json.loads(
        before["result.json"])["seconds"]
    assert again["metrics"] == json.loads(before["result.json"])["metrics"]


def test_what_changes_no_number_may_change_when_a_run_goes_on():
    """And the rank may not; of settings that differ the one that others follow from is named."""
    for name, before, now in (("compile", False, True), ("checkpoint_activations", True, False),
                              ("save_merged", False, True), ("model", "a", "b"),
                              ("data_dir", "a", "b"), ("init_from", "a", "b")):
        began = {name: before, "rank": 4}
        assert folder.difference(began, {name: now, "rank": 4}) is None
        assert "rank is 8 now" in folder.difference(began, {name: now, "rank": 8})
    follows = {"eval_every": 3, "steps": 6}, {"eval_every": 5, "steps": 10}
    assert "steps is 10 now" in folder.difference(*follows)


def test_a_classifier_s_loss_smooths_its_labels():
    """With 0.3 of the mass on all classes alike."""
    model, idx, targets = tiny_roberta(), torch.randint(2, 61, (5, 9)), torch.tensor([0, 1, 2, 2,
                                                                                      1])
    logits, loss = model(idx, targets, label_smoothing=0.3)
    of = -logits.log_softmax(1)
    by_hand = (0.7 * of[torch.arange(5), targets] + 0.1 * of.sum(1)).mean()
    torch.testing.assert_close(loss, by_hand)
    assert (loss - F.cross_entropy(logits, targets)).abs() > 1e-4


def test_a_model_trains_on_after_texts_were_judged(base):
    """Dropout is on again behind `log_likelihoods`, as behind `evaluate`."""
    model = from_pretrained(base).train()
    _, task = data.task("restaurants", base, model, 256)
    examples = [example for example in task.encode(data.load("restaurants")["test"][:4])[0]
                if example]
    evaluate.log_likelihoods(model, examples, task, torch.device("cpu"), contextlib.nullcontext())
    assert all(module.training for module in model.modules())


def test_a_record_that_fills_the_context_leaves_no_room(base):
    """One token more, and the first token of its text is learned."""
    model = from_pretrained(base)
    (_, start), = data.task("restaurants", base, model,
                            256)[1].encode([("name : The Mill", "a mill")])[0]
    for context, found in ((start, None), (start + 1, start + 2)):
        example, = data.task("restaurants", base, model,
                             context)[1].encode([("name : The Mill", "a mill")])[0]
        assert (example and len(example[0])) == found


def test_a_set_is_cut_where_its_row_says_and_holds_out_500(tmp_path, monkeypatch):
    """OpenOrca: the first 20,000 rows; a tenth of them would be 2,000. GLUE holds out 1,000 at
    most."""
    monkeypatch.undo()
    row = {"system_prompt": "", "response": "r"}
    jsonl(tmp_path / "train.jsonl", [{**row, "question": f"q {i}"} for i in range(20_100)])
    pairs = data.load("openorca", tmp_path)
    assert {split: len(some) for split, some in pairs.items()} == {
        "train": 19_000, "validation": 500, "test": 500}
    (tmp_path / "sst2").mkdir()
    for split, n in (("train", 10_100), ("validation", 1)):
        rows = [{"sentence": f"{split} {i}", "label": i % 2} for i in range(n)]
        jsonl(tmp_path / f"sst2/{split}.jsonl", rows)
    pairs = data.load("glue/sst2", tmp_path / "sst2")
    assert [len(pairs[split]) for split in ("train", "validation")] == [9_100, 1_000]


def test_generate_passes_its_flags_on(tmp_path, base, monkeypatch):
    """The dataset's own length and metric; top_k, a seed for each batch, the beams' penalty."""
    jsonl(tmp_path / "pairs.jsonl", PAIRS[:60])
    flags = "--dataset", "pairs", "--data-dir", tmp_path / "pairs.jsonl", "--metric", "exact"
    train.main(command(base, tmp_path / "out", *flags))
    asked = []

    def write(model, prompts, max_new, eos, *beams, **drawing):
        asked.append((max_new, drawing) if drawing else (max_new, *beams))
        return [[5]] * len(prompts)
    monkeypatch.setattr(generate.decoding, "generate", write)
    monkeypatch.setattr(generate.decoding, "beam_search", write)
    drawing = "--temperature", "1", "--top-k", "7", "--seed", "3", "--batch-size", "2"
    scores = generate.main([str(tmp_path / "out"), *drawing])
    assert set(scores) == {"exact_match"} and len(asked) > 2
    assert {(n, how["top_k"], how["temperature"]) for n, how in asked} == {(128, 7, 1)}
    seeds = [how["seed"] for _, how in asked]
    assert seeds[0] == 3 and len(set(seeds)) == len(seeds)
    for texts in ([], ["colour 1 of red"]):
        asked.clear()
        generate.main([str(tmp_path / "out"), *texts, "--beams", "3", "--length-penalty", "0.5"])
        assert set(asked) == {(128, 3, 0.5)}


def test_another_dataset_is_not_read_from_the_folder_of_the_run_s_own(tmp_path, base):
    """A run on pairs in a file writes for restaurants, which are generated and in no file."""
    jsonl(tmp_path / "pairs.jsonl", PAIRS[:60])
    flags = "--dataset", "pairs", "--data-dir", tmp_path / "pairs.jsonl"
    train.main(command(base, tmp_path / "out", *flags))
    generate.main([str(tmp_path / "out"), "--dataset", "restaurants", "--max-new", "3"])
    lines = (tmp_path / "out/predictions-test.jsonl").read_text().splitlines()
    records = dict.fromkeys(record for record, _ in data.load("restaurants")["test"])
    assert [json.loads(line)["record"] for line in lines] == list(records)


def test_a_change_of_any_file_that_decides_a_number_is_another_code(tmp_path, monkeypatch):
    """Of models, methods, data, training and recipes; not of tests, nor of generate.py and
    compare.py."""
    files = ["x.py", "baselines/x.py", "checkpoints/x.py", "data/x.py", "data/tiny/config.json",
             "evaluation/x.py", "experiments/recipes/x.args", "run/x.py", "generate.py",
             "compare.py", "tests/x.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "compare.py"))
    seen = [compare.code()]
    for name in files:
        (tmp_path / name).write_text("2")
        seen.append(compare.code())
    changed = [name for name, before, now in zip(files, seen, seen[1:], strict=False) if before
               != now]
    assert changed == files[:-3]


@pytest.mark.parametrize("flags", [["--method", "rslora"], ["--method", "reslora", "--merge",
                                   "bi,none"], ["--method", "dylora", "--frozen"],
                                   ["--method", "full"]], ids=" ".join)
def test_a_run_folder_has_a_card_whose_command_is_that_run(tmp_path, base, flags):
    """The card is one of huggingface_hub, with the table of result.json, and its command has the
    identity of the run that wrote it."""
    import shlex

    from huggingface_hub import ModelCard
    result = train.main(command(base, tmp_path / "a", *flags))
    card = ModelCard.load(tmp_path / "a/README.md")
    assert card.data.library_name == ("transformers" if "full" in flags else "peft")
    root = "sqrt(r)" if "rslora" in flags or "--rs" in flags else "r"
    assert f"scale alpha / {root} with" in card.text or "full" in flags
    assert flags[1] in card.data.tags and card.data.base_model is None  # the base is no hub id
    for stage, values in result["metrics"].items():
        row, = [line for line in card.text.splitlines() if line.startswith(f"| {stage} |")]
        assert [float(cell) for cell in row.split("|")[2:-1]] == pytest.approx(
            list(values.values()), abs=1e-4)
    line, = [line for line in card.text.splitlines() if line.startswith("python train.py")]
    settings = train.parse([*shlex.split(line)[2:], "--out", str(tmp_path / "b")])
    assert train.Run(settings).identity == {
        name: value for name, value in result["settings"].items() if name != "device"}


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(tmp_path, base, monkeypatch):
    """All takes longer than training, also where most of the training was done before."""
    train.main(command(base, tmp_path))
    path = tmp_path / STATE
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        about = dict(f.metadata())
    rows = json.loads(about["rows"])
    rows[-1]["seconds"] = 1000.0
    save_file(tensors, path, {**about, "rows": json.dumps(rows)})
    seconds = train.main(["--resume", "--out", str(tmp_path), "--steps", "8"])["seconds"]
    assert seconds["all"] >= seconds["training"] > 1000


def test_the_report_of_a_base_in_bf16_is_computed_in_fp32(tmp_path, small_llama):
    """The weights are rounded, and no product is."""
    source = shutil.copytree(small_llama, tmp_path / "base")
    model = from_pretrained(source, dtype=torch.float32)
    for p in model.parameters():
        p.data *= 4  # logits that rounding changes
    save_pretrained(model, source, torch.bfloat16)
    train.main(command(source, tmp_path / "out", "--dtype", "bfloat16"))
    base = json.loads((tmp_path / "out/result.json").read_text())["metrics"]["base"]["loss"]
    _, task = data.task("restaurants", source, model, 256)
    examples = task.encode(data.load("restaurants")["test"])[0]
    loss = evaluate.evaluate(model, examples, task, torch.device("cpu"),
                             torch.autocast("cpu", enabled=False))[0]
    assert math.isclose(loss, base, rel_tol=1e-5), (loss, base)
