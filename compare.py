"""Which method, and at which learning rate, on your data?

    python compare.py --dataset pairs --data-dir my.jsonl --methods lora,rslora,reslora

Each method tries rates a factor of two apart, around the default for this model, until its best one
has a worse one on both sides; the validation of seed 0 decides. Then each runs five other seeds at
its best rate. Beside a variant stands the plain LoRA that it must beat, whose update is as large.
What is printed last is the command of train.py for your data. All other flags go to train.py.

Or a grid of one's own: rows x ranks x learning rates x seeds -> one csv and one picture.

    python compare.py out/demo --lr 1.2e-2 2.4e-2 --seeds 3 --best-lr --row "LoRA: --method lora" \\
        --row "mine: --method reslora --pre-num 2" -- --dataset restaurants --rank 16

All flags after -- go to every run. With --best-lr each row, at each rank, tries all learning rates
on the first seed, and only the rate that validates best runs the other seeds. The csv keeps every
run, and its column `best` marks these rates. A grid may be stopped and started again: a finished
run is never repeated, in any grid. Runs lie in out/compare, and the column `run` names their
folder. With --long, for runs of many minutes, the csv grows run by run and is read back, so that it
can be gone on with where out/compare is lost, and only the chosen rates see the test split.
experiments/*.sh are the comparisons of RESULTS.md.
"""
import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import data
from checkpoints.configs import read_config
from checkpoints.files import (
    check_new,
    check_writable,
    fingerprint,
    read_csv,
    read_json,
    read_text,
    write,
    write_csv,
)
from checkpoints.pretrained import ROOT, from_pretrained, locate
from data import Dataset
from evaluation import evaluate
from evaluation.plots import drawn_here, picture
from methods import METHODS
from run.flags import Parser, command, path, rate_of
from run.folder import Diverged, best_step
from run.owner import lock

RESULTS = ROOT / "experiments/results"
WIDEST = 12  # rates that a row tries at most, in the first form

# The same for a method in every picture, in grey and without colours too: colour, marker, line
STYLES = {"lora": ("C0", "o", "-"), "rslora": ("C1", "s", "--"), "input": ("C2", "^", "-"),
          "block": ("C4", "D", "--"), "middle": ("C3", "v", "-."), "deltalora": ("C5", "X", "--"),
          "adalora": ("C6", "p", ":"), "dylora": ("C7", "h", ":"), "loha": ("C8", "<", "-."),
          "lokr": ("C9", ">", "-."), "full": ("0.35", "P", ":")}


class Also(str):
    """A row that --quick leaves out."""


def parse(argv):
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--methods" for word in argv):
        return parse_question(argv)
    if not {"--row", "--also", "-h", "--help"} & {word.partition("=")[0] for word in argv}:
        raise ValueError("give --methods lora,reslora,… for your data, or PATH with --row and "
                         "--lr: see --help")
    parser = Parser("compare.py", __doc__)
    add = parser.add_argument
    add("--methods", help="the first form, with --seeds (5), --jobs, and --to PATH of PATH.csv "
        "and PATH.png")
    add("to", type=lambda text: Path(path(text)), help="PATH of PATH.csv and PATH.png")
    add("--row", action="append", required=True, help='"LABEL: flags of train.py", one for each '
        'line of the table')
    add("--also", dest="row", action="append", type=Also, help="a row that --quick leaves out")
    add("--lr", nargs="+", type=float, required=True, help="rates; a row may have its own, behind "
        "--lr in its flags")
    add("--rank", nargs="+", type=int, help="ranks")
    add("--seeds", type=int, default=1, help="how many, from 0 (1)")
    add("--best-lr", action="store_true", help="all seeds only at the rate with the best "
        "validation of seed 0")
    add("--long", action="store_true", help="runs of PATH.csv are taken from it, each finished one "
        "is written to it; only the chosen rates are measured on the test split")
    add("--quick", action="store_true", help="one seed, at the rates that PATH.csv calls best, of "
        "ranks the first and the last; into out/quick")
    add("--jobs", type=int, help="runs at a time, one thread each (one for each core, on a GPU at "
        "most 4)")
    add("--plot", choices=("rows", "rank", "lr", "step", "none"), default="rows",
        help="what the picture's axis is (rows)")
    add("--metric", default="merged loss", help="what it shows: a column of the csv (merged loss)")
    add("--title", default="")
    add("--forgetting", help="a dataset whose loss is measured before and after, the pretraining "
        "text")
    grid_flags = argv[:argv.index("--")] if "--" in argv else argv
    args = parser.parse_args(grid_flags)
    args.flags = words(argv[len(grid_flags) + 1:])
    if args.seeds < 1 or args.jobs is not None and args.jobs < 1:
        raise ValueError("--seeds and --jobs must be 1 or more")
    args.lr, args.rank = list(dict.fromkeys(args.lr)), list(dict.fromkeys(args.rank or []))
    args.rank = args.rank[::len(args.rank) - 1] if args.quick and len(args.rank) > 1 else args.rank
    args.rows, args.rates, args.methods = {}, {}, None
    for row in args.row:
        if args.quick and isinstance(row, Also):
            continue
        label, colon, flags = row.partition(":")
        label, flags = label.strip(), words(flags)
        if not colon or not label or label in args.rows:
            raise ValueError(f"--row {row!r} is not 'LABEL: flags', with a label that no other row "
                             "has")
        for flag in ("--seed", "--out", *["--rank"] * bool(args.rank)):
            if flag in flags + args.flags:
                raise ValueError(f"{flag} is set by the grid: take it out of row {label!r} and "
                                 "from behind --")
        args.rows[label], args.rates[label] = (own_rates(flags) if "--lr" in flags
                                               else (flags, args.lr))
    if "--lr" in args.flags:
        raise ValueError("--lr is set by the grid: take it out from behind --")
    if len(args.rank) > 1 and args.plot not in ("rank", "none"):
        raise ValueError(f"several ranks are drawn by --plot rank, not {args.plot}")
    return args


def parse_question(argv):
    """The flags of the first form: those of a grid, whose rows and rates follow from them."""
    import train
    parser = Parser("compare.py", __doc__)
    add = parser.add_argument
    add("--methods", type=lambda names: names.split(","))
    add("--seeds", type=int, default=5)
    add("--jobs", type=int)
    add("--to", type=lambda text: Path(path(text)))
    args, flags = parser.parse_known_args(parser.from_files(argv))
    args.flags = words(flags)
    if args.seeds < 1 or args.jobs is not None and args.jobs < 1:
        raise ValueError("--seeds and --jobs must be 1 or more")
    for flag in ("--method", "--lr", "--seed", "--out", "--resume", "--init-from"):
        if flag in args.flags:
            raise ValueError(f"{flag} is set by the comparison: leave it out")
    args.rows, args.against, args.rates = {}, {}, {}
    for method in args.methods:
        add_rows(args, method)
    of_rows = {word for row_flags in args.rows.values() for word in common(args.flags, row_flags)}
    for word in args.flags:
        if word not in of_rows:
            raise ValueError(f"{word} is for none of --methods {','.join(args.methods)}")
    for label, row_flags in args.rows.items():
        asked = train.parse([*common(args.flags, row_flags), *row_flags])
        middle = asked.lr or rate_of(asked.method, read_config(locate(asked.model)))
        args.rates[label] = [middle / 2, middle, 2 * middle]
    args.rows = {label: [*common(args.flags, row_flags), *row_flags]
                 for label, row_flags in args.rows.items()}
    model = Path(asked.model).name
    names = ["compare", asked.dataset.replace("/", "-")]
    if asked.data_dir:
        names.append(Path(asked.data_dir).stem)
    args.to = args.to or Path("out") / "-".join([*names, model])
    args.flags, args.rank, args.plot = [], [], "lr"
    args.best_lr, args.long, args.quick, args.forgetting = True, False, False, None
    args.metric, args.title = "merged loss", f"{asked.dataset}, {model}: seed 0"
    return args


def add_rows(args, method):
    """The row of a method, and of the LoRA whose update is as large: that of ResLoRA's input reads
    1 + m layers, W of Delta-LoRA moves by another lambda B A, rsLoRA has another alpha."""
    import train
    if method not in METHODS:
        raise ValueError(f"--methods {method!r} is not one of {', '.join(METHODS)}")
    mine = ["--method", method]
    asked = train.parse([*common(args.flags, mine), *mine])
    own = {name: getattr(asked, name, spec.get("default"))
           for name, spec in METHODS[method].flags.items()}
    name, times = method, 1
    if method == "reslora":
        name = f"reslora {own['shortcut']}"
        if own["shortcut"] == "input":
            times = 1 + abs(own["pre_num"])  # -1 is all earlier layers: at least one
    elif method == "deltalora":
        times = 1 + own["delta_lambda"]
    elif method == "rslora":
        name = f"rslora = lora, alpha {asked.alpha * asked.rank**0.5:.4g}"
    plain = "lora" if times == 1 else f"lora, alpha {times * asked.alpha:g}"
    args.rows.setdefault("lora", ["--method", "lora"])
    if METHODS[method].adapter and times != 1:
        args.rows.setdefault(plain, ["--method", "lora", "--alpha", f"{times * asked.alpha:g}"])
    args.rows.setdefault(name, mine)
    args.against[name] = plain


def common(flags, row_flags):
    """The flags of train.py that are for a row, without those of other methods."""
    own = METHODS[row_flags[1]].flags
    others = {"--" + name.replace("_", "-") for method in METHODS.values() for name in method.flags
              if name not in own}
    found, kept = [], True
    for word in flags:
        kept = word not in others if word.startswith("--") else kept
        found += [word] * kept
    return found


def own_rates(flags):
    """Flags with "--lr A B" among them -> (the others, [A, B])"""
    at = flags.index("--lr")
    end = next((i for i in range(at + 1, len(flags)) if flags[i].startswith("--")), len(flags))
    try:
        rates = list(dict.fromkeys(map(float, flags[at + 1:end])))
    except ValueError:
        rates = []
    if not rates:
        raise ValueError(f"a row's own rates are numbers, not --lr {shlex.join(flags[at + 1:end])}")
    return flags[:at] + flags[end:], rates


def words(flags):
    """"--a=1 --b 2 @FILE" or a list of such -> ["--a", "1", "--b", "2", …], with what the file
    holds."""
    flags = shlex.split(flags) if isinstance(flags, str) else flags
    flags = Parser("train.py", None).from_files(flags)
    return [part for word in flags
            for part in (word.split("=", 1) if word.startswith("--") else [word])]


# --------------------------------------------------------------------------------------------------
# One run

def folder(flags):
    """Of a run: the same flags on the same kind of device, in whatever order, over the same bytes
    of data and base, wherever they lie, are the same run in every grid; the last of a flag
    counts."""
    flags = list(map(str, flags))
    for i, (flag, value) in enumerate(itertools.pairwise(flags), 1):
        if flag in ("--data-dir", "--model", "--init-from") and Path(value).exists():
            flags[i] = contents(Path(value))
    pairs = [pair.split() for pair in " ".join(flags).split("--")]
    last = sorted({tuple(pair[:1]): pair for pair in pairs}.values())
    device = next((pair[1] for pair in last if pair[:1] == ["device"]), "auto")
    if device.startswith("cuda") or device == "auto" and torch.cuda.is_available():
        # in bf16 unless --dtype says otherwise: another run than that of a CPU
        last.append(["on", "cuda"])
    return ROOT / "out/compare" / hashlib.sha256(json.dumps(last).encode()).hexdigest()[:12]


def contents(path):
    """Fingerprint of a file, or of all files of a folder, as they are now."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint([fingerprint_file(file, file.stat().st_mtime_ns, file.stat().st_size)
                        for file in files])


@functools.cache
def fingerprint_file(file, changed, size):
    return f"{file.name} {fingerprint(file)}"


def code():
    """Fingerprint of all files that decide a run's numbers beside its flags: models, methods, data,
    training."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent
    folders = ".", "baselines", "checkpoints", "data", "evaluation", "run", "experiments/recipes"
    files = sorted(file for folder in folders for pattern in ("*.py", "*.args", "*/config.json")
                   for file in (root / folder).glob(pattern))
    for file in files:
        if file.name not in ("generate.py", "compare.py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def cell(flags, forgetting=None, test=True):
    """One run of train.py; its result.json, or {"diverged": why}. A finished run is read back.
    Without `test` it ends after training, and the test split is measured when it is asked for."""
    evaluate.SCORED = 0  # the tables are of losses and accuracies: no time for decoding
    out, flags = folder(flags), list(map(str, flags))
    # another grid may have the same run
    with lock(f"{out} in a grid", wait=True):
        return locked_cell(out, flags, forgetting, test)


def locked_cell(out, flags, forgetting, test):
    done = out / "cell.json"
    known = read_json(done) if done.exists() else {"flags": flags, "code": code()}
    also = known.setdefault("also", {})
    todo, result_file = [], out / "result.json"
    if "diverged" not in also and not result_file.exists() and (test or "trained" not in known):
        todo.append(whole if test else only_train)
    if "diverged" not in also and test and forgetting and f"base loss on {forgetting}" not in also:
        todo.append(functools.partial(losses_on, forgetting))
    if todo:
        out.mkdir(parents=True, exist_ok=True)
        with (open(out.with_suffix(".txt"), "w", encoding="utf-8") as printed,
              contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)):
            try:
                for part in todo:
                    part(out, known)
            except Diverged as e:  # no reason to stop a grid: this rate is the worst
                known["also"] = {"diverged": str(e)}
            except ValueError as e:
                raise ValueError(f"{shlex.join(flags)}: {e}") from None
        out.mkdir(exist_ok=True)  # a run that left nothing has left no folder either
        write(done, lambda part: part.write_text(json.dumps(known), encoding="utf-8"))
    result = read_json(result_file) if result_file.exists() else known.get("trained", {})
    return {**result, **known["also"], "also": known["also"], "stale": known.get("code") != code()}


def only_train(out, known):
    """known["trained"]: what result.json says of a run that was not measured on the test split."""
    import train
    run = train.Run(train.parse([*known["flags"], "--out", str(out)]))
    run.log.first = run.adapter.begin(run.layers, run.settings.steps)
    rows = train.fit(run)
    known["trained"] = {"settings": {**run.identity, "device": str(run.settings.device)},
                        "metrics": {}, "parameters": run.parameters,
                        "seconds": {"training": rows[-1]["seconds"]},
                        "selected": {"step": best_step(rows, run.log.first),
                                     "by": f"validation {run.data.metric}"}}


def whole(out, known):
    """A run from setup to result.json, from where `only_train` has left it if it has."""
    import train
    train.train(train.parse([*known["flags"], "--out", str(out),
                             *["--resume"] * ("trained" in known)]))


def trained(flags):
    """train.Run of the same run, its model as it was kept, not merged yet."""
    import train
    cell(flags)
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(train.parse([*map(str, flags), "--out", str(folder(flags)), "--resume"]))
        train.fit(run)  # no step is left: this puts the best weights into the model
    return run


def losses_on(dataset, out, known):
    """known["also"]: the loss on the validation split of another dataset, of a finished run's base
    and merged model."""
    import generate
    merged, settings, source = generate.load_run(out)
    examples, task, base = before(dataset, source, settings["context"], settings["device"])
    known["also"].update({f"base loss on {dataset}": base,
                          f"merged loss on {dataset}": loss_of(merged, examples, task,
                                                               settings["device"])})


def loss_of(model, examples, task, device):
    return evaluate.evaluate(model.to(device), examples, task, torch.device(device),
                             contextlib.nullcontext())[0]


@functools.cache
def before(dataset, source, context, device):
    """(64 examples, task, loss of the base on them): the same for all runs from one base."""
    base = from_pretrained(source)
    dataset = Dataset(dataset).encode(source, base, context)
    examples = dataset.examples["validation"][:64]
    return examples, dataset.task, loss_of(base, examples, dataset.task, device)


def validation(out):
    """(value, loss, better high?) of the checkpoint that a run kept: the value by the metric that
    chose it."""
    path = out / "result.json" if (out / "result.json").exists() else out / "cell.json"
    try:
        result = read_json(path)
        selected = result.get("trained", result)["selected"]
        metric = selected["by"].removeprefix("validation ")
        kept = next(row for row in read_csv(out / "log.csv") if int(row["step"])
                    == selected["step"])
        return float(kept[f"val_{metric}"]), float(kept["val_loss"]), metric != "loss"
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError) as e:
        raise ValueError(f"{out} is damaged, remove that folder: {e!r}") from None


def worth(args, key, results):
    """What a rate is chosen by, better low: the validation metric, at a tie the validation loss."""
    if results[key].get("diverged"):
        return math.inf, math.inf
    if "row" in results[key]:  # of the csv, which knows no loss beside another metric
        name = next(name for name, value in results[key].items() if name.startswith("validation ")
                    and value)
        return float(results[key][name]) * (1 if name == "validation loss" else -1), math.inf
    value, loss, high = validation(folder(flags_of(args, *key)))
    return -value if high else value, loss


def pool(jobs, setup=None):
    """Processes for `jobs` runs at a time, one thread each; `setup()` is called first in each of
    them. They end with the process that made them, however that ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    workers = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"),
                                  initializer=begin_worker, initargs=(os.getpid(), setup))
    # Ctrl-C is the parent's: a process begins with the signals as its parent has them then
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(jobs):
        workers.submit(os.getpid)
    signal.signal(signal.SIGINT, before)
    return workers


def begin_worker(parent, setup):
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    if setup:
        setup()


def flags_of(args, label, rank, lr, seed):
    return [*args.flags, *args.rows[label], *(["--rank", rank] if rank is not None else []), "--lr",
            f"{lr:g}", "--seed", seed]


def tidy(args, key, result, best):
    """The csv row of a run: what was run, what was chosen, what came out."""
    label, rank, lr, seed = key
    if "row" in result:
        counts = {name: int(result[name]) if result.get(name) else None
                  for name in ("rank", "trained")}
        return {**result, **counts, "lr": lr, "seed": seed, "best": int(best)}
    flags = list(map(str, flags_of(args, *key)))
    for flag, name in (("--data-dir", "FOLDER"), ("--model", "MODEL")):  # wherever it is
        if flag in flags and Path(flags[flags.index(flag) + 1]).exists():
            flags[flags.index(flag) + 1] = name
    if "diverged" in result:
        rank = int(flags[flags.index("--rank") + 1]) if "--rank" in flags else None
        return {"row": label, "rank": rank, "lr": lr, "seed": seed, "best": int(best),
                "diverged": result["diverged"], "run": folder(flags_of(args, *key)).name,
                "flags": shlex.join(flags)}
    settings, out = result["settings"], folder(flags_of(args, *key))
    log = read_csv(out / "log.csv")
    late = log[-max(1, len(log) // 10):]  # the last tenth
    row = {"row": label, "dataset": settings["dataset"], "method": settings["method"],
           "rank": settings["rank"], "lr": settings["lr"], "seed": seed, "best": int(best),
           "trained": result["parameters"]["trainable"], "kept step": result["selected"]["step"],
           result["selected"]["by"]: round(validation(out)[0], 5),
           "late training loss": round(sum(float(r["train_loss"]) for r in late) / len(late), 5),
           "late gradient norm": round(sum(float(r["grad_norm"]) for r in late) / len(late), 5)}
    for stage, values in result["metrics"].items():
        # full fine-tuning: nothing to merge
        names = ("unmerged", "merged") if stage == "trained" else (stage,)
        row.update({f"{name} {metric}": round(value, 5) for name in names
                    for metric, value in values.items()})
    row.update({name: round(value, 5) for name, value in result["also"].items()})
    if settings["device"] != "cpu":
        row.update(device=torch.device(settings["device"]).type, dtype=settings["dtype"])
    return {**row, "training seconds": result["seconds"]["training"], "run": out.name,
            "flags": shlex.join(flags)}


# --------------------------------------------------------------------------------------------------
# The grid

class Grid:
    """The runs of a grid as they are found: results {(label, rank, lr, seed): of `cell`, or a row
    of the csv}."""

    def __init__(self, args, to, rates, workers, bar):
        self.args, self.to, self.rates, self.workers, self.bar = args, to, rates, workers, bar
        self.results, self.best, self.lock = {}, {}, threading.Lock()
        if args.long and to.exists():
            known = {row["run"]: row for row in read_csv(to)}
            keys = {folder(flags_of(args, *key)).name: key
                    for key in ((*key, lr, seed) for key, some in rates.items() for lr in some
                                for seed in range(args.seeds))}
            self.results = {keys[run]: row for run, row in known.items() if run in keys}

    def run(self, keys, test):
        """`cell` of each key that the csv does not know."""
        jobs, other = ({}, f"merged loss on {self.args.forgetting}" if self.args.forgetting
                       else "merged loss")
        for key in keys:
            known = self.results.get(key, {})
            measured = known.get("diverged") or known.get("merged loss") and known.get(other)
            if "row" in known and (measured or not test):
                self.bar.update()
            else:
                jobs[self.workers.submit(cell, flags_of(self.args, *key), self.args.forgetting,
                                         test)] = key
        ended = queue.SimpleQueue()
        for job in jobs:
            # as_completed would wait for ever for a job that `all` cancels
            job.add_done_callback(ended.put)
        for _ in jobs:
            job = ended.get()
            with self.lock:
                self.results[jobs[job]] = job.result()
                if self.args.long:
                    write_csv(self.to, self.rows())
            self.bar.update()

    def row(self, key):
        """One row of the table, at one rank: its rates on the first seed, then all seeds at the
        best."""
        args, row_rates = self.args, self.rates[key]
        self.run([(*key, lr, 0) for lr in row_rates], test=not args.long or not args.best_lr)
        self.best[key] = min(row_rates, key=lambda lr: worth(args, (*key, lr, 0), self.results))
        chosen = [self.best[key]] if args.best_lr else row_rates
        self.run([(*key, lr, seed) for lr in chosen for seed in range(args.seeds) if seed
                  or args.long], test=True)

    def all(self):
        """As many rows at a time as runs, so that a long grid has finished rows early. The first
        run that fails stops the rest."""
        with ThreadPoolExecutor(self.args.jobs) as rows:
            try:
                for job in as_completed([rows.submit(self.row, key) for key in self.rates]):
                    job.result()
            except BaseException:
                rows.shutdown(wait=False, cancel_futures=True)
                stop_workers()
                raise
        return self.rows()

    def rows(self):
        """The csv: what has diverged with every rate has no best one."""
        keys = [(*key, lr, seed) for key, some in self.rates.items()
                for seed in range(self.args.seeds) for lr in some]
        return [tidy(self.args, key, self.results[key],
                     self.best.get(key[:2]) == key[2]
                     and not self.results[*key[:3], 0].get("diverged")) for key in keys
                if key in self.results]


def stop_workers():
    for process in multiprocessing.active_children():
        process.terminate()


class Search(Grid):
    """The runs of the first form: each row looks for its best rate, then runs seeds 1, 2, …, which
    did not choose it."""

    def row(self, key):
        args, rates = self.args, self.rates[key]
        while True:
            self.run([(*key, lr, 0) for lr in rates if (*key, lr, 0) not in self.results],
                     test=False)
            best = min(rates, key=lambda lr: worth(args, (*key, lr, 0), self.results))
            more = {rates[0]: best / 2, rates[-1]: 2 * best}.get(best)
            if more is None or len(rates) == WIDEST:
                break
            rates = self.rates[key] = sorted([*rates, more])
            self.bar.total += 1
        self.best[key] = best
        if not self.results[*key, best, 0].get("diverged"):
            self.run([(*key, best, seed) for seed in range(1, args.seeds + 1)], test=True)

    def rows(self):
        return [tidy(self.args, key, result, self.best.get(key[:2]) == key[2]
                     and not self.results[*key[:3], 0].get("diverged"))
                for key, result in sorted(self.results.items(), key=lambda item: (
                    list(self.args.rows).index(item[0][0]), *item[0][2:]))]


def answer(args, setup=None):
    """The first form: find each row's rate, run its seeds, say what differs, and what to type."""
    csv_file, png_file = files_to_write(args.to)
    args.jobs = jobs(args)
    args.rates = {(label, None): rates for label, rates in args.rates.items()}
    number = len(args.rows) * (3 + args.seeds)
    with pool(args.jobs, setup) as workers:
        try:
            seconds = workers.submit(seconds_of, next(iter(args.rows.values()))).result()
        except BaseException:
            stop_workers()
            raise
        print(f"compare  {', '.join(args.rows)}\n         {number} runs or more of about "
              f"{seconds:.0f} s, {args.jobs} at a time: {number * seconds / args.jobs / 60:.1f} "
              "min or more; finished runs are not repeated")
        with tqdm(total=number, unit="run", desc=args.to.name) as bar:
            grid = Search(args, csv_file, args.rates, workers, bar)
            rows = grid.all()
    note_stale(grid)
    write_csv(csv_file, rows)
    chosen = next((name for row in rows for name in row if name.startswith("validation ")), None)
    if chosen is None:
        raise SystemExit("every run diverged: the data or the model may be at fault")
    first = argparse.Namespace(**{**vars(args), "metric": chosen})
    draw(first, png_file, [row for row in rows if not row["seed"]])
    say(args, rows, chosen)
    return rows


def seconds_of(flags):
    """About how long one run takes: to set it up, three of its steps, and a look at its validation
    split, as often as a run has them."""
    import train
    out = ROOT / "out/compare/try"
    with contextlib.redirect_stdout(io.StringIO()):
        started = time.time()
        run = train.Run(train.parse([*flags, "--lr", "1e-6", "--out", str(out)]))
        settings, start = run.settings, time.time() - started
        optimizer = train.make_optimizer(run.model, settings)
        scaler = torch.amp.GradScaler(settings.device.type, enabled=False)
        stream = data.step_batches(run.data.examples["train"], run.data.task, settings.batch_size,
                                   settings.grad_accum)
        run.adapter.begin(run.layers, settings.steps)
        for step in range(1, 5):
            if step == 2:  # the first is slower
                started = time.time()
            train.one_step(run.model, run.params, optimizer, scaler, run.adapter, run.layers,
                           next(stream), step, settings)
        step = (time.time() - started) / 3
        started = time.time()
        evaluate.validate(run.model, run.data, settings.device, settings.amp)
    looks = math.ceil(settings.steps / settings.eval_every) + 3
    return start + settings.steps * step + looks * (time.time() - started)


def say(args, rows, chosen):
    """Print the table, and as its last line the command for these data: that of the row that
    validates best, but plain LoRA's unless it beats it by two standard errors."""
    seeds = {label: [row for row in same if row["seed"] and not row.get("diverged")]
             for (label,), same in groups(rows, "row").items()}
    shown = chosen.replace("validation", "merged")
    names = list(dict.fromkeys(["merged loss", shown]))
    print(f"\n| method | rate | {' | '.join(names)} | against | {shown} above that |\n"
          f"|{'---|' * (len(names) + 4)}")
    for label, mine in seeds.items():
        against, rate, values = args.against.get(label, ""), "diverged", [""] * len(names)
        beside = seeds.get(against) if against != label else None
        if mine:
            rate = f"{mine[0]['lr']:g}" + " (the last that was tried)" * (
                mine[0]["lr"] in (args.rates[label, None][0], args.rates[label, None][-1]))
            values = [with_error([row[name] for row in mine], "") for name in names]
        print(f"| {label} | {rate} | {' | '.join(values)} | {against if beside else ''} | "
              f"{paired(mine, beside, shown) if mine and beside else ''} |")
    print("\nMeans over the seeds, with standard errors; a difference is seed by seed. LoRA with "
          "an update of the same size stands beside a variant.")
    print(f"All runs: {args.to}.csv; {chosen} against rate: {args.to}.png")
    low = 1 if chosen == "validation loss" else -1
    best = min((label for label in seeds if seeds[label]),
               key=lambda label: low * mean([row[chosen] for row in seeds[label]]))
    if best != "lora" and seeds["lora"]:
        gain = differences(seeds[best], seeds["lora"], chosen)
        if len(gain) < 2 or low * mean(gain) > -2 * standard_error(gain):
            print(f"{best} validates best, but not by two standard errors: plain LoRA will do.")
            best = "lora"
    row = seeds[best][0]
    print(f"Recommended, by the validation; with seed {row['seed']} its {shown} is "
          f"{row[shown]:.4f}:")
    print(shlex.join(["python", "train.py", *map(str, flags_of(args, best, None, row["lr"],
                                                               row["seed"]))]))


def differences(rows, others, column):
    """[what lies between two rows] of each seed that both have."""
    of = {row["seed"]: float(row[column]) for row in others}
    return [float(row[column]) - of[row["seed"]] for row in rows if row["seed"] in of]


def paired(rows, others, column="merged loss", digits=4):
    """What lies between two rows seed by seed: mean and standard error, "+0.0039 (0.0086)"."""
    return with_error(differences(rows, others, column), digits=digits)


def with_error(values, sign="+", digits=4):
    """Mean and standard error, "+0.0039 (0.0086)"."""
    error = f" ({standard_error(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}" if values else ""


def standard_error(values):
    """Of the mean, of two values or more."""
    centre, n = mean(values), len(values)
    return (sum((v - centre)**2 for v in values) / (n - 1) / n)**0.5


def compare(args, setup=None):
    """Run what has not been run, write PATH.csv and PATH.png; return the rows; setup: `pool`."""
    import train
    if args.methods:
        try:
            return answer(args, setup)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on, and repeats no finished run"
                                    ) from None
    args.jobs = jobs(args)
    to, rates = args.to, {}
    for label, row_flags in args.rows.items():  # a mistake is said before anything runs
        asked = train.parse([*args.flags, *row_flags])
        plain = [name for name in data.DATASETS if data.about(name, "PLAIN")]
        if args.forgetting and (data.about(asked.dataset, "LABELS")
                                or args.forgetting not in plain):
            raise ValueError(f"--forgetting {args.forgetting} is the loss of a GPT on one of "
                             f"{', '.join(plain)}")
        for rank in args.rank if METHODS[asked.method].adapter and args.rank else [None]:
            rates[label, rank] = args.rates[label]
    csv_file, _ = files_to_write(to, ROOT / "out/quick" if args.quick else None)
    if args.quick:
        known = read_csv(csv_file) if csv_file.exists() else []
        for key in rates:
            best = [float(r["lr"]) for r in known if r["best"] == "1" and r["row"] == key[0]
                    and key[1] in (None, int(r["rank"] or 0))]
            if not best:
                print(f"note     {to}.csv knows no best rate of {key[0]}: the middle one is taken")
            rates[key] = [best[0] if best else rates[key][len(rates[key]) // 2]]
        args.seeds, to = 1, ROOT / "out/quick" / to.name
    first = sum(map(len, rates.values()))
    more = len(rates) if args.best_lr else first
    bar = tqdm(total=first + more * (args.seeds - 1 + args.long), unit="run", desc=to.name)
    with bar, pool(args.jobs, setup) as workers:
        grid = Grid(args, to.with_name(to.name + ".csv"), rates, workers, bar)
        rows = grid.all()
    note_stale(grid)
    write_csv(to.with_name(to.name + ".csv"), rows)
    if not all(args.metric in row for row in rows if row["best"] and not row.get("diverged")):
        raise ValueError(f"--metric {args.metric!r} is no column of {to}.csv: {', '.join(rows[0])}")
    if args.plot != "none":
        draw(args, to.with_name(to.name + ".png"), rows)
    report(args, rows)
    if rows and all(row.get("diverged") for row in rows):
        raise SystemExit("every run diverged: lower rates may help")
    return rows


def jobs(args):
    """How many runs at a time. Small models leave a GPU waiting for the CPU most of the time, so
    several runs share one."""
    return args.jobs or min(os.cpu_count(), 4 if torch.cuda.is_available() else math.inf)


def files_to_write(to, instead=None):
    """(PATH.csv, PATH.png) of a comparison; ValueError where they are somebody else's, or cannot be
    written. instead: the folder that is written to, if not theirs."""
    csv_file, png_file = (to.with_name(to.name + ending) for ending in (".csv", ".png"))
    check_writable(instead or to.parent)
    check_new(csv_file, is_table)
    check_new(png_file, lambda png: csv_file.exists() or drawn_here(png))
    return csv_file, png_file


def note_stale(grid):
    if stale := sum(result.get("stale", False) for result in grid.results.values()):
        print(f"note     {stale} runs are from before the code changed: delete out/compare to "
              "repeat them")


def is_table(path):
    """Whether a file is a csv that `compare` wrote, by its first line."""
    try:
        columns = read_text(path).partition("\n")[0].split(",")
    except ValueError:
        return False
    return {"row", "lr", "best", "run"} <= set(columns)


def groups(rows, *columns):
    """{values of the columns: rows}, in order."""
    grouped = {}
    for row in rows:
        grouped.setdefault(tuple(row[c] for c in columns), []).append(row)
    return grouped


def mean(values):
    return sum(values) / len(values)


def report(args, rows):
    """Markdown: each row at its best rate, mean and range over the seeds."""
    name = args.metric
    print(f"\n| | rank | rate | seeds | trained | {name} |\n|---|---|---|---|---|---|")
    for (label, rank, lr), same in groups([r for r in rows if r["best"]], "row", "rank",
                                          "lr").items():
        tried = args.rates[label]
        end = " (the end of its range)" * (len(tried) > 1 and lr in (min(tried), max(tried)))
        print(f"| {label} | {rank or ''} | {lr:g}{end} | {len(same)} | {same[0]['trained']:,} | "
              f"{spread(same, name)} |")


def spread(rows, name):
    """"0.171 (0.165-0.180)", or one number for one seed; a run that diverged is no number, but is
    said."""
    values = [float(r[name]) for r in rows if not r.get("diverged")]
    more = f" ({min(values):.3f}-{max(values):.3f})" * (len(values) > 1)
    return f"{mean(values):.3f}{more}" + f", {len(rows) - len(values)} diverged" * (len(values)
                                                                                    < len(rows))


def style(row):
    """(colour, marker, line) of a row's method; ResLoRA's by its shortcut."""
    key = row["method"].partition("-")[0]  # an experiment's "reslora-merged-at" looks like ResLoRA
    if key == "reslora":
        key = next((s for s in ("block", "middle") if f"--shortcut {s}" in row["flags"]), "input")
    return STYLES.get(key, ("k", "x", "-"))


def draw(args, path, rows):
    """The picture: against rank, rate or step a line with the range of its seeds, or one point for
    each seed."""
    shown = [r for r in rows if (r["best"] or args.plot == "lr") and not r.get("diverged")
             and r.get(args.metric)]
    labels = groups(shown, "row")
    tall = 0.34 * len(labels) + 1.1 if args.plot == "rows" else 3.8
    with picture(path, figsize=(6.4, tall)) as (_, axis):
        fill(args, axis, shown, labels)


def fill(args, axis, shown, labels):
    """The rows that are shown, by label, on the axis."""
    unit = ""
    if args.metric.endswith("loss"):
        classes = max((len(data.about(r["dataset"], "LABELS")) for r in shown), default=0)
        unit = {0: " (nats per target token)",
                1: " (squared error)"}.get(classes, " (nats per text)")
    used = set()
    for y, ((label,), same) in enumerate(labels.items()):
        colour, marker, line = style(same[0])
        style_of = dict(color=colour, marker=marker, fillstyle="none" if colour in used else "full",
                    ms=6)
        used.add(colour)  # a method's second row is hollow
        if args.plot == "rows":
            # equal values, seen
            beside = [y + 0.12 * (i - (len(same) - 1) / 2) for i in range(len(same))]
            axis.plot([float(r[args.metric]) for r in same], beside, ls="", alpha=0.85, **style_of)
            continue
        if args.plot == "step":
            keys = [(label, r["rank"] if args.rank else None, r["lr"], r["seed"]) for r in same]
            logs = [read_csv(folder(flags_of(args, *key)) / "log.csv") for key in keys]
            points = {int(at[0]["step"]): [float(r["train_loss"]) for r in at]
                      for at in zip(*logs, strict=True)}
            label = f"{label}, rate {same[0]['lr']:g}"
        else:
            if not same[0][args.plot]:  # full fine-tuning has no rank
                axis.axhline(mean([float(r[args.metric]) for r in same]), color=colour, ls=line,
                             label=label)
                continue
            points = {value: [float(r[args.metric]) for r in at]
                      for (value,), at in groups(same, args.plot).items()}
        x = sorted(points)
        axis.plot(x, [mean(points[v]) for v in x], ls=line, label=label,
                  **{**style_of, "ms": 0 if len(x) > 12 else 6})
        axis.fill_between(x, [min(points[v]) for v in x], [max(points[v]) for v in x], color=colour,
                          alpha=0.15, lw=0)
    if args.plot == "rows":
        axis.set_yticks(range(len(labels)), [label for (label,) in labels])
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.margins(x=0.08)
        axis.set_xlabel(args.metric + unit + ", a mark for each seed")
        axis.grid(axis="x", alpha=0.3)
    else:
        names = {"rank": "rank r", "lr": "learning rate", "step": "step"}
        axis.set(xlabel=names[args.plot],
                 ylabel=("training loss" if args.plot == "step" else args.metric) + unit)
        if args.plot != "step":
            axis.set_xscale("log", base=2 if args.plot == "rank" else 10)
        if args.plot == "lr" and len(
                rates := sorted({float(r["lr"]) for r in shown})) < 10:
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.minorticks_off()
        if args.plot == "rank":
            ranks = sorted({r["rank"] for r in shown if r["rank"]})
            axis.set_xticks(ranks, map(str, ranks))
        axis.legend(frameon=False, fontsize=9)
    axis.set_title(args.title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def main(argv=None):
    return command("compare.py", parse, compare, argv)


if __name__ == "__main__":
    main()
