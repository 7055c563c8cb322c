"""What a run leaves behind and how it is read back. Files appear by rename; only JSON and safetensors are ever read.

    adapter_config.json, adapter_model.safetensors    the adapter as an ordinary LoRA, as PEFT loads it
    resume.safetensors                                everything that training changes, to go on from there
    result.json, log.csv, curve.png, merged/          for people, and for `transformers`
"""
import csv
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import bpe
from lora import LoRALinear
from model import GPT2_NAMES, check_keys, write


def prepare(folder):
    """Make a run folder and see that it can be written to, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "probe", lambda part: part.write_text(""))
        (folder / "probe").unlink()
    except OSError as e:
        raise ValueError(f"--out {folder} cannot be written to: {e.strerror or e}") from None


def clear(folder):
    """Remove what an earlier run left in a run folder."""
    merged = f"merged/{bpe.FILE}", "merged/config.json", "merged/model.safetensors"
    for name in ("adapter_config.json", "adapter_model.safetensors", "resume.safetensors", "result.json", "log.csv",
                 "curve.png", *merged):
        (folder / name).unlink(missing_ok=True)
    if (folder / "merged").is_dir() and not any((folder / "merged").iterdir()):
        (folder / "merged").rmdir()


def fingerprint(content):
    """16 hex digits that change with a file's bytes, or with the repr of anything else."""
    if isinstance(content, Path):
        with open(content, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


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


def draw_curve(path, rows, title):
    """Training and validation loss against steps, as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for column, style in (("train_loss", dict(color="0.6", label="training")),
                          ("val_loss", dict(color="C0", marker="o", ms=3, label="validation"))):
        points = [(row["step"], row[column]) for row in rows if row[column] is not None]
        axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter, as PEFT reads it

def peft_module(name):
    """Our "h.0.attn.q" -> GPT-2's "h.0.attn.c_attn", and which third of its output that is (None: all of it)."""
    block, leaf = name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:])
    if leaf in ("attn.q", "attn.k", "attn.v"):
        return f"{block}.attn.c_attn", "qkv".index(leaf[-1])
    return f"{block}.{GPT2_NAMES[leaf]}", None


def peft_tensors(model):
    """({GPT-2 module: (A', B')}, scaling). q, k and v become one c_attn: their A stacked, their B in blocks,

        c_attn:  B' A' = [B_q 0 ; 0 0 ; 0 B_v] [A_q ; A_v]        for q and v, of rank 2 r
    """
    modules, scaling = {}, None
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not isinstance(layer, LoRALinear):
                continue
            A, B = (t.detach().float() for t in layer.as_lora())
            if not (A.isfinite().all() and B.isfinite().all()):
                raise ValueError(f"the adapter of {name} holds NaN or inf: it is not written")
            scaling = layer.scaling  # one r and alpha for all layers of a run
            module, third = peft_module(name)
            if third is not None:
                rows = B.new_zeros(3 * len(B), B.shape[1])
                rows[third * len(B):(third + 1) * len(B)] = B
                B = rows
            if module in modules:
                A, B = torch.cat([modules[module][0], A]), torch.cat([modules[module][1], B], 1)
            modules[module] = A, B
    return modules, scaling


def save_adapter(folder, model, base, dropout=0.0):
    """Write adapter_config.json and adapter_model.safetensors. Call it after `calibrate` and before `merge`.

    PEFT's scale is lora_alpha / rank, per module, so lora_alpha = scaling * rank says any scale exactly; use_rslora
    stays false, and loaders that do not know that flag read the adapter right.
    """
    modules, scaling = peft_tensors(model)
    r = Counter(len(A) for A, _ in modules.values()).most_common(1)[0][0]
    others = {module: len(A) for module, (A, _) in modules.items() if len(A) != r}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": r, "lora_alpha": scaling * r, "use_rslora": False, "lora_dropout": dropout,
        "rank_pattern": others, "alpha_pattern": {module: scaling * rank for module, rank in others.items()},
        "target_modules": sorted({module.split(".", 2)[2] for module in modules}),
        "fan_in_fan_out": True, "bias": "none", "modules_to_save": None, "inference_mode": True,
    }
    tensors = {}
    for module, (A, B) in modules.items():
        tensors[f"base_model.model.transformer.{module}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.transformer.{module}.lora_B.weight"] = B.cpu().contiguous()
    write(folder / "adapter_model.safetensors", lambda part: save_file(tensors, part, {"format": "pt"}))
    write_json(folder / "adapter_config.json", config)


def save_merged(folder, model, source):
    """The merged model as a checkpoint folder of its own, with the tokenizer of the folder it came from."""
    model.save_pretrained(folder)
    if (Path(source) / bpe.FILE).exists():
        write(folder / bpe.FILE, lambda part: shutil.copyfile(Path(source) / bpe.FILE, part))


# ---------------------------------------------------------------------------------------------------------------------
# The state to resume from: one file, so that it is never half of one step and half of another

def changing(model):
    """{name: tensor} of all that training changes: what has gradients, buffers, and weights that a method moves."""
    moved = {f"{name}.weight" for name, m in model.named_modules() if getattr(m, "moves_weight", False)}
    return {name: t for name, t in model.state_dict(keep_vars=True).items()
            if t.requires_grad or name in moved or not isinstance(t, torch.nn.Parameter)}


def save_state(path, model, optimizer, step, settings, rows):
    """Weights, optimizer, random state, and as metadata the step, the settings and the rows of log.csv."""
    tensors = {f"model.{name}": t for name, t in changing(model).items()}
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
        if not (isinstance(step, int) and rows[-1]["step"] == step):
            raise ValueError(f"its step is {step}, the last row of its log another")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is damaged: {e!r}") from None
    if different:
        key = different[0]
        raise ValueError(f"cannot resume {path.parent} with {key} {settings.get(key)}: "
                         f"it began with {before.get(key)}")
    return tensors, step, rows


def load_state(path, model, optimizer, settings):
    """Put a saved state back into a model and an optimizer made with the same settings; returns its step and rows."""
    tensors, step, rows = read_state(path, settings)
    found = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    wanted = changing(model)
    check_keys(found, wanted, path)
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
    if "rng.cpu" not in tensors:
        raise ValueError(f"{path} lacks rng.cpu")
    with torch.no_grad():
        for name, t in wanted.items():
            t.copy_(found[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return step, rows
