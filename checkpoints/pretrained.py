"""Pretrained folders: the names and the layout of the Hugging Face hub <-> the names of model.py.

    model = from_pretrained("gpt2")     a name of MODELS, a folder, or an id of the hub
    model, found = load("gpt2")         the same, with what was found beside the model
    save_pretrained(model, folder)      config.json and model.safetensors, as in `transformers`
"""
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import qlora
from checkpoints import hub, tokenizers, weights
from checkpoints.configs import read_config
from checkpoints.families import FAMILIES, family
from checkpoints.files import check_keys, read_json, write, write_json, write_text
from model import Classifier, LMHead

ROOT = Path(__file__).resolve().parent.parent
# Names for checkpoints: the two that are shipped, and the hub's
MODELS = {"tiny-gpt": ROOT / "data/tiny-gpt", "tiny-roberta": ROOT / "data/tiny-roberta",
          **{f"gpt2{s}": f"openai-community/gpt2{s}" for s in ("", "-medium", "-large", "-xl")},
          **{f"roberta-{s}": f"FacebookAI/roberta-{s}" for s in ("base", "large")},
          **{f"smollm2-{s}": f"HuggingFaceTB/SmolLM2-{s.upper()}" for s in ("135m", "360m")},
          "tinyllama": "TinyLlama/TinyLlama_v1.1", "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
          "llama3.2-3b": "meta-llama/Llama-3.2-3B", "llama2-7b": "meta-llama/Llama-2-7b-hf"}


def locate(source):
    """A local checkpoint folder for a name of MODELS, a folder or a Hugging Face hub id."""
    if source in MODELS and Path(source).is_dir():
        print(f"model    {source} is {MODELS[source]}; the folder here would be ./{source}")
    source = MODELS.get(source, source)
    if Path(source).is_dir():
        return Path(source)
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ValueError(f"model folder {source} does not exist")
    try:
        return hub.fetch(source, ["config.json", *weights.PATTERNS, *tokenizers.FILES])
    except (OSError, ValueError) as e:
        raise ValueError(f"model {source!r} is no folder here, and {hub.reason(e)}; or give "
                         "--model a folder with config.json and model.safetensors") from None


class Found(NamedTuple):
    """What loading found out beside the model, which knows nothing of files."""
    fresh_head: bool = False  # whether the checkpoint lacks the head, so that a new one was made
    labels: tuple | None = None  # names of the classes, where they were asked for


def from_pretrained(source, num_labels=None, labels=None, dtype=torch.float32):
    """The model of `load`, without what was found beside it."""
    return load(source, num_labels, labels, dtype)[0]


def load(source, num_labels=None, labels=None, dtype=torch.float32, head_from=None, bits=None):
    """(model, Found): a folder or hub id -> GPT, Llama or RoBERTa, by the model_type in
    config.json, on the CPU.

    dtype: of linears and embeddings. Norms and a classifier's head, which trains, are fp32 always.
    bits: 4 for the linears of the blocks in 4 bits, see qlora.py; they are rounded one by one, so
    the whole model is never there in more.

    num_labels, RoBERTa only: 0 for the masked-LM head, 1 for regression, more for a classifier.
    None takes the head that the checkpoint has. labels, in its place: names of the classes 0, 1, …
    A head that config.json gives the same names in another order is reordered. Where the checkpoint
    lacks the head, a fresh one is made and a line says so. ValueError for a checkpoint that is
    incomplete or of another kind. head_from: what brings a head, where the checkpoint lacks it.
    """
    folder, num_labels = locate(source), num_labels if labels is None else len(labels)
    config, state = read_config(folder), weights.read_weights(folder)
    packed = weights.take_packed(state, folder)  # what is in 4 bits already
    if packed and not bits:
        raise ValueError(f"{folder} has its weights in 4 bits, as bitsandbytes writes them: "
                         "--base-bits 4 takes them so")
    files = weights.weight_files(folder)
    kind, where = FAMILIES[config.model_type], files[0] if len(files) == 1 else folder
    if kind.model.causal and num_labels:
        raise ValueError(f"{source}, a {config.model_type}, has no classification head here: "
                         "choose a RoBERTa")
    if num_labels is None and not kind.model.causal:
        sizes = [len(t) for key, t in state.items()
                 if weights.short(key) == "classifier.out_proj.weight" and t.dim()]
        num_labels = sizes[0] if sizes else 0
    with torch.device("meta"), WithoutDrawing():  # no memory, no initial values: the file has both
        model = kind.model(config) if kind.model.causal else kind.model(config, num_labels)
        expected = kind.to_hub(model.state_dict())
    head = "classifier." if num_labels else "lm_head."
    tied = kind.tied if config.tied else {}
    state, origin, others = weights.standard(state, expected, head, kind.prefix, tied, kind.ignored,
                                             where)
    bare = not any(name.startswith(kind.prefix) for name in map(weights.short, origin.values()))

    def named(name):
        return origin.get(name, name.removeprefix(kind.prefix) if bare else name)
    fresh = False
    if not model.causal:
        state, fresh = fit_head(state, model, head, expected, others, source, where, named,
                                head_from)
    elif others:
        print(f"head     {source}: left out is {', '.join(sorted(others))}, the head of another "
              "task")
    check_keys(state, expected, where, named)
    if labels and not fresh:
        reorder_labels(state, labels, folder, source)
    for key, t in state.items():
        if t.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"{where}: {named(key)} is of {t.dtype}: quantised weights are not "
                             "supported")
    state = kind.from_hub(state)
    for key, t in state.items():
        module = model.get_submodule(key.rpartition(".")[0])
        W, in_block = packed.get(id(t)), key.startswith("h.") and type(module) is nn.Linear
        if bits and in_block and key.endswith(".weight"):
            try:
                W = W or qlora.to_nf4(t.contiguous())
            except ValueError as e:
                raise ValueError(f"{where}: {named(key)}: {e}") from None
            W.dtype = dtype  # what it is dequantised to
            qlora.put(module, W)
            continue
        t = t if W is None else W.dequantise(torch.float32)  # a head that somebody has quantised
        fp32 = key.startswith("classifier.") or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        # copied where most of the file is not needed any more: else it stays mapped as a whole
        state[key] = t.to(torch.float32 if fp32 else dtype, copy=bool(bits)).contiguous()
    # not strict: what is in 4 bits has names of its own, and all others were checked above
    model.load_state_dict(state, assign=True, strict=not bits)
    return model, Found(fresh, tuple(labels or ()) or None)


class WithoutDrawing(TorchFunctionMode):
    """Modules made inside have no random values. On the meta device torch would import 800 modules
    to draw none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (kwargs["tensor"] if function is nn.init.normal_
                else function(*args, **(kwargs or {})))


def fit_head(state, model, head, expected, others, source, where, named, head_from):
    """(state, whether it is fresh): with the head that the model asks for, the checkpoint's or a
    fresh one."""
    output = state.get("classifier.out_proj.weight")
    # pretrained with other labels
    if output is not None and output.shape[:1] != (model.num_labels,):
        state = {key: t for key, t in state.items() if not key.startswith("classifier.")}
        others = {*others, "classifier"}
    left_out = f" (left out: {', '.join(sorted(others))})" * bool(others)
    if any(key.startswith(head) for key in state):
        if others - {"lm_head", "classifier"}:
            print(f"head     {source}{left_out}")
        return state, False
    body = {key: t for key, t in expected.items() if not key.startswith(head)}
    # before a head is made, of a size that only a damaged config has
    check_keys(state, body, where, named)
    fresh = Classifier(model.config, model.num_labels) if model.classifier else LMHead(model.config)
    what = (f"{model.num_labels} label{'s' * (model.num_labels > 1)}" if model.classifier
            else "masked tokens")
    then = f"that of {head_from} is taken" if head_from else "a fresh one is trained from scratch"
    print(f"head     {source} has no head for {what}: {then}{left_out}")
    return {**state, **{f"{head}{key}": t for key, t in fresh.state_dict().items()}}, True


def reorder_labels(state, labels, folder, source):
    """Put the rows of a classifier's output in the order of `labels`, if config.json has the same
    names in another order. Names such as LABEL_0 mean nothing: then the order is taken as it is,
    and so it is, with a line, where the names differ."""
    path = folder / "config.json"
    names = read_json(path).get("id2label") or {str(i): f"LABEL_{i}" for i in range(len(labels))}
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(labels))}:
        raise ValueError(f"{path}: id2label {names!r} does not name the {len(labels)} labels of "
                         "the head")
    theirs = [plain(names[str(i)]) for i in range(len(labels))]
    ours = [plain(name) for name in labels]
    if theirs == ours or len(labels) == 1 or all(re.fullmatch(r"(label )?\d+", name)
                                                 for name in theirs):
        return
    if sorted(theirs) != sorted(ours):
        print(f"labels   {source} calls them {', '.join(theirs)}, the data {', '.join(ours)}: "
              "taken in this order")
        return
    order = [theirs.index(name) for name in ours]
    for key in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        state[key] = state[key][order]
    print(f"labels   {source} has the order {', '.join(theirs)}: its head is matched by name")


def plain(name):
    """A label's name without what differs by habit: "NOT_ENTAILMENT" -> "not entailment"."""
    return re.sub(r"[\s_-]+", " ", str(name).strip().lower())


def save_pretrained(model, folder, dtype=None, more=(), labels=None):
    """Write config.json and model.safetensors as `transformers` reads and writes them, in `dtype`
    if one is given. more: {key: value} that config.json is to have beside what describes the model.
    labels: names of a classifier's classes."""
    kind, folder = family(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: t.detach().to("cpu", dtype).contiguous()
             for key, t in kind.to_hub(model.state_dict()).items()}
    write(folder / "model.safetensors", lambda part: save_file(state, part, {"format": "pt"}))
    write_json(folder / "config.json",
               {**dict(more), **asdict(model.config), "model_type": model.config.model_type,
                **kind.describe(model, labels)})


def ends_of(folder):
    """The ids that end what `transformers` writes with a checkpoint, where generation_config.json
    names any."""
    path = Path(folder) / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.exists() else None
    return {i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int}


def save_merged(folder, model, source, tokenizer, labels=None, bits=None, chat=None):
    """The merged model as a checkpoint folder of its own, with the tokenizer of the folder it came
    from, and what its config.json said beside what we write anew. Texts end with the token that
    they were trained to end with. labels: names of a classifier's classes. chat: what wrote the
    turns that it was trained on, a `Converse` of data/tasks.py: then its template comes along, and
    what ends a turn.

    A base in bfloat16 stays so, and one in 4 bits, `bits`, becomes so: the model's own weights are
    then rounded too, as they are written; returns True."""
    qlora.dequantise(model, model.wte.weight.dtype)
    half = bits or torch.bfloat16 in (weights.stored_dtype(source), model.wte.weight.dtype)
    anew = ("id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype",
            "rope_parameters", "transformers_version", "quantization_config")
    kept = {key: value for key, value in read_json(source / "config.json").items()
            if key not in anew}
    if model.causal:
        kept.update(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
    save_pretrained(model, folder, torch.bfloat16 if half else None, kept, labels)
    files = [name for name in tokenizers.FILES if (source / name).exists()]
    for name in files:
        write(folder / name, lambda part, name=name: shutil.copyfile(source / name, part))
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
        tokenizer.save(folder, roberta=not model.causal)
    if chat:
        path = source / "generation_config.json"
        said = read_json(path) if path.exists() else {"bos_token_id": tokenizer.bos}
        stops = sorted(chat.stops)
        write_json(folder / "generation_config.json",
                   {**said, "eos_token_id": stops if len(stops) > 1 else stops[0]})
        write_text(folder / "chat_template.jinja", chat.template.source)
    if half:
        print(f"merged   {folder} is in bfloat16" + ("" if bits else ", as the base is"))
        for p in model.parameters():
            p.data = p.data.bfloat16().to(p.dtype)
    return bool(half)
