"""Time and memory of a training step with every method, beside transformers + peft and beside the
floor.

    python -m experiments.bench                                    needs nothing
    python -m experiments.bench --preset gpt2-small --peer peft
        beside transformers + peft (the extra [dev])
    python -m experiments.bench --peer peft --e2e FOLDER
        also examples per second on real E2E text

All rows run in one process with the same random weights and the same batch. They take turns, so
that whatever else the machine does slows all of them alike. The tables give medians over the
rounds, and ratios are taken round by round. A step is train.py's own: forward, backward, clipping,
AdamW. The peer runs as it is loaded, with its cache of keys and values on. The floor is the time of
the matrix products that LoRA cannot avoid, measured in the same rounds at their own shapes: forward
and input gradients of all linears (not of the first block's q, k, v), of attention (the causal
half) and of the vocabulary, and the low-rank terms. Reading all weights twice from memory is timed
beside it.
"""
import copy
import functools
import importlib.util
import itertools
import json
import math
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import lora
import qlora
import train
from checkpoints import tokenizers
from checkpoints.files import check_writable, read_json, write
from checkpoints.pretrained import MODELS, ROOT, from_pretrained, save_pretrained
from data.tasks import Write
from evaluation.plots import picture
from methods import METHODS, adapt
from model import GPT, GPTConfig, Llama, LlamaConfig, RoBERTa, RobertaConfig
from run import flags
from run.flags import Parser, command
from run.machine import compiled, pick_device

# name: (config, batch, tokens per text)
PRESETS = {
    "tiny": (GPTConfig(vocab_size=2048, n_positions=256, n_embd=256, n_layer=4, n_head=8), 8, 128),
    "gpt2-small": (GPTConfig(), 8, 256),
    "gpt2-medium": (GPTConfig(n_embd=1024, n_layer=24, n_head=16), 8, 256),
    "roberta-base": (RobertaConfig(), 8, 128),
    "roberta-large": (RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                    intermediate_size=4096), 8, 128),
    "smollm2-135m": (LlamaConfig(), 8, 128),
    # Llama 3.2
    "llama-1b": (LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, rope_theta=500000.0,
                             rope_scaling={
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}), 4, 1024),
    # Llama 2
    "llama-7b": (LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, rope_theta=10000.0,
                             tie_word_embeddings=False), 1, 1024),
}
LABELS = 2
# row: what it changes in the settings
ROWS = {"forward only": None, "lora": {}, "lora qkv": dict(targets="q,k,v"),
        "rslora": dict(method="rslora"),
        **{f"reslora {shortcut} m {m}": dict(method="reslora", shortcut=shortcut, pre_num=m)
           for shortcut in ("input", "block", "middle") for m in (1, 4)},
        "deltalora": dict(method="deltalora", delta_start=0),
        **{name: dict(method=name) for name in ("adalora", "dylora", "loha", "lokr", "full")},
        "lora 4 bits": dict(base_bits=4)}
PEER = "transformers + peft"
E2E_STEPS = 12
STARTS = 3  # of fresh processes
# a fresh process: imports, model from a folder, adapters, one step
FIRST_STEP = {"ours": "import torch; from checkpoints.pretrained import from_pretrained; import "
              "lora, methods, train\nmodel = from_pretrained(folder); lora.apply(model, "
              "lora.LoRALinear, ['q', 'v'], r=16, alpha=16)\nloss = lambda idx: model(idx, idx)[1]",
              PEER: "import torch; from peft import LoraConfig, get_peft_model\nfrom transformers "
              "import AutoModelForCausalLM, logging\nlogging.set_verbosity_error(); "
              "logging.disable_progress_bar()\nmodel = "
              "AutoModelForCausalLM.from_pretrained(folder)\ngpt2 = model.config.model_type == "
              "'gpt2'\nmodel = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, "
              "fan_in_fan_out=gpt2,\n    target_modules=['c_attn'] if gpt2 else ['q_proj', "
              "'v_proj']))\nloss = lambda idx: model(input_ids=idx, labels=idx).loss",}


def parse(argv):
    parser = Parser("bench.py", __doc__, files=False)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"shapes of the model: {', '.join(PRESETS)} (tiny)")
    add("--rows", default=",".join(ROWS),
        type=lambda names: names.split(","), help="which, by commas (all)")
    add("--peer", choices=("peft",), help="measure transformers + peft beside ours")
    add("--e2e", help="folder of real E2E text: examples per second, whatever their lengths")
    add("--rank", type=int, default=16, help="(16)")
    add("--batch-size", type=int, help="texts (by preset)")
    add("--context", type=int, help="tokens per text (by preset)")
    add("--rounds", type=int, default=9, help="measured ones, after a warm-up (9)")
    add("--device", default="auto", help="cpu, cuda (cuda, else cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the arithmetic (as train.py)")
    add("--compile", action="store_true", help="torch.compile our models")
    add("--out", type=Path, help="experiments/results/bench-<machine>.json")
    args = parser.parse_args(argv)
    if args.preset not in PRESETS:
        raise ValueError(f"unknown preset {args.preset!r}: choose from {', '.join(PRESETS)}")
    for name in args.rows:
        if name not in ROWS:
            raise ValueError(f"unknown row {name!r}: choose from {', '.join(ROWS)}")
    if "lora" not in args.rows:
        raise ValueError("--rows needs lora, with which the others are compared")
    config, batch, context = PRESETS[args.preset]
    args.config, args.causal = config, config.model_type != "roberta"
    args.batch_size, args.context = args.batch_size or batch, args.context or context
    limits = ("rounds", 1, 1000), ("batch_size", 1, 4096), ("context", 4,
                                                            config.context), ("rank", 1, 256)
    for name, low, high in limits:
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not in "
                             f"{low}..{high}")
    if args.e2e and config.model_type != "gpt2":
        raise ValueError(f"--e2e is for a GPT-2, not for {args.preset}: the others' shapes come "
                         "without a tokenizer")
    if args.peer and not all(map(importlib.util.find_spec, ("transformers", "peft"))):
        raise ValueError('--peer peft needs transformers and peft: pip install -e ".[dev]"')
    if args.e2e:
        data.load("e2e", args.e2e)  # what cannot be read is said before anything is measured
    args.device, args.dtype, args.amp = pick_device(args.device, args.dtype)
    if args.device.type == "mps":
        raise ValueError("--device mps: only cpu and cuda are timed")
    args.machine, slug = machine(args)
    args.out = args.out or ROOT / f"experiments/results/bench-{slug}.json"
    args.argv = sys.argv[1:] if argv is None else argv
    # what train.py's step and optimizer read
    vars(args).update(lr=1e-3, optimizer="adamw", weight_decay=0.01, clip=1.0, label_smoothing=0.0)
    return args


def machine(args):
    """("AMD EPYC, 2 threads", "amd-epyc-2-threads")"""
    if args.device.type == "cuda":
        name = torch.cuda.get_device_name(args.device)
    else:
        info = Path("/proc/cpuinfo")
        match = re.search(r"model name\s*: (.+)",
                          info.read_text(encoding="utf-8")) if info.exists() else None
        name = (f"{match[1].strip() if match else platform.machine()}, {torch.get_num_threads()} "
                "threads")
    return name, re.sub(r"\W+", "-", name.lower()).strip("-")


def wait(device):
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------
# What is measured: each row is a function without arguments

def batch_of(args):
    """(idx, targets) as our models take them: a causal model predicts every next token, a RoBERTa
    the class."""
    idx = torch.randint(4, args.config.vocab_size, (args.batch_size, args.context))
    if args.causal:
        return idx, torch.cat([idx[:, 1:], torch.full_like(idx[:, :1], -100)], 1)
    return idx, torch.randint(0, LABELS, (args.batch_size,))


def adapted(base, change, args):
    """(model, class, layers): a copy of the base with one row's adapters. What no row changes is
    shared by all."""
    settings = {"method": "lora", "rank": args.rank, "alpha": 16.0, "dropout": 0.0,
                "targets": "q,v", "rs": False}
    settings.update(change)
    method = METHODS[settings["method"]]
    flags = {name: spec.get("default") for name, spec in method.flags.items()}
    flags = {name: value(10**6, 10**5) if callable(value) else value
             for name, value in flags.items()}
    moves = method.trains_base or method.adapter.moves_weight
    model = copy.deepcopy(base, {} if moves
                          else {id(p): p for p in base.parameters()}).requires_grad_(moves)
    model = model.float() if method.trains_base else model  # as train.py: what trains is fp32
    if settings.get("base_bits"):
        qlora.quantise(model.h)
    if model.classifier and not moves:
        model.classifier = copy.deepcopy(base.classifier, {})
    return model, *adapt(model, {**flags, **settings})


def our_step(model, adapter, layers, args):
    """(one optimizer step of train.py on given batches, its optimizer)"""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(model, args)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == "float16")
    forward = compiled(model) if args.compile else model
    step = 0
    adapter.begin(layers, 10**6)

    def one(batches):
        nonlocal step
        step += 1
        train.one_step(forward, params, optimizer, scaler, adapter, layers, batches, step, args)
    model.train()
    return one, optimizer


def their_step(folder, args):
    """The same for transformers + peft, as their users write it; dropout off, as ours has none."""
    import transformers
    from peft import LoraConfig, get_peft_model
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # its own, of its own code
    if args.causal:
        gpt2 = args.config.model_type == "gpt2"
        off = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0) if gpt2 else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **off)
        lora_config = LoraConfig(r=args.rank, lora_alpha=16, fan_in_fan_out=gpt2,
                                 target_modules=["c_attn"] if gpt2 else ["q_proj", "v_proj"])
    else:
        off = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        model = transformers.RobertaForSequenceClassification.from_pretrained(folder, dtype="auto",
                                                                              **off)
        lora_config = LoraConfig(r=args.rank, lora_alpha=16, target_modules=["query", "value"],
                                 task_type="SEQ_CLS")
    model = get_peft_model(model, lora_config).to(args.device).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(model, args)

    def one(given):
        with args.amp:
            loss = model(**given).loss
        loss.backward()
        nn.utils.clip_grad_norm_(params, args.clip)
        optimizer.step()
        optimizer.zero_grad()
    return one, optimizer, model


def floor(args):
    """[(how often, (m, k), (k, n))] of the matrix products that a step of LoRA on q and v cannot
    avoid; attention's are batches of them."""
    c, r, B, T = args.config, args.rank, args.batch_size, args.context
    C, L, heads, inner, hs = c.width, c.n_layer, c.n_head, c.inner, c.head_dim
    Q, V = heads * hs, c.n_kv_head * hs  # the outputs of q, and of k and v
    N, half = B * T, 0.5 if args.causal else 1  # a GPT's tokens look at half of the others
    gates = isinstance(c, LlamaConfig)
    # forward, and the gradients of the inputs, which the first q, k, v have no use for
    often = [(2 * L - 1, (N, C), (C, Q)), (4 * L - 2, (N, C), (C, V)), (2 * L, (N, Q), (Q, C)),
             ((2 + 2 * gates) * L, (N, C), (C, inner)), (2 * L, (N, inner), (inner, C))]
    # the six low-rank terms of q, of v: u = A x, B u, and the gradients of u, of x, of A and of B
    for out in (Q, V):
        often += [(L, (N, C), (C, r)), (L, (N, r), (r, out)), (L, (N, out), (out, r)),
                  (L - 1, (N, r), (r, C)), (L, (r, N), (N, C)), (L, (out, N), (N, r))]
    # scores and their gradient's; weighted values and the gradients of q, k, v, but for the first k
    often += [(half * 2 * L, (B * heads, T, hs), (B * heads, hs, T)),
              (half * (4 * L - 1), (B * heads, T, T), (B * heads, T, hs))]
    if args.causal:
        asked = B * (T - 1)  # the last tokens have no next one
        often += [(1, (asked, C), (C, c.vocab_size)), (1, (asked, c.vocab_size), (c.vocab_size, C))]
    return often


def gflop(args):
    return sum(often * 2 * math.prod(a) * b[-1] for often, a, b in floor(args)) / 1e9


def floor_timers(base, args):
    """{row: a function that returns its seconds}: each shape of `floor`, timed up to four times and
    counted as often as the step has it; and all weights read twice. A GPU would wait for the CPU
    between small products, so it gets 32 of them as one graph. There attention is that of torch's
    kernel, whose scores never leave the chip."""
    gpu = args.device.type == "cuda"
    like = dict(dtype=getattr(torch, args.dtype), device=args.device)
    # (how often a step has it, how often it is timed, the function that does it so often)
    work = []
    for often, a, b in floor(args):
        if not gpu or len(a) == 2:
            a, out = torch.randn(a, **like), torch.empty(*a[:-1], b[-1], **like)
            b = torch.randn(*b[:-2], b[-1], b[-2], **like).transpose(-1, -2)
            times = 32 if gpu else min(4, math.ceil(often))
            multiply = functools.partial(repeat, times,
                                         functools.partial(torch.matmul, a, b, out=out))
            work.append((often, times, as_graph(multiply) if gpu else multiply))
    if gpu:
        work.append((args.config.n_layer, 4,
                     as_graph(functools.partial(repeat, 4, attention(args, like)))))
    weights = [p.detach().to(like["dtype"]) for p in base.parameters()]

    def total():
        seconds = 0.0
        for often, times, function in work:
            wait(args.device)
            start = time.perf_counter()
            function()
            wait(args.device)
            seconds += often / times * (time.perf_counter() - start)
        return seconds

    def read():
        wait(args.device)
        start = time.perf_counter()
        for w in (*weights, *weights):
            w.sum()
        wait(args.device)
        return time.perf_counter() - start
    return {"floor": total, "weights": read}


def repeat(times, function):
    for _ in range(times):
        function()


def attention(args, like):
    """A function: forward and backward of one block's attention, by torch's kernel."""
    c, shape = args.config, (args.batch_size, args.context, args.config.head_dim)
    q, k, v, g = (torch.randn(shape[0], heads, *shape[1:], **like, requires_grad=True)
                  for heads in (c.n_head, c.n_kv_head, c.n_kv_head, c.n_head))

    def run():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=args.causal,
                                           enable_gqa=c.n_kv_head < c.n_head)
        torch.autograd.grad(y, (q, k, v), g)
    return run


def as_graph(function):
    """The same work as a CUDA graph: one launch for all of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls allocate what a capture must not
        repeat(3, function)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak(step, model, optimizer, args):
    """Bytes at the highest point of a step: weights, optimizer, and what the step adds. (of
    tensors, and on a GPU of what is reserved for them, else None)"""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *(
        t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)))}
    standing = sum(t.nbytes for t in tensors.values())
    if args.device.type == "cuda":
        wait(args.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(args.device), torch.cuda.memory_reserved(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        wait(args.device)
        return (standing + torch.cuda.max_memory_allocated(args.device) - before[0],
                standing + torch.cuda.max_memory_reserved(args.device) - before[1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        step()
    now = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return standing + highest, None


# --------------------------------------------------------------------------------------------------
# Measuring

def take_turns(rows, args, label, other={}):  # noqa: B006  (it is only read)
    """{row: [seconds of each round]}; `other` are functions that return their own seconds."""
    seconds = {name: [] for name in (*rows, *other)}
    warm_up = 3 if args.compile or args.device.type == "cuda" else 1
    for number in tqdm(range(warm_up + args.rounds), desc=label, unit="round", disable=None):
        # nobody always has the same neighbour
        for name in random.Random(number).sample(list(seconds), len(seconds)):
            if name in rows:
                wait(args.device)
                start = time.perf_counter()
                rows[name]()
                wait(args.device)
                seconds[name].append(time.perf_counter() - start)
            else:
                seconds[name].append(other[name]())
        if number == warm_up - 1:
            seconds = {name: [] for name in seconds}
    return seconds


def ratio(a, b):
    """Median of a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def steps(base, args, folder):
    """[{row, ms, tokens per second, peak memory, ratios, share of the floor}]"""
    idx, targets = batch_of(args)
    rows, measured = {}, {}
    for name in args.rows:
        if ROWS[name] is None:
            def forward(model=base):
                with torch.no_grad(), args.amp:
                    model(idx.to(args.device), targets)
            rows[name] = forward
            continue
        model, adapter, layers = adapted(base, ROWS[name], args)
        one, optimizer = our_step(model, adapter, layers, args)
        rows[name] = lambda one=one: one([(idx, targets, 1.0)])
        measured[name] = model, optimizer
    if args.peer:
        one, optimizer, model = their_step(folder, args)
        # transformers shifts a language model's labels itself
        given = dict(input_ids=idx, labels=idx if args.causal else targets)
        given = {key: t.to(args.device) for key, t in given.items()}
        rows[PEER] = lambda: one(given)
        measured[PEER] = model, optimizer
    seconds = take_turns(rows, args, "steps", floor_timers(base, args))
    table = []
    for name in seconds:
        median = statistics.median(seconds[name])
        trains = name in measured
        tensors, reserved = peak(rows[name], *measured[name], args) if trains else (None, None)
        # full fine-tuning computes more than LoRA's floor
        table.append({"row": name, "ms": 1e3 * median,
                      "tokens/s": args.batch_size * args.context / median if trains else None,
                      "peak GB": tensors and tensors / 1e9,
                      **({"reserved GB": reserved / 1e9} if reserved else {}),
                      "trained": sum(p.numel() for p in measured[name][0].parameters()
                                     if p.requires_grad) if trains else None,
                      "of lora": ratio(seconds[name], seconds["lora"]),
                      "of peer": ratio(seconds[name], seconds[PEER]) if args.peer else None,
                      "of floor": ratio(seconds["floor"], seconds[name]) if trains and name
                      != "full" else None,})
    return table


def inference(base, args):
    """{row: (ms of a forward of one text without gradients, ratio to the base)}"""
    idx = batch_of(args)[0][:1].to(args.device)
    model, _, layers = adapted(base, {}, args)
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.01)
    # merging writes into the weights, which are shared
    models = {"base": base, "unmerged": model, "merged": lora.merge(copy.deepcopy(model))}
    rows = {name: lambda m=m: m(idx) for name, m in models.items()}
    for m in models.values():
        m.eval()
    with torch.no_grad(), args.amp:
        seconds = take_turns(rows, args, "inference")
    return {name: (1e3 * statistics.median(s), ratio(s, seconds["base"]))
            for name, s in seconds.items()}


def end_to_end(base, args, folder):
    """{"ours" or the peer: examples per second} over the same texts of real E2E: in our batches as
    train.py composes them, in theirs shuffled; both are padded to the longest of a batch."""
    tokenizer = tokenizers.for_model(MODELS["tiny-gpt"] if args.preset == "tiny" else folder,
                                     args.config)
    task = Write(tokenizer, min(args.config.context, 256))
    examples, _ = task.encode(data.load("e2e", args.e2e)["train"])
    size = flags.DEFAULTS["e2e"]["batch_size"]
    number = min(E2E_STEPS, len(examples) // size)
    if not number:
        raise ValueError(f"--e2e {args.e2e} has {len(examples)} texts to train on, a batch is of "
                         f"{size}")
    examples = random.Random(0).sample(examples, number * size)
    loop = SimpleNamespace(**{**vars(args), "batch_size": size, "rounds": number})
    model, adapter, layers = adapted(base, {}, args)
    one, _ = our_step(model, adapter, layers, args)
    ours = itertools.cycle(itertools.islice(data.step_batches(examples, task, size), number))
    rows = {"ours": lambda: one(next(ours))}
    if args.peer:
        theirs, _, _ = their_step(folder, args)
        # shuffled above
        order = itertools.cycle([examples[i:i + size] for i in range(0, len(examples), size)])

        def their_one():
            batch = next(order)
            longest = max(len(ids) for ids, _ in batch)
            ids, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch),
                                                                                        longest)
            labels = torch.full_like(ids, -100)
            for i, (text, start) in enumerate(batch):
                ids[i, :len(text)] = torch.tensor(text)
                mask[i, :len(text)] = 1
                labels[i, start:len(text)] = torch.tensor(text[start:])
            theirs({key: t.to(args.device) for key, t in
                    dict(input_ids=ids, attention_mask=mask, labels=labels).items()})
        rows[PEER] = their_one
    # a round is a batch, and all batches are as many as the rounds: every text once; so the mean,
    # not the median
    return {name: size / statistics.mean(s)
            for name, s in take_turns(rows, loop, "real e2e").items()}


def first_steps(args, folder):
    """{"ours" or the peer: seconds from the start of a Python process to the end of its first
    step}, medians."""
    found = {}
    for name, code in FIRST_STEP.items():
        if name == "ours" or args.peer:
            code = (f"folder, device = {str(folder)!r}, "
                    f"{str(args.device)!r}\n{code}\nmodel.to(device)\nidx = torch.randint(0, 60, "
                    "(2, 8)).to(device)\noptimizer = torch.optim.AdamW([p for p in "
                    "model.parameters() if p.requires_grad])\nloss(idx).backward(); "
                    "optimizer.step()")
            found[name] = []
            for _ in range(STARTS):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in found.items()}


# --------------------------------------------------------------------------------------------------
# The report

def print_table(found):
    floor_ms = next(row["ms"] for row in found["steps"] if row["row"] == "floor")
    print(f"\nfloor: {found['GFLOP']:,.1f} GFLOP at {found['GFLOP'] / floor_ms * 1e3:,.0f} GFLOP/s")
    columns = {"ms": "{:,.1f}", "tokens/s": "{:,.0f}", "peak GB": "{:.2f}", "reserved GB": "{:.2f}",
               "trained": "{:,}", "of lora": "{:.2f}", "of peer": "{:.2f}", "of floor": "{:.2f}"}
    columns = {name: form for name, form in columns.items()
               if any(row.get(name) for row in found["steps"])}
    print(f"{'':22}" + "".join(f"{name:>12}" for name in columns))
    for row in found["steps"]:
        cells = ("" if row.get(name) is None else form.format(row[name])
                 for name, form in columns.items())
        print(f"{row['row']:22}" + "".join(f"{cell:>12}" for cell in cells))
    for name, (ms, of) in found["inference"].items():
        print(f"inference {name:12} {ms:12.1f} ms{of:11.2f} of the base")
    for what, unit in (("e2e", "examples/s on real E2E"), ("first step", "s to the first step")):
        for name, value in found.get(what, {}).items():
            print(f"{name:22}{value:12.2f} {unit}")


def draw(path, title, table):
    rows = [row for row in table if row["tokens/s"]][::-1]
    with picture(path, figsize=(7, 0.3 * len(rows) + 1.2)) as (_, axis):
        colours = ["0.55" if row["row"] == PEER else "C0" if row["row"] == "lora" else "#9ecae1"
                   for row in rows]
        bars = axis.barh([row["row"] for row in rows], [row["ms"] for row in rows], color=colours)
        axis.bar_label(bars, [f"{row['ms']:,.0f}" for row in rows], padding=3)
        floor_ms = next(row["ms"] for row in table if row["row"] == "floor")
        axis.axvline(floor_ms, color="k", ls="--", lw=1)
        axis.annotate("LoRA's matrix products alone", (floor_ms, len(rows) - 0.4), xytext=(3, 0),
                      textcoords="offset points", fontsize=8, annotation_clip=False)
        axis.set(xlabel="ms a step (median)", title=title,
                 xlim=(0, 1.1 * max(row["ms"] for row in rows)), ylim=(-0.6, len(rows) + 0.1))
        axis.title.set_size(10)
        axis.spines[["top", "right"]].set_visible(False)


def bench(args):
    """Everything for one preset. The file keeps one entry for each preset, a compiled one apart."""
    torch.manual_seed(0)
    kept = read_json(args.out) if args.out.exists() else {}
    check_writable(args.out.parent)
    print(f"{args.preset}: {args.batch_size} x {args.context} tokens, r {args.rank}, {args.dtype}, "
          f"{args.machine}")
    kind = {GPTConfig: GPT, LlamaConfig: Llama, RobertaConfig: RoBERTa}[type(args.config)]
    with args.device:
        base = kind(args.config, *[LABELS] * (kind is RoBERTa))
    said = shlex.join("FOLDER" if word == args.e2e else word for word in args.argv)
    found = {"command": f"python -m experiments.bench {said}", "torch": torch.__version__,
             "machine": args.machine, "batch": [args.batch_size, args.context], "rank": args.rank,
             "dtype": args.dtype, "rounds": args.rounds, "GFLOP": gflop(args)}
    with tempfile.TemporaryDirectory() as folder:
        # ours and the peer's: a frozen base is in the type of the arithmetic
        dtype = getattr(torch, args.dtype)
        save_pretrained(base, folder, dtype)
        del base
        base = from_pretrained(folder, dtype=dtype).requires_grad_(False).to(args.device)
        found["steps"] = steps(base, args, folder)
        found["inference"] = inference(base, args)
        if args.causal:
            found["first step"] = first_steps(args, folder)
        if args.e2e:
            found["e2e"] = end_to_end(base, args, folder)
    print_table(found)
    name = args.preset + " compiled" * args.compile
    write(args.out, lambda part: part.write_text(json.dumps({**kept, name: found}, indent=1) + "\n",
                                                 encoding="utf-8"))
    draw(args.out.with_name(f"{args.out.stem}-{name.replace(' ', '-')}.png"),
         f"{name}, {args.batch_size} x {args.context} tokens, r {args.rank}\n{args.machine}",
         found["steps"])
    print(f"everything is in {args.out}")


def main(argv=None):
    return command("bench.py", parse, bench, argv)


if __name__ == "__main__":
    main()
