"""What surrounds the mathematics in a run: schedules, batches, epochs, optimizer groups,
evaluation, calibration."""
import contextlib
import json
import math
from argparse import Namespace
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import adapt, tiny_gpt, tiny_roberta, unscaled
from matplotlib import pyplot
from test_train import command, few_records  # noqa: F401

import compare
import data
import lora
import train
from checkpoints import tokenizers
from checkpoints.files import read_csv, write_csv
from checkpoints.pretrained import from_pretrained
from data.tasks import Label, Mask, Write
from evaluation import evaluate, plots
from methods import METHODS, NoAdapter
from model import GPTConfig, LlamaConfig, RobertaConfig
from reslora import calibrate
from run import flags, machine, report

CPU, PLAIN = torch.device("cpu"), contextlib.nullcontext()


def examples_of_unlike_length(n=23, most=14):
    """[(ids, start)] as Write makes them, from two tokens to `most`, with targets from the second
    token on or later."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, most + 1, (n,), generator=rng).tolist()
    return [(torch.randint(1, 61, (length,), generator=rng).tolist(), 1 + i % (length - 1))
            for i, length in enumerate(lengths)]


# Schedules and steps

@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_is_its_formula_at_every_step(schedule):
    """Up to the w steps of the warm-up, which is a share of the run below 1 and else a number of
    steps: step / (w + 1). After it t = (step - w) / (steps - w + 1) and 1 - t, (1 + cos pi t) / 2,
    or 1."""
    rows = (0, 7, 0), (1, 7, 1), (3, 7, 3), (7, 7, 7), (0.06, 50, 3), (0.25, 10, 2.5)
    for warmup, steps, w in rows:
        settings = flags.Settings(lr=0.5, warmup=warmup, schedule=schedule, steps=steps)
        for step in range(1, steps + 1):
            t = (step - w) / (steps - w + 1)
            formula = {"linear": 1 - t, "cosine": 0.5 + 0.5 * math.cos(math.pi * t), "constant": 1}
            expected = 0.5 * (step / (w + 1) if step <= w else formula[schedule])
            assert train.lr_at(step, settings) == pytest.approx(expected, rel=1e-12)
            assert expected > 0


@pytest.mark.parametrize("n, batch, epochs, world, steps", [
    (64, 24, 2, 1, 6), (5, 8, 1, 1, 1), (64, 32, 1.5, 1, 3), (64, 64, 0.1, 1, 1), (64, 8, 1, 2, 4)])
def test_epochs_are_at_least_that_many_passes(
        tmp_path, base, monkeypatch, n, batch, epochs, world, steps):
    """The last batch of an epoch is a step, however few examples it has. Processes share them."""
    rows = data.load("restaurants")["train"]
    split = {"train": rows[:n], "validation": rows[:4], "test": rows[:4]}
    monkeypatch.setattr(data, "load", lambda *_: split)
    monkeypatch.setattr(machine, "WORLD", world)
    flags = ["--batch-size", str(batch), "--epochs", str(epochs), "--out", str(tmp_path)]
    args = train.parse(["--model", str(base), *flags, "--device", "cpu"])
    assert train.Run(args).settings.steps == steps


def test_every_dataset_and_method_has_its_defaults():
    """Those of the table in run/flags.py: steps or epochs, never both; a flag goes before it. Full
    fine-tuning has a smaller rate than an adapter, methods with small factors a larger one."""
    for dataset in (*data.GENERATED, "e2e", "gsm8k", "text", "glue/sst2", "openorca"):
        row = flags.DEFAULTS.get(dataset.split("/")[0], flags.OTHER)
        lr, reads = {}, data.about(dataset, "LABELS")
        for method in [name for name in METHODS if name != "head" or reads]:
            args = flags.parse(["--method", method, "--dataset", dataset])
            assert [args.steps, args.epochs] == [row.get("steps"), row.get("epochs")]
            assert (args.steps is None) != (args.epochs is None)
            assert args.batch_size == row["batch_size"]
            assert args.lr == row.get(f"{method}_lr", row.get("lr"))
            lr[method] = args.lr or flags.rate_of(method, GPTConfig())
        assert lr["full"] < lr["lora"] == lr["rslora"] == lr["reslora"] == lr["deltalora"]
        above = dataset in ("restaurants", "e2e", "reviews")
        for method in ("adalora", "loha", "lokr", *["head"] * (dataset == "reviews")):
            assert lr[method] > lr["lora"] if above else lr[method] >= lr["lora"]
        args = flags.parse(["--dataset", dataset, "--epochs", "2", "--batch-size", "3", "--lr",
                            "0.5"])
        assert (args.steps, args.epochs, args.batch_size, args.lr) == (None, 2, 3, 0.5)


def test_the_default_rate_of_a_model_depends_on_its_kind_and_width(base, tmp_path):
    """Not on the data alone: the table's rates are those of the shipped models. A wider model gets
    a smaller one; what is given goes before it."""
    for width, rate in ((576, 2e-3), (1024, 2e-3), (2048, 5e-4), (4096, 2e-4)):
        assert flags.rate_of("lora", LlamaConfig(hidden_size=width)) == rate
        assert flags.rate_of("full", LlamaConfig(hidden_size=width)) == rate / 10
    assert flags.rate_of("lora", RobertaConfig(hidden_size=768)) == 4e-4
    start = ["--dataset", "text", "--data-dir", "x", "--out", str(tmp_path), "--model"]
    model = from_pretrained(base)
    for name, given, rate in (("tiny-gpt", [], 5e-3), (str(base), [], 2e-3),
                              (str(base), ["--lr", "7e-4"], 7e-4)):
        assert flags.parse([*start, name, *given]).for_model(model, base).lr == rate


def test_defaults_that_depend_on_the_steps_are_what_the_help_says():
    """K is the steps of the warm-up, at least 1; AdaLoRA's phases are a tenth and four tenths of
    the run, its pace a hundredth."""
    flags = [*METHODS["deltalora"].flags.values(), *METHODS["adalora"].flags.values()]
    for steps, warmup, *expected in ((10, 0.6, 1, 1, 4, 1), (100, 6.9, 6, 10, 40, 1),
                                     (10000, 600, 600, 1000, 4000, 100)):
        defaults = [flag["default"] for flag in flags if callable(flag.get("default"))]
        assert [default(steps, warmup) for default in defaults] == expected


def test_matrices_decay_and_vectors_do_not():
    """Under a zero gradient a step multiplies matrices by 1 - lr * decay, and leaves biases and
    LayerNorms."""
    model = tiny_gpt().requires_grad_(True)
    args = train.parse(["--method", "full", "--weight-decay", "0.5", "--lr", "0.1", "--device",
                        "cpu"])
    optimizer = train.make_optimizer(model, args)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(),
                                   before[name] * (1 - 0.1 * 0.5 if p.dim() >= 2 else 1))


# Batches

def test_two_epochs_hold_every_example_once_each_in_different_orders():
    """Whatever the size of the batches, whose composition changes too; the same seed gives the same
    epoch."""
    examples = examples_of_unlike_length(200)
    for size in (1, 7, 200, 500):
        first, second = (data.epoch_batches(examples, size, f"0/{epoch}") for epoch in (0, 1))
        for batches in (first, second):
            assert Counter(i for batch in batches for i in batch) == Counter(range(200))
            assert all(len(batch) <= size for batch in batches)
        assert first == data.epoch_batches(examples, size, "0/0")
        if size < 200:
            assert (first != second and {frozenset(b) for b in first}
                    != {frozenset(b) for b in second} or size == 1)


def test_batches_are_of_like_length_and_do_not_come_sorted():
    """Little is padding: far less than with random batches. But short and long batches take
    turns."""
    examples = [([0] * length, 1) for length in range(2, 402)]
    batches = data.epoch_batches(examples, 8, "0/0")
    longest = [max(len(examples[i][0]) for i in batch) for batch in batches]
    padding = sum(most * len(batch)
                  for most, batch in zip(longest, batches, strict=True)) / sum(range(2, 402))
    assert padding < 1.1
    ups = sum(a < b for a, b in zip(longest, longest[1:], strict=False))
    assert 0.25 < ups / (len(longest) - 1) < 0.75


def test_the_batches_of_a_run_go_through_the_data_and_are_found_again_after_a_skip():
    """Two epochs are every target twice; skipping n steps gives what the (n + 1)-th step has;
    shares sum to `world`."""
    examples = examples_of_unlike_length(23)
    task, size = Write(Namespace(bos=0, eos=0), 16), 5
    steps = [step for step, _ in zip(data.step_batches(examples, task, size, seed=3), range(10),
                                     strict=False)]
    targets = sum(int((t != -100).sum()) for step in steps for _, t, _ in step)
    assert targets == 2 * sum(len(ids) - start for ids, start in examples)
    for skip in (1, 4, 5, 7):
        again = next(data.step_batches(examples, task, size, seed=3, skip=skip))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(again, steps[skip], strict=True))
    for world in (1, 2):
        for accumulate in (1, 3):
            parts = [next(data.step_batches(examples, task, size, accumulate, rank=rank,
                                            world=world)) for rank in range(world)]
            assert sum(share for part in parts for _, _, share in part) == pytest.approx(world)
            assert all(len(part) == accumulate for part in parts)


def test_a_masked_word_is_shown_as_mask_as_itself_or_as_an_ordinary_token(small_roberta):
    """Never as <s>, <pad>, </s> or <unk>, and any ordinary token may stand for it, the first and
    the last included."""
    tok = tokenizers.for_model(small_roberta, Namespace(model_type="roberta", vocab_size=325))
    task, shown = Mask(tok, 64), Counter()
    examples = [([0, *[100] * 60, 2], None)] * 40
    for seed in range(60):
        idx, targets, _ = task.collate(examples, str(seed))
        shown.update(idx[(targets != -100)].tolist())
    assert not {0, 1, 2, 3} & shown.keys()
    assert shown[tok.mask] > shown[100] > 0 and set(range(4, tok.mask)) <= shown.keys()


def test_every_epoch_masks_other_words(small_roberta):
    """Of one text, which is a batch and an epoch; a run that goes on in the second epoch masks what
    it would have masked."""
    tok = tokenizers.for_model(small_roberta, Namespace(model_type="roberta", vocab_size=325))
    one = [([0, *[100] * 60, 2], None)], Mask(tok, 64), 1
    steps = data.step_batches(*one)
    first, second, resumed = (next(stream)[0][1] != -100
                              for stream in (steps, steps, data.step_batches(*one, skip=1)))
    assert first.any() and second.any() and not torch.equal(first, second)
    assert torch.equal(second, resumed)


# Evaluation

@pytest.mark.parametrize("batch", [1, 4, 32])
def test_the_loss_of_a_split_is_the_sum_of_cross_entropies_over_the_number_of_targets(monkeypatch,
                                                                                      batch):
    """Computed here one text at a time, from logits: whatever the batch, however unlike the
    lengths, dropout or not."""
    monkeypatch.setattr(evaluate, "EVAL_BATCH", batch)
    model, examples = tiny_gpt(), examples_of_unlike_length()
    adapt(model, "lora", {}, dropout=0.5)
    model.train()
    task = Write(Namespace(bos=0, eos=0), 16)
    found, logits = evaluate.evaluate(model, examples, task, CPU, PLAIN)
    assert model.training and logits is None
    model.eval()
    total = sum(F.cross_entropy(model(torch.tensor([ids[:-1]]))[0][0, start - 1:],
                                torch.tensor(ids[start:]), reduction="sum").item()
                for ids, start in examples)
    assert found == pytest.approx(total / sum(len(ids) - start for ids, start in examples),
                                  rel=1e-9)


def test_a_report_is_of_the_test_split_and_a_point_of_the_curve_of_the_validation_split(
        monkeypatch, small_roberta):
    """A curve's point looks at the first so many texts, the report at all; accuracy is the share
    that is right."""
    model = tiny_roberta()
    rows = [([0, *torch.randint(3, 61, (3 + i % 4,)).tolist(), 2], i % 3) for i in range(30)]
    task = Label(Namespace(pad=1), 16, 3)
    dataset = Namespace(examples={"train": [], "validation": rows[:10], "test": rows[10:]},
                        task=task,
                        pairs={"train": [], "validation": [None] * 10, "test": [None] * 20},
                        labels=("a", "b", "c"), metrics=("accuracy",), module=Namespace())
    monkeypatch.setattr(evaluate, "EVAL_LABELLED", 4)

    def by_hand(rows):
        model.eval()
        right = [model(torch.tensor([ids]))[0].argmax().item() == label for ids, label in rows]
        return sum(right) / len(right)
    assert evaluate.report(model, dataset, CPU,
                           PLAIN)["accuracy"] == pytest.approx(by_hand(rows[10:]))
    assert evaluate.validate(model, dataset, CPU,
                             PLAIN)["accuracy"] == pytest.approx(by_hand(rows[:4]))


def test_decoding_for_a_report_has_no_dropout_and_leaves_the_model_training(base):
    """Twice the same texts from a model whose adapters drop half of their input."""
    model, tokenizer = from_pretrained(base), tokenizers.load(base, 320)
    adapt(model, "lora", {}, r=8, alpha=60, dropout=0.5)
    model.train()
    pairs = data.load("restaurants")["test"][:4]
    texts = [evaluate.decode(model, pairs, Write(tokenizer, 64), PLAIN, 20) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2] and all(m.training for m in model.modules())


@pytest.mark.whole
def test_the_picture_of_ranks_has_a_row_for_each_layer_and_says_what_colours_mean(monkeypatch,
                                                                                  tmp_path):
    """The first layer on top, the last rank beside its name, steps to the right."""
    figure, axis = pyplot.subplots()
    monkeypatch.setattr(plots, "picture", lambda path, **_: contextlib.nullcontext((figure, axis)))
    rows = [dict(step=2, ranks="4 4"), dict(step=6, ranks="3 0")]
    plots.draw_ranks(tmp_path / "a.png", rows, ["h.0.q", "h.1.q"], "t")
    assert ([text.get_text() for text in axis.get_yticklabels()] == ["0.q: 3", "1.q: 0"]
            and axis.yaxis_inverted())
    assert (figure.axes[1].get_ylabel() == "rank" and axis.get_xlim() == (0, 6) and axis.get_title()
            == "t")
    pyplot.close(figure)


def test_cut_texts_are_counted_over_all_splits(base, monkeypatch):
    """A text that just fits the context is not cut, one that is a token longer is."""
    tokenizer = tokenizers.load(base, 320)
    n = len(tokenizer.encode_ordinary("a ||")) + len(tokenizer.encode_ordinary(" abc")) + 2
    for context, cut in ((n - 1, 0), (n - 2, 1)):
        assert Write(tokenizer, context).encode([("a", "abc")])[1] == cut
    pairs = {"train": [("name : a", "abc " * 40)] * 3, "validation": [("name : a", "abc " * 40)],
             "test": [("name : a", "abc " * 40)] * 2}
    monkeypatch.setattr(data, "load", lambda *_: pairs)
    assert data.Dataset("restaurants").encode(base, from_pretrained(base), 32).cut == 6


def test_a_step_has_the_examples_of_all_processes(capsys):
    settings = flags.parse(["--batch-size", "4", "--grad-accum", "3"]).for_data(100, 2)
    report.announce(settings, {"train": []}, 0, {"trainable": 1, "total": 2}, processes=2)
    assert "2 processes; 180 steps of 24 examples" in capsys.readouterr().out


def test_three_examples_are_shown_from_all_over_the_test_split(monkeypatch, capsys):
    """One of each third, in their order, with what the model makes of them; of two texts both."""
    monkeypatch.setattr(report, "decode", lambda model, some, *_: (
        [record for record, _ in some], ["written"] * len(some)))
    for n, shown in ((90, [0, 30, 60]), (100, [0, 33, 66]), (2, [0, 1]), (4, [0, 1, 2])):
        pairs = [(f"record {i}", f"text {i}") for i in range(n)]
        dataset = Namespace(pairs={"test": pairs}, labels=(), task=Write(None, 20), tokenizer=None)
        report.print_examples(None, dataset, None, None)
        lines = capsys.readouterr().out.split("\n")
        for start, name in (("record", "record"), ("  ref", "  ref text")):
            said = [line for line in lines if line.startswith(start)]
            assert said == [f"{name} {i}" for i in shown]


def test_a_result_counts_the_trained_parameters_and_names_every_flag_of_the_method(tmp_path, base):
    """Counted by hand: two layers, q and v, r (d_in + d_out) each, beside a base of so many. A flag
    that was not given has its default."""
    found = train.main(command(base, tmp_path, "--method", "reslora"))
    whole = sum(p.numel() for p in from_pretrained(base).parameters())
    mine = 2 * 2 * 4 * (16 + 16)
    assert found["parameters"] == {"trainable": mine, "total": whole + mine}
    own = {"shortcut": "input", "pre_num": 1, "merge": ["regression"]}
    assert own.items() <= found["settings"].items()


def test_the_loss_of_a_step_is_the_mean_over_its_targets_and_the_norm_that_of_its_gradient():
    """Over the accumulations together, as one batch of all examples would give them, before the
    optimizer moves."""
    model = tiny_gpt()
    batches = next(data.step_batches(examples_of_unlike_length(12), Write(None, 20), 4, 3))
    assert len(batches) == 3
    total = sum(F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), reduction="sum")
                for idx, targets, _ in batches)
    loss = total / sum((targets != -100).sum() for _, targets, _ in batches)
    params = list(model.parameters())
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).norm()
    args = Namespace(device=CPU, amp=PLAIN, label_smoothing=0.0, clip=0.0)
    found = train.one_step(model, params, torch.optim.SGD(params, 0.1), unscaled(), NoAdapter, [],
                           batches, 1, args)
    torch.testing.assert_close(found, torch.stack([loss.detach(), norm]))


def test_half_precision_is_of_the_arithmetic_and_asked_for():
    """float32 computes in float32, bfloat16 in bfloat16 whatever the weights are."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        device, found, amp = machine.pick_device("cpu", name)
        with amp:
            assert found == name and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_interrupted_run_says_what_it_has_left(tmp_path, base, monkeypatch, capsys):
    """Ctrl-C in a step. Before the first checkpoint a run leaves no folder, only what else was in
    it; after one the line says which."""
    real, out = train.one_step, tmp_path / "out"
    for stopped, message in ((1, "nothing was saved"), (1, "nothing was saved"),
                             (5, f"step 4 is in {out}, --resume goes on from there")):
        calls = []

        def one_step(*args, calls=calls, stopped=stopped):
            calls.append(args)
            if len(calls) == stopped:
                raise KeyboardInterrupt
            return real(*args)
        monkeypatch.setattr(train, "one_step", one_step)
        with pytest.raises(SystemExit) as e:
            train.main(command(base, out))
        assert e.value.code == 130
        assert capsys.readouterr().err.endswith(f"train.py: interrupted; {message}\n")
        if not (out / "mine.txt").exists():
            assert not out.exists()
            out.mkdir()
            (out / "mine.txt").write_text("x")
    assert {file.name for file in out.iterdir()} == {
        "mine.txt", ".written", "log.csv", "resume.safetensors"}


def test_the_log_counts_every_second_of_training_once(tmp_path, base, monkeypatch):
    """By a clock on which a step takes a second and a validation 100, which are no training. The
    loss is read every 10 steps, and before each validation, one in 12."""
    now = [0]

    def takes(seconds, what):
        def timed(*args):
            now[0] += seconds
            return what(*args)
        return timed
    monkeypatch.setattr(train, "time", Namespace(time=lambda: now[0]))
    monkeypatch.setattr(train, "one_step", takes(1, train.one_step))
    monkeypatch.setattr(evaluate, "validate", takes(100, evaluate.validate))
    result = train.main(command(base, tmp_path, "--steps", "24", "--eval-every", "12"))
    seconds = {row["step"]: float(row["seconds"]) for row in read_csv(tmp_path / "log.csv")}
    assert seconds == {"10": 10, "12": 12, "20": 20, "24": 24}
    assert result["seconds"]["training"] == 24


def test_a_failure_to_compile_is_a_line_and_any_other_a_traceback(capsys):
    """What torch's compiler raises is the machine's fault; a bug of ours stays visible."""
    class Broken(Exception):
        pass

    def run(_):
        raise Broken("no compiler here")
    with pytest.raises(Broken):
        flags.command("x", lambda argv: None, run, [])
    for module in ("torch._dynamo.exc", "torch._inductor.exc"):
        Broken.__module__ = module
        with pytest.raises(SystemExit) as e:
            flags.command("x", lambda argv: None, run, [])
        assert e.value.code == 2
        assert (capsys.readouterr().err == "x: --compile does not work on this machine: no "
                "compiler here\n")


def test_texts_come_back_in_the_order_of_their_records(monkeypatch):
    """Records are decoded sorted by length and in batches; each gets the text that it has alone."""
    def encode(text):
        return [1 + ord(c) % 59 for c in text.removesuffix(" ||")]
    model = tiny_gpt()
    tokenizer = Namespace(encode_ordinary=encode,
                          bos=60, eos=60, decode=lambda ids: " ".join(map(str, ids)))
    pairs = [("abcdefg"[: 1 + (3 * i) % 7], "") for i in range(9)]
    monkeypatch.setattr(evaluate, "DECODED", 2)
    task = Write(tokenizer, 64)
    prompts, texts, cut = evaluate.decode(model, pairs, task, PLAIN, max_new=4)
    assert cut == sum(len(text.split()) == 4 for text in texts)
    assert len(set(texts)) > 2 and len(set(map(len, prompts))) > 2
    for i, pair in enumerate(pairs):
        alone = evaluate.decode(model, [pair], task, PLAIN, max_new=4)
        assert (prompts[i], texts[i]) == (alone[0][0], alone[1][0])


def test_a_point_of_the_curve_is_the_mean_over_the_steps_since_the_last_one():
    """Rows of 10, 8, 2, 10 and 6 steps: the means over 18 and 18 steps, computed from the losses of
    single steps."""
    losses = [1 / (1 + step) for step in range(36)]
    rows, before = [], 0
    for step, validated in ((10, False), (18, True), (20, False), (30, False), (36, True)):
        rows.append({"step": step, "train_loss": sum(losses[before:step]) / (step - before),
                     "val_loss": 1.0 if validated else None})
        before = step
    assert plots.even_means(rows) == [(18, pytest.approx(sum(losses[:18]) / 18)),
                                      (36, pytest.approx(sum(losses[18:]) / 18))]


# Calibration, as train.py runs it

def test_calibration_counts_what_is_no_padding_and_takes_a_classifier_s_margins(monkeypatch):
    """`real` is True at the ids of the examples, in the order of the batches. A classifier's margin
    is its largest logit minus the mean, a language model has none and runs without its head. A
    classifier, whose texts are short, has more batches."""
    assert evaluate.CALIBRATION < evaluate.CALIBRATION_LABELLED
    model, task = tiny_gpt(), Write(Namespace(bos=0, eos=0), 16)
    examples = examples_of_unlike_length()
    found = evaluate.calibration(model, examples, task, 4, 0, CPU, PLAIN)
    assert found["margin"] is None
    for indices, each in zip(data.epoch_batches(examples, 4, "0/0"), found["batches"], strict=True):
        mask = found["real"](each)
        assert mask.sum(1).tolist() == [len(examples[i][0]) - 1 for i in indices]
        assert (mask.int().diff(dim=1) <= 0).all()  # real tokens first
        assert torch.equal(found["run"](each), model.hidden(each[0]))
    reader, label = tiny_roberta(), Label(Namespace(pad=1), 16, 3)
    rows = [([0, *torch.randint(3, 61, (3 + i % 4,)).tolist(), 2], i % 3) for i in range(8)]
    found = evaluate.calibration(reader, rows, label, 4, 0, CPU, PLAIN)
    for indices, each in zip(data.epoch_batches(rows, 4, "0/0"), found["batches"], strict=True):
        logits = [reader(torch.tensor([rows[i][0]]))[0][0] for i in indices]
        M = found["margin"](found["run"](each)).item()
        assert M == pytest.approx(sum((z.max() - z.mean()).item() for z in logits))
        assert found["real"](each).sum(1).tolist() == [len(rows[i][0]) for i in indices]
    monkeypatch.setattr(evaluate, "CALIBRATION", 2)
    monkeypatch.setattr(evaluate, "CALIBRATION_LABELLED", 1)
    for of, n in (((model, examples * 4, task), 2), ((reader, rows, label), 1)):
        assert len(list(evaluate.calibration(*of, 4, 0, CPU, PLAIN)["batches"])) == n


def test_neither_more_padding_nor_dropout_changes_A_star():
    """Positions that the mask excludes do not count, whatever stands there; nothing is dropped
    while the statistics are gathered, though the run trains with dropout."""
    class Wider(Write):
        def collate(self, rows, seed=""):
            idx, targets, real = super().collate(rows, seed)
            return F.pad(idx, (0, 2), value=7), F.pad(targets, (0, 2),
                                                      value=-100), F.pad(real, (0, 2))
    model, found = tiny_gpt(), []
    layers = adapt(model, "reslora", {}, dropout=0.5)
    for kind in (Write, Wider, Write):
        model.train()
        of = model, examples_of_unlike_length(), kind(Namespace(bos=0, eos=0), 16), 4, 0, CPU, PLAIN
        calibrate(model, **evaluate.calibration(*of))
        assert all(module.training for module in model.modules())
        found.append(torch.stack([layer.A_star for layer in layers if layer.earlier]))
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[0], found[2])


# Selection

def test_compare_judges_a_rate_by_the_step_that_was_kept(tmp_path):
    """Not by the last row, nor by the best row of another column."""
    columns = "step", "val_loss", "val_accuracy"
    rows = [(2, 0.9, 0.5), (3, None, None), (4, 0.8, 0.9), (6, 0.1, 0.2)]
    write_csv(tmp_path / "log.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    for step, metric, expected in ((4, "accuracy", (0.9, 0.8, True)),
                                   (6, "loss", (0.1, 0.1, False))):
        selected = {"step": step, "by": f"validation {metric}"}
        (tmp_path / "result.json").write_text(json.dumps({"selected": selected}))
        assert compare.validation(tmp_path) == expected


# Two truths of the pages

def test_a_target_is_a_whole_name():
    """q does not adapt to_q, seq or q2; attn.q means the q inside attn."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(4, 4)
                                                  for name in ("q", "to_q", "seq", "q2")}),
                           "cross": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    lora.apply(model, lora.LoRALinear, ["attn.q"], r=2, alpha=2)
    assert [name for name, m in model.named_modules()
            if isinstance(m, lora.LoRALinear)] == ["attn.q"]
    lora.merge(model)
    assert len(lora.apply(model, lora.LoRALinear, ["q"], r=2, alpha=2)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_on_a_half_precision_base_rounds_once_and_keeps_the_mode(dtype):
    """The merged weight is the fp32 sum, rounded: not the sum of W and a delta that was rounded
    before. Behind a merge a model in eval has every module in eval, one in training in training."""
    for training in (True, False):
        model = nn.ModuleDict({"q": nn.Linear(64, 64).to(dtype)}).train(training)
        layer, = lora.apply(model, lora.LoRALinear, ["q"], r=4, alpha=4, dropout=0.5)
        nn.init.normal_(layer.lora_B, std=0.3)
        assert {m.training for m in model.modules()} == {training}
        A, B = layer.lora_A.double(), layer.lora_B.double()
        exact = layer.weight.double() + layer.scaling * B @ A
        twice = layer.weight + layer.delta().to(dtype)
        lora.merge(model)
        assert {m.training for m in model.modules()} == {training}
        assert model["q"].weight.dtype == dtype and (twice != exact.to(dtype)).any()
        same = model["q"].weight == exact.float().to(dtype)  # ties of fp32 and fp64 apart
        assert same.double().mean() > 0.999


def test_a_run_on_a_bf16_base_is_merged_in_fp32(tmp_path, base):
    """The W that is measured is W + s B A to the last digits of fp32: bf16 would round it."""
    args = train.parse(command(base, tmp_path, "--dtype", "bfloat16", "--device", "cpu"))
    run, expected = train.Run(args), {}
    for name, layer in zip(run.names, run.layers, strict=True):
        nn.init.normal_(layer.lora_B, std=0.3)
        A, B, W = layer.lora_A.double(), layer.lora_B.double(), layer.weight
        assert W.dtype == torch.bfloat16
        expected[name] = W.double() + layer.scaling * B @ A
    run.report = lambda *_: None
    train.merge_and_measure(run, {})
    for name, W in expected.items():
        found = run.model.get_submodule(name).weight
        torch.testing.assert_close(found.double(), W, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flags", ["lora", "reslora --merge bi,none"])
def test_a_run_merges_in_one_mode(tmp_path, base, flags):
    """A model in eval stays so, calibrated or not: every module of the merged one, and of the copy
    that another way of merging is measured on."""
    args = train.parse(command(base, tmp_path, "--dropout", "0.5", "--method", *flags.split()))
    run, modes = train.Run(args), []
    run.report = lambda model, stage: modes.append({m.training for m in model.modules()})
    run.model.eval()
    train.merge_and_measure(run, {})
    assert modes == [{False}] * (1 if flags == "lora" else 2)
