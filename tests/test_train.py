"""The command line, end to end, and every bad input with the line it must give."""
import contextlib
import csv
import functools
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, tokens, variants
from safetensors.torch import load_file
from test_checkpoint import peft_logits, relative

import data
import generate
import train
from checkpoints import adapters
from checkpoints.pretrained import MODELS, from_pretrained, save_pretrained
from data import reviews
from evaluation import evaluate, plots
from methods import METHODS
from model import RoBERTa, RobertaConfig
from pretraining import vocabulary
from run import folder
from run.owner import LOG, STATE

FAST = ["--rank", "4", "--steps", "6", "--batch-size", "8", "--eval-every", "2", "--lr", "1e-2"]


generated = functools.cache(data.load)


def cut_down(monkeypatch, whole=False):
    """The splits cut down, and those of generators made once; unless `whole`, no text is decoded,
    no picture drawn."""
    def load(name, data_dir=None, source=None, real=data.load):
        splits = (generated(name) if name in data.GENERATED and not data_dir
                  else real(name, data_dir, source))
        return {split: pairs[:64 if split == "train" else 12] for split, pairs in splits.items()}
    monkeypatch.setattr(data, "load", load)
    if not whole:
        monkeypatch.setattr(evaluate, "SCORED", 0)
        monkeypatch.setattr(plots, "draw_curve", lambda *_: None)
        monkeypatch.setattr(plots, "draw_ranks", lambda *_: None)
        monkeypatch.setattr(train, "print_examples", lambda *_: None)


@pytest.fixture(autouse=True)
def few_records(request, monkeypatch):
    """A run in a second; a test that is marked `whole` also decodes and draws."""
    cut_down(monkeypatch, request.node.get_closest_marker("whole"))


def command(base, out, *flags):
    return ["--model", str(base), "--out", str(out), *FAST, *map(str, flags)]


def weights(out):
    return {k: v for k, v in load_file(out / "resume.safetensors").items()
            if k.startswith("model.")}


def with_a_head(base):
    """A checkpoint folder that says it has classes: PEFT wants that of a base."""
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["RobertaForSequenceClassification"]
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.whole
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"head"}))
def test_every_method_trains_merges_and_leaves_a_whole_run_folder(tmp_path, base, method, capsys):
    """Loss falls; result.json, log.csv and the adapter agree with each other; nothing half-written
    lies about."""
    result = train.main(command(base, tmp_path, "--method", method, "--save-merged"))
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    metrics = result["metrics"]
    last = "trained" if method == "full" else "merged"
    assert metrics[last]["loss"] < metrics["base"]["loss"]
    assert set(metrics[last]) == {"loss", "perplexity", "slots", "names"}
    assert json.loads((tmp_path / "result.json").read_text()) == result
    names = {p.name for p in tmp_path.iterdir()}
    adapter = {"adapter_config.json",
               "adapter_model.safetensors"} if METHODS[method].adapter else set()
    if "ranks" in result:
        adapter.add("ranks.png")
    assert names == {"result.json", "log.csv", "curve.png", "resume.safetensors", "merged",
                     "README.md", ".written", *adapter}
    out = capsys.readouterr().out
    assert "parameters train" in out and "ref " in out and last in out
    # merged/ is the model whose loss was reported
    model, args = from_pretrained(tmp_path / "merged"), train.parse(command(base, tmp_path,
                                                                            "--method", method))
    _, task = data.task("restaurants", tmp_path / "merged", model, 256)
    test, _ = task.encode(data.load("restaurants")["test"])
    loss, _ = evaluate.evaluate(model, test, task, args.device, args.amp)
    assert loss == pytest.approx(metrics[last]["loss"], abs=1e-6)
    if adapter:
        idx = tokens(V=320)[0]
        assert relative(peft_logits(base, tmp_path, idx)[0], model(idx)[0]) < 1e-5
    if method not in ("full", "reslora"):
        assert metrics["merged"]["loss"] == pytest.approx(metrics["unmerged"]["loss"], abs=1e-4)


@pytest.mark.whole
@pytest.mark.parametrize("method", METHODS)
def test_every_method_classifies(tmp_path, small_roberta, method, capsys):
    """reviews with a RoBERTa: the log has the metric, the adapter folder and merged/ give the
    reported predictions."""
    flags = ["--method", method, "--dataset", "reviews", "--save-merged"]
    flags += ["--batch-size", 64, "--steps", 20, "--lr", 3e-3]
    result = train.main(command(small_roberta, tmp_path, *flags))
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert (float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) and 0
            < float(rows[-1]["val_accuracy"]) < 1)
    out = capsys.readouterr().out
    assert "has no head for 2 labels: a fresh one is trained from scratch" in out and "-> " in out
    table = out[out.index("reviews (test)"):].splitlines()
    assert table[0].split()[2:] == ["loss", "accuracy"]
    assert [line[:28].strip()
            for line in table[1:1 + len(result["metrics"])]] == list(result["metrics"])
    assert float(table[1].split()[-1]) == pytest.approx(result["metrics"]["base"]["accuracy"],
                                                        abs=1e-4)
    metrics, last = result["metrics"], "merged" if METHODS[method].adapter else "trained"
    assert (set(metrics[last]) == {"loss", "accuracy"} and result["selected"]["by"]
            == "validation accuracy")
    merged = from_pretrained(tmp_path / "merged")
    _, task = data.task("reviews", tmp_path / "merged", merged, 64)
    examples, _ = task.encode(data.load("reviews")["test"])
    args = train.parse(command(small_roberta, tmp_path, *flags))
    loss, logits = evaluate.evaluate(merged, examples, task, args.device, args.amp)
    assert loss == pytest.approx(metrics[last]["loss"], abs=1e-6)
    assert ((logits.argmax(1) == torch.tensor([label for _, label in examples])).double().mean()
            == pytest.approx(metrics[last]["accuracy"]))
    if METHODS[method].adapter:
        import transformers
        theirs_base = with_a_head(shutil.copytree(small_roberta, tmp_path / "base"))
        idx, _, _ = task.collate(examples)
        assert relative(peft_logits(theirs_base, tmp_path, idx)[0], merged(idx)[0]) < 1e-5
        cls = transformers.RobertaForSequenceClassification
        theirs = cls.from_pretrained(tmp_path / "merged").eval()
        assert relative(theirs(idx, attention_mask=idx != 1).logits, merged(idx)[0]) < 1e-5


def test_logits_come_in_the_order_of_the_examples(small_roberta):
    """Evaluated sorted by length and in batches, each example gets the logits that it has alone."""
    model = from_pretrained(small_roberta, 2)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)  # so that texts differ
    _, task = data.task("reviews", small_roberta, model, 64)
    examples, _ = task.encode(data.load("reviews")["test"])
    assert len({len(ids) for ids, _ in examples}) > 3
    _, logits = evaluate.evaluate(model, examples, task, torch.device("cpu"),
                                  contextlib.nullcontext())
    alone = torch.cat([model(task.collate([example])[0])[0] for example in examples])
    torch.testing.assert_close(logits, alone.detach())
    assert (alone - alone.roll(1, 0)).abs().max() > 1e-4


def test_the_best_checkpoint_is_the_one_that_is_kept(tmp_path, small_roberta, monkeypatch):
    """Accuracies .5, .7, .6 at steps 2, 4, 6: step 4 is reported, exported and merged, also after
    resuming."""
    real, found = train.evaluate.validate, iter([0.5, 0.7, 0.6])
    states = {}

    def validate(model, *rest):
        values = {**real(model, *rest), "accuracy": next(found)}
        states[values["accuracy"]] = {k: v.clone() for k, v in model.state_dict().items()}
        return values
    monkeypatch.setattr(train.evaluate, "validate", validate)
    flags = command(small_roberta, tmp_path, "--dataset", "reviews", "--save-merged")
    result = train.main(flags)
    assert result["selected"] == {"step": 4, "by": "validation accuracy"}
    key = "classifier.out_proj.weight"
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert torch.equal(merged[key], states[0.7][key]) and not torch.equal(merged[key],
                                                                          states[0.6][key])
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["base_model.model." + key],
                       merged[key])
    # the state of step 6 brings the weights of step 4 along
    again = train.main([*flags, "--resume"])
    assert again["metrics"] == result["metrics"] and again["selected"] == result["selected"]


def test_every_dataset_trains(tmp_path, base, small_roberta):
    """The other datasets lower the loss too, from their own source or from files. STS-B learns
    numbers and is judged by correlations, MNLI reports matched and mismatched, gsm8k is decoded at
    every validation, a RoBERTa learns masked words and is exported without a head. (The labels of
    this MNLI say nothing that could be learned.)"""
    soup = [{"sentence1": f"soup number {i}", "sentence2": "the soup", "label": i % 6}
            for i in range(80)]
    pairs = [{"premise": row["sentence1"], "hypothesis": "the soup", "label": row["label"] % 3}
             for row in soup]
    sums = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    meals = [{"meaning_representation": "food : Thai", "human_reference": "It serves Thai ."}] * 20
    (tmp_path / "text.txt").write_text("It is a truth that a loss must fall. " * 200)
    for dataset, source, rows, files, also in (
            ("stdlib", base, None, "", {"perplexity"}), ("world", base, None, "", {"perplexity"}),
            ("text", base, None, "", {"perplexity"}),
            ("e2e", base, meals, "train validation test", {"perplexity"}),
            ("gsm8k", base, sums, "train test", {"perplexity", "exact_match"}),
            ("glue/stsb", small_roberta, soup, "train validation", {"pearson", "spearman"}),
            ("glue/mnli", small_roberta, pairs, "train validation_matched validation_mismatched",
             {"accuracy", "loss (mismatched)", "accuracy (mismatched)"}),
            ("opinions", small_roberta, None, "", {"perplexity"})):
        folder, flags = tmp_path / dataset, ["--dataset", dataset]
        folder.mkdir(parents=True)
        for name in files.split():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if files or dataset == "text":
            flags += ["--data-dir", folder if files else tmp_path / "text.txt"]
        result = train.main(command(source, folder / "out", *flags))
        metrics = result["metrics"]
        learned = metrics["merged"]["loss"] < metrics["base"]["loss"]
        assert learned or dataset == "glue/mnli", dataset
        assert set(metrics["merged"]) == {"loss", *also}, dataset
        metric = result["selected"]["by"].removeprefix("validation ")
        assert f"val_{metric}" in open(folder / "out/log.csv").readline()
        assert (result["splits"]["test"] == "validation") == (dataset == "glue/stsb")
        kind = json.loads((folder / "out/adapter_config.json").read_text())["task_type"]
        assert (kind is None) == (dataset == "opinions")


def test_head_trains_the_head_alone(tmp_path, small_roberta):
    """--method head changes the classifier and leaves the rest of the checkpoint as it was."""
    flags = "--method", "head", "--dataset", "reviews", "--save-merged"
    train.main(command(small_roberta, tmp_path, *flags))
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (small_roberta, tmp_path / "merged"))
    shared = before.keys() & after.keys()
    assert len(shared) > 30 and all(torch.equal(before[key], after[key]) for key in shared)
    assert {key.split(".")[0] for key in after.keys() - shared} == {"classifier"}
    assert all(name.startswith("model.classifier.") for name in weights(tmp_path))


@pytest.mark.parametrize("method", ["reslora", "head"])
def test_a_run_on_sst2_with_robertas_own_vocabulary_is_loaded_elsewhere(tmp_path, method,
                                                                        texts_folder):
    """A random RoBERTa of 50,265 tokens, by transformers, with roberta-base's vocab.json: training
    changes it, and PEFT and transformers load what comes out. (A random base learns nothing from
    SST-2 in a few steps.)"""
    import transformers
    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                 type_vocab_size=1)
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(max_position_embeddings=66,
                                                                        **shape))
    theirs.save_pretrained(tmp_path / "base")
    shutil.copyfile(texts_folder / "roberta-base-vocab/vocab.json", tmp_path / "base/vocab.json")
    out = tmp_path / "out"
    flags = ["--method", method, "--dataset", "glue/sst2", "--data-dir", texts_folder / "sst2",
             "--save-merged"]
    metrics = train.main(command(tmp_path / "base", out, *flags))["metrics"]
    assert metrics["merged" if METHODS[method].adapter
                   else "trained"]["loss"] != metrics["base"]["loss"]
    merged = from_pretrained(out / "merged")
    tokenizer, _ = data.task("glue/sst2", out / "merged", merged, 64)
    idx = torch.tensor([tokenizer.build(tokenizer.encode_ordinary("a stirring , funny film"))])
    loaded = transformers.RobertaForSequenceClassification.from_pretrained(out / "merged").eval()
    assert relative(loaded(idx).logits, merged(idx)[0]) < 1e-5
    if METHODS[method].adapter:
        theirs_base = with_a_head(tmp_path / "base")
        assert relative(peft_logits(theirs_base, out, idx)[0], merged(idx)[0]) < 1e-5


@pytest.mark.parametrize("flags, message", [(["--dataset", "restaurants"], "wants text written, "
                                             "which a RoBERTa cannot"),
                                            (["--targets", "q,dense"], "classifier.dense belongs "
                                             "to the head"),
                                            (["--targets", "out_proj"], "classifier.out_proj "
                                             "belongs to the head"),
                                            (["--dataset", "opinions", "--targets", "dense"],
                                             "lm_head.dense belongs to the head"),
                                            (["--targets", "q,query"], "'query' matches no linear"),
                                            (["--dataset", "glue/sst2"], "dataset nyu-mll/glue: "
                                             "the hub does not answer"),
                                            (["--dataset", "glue/sst3"],
                                             "unknown dataset 'glue/sst3'"),
                                            (["--dataset", "glue/stsb", "--label-smoothing", ".1"],
                                             "--label-smoothing 0.1 is for classes"),
                                            (["--context", "65"], "--context 65 is not in 4..64"),
                                            (["--context", "3"], "--context 3 is not in 4..64")])
def test_bad_flags_for_a_roberta(tmp_path, small_roberta, capsys, flags, message, monkeypatch):
    """One line, exit code 2, nothing written."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert message in refused(capsys, command(small_roberta, tmp_path / "out", "--dataset",
                                              "reviews", *flags))
    assert not (tmp_path / "out").exists()


def test_several_merges_are_measured_beside_the_one_that_is_kept(tmp_path, base):
    """--merge a,b,c: the first is exported; every one is what a run with it alone reports, and
    what --resume --merge makes of the finished run."""
    flags = ["--method", "reslora", "--shortcut", "middle"]
    ways = "regression,bi,bw,none"
    several = train.main(command(base, tmp_path / "a", *flags, "--merge", ways))["metrics"]
    others = {how: several[f"merged by {how}"] for how in ("bi", "bw", "none")}
    assert list(several) == ["base", "unmerged", *(f"merged by {how}" for how in others), "merged"]
    for how in ("bi", "regression"):
        alone = train.main(command(base, tmp_path / how, *flags, "--merge", how))["metrics"]
        assert alone["unmerged"] == several["unmerged"]
        assert alone["merged"] == others.get(how, several["merged"])
    again = train.main(command(base, tmp_path / "a", *flags, "--resume", "--merge", "bi"))
    assert again["metrics"]["merged"] == others["bi"] != several["merged"]


def test_a_dylora_run_can_be_cut_at_any_rank_afterwards(tmp_path, base):
    """One run reports every power of two; --resume --cut b exports another rank without training
    again, and its numbers are those that the first run said of it."""
    flags = command(base, tmp_path, "--method", "dylora", "--rank", "4")
    whole = train.main([*flags, "--save-merged"])["metrics"]
    assert list(whole) == ["base", "unmerged", "merged at rank 1", "merged at rank 2", "merged"]
    assert len({values["loss"] for stage, values in whole.items() if stage != "unmerged"}) == 4
    cut = train.main([*flags, "--resume", "--cut", "2,4"])
    assert (cut["metrics"]["merged"] == whole["merged at rank 2"] and cut["settings"]["cut"]
            == [2, 4])
    assert cut["metrics"]["merged at rank 4"] == whole["merged"]
    # with its flags
    assert cut["metrics"]["unmerged"] == whole["unmerged"] and (tmp_path / "merged").exists()
    # q and v in one c_attn
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2 * 2


@pytest.mark.whole
def test_adalora_ends_with_its_budget_and_says_where_the_ranks_are(tmp_path, base, monkeypatch):
    """log.csv has the ranks of every layer, result.json the last ones, ranks.png shows them; the
    checkpoint that is kept is from the last phase, even where an earlier one had a lower validation
    loss."""
    flags = ["--method", "adalora", "--rank", "2", "--steps", "12", "--budget-final", "3",
             "--eval-every", "1"]
    added = iter(range(1000))

    def rising(*args, real=evaluate.evaluate):
        loss, logits = real(*args)
        return loss + next(added), logits
    # every checkpoint is worse than the one before
    monkeypatch.setattr(evaluate, "evaluate", rising)
    result = train.main(command(base, tmp_path, *flags))
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    budgets = [sum(map(int, row["ranks"].split())) for row in rows]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] == 12 and budgets[-4:] == [8] * 4
    assert list(result["ranks"]) == ["h.0.attn.q", "h.1.attn.q", "h.0.attn.v", "h.1.attn.v"]
    assert " ".join(map(str, result["ranks"].values())) == rows[-1]["ranks"]
    assert result["selected"]["step"] == 9 and (tmp_path / "ranks.png").exists()
    tensors = load_file(tmp_path / "resume.safetensors")
    # the file holds step 12, and beside it the kept step 9
    for name, rank in result["ranks"].items():
        assert (tensors[f"best.{name}.lora_E"] != 0).sum() == (tensors[f"model.{name}.lora_E"]
                                                               != 0).sum() == rank
    assert any(not torch.equal(tensors["best." + name], tensors["model." + name]) for name in (
        f"{layer}.lora_E" for layer in result["ranks"]))
    layers = adapters.load_adapter(from_pretrained(base), tmp_path)
    exported = {len(layer.lora_A) for layer in layers}
    assert exported == set(result["ranks"].values()) - {0}
    again = train.main(command(base, tmp_path, *flags, "--resume"))
    assert again["selected"] == result["selected"] and again["ranks"] == result["ranks"]


def test_what_a_method_adds_to_the_gradient_is_clipped_with_it(tmp_path, base, monkeypatch):
    """The orthogonality term of AdaLoRA joins before clipping: SGD moves no factor farther than lr
    times --clip."""
    moved, real = [], torch.optim.SGD.step

    def step(optimizer, *args):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moved.append(sum(p.grad.square().sum() for p in params).sqrt().item())
        return real(optimizer, *args)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    train.main(command(base, tmp_path, "--method", "adalora", "--optimizer", "sgd", "--clip",
                       "0.01"))
    assert len(moved) == 6 and max(moved) < 0.0101


@pytest.mark.parametrize("targets, config",
                         [(["c_attn"], {}), (["c_attn", "mlp.c_proj"], dict(use_rslora=True))])
def test_a_run_goes_on_from_an_adapter_that_peft_made(tmp_path, base, capsys, targets, config):
    """--init-from: step 0 is PEFT's model, training lowers its loss, what comes out loads in PEFT
    again; the run resumes, and generate.py knows where it came from."""
    peft = pytest.importorskip("peft", reason="the oracle, in [dev]")
    import transformers
    theirs = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base),
                                 peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets,
                                                 fan_in_fan_out=True, task_type="CAUSAL_LM",
                                                 **config))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    flags = ["--model", base, "--init-from", tmp_path / "adapter", *FAST[2:], "--out",
             tmp_path / "out"]
    flags = list(map(str, flags))
    result = train.main(flags)
    metrics = result["metrics"]
    merged = theirs.merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, tmp_path / "peft" / name)
    plain = train.main(["--model", str(tmp_path / "peft"), *FAST, "--out",
                        str(tmp_path / "plain")])["metrics"]
    assert metrics["base"]["loss"] == pytest.approx(plain["base"]["loss"], abs=1e-5)
    assert metrics["merged"]["loss"] < metrics["base"]["loss"]
    model, _, _ = generate.load_run(tmp_path / "out")
    idx = tokens(V=320)[0]
    assert relative(peft_logits(base, tmp_path / "out", idx)[0], model(idx)[0]) < 1e-5
    assert relative(generate.load_run(tmp_path / "out", unmerged=True)[0](idx)[0],
                    model(idx)[0]) < 1e-5
    assert train.main([*flags, "--resume"])["metrics"] == metrics
    for more, message in ((["--rank", "4"], "brings its own rank"), (["--rs"], "brings its own rs"),
                          (["--method", "reslora"], "is for method lora, not reslora"),
                          (["--init-from", str(tmp_path)], "adapter_config.json does not exist")):
        assert message in refused(capsys, [*flags, *more])


def test_an_exported_adapter_comes_back_as_it_was(tmp_path, base):
    """q and v of GPT-2 go out as one c_attn of rank 2 r; coming back each has its own r rows again,
    and k none."""
    result = train.main(command(base, tmp_path))
    layers = adapters.load_adapter(model := from_pretrained(base), tmp_path)
    assert {layer.r for layer in layers} == {4} and len(layers) == 4
    names = {f"h.{i}.attn.{t}" for i in (0, 1) for t in "qv"}
    assert {name for name, m in model.named_modules() if m in layers} == names
    kept = {k.removeprefix("model."): t
            for k, t in load_file(tmp_path / "resume.safetensors").items()}
    assert result["selected"]["step"] == 6
    for name, layer in model.named_modules():
        if layer in layers:
            torch.testing.assert_close(layer.lora_A, kept[f"{name}.lora_A"])
            torch.testing.assert_close(layer.lora_B, kept[f"{name}.lora_B"])


def test_compiled_training_is_training(tmp_path, base, monkeypatch):
    """--compile: the same metrics to 1e-4, saved under the same names. Traced by torch.compile, but
    without generating code, which would take minutes."""
    def few(*args, real=data.load):
        return {split: pairs[:12] for split, pairs in real(*args).items()}
    monkeypatch.setattr(data, "load", few)
    flags, traced = ["--method", "reslora", "--steps", "2"], []
    plain = train.main(command(base, tmp_path / "plain", *flags))["metrics"]

    def trace(block, real=torch.compile, **options):
        traced.append(block)
        return real(block, backend="eager", **options)
    monkeypatch.setattr(torch, "compile", trace)
    found = train.main(command(base, tmp_path / "compiled", *flags, "--compile"))["metrics"]
    assert len(traced) == 2 and torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    for stage, values in plain.items():
        assert found[stage]["loss"] == pytest.approx(values["loss"], abs=1e-4)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()
    torch._dynamo.reset()


def test_the_same_seed_is_the_same_run_and_rs_is_rslora(tmp_path, base):
    """The seed is of adapters, order and dropout. --method rslora is --rs, and with any method
    alpha times sqrt(r)."""
    delta = ["--method", "deltalora"]
    rows = [["--dropout", ".2", "--seed", seed] for seed in (1, 1, 2)]
    rows += [["--method", "rslora"], ["--rs"], ["--alpha", 32], [], [*delta, "--rs"],
             [*delta, "--alpha", 32]]
    one, again, other, rslora, rs, alpha, lora, delta_rs, delta_alpha = (
        train.main(command(base, tmp_path / str(i), *row))["metrics"] for i, row in enumerate(rows))
    assert one == again != other and rslora == rs == alpha != lora and delta_rs == delta_alpha


@pytest.mark.parametrize("flags, own", [
    ("deltalora", "-r8"), ("deltalora --rank 4", "-r4"), ("deltalora --delta-start 0", "-0-r8"),
    ("deltalora --delta-lambda 0", "-0.0-r8"), ("dylora --frozen --cut 4,2", "-frozen-4,2-r8"),
    ("reslora --shortcut block", "-block-r8"), ("lora --lr-ratio 16", "-r8-ratio16"), ("full", "")])
def test_the_folder_of_a_run_says_its_method_s_flags(flags, own):
    """A flag that is given as 0 too: runs with other flags never share a folder unasked."""
    out = train.parse(["--method", *flags.split()]).out
    assert str(out) == f"out/restaurants-{flags.split()[0]}{own}-s0"


@pytest.mark.parametrize("flags", [["--model", ""], ["--method="], ["--dataset", ""],
                                   ["--init-from", ""], ["--out", ""], ["--data-dir="],
                                   ["--rank", ""], ["--columns", ""], ["--lr", "1", "--device", ""],
                                   ["--dtype", ""], ["--method=reslora", "--merge="]])
def test_an_empty_value_is_never_the_default(flags, tmp_path):
    """--model "$MODEL" with an unset variable, on the command line and in a file of flags."""
    flag = [flag for flag in flags if flag.startswith("--")][-1].strip("=")
    (tmp_path / "flags.args").write_text(" ".join(f"'{part}'" for part in flags))
    for argv in (flags, [f"@{tmp_path / 'flags.args'}"]):
        with pytest.raises(ValueError,
                           match=f"^{flag} is empty: give it a value, or leave it out$"):
            train.parse(argv)


def test_flags_from_a_file(tmp_path, base):
    """@file: one or more flags a line, # comments."""
    (tmp_path / "recipe.args").write_text("--rank 3  # small\n# nothing\n--alpha 5 --out 'a "
                                          "b/run#1'\n")
    args = train.parse([f"@{tmp_path / 'recipe.args'}", "--lr", "1"])
    assert (args.rank, args.alpha, args.lr, str(args.out)) == (3, 5, 1, "a b/run#1")


def test_the_recipes_are_valid_and_can_be_changed_behind(monkeypatch):
    """experiments/recipes/*.args parse, name a model and a dataset; a flag after the file wins."""
    monkeypatch.chdir(ROOT)
    recipes = sorted((ROOT / "experiments/recipes").glob("*.args"))
    for recipe in recipes:
        args = train.parse([f"@experiments/recipes/{recipe.name}", "--lr", "2"])
        assert args.model in MODELS and args.lr == 2
        assert args.targets in ("q,v", "q,k,v,o,gate,up,down")
        assert args.rank in (4, 8) or (args.method, args.rank) in (("rslora", 256), ("lora", 32))
        assert args.method == next(name for name in ("deltalora", "reslora", "rslora", "lora")
                                   if name in recipe.name or name == "lora")
    assert len(recipes) >= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_absent(tmp_path, base, capsys):
    """No silent fallback to the CPU."""
    message = "--device cuda: this machine"
    assert message in refused(capsys, command(base, tmp_path / "o", "--device", "cuda"))


# Resuming

# AdaLoRA is stopped while ranks fall, at the start of the last phase, and inside it: what was
# dropped stays dropped.
PHASES = dict(steps=10, budget_warmup=2, budget_final=4)
MORE = [("adalora", dict(PHASES, budget_every=every), stopped)
        for every, stopped in ((1, 4), (3, 6), (1, 8))]
RESUMED = [pytest.param(*v.values, 4, id=v.id) for v in variants() if "-1" not in v.id]
RESUMED += [pytest.param(*row, id=f"{row[0]} {row[1:]}") for row in MORE]


@pytest.mark.parametrize("method, hparams, stopped", RESUMED)
def test_a_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(
        tmp_path, base, method, hparams, stopped, monkeypatch):
    """Stopped between a state and its log, with dropout where the method has it: same weights bit
    for bit, metrics, ranks and log."""
    flags = ["--method", method, *["--dropout", "0.1"] * (method != "deltalora")]
    for name, value in hparams.items():
        if value not in (None, False):
            flags += ["--" + name.replace("_", "-")] + [value] * (value is not True)
    whole = train.main(command(base, tmp_path / "a", *flags))

    def stop(path, model, optimizer, step, *rest, real=folder.save_state):
        real(path, model, optimizer, step, *rest)
        if step == stopped:
            raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(folder, "save_state", stop)
        train.main(command(base, tmp_path / "b", *flags))
    resumed = train.main(command(base, tmp_path / "b", *flags, "--resume"))
    assert all(resumed.get(name) == whole.get(name) for name in ("metrics", "ranks", "selected"))
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    logs = [[{**row, "seconds": None} for row in csv.DictReader(open(tmp_path / x / "log.csv"))]
            for x in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) >= 3


def test_all_modules_train_in_every_step(tmp_path, base, monkeypatch):
    """Behind the validations and the base's report too."""
    modes, step = [], train.one_step
    monkeypatch.setattr(train, "one_step", lambda forward, *rest: modes.append(
        {module.training for module in forward.modules()}) or step(forward, *rest))
    flags = ["--method", "reslora", "--shortcut", "middle", "--dropout", "0.1", "--lr", "0.05"]
    train.main(command(base, tmp_path, *flags))
    assert modes == [{True}] * 6


@pytest.mark.whole
def test_a_run_replaces_one_of_the_same_settings_and_no_other(tmp_path, base, capsys):
    """The same flags again leave nothing of the first run behind. Other flags into its folder, one
    that only merging reads among them, are refused before anything is computed, after a finished
    run and after one that was cut off."""
    flags = command(base, tmp_path, "--method", "reslora")
    train.main([*flags, "--save-merged"])
    train.main(flags)
    names = {"result.json", "log.csv", "curve.png", "resume.safetensors", "adapter_config.json",
             "adapter_model.safetensors", "README.md", ".written"}
    assert {p.name for p in tmp_path.iterdir()} == names
    for _ in range(2):
        before = {p: p.read_bytes() for p in tmp_path.glob("[!.]*")}
        for more, message in ((["--shortcut", "block"], "shortcut is block now, and it began with "
                               "input"), (["--method", "lora"], "method is lora now"),
                              (["--steps", "3"], "steps is 3 now"),
                              (["--steps", "60", "--eval-every", "6"], "steps is 60 now")):
            assert f"holds another run ({message}" in refused(capsys, [*flags, *more])
        assert {p: p.read_bytes() for p in tmp_path.glob("[!.]*")} == before
        (tmp_path / "result.json").unlink(missing_ok=True)


# Bad input

def refused(capsys, argv):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train.main([str(a) for a in argv])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("flags, message", [(["--method", "lorra"], "unknown method 'lorra': "
                                             "choose from lora, rslora, reslora, deltalora, "
                                             "adalora, "), (["--method", "head"], "restaurants has "
                                                            "nothing to classify"),
                                            (["--dataset", "reviews"], "has no classification head "
                                             "here: choose a RoBERTa"),
                                            (["--method", "lora", "--pre-num", "2"], "--pre-num is "
                                             "a flag of method reslora, not of lora"),
                                            (["--method", "rslora", "--rs"],
                                             "--rs is not for rslora"),
                                            (["--method", "full", "--rs"], "--rs is not for full"),
                                            (["--seed", "-1"], "--seed must be in 0..2^63 - 1, not "
                                             "-1"), (["--method", "deltalora", "--delta-lambda",
                                                      "nan"], "delta_lambda nan"),
                                            (["--out", "/proc/none"], "--out /proc/none cannot be "
                                             "written to"),
                                            (["--targets", "q,attn.q"], "h.0.attn.q is meant by an "
                                             "earlier target already"),
                                            (["--ran", "4"], "unrecognized arguments: --ran 4"),
                                            (["--rank", "0"], "rank 0 is not in 1..16"),
                                            (["--rank", "17"], "rank 17 is not in 1..16"),
                                            (["--targets", "q,value"], "target 'value' matches no "
                                             "linear of the model; its linears are: down, k, o, q, "
                                             "up, v"),
                                            (["--method", "deltalora", "--dropout", ".1"],
                                             "dropout must be 0, not 0.1"),
                                            (["--method", "deltalora", "--delta-start", "6"],
                                             "delta_start 6 leaves W where it is in a run of 6 "
                                             "steps"),
                                            (["--method", "deltalora", "--delta-start", "-1"],
                                             "delta_start -1 is not a number of steps"),
                                            (["--method", "reslora", "--pre-num", "-2"],
                                             "pre_num -2"),
                                            (["--method", "reslora", "--shortcut", "output"],
                                             "invalid choice: 'output'"),
                                            (["--method", "reslora", "--merge", "best"],
                                             "merge 'best' is not one of regression, bi, bw, none"),
                                            (["--method", "reslora", "--merge", "weight"],
                                             "merge 'weight' is called 'bw' now"),
                                            (["--method", "reslora", "--merge", "bw", "--pre-num",
                                              "2"], "pre_num 1 only, not 2"),
                                            (["--dataset", "squad"], "unknown dataset 'squad': "
                                             "choose from restaurants, "),
                                            (["--dataset", "e2e", "--data-dir", "nowhere"],
                                             "data folder nowhere does not exist"),
                                            (["--dataset", "text"], "needs --data-dir"),
                                            (["--data-dir", "."], "restaurants is generated"),
                                            (["--model", "./nowhere"], "model folder ./nowhere "
                                             "does not exist"),
                                            (["--device", "tpu9"], "unknown device 'tpu9'"),
                                            (["--dtype", "float8"], "invalid choice: 'float8'"),
                                            (["--steps", "0"], "--steps must be above 0, not 0"),
                                            (["--lr", "nan"], "--lr must be above 0, not nan"),
                                            (["--lr", "-1"], "--lr must be above 0"),
                                            (["--steps", "3", "--epochs", "1"], "give one"),
                                            (["--warmup", "-1"], "--warmup must be 0 or more"),
                                            (["--label-smoothing", "1"], "below 1, not 1.0"),
                                            (["--context", "999"],
                                             "--context 999 is not in 4..256"),
                                            (["--context", "20"], "leaves no room"),
                                            (["--dropout", "1"], "dropout 1.0 is not in [0, 1)"),
                                            (["--alpha", "0"], "--alpha must be above 0"),
                                            (["--method", "adalora", "--init-rank", "3"],
                                             "init_rank 3 is not in 4..16"),
                                            (["--method", "adalora", "--budget-warmup", "4",
                                              "--budget-final", "2"], "no step between them in a "
                                             "run of 6"),
                                            (["--method", "adalora", "--orth", "-1"],
                                             "orth -1.0 is not in [0, 1e6]"),
                                            (["--method", "dylora", "--cut", "5"],
                                             "cut 5 is not in 1..4"),
                                            (["--method", "dylora", "--cut", "2,x"],
                                             "argument --cut: invalid ranks value: '2,x'"),
                                            (["--method", "dylora", "--alpha", "1e300"],
                                             "alpha 1e+300 is not above 0 and at most 10^6"),
                                            (["--method", "lokr", "--rs"], "rank 4 makes both "
                                             "factors of LoKr full for a linear of 16 -> 16"),
                                            (["--resume"], "there is nothing to resume"),
                                            (["--lr", "1e30"], "is not finite at step"),
                                            (["@nowhere.args"], "nowhere.args"),
                                            (["--seed", "x"], "invalid int value: 'x'"),])
def test_bad_flags(tmp_path, base, capsys, flags, message, monkeypatch):
    """One line that names the value and what would be right, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, command(base, tmp_path / "out", *flags))
    assert (not (tmp_path / "out").exists() or "1e30" in flags
            and not list((tmp_path / "out").iterdir()))


def test_adapters_on_a_masked_lm_without_its_head_are_refused(tmp_path, capsys):
    """A random head that stays frozen, and is exported with nothing, would be a silent failure;
    full may train it."""
    save_pretrained(RoBERTa(RobertaConfig(325, 66, 16, 2, 2, 32), 2), tmp_path / "base")
    vocabulary.make([text for (text,), _ in reviews.load()["test"][:50]], 320, tmp_path / "base",
                    roberta=True)
    flags = command(tmp_path / "base", tmp_path / "out", "--dataset", "stdlib", "--context", "64")
    assert ("has none for masked tokens: choose a checkpoint with one, or --method full"
            in refused(capsys, flags))
    assert train.main([*flags, "--method", "full"])["metrics"]["trained"]["loss"] > 0


def test_resume_into_another_configuration(tmp_path, base, capsys):
    """The first setting that differs is named, with both values, and the run is left as it was."""
    train.main(command(base, tmp_path, "--method", "lora"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for flags, message in ((["--rank", "5"], "rank is 5 now, and it began with 4. Start a new run"),
                           (["--lr", "1"], "lr is 1.0 now, and it began with 0.01. Start a new "
                            "run with another --out, or go on from its adapter with --init-from "
                            f"{tmp_path}"), (["--method", "rslora"], "with method rslora: it began "
                                             "with lora")):
        assert message in refused(capsys, command(base, tmp_path, *flags, "--resume"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resuming_on_another_base_tokenizer_or_other_data_is_refused(tmp_path, base, capsys):
    """They are not in the state, their fingerprints are."""
    source, text = shutil.copytree(base, tmp_path / "base"), "It is a truth. " * 300
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    flags = command(source, tmp_path / "run", "--dataset", "text", "--data-dir", tmp_path)
    train.main(flags)
    file = source / "tokenizer.json"
    other = from_pretrained(base)
    other.wte.weight.data *= 1.5
    for change, message in (
            (lambda: (tmp_path / "train.txt").write_text(text.replace("a", "no")),
             "the data of text have changed"),
            (lambda: file.write_text(file.read_text().replace('"Ġ', '"X')),
             "has another config.json or tokenizer than it began with"),
            (lambda: save_pretrained(other, source), "base has other weights than it began with")):
        change()
        assert message in refused(capsys, [*flags, "--resume"])
        (tmp_path / "train.txt").write_text(text)


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
        tmp_path, base, capsys, monkeypatch):
    """What is in the folder goes only when the new run has its first checkpoint. NaN in step 5
    leaves the state of step 4. The base is never overwritten."""
    run, real, steps = tmp_path / "run", train.one_step, []
    train.main(command(base, run, "--save-merged"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    monkeypatch.setattr(train, "one_step", lambda *args: torch.tensor([1.0, math.nan]))
    assert "is not finite at step 1" in refused(capsys, command(base, run, "--save-merged"))
    assert "lies in the run folder" in refused(capsys, command(run / "merged", run))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    monkeypatch.setattr(train, "one_step", lambda *args: steps.append(args) or (
        torch.tensor([math.nan, 1.0]) if len(steps) == 5 else real(*args)))
    assert "is not finite at step 5" in refused(capsys, command(base, tmp_path / "other"))
    assert {p.name for p in (tmp_path / "other").iterdir()} == {STATE, LOG, ".written"}
    assert folder.read_state(tmp_path / "other" / STATE)[1] == 4


def test_damaged_checkpoints(tmp_path, base, capsys):
    """A truncated model, a truncated state, an --out that is a file."""
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is damaged" in refused(capsys, command(broken, tmp_path / "o"))
    assert "is a file, not a folder" in refused(capsys, command(base, file))
    train.main(command(base, tmp_path / "run"))
    state = tmp_path / "run/resume.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert "resume.safetensors is damaged" in refused(capsys, command(base, tmp_path / "run",
                                                                      "--resume"))
