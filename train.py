"""Adapt a GPT, Llama or RoBERTa with one method of the LoRA family, merge it, compare base, unmerged and merged.

    python train.py --method reslora --rank 64                                   needs nothing: under a minute on a CPU
    python train.py --method reslora --rank 16 --dataset reviews                 the same for classification
    python train.py --method deltalora --dataset e2e --model gpt2 --epochs 5     from the hub, better on a GPU
    python train.py @experiments/recipes/glue_sst2_roberta_base.args             a paper's recipe

The page reads top to bottom: the pieces of a step, the loop, what a run consists of, and from flags to result.json.
"""
import copy
import functools
import math
import platform
import sys
import time

import torch
from tqdm import tqdm

import lora
import settings
from checkpoints import adapters, files, state
from checkpoints.pretrained import MODELS, from_pretrained, locate
from data import Dataset, step_batches
from evaluation import plots
from evaluation.evaluate import base_report, calibration, in_fp32, report, to_device, validate
from evaluation.printing import announce, print_examples, print_table
from methods import METHODS

LOG_EVERY = 10  # steps between two readings of the loss: reading it makes a GPU wait
parse = functools.partial(settings.parse, description=__doc__)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a step

def warmup_steps(steps, args):
    """The steps of --warmup, which is a share of the run below 1."""
    return args.warmup if args.warmup >= 1 else args.warmup * steps


def lr_at(step, steps, args):
    """Learning rate of step 1..steps: linear warm-up, then linear, cosine or no decay towards 0."""
    warmup = warmup_steps(steps, args)
    if step <= warmup:
        return args.lr * step / (warmup + 1)
    t = (step - warmup) / (steps - warmup + 1)  # in (0, 1): the last step still learns
    return args.lr * {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[args.schedule]


def set_ratio(layers, ratio):
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): every lora_B learns `ratio` times as fast as all else."""
    if ratio != 1 and not any(hasattr(layer, "lora_B") for layer in layers):
        raise ValueError(f"--lr-ratio {ratio:g} is B's learning rate over A's: this method has no factors A and B")
    for layer in layers:
        layer.lr_scale = {**layer.lr_scale, "lora_B": ratio * layer.lr_scale.get("lora_B", 1.0)}


def make_optimizer(model, args):
    """AdamW or SGD over all that requires a gradient, with weight decay on matrices only, fused into one kernel. A
    parameter's learning rate is the run's times its layer's `lr_scale`."""
    groups = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups.setdefault((getattr(module, "lr_scale", {}).get(name, 1.0), p.dim() >= 2), []).append(p)
    groups = [dict(params=params, lr_scale=lr_scale, weight_decay=args.weight_decay if matrix else 0.0)
              for (lr_scale, matrix), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
    optimizer = torch.optim.SGD if args.optimizer == "sgd" else torch.optim.AdamW
    return optimizer(groups, args.lr, fused=args.device.type in ("cpu", "cuda"))


def one_step(forward, params, optimizer, adapter, layers, batches, step, args):
    """One optimizer step on `batches`, [(idx (B, T), targets, share)], one for each accumulation (data.step_batches).
    Returns (2,): the loss and the norm of the gradient, still on the device."""
    loss = 0
    for number, (idx, targets, share) in enumerate(batches, 1):
        with settings.accumulating(forward, more=number < len(batches)), args.amp:
            _, mean = forward(to_device(idx, args.device), targets, args.label_smoothing)
        part = mean * share  # so that the sum is the mean over all targets of the step
        part.backward()
        loss = loss + part.detach()
    adapter.before_step(layers, step)  # AdaLoRA adds its orthogonality term to the gradient here
    norm = torch.nn.utils.clip_grad_norm_(params, args.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    adapter.after_step(layers, step)  # Delta-LoRA moves W here
    return torch.stack([loss, norm])


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def fit(run):
    """Train. Leaves the model as it was at its best validation and returns the rows of log.csv."""
    args, model, data, log = run.args, run.model, run.data, run.log
    optimizer = make_optimizer(model, args)
    if args.resume:
        log.resume(model, optimizer)
    forward = settings.parallel(settings.compiled(model) if args.compile else model, seed=(args.seed, log.step))
    stream = step_batches(data.examples["train"], data.task, args.batch_size, args.grad_accum, args.seed, log.step,
                          settings.RANK, settings.WORLD)
    pending, tokens, clock = [], 0, time.time()
    bar = tqdm(range(log.step + 1, args.steps + 1), initial=log.step, total=args.steps, unit="step",
               disable=settings.RANK > 0 or None)
    model.train()
    for step in bar:
        # the learning rate of this step
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, args) * group["lr_scale"]

        # forward and backward over the accumulation, the method's hooks, clipping, the optimizer
        batches = next(stream)
        pending.append(one_step(forward, run.params, optimizer, run.adapter, run.layers, batches, step, args))
        tokens += settings.WORLD * sum(idx.numel() for idx, _, _ in batches)

        # every LOG_EVERY steps, and where a validation is due: read the losses since the last reading
        due = step % args.eval_every == 0 or step == args.steps
        if step % LOG_EVERY and not due:
            continue
        readings = settings.mean_over_processes(torch.stack(pending)).tolist()  # (steps, 2); here the CPU waits
        seconds, pending, tokens_read = time.time() - clock, [], tokens
        log.check_finite(readings, step)
        if settings.RANK:
            continue  # the first of several processes validates and writes

        # validate
        values = validate(model, data, args.device, args.amp) if due else {}
        log.check_finite([[values.get("loss", 0.0)]], step)
        train_loss, grad_norm = (sum(column) / len(readings) for column in zip(*readings, strict=True))
        log.add(dict(step=step, lr=lr_at(step, args.steps, args), train_loss=train_loss, grad_norm=grad_norm,
                     val_loss=values.get("loss"), seconds=round(log.seconds + seconds, 3)), values, run.ranks())
        bar.set_postfix_str(f"loss {train_loss:.3f}, {tokens_read / seconds:,.0f} tokens/s")

        # keep the weights if they are the best so far, and save the state to resume from
        if due:
            bar.write(f"{log.last_line()}  {tokens_read / seconds:7,.0f} tokens/s", file=sys.stdout)
            log.save(model, optimizer)
        tokens, clock = 0, time.time()
    if not settings.RANK:
        log.finish(model)
    return log.rows


# ---------------------------------------------------------------------------------------------------------------------
# A run

class Run:
    """The data, the model with its adapters, and the settings that make a run this one and no other."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.args, self.source = args, locate(args.model)
        settings.check_folders(args, self.source)
        # The data, the model with a head for their labels, and the data encoded for this model
        self.data = Dataset(args.dataset, args.data_dir, args.test_texts, args.columns, args.metric, args.regression)
        self.model = from_pretrained(self.source, labels=self.data.labels, dtype=args.base_dtype)
        args.context = args.context or min(self.model.context, 256)
        settings.check_model(args, self.model, self.source, self.data.labels)
        self.data.encode(self.source, self.model, args.context)
        if args.epochs:
            per_epoch = len(self.data.examples["train"]) / (args.batch_size * args.grad_accum * settings.WORLD)
            args.steps = math.ceil(min(args.epochs * math.ceil(per_epoch), 10**8))
        args.eval_every = min(args.eval_every or math.ceil(args.steps / 10), args.steps)
        # The adapters. A method's own flag that was not given has a default, which may depend on the number of steps.
        self.own = {name: getattr(args, name, flag.get("default")) for name, flag in METHODS[args.method].flags.items()}
        self.own = {name: value(args.steps, warmup_steps(args.steps, args)) if callable(value) else value
                    for name, value in self.own.items()}
        # made on the CPU, so that a seed gives the same adapter on every device
        self.adapter, self.layers = adapters.adapt_as(self.model, {**vars(args), **self.own})
        set_ratio(self.layers, args.lr_ratio)
        self.model.to(args.device)
        self.model.recompute = self.adapter.recompute if args.checkpoint_activations else None
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        name_of = {module: name for name, module in self.model.named_modules()}
        self.names = [name_of[layer] for layer in self.layers]
        self.parameters = {"trainable": sum(p.numel() for p in self.params),
                           "total": sum(p.numel() for p in self.model.parameters())}
        self.settings = state.identity({**vars(args), **self.own}, self.source, self.data.pairs, settings.WORLD)
        self.log = state.Log(args.out, self.settings, self.data.metric)

    def ranks(self):
        """[rank of each layer] of a method that moves ranks, else None."""
        return self.adapter.ranks(self.layers)

    def report(self, model, stage=None):
        """{metric: value} on the test split; prints what is evaluated if `stage` says it."""
        return report(model, self.data, self.args.device, self.args.amp, stage)

    def calibration(self, model):
        """What reslora.calibrate takes, for a copy of the model."""
        return calibration(model, self.data.examples["train"], self.data.task, self.args.batch_size, self.args.seed,
                           self.args.device, self.args.amp)


def merge(run, metrics):
    """Measure every way to merge that was asked for, each on a copy; merge by the first one; write the adapter."""
    args, model, adapter = run.args, run.model, run.adapter
    state.clear(args.out, state.RESULTS)  # those of another merge must not stand beside the new adapter
    for layer in run.layers:
        layer.weight.data = in_fp32(layer.weight.data)  # a bf16 base is widened, so only saving rounds a merged W
    kept, *others = run.layers[0].merges
    for way in others:
        trial = copy.deepcopy(model)
        adapter.prepare_merge(trial, way, run.calibration(trial))
        name = f"merged by {way}" if isinstance(way, str) else f"merged at rank {way}"
        metrics[name] = run.report(lora.merge(trial), f"the model {name}")
    adapter.prepare_merge(model, kept, run.calibration(model))
    adapters.save_adapter(args.out, model, MODELS.get(args.model, args.model), args.dropout)
    metrics["merged"] = run.report(lora.merge(model), "the merged model")


# ---------------------------------------------------------------------------------------------------------------------
# From flags to result.json

def train(args):
    """One run. Returns the content of result.json; a run that leaves nothing leaves no folder either."""
    try:
        return one_run(args)
    finally:
        if not settings.RANK and args.out.is_dir() and not any(args.out.iterdir()):
            args.out.rmdir()


def one_run(args):
    """Set up, measure the base, train, measure, merge, measure again, report."""
    started = time.time()
    settings.join(args.device)
    run = Run(args)
    announce(run, settings.WORLD)
    # what cannot be resumed or replaced, or does not suit the method, is refused before anything is computed
    done = state.check_resume(args.out, run.settings, METHODS[args.method]) if args.resume else 0
    if not args.resume and not settings.RANK:
        state.check_replaceable(args.out, run.settings)
    run.log.first = run.adapter.begin(run.layers, args.steps, done)
    if settings.RANK:
        return fit(run)
    files.check_writable(args.out)
    metrics = {"base": base_report(run)}
    if not math.isfinite(metrics["base"]["loss"]):
        raise ValueError(f"the loss of {run.source} is {metrics['base']['loss']} before any step: its weights are "
                         "damaged, or --alpha is far too large")
    try:
        rows = fit(run)
    except KeyboardInterrupt:
        more = ", --resume goes on from there" if run.log.saved else ""
        raise KeyboardInterrupt(run.log.where() + more) from None
    metrics["unmerged" if run.layers else "trained"] = run.report(run.model, "the trained model")
    ranks = run.ranks()
    if run.layers:
        merge(run, metrics)
    if args.save_merged and state.save_merged(args.out / "merged", run.model, run.source, run.data.tokenizer):
        metrics["merged, saved in bfloat16"] = run.report(run.model, "the merged model as it is saved, in bfloat16")

    result = {"settings": {**run.settings, "device": str(args.device)}, "metrics": metrics,
              "parameters": run.parameters, "splits": run.data.splits, "labels": list(run.data.labels),
              "selected": {"step": state.best_step(rows, run.log.first), "by": f"validation {run.data.metric}"},
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "seconds": {"training": rows[-1]["seconds"], "all": round(time.time() - started, 1)}}
    title = f"{args.method}{f' r {args.rank}' * bool(args.rank)} on {args.dataset}, learning rate {args.lr:g}"
    if ranks:
        result["ranks"] = dict(zip(run.names, ranks, strict=True))
        plots.draw_ranks(args.out / "ranks.png", rows, run.names, title)
    files.write_json(args.out / "result.json", result)
    plots.draw_curve(args.out / "curve.png", rows, title, metrics["base"], run.data.metric)
    print_examples(run.model, run.data, args.device, args.amp)
    print_table(f"{args.dataset} (test)", metrics)
    print(f"{rows[-1]['seconds']:.0f} s of training, {time.time() - started:.0f} s in all; everything is in {args.out}")
    return result


def main(argv=None):
    """The command line: bad input is one line and exit code 2."""
    return settings.command("train.py", parse, train, argv)


if __name__ == "__main__":
    main()
