"""A run folder, and the one file in it to resume from, so that a state is never half of one step
and half of another. The folder holds

    adapter_config.json, adapter_model.safetensors    the adapter as an ordinary LoRA, for PEFT
    resume.safetensors                                everything that training changes
    result.json, log.csv, curve.png, merged/          for people, and for `transformers`
    README.md                                         the card of the adapter, as PEFT has it
    ranks.png                                         of a method that moves ranks between layers
    .written, .again                                  see owner.py

Only JSON and safetensors are ever read back. The identity of a run is what makes it this one and no
other: its settings, with fingerprints of the base and the data. result.json has it as "settings".
"""
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoints import tokenizers
from checkpoints.adapters import fingerprint_adapter, load_adapter
from checkpoints.files import check_keys, fingerprint, read_json, read_safetensors, write, write_csv
from checkpoints.pretrained import MODELS
from checkpoints.weights import fingerprint_weights
from lora import LoRALinear
from methods import adapt
from run.owner import LOG, STATE, RunFolder


def changing(model):
    """{name: tensor} of all that training changes: what has gradients, buffers, and weights that a
    method moves."""
    moved = {f"{name}.weight" for name, m in model.named_modules()
             if getattr(m, "moves_weight", False)}
    return {name: t for name, t in model.state_dict(keep_vars=True).items()
            if t.requires_grad or name in moved or not isinstance(t, torch.nn.Parameter)}


def adapters_of(model, settings):
    """(class, layers): `methods.adapt`, or with init_from the adapter of that folder. settings: a
    dict, of a run or of its result.json."""
    if settings.get("init_from"):
        return LoRALinear, load_adapter(model, settings["init_from"], settings["dropout"])
    return adapt(model, settings)


def identify(settings, source, pairs, processes):
    """The settings of a run as they are written down. source: the base's folder."""
    left_out = "resume", "out", "device", "amp", "base_dtype", "epochs"
    about = {name: value for name, value in vars(settings).items() if name not in left_out}
    about["processes"] = processes
    if about["model"] not in MODELS and Path(about["model"]).is_dir():
        about["model"] = str(source.resolve())  # from wherever the run is read
    if about["init_from"]:
        about["init_from"] = str(Path(about["init_from"]).resolve())
        about["init_weights"] = fingerprint_adapter(about["init_from"])
    if about["data_dir"]:
        about["data_dir"] = str(Path(about["data_dir"]).resolve())
    return {**about, **fingerprint_base(source), "data": fingerprint(pairs)}


def fingerprint_base(source):
    """{"base_weights", "base_files"} of a checkpoint folder: what makes a base another one."""
    small = (source / name for name in ("config.json", *tokenizers.FILES))
    return {"base_weights": fingerprint_weights(source),
            "base_files": fingerprint([file.read_bytes() for file in small if file.exists()])}


# What may differ between two runs that compute the same: where the files lie, which fingerprints
# say better, and what does not change a number.
FREE = "model", "data_dir", "init_from", "save_merged", "compile", "checkpoint_activations"


def difference(before, now, free=FREE):
    """In words, how the settings of a run differ from those that it began with; None if they do
    not."""
    keys = [key for key in sorted(before.keys() | now.keys()) if key not in free and before.get(key)
            != now.get(key)]
    changed = {"base_weights": f"the model {now.get('model')} has other weights than it began with",
               "base_files": f"the model {now.get('model')} has another config.json or tokenizer "
               "than it began with", "data": f"the data of {now.get('dataset')} have changed since "
               "it began", "init_weights": f"the adapter {now.get('init_from')} is not the one "
               "that it began with"}
    for key in ("method", "dataset", "steps", *changed, *keys):  # others may follow from the steps
        if key in keys:
            return (changed.get(key) or f"{key} is {now.get(key)} now, and it began with "
                    f"{before.get(key)}")
    return None


def check_replaceable(folder, identity):
    """A run may replace one with the same identity, and no other. ValueError if `folder` holds
    another."""
    result, resume = folder / "result.json", RunFolder(folder).state()
    if result.exists():
        before = read_json(result).get("settings")
    else:
        before = read_identity(resume) if resume.exists() else {}
    before = before if isinstance(before, dict) else {}
    both = before.keys() & identity.keys()
    other = difference(*({key: value[key] for key in both} for value in (before, identity)))
    if other:
        raise ValueError(f"{folder} holds another run ({other}): choose another --out, or remove "
                         "that folder")


def check_resume(folder, identity, method):
    """How many steps a run has made, without those that were skipped; ValueError if it cannot go on
    with this identity. method: its methods.Method."""
    _, step, rows, before = read_state(RunFolder(folder).state())
    other = difference(before, identity, (*FREE, *method.merge_only_flags, "steps"))
    if other:
        otherwise = ""
        if (folder / "adapter_config.json").exists():
            otherwise = f", or go on from its adapter with --init-from {folder}"
        raise ValueError(f"cannot resume {folder}: {other}. Start a new run with "
                         f"another --out{otherwise}")
    if identity["steps"] < step:
        raise ValueError(f"cannot resume {folder} for {identity['steps']} steps: it has done "
                         f"{step} already")
    if method.fixed_length and identity["steps"] != before.get("steps"):
        raise ValueError(f"cannot resume {folder} for {identity['steps']} steps: "
                         f"{identity['method']} has planned its ranks for {before.get('steps')}")
    return step - rows[-1].get("skipped", 0)


class Diverged(ValueError):
    """A run whose loss or gradient is not finite any more."""


class Log:
    """What a run has measured, the rows of log.csv, and the weights that validated best.

    folder: a RunFolder. first: the first step whose weights may be kept, see `begin` of a method.
    saved: the last step in the run folder. earlier: seconds of training before it was resumed.
    skipped: steps whose gradient was too large for float16, and that changed nothing.
    """

    def __init__(self, folder, identity, metric):
        self.folder, self.identity, self.metric = folder, identity, metric
        self.rows, self.best, self.first, self.saved, self.earlier = [], {}, 1, 0, 0.0
        self.skipped = 0

    @property
    def step(self):
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def seconds(self):
        """Seconds of training so far."""
        return self.rows[-1]["seconds"] if self.rows else 0.0

    def where(self):
        """What an interrupted run has left, in words."""
        return f"step {self.saved} is in {self.folder.out}" if self.saved else "nothing was saved"

    def skip(self, step, scale):
        """A step has overflowed, and left float16's scaler with this scale. Diverged where nothing
        was left to scale down."""
        self.skipped += 1
        if scale < 1:
            raise Diverged(f"the gradient of step {step} does not fit float16, even unscaled: "
                           f"stopped; {self.where()}. --dtype float32 or a lower --lr than "
                           f"{self.identity['lr']:g} may help")

    def check_finite(self, readings):
        """Diverged at the first step of {step: values} with a value that is not finite."""
        for step, values in readings.items():
            if not all(map(math.isfinite, values)):
                raise Diverged(f"loss or gradient is not finite at step {step}: stopped; "
                               f"{self.where()}. A lower --lr than {self.identity['lr']:g} may "
                               "help")

    def add(self, row, values, ranks):
        """A row of the log; values: the metrics of its validation or {}, ranks: of the layers or
        None."""
        if self.metric != "loss":
            row[f"val_{self.metric}"] = values.get(self.metric)
        if self.identity["dtype"] == "float16":
            row["skipped"] = self.skipped
        if ranks:
            row["ranks"] = " ".join(map(str, ranks))
        self.rows.append(row)

    def last_line(self):
        """The last row, which has a validation, in words."""
        row = self.rows[-1]
        text = (f"step {row['step']:5}  training loss {row['train_loss']:.4f}  validation loss "
                f"{row['val_loss']:.4f}")
        return (text if self.metric == "loss" else f"{text}  {self.metric} "
                f"{row[f'val_{self.metric}']:.4f}")

    def save(self, model, optimizer, scaler):
        """Keep the weights if they are the best so far; write the state and the log."""
        if best_step(self.rows, self.first) == self.step:
            self.best = {name: t.detach().to("cpu", copy=True)
                         for name, t in changing(model).items()}
        if not self.saved:  # what an earlier run has left goes, now that there is something to show
            self.folder.clear()
        self.folder.begin(STATE, LOG)
        place = self.folder.place
        save_state(place / STATE, model, optimizer, self.step, self.identity, self.rows,
                   self.best, self.first, scaler)
        write_csv(place / LOG, self.rows)
        self.saved = self.step

    def resume(self, model, optimizer, scaler):
        """Go on from the state in the run folder."""
        self.saved, self.rows, self.best, before = load_state(self.folder.state(), model,
                                                              optimizer, self.first, scaler)
        self.earlier, self.skipped = self.seconds, self.rows[-1].get("skipped", 0)
        steps, schedule = self.identity["steps"], self.identity["schedule"]
        longer = ((f", for {steps} steps instead of {before['steps']}: from here on the learning "
                   f"rate is that of the {schedule} schedule over {steps} steps") if steps
                  != before["steps"] else "")
        print(f"resume   {self.folder.out} after step {self.saved}{longer}")

    def finish(self, model):
        """Put the best weights back into the model, and see that log.csv is complete: a kill may
        have cut it short."""
        self.folder.begin(STATE, LOG)
        write_csv(self.folder.place / LOG, self.rows)
        put(model, self.best)


def best_step(rows, first=1):
    """The step with the best validation: of the metric, if there is one beside the loss; of equals
    the lowest loss. From the step `first` on, skipped ones not counted, if the run has come that
    far, else the last."""
    metric = next((name for name in rows[0] if name.startswith("val_") and name != "val_loss"),
                  None)
    validated = [row for row in rows if row["val_loss"] is not None]
    validated = [row for row in validated
                 if row["step"] - row.get("skipped", 0) >= first] or validated[-1:]
    return max(validated, key=lambda row: (row[metric] if metric else 0, -row["val_loss"]))["step"]


def save_state(path, model, optimizer, step, identity, rows, best=None, first=1, scaler=None):
    """What `changing` names, the optimizer's moments, the random state, the weights `best` of an
    earlier step if they were better, the state of float16's scaler, and as metadata the step, the
    identity and the rows."""
    tensors = {f"model.{name}": t for name, t in changing(model).items()}
    if best_step(rows, first) != step:
        tensors.update({f"best.{name}": t for name, t in best.items()})
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{key}": t for key, t in state.items() if t is not None})
    for key, value in (scaler.state_dict() if scaler else {}).items():
        tensors[f"scaler.{key}"] = torch.tensor(value, dtype=torch.float64)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    kept = set()
    for name, t in tensors.items():  # what layers share, as VeRA's A and B, is written for each
        tensors[name] = t.clone() if t.data_ptr() in kept else t
        kept.add(t.data_ptr())
    metadata = {"step": step, "settings": identity, "rows": rows}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    write(path, lambda part: save_file(tensors, part, metadata))


def read_identity(path):
    """The identity in resume.safetensors, without its tensors."""
    return read_state(path, weights=False)[3]


def read_state(path, weights=True):
    """(tensors, step, rows, identity) of resume.safetensors; ValueError when absent or damaged.
    weights: False leaves the tensors where they are."""
    if not path.exists():
        raise ValueError(f"there is nothing to resume: {path} does not exist")
    try:
        with safe_open(path, "pt") as f:
            step, identity, rows = (json.loads(f.metadata()[key])
                                    for key in ("step", "settings", "rows"))
            tensors = {key: f.get_tensor(key) for key in f.keys()} if weights else {}
        steps = [row["step"] for row in rows]
        if not (type(step) is int and steps[-1] == step and steps == sorted(set(steps)) and steps[0]
                > 0):
            raise ValueError(f"its step is {step}, those of its log are {steps[-3:]}")
        if not all(row.keys() == rows[0].keys() for row in rows):
            raise ValueError("the rows of its log have different columns")
        # fail here if these are not the rows of a log
        identity.keys(), best_step(rows), rows[-1]["seconds"] + 0
        for name, t in tensors.items():
            if t.is_floating_point() and not t.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError,
            RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e!r}") from None
    return tensors, step, rows, identity


def weights_of(tensors, kind, model, path):
    """{name: tensor} of `changing(model)` among the tensors of a file, where their names begin with
    `kind`."""
    weights, wanted = {key.removeprefix(kind): t for key, t in tensors.items()
                       if key.startswith(kind)}, changing(model)
    check_keys(weights, wanted, path)
    return weights


def load_best(path, model):
    """Put the weights that a run kept, or has so far, into a model made with its settings."""
    tensors = read_safetensors(path)
    kind = "best." if any(key.startswith("best.") for key in tensors) else "model."
    put(model, weights_of(tensors, kind, model, path))


@torch.no_grad()
def put(model, weights):
    """Copy {name: tensor} of `changing(model)` into the model."""
    for name, t in changing(model).items():
        t.copy_(weights[name])


def load_state(path, model, optimizer, first=1, scaler=None):
    """Put a saved state back into a model and an optimizer made with the same settings.

    Returns its step, its rows, the weights of the best step so far, and the identity that it began
    with.
    """
    tensors, step, rows, identity = read_state(path)
    weights = weights_of(tensors, "model.", model, path)
    best = weights if best_step(rows, first) == step else weights_of(tensors, "best.", model, path)
    state = {}
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = t
    # one entry for each parameter and kind: Adam's moments have their parameter's shape
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ()
    shapes = {f"{i}.{kind}": () if kind == "step" else p.shape for i, p in enumerate(params)
              for kind in kinds}
    check_keys({f"{i}.{kind}": t for i, kept in state.items() for kind, t in kept.items()},
               {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, path)
    kept, now = tensors.get("rng.cpu"), torch.get_rng_state()
    if kept is None or (kept.shape, kept.dtype) != (now.shape, now.dtype):
        raise ValueError(f"{path} lacks rng.cpu, the state of the random numbers, or holds that of "
                         "another torch")
    scale = scaler.state_dict() if scaler else {}
    check_keys({key: t for key, t in tensors.items() if key.startswith("scaler.")},
               {f"scaler.{key}": torch.empty((), device="meta") for key in scale}, path)
    # a moment lies in memory as its parameter does: the fused step counts on that
    for i, p in enumerate(params):
        for kind in kinds[1:]:
            state[i][kind] = torch.empty_like(p).copy_(state[i][kind])
    put(model, weights)
    if scale:
        scaler.load_state_dict({key: type(value)(tensors[f"scaler.{key}"].item())
                                for key, value in scale.items()})
    optimizer.load_state_dict({"state": state,
                               "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return step, rows, best, identity


def known_base_report(beside, identity, device):
    """{metric: value} of the base on the test split, if a finished run in the folder `beside` has
    it for the same base and the same texts, else None."""
    same = ("base_weights", "base_files", "base_bits", "init_weights", "dataset", "data", "metric",
            "context", "dtype", "last_turn", "chatml")
    for path in sorted(beside.glob("*/result.json")):
        try:
            result = read_json(path)
            before, values = result["settings"], result["metrics"]["base"]
            if (all(before.get(name) == identity.get(name) for name in same) and values["loss"] + 0
                < math.inf and before["device"] == str(device) and result["versions"]["torch"]
                == torch.__version__):
                print(f"evaluate the base: its report is that of {path}", flush=True)
                return values
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # no result of ours, or a damaged one, which is not this run's business
    return None
