"""What surrounds the mathematics in a run: schedules, batches, epochs, optimizer groups, evaluation, calibration."""
import contextlib
import json
import math
import runpy
from argparse import Namespace
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, adapt, tiny_gpt, tiny_roberta
from matplotlib import pyplot
from test_train import command, few_records  # noqa: F401

import data
import lora
import settings
import train
from checkpoints import tokenizers
from checkpoints.files import write_csv
from checkpoints.pretrained import from_pretrained
from data.tasks import Label, Mask, Write
from evaluation import evaluate, plots, printing
from experiments import compare
from methods import METHODS, NoAdapter
from reslora import ResLoRALinear

CPU, PLAIN = torch.device("cpu"), contextlib.nullcontext()


def examples_of_unlike_length(n=23, most=14):
    """[(ids, start)] as Write makes them, from two tokens to `most`, with targets from the second token on or later."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, most + 1, (n,), generator=rng).tolist()
    return [(torch.randint(1, 61, (length,), generator=rng).tolist(), 1 + i % (length - 1))
            for i, length in enumerate(lengths)]


# Schedules and steps

@pytest.mark.parametrize("warmup, steps", [(0, 7), (1, 7), (3, 7), (0.06, 50), (0.5, 10), (7, 7)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_is_its_formula_at_every_step(schedule, warmup, steps):
    """w = warm-up steps, a share of the run below 1. Up to w: step / (w + 1). After it t = (step - w) / (steps - w + 1)
    and 1 - t, (1 + cos pi t) / 2, or 1."""
    args = Namespace(lr=0.5, warmup=warmup, schedule=schedule)
    w = warmup if warmup >= 1 else warmup * steps
    for step in range(1, steps + 1):
        t = (step - w) / (steps - w + 1)
        formula = {"linear": 1 - t, "cosine": 0.5 + 0.5 * math.cos(math.pi * t), "constant": 1}[schedule]
        expected = 0.5 * (step / (w + 1) if step <= w else formula)
        assert train.lr_at(step, steps, args) == pytest.approx(expected, rel=1e-12)
        assert train.lr_at(step, steps, args) > 0


def test_a_warmup_of_one_is_one_step():
    """--warmup 1 is a number of steps, not all of the run."""
    rates = [train.lr_at(step, 10, Namespace(lr=1.0, warmup=1.0, schedule="constant")) for step in (1, 2, 3)]
    assert rates == [0.5, 1, 1]


@pytest.mark.parametrize("n, batch, epochs, steps", [(64, 24, 2, 6), (5, 8, 1, 1), (64, 32, 1.5, 3), (64, 64, 0.1, 1)])
def test_epochs_are_at_least_that_many_passes(tmp_path, base, monkeypatch, n, batch, epochs, steps):
    """The last batch of an epoch is a step too, however few examples it has."""
    split = {"train": n, "validation": 4, "test": 4}
    rows = data.load("restaurants")["train"]
    monkeypatch.setattr(data, "load", lambda *_: {name: rows[:k] for name, k in split.items()})
    args = train.parse(["--model", str(base), "--batch-size", str(batch), "--epochs", str(epochs), "--rank", "2",
                        "--out", str(tmp_path)])
    assert train.Run(args).args.steps == steps


@pytest.mark.parametrize("dataset", ["restaurants", "reviews", "stdlib", "e2e", "gsm8k", "text", "glue/sst2"])
def test_a_run_is_as_long_as_its_dataset_says(dataset):
    """Either steps or epochs, with the batch and the rate of the table in settings.py; a flag goes before it."""
    defaults = settings.DEFAULTS[dataset.split("/")[0]]
    for method in ("lora", "full", "adalora"):
        args = train.parse(["--dataset", dataset, "--method", method])
        assert (args.steps, args.epochs) == (defaults.get("steps"), defaults.get("epochs"))
        assert (args.steps is None) != (args.epochs is None) and args.batch_size == defaults["batch_size"]
        assert args.lr == defaults.get(f"{method}_lr", defaults["lr"])
    args = train.parse(["--dataset", dataset, "--epochs", "2", "--batch-size", "3", "--lr", "0.5"])
    assert (args.steps, args.epochs, args.batch_size, args.lr) == (None, 2, 3, 0.5)


def test_matrices_decay_and_vectors_do_not():
    """Under a zero gradient a step multiplies matrices by 1 - lr * decay, and leaves biases and LayerNorms."""
    model = tiny_gpt().requires_grad_(True)
    args = train.parse(["--method", "full", "--weight-decay", "0.5", "--lr", "0.1", "--device", "cpu"])
    optimizer = train.make_optimizer(model, args)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if p.dim() >= 2 else 1))


# Batches

def test_two_epochs_hold_every_example_once_each_in_different_orders():
    """Whatever the size of the batches, whose composition changes too; the same seed gives the same epoch."""
    examples = examples_of_unlike_length(200)
    for size in (1, 7, 200, 500):
        first, second = (data.epoch_batches(examples, size, f"0/{epoch}") for epoch in (0, 1))
        for batches in (first, second):
            assert Counter(i for batch in batches for i in batch) == Counter(range(200))
            assert all(len(batch) <= size for batch in batches)
        assert first == data.epoch_batches(examples, size, "0/0")
        if size < 200:
            assert first != second and {frozenset(b) for b in first} != {frozenset(b) for b in second} or size == 1


def test_batches_are_of_like_length_and_do_not_come_sorted():
    """Little is padding: far less than with random batches. But short and long batches take turns."""
    examples = [([0] * length, 1) for length in range(2, 402)]
    batches = data.epoch_batches(examples, 8, "0/0")
    longest = [max(len(examples[i][0]) for i in batch) for batch in batches]
    padding = sum(most * len(batch) for most, batch in zip(longest, batches, strict=True)) / sum(range(2, 402))
    assert padding < 1.1
    ups = sum(a < b for a, b in zip(longest, longest[1:], strict=False))
    assert 0.25 < ups / (len(longest) - 1) < 0.75


def test_the_batches_of_a_run_go_through_the_data_and_are_found_again_after_a_skip():
    """Two epochs are every target twice; skipping n steps gives what the (n + 1)-th step has; shares sum to `world`."""
    examples = examples_of_unlike_length(23)
    task, size = Write(Namespace(bos=0, eos=0), 16), 5
    steps = [step for step, _ in zip(data.step_batches(examples, task, size, seed=3), range(10), strict=False)]
    targets = sum(int((t != -100).sum()) for step in steps for _, t, _ in step)
    assert targets == 2 * sum(len(ids) - start for ids, start in examples)
    for skip in (1, 4, 5, 7):
        again = next(data.step_batches(examples, task, size, seed=3, skip=skip))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(again, steps[skip], strict=True))
    for world in (1, 2):
        for accumulate in (1, 3):
            parts = [next(data.step_batches(examples, task, size, accumulate, rank=rank, world=world))
                     for rank in range(world)]
            assert sum(share for part in parts for _, _, share in part) == pytest.approx(world)
            assert all(len(part) == accumulate for part in parts)


def test_a_masked_word_is_shown_as_mask_as_itself_or_as_an_ordinary_token(small_roberta):
    """Never as <s>, <pad>, </s> or <unk>, and any ordinary token may stand for it, the first and the last included."""
    tok = tokenizers.for_model(small_roberta, Namespace(model_type="roberta", vocab_size=325))
    task, shown = Mask(tok, 64), Counter()
    examples = [([0, *[100] * 60, 2], None)] * 40
    for seed in range(60):
        idx, targets, _ = task.collate(examples, str(seed))
        shown.update(idx[(targets != -100)].tolist())
    assert not {0, 1, 2, 3} & shown.keys()
    assert shown[tok.mask] > shown[100] > 0 and set(range(4, tok.mask)) <= shown.keys()


# Evaluation

@pytest.mark.parametrize("batch", [1, 4, 32])
def test_the_loss_of_a_split_is_the_sum_of_cross_entropies_over_the_number_of_targets(monkeypatch, batch):
    """Computed here one text at a time, from logits: whatever the batch, however unlike the lengths, dropout or not."""
    monkeypatch.setattr(evaluate, "EVAL_BATCH", batch)
    model, examples = tiny_gpt(), examples_of_unlike_length()
    adapt(model, "lora", {}, dropout=0.5)
    model.train()
    task = Write(Namespace(bos=0, eos=0), 16)
    found, logits = evaluate.evaluate(model, examples, task, CPU, PLAIN)
    assert model.training and logits is None
    model.eval()
    total = sum(F.cross_entropy(model(torch.tensor([ids[:-1]]))[0][0, start - 1:], torch.tensor(ids[start:]),
                                reduction="sum").item() for ids, start in examples)
    assert found == pytest.approx(total / sum(len(ids) - start for ids, start in examples), rel=1e-9)


def test_a_report_is_of_the_test_split_and_a_point_of_the_curve_of_the_validation_split(monkeypatch, small_roberta):
    """A curve's point looks at the first so many texts, the report at all; accuracy is the share that is right."""
    model = tiny_roberta()
    rows = [([0, *torch.randint(3, 61, (3 + i % 4,)).tolist(), 2], i % 3) for i in range(30)]
    task = Label(Namespace(pad=1), 16, 3)
    dataset = Namespace(examples={"train": [], "validation": rows[:10], "test": rows[10:]}, task=task,
                        pairs={"train": [], "validation": [None] * 10, "test": [None] * 20}, labels=("a", "b", "c"),
                        metrics=("accuracy",), module=Namespace())
    monkeypatch.setattr(evaluate, "EVAL_LABELLED", 4)

    def by_hand(rows):
        model.eval()
        right = [model(torch.tensor([ids]))[0].argmax().item() == label for ids, label in rows]
        return sum(right) / len(right)
    assert evaluate.report(model, dataset, CPU, PLAIN)["accuracy"] == pytest.approx(by_hand(rows[10:]))
    assert evaluate.validate(model, dataset, CPU, PLAIN)["accuracy"] == pytest.approx(by_hand(rows[:4]))


def test_decoding_for_a_report_has_no_dropout_and_leaves_the_model_training(base):
    """Twice the same texts from a model whose adapters drop half of their input."""
    model, tokenizer = from_pretrained(base), tokenizers.load(base, 320)
    adapt(model, "lora", {}, r=8, alpha=60, dropout=0.5)
    model.train()
    pairs = data.load("restaurants")["test"][:4]
    texts = [evaluate.decode(model, pairs, tokenizer, PLAIN, 20) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2] and all(m.training for m in model.modules())


@pytest.mark.parametrize("dataset, judged", [("restaurants", 64), ("gsm8k", 70), ("stdlib", None)])
def test_what_is_evaluated_is_said(monkeypatch, capsys, dataset, judged):
    """Before a report: the loss of all test examples, and how many texts are decoded: 64, or all where they judge."""
    pairs = [("a", "b")] * 70
    module = data.module(dataset)
    fake = Namespace(pairs={"test": pairs}, examples={"test": pairs * 2}, module=module, labels=(),
                     metrics=data.about(dataset, "METRICS"))
    monkeypatch.setattr(evaluate, "measure", lambda *args, **more: {})
    monkeypatch.setattr(evaluate, "SCORED", 64)
    evaluate.report(None, fake, None, None, "the base")
    out = capsys.readouterr().out
    assert out.startswith("evaluate the base: the loss of 140 test examples")
    assert (f"and {judged} texts are decoded" in out) if judged else "decoded" not in out


def test_three_examples_are_shown_from_all_over_the_test_split(monkeypatch, capsys):
    """One of each third, in their order, with what the model makes of them; of two texts both."""
    task = Write.__new__(Write)
    for n, shown in ((90, [0, 30, 60]), (100, [0, 33, 66]), (2, [0, 1]), (4, [0, 1, 2])):
        pairs = [(f"record {i}", f"text {i}") for i in range(n)]
        monkeypatch.setattr(printing, "decode", lambda model, some, *_, between: ([p for p, _ in some],
                                                                                  ["written"] * len(some)))
        dataset = Namespace(pairs={"test": pairs}, labels=(), task=task, tokenizer=None)
        printing.print_examples(None, dataset, None, None)
        lines = capsys.readouterr().out.split("\n")
        assert [line for line in lines if line.startswith("record")] == [f"record {i}" for i in shown]
        assert [line for line in lines if line.startswith("  ref")] == [f"  ref text {i}" for i in shown]


@pytest.mark.whole
def test_the_picture_of_ranks_has_a_row_for_each_layer_and_says_what_colours_mean(monkeypatch, tmp_path):
    """The first layer on top, the last rank beside its name, steps to the right."""
    figure, axis = pyplot.subplots()
    monkeypatch.setattr(plots, "picture", lambda path, **_: contextlib.nullcontext((figure, axis)))
    rows = [dict(step=2, ranks="4 4"), dict(step=6, ranks="3 0")]
    plots.draw_ranks(tmp_path / "a.png", rows, ["h.0.q", "h.1.q"], "t")
    assert [text.get_text() for text in axis.get_yticklabels()] == ["0.q: 3", "1.q: 0"] and axis.yaxis_inverted()
    assert figure.axes[1].get_ylabel() == "rank" and axis.get_xlim() == (0, 6) and axis.get_title() == "t"
    pyplot.close(figure)


def test_cut_texts_are_counted_over_all_splits(base, monkeypatch):
    """A text that just fits the context is not cut, one that is a token longer is."""
    tokenizer = tokenizers.load(base, 320)
    n = len(tokenizer.encode_ordinary("a ||")) + len(tokenizer.encode_ordinary(" abc")) + 2
    for context, cut in ((n - 1, 0), (n - 2, 1)):
        assert Write(tokenizer, context).encode([("a", "abc")])[1] == cut
    pairs = {"train": [("a", "abc " * 40)] * 3, "validation": [("a", "abc " * 40)], "test": [("a", "abc " * 40)] * 2}
    monkeypatch.setattr(data, "load", lambda *_: pairs)
    assert data.Dataset("restaurants").encode(base, from_pretrained(base), 32).cut == 6


def test_trained_parameters_are_counted(tmp_path, base):
    """By hand: two layers, q and v, r (d_in + d_out) each, beside a base of so many."""
    found = train.main(command(base, tmp_path))["parameters"]
    whole = sum(p.numel() for p in from_pretrained(base).parameters())
    assert found == {"trainable": 2 * 2 * 4 * (16 + 16), "total": whole + 2 * 2 * 4 * (16 + 16)}


def test_the_loss_of_a_step_is_the_mean_over_its_targets_and_the_norm_that_of_its_gradient():
    """Over the accumulations together, as one batch of all examples would give them, before the optimizer moves."""
    model = tiny_gpt()
    batches = next(data.step_batches(examples_of_unlike_length(12), Write(None, 20), 4, 3))
    assert len(batches) == 3
    total = sum(F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), reduction="sum")
                for idx, targets, _ in batches)
    loss = total / sum((targets != -100).sum() for _, targets, _ in batches)
    params = list(model.parameters())
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).norm()
    args = Namespace(device=CPU, amp=PLAIN, label_smoothing=0.0, clip=0.0)
    found = train.one_step(model, params, torch.optim.SGD(params, 0.1), NoAdapter, [], batches, 1, args)
    torch.testing.assert_close(found, torch.stack([loss.detach(), norm]))


def test_an_epoch_is_shorter_for_several_processes(tmp_path, base, monkeypatch):
    """64 examples in batches of 8 are 8 steps for one process, 4 for two."""
    for world, steps in ((1, 8), (2, 4)):
        monkeypatch.setattr(settings, "WORLD", world)
        args = train.parse(["--model", str(base), "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "o")])
        monkeypatch.setattr(args, "device", CPU)
        assert train.Run(args).args.steps == steps


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path, base, monkeypatch):
    """Interrupted before its first checkpoint; a folder with something in it stays."""
    monkeypatch.setattr(train, "fit", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    for kept in (False, True):
        if kept:
            (tmp_path / "out").mkdir()
            (tmp_path / "out/mine.txt").write_text("x")
        with pytest.raises(SystemExit):
            train.main(command(base, tmp_path / "out"))
        assert (tmp_path / "out").exists() == kept


def test_half_precision_is_of_the_arithmetic_and_asked_for():
    """float32 computes in float32, bfloat16 in bfloat16 whatever the weights are."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        device, found, amp = settings.pick_device("cpu", name)
        with amp:
            assert found == name and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_every_dataset_and_method_has_its_defaults():
    """Steps or epochs, never both; full fine-tuning has a smaller rate than an adapter, methods whose factors start
    small a larger one, wherever a dataset says so; a dataset that is not in the table has defaults too."""
    for dataset in (*data.GENERATED, "e2e", "gsm8k", "text", "glue/sst2", "glue/mnli"):
        args = {method: settings.parse(["--method", method, "--dataset", dataset, "--model", "tiny"])
                for method in METHODS if method != "head" or data.about(dataset, "LABELS")}
        assert all((a.steps is None) != (a.epochs is None) and a.batch_size > 0 for a in args.values())
        assert args["full"].lr < args["lora"].lr == args["rslora"].lr == args["reslora"].lr == args["deltalora"].lr
        assert all(args[method].lr >= args["lora"].lr for method in ("adalora", "loha", "lokr"))
    assert {"epochs", "batch_size", "lr", "full_lr"} == settings.OTHER.keys()
    assert settings.OTHER["full_lr"] < settings.OTHER["lr"]
    for dataset in ("restaurants", "e2e", "reviews"):
        found = {settings.parse(["--method", m, "--dataset", dataset]).lr for m in ("adalora", "loha", "lokr")}
        assert len(found) == 1 and found.pop() > settings.parse(["--dataset", dataset]).lr
    assert settings.parse(["--method", "head", "--dataset", "reviews"]).lr > settings.parse(["--dataset", "reviews"]).lr


def test_defaults_that_depend_on_the_steps_are_what_the_help_says():
    """AdaLoRA's phases are a tenth and four tenths of the run, its pace is a hundredth, at least 1. (K of Delta-LoRA:
    test_identities.py.)"""
    flags = METHODS["adalora"].flags.values()
    for steps, *expected in ((10, 1, 4, 1), (100, 10, 40, 1), (1000, 100, 400, 10), (10000, 1000, 4000, 100)):
        assert [flag["default"](steps, 0) for flag in flags if callable(flag.get("default"))] == expected


@pytest.mark.parametrize("step, message", [(1, "interrupted; nothing was saved\n"),
                                           (5, "interrupted; step 4 is in {out}, --resume goes on from there\n")])
def test_an_interrupted_run_says_what_it_has_left(tmp_path, base, monkeypatch, capsys, step, message):
    """Ctrl-C in a step: before the first checkpoint and after one."""
    calls, real = [], train.one_step

    def one_step(*args):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "one_step", one_step)
    with pytest.raises(SystemExit) as e:
        train.main(command(base, tmp_path / "out"))
    assert e.value.code == 130
    assert capsys.readouterr().err.endswith("train.py: " + message.format(out=tmp_path / "out"))


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_the_scripts_are_scripts(script, monkeypatch, capsys):
    """python train.py --help says how to use it."""
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not e.value.code and capsys.readouterr().out.startswith(f"usage: {script}")


def test_result_json_names_every_flag_of_the_method(tmp_path, base):
    """With the default where none was given."""
    found = train.main(command(base, tmp_path, "--method", "reslora"))["settings"]
    assert (found["shortcut"], found["pre_num"], found["merge"]) == ("input", 1, ["regression"])


def test_a_failure_to_compile_is_a_line_and_any_other_a_traceback(capsys):
    """What torch's compiler raises is the machine's fault; a bug of ours stays visible."""
    class Broken(Exception):
        pass

    def run(_):
        raise Broken("no compiler here")
    with pytest.raises(Broken):
        settings.command("x", lambda argv: None, run, [])
    for module in ("torch._dynamo.exc", "torch._inductor.exc"):
        Broken.__module__ = module
        with pytest.raises(SystemExit) as e:
            settings.command("x", lambda argv: None, run, [])
        assert e.value.code == 2
        assert capsys.readouterr().err == "x: --compile does not work on this machine: no compiler here\n"


def test_texts_come_back_in_the_order_of_their_records(monkeypatch):
    """Records are decoded sorted by length and in batches; each gets the text that it has alone."""
    model = tiny_gpt()
    tokenizer = Namespace(encode_ordinary=lambda text: [1 + ord(c) % 59 for c in text.removesuffix(" ||")],
                          bos=60, eos=60, decode=lambda ids: " ".join(map(str, ids)))
    pairs = [("abcdefg"[: 1 + (3 * i) % 7], "") for i in range(9)]
    monkeypatch.setattr(evaluate, "DECODED", 2)
    prompts, texts = evaluate.decode(model, pairs, tokenizer, PLAIN, max_new=4)
    assert len(set(texts)) > 2 and len(set(map(len, prompts))) > 2
    for i, pair in enumerate(pairs):
        alone = evaluate.decode(model, [pair], tokenizer, PLAIN, max_new=4)
        assert (prompts[i], texts[i]) == (alone[0][0], alone[1][0])


def test_a_point_of_the_curve_is_the_mean_over_the_steps_since_the_last_one():
    """Rows of 10, 8, 2, 10 and 6 steps: the means over 18 and 18 steps, computed from the losses of single steps."""
    losses = [1 / (1 + step) for step in range(36)]
    rows, before = [], 0
    for step, validated in ((10, False), (18, True), (20, False), (30, False), (36, True)):
        rows.append({"step": step, "train_loss": sum(losses[before:step]) / (step - before),
                     "val_loss": 1.0 if validated else None})
        before = step
    assert plots.even_means(rows) == [(18, pytest.approx(sum(losses[:18]) / 18)),
                                      (36, pytest.approx(sum(losses[18:]) / 18))]


# Calibration, as train.py runs it

def calibrated(model, layers, examples, task, batch_size=4):
    def batches():
        return evaluate.calibration_batches(model, examples, task, batch_size, 0, CPU, PLAIN)
    ResLoRALinear.calibrate(layers, batches)
    return [layer.A_star.clone() for layer in layers if layer.earlier]


def language_model(dropout=0.0):
    model = tiny_gpt()
    return model, adapt(model, "reslora", {}, dropout=dropout), Write(Namespace(bos=0, eos=0), 16)


def test_calibration_masks_exactly_what_is_padding_and_leaves_the_model_training():
    """The mask is True at the ids of the examples, in the order of the batches; the model is in eval mode inside, and
    trains again afterwards. A classifier yields the sum of the margins, a language model None."""
    model, _, task = language_model(dropout=0.5)
    examples = examples_of_unlike_length()
    model.train()
    stream = evaluate.calibration_batches(model, examples, task, 4, 0, CPU, PLAIN)
    for indices, (mask, M) in zip(data.epoch_batches(examples, 4, "0/0"), stream, strict=True):
        assert not model.training and M is None
        assert mask.sum(1).tolist() == [len(examples[i][0]) - 1 for i in indices]
        assert (mask.int().diff(dim=1) <= 0).all()  # real tokens first
    assert model.training
    reader, label = tiny_roberta(), Label(Namespace(pad=1), 16, 3)
    rows = [([0, *torch.randint(3, 61, (3 + i % 4,)).tolist(), 2], i % 3) for i in range(8)]
    for indices, (mask, M) in zip(data.epoch_batches(rows, 4, "0/0"),
                                  evaluate.calibration_batches(reader, rows, label, 4, 0, CPU, PLAIN), strict=True):
        logits = [reader(torch.tensor([rows[i][0]]))[0][0] for i in indices]
        assert M.item() == pytest.approx(sum((z.max() - z.mean()).item() for z in logits))
        assert mask.sum(1).tolist() == [len(rows[i][0]) for i in indices] and M.requires_grad
    assert reader.training


@pytest.mark.parametrize("labels", [False, True])
def test_calibration_takes_so_many_batches_and_no_more(monkeypatch, labels):
    """A dozen for a language model, more for a classifier, whose texts are short."""
    assert evaluate.CALIBRATION < evaluate.CALIBRATION_LABELLED
    monkeypatch.setattr(evaluate, "CALIBRATION", 2)
    monkeypatch.setattr(evaluate, "CALIBRATION_LABELLED", 3)
    rows = [([0, 5, 6, 2], 1)] * 20
    model, task = (tiny_roberta(), Label(Namespace(pad=1), 16, 3)) if labels else (tiny_gpt(), language_model()[2])
    assert len(list(evaluate.calibration_batches(model, rows, task, 4, 0, CPU, PLAIN))) == (3 if labels else 2)


def test_padding_a_batch_further_changes_no_A_star():
    """Positions that the mask excludes do not count, whatever stands there."""
    model, layers, task = language_model()
    examples = examples_of_unlike_length()
    A_star = calibrated(model, layers, examples, task)

    class Wider(Write):
        def collate(self, rows, seed=""):
            idx, targets, real = super().collate(rows, seed)
            return F.pad(idx, (0, 2), value=7), F.pad(targets, (0, 2), value=-100), F.pad(real, (0, 2))
    for a, b in zip(A_star, calibrated(model, layers, examples, Wider(task.tokenizer, 16)), strict=True):
        torch.testing.assert_close(a, b)


def test_calibrating_twice_under_dropout_gives_the_same_A_star():
    """Nothing is dropped while the statistics are gathered, though the run trains with dropout."""
    model, layers, task = language_model(dropout=0.5)
    model.train()
    first, second = (calibrated(model, layers, examples_of_unlike_length(), task) for _ in range(2))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Selection

def test_compare_judges_a_rate_by_the_step_that_was_kept(tmp_path):
    """Not by the last row, nor by the best row of another column."""
    (tmp_path / "result.json").write_text(json.dumps({"selected": {"step": 4, "by": "validation accuracy"}}))
    write_csv(tmp_path / "log.csv", [dict(step=2, val_loss=0.9, val_accuracy=0.5), dict(step=3, val_loss=None),
                                     dict(step=4, val_loss=0.8, val_accuracy=0.9),
                                     dict(step=6, val_loss=0.1, val_accuracy=0.2)])
    assert compare.validation(tmp_path) == (0.9, 0.8, True)
    (tmp_path / "result.json").write_text(json.dumps({"selected": {"step": 6, "by": "validation loss"}}))
    assert compare.validation(tmp_path) == (0.1, 0.1, False)


# Two truths of the pages

def test_a_target_is_a_whole_name():
    """q does not adapt to_q, seq or q2; attn.q means the q inside attn."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "to_q", "seq", "q2")}),
                           "cross": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    lora.apply(model, lora.LoRALinear, ["attn.q"], r=2, alpha=2)
    assert [name for name, m in model.named_modules() if isinstance(m, lora.LoRALinear)] == ["attn.q"]
    lora.merge(model)
    assert len(lora.apply(model, lora.LoRALinear, ["q"], r=2, alpha=2)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_on_a_half_precision_base_rounds_once(dtype):
    """The merged weight is the fp32 sum, rounded: not the sum of W and a delta that was rounded before."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).to(dtype)
    model = nn.ModuleDict({"q": linear})
    layer, = lora.apply(model, lora.LoRALinear, ["q"], r=4, alpha=4)
    nn.init.normal_(layer.lora_B, std=0.3)
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    twice = layer.weight + layer.delta().to(dtype)
    lora.merge(model)
    assert model["q"].weight.dtype == dtype and (twice != exact.to(dtype)).any()
    assert (model["q"].weight == exact.float().to(dtype)).double().mean() > 0.999  # a tie of fp32 and fp64 apart
