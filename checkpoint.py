"""What a run leaves behind and how it is read back. Files appear by rename; only JSON and safetensors are ever read.

    adapter_config.json, adapter_model.safetensors    the adapter as an ordinary LoRA, as PEFT loads it
    resume.safetensors                                everything that training changes, to go on from there
    result.json, log.csv, curve.png, merged/          for people, and for `transformers`
    ranks.png                                         of a method that moves ranks between layers
"""
import contextlib
import csv
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import bpe
from lora import LoRALinear, replace
from methods import adapt
from model import (
    GPT,
    GPT2_NAMES,
    RoBERTa,
    check_keys,
    read_json,
    read_safetensors,
    roberta_name,
    write,
)

TOKENIZERS = bpe.FILE, "vocab.json", "merges.txt"  # the last two are what `transformers` reads
STATE = "resume.safetensors", "log.csv"
RESULTS = ("result.json", "curve.png", "ranks.png", "adapter_config.json", "adapter_model.safetensors",
           *(f"predictions-{split}.jsonl" for split in ("train", "validation", "test")),
           *(f"merged/{name}" for name in ("config.json", "model.safetensors", *TOKENIZERS)))
PREFIX = "base_model.model."  # PEFT's, before every key
# The first value is also what an absent key means. With others the adapter is no plain LoRA: PEFT's pissa, olora, corda
# and the like change W itself, again at every loading.
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "alora_invocation_tokens": (None,),
         "layer_replication": (None,), "arrow_config": (None,),
         "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}


def prepare(folder):
    """Make a run folder and see that it can be written to, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"--out {folder} cannot be written to: {e.strerror or e}") from None


def clear(folder, names):
    """Remove what an earlier run, or an earlier merge, left in a run folder."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if (folder / "merged").is_dir() and not any((folder / "merged").iterdir()):
        (folder / "merged").rmdir()


def fingerprint(content):
    """16 hex digits that change with a file's bytes, or with the repr of anything else."""
    if isinstance(content, Path):
        with open(content, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def fingerprint_adapter(folder):
    """The same of an adapter folder: its weights and its config, which holds the scale."""
    return "-".join(fingerprint(Path(folder) / f"adapter_{name}") for name in ("config.json", "model.safetensors"))


def write_json(path, content):
    write(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def write_log(path, rows):
    """[{column: value}] -> csv; every row has the first one's columns."""
    def write_to(part):
        with open(part, "w", newline="") as f:
            table = csv.DictWriter(f, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    write(path, write_to)


@contextlib.contextmanager
def picture(path, rows=1, columns=1, **how):
    """(figure, axes) of matplotlib to draw on; what is drawn is written to a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, layout="constrained", **how)
    yield figure, axes
    write(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    plt.close(figure)


def draw_curve(path, rows, title, metric="loss"):
    """Training and validation loss against steps, and the task's metric if it has another, as a picture."""
    panels = ["loss"] if metric == "loss" else ["loss", metric]
    with picture(path, 1, len(panels), figsize=(2 + 4 * len(panels), 3.6), squeeze=False) as (figure, axes):
        for axis, name in zip(axes[0], panels, strict=True):
            for column, style in ((f"train_{name}", dict(color="0.6", label="training")),
                                  (f"val_{name}", dict(color="C0", marker="o", ms=3, label="validation"))):
                points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), **style)
            axis.set(xlabel="step", ylabel="loss (nats)" if name == "loss" else name)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        figure.suptitle(title)


def draw_ranks(path, rows, names, title):
    """The rank of every layer against steps, as a picture with the last ranks written out; `names`: [layer]."""
    ranks = [list(map(int, row["ranks"].split())) for row in rows]  # a list of layers for each row
    with picture(path, figsize=(6, 1.2 + 0.22 * len(names))) as (figure, axis):
        steps = [0, *(row["step"] for row in rows)]
        mesh = axis.pcolormesh(steps, range(len(names) + 1), list(zip(*ranks, strict=True)), vmin=0, cmap="viridis")
        axis.set(xlabel="step", title=title)
        axis.set_yticks([n + 0.5 for n in range(len(names))],
                        [f"{name.removeprefix('h.')}: {last}" for name, last in zip(names, ranks[-1], strict=True)])
        axis.invert_yaxis()
        figure.colorbar(mesh, label="rank")


# ---------------------------------------------------------------------------------------------------------------------
# The adapter, as PEFT reads it

def peft_module(model, name):
    """Our "h.0.attn.q" -> its module in `transformers`, and which third of its output that is (None: all of it)."""
    if isinstance(model, RoBERTa):
        return roberta_name(f"{name}.weight").removesuffix(".weight"), None
    block, leaf = name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:])
    if leaf in ("attn.q", "attn.k", "attn.v"):
        return f"transformer.{block}.attn.c_attn", "qkv".index(leaf[-1])
    return f"transformer.{block}.{GPT2_NAMES[leaf]}", None


def peft_lora(model):
    """(tensors, config) of the plain LoRA that the adapters amount to. GPT-2's q, k and v become one c_attn: their A
    stacked, their B in blocks,

        c_attn:  B' A' = [B_q 0 ; 0 0 ; 0 B_v] [A_q ; A_v]        for q and v, of rank 2 r

    PEFT's scale is lora_alpha / rank, per module, so lora_alpha = scaling * rank says any scale exactly; use_rslora
    stays false, and loaders that do not know that flag read the adapter right.
    """
    modules, scaling = {}, None
    for name, layer in adapters(model):
        A, B = no_wider(*(t.detach().float() for t in layer.as_lora()))
        if not len(A):
            continue  # AdaLoRA left this layer no rank
        scaling = layer.scaling  # one r and alpha for all layers of a run
        module, third = peft_module(model, name)
        if third is not None:
            rows = B.new_zeros(3 * len(B), B.shape[1])
            rows[third * len(B):(third + 1) * len(B)] = B
            B = rows
        if module in modules:
            A, B = torch.cat([modules[module][0], A]), torch.cat([modules[module][1], B], 1)
        modules[module] = A, B
    if not modules:
        raise ValueError("there is no adapter to write: no layer has a rank")
    r = Counter(len(A) for A, _ in modules.values()).most_common(1)[0][0]
    others = {module: len(A) for module, (A, _) in modules.items() if len(A) != r}
    tensors = {f"{module}.lora_{factor}.weight": t for module, pair in modules.items()
               for factor, t in zip("AB", pair, strict=True)}
    return tensors, {
        "peft_type": "LORA", "r": r, "lora_alpha": scaling * r, "use_rslora": False,
        "rank_pattern": others, "alpha_pattern": {module: scaling * rank for module, rank in others.items()},
        "target_modules": targets_of(model, modules), "fan_in_fan_out": isinstance(model, GPT), "bias": "none"}


def peft_own(model):
    """The same for LoHa and LoKr, which PEFT has under the same names of factors, for nn.Linear only: not for GPT-2."""
    tensors, modules = {}, set()
    for name, layer in adapters(model):
        module, _ = peft_module(model, name)
        modules.add(module)
        factors = {key: p.detach() for key, p in layer.named_parameters() if key not in ("weight", "bias")}
        tensors.update({f"{module}.{key}": p for key, p in factors.items()})
    return tensors, {"peft_type": layer.peft_type, "r": layer.r, "alpha": layer.scaling * layer.r,
                     "target_modules": targets_of(model, modules)}


def adapters(model):
    """[(name, layer)]"""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def no_wider(A, B):
    """(A, B) with the same product and a rank of at most min(d_in, d_out)."""
    d_in, d_out = A.shape[1], len(B)
    if len(A) <= min(d_in, d_out):
        return A, B
    return (torch.eye(d_in), (B @ A).cpu()) if d_in <= d_out else ((B @ A).cpu(), torch.eye(d_out))


def targets_of(model, modules):
    """PEFT's target_modules: the ends of the names ("attn.c_attn"), or the whole names where ends mean other modules
    too ("output.dense" is also the end of "attention.output.dense")."""
    ends = sorted({re.sub(r"^.*?\.\d+\.", "", module) for module in modules})
    known = {peft_module(model, name)[0] for name, m in model.named_modules()
             if isinstance(m, (LoRALinear, torch.nn.Linear)) and name.startswith("h.")}
    meant = {module for module in known if any(module.endswith("." + end) for end in ends)}
    return ends if meant == set(modules) else sorted(modules)


def save_adapter(folder, model, base, dropout=0.0):
    """Write adapter_config.json and adapter_model.safetensors, with a classifier's head in it. Call it after
    `calibrate` and before `merge`. ValueError for a value that is not finite."""
    kinds = {layer.peft_type for _, layer in adapters(model)}
    with torch.no_grad():
        tensors, config = (peft_lora if kinds == {"LORA"} or isinstance(model, GPT) else peft_own)(model)
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"the adapter holds NaN or inf in {name}: it is not written")
    head = model.classifier
    if config["peft_type"] == "LORA":
        config["lora_dropout"] = dropout
    config.update({"task_type": "SEQ_CLS" if head else "CAUSAL_LM" if isinstance(model, GPT) else None,
                   "base_model_name_or_path": str(base), "inference_mode": True,
                   "modules_to_save": ["classifier", "score"] if head else None})
    if head:
        tensors.update({f"classifier.{key}": t.detach() for key, t in head.state_dict().items()})
    tensors = {PREFIX + name: t.float().cpu().contiguous() for name, t in tensors.items()}
    write(folder / "adapter_model.safetensors", lambda part: save_file(tensors, part, {"format": "pt"}))
    write_json(folder / "adapter_config.json", config)


def adapt_as(model, settings):
    """`methods.adapt`, or with init_from in the settings the adapter of that folder."""
    if settings.get("init_from"):
        return LoRALinear, load_adapter(model, settings["init_from"], settings["dropout"])
    return adapt(model, settings)


def read_adapter(folder):
    """(config, {name: tensor} without PEFT's prefix) of an adapter folder; ValueError for what is no plain LoRA."""
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for key, good in PLAIN.items():
        if config.get(key, good[0]) not in good:
            raise ValueError(f"{folder}: {key} {config[key]!r} is not supported, only {' or '.join(map(repr, good))}")
    tensors = read_safetensors(path)
    if not all(key.startswith(PREFIX) for key in tensors):
        raise ValueError(f"{path}: {min(tensors)} does not begin with {PREFIX}")
    tensors = {key.removeprefix(PREFIX): t.float() for key, t in tensors.items()}
    for key, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or inf")
        if "lora_" in key and (t.dim() != 2 or not t.numel()):
            raise ValueError(f"{path}: {key} has shape {tuple(t.shape)}, which is no matrix")
    return config, tensors


def load_adapter(model, folder, dropout=0.0):
    """Put an adapter folder, ours or PEFT's, into a model that has none: plain LoRA layers, and a head if there is one.

    Returns the layers. A c_attn of GPT-2 becomes an adapter on each of q, k and v, with the rows of A that its third of
    B uses. A linear that the file does not mention gets none; its dropout is not taken over. Raises ValueError, and
    leaves the model as it was, for half an adapter, unexpected or mis-shaped tensors, and what is no plain LoRA.
    """
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    config, tensors = read_adapter(folder)
    head = {key.removeprefix("classifier."): tensors.pop(key) for key in list(tensors) if key.startswith("classifier.")}
    if head or model.classifier:
        check_keys(head, model.classifier.state_dict() if model.classifier else {}, f"{path}, head,")

    linears = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name.startswith("h.")}
    places, wanted = {}, {}
    for name, linear in linears.items():
        module, third = peft_module(model, name)
        if f"{module}.lora_A.weight" in tensors:
            places[name] = module, third
            rank = len(tensors[f"{module}.lora_A.weight"])
            wanted[f"{module}.lora_A.weight"] = torch.empty(rank, linear.in_features, device="meta")
            d_out = linear.out_features * (1 if third is None else 3)
            wanted[f"{module}.lora_B.weight"] = torch.empty(d_out, rank, device="meta")
    check_keys(tensors, wanted, path)
    if not places:
        raise ValueError(f"{path} holds no adapter for this model")
    layers = {}
    for name, (module, third) in places.items():
        linear, A, B = linears[name], tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        scaling = peft_scaling(config, module, len(A), folder)
        if third is not None:
            trained, B = B.any(), B.chunk(3)[third]
            used = B.any(0) if trained else slice(None)  # not what peft_lora padded with zeros
            A, B = A[used], B[:, used]
        if len(A):
            A, B = no_wider(A, B)
            layers[name] = LoRALinear(linear, len(A), scaling * len(A), dropout).train(linear.training)
            with torch.no_grad():
                layers[name].lora_A.copy_(A)
                layers[name].lora_B.copy_(B)
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace(model, name, layer)
    if head:
        model.classifier.load_state_dict(head)
        model.classifier.requires_grad_(True)
    return list(layers.values())


def peft_scaling(config, module, rank, where):
    """PEFT's lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. The first pattern that matches the end of the
    module's name, as a regular expression, goes before either."""
    def of(name, default):
        try:
            found = [value for key, value in (config.get(f"{name}_pattern") or {}).items()
                     if re.fullmatch(rf"(.*\.)?({key})", module)]
        except (re.error, AttributeError) as e:
            raise ValueError(f"{where}: {name}_pattern {config[f'{name}_pattern']!r} is none: {e}") from None
        return found[0] if found else config.get({"rank": "r", "alpha": "lora_alpha"}[name], default)
    r, alpha = of("rank", 8), of("alpha", 8)
    if r != rank or type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e30:
        raise ValueError(f"{where}: {module} has rank {rank}, its config says r {r!r} and lora_alpha {alpha!r}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def save_merged(folder, model, source):
    """The merged model as a checkpoint folder of its own, with the tokenizer of the folder it came from."""
    model.save_pretrained(folder)
    for name in TOKENIZERS:
        if (Path(source) / name).exists():
            write(folder / name, lambda part, name=name: shutil.copyfile(Path(source) / name, part))


# ---------------------------------------------------------------------------------------------------------------------
# The state to resume from: one file, so that it is never half of one step and half of another

def changing(model):
    """{name: tensor} of all that training changes: what has gradients, buffers, and weights that a method moves."""
    moved = {f"{name}.weight" for name, m in model.named_modules() if getattr(m, "moves_weight", False)}
    return {name: t for name, t in model.state_dict(keep_vars=True).items()
            if t.requires_grad or name in moved or not isinstance(t, torch.nn.Parameter)}


def best_step(rows, first=1):
    """The step with the best validation: of the metric, if there is one beside the loss; of equals the lowest loss.
    From the step `first` on, if the run has come that far, else the last."""
    metric = next((name for name in rows[0] if name.startswith("val_") and name != "val_loss"), None)
    validated = [row for row in rows if row["val_loss"] is not None]
    validated = [row for row in validated if row["step"] >= first] or validated[-1:]
    return max(validated, key=lambda row: (row[metric] if metric else 0, -row["val_loss"]))["step"]


def save_state(path, model, optimizer, step, settings, rows, best=None, first=1):
    """Weights, optimizer, random state, the weights `best` of an earlier step if they were better, and as metadata the
    step, the settings and the rows of log.csv."""
    tensors = {f"model.{name}": t for name, t in changing(model).items()}
    if best_step(rows, first) != step:
        tensors.update({f"best.{name}": t for name, t in best.items()})
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{key}": t for key, t in state.items() if t is not None})
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"step": step, "settings": settings, "rows": rows}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    write(path, lambda part: save_file(tensors, part, metadata))


def read_state(path, settings):
    """(tensors, step, rows) of resume.safetensors; ValueError when absent, damaged or of another configuration."""
    if not path.exists():
        raise ValueError(f"there is nothing to resume: {path} does not exist")
    try:
        with safe_open(path, "pt") as f:
            step, before, rows = (json.loads(f.metadata()[key]) for key in ("step", "settings", "rows"))
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        different = [key for key in sorted(settings.keys() | before.keys()) if settings.get(key) != before.get(key)]
        steps = [row["step"] for row in rows]
        if not (type(step) is int and steps[-1] == step and steps == sorted(set(steps)) and steps[0] > 0):
            raise ValueError(f"its step is {step}, those of its log are {steps[-3:]}")
        if not all(row.keys() == rows[0].keys() for row in rows):
            raise ValueError("the rows of its log have different columns")
        best_step(rows), rows[-1]["seconds"] + 0  # fail here if these are not the rows of a log
        for name, t in tensors.items():
            if t.is_floating_point() and not t.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is damaged: {e!r}") from None
    if different:
        key = next((key for key in ("method", "model", "dataset") if key in different), different[0])
        raise ValueError(f"cannot resume {path.parent} with {key} {settings.get(key)}: "
                         f"it began with {before.get(key)}")
    return tensors, step, rows


def load_best(path, model):
    """Put the weights that a run kept, or has so far, into a model made with its settings."""
    tensors = read_safetensors(path)
    kind = "best." if any(key.startswith("best.") for key in tensors) else "model."
    found, wanted = {key.removeprefix(kind): t for key, t in tensors.items() if key.startswith(kind)}, changing(model)
    check_keys(found, wanted, path)
    with torch.no_grad():
        for name, t in wanted.items():
            t.copy_(found[name])


def load_state(path, model, optimizer, settings, first=1):
    """Put a saved state back into a model and an optimizer made with the same settings.

    Returns its step, its rows, and the weights of the best step so far.
    """
    tensors, step, rows = read_state(path, settings)
    wanted = changing(model)
    found, best = ({key.removeprefix(kind): t for key, t in tensors.items() if key.startswith(kind)}
                   for kind in ("model.", "best."))
    if best_step(rows, first) == step:
        best = found
    for weights in (found, best):
        check_keys(weights, wanted, path)
    state = {}
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = t
    # one entry for each parameter and kind: Adam's moments have their parameter's shape
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ()
    shapes = {f"{i}.{kind}": () if kind == "step" else p.shape for i, p in enumerate(params) for kind in kinds}
    check_keys({f"{i}.{kind}": t for i, kept in state.items() for kind, t in kept.items()},
               {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, path)
    kept, now = tensors.get("rng.cpu"), torch.get_rng_state()
    if kept is None or (kept.shape, kept.dtype) != (now.shape, now.dtype):
        raise ValueError(f"{path} lacks rng.cpu, the state of the random numbers, or holds that of another torch")
    with torch.no_grad():
        for name, t in wanted.items():
            t.copy_(found[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return step, rows, best
