"""Everything that is to be measured on one GPU, in parts of at most eight minutes; needs
the extra [dev].

    sh experiments/gpu.sh --weights out/smollm2 --data FOLDER      all parts; FOLDER: real E2E text
    sh experiments/gpu.sh bench memory                             some of them
    sh experiments/gpu.sh --dry
        the whole plan at toy size on a CPU, four minutes

    parity    the tests for a GPU; every method on the CPU and on the GPU; what rounding the logits
              would cost
    syncs     does a step wait for the GPU; how many kernels it launches, and what share of the time
              casts take
    bench     time and memory of a step beside transformers + peft and beside the floor
    compile   training with and without --compile, and how often it compiled
    jobs      runs at a time on one GPU
    memory    what fits a card of 24 GB
    methods   seconds for texts; with weights and data the comparison of all methods on E2E

A part is a list of measurements. Each is a process of its own and writes a file of
experiments/results/gpu-CARD/ when it is done, and is not repeated where that file is. A part that
has used its eight minutes, or is interrupted, keeps what it has, and the next call does what is
missing. At the end everything is packed as gpu-CARD.tar.gz and printed as RESULTS.md's tables.
Nothing is downloaded. Without --weights (a checkpoint folder, that of experiments/smollm2.py)
training is that of the shipped models, and speed that of random weights of the published shapes.
"""
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from checkpoints.files import check_writable, read_csv, read_json, write_csv, write_json
from checkpoints.pretrained import from_pretrained
from compare import RESULTS, ROOT, pool
from evaluation import decoding
from experiments import bench
from loss import vocabulary_loss
from reslora import SHORTCUTS
from run.flags import Parser, command
from run.machine import pick_device

MINUTES = 8  # of a part
RUNS = {"lora": [], "reslora input": ["--shortcut", "input"],
        "reslora middle": ["--shortcut", "middle"], "deltalora": [], "adalora": [], "dylora": [],
        "reslora block": ["--shortcut", "block"], "rslora": [], "loha": [], "lokr": [],
        "lora 4 bits": ["--base-bits", "4"]}
# toy shapes for --dry, and one that bench.py does not need
bench.PRESETS |= {"toy gpt2": (bench.GPTConfig(61, 64, 16, 2, 2), 2, 16),
                  "toy llama": (bench.LlamaConfig(61, 16, 24, 2, 4, 2, 8, 64), 2, 16),
                  "toy roberta": (bench.RobertaConfig(61, 66, 16, 2, 2, 32), 2, 16),
                  "gpt2-xl": (bench.GPTConfig(n_embd=1600, n_layer=48, n_head=25), 1, 1024)}


# --------------------------------------------------------------------------------------------------
# Measurements: each runs in a process of its own and returns what its file is to hold

def tests(args, chosen):
    """The tests of tests/test_gpu.py whose names match: how many, and which failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q",
                               "tests/test_gpu.py", "-k", chosen, f"--junitxml={file}"], cwd=ROOT,
                              capture_output=True, text=True,
                              env={**os.environ, "DEVICE": args.device.type})
        if not file.exists():
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        cases = ET.parse(file).getroot().findall(".//testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None
              or case.find("error") is not None]
    if not cases:
        raise RuntimeError(f"no test matches {chosen!r}")
    return {"tests": len(cases), "failed": failed}


def run(flags, **environment):
    """One run of train.py in a process of its own: (result.json, what it printed)."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "train.py", *map(str, flags), "--out",
                               folder + "/run"], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, **environment})
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return read_json(Path(folder) / "run/result.json"), done.stdout + done.stderr


def everywhere(args, name):
    """The merged loss of 60 steps, on the CPU and on the device in both types of arithmetic."""
    flags = ["--method", name.split()[0], *RUNS.get(name, []), "--steps", args.sized(3, 30),
             "--test-texts", 64]
    cells = {"cpu float32": ["cpu", "float32"], "float32": [args.device.type, "float32"],
             "bfloat16": [args.device.type, "bfloat16"],
             **args.sized({}, {"float16": [args.device.type, "float16"]})}
    losses = {}
    for cell, (device, dtype) in cells.items():
        metrics = run([*flags, "--device", device, "--dtype", dtype])[0]["metrics"]
        losses[cell] = metrics.get("merged", metrics.get("trained"))["loss"]
        losses[cell + " unmerged"] = metrics.get("unmerged", metrics.get("trained"))["loss"]
    return losses


def rounding(args):
    """The loss of logits at an offset, in nats, less the exact one: as loss.py computes it, and of
    rounded logits."""
    N, C, V = args.sized((64, 64, 999), (2048, 768, 50257))
    x, W = (torch.randn(s, device=args.device).bfloat16() for s in ((N, C), (V, C)))
    W *= 3 / C ** 0.5
    targets = (x.float() @ W.float().T).argmax(1)
    targets[::2] = torch.randint(0, V, targets[::2].shape, device=args.device)
    rows = []
    for offset in (0.0, -20.0, -70.0):
        b = torch.full((V,), offset, device=args.device)
        exact = vocabulary_loss(x.double(), W.double(), b.double(), targets)
        with torch.autocast(args.device.type, torch.bfloat16):
            ours = vocabulary_loss(x, W, b, targets)
            rounded = torch.nn.functional.cross_entropy((x @ W.T + b.bfloat16()).float(), targets)
        rows.append({"offset": offset, "loss": exact.item(), "ours": (ours - exact).item(),
                     "logits in bf16": (rounded - exact).item()})
    return rows


def profile(args, row):
    """A step at gpt2-medium's shapes, 8 x 58: kernels, their time, the CPU's, and the share of
    casts and copies."""
    one = steps(args, "gpt2-medium", row, 8, 58)
    gpu = args.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as found:
        one()
        bench.wait(args.device)
    kernels = [e for e in found.key_averages() if not gpu or e.self_device_time_total]
    spent = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) for e in kernels}
    total = sum(spent.values())
    casts = sum(t for name, t in spent.items()
                if re.search(r"copy|_to_copy|direct_copy|cast", name))
    launch = []
    for _ in range(args.sized(3, 20)):
        start = time.perf_counter()
        one()
        # not waited for: what the CPU takes to launch a step
        launch.append(time.perf_counter() - start)
        bench.wait(args.device)
    return {"kernels": sum(e.count for e in kernels), "kernel ms": total / 1e3,
            "casts and copies": casts / total, "CPU ms": 1e3 * statistics.median(launch)}


def shapes(args, preset, batch, context):
    """The flags of bench.py for a preset's shapes; in a dry run for a toy of its kind."""
    preset, batch, context = args.sized((f"toy {preset.split('-')[0]}", 2, 16),
                                        (preset, batch, context))
    return ["--preset", preset, "--batch-size", str(batch), "--context", str(context), "--device",
            args.device.type]


def steps(args, preset, row, batch, context, checkpoint=False):
    """A function: one step of a row of the bench on a model with random weights."""
    setup = bench.parse([*shapes(args, preset, batch, context), "--rows", "lora"])
    model, adapter, layers = bench.adapted(random_model(setup), bench.ROWS[row], setup)
    model.recompute = adapter.recompute if checkpoint else None
    one, _ = bench.our_step(model, adapter, layers, setup)
    batch = bench.batch_of(setup)
    for _ in range(2):
        one([(*batch, 1.0)])
    return lambda: one([(*batch, 1.0)])


def random_model(setup):
    """Of a preset's shapes, made where it is to be: the CPU's memory need not hold it. Norms are
    fp32, the rest is in the type of the arithmetic, as train.py has it."""
    kind = {bench.GPTConfig: bench.GPT, bench.LlamaConfig: bench.Llama,
            bench.RobertaConfig: bench.RoBERTa}
    with torch.device("meta"):
        model = kind[type(setup.config)](setup.config).to(getattr(torch, setup.dtype))
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
            module.float()
    model.to_empty(device=setup.device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    return model.requires_grad_(False)


def benched(args, preset, batch, context, rows, *more):
    """bench.py's entry for a preset, and its picture."""
    with tempfile.TemporaryDirectory() as folder:
        bench.main([*shapes(args, preset, batch, context), "--peer", "peft", "--rows", rows, *more,
                    "--rounds", args.sized("1", "9"), "--out", folder + "/bench.json"])
        shutil.copy(next(Path(folder).glob("*.png")),
                    file_of(args, "bench", args.name).with_suffix(".png"))
        return next(iter(read_json(Path(folder) / "bench.json").values()))


def compiled(args, name):
    """Training with and without --compile: seconds of a step after a third of the run,
    compilations, the losses."""
    flags = ["--method", name.split()[0], *RUNS[name], *args.task, "--steps", args.sized(6, 60),
             "--test-texts", 32, "--eval-every", args.sized(2, 20), "--batch-size",
             args.sized(4, 32), "--device", args.device.type]
    found = {}
    for kind in ("plain", "compiled"):
        result, said = run([*flags, *["--compile"] * (kind == "compiled")],
                           TORCH_LOGS="recompiles,graph_breaks")
        found[kind] = {"training seconds": result["seconds"]["training"],
                       "tokens/s at the end": int(re.findall(r"([\d,]+) tokens/s",
                                                             said)[-1].replace(",", "")),
                       "loss": result["metrics"]["unmerged"]["loss"]}
    return {**found, "recompilations": len(re.findall("Recompiling function", said)),
            "graph breaks": len(re.findall(r"(?i)graph break", said))}


def several(args, jobs):
    """Seconds for eight runs of LoRA, so many at a time."""
    flags = ["--method", "lora", *args.task, "--steps", args.sized(3, 60), "--test-texts", 32,
             "--device", args.device.type]
    start, number = time.time(), args.sized(2, 8)
    with pool(jobs) as workers:
        for job in [workers.submit(run, [*flags, "--seed", seed]) for seed in range(number)]:
            job.result()
    return {"runs": number, "at a time": jobs, "seconds": time.time() - start}


def fits(args, preset, batch, checkpoint, row="lora"):
    """The peak of a step of a row of the bench at 1,024 tokens where a card has 24 GB, or that it
    does not fit."""
    gpu = args.device.type == "cuda"
    if gpu:
        whole = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / whole))
    found = {"preset": preset, "row": row, "batch": batch, "checkpointing": checkpoint}
    try:
        one = steps(args, preset, row, batch, 1024, checkpoint)
        if gpu:  # what making the model took does not count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        one()
        bench.wait(args.device)
    except torch.OutOfMemoryError:
        return {**found, "GB": None}
    found["ms"] = 1e3 * (time.perf_counter() - start)
    if gpu:
        found["GB"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def written(args):
    """Tokens a second that a GPT of gpt2-medium's shapes, or the weights, writes: greedily and with
    ten beams."""
    setup = bench.parse(shapes(args, "gpt2-medium", 1, 64))
    model = from_pretrained(args.weights).to(args.device) if args.weights else random_model(setup)
    new, rows = args.sized(8, 64), []
    for prompts, beams in ((1, 1), (32, 1), (128, 1), (16, 10)):
        texts = torch.randint(0, 61, (args.sized(2, prompts), 30)).tolist()
        for _ in range(2):
            start = time.time()
            with pick_device(args.device.type, "auto")[2]:
                if beams == 1:
                    decoding.generate(model.eval(), texts, new, -1)
                else:
                    decoding.beam_search(model.eval(), texts, new, -1, beams, 0.9)
        rows.append({"prompts": len(texts), "beams": beams,
                     "tokens/s": len(texts) * new / (time.time() - start)})
    return rows


def grid(args):
    """All methods: three rates, three seeds at the best, several runs at a time."""
    rows = {"LoRA r 16": "--method lora --rank 16", "LoRA r 16, 3 alpha": "--method lora --rank 16 "
            "--alpha 48", "LoRA r 32, 2 alpha": "--method lora --rank 32 --alpha 32",
            "rsLoRA": "--method rslora --rank 16", **{f"ResLoRA {name}": "--method reslora --rank "
                                                      f"16 --shortcut {name}"
                                                      for name in SHORTCUTS},
            "Delta-LoRA": "--method deltalora --rank 16", "DyLoRA": "--method dylora --rank 16 "
            "--cut 16", "AdaLoRA 16 to 11": "--method adalora --init-rank 16 --rank 11 --lr 3e-3 "
            "6e-3 1.2e-2", "LoHa r 8": "--method loha --rank 8 --lr 3e-3 6e-3 1.2e-2",
            "LoKr": "--method lokr --rank 16 --lr 3e-3 6e-3 1.2e-2",
            "full fine-tuning": "--method full --lr 5e-5 1e-4 2e-4"}
    chosen = args.sized(["LoRA r 16", "ResLoRA block"], list(rows))
    flags = [word for name in chosen for word in ("--row", f"{name}: {rows[name]}")]
    flags += ["--lr", *args.sized(["1e-3"], ["5e-4", "1e-3", "2e-3"]), "--seeds", args.sized(1, 3),
              "--best-lr", "--jobs", args.sized(2, 4), "--title", "E2E: test loss after merging",
              "--", *args.task, "--steps", args.sized(2, 150), "--test-texts", args.sized(16, 1000),
              "--device", args.device.type]
    subprocess.run([sys.executable, "compare.py", args.to / "methods-e2e", *map(str, flags)],
                   cwd=ROOT, check=True)
    return [{name: row[name] for name in ("row", "lr", "seed", "validation loss", "unmerged loss",
                                          "merged loss")}
            for row in read_csv(args.to / "methods-e2e.csv") if row["best"] == "1"
            and not row.get("diverged")]


# --------------------------------------------------------------------------------------------------
# The plan

def plan(args):
    """{part: {name of a measurement: (function, its arguments)}}"""
    groups = args.sized(["float32 and gpt and step_and", "tokens or logits or seed"],
                        ["step_and", "checkpointed", "compiled", "tokens or logits or seed or "
                         "resumed or card", "learns"])
    few = "lora,reslora input m 1,deltalora"
    memory = [(preset, batch, checkpoint) for preset in ("llama-7b", "gpt2-xl")
              for batch in (1, 4, 16) for checkpoint in (True, False)]
    compares = args.dry or args.weights and args.data
    return {
        "parity": {**{f"tests, {group}": (tests, group) for group in groups},
                   "rounding": (rounding,),
                   **{f"everywhere, {name}": (everywhere, name)
                      for name in args.sized(["reslora middle"], RUNS)}},
        "syncs": {**args.sized({}, {"tests, waits": (tests, "waits")}),
                  **{f"profile, {row}": (profile, row) for row in (*few.split(","), "adalora")}},
        "bench": {
            "gpt2-medium 8 x 512": (benched, "gpt2-medium", 8, 512,
                                    args.sized(few, ",".join(bench.ROWS))),
            "llama-1b 4 x 1024": (benched, "llama-1b", 4, 1024, few),
            "gpt2-medium 8 x 64": (benched, "gpt2-medium", 8, 64, few),
            "gpt2-medium 8 x 64, compiled": (benched, "gpt2-medium", 8, 64, "lora", "--compile"),
            "gpt2-medium 8 x 1024": (benched, "gpt2-medium", 8, 1024, "lora"),
            "roberta-large 8 x 128": (benched, "roberta-large", 8, 128, few)},
        "compile": {name: (compiled, name) for name in args.sized(["lora"], RUNS)},
        "jobs": {f"{jobs} at a time": (several, jobs) for jobs in args.sized((2,), (1, 4, 8))},
        "memory": {f"{preset}, {batch} x 1024{', checkpointing' * checkpoint}":
                   (fits, preset, batch, checkpoint)
                   for preset, batch, checkpoint in args.sized(memory[::6], memory)}
        | {"llama-7b, 4 bits, 1 x 1024, checkpointing": (fits, "llama-7b", 1, True,
                                                         "lora 4 bits")},
        "methods": {"texts": (written,), **({"E2E": (grid,)} if compares else {})}}


def parse(argv):
    parser = Parser("gpu.py", __doc__, files=False)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="(all)")
    add("--weights", type=Path, help="a checkpoint folder")
    add("--data", type=Path, help="a folder of real E2E text, of experiments/e2e_split.py")
    add("--dry", action="store_true", help="at toy size on the CPU, into out/gpu-dry")
    add("--measure", nargs=2, metavar=("PART", "NAME"), help="one measurement, in this process")
    args = parser.parse_args(argv)
    for folder in (args.weights, args.data):
        if folder and not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
    args.device = pick_device("cpu" if args.dry else "cuda", "auto")[0]
    args.card = "dry" if args.dry else bench.machine(args)[1]
    args.to = ROOT / "out/gpu-dry" if args.dry else RESULTS / f"gpu-{args.card}"
    args.sized = lambda toy, real: toy if args.dry else real
    args.weights, bench.STARTS = args.sized(None, args.weights), args.sized(1, bench.STARTS)
    args.task = [*(["--model", args.weights] if args.weights else []),
                 *(["--dataset", "e2e", "--data-dir", args.data] if args.data else [])]
    args.plan = plan(args)
    for part in args.parts:
        if part not in args.plan:
            raise ValueError(f"unknown part {part!r}: choose from {', '.join(args.plan)}")
    args.argv = [word for word in (sys.argv[1:] if argv is None else argv)
                 if word not in args.parts]
    return args


def file_of(args, part, name):
    return args.to / f"{part}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def gpu(args):
    """The parts that were asked for, then the archive and the table."""
    if args.measure:
        part, args.name = args.measure
        function, *arguments = args.plan[part][args.name]
        torch.manual_seed(0)
        write_json(file_of(args, part, args.name),
                   {"part": part, "name": args.name, "torch": torch.__version__, "card": args.card,
                    "found": function(args, *arguments)})
        return
    if args.dry:
        shutil.rmtree(args.to, ignore_errors=True)
    args.to.mkdir(parents=True, exist_ok=True)
    check_writable(args.to)
    if not torch.__version__.startswith("2.13"):
        print(f"note     this is torch {torch.__version__}; the tests of this project "
              "ran with 2.13")
    missing = []
    for part in args.parts or args.plan:
        end = time.time() + 60 * MINUTES
        for name in args.plan[part]:
            if not file_of(args, part, name).exists() and not measured(args, part, name, end):
                missing.append(f"{part}: {name}")
    archive = shutil.make_archive(args.to, "gztar", args.to.parent, args.to.name)
    print_tables(args)
    print(f"everything is in {args.to} and in {archive}")
    if missing:
        raise ValueError(f"{len(missing)} not measured, call again for these: {'; '.join(missing)}")


def measured(args, part, name, end):
    """Measure it in a process of its own; False, with a line, if it failed or the part's time was
    over."""
    left, start = end - time.time(), time.time()
    if left <= 0:
        print(f"{part}: {name}: the {MINUTES} minutes of the part are over", flush=True)
        return False
    log = file_of(args, part, name).with_suffix(".txt")
    with open(log, "w", encoding="utf-8") as said:
        try:
            code = subprocess.run([sys.executable, "-m", "experiments.gpu", *args.argv, "--measure",
                                   part, name], cwd=ROOT, stdout=said, stderr=said,
                                  timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
    last = (log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
    how = f"{time.time() - start:.0f} s" if code == 0 else f"failed ({code}): {last[:200]}"
    print(f"{part}: {name}: {how}", flush=True)
    if code == 0:
        log.unlink()
    return code == 0


def print_tables(args):
    """What was found, as a table for each part, and as one csv a part."""
    for part in args.plan:
        rows = []
        for name in args.plan[part]:
            file = file_of(args, part, name)
            found = json.loads(file.read_text(encoding="utf-8"))["found"] if file.exists() else []
            if isinstance(found, dict) and "steps" in found:
                found = [{key: row[key] for key in ("row", "ms", "peak GB", "of lora", "of peer",
                                                    "of floor")} for row in found["steps"]]
            rows += [{"what": name, **flat(row)}
                     for row in (found if isinstance(found, list) else [found])]
        if rows:
            write_csv(args.to / f"{part}.csv", rows)
        for columns, alike in itertools.groupby(rows, tuple):
            print(f"\n**{part}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
            for row in alike:
                print(f"| {' | '.join(map(cell, row.values()))} |")


def flat(row):
    """{"a": {"b": 1}} -> {"a, b": 1}; a list becomes its text"""
    found = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found.update({f"{key}, {name}": inner for name, inner in value.items()})
        else:
            found[key] = ", ".join(value) if isinstance(value, list) else value
    return found


def cell(value):
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(argv=None):
    return command("gpu.py", parse, gpu, argv)


if __name__ == "__main__":
    main()
