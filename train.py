"""Train a GPT, Llama or RoBERTa with one method of the LoRA family, merge it, compare base,
unmerged and merged.

    python train.py --method reslora --rank 64                      under a minute on a CPU, offline
    python train.py --method reslora --rank 16 --dataset reviews    the same for classification
    python train.py --method deltalora --dataset e2e --model gpt2 --epochs 5    from the hub
    python train.py @experiments/recipes/glue_sst2_roberta_base.args            a paper's recipe

The page reads top to bottom: the pieces of a step, the loop, what a run consists of, and from flags
to result.json.
"""
import copy
import functools
import math
import platform
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import lora
import qlora
from checkpoints import adapters, files
from checkpoints.pretrained import MODELS, load, locate, save_merged
from data import Dataset, step_batches
from evaluation import evaluate, plots
from evaluation.evaluate import in_fp32, to_device
from methods import METHODS
from run import flags, folder, machine
from run.owner import RESULTS, RunFolder
from run.report import announce, model_card, print_classes, print_examples, print_table

LOG_EVERY = 10  # steps between two readings of the loss: reading it makes a GPU wait
parse = functools.partial(flags.parse, description=__doc__)


# -------------------------------------------------------------------------------------------------
# The pieces of a step

def lr_at(step, settings):
    """Learning rate of step 1..steps: linear warm-up, then linear, cosine or no decay towards 0."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.lr * step / (warmup + 1)
    # the + 1 keeps t below 1, so that the last step still learns
    t = (step - warmup) / (settings.steps - warmup + 1)
    decay = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}
    return settings.lr * decay[settings.schedule]


def set_ratio(layers, ratio):
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): every lora_B learns `ratio` times as fast as all
    else."""
    if ratio != 1 and not any(hasattr(layer, "lora_B") for layer in layers):
        raise ValueError(f"--lr-ratio {ratio:g} is B's learning rate over A's: this method has no "
                         "factors A and B")
    for layer in layers:
        scale = layer.lr_scale.get("lora_B", 1.0)  # the method's own: no method here has one
        layer.lr_scale = {**layer.lr_scale, "lora_B": ratio * scale}


def make_optimizer(model, settings):
    """AdamW or SGD over all that requires a gradient, with weight decay on matrices only, fused
    into one kernel. A parameter's learning rate is the run's times its layer's `lr_scale`."""
    groups = {}
    for module in model.modules():
        scales = getattr(module, "lr_scale", {})
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups.setdefault((scales.get(name, 1.0), p.dim() >= 2), []).append(p)
    groups = [dict(params=params, lr_scale=lr_scale,
                   weight_decay=settings.weight_decay if matrix else 0.0)
              for (lr_scale, matrix), params
              in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    # every step sets the learning rate of each group anew, see `fit`
    return kind(groups, settings.lr, fused=settings.device.type in ("cpu", "cuda"))


def is_finite(params):
    """Whether the gradient is. Here the CPU waits."""
    return torch.stack([p.grad.isfinite().all() for p in params if p.grad is not None]).all()


def one_step(forward, params, optimizer, scaler, adapter, layers, batches, step, settings):
    """One optimizer step on `batches`, [(idx (B, T), targets, share)], one for each accumulation
    (data.step_batches). Returns (2,): the loss and the norm of the gradient, on the device.

    In float16, whose numbers end at 65504, the gradient may overflow. Then the step is skipped, by
    the method too, and None is returned."""
    loss = 0
    for number, (idx, targets, share) in enumerate(batches, 1):
        with machine.accumulating(forward, more=number < len(batches)), settings.amp:
            _, mean = forward(to_device(idx, settings.device), targets, settings.label_smoothing)
        part = mean * share  # so that the sum is the mean over all targets of the step
        # float16 alone has a scale, so that small gradients do not vanish in it
        scaler.scale(part).backward()
        loss = loss + part.detach()
    scaler.unscale_(optimizer)
    if scaler.is_enabled() and not is_finite(params):
        scaler.update()  # the next scale is half as large
        optimizer.zero_grad()
        return None
    adapter.before_step(layers, step)  # AdaLoRA adds its orthogonality term to the gradient here
    norm = torch.nn.utils.clip_grad_norm_(params, settings.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    adapter.after_step(layers, step)  # Delta-LoRA moves W here
    return torch.stack([loss, norm])


# -------------------------------------------------------------------------------------------------
# The loop

def fit(run):
    """Train. Leaves the model as it was at its best validation, returns the rows of log.csv."""
    settings, model, data, log = run.settings, run.model, run.data, run.log
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.dtype == "float16")
    if settings.resume:
        log.resume(model, optimizer, scaler)
    forward = machine.parallel(machine.compiled(model) if settings.compile else model,
                               seed=(settings.seed, log.step))
    stream = step_batches(data.examples["train"], data.task, settings.batch_size,
                          settings.grad_accum, settings.seed, log.step, machine.RANK, machine.WORLD)
    pending, tokens, clock = {}, 0, time.time()
    bar = tqdm(range(log.step + 1, settings.steps + 1), initial=log.step, total=settings.steps,
               unit="step", disable=machine.RANK > 0 or None)
    model.train()
    for step in bar:
        # the learning rate of this step
        lr = lr_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # forward and backward over the accumulation, the method's hooks, clipping, the optimizer
        batches = next(stream)
        reading = one_step(forward, run.params, optimizer, scaler, run.adapter, run.layers, batches,
                           step - log.skipped, settings)
        if reading is None:
            log.skip(step, scaler.get_scale())
        else:
            pending[step] = reading
        tokens += machine.WORLD * sum(idx.numel() for idx, _, _ in batches)

        # every LOG_EVERY steps, and before a validation: read the losses since the last reading
        validate_now = step % settings.eval_every == 0 or step == settings.steps
        if step % LOG_EVERY and not validate_now:
            continue
        pairs = {}  # {step: (loss, norm)}
        if pending:  # (steps, 2); here the CPU waits
            pairs = machine.mean_over_processes(torch.stack([*pending.values()])).tolist()
            pairs = dict(zip(pending, pairs, strict=True))
        seconds = max(time.time() - clock, 0.0)  # somebody may have set the clock back
        pending, speed = {}, tokens / max(seconds, 1e-6)
        log.check_finite(pairs)
        if machine.RANK:
            continue  # the first of several processes validates and writes

        # validate
        values = {}
        if validate_now:
            values = evaluate.validate(model, data, settings.device, settings.amp)
            log.check_finite({step: [values["loss"]]})
        means = [sum(column) / len(pairs) for column in zip(*pairs.values(), strict=True)]
        train_loss, grad_norm = means or (math.nan, math.nan)  # all of these steps were skipped
        log.add(dict(step=step, lr=lr, train_loss=train_loss, grad_norm=grad_norm,
                     val_loss=values.get("loss"),
                     seconds=round(log.seconds + seconds, 3)), values, run.ranks())
        bar.set_postfix_str(f"loss {train_loss:.3f}, {speed:,.0f} tokens/s")

        # keep the weights if they are the best so far, and save the state to resume from
        if validate_now:
            bar.write(f"{log.last_line()}  {speed:7,.0f} tokens/s", file=sys.stdout)
            log.save(model, optimizer, scaler)
        tokens, clock = 0, time.time()
    if not machine.RANK:
        log.finish(model)
    return log.rows


# -------------------------------------------------------------------------------------------------
# A run

class Run:
    """The data, the model with its adapters, and the identity that makes a run this one and no
    other. settings: of flags.parse."""

    def __init__(self, settings):
        torch.manual_seed(settings.seed)
        self.source = locate(settings.model)
        # the data, the model with a head for their labels, and the data encoded for this model
        self.data = Dataset(settings.dataset, settings.data_dir, settings.test_texts,
                            settings.columns, settings.metric, settings.regression,
                            settings.last_turn, settings.chatml)
        head = settings.init_from if adapters.has_head(settings.init_from) else None
        self.model, found = load(self.source, labels=self.data.labels, dtype=settings.base_dtype,
                                 head_from=head, bits=settings.base_bits)
        self.fresh_head = found.fresh_head
        trains_base = METHODS[settings.method].trains_base
        if self.fresh_head and not self.data.labels and not trains_base:
            raise ValueError(f"--method {settings.method} freezes the head, and {self.source} has "
                             "none for masked tokens: choose a checkpoint with one, or --method "
                             "full")
        settings = settings.for_model(self.model, self.source)
        self.data.encode(self.source, self.model, settings.context)
        settings = settings.for_data(len(self.data.examples["train"]), machine.WORLD)
        self.settings = settings
        # the adapters, made on the CPU, so that a seed gives the same ones on every device
        self.adapter, self.layers = folder.adapters_of(self.model, vars(settings))
        set_ratio(self.layers, settings.lr_ratio)
        self.model.to(settings.device)
        if settings.checkpoint_activations:
            self.model.recompute = self.adapter.recompute
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        name_of = {module: name for name, module in self.model.named_modules()}
        self.names = [name_of[layer] for layer in self.layers]
        self.parameters = {"trainable": sum(p.numel() for p in self.params),
                           "total": qlora.total(self.model)}
        self.identity = folder.identify(settings, self.source, self.data.pairs, machine.WORLD)
        self.folder = RunFolder(settings.out)
        self.log = folder.Log(self.folder, self.identity, self.data.metric)

    def ranks(self):
        """[rank of each layer] of a method that moves ranks, else None."""
        return self.adapter.ranks(self.layers)

    def report(self, model, stage=None):
        """{metric: value} on the test split; prints what is evaluated if `stage` says it."""
        return evaluate.report(model, self.data, self.settings.device, self.settings.amp, stage)

    def calibration(self, model):
        """What reslora.calibrate takes, for a copy of the model."""
        settings = self.settings
        return evaluate.calibration(model, self.data.examples["train"], self.data.task,
                                    settings.batch_size, settings.seed, settings.device,
                                    settings.amp)


def merge_and_measure(run, metrics):
    """Measure every way to merge that was asked for, each on a copy. Merge by the first one, and
    write the adapter."""
    settings, model, adapter = run.settings, run.model, run.adapter
    for layer in run.layers:
        # a base in 16 or 4 bits is widened, so only saving rounds a merged W
        qlora.dequantise(layer, torch.promote_types(layer.weight.dtype, torch.float32))
        layer.weight.data = in_fp32(layer.weight.data)
    kept, *others = run.layers[0].merges
    for way in others:
        trial = copy.deepcopy(model)
        adapter.prepare_merge(trial, way, run.calibration(trial))
        name = f"merged by {way}" if isinstance(way, str) else f"merged at rank {way}"
        metrics[name] = run.report(lora.merge(trial), f"the model {name}")
    adapter.prepare_merge(model, kept, run.calibration(model))
    base = MODELS.get(settings.model, settings.model)
    if Path(base).is_dir():
        base = Path(base).resolve()  # from wherever the adapter is read
    adapters.save_adapter(run.folder.place, model, base, settings.dropout)
    metrics["merged"] = run.report(lora.merge(model), "the merged model")
    if settings.base_bits:
        merge_otherwise(run, metrics)


def merge_otherwise(run, metrics):
    """Measure what else people do with an adapter that was trained beside a base in 4 bits."""
    settings = run.settings
    trial = copy.deepcopy(run.model)
    for name in run.names:
        qlora.quantise(trial.get_submodule(name))
    metrics["merged, in 4 bits again"] = run.report(trial, "the merged model in 4 bits again")
    if files.read_json(run.source / "config.json").get("quantization_config"):
        return  # the base came in 4 bits
    # W as it was before rounding, in all linears: a whole model in 16 or 32 bits
    trial, _ = load(run.source, labels=run.data.labels, dtype=settings.base_dtype)
    try:
        trial.to(settings.device)
    except torch.OutOfMemoryError:
        print(f"merged into W before 4 bits: not measured, {settings.device} does not hold it")
        return
    for name, layer in zip(run.names, run.layers, strict=True):
        W = trial.get_submodule(name).weight
        W.data = in_fp32(W.data) + layer.delta()
    trial.classifier = run.model.classifier
    metrics["merged into W before 4 bits"] = run.report(trial, "the base before 4 bits, merged")


# -------------------------------------------------------------------------------------------------
# From flags to result.json

def train(settings):
    """One run. Returns the content of result.json; an empty run folder is removed."""
    started = time.time()
    machine.join(settings.device)
    run = Run(settings)
    try:
        return one_run(run, started)
    finally:
        run.folder.release()


def one_run(run, started):
    """Measure the base, train, measure, merge, measure again, report."""
    settings, out = run.settings, run.settings.out
    announce(settings, run.data.examples, run.data.cut, run.parameters, machine.WORLD)
    # what cannot be resumed or replaced, or does not suit the method, is refused before anything
    # is computed
    done = 0
    if not machine.RANK:
        run.folder.claim()
    if settings.resume:
        done = folder.check_resume(out, run.identity, METHODS[settings.method])
    elif not machine.RANK:
        folder.check_replaceable(out, run.identity)
    run.log.first = run.adapter.begin(run.layers, settings.steps, done)
    if machine.RANK:
        return fit(run)
    files.check_writable(out)
    # at the start the model is the base; a run beside this one may know its report already, but not
    # that of a fresh head, which is another one in every run
    known = None
    if not run.fresh_head:
        known = folder.known_base_report(out.parent, run.identity, settings.device)
    metrics = {"base": known or run.report(run.model, "the base")}
    if not math.isfinite(metrics["base"]["loss"]):
        raise ValueError(f"the loss of {run.source} is {metrics['base']['loss']} before any step: "
                         "its weights are damaged, or --alpha is far too large")
    try:
        rows = fit(run)
    except KeyboardInterrupt:
        more = ", --resume goes on from there" if run.log.saved else ""
        raise KeyboardInterrupt(run.log.where() + more) from None
    metrics["unmerged" if run.layers else "trained"] = run.report(run.model, "the trained model")
    ranks, place = run.ranks(), run.folder.place
    run.folder.begin(*RESULTS)
    if run.layers:
        merge_and_measure(run, metrics)
    if settings.save_merged and save_merged(place / "merged", run.model, run.source,
                                            run.data.tokenizer, run.data.labels,
                                            settings.base_bits,
                                            run.data.task if run.data.chat else None):
        metrics["merged, saved in bfloat16"] = run.report(
            run.model, "the merged model as it is saved, in bfloat16")

    result = {"settings": {**run.identity, "device": str(settings.device)}, "metrics": metrics,
              "parameters": run.parameters, "splits": run.data.splits,
              "labels": list(run.data.labels), "chat": run.data.chat,
              "selected": {"step": folder.best_step(rows, run.log.first),
                           "by": f"validation {run.data.metric}"},
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "seconds": {"training": rows[-1]["seconds"],
                          "all": round(run.log.earlier + time.time() - started, 1)}}
    rank = f" r {settings.rank}" * bool(settings.rank)
    title = f"{settings.method}{rank} on {settings.dataset}, learning rate {settings.lr:g}"
    if ranks:
        result["ranks"] = dict(zip(run.names, ranks, strict=True))
    if settings.dataset == "labels" and not settings.regression:
        result["classes"] = evaluate.by_class(run.model, run.data, settings.device, settings.amp)
    files.write_text(place / "README.md", model_card(result, flags.command_of(result["settings"])))
    if plots.available():
        plots.draw_curve(place / "curve.png", rows, title, metrics["base"], run.data.metric)
        if ranks:
            plots.draw_ranks(place / "ranks.png", rows, run.names, title)
    files.write_json(place / "result.json", result)
    run.folder.settle()
    print_examples(run.model, run.data, settings.device, settings.amp)
    print_table(f"{settings.dataset} (test)", metrics)
    if "classes" in result:
        print_classes(result["classes"])
    print(f"{rows[-1]['seconds']:.0f} s of training, {result['seconds']['all']:.0f} s in all; "
          f"everything is in {out}")
    return result


def main(argv=None):
    """The command line: bad input is one line and exit code 2."""
    return flags.command("train.py", parse, train, argv)


if __name__ == "__main__":
    main()
