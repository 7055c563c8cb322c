"""Adapt a GPT or a RoBERTa with one method of the LoRA family: base, unmerged and merged compared, the result kept.

    python train.py --method reslora --rank 64                                   needs nothing: half a minute on a CPU
    python train.py --method reslora --rank 16 --dataset reviews                 the same for classification
    python train.py --method deltalora --dataset e2e --model gpt2 --epochs 5     from the hub, better on a GPU
    python train.py @runs/glue_sst2_roberta_base.args                            a paper's recipe

The page reads top to bottom: settings; the pieces of a loop; the run: its setting up, the loop, merging, the report.
"""
import argparse
import copy
import math
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import checkpoint
import data
import decoding
import lora
from cli import RANK, WORLD, Parser, command, join, pick_device
from methods import METHODS
from metrics import METRICS, perplexity
from model import MODELS, from_pretrained, locate

# What fits half a minute on two CPU cores with the embedded models: steps, examples per step, learning rate. Full
# fine-tuning wants a smaller rate than an adapter, methods that start with smaller factors a larger one.
SMALL_START = ("adalora_lr", "loha_lr", "lokr_lr")
DEFAULTS = {
    "restaurants": dict(steps=180, batch_size=32, lr=1e-2, full_lr=6e-3, **dict.fromkeys(SMALL_START, 3e-2)),
    "e2e": dict(steps=150, batch_size=32, lr=1e-2, full_lr=3e-3, **dict.fromkeys(SMALL_START, 3e-2)),
    "stdlib": dict(steps=100, batch_size=16, lr=5e-3, full_lr=2e-3),
    "text": dict(steps=100, batch_size=16, lr=5e-3, full_lr=2e-3),
    "world": dict(steps=100, batch_size=32, lr=5e-3, full_lr=3e-3),
    "opinions": dict(steps=100, batch_size=32, lr=5e-3, full_lr=3e-3),
    "reviews": dict(steps=500, batch_size=64, lr=3e-3, full_lr=1e-3, head_lr=1e-2,
                    **dict.fromkeys(SMALL_START, 1e-2)),
    # For real models, not for half a minute: a first try. The papers train longer, their recipes are in runs/.
    "gsm8k": dict(epochs=3, batch_size=16, lr=5e-4, full_lr=5e-5),
    "glue": dict(epochs=3, batch_size=32, lr=4e-4, full_lr=2e-5),
}
ADAPTER = dict(rank=8, alpha=16.0, dropout=0.0, targets="q,v")  # defaults of every method but full
LOG_EVERY = 10  # steps between two readings of the loss; reading it makes a GPU wait
EVAL_EXAMPLES = 128  # validation texts per point of the curve; the losses of the report are of the whole test split
EVAL_LABELLED = 1000  # the same where texts are classified: an accuracy needs more of them
EVAL_BATCH = 32  # whatever --batch-size is: it has a part in which words are masked
SCORED = 64  # records decoded where the dataset can score a text; for a report by such a metric, all of the test split
DECODED = 16  # at a time: their cache holds 2 L C numbers per token
CALIBRATION = 16  # training batches for merging
CALIBRATION_LABELLED = 128  # the same for a classifier: its texts are short, and few of their tokens count


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def parse(argv):
    """Flags -> a namespace without a None that matters; ValueError for what does not fit together."""
    parser = Parser("train.py", __doc__)
    add = parser.add_argument_group("method").add_argument
    add("--method", default="lora", help=", ".join(METHODS))
    add("--rank", type=int, help="r, 1 up to the smaller side of the linears (8)")
    add("--alpha", type=float, help="numerator of the scale (16)")
    add("--rs", action="store_true", help="alpha times sqrt(r), rsLoRA's scale, for whatever method")
    add("--dropout", type=float, help="on the input of A (0)")
    add("--targets", help="which linears, of q,k,v,o,up,down (q,v, the papers' choice)")
    add("--init-from", help="method lora: go on from an adapter folder, ours or PEFT's, with its ranks and targets")
    for name, method in METHODS.items():
        add = parser.add_argument_group(name).add_argument if method.flags else None
        for name, spec in method.flags.items():  # SUPPRESS: a flag that was not given leaves no trace
            add("--" + name.replace("_", "-"), **{**spec, "default": argparse.SUPPRESS})
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help=f"{', '.join(MODELS)}, a checkpoint folder or a hub id (the tiny one that fits the dataset)")
    add("--dataset", help=", ".join(data.DATASETS) + " (restaurants; with a RoBERTa by name, reviews)")
    add("--data-dir", help="read the dataset from this folder (text: or file) instead of the hub")
    add("--context", type=int, help="longest sequence in tokens (the model's, at most 256)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="optimizer steps (by dataset)")
    add("--epochs", type=float, help="instead of --steps")
    add("--batch-size", type=int, help="examples per forward (by dataset)")
    add("--grad-accum", type=int, default=1, help="batches per step: the same step with less memory (1)")
    add("--lr", type=float, help="peak learning rate (by dataset)")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--schedule", choices=("linear", "cosine", "constant"), default="linear", help="after the warm-up")
    add("--warmup", type=float, default=0.06, help="steps, or below 1 the share of the run (.06)")
    add("--weight-decay", type=float, default=0.01, help="on matrices, decoupled (.01)")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping (1)")
    add("--label-smoothing", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of adapters, data order and dropout")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cpu, cuda, mps (cuda, else cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the arithmetic (bfloat16 on cuda)")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster on a GPU")
    add = parser.add_argument_group("run folder").add_argument
    add("--out", type=Path, help="out/<dataset>-<method>-r<rank>-s<seed>")
    add("--eval-every", type=int, help="steps between validations, each a checkpoint (a tenth of the run)")
    add("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    add("--save-merged", action="store_true", help="write merged/, a checkpoint that transformers loads")
    args = parser.parse_args(argv)
    if args.method not in METHODS:
        raise ValueError(f"unknown method {args.method!r}: choose from {', '.join(METHODS)}")
    if args.dataset is None:
        args.dataset = "reviews" if "roberta" in Path(args.model or "").name else "restaurants"
    if args.dataset not in data.DATASETS:
        raise ValueError(f"unknown dataset {args.dataset!r}: choose from {', '.join(data.DATASETS)}")
    method, Adapter = METHODS[args.method], METHODS[args.method].adapter
    if not (Adapter or method.trains_base or data.labels(args.dataset)):
        raise ValueError(f"--method {args.method} trains a classifier's head alone, and {args.dataset} has nothing to "
                         "classify")
    reads = data.labels(args.dataset) or args.dataset == "opinions"
    args.model = args.model or ("tiny-roberta" if reads else "tiny-gpt")
    for other in METHODS:
        for name in METHODS[other].flags.keys() & vars(args).keys() - method.flags.keys():
            raise ValueError(f"--{name.replace('_', '-')} is a flag of method {other}, not of {args.method}")
    if args.rs and (Adapter is None or Adapter.scale is not lora.LoRALinear.scale):
        raise ValueError(f"--rs is not for {args.method}: it gives the square root to adapters that scale by alpha / r")
    if args.init_from is not None:
        if Adapter is not lora.LoRALinear:
            raise ValueError(f"--init-from {args.init_from} is for method lora, not {args.method}")
        for name in ("rank", "alpha", "targets", "rs"):
            if getattr(args, name):
                raise ValueError(f"--init-from {args.init_from} brings its own {name}: drop --{name}")
    if args.steps is not None and args.epochs is not None:
        raise ValueError("--steps and --epochs say the same thing: give one")
    for name, value in ADAPTER.items():
        if Adapter is None:
            if getattr(args, name) is not None:
                print(f"note     --{name} says nothing to method {args.method}, which has no adapter")
            setattr(args, name, None)
        elif getattr(args, name) is None and (name == "dropout" or args.init_from is None):
            setattr(args, name, value)
    defaults = DEFAULTS[args.dataset.split("/")[0]]
    args.batch_size = defaults["batch_size"] if args.batch_size is None else args.batch_size
    if args.lr is None:
        args.lr = defaults.get(f"{args.method}_lr", defaults["lr"])
    if args.steps is None and args.epochs is None:
        args.steps, args.epochs = defaults.get("steps"), defaults.get("epochs")
    positive = "steps", "epochs", "batch_size", "grad_accum", "lr", "alpha", "context", "eval_every"
    for name in positive:
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name, high in (("warmup", math.inf), ("weight_decay", math.inf), ("clip", math.inf), ("label_smoothing", 1)):
        if not 0 <= getattr(args, name) < high:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more{' and below 1' * (high == 1)}, "
                             f"not {getattr(args, name)}")
    if (args.steps or 0) > 10**8:
        raise ValueError(f"--steps must be at most 10^8, not {args.steps}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be in 0..2^63 - 1, not {args.seed}")
    rank = "" if args.rank is None else f"-r{args.rank}"
    args.out = args.out or Path(f"out/{args.dataset.replace('/', '-')}-{args.method}{rank}-s{args.seed}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, not a folder")
    args.device, args.dtype, args.amp = pick_device(args.device, args.dtype)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Pieces

def lr_at(step, steps, args):
    """Learning rate of step 1..steps: linear warm-up, then linear, cosine or no decay towards 0."""
    warmup = args.warmup if args.warmup >= 1 else args.warmup * steps
    if step <= warmup:
        return args.lr * step / (warmup + 1)
    t = (step - warmup) / (steps - warmup + 1)  # in (0, 1): the last step still learns
    return args.lr * {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[args.schedule]


def make_optimizer(params, args):
    """AdamW or SGD, weight decay on matrices only; fused into one kernel where that exists."""
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.SGD if args.optimizer == "sgd" else torch.optim.AdamW
    return optimizer([g for g in groups if g["params"]], args.lr, fused=args.device.type in ("cpu", "cuda"))


def batches(examples, task, args, skip=0):
    """Endless, epoch after epoch, from step `skip` on: what this process computes of each optimizer step, as a list of
    (idx, targets, share of all targets of the step), one item for each accumulation.

    A step's examples do not depend on how they are dealt out: two processes, or two accumulations, with half the batch
    each see what one sees with all of it.
    """
    epoch, parts = 0, args.grad_accum * WORLD
    while True:
        order = data.epoch_batches(examples, args.batch_size * parts, f"{args.seed}/{epoch}")
        for number, indices in list(enumerate(order))[skip:]:
            idx, targets, real = task.collate([examples[i] for i in indices], f"{args.seed}/{epoch}/{number}")
            total, dealt = int((targets != -100).sum()), []
            for part in range(RANK, parts, WORLD):
                # the last batch of an epoch may be smaller than the number of parts: then an example counts nothing
                rows, counts = (slice(part, None, parts), True) if part < len(indices) else (slice(1), False)
                T = int(real[rows].sum(1).max())
                some = targets[rows, :T] if targets.dim() > 1 else targets[rows]
                dealt.append((idx[rows, :T], some, counts * int((some != -100).sum()) / total))
            yield dealt
        skip, epoch = max(0, skip - len(order)), epoch + 1


def to_device(idx, device):
    """Asynchronous where the device allows it. Targets stay on the CPU, see model.picked."""
    return idx.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else idx.to(device)


@torch.no_grad()
def evaluate(model, examples, task, args):
    """(mean loss per target, logits (N, L) in the order of the examples if the task is to label them, else None)"""
    model.eval()
    total, count, found = 0, 0, []
    near = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))  # neighbours in length: little padding
    for i in range(0, len(near), EVAL_BATCH):
        # of masked words: the seed fixes which, so that models are comparable
        idx, targets, _ = task.collate([examples[j] for j in near[i:i + EVAL_BATCH]], f"evaluation/{i}")
        n = int((targets != -100).sum())
        with args.amp:
            logits, mean = model(to_device(idx, args.device), targets)
        total, count = total + n * mean, count + n
        if isinstance(task, data.Label):
            found.append(logits.float())
    model.train()
    return float(total) / count, torch.cat(found).cpu()[torch.tensor(near).argsort()] if found else None


def decode(model, pairs, tokenizer, max_new=96):
    """Prompts and greedy texts, in the dtype of the weights: what records say, how the beginning of a plain text goes
    on."""
    prompts = [tokenizer.encode_ordinary(record + " ||" if record else text[:400]) for record, text in pairs]
    some = min(32, model.context // 2 - 1)
    prompts = [p if record else p[:some] for p, (record, _) in zip(prompts, pairs, strict=True)]
    model.eval()
    texts = []
    for i in range(0, len(prompts), DECODED):
        begun = [[tokenizer.eot_token, *p] for p in prompts[i:i + DECODED]]
        texts += decoding.generate(model, begun, max_new, tokenizer.eot_token)
    model.train()
    return [tokenizer.decode(p).strip() for p in prompts], [tokenizer.decode(t).strip() for t in texts]


def calibration(model, examples, task, args):
    """Send training batches through a model; yield after each where it is no padding (B, T) and M, by how much a
    classifier prefers its class or what a regression says: its gradient tells the tokens that matter. Else M is None.
    """
    model.eval()
    label = isinstance(task, data.Label)
    order = data.epoch_batches(examples, args.batch_size, f"{args.seed}/0")
    for number, indices in enumerate(order[:CALIBRATION_LABELLED if label else CALIBRATION]):
        idx, targets, real = task.collate([examples[i] for i in indices], f"{args.seed}/0/{number}")
        with args.amp, torch.set_grad_enabled(label):
            M = None
            if not label:
                model.hidden(to_device(idx, args.device))  # what the layers read, and no vocabulary
            else:
                logits, _ = model(to_device(idx, args.device), targets)  # (B, L)
                M = (logits if logits.size(1) == 1 else logits.amax(1) - logits.mean(1)).sum()
        yield real.to(args.device), M
    model.train()


# ---------------------------------------------------------------------------------------------------------------------
# The run

class Diverged(ValueError):
    """A run whose loss or gradient is not finite any more."""


class Run:
    """What all stages share: the data, encoded, the model with its adapters, the settings that make it this run."""

    def __init__(self, args):
        self.args = args
        torch.manual_seed(args.seed)
        self.source = locate(args.model)
        for flag, folder in (("model", self.source), ("init-from", args.init_from)):
            if folder is not None and Path(folder).resolve() in (args.out.resolve(), (args.out / "merged").resolve()):
                raise ValueError(f"--{flag} {folder} lies in the run folder {args.out}, which this run replaces: "
                                 "choose another --out")
        self.labels = data.labels(args.dataset)  # names; one for a regression, none where texts are predicted
        self.model = from_pretrained(self.source, len(self.labels))
        if not self.labels and self.model.fresh_head and not METHODS[args.method].trains_base:
            raise ValueError(f"--method {args.method} freezes the head, and {self.source} has none for masked tokens: "
                             "choose a checkpoint with one, or --method full")
        limit = self.model.context
        args.context = args.context or min(limit, 256)
        if not 4 <= args.context <= limit:
            raise ValueError(f"--context {args.context} is not in 4..{limit}, the model's")
        if len(self.labels) == 1 and args.label_smoothing:
            raise ValueError(f"--label-smoothing {args.label_smoothing:g} is for classes, not for numbers as in "
                             f"{args.dataset}")
        self.tokenizer, self.task = data.task(args.dataset, self.source, self.model, args.context)
        # the task's own metric selects the checkpoint that is kept; losses are better low, all others high
        self.metrics = data.metrics(args.dataset)
        self.metric = self.metrics[0] if self.metrics else "loss"

        self.pairs = data.load(args.dataset, args.data_dir)
        encoded = {split: self.task.encode(pairs) for split, pairs in self.pairs.items()}
        self.examples = {split: examples for split, (examples, _) in encoded.items()}
        self.train, self.val = self.examples["train"], self.examples["validation"]
        cut = sum(n for _, n in encoded.values())
        if args.epochs:
            per_epoch = math.ceil(len(self.train) / (args.batch_size * args.grad_accum * WORLD))
            args.steps = math.ceil(min(args.epochs * per_epoch, 10**8))
        args.eval_every = min(args.eval_every or math.ceil(args.steps / 10), args.steps)

        method = METHODS[args.method]
        hparams = {name: getattr(args, name, spec.get("default")) for name, spec in method.flags.items()}
        hparams = {name: value(args.steps) if callable(value) else value for name, value in hparams.items()}
        self.model.to(args.device)
        self.first = 1  # the first step whose weights may be kept
        self.Adapter, self.layers = checkpoint.adapt_as(self.model, {**vars(args), **hparams})
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        name_of = {m: name for name, m in self.model.named_modules()}
        self.names = [name_of[layer] for layer in self.layers]
        # what may change on resuming
        elsewhere = "resume", "out", "save_merged", "device", "amp", "epochs", "compile", *method.for_merging
        self.hparams = hparams
        self.settings = {k: v for k, v in {**vars(args), **hparams}.items() if k not in elsewhere}
        self.settings["processes"] = WORLD
        if args.model not in MODELS and Path(args.model).is_dir():
            self.settings["model"] = str(self.source.resolve())  # from wherever the run is read
        if args.init_from:
            self.settings["init_from"] = str(Path(args.init_from).resolve())
            self.settings["init_weights"] = checkpoint.fingerprint_adapter(args.init_from)
        self.settings["base_weights"] = checkpoint.fingerprint(self.source / "model.safetensors")
        files = (self.source / name for name in ("config.json", *checkpoint.TOKENIZERS))
        self.settings["base_files"] = checkpoint.fingerprint([f.read_bytes() for f in files if f.exists()])
        self.settings["data"] = checkpoint.fingerprint(self.pairs)

        trainable, total = (sum(p.numel() for p in ps) for ps in (self.params, self.model.parameters()))
        self.parameters = {"trainable": trainable, "total": total}
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in self.examples.items())
        print(f"data     {args.dataset}: {sizes} examples" + f"; {cut} texts cut at {args.context} tokens" * bool(cut))
        chosen = "".join(f", {name} {','.join(map(str, value)) if isinstance(value, list) else value}"
                         for name, value in hparams.items() if value is not None)
        print(f"method   {args.method}{chosen}; {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
        print(f"machine  {args.device}, {args.dtype}" + f", {WORLD} processes" * (WORLD > 1)
              + f"; {args.steps} steps of {args.batch_size * args.grad_accum * WORLD} examples, "
              f"learning rate {args.lr:g}")

    def measure(self, model, split, some=None, scored=SCORED):
        """{metric: value} on a split, or on `some` examples of it; of decoded texts on the first `scored` of it."""
        examples, pairs = self.examples[split][:some], self.pairs[split]
        loss, logits = evaluate(model, examples, self.task, self.args)
        if self.labels:
            found = logits.squeeze(1) if len(self.labels) == 1 else logits.argmax(1)
            truth = torch.tensor([label for _, label in examples], dtype=found.dtype)
            return {"loss": loss, **{name: METRICS[name](found.numpy(), truth.numpy()) for name in self.metrics}}
        values = {"loss": loss, "perplexity": perplexity(loss)}  # of a RoBERTa: for masked tokens
        scorer = getattr(data.module(self.args.dataset), "score", None)
        if scorer and scored:
            max_new = getattr(data.module(self.args.dataset), "MAX_NEW", 96)
            values.update(scorer(pairs[:scored], decode(model, pairs[:scored], self.tokenizer, max_new)[1]))
        return values

    def validate(self):
        """{metric: value} of a point of the curve"""
        some = EVAL_LABELLED if self.labels else EVAL_EXAMPLES
        return self.measure(self.model, "validation", some, SCORED if self.metrics else 0)

    def report(self, model):
        """{metric: value} on the test split, and on a second one if there is one."""
        values = self.measure(model, "test", scored=len(self.pairs["test"]) if self.metrics else SCORED)
        for split in self.examples.keys() - {"train", "validation", "test"}:
            values.update({f"{name} ({split})": value for name, value in self.measure(model, split).items()})
        return values


def fit(run):
    """The loop. Leaves the model as it was at its best validation and returns the rows of log.csv."""
    args, model, Adapter = run.args, run.model, run.Adapter
    state_file, log_file = args.out / "resume.safetensors", args.out / "log.csv"
    optimizer = make_optimizer(run.params, args)
    rows, done, best = [], 0, {}
    if args.resume:
        done, rows, best = checkpoint.load_state(state_file, model, optimizer, run.settings, run.first)
        print(f"resume   {args.out} after step {done}")
        if RANK == 0:
            checkpoint.write_log(log_file, rows)  # it may be a step behind
    if RANK:
        torch.manual_seed(hash((args.seed, RANK, done)))  # dropout of its own
    # only what has a gradient travels; a method's own motions are the same in all processes, as the gradients are
    forward = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False) if WORLD > 1 else model
    forward = torch.compile(forward) if args.compile else forward
    stream = batches(run.train, run.task, args, skip=done)
    seconds, saved = rows[-1]["seconds"] if rows else 0.0, done
    pending, tokens, clock = [], 0, time.time()
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, disable=RANK > 0 or None, unit="step")
    model.train()
    try:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args.steps, args)
            dealt = next(stream)
            pending.append(one_step(run, forward, optimizer, dealt, step))
            tokens += WORLD * sum(idx.numel() for idx, _, _ in dealt)

            due = step % args.eval_every == 0 or step == args.steps
            if step % LOG_EVERY and not due:
                continue
            readings = torch.stack(pending)  # (steps, 2)
            if WORLD > 1:
                dist.all_reduce(readings)
            readings = (readings / WORLD).tolist()  # the one place where the device is waited for
            if RANK:
                check_finite(readings, None, step, saved, args)
                pending = []
                continue
            speed = tokens / (time.time() - clock)
            seconds += time.time() - clock
            valued = run.validate() if due else {}
            val_loss = valued.get("loss")
            check_finite(readings, val_loss, step, saved, args)
            train_loss, grad_norm = (sum(column) / len(readings) for column in zip(*readings, strict=True))
            rows.append(dict(step=step, lr=optimizer.param_groups[0]["lr"], train_loss=train_loss,
                             grad_norm=grad_norm, val_loss=val_loss, seconds=round(seconds, 3)))
            if run.metric != "loss":
                rows[-1][f"val_{run.metric}"] = valued.get(run.metric)
            if Adapter and (ranks := Adapter.ranks(run.layers)):
                rows[-1]["ranks"] = " ".join(map(str, ranks))
            bar.set_postfix_str(f"loss {train_loss:.3f}, {speed:,.0f} tokens/s")
            if due:
                also = f"  {run.metric} {valued[run.metric]:.4f}" * (run.metric != "loss")
                bar.write(f"step {step:5}  training loss {train_loss:.4f}  validation loss {val_loss:.4f}{also}  "
                          f"{speed:7,.0f} tokens/s", file=sys.stdout)
                if checkpoint.best_step(rows, run.first) == step:
                    best = {name: t.detach().to("cpu", copy=True) for name, t in checkpoint.changing(model).items()}
                if not saved:
                    # what an earlier run left, now that this one has something to show
                    checkpoint.clear(args.out, checkpoint.STATE + checkpoint.RESULTS)
                checkpoint.save_state(state_file, model, optimizer, step, run.settings, rows, best, run.first)
                checkpoint.write_log(log_file, rows)
                saved = step
            pending, tokens, clock = [], 0, time.time()
    except KeyboardInterrupt:
        where = f"step {saved} is in {args.out}, --resume goes on from there" if saved else "nothing was saved"
        print(f"\ninterrupted; {where}", file=sys.stderr)
        raise SystemExit(130) from None
    if RANK == 0:
        with torch.no_grad():
            for name, t in checkpoint.changing(model).items():
                t.copy_(best[name])
    return rows


def one_step(run, forward, optimizer, dealt, step):
    """One optimizer step over this process's share of the batch. Returns (2,): its part of the loss, times the number
    of processes, and the norm of the gradient of all."""
    args, loss = run.args, 0
    for idx, targets, share in dealt:
        # gradients travel once, after the last accumulation
        wait = forward.no_sync() if WORLD > 1 and idx is not dealt[-1][0] else nullcontext()
        with wait, args.amp:
            _, mean = forward(to_device(idx, args.device), targets, args.label_smoothing)
        part = mean * (share * WORLD)  # processes are averaged, so that all is the mean over all targets
        part.backward()
        loss = loss + part.detach()
    if run.Adapter:
        run.Adapter.before_step(run.layers, step)
    norm = nn.utils.clip_grad_norm_(run.params, args.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    if run.Adapter:
        run.Adapter.after_step(run.layers, step, lambda: calibration(run.model, run.train, run.task, args))
    return torch.stack([loss, norm])


def check_finite(readings, val_loss, step, saved, args):
    """ValueError at the first step, of those up to `step`, whose loss, gradient norm or validation is not finite."""
    for number, values in enumerate([*readings, [val_loss or 0.0]], step - len(readings) + 1):
        if not all(map(math.isfinite, values)):
            kept = f"step {saved} is in {args.out}" if saved else "nothing was saved"
            raise Diverged(f"loss or gradient is not finite at step {min(number, step)}: stopped; {kept}. "
                           f"A lower --lr than {args.lr:g} may help")


def merge(run, metrics):
    """Merge for good, after measuring on copies the other ways that were asked for; write the adapter."""
    args, model, Adapter = run.args, run.model, run.Adapter
    checkpoint.clear(args.out, checkpoint.RESULTS)  # of another merge; the new adapter must not stand beside them
    kept, *others = run.layers[0].merges
    for how in others:
        trial = copy.deepcopy(model)
        layers = [m for m in trial.modules() if isinstance(m, Adapter)]
        Adapter.calibrate(layers, lambda trial=trial: calibration(trial, run.train, run.task, args), how)
        metrics[f"merged by {how}"] = run.report(lora.merge(trial))
    Adapter.calibrate(run.layers, lambda: calibration(model, run.train, run.task, args), kept)
    checkpoint.save_adapter(args.out, model, run.source, args.dropout)
    metrics["merged"] = run.report(lora.merge(model))


def show(run):
    """Print what the trained model makes of three examples of the test split."""
    some = run.pairs["test"][:: max(1, len(run.pairs["test"]) // 3)][:3]
    if run.labels:
        _, logits = evaluate(run.model, run.task.encode(some)[0], run.task, run.args)
        print()
        for (texts, truth), row in zip(some, logits, strict=True):
            said, true = ((f"{row.item():.2f}", f"{truth:.2f}") if len(run.labels) == 1 else
                          (run.labels[row.argmax()], run.labels[truth]))
            print(f"{' / '.join(texts)}\n  -> {said} ({true})")
    elif isinstance(run.task, data.Write):
        for prompt, text, (record, reference) in zip(*decode(run.model, some, run.tokenizer), some, strict=True):
            print(f"\n{prompt}\n  -> {text}" + f"\n  ref {reference}" * bool(record))


def train(args):
    """One run from flags to result.json, whose content is returned."""
    try:
        return one_run(args)
    finally:  # a run that left nothing leaves no folder either
        if RANK == 0 and args.out.is_dir() and not any(args.out.iterdir()):
            args.out.rmdir()


def one_run(args):
    """Set up, train, merge, report."""
    started = time.time()
    join(args.device)
    run = Run(args)
    # what cannot be resumed, or does not suit the method, is refused before anything is computed
    done = checkpoint.read_state(args.out / "resume.safetensors", run.settings)[1] if args.resume else 0
    if run.Adapter:
        run.first = run.Adapter.begin(run.layers, args.steps, done)
    if RANK:
        return fit(run)
    checkpoint.prepare(args.out)
    metrics = {"base": run.report(run.model)}  # B = 0: the base; a classifier with a fresh head guesses
    if not math.isfinite(metrics["base"]["loss"]):
        raise ValueError(f"the loss of {run.source} is {metrics['base']['loss']} before any step: its weights are "
                         "damaged, or --alpha is far too large")
    rows = fit(run)
    metrics["unmerged" if run.Adapter else "trained"] = run.report(run.model)
    ranks = run.Adapter and run.Adapter.ranks(run.layers)
    if run.Adapter:
        merge(run, metrics)
    if args.save_merged:
        checkpoint.save_merged(args.out / "merged", run.model, run.source)

    result = {"settings": {**run.settings, **run.hparams, "device": str(args.device)}, "metrics": metrics,
              "parameters": run.parameters, "splits": data.splits(args.dataset),
              "selected": {"step": checkpoint.best_step(rows, run.first), "by": f"validation {run.metric}"},
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "seconds": {"training": rows[-1]["seconds"], "all": round(time.time() - started, 1)}}
    if ranks:
        result["ranks"] = dict(zip(run.names, ranks, strict=True))
    checkpoint.write_json(args.out / "result.json", result)
    title = f"{args.method} on {args.dataset}"
    checkpoint.draw_curve(args.out / "curve.png", rows, title, run.metric)
    if ranks:
        checkpoint.draw_ranks(args.out / "ranks.png", rows, run.names, title)
    show(run)
    print(f"\n{args.dataset + ' (test)':28}" + "".join(f"{name:>12}" for name in metrics["base"]))
    for stage, values in metrics.items():
        print(f"{stage:28}" + "".join(f"{value:12.4f}" for value in values.values()))
    print(f"{rows[-1]['seconds']:.0f} s of training, {time.time() - started:.0f} s in all; everything is in {args.out}")
    return result


def main(argv=None):
    """The command line: bad input is one line and exit code 2."""
    return command("train.py", parse, train, argv)


if __name__ == "__main__":
    main()
