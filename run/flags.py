"""From the command line to the settings of a run, which do not change afterwards.

    parse(argv)                          the flags, with all defaults that need no data
    settings.for_model(model, source)    the same with the context
    settings.for_data(examples, world)   the same with the steps and all that follows from them
"""
import argparse
import math
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

import data
from checkpoints.files import read_text
from checkpoints.pretrained import MODELS
from lora import LoRALinear
from methods import METHODS
from run import folder, machine
from run.owner import RunFolder

# Steps, examples per step and learning rate. With the shipped models a run takes half a minute on
# two CPU cores. Full fine-tuning wants a smaller rate than an adapter, and methods that start with
# small factors want a larger one.
SMALL_START = ("adalora_lr", "loha_lr", "lokr_lr")
DEFAULTS = {
    "restaurants": dict(steps=180, batch_size=32, lr=1e-2, full_lr=6e-3,
                        **dict.fromkeys(SMALL_START, 3e-2)),
    "e2e": dict(steps=150, batch_size=32, lr=1e-2, full_lr=3e-3,
                **dict.fromkeys(SMALL_START, 3e-2)),
    "stdlib": dict(steps=100, batch_size=16, lr=5e-3, full_lr=2e-3),
    "text": dict(steps=100, batch_size=16, lr=5e-3, full_lr=2e-3),
    "world": dict(steps=100, batch_size=32, lr=5e-3, full_lr=3e-3),
    "opinions": dict(steps=100, batch_size=32, lr=5e-3, full_lr=3e-3),
    "pairs": dict(steps=100, batch_size=16, lr=5e-3, full_lr=2e-3,
                  **dict.fromkeys(SMALL_START, 1e-2)),
    "chat": dict(steps=100, batch_size=16, lr=5e-3, full_lr=2e-3,
                 **dict.fromkeys(SMALL_START, 1e-2)),
    "labels": dict(steps=200, batch_size=32, lr=3e-3, full_lr=1e-3, head_lr=1e-2,
                   **dict.fromkeys(SMALL_START, 1e-2)),
    "reviews": dict(steps=500, batch_size=64, lr=3e-3, full_lr=1e-3, head_lr=1e-2,
                    **dict.fromkeys(SMALL_START, 1e-2)),
    # For real models: a first try. The papers train longer, see experiments/recipes/.
    "gsm8k": dict(epochs=3, batch_size=16, lr=5e-4, full_lr=5e-5),
    "glue": dict(epochs=3, batch_size=32, lr=4e-4, full_lr=2e-5),
}
# a dataset that is not in the table
OTHER = dict(epochs=3, batch_size=32)
# The rates above are those of the shipped models. For any other model, where the table does not say
# that it is for real models: by its family and width. Our choice, between the papers' rates for
# long runs, 5e-5 to 5e-4 (experiments/recipes), and the best of 50 steps on SmolLM2, 8e-3 for LoRA
# (RESULTS.md). compare.py finds yours.
REAL = "gsm8k", "glue"
RATES = {"roberta": ((math.inf, 4e-4),), "": ((1024, 2e-3), (2048, 5e-4), (math.inf, 2e-4))}
# for every method that has an adapter
ADAPTER = dict(rank=8, alpha=16.0, dropout=0.0, targets="q,v")


def parser(description):
    """The flags of train.py. A flag that depends on dataset or method has no default here:
    `with_defaults` gives it one."""
    parser = Parser("train.py", description)
    add = parser.add_argument_group("method").add_argument
    add("--method", help=", ".join(METHODS) + " (lora)")
    add("--rank", type=int, help="r, 1 up to the smaller side of the linears (8)")
    add("--alpha", type=float, help="numerator of the scale (16)")
    add("--rs", action="store_true", help="rsLoRA's scale, alpha / sqrt(r), with any method")
    add("--dropout", type=float, help="probability, on the input of A (0)")
    add("--targets", help="which linears, of q,k,v,o,gate,up,down (q,v, the papers' choice)")
    add("--init-from", type=path, help="method lora: go on from an adapter folder, ours or PEFT's, "
        "with its ranks and targets")
    for name, method in METHODS.items():
        add = parser.add_argument_group(name).add_argument if method.flags else None
        for flag, spec in method.flags.items():  # SUPPRESS: what was not given leaves no trace
            add("--" + flag.replace("_", "-"), **{**spec, "default": argparse.SUPPRESS})
    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=path, help=f"{', '.join(MODELS)}, a checkpoint folder or a hub id (the "
        "tiny one that fits the dataset)")
    add("--dataset", help=", ".join(data.DATASETS) + " (restaurants; with a RoBERTa by name, "
        "reviews)")
    add("--data-dir", type=path, help="read the dataset from this folder (your own data: or "
        "file) instead of the hub")
    add("--columns", type=lambda names: names.split(","), help="pairs: of prompt and completion; "
        "labels: of text and label (see data/README.md)")
    add("--metric", choices=(*data.pairs.METRICS, *data.labels.METRICS), help="selects: of pairs "
        "exact, bleu or rouge of decoded texts; of labels f1 (macro) or matthews")
    add("--last-turn", action="store_true", help="chat: the loss is on the last answer alone (on "
        "all)")
    add("--chatml", action="store_true", help="chat: write the turns as ChatML, for a model "
        "without a chat template, or in the place of its own")
    add("--regression", action="store_true", help="labels: a label is a number")
    add("--test-texts", type=int, help="report on so many texts of the test split, always the "
        "same ones (all)")
    add("--context", type=int, help="longest sequence in tokens (that of the model, at most 256)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="optimizer steps (by dataset)")
    add("--epochs", type=float, help="instead of --steps")
    add("--batch-size", type=int, help="examples per forward (by dataset)")
    add("--grad-accum", type=int, default=1, help="batches per step: the same step with less "
        "memory (1)")
    add("--lr", type=float, help="peak learning rate (by dataset, or by the model's kind and size)")
    add("--lr-ratio", type=float, default=1.0, help="B's learning rate over A's, as in LoRA+, "
        "which has 16; all but B learns at --lr (1)")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--schedule", choices=("linear", "cosine", "constant"), default="linear",
        help="after the warm-up")
    add("--warmup", type=float, default=0.06, help="steps, or below 1 the share of the run (.06)")
    add("--weight-decay", type=float, default=0.01, help="on matrices, decoupled (.01)")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping (1)")
    add("--label-smoothing", type=float, default=0.0, help="(0)")
    add("--seed", type=int, default=0, help="of the adapters' start, the order of the data and "
        "dropout (0)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cpu, cuda, mps (cuda, else cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the arithmetic (a GPU: bfloat16, or float16 where it has no bfloat16)")
    add("--base-bits", type=int, choices=(4,), help="QLoRA: keep the frozen linears of the blocks "
        "in 4 bits")
    add("--checkpoint-activations", action="store_true", help="compute them again in the "
        "backward: less memory, slower")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster on a GPU")
    add = parser.add_argument_group("run folder").add_argument
    add("--out", type=lambda text: Path(path(text)), help="out/<dataset>-<method>-<its own "
        "flags>-r<rank>-<rs>-<ratio>-s<seed>")
    add("--eval-every", type=int, help="steps between validations, each a checkpoint (a tenth of "
        "the run)")
    add("--resume", action="store_true", help="go on from --out's last checkpoint, with the flags "
        "of that run")
    add("--save-merged", action="store_true", help="write merged/, a checkpoint that transformers "
        "loads")
    return parser


def path(text):
    """A path as people type it, with ~ for the home folder; a hub id stays as it is."""
    return str(Path(text).expanduser()) if text.startswith("~") else text


class Settings(Namespace):
    """The flags of a run with their defaults. They do not change: `but` makes others."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f"settings do not change: but({name}=…) makes others")

    def but(self, **values):
        """The same with other values."""
        return Settings(**{**vars(self), **values})

    @property
    def warmup_steps(self):
        """The steps of --warmup, which below 1 is a share of the run; may be fractional."""
        return self.warmup if self.warmup >= 1 else self.warmup * self.steps

    @property
    def method_flags(self):
        """{name: value} of the method's own flags."""
        return {name: getattr(self, name) for name in METHODS[self.method].flags}

    def for_model(self, model, source):
        """With the context. ValueError for what does not go with the model. source: its folder."""
        for flag, where in (("model", source), ("init-from", self.init_from)):
            replaced = self.out.resolve(), (self.out / "merged").resolve()
            if where is not None and Path(where).resolve() in replaced:
                raise ValueError(f"--{flag} {where} lies in the run folder {self.out}, which this "
                                 "run replaces: choose another --out")
        context = self.context or min(model.context, 256)
        if not 4 <= context <= model.context:
            raise ValueError(f"--context {context} is not in 4..{model.context}, the model's")
        return self.but(context=context, lr=self.lr or rate_of(self.method, model.config))

    def for_data(self, examples, world):
        """With the steps, those between validations, and the defaults of the method's flags, which
        may depend on the steps. examples: how many the training split has."""
        steps = self.steps
        if self.epochs:
            per_epoch = math.ceil(examples / (self.batch_size * self.grad_accum * world))
            steps = math.ceil(min(self.epochs * per_epoch, 10**8))
        every = min(self.eval_every or math.ceil(steps / 10), steps)
        settings = self.but(steps=steps, eval_every=every)
        flags = {name: getattr(self, name, flag.get("default"))
                 for name, flag in METHODS[self.method].flags.items()}
        return settings.but(**{name: value(steps, settings.warmup_steps) if callable(value)
                               else value for name, value in flags.items()})


def parse(argv=None, description=None):
    """Parses the flags, fills in defaults, refuses contradictions with ValueError. With --resume
    every flag that is not given has the value that it had in the run."""
    flags, argv = parser(description), sys.argv[1:] if argv is None else list(argv)
    args = flags.parse_args(argv)
    if args.resume:
        stored = stored_flags(args, vars(flags.parse_args([])))
        args = flags.parse_args([*stored, *argv])
    return with_defaults(args)


def stored_flags(args, known):
    """The flags of the run that `args` resumes, from its folder. known: the names of all flags but
    the methods' own."""
    out = args.out or with_defaults(args).out
    stored = folder.read_identity(RunFolder(out).state())
    for name in ("method", "dataset"):
        if getattr(args, name) not in (None, stored.get(name)):
            raise ValueError(f"cannot resume {out} with {name} {getattr(args, name)}: it began "
                             f"with {stored.get(name)}")
    given = {"steps"} if args.epochs else {}  # --epochs says it anew
    return [f"--out={out}", *as_flags({name: value for name, value in stored.items()
                                       if name not in given}, known)]


def as_flags(identity, known):
    """The command line of a run, [flag, …], by its identity (see folder.identify). known: {name of
    a flag: its default}; what has its default is left out."""
    method = METHODS.get(identity.get("method"))
    known = {**dict.fromkeys(method.flags if method else ()), **known}
    flags = []
    for name, value in identity.items():
        if name in known and value is not None and value is not False and value != known[name]:
            flag = "--" + name.replace("_", "-")
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            flags.append(flag if value is True else f"{flag}={value}")
    return flags


def command_of(identity):
    """The command that starts this run, in one line."""
    known = vars(parser("").parse_args([]))
    return shlex.join(["python", "train.py", *as_flags(identity, known)])


def with_defaults(args):
    """Parsed flags -> Settings; ValueError for contradictions."""
    args = Namespace(**vars(args))
    args.method = args.method or "lora"
    if args.method not in METHODS:
        raise ValueError(f"unknown method {args.method!r}: choose from {', '.join(METHODS)}")
    if args.dataset is None:
        roberta = "roberta" in Path(args.model or "").name
        args.dataset = "reviews" if roberta else "restaurants"
    if args.dataset not in data.DATASETS:
        raise ValueError(f"unknown dataset {args.dataset!r}: choose from "
                         f"{', '.join(data.DATASETS)}")
    check_data(args)
    check_method(args)
    fill_in(args)
    check_ranges(args)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, not a folder")
    args.device, args.dtype, args.amp = machine.pick_device(args.device, args.dtype)
    # where the arithmetic is in 16 bits a frozen base is, too; weights that train are fp32
    trains_base = METHODS[args.method].trains_base
    args.base_dtype = torch.float32 if trains_base else getattr(torch, args.dtype)
    return Settings(**vars(args))


def check_data(args):
    """Refuse what is not for the dataset."""
    metric = ("labels",) if args.metric in data.labels.METRICS else ("pairs", "chat")
    for flag, datasets in (("columns", ("pairs", "chat", "labels")), ("metric", metric),
                           ("last_turn", ("chat", "pairs")), ("chatml", ("chat", "pairs")),
                           ("regression", ("labels",))):
        if getattr(args, flag) and args.dataset not in datasets:
            raise ValueError(f"--{flag.replace('_', '-')} is for --dataset "
                             f"{' and '.join(datasets)}, not for {args.dataset}")
    most = 3 if args.dataset == "labels" else math.inf
    if args.columns and not 2 <= len(args.columns) <= most:
        raise ValueError(f"--columns {','.join(args.columns)}: two names are needed"
                         + ", or three" * (args.dataset == "labels"))
    numbers = args.regression or len(data.about(args.dataset, "LABELS")) == 1
    if numbers and args.label_smoothing:
        raise ValueError(f"--label-smoothing {args.label_smoothing:g} is for classes, not for "
                         f"numbers as in {args.dataset}")


def check_method(args):
    """Refuse what does not go with the method."""
    method, adapter = METHODS[args.method], METHODS[args.method].adapter
    if not (adapter or method.trains_base or data.about(args.dataset, "LABELS")):
        raise ValueError(f"--method {args.method} trains a classifier's head alone, and "
                         f"{args.dataset} has nothing to classify")
    for other in METHODS:
        for name in (METHODS[other].flags.keys() & vars(args).keys()) - method.flags.keys():
            raise ValueError(f"--{name.replace('_', '-')} is a flag of method {other}, not of "
                             f"{args.method}")
    if args.base_bits and (method.trains_base or adapter is not None and adapter.moves_weight):
        raise ValueError(f"--base-bits {args.base_bits} keeps W as it is, and {args.method} moves "
                         "it: choose another method")
    if args.rs and (adapter is None or adapter.scale is not LoRALinear.scale):
        raise ValueError(f"--rs is not for {args.method}: it gives the square root to adapters "
                         "that scale by alpha / r")
    if args.init_from is not None:
        if adapter is not LoRALinear:
            raise ValueError(f"--init-from {args.init_from} is for method lora, not {args.method}")
        for name in ("rank", "alpha", "targets", "rs"):
            if getattr(args, name):
                raise ValueError(f"--init-from {args.init_from} brings its own {name}: drop "
                                 f"--{name}")


def fill_in(args):
    """Give every flag that depends on the dataset or the method its default."""
    adapter = METHODS[args.method].adapter
    if args.model is None:
        reads = data.about(args.dataset, "LABELS") or args.dataset == "opinions"
        args.model = "tiny-roberta" if reads else "tiny-gpt"
    for name, value in ADAPTER.items():
        if adapter is None:
            if getattr(args, name) is not None:
                print(f"note     --{name} does nothing here: method {args.method} has no adapter")
            setattr(args, name, None)
        # an adapter to go on from brings its own rank, alpha and targets, but no dropout
        elif getattr(args, name) is None and (name == "dropout" or args.init_from is None):
            setattr(args, name, value)
    defaults = DEFAULTS.get(args.dataset.split("/")[0], OTHER)
    if args.batch_size is None:
        args.batch_size = defaults["batch_size"]
    if args.lr is None and (args.model in ("tiny-gpt", "tiny-roberta")
                            or args.dataset.split("/")[0] in REAL):
        args.lr = defaults.get(f"{args.method}_lr", defaults.get("lr"))
    if args.steps is not None and args.epochs is not None:
        raise ValueError("--steps and --epochs say the same thing: give one")
    if args.steps is None and args.epochs is None:
        args.steps, args.epochs = defaults.get("steps"), defaults.get("epochs")
    args.out = args.out or Path("out") / folder_name(args)


def rate_of(method, config):
    """The default learning rate of a model that is not shipped: that of LoRA, and a tenth of it
    where all weights train."""
    rates = RATES.get(config.model_type, RATES[""])
    rate = next(rate for width, rate in rates if config.width <= width)
    if METHODS[method].trains_base:
        return rate / 10
    return 2 * rate if f"{method}_lr" in SMALL_START else rate


def folder_name(args):
    """The run folder's: --shortcut block has one of its own, and --pre-num 0."""
    flags = ""
    for name in METHODS[args.method].flags:
        value = getattr(args, name, None)
        if value is True:
            value = name
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        if value is not None and value is not False:
            flags += f"-{value}"
    rank = "" if args.rank is None else f"-r{args.rank}"
    root = "-rs" * args.rs
    ratio = "" if args.lr_ratio == 1 else f"-ratio{args.lr_ratio:g}"
    return (f"{args.dataset.replace('/', '-')}-{args.method}{flags}{rank}{root}{ratio}"
            f"-s{args.seed}")


def check_ranges(args):
    """Refuse numbers out of range."""
    for name in ("steps", "epochs", "batch_size", "grad_accum", "lr", "lr_ratio", "alpha",
                 "context", "eval_every", "test_texts"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name, high in (("warmup", math.inf), ("weight_decay", math.inf), ("clip", math.inf),
                       ("label_smoothing", 1)):
        if not 0 <= getattr(args, name) < high:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more"
                             f"{' and below 1' * (high == 1)}, not {getattr(args, name)}")
    for name, most in (("steps", 8), ("batch_size", 6), ("grad_accum", 6)):
        if (getattr(args, name) or 0) > 10**most:
            raise ValueError(f"--{name.replace('_', '-')} must be at most 10^{most}, not "
                             f"{getattr(args, name)}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be in 0..2^63 - 1, not {args.seed}")


# -------------------------------------------------------------------------------------------------
# For all commands

class Parser(argparse.ArgumentParser):
    """Flags are written in full. With `files` @FILE reads flags from a file, # begins a comment
    there. Errors are ValueErrors."""

    def __init__(self, name, description, files=True):
        super().__init__(name, description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         epilog="@FILE reads flags from a file, one a line." if files else None)
        self.files, self.included = files, 0

    def error(self, message):
        raise ValueError(message)

    def _get_values(self, action, given):
        """An empty value is a variable that the shell does not know. It never means the default."""
        if action.option_strings and "" in given:
            self.error(f"{action.option_strings[0]} is empty: give it a value, or leave it out")
        return super()._get_values(action, given)

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        # flags may stand before, between and behind the rest
        return self.parse_intermixed_args(self.from_files(argv) if self.files else argv)

    def from_files(self, argv, depth=0):
        """The flags with those of the files in the place of @FILE."""
        flags = []
        for flag in map(str, argv):
            if not flag.startswith("@"):
                flags.append(flag)
                continue
            file = Path(path(flag[1:]))
            for number, line in enumerate(read_text(file).split("\n"), 1):
                try:
                    words = shlex.split(without_comment(line))
                except ValueError as e:
                    raise ValueError(f"{file}, line {number}: {e}") from None
                self.included += len(words)
                if depth > 20 or self.included > 10000:
                    raise ValueError(f"{file} includes itself, or has thousands of flags")
                flags += self.from_files(words, depth + 1)
        return flags


def without_comment(line):
    """A line up to the # that begins a word outside of quotes."""
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def command(name, parse, run, argv=None):
    """run(parse(argv)), with every expected failure as one line on stderr."""
    # some job runners start programs without them
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")
                              for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show

    def end(message, code=2):
        message = " ".join(message.split())
        # a foreign file may have what moves the terminal's cursor
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        print(f"{name}: {message}", file=sys.stderr)
        raise SystemExit(code) from None
    try:
        return run(parse(argv))
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as e:
        end(str(e))
    except KeyboardInterrupt as e:
        end("; ".join(["interrupted", *map(str, e.args)]), 130)
    except Exception as e:
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(e):
            end("out of memory: a smaller --batch-size may help, in training with --grad-accum "
                f"({(str(e).splitlines() or [''])[0]})")
        if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        end(f"--compile does not work on this machine: {' '.join(str(e).split()[:12])}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
