"""Pretrained folders: the names and the layout of the Hugging Face hub <-> the names of model.py.

    model = from_pretrained("gpt2")         a name of MODELS, a folder, or an id of the hub
    save_pretrained(model, folder)          config.json and model.safetensors, as `transformers` reads and writes them
"""
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from checkpoints import hub
from checkpoints.files import check_keys, read_json, read_safetensors, write, write_json
from model import GPT, Classifier, GPTConfig, LMHead, RoBERTa, RobertaConfig

ROOT = Path(__file__).resolve().parent.parent
# Names for checkpoints: the two that are shipped, and the hub's
MODELS = {"tiny-gpt": ROOT / "data/tiny-gpt", "tiny-roberta": ROOT / "data/tiny-roberta",
          **{f"gpt2{s}": f"openai-community/gpt2{s}" for s in ("", "-medium", "-large", "-xl")},
          **{f"roberta-{s}": f"FacebookAI/roberta-{s}" for s in ("base", "large")}}


def locate(source):
    """A local checkpoint folder for a name of MODELS, a folder or a Hugging Face hub id."""
    source = MODELS.get(source, source)
    if Path(source).is_dir():
        return Path(source)
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ValueError(f"model folder {source} does not exist")
    try:
        return hub.fetch(source, ["config.json", "model.safetensors", "vocab.json", "merges.txt", "*.tiktoken"])
    except (OSError, ValueError) as e:
        raise ValueError(f"model {source!r} is neither a folder nor to be had from the hub ({type(e).__name__}): "
                         "give --model a folder with config.json and model.safetensors") from None


def from_pretrained(source, num_labels=None):
    """Folder or hub id -> GPT or RoBERTa, by the model_type in config.json, in fp32 on the CPU.

    num_labels, RoBERTa only: 0 for the masked-LM head, 1 for regression, more for a classifier; None takes the head
    that the checkpoint has. Where the checkpoint lacks the head, a fresh one is made and a line says so. ValueError for
    a checkpoint that is incomplete or of another kind.
    """
    folder = locate(source)
    config, path = read_config(folder), folder / "model.safetensors"
    state = {key: t.float() for key, t in read_safetensors(path).items()}
    kind = FAMILIES[config.model_type]
    with torch.device("meta"):  # no memory, no initial values: the file brings both
        if kind.model.causal:
            if num_labels:
                raise ValueError(f"{source} is a GPT-2, which has no classification head here: choose a RoBERTa")
            model = kind.model(config)
        else:
            head = state.get("classifier.out_proj.weight", torch.empty(0))
            model = kind.model(config, head.shape[0] if num_labels is None and head.dim() else num_labels or 0)
        state = kind.from_hub(state, path)
    if not kind.model.causal:
        state = fit_head(state, model, source, path)
    check_keys(state, model.state_dict(), path)
    model.load_state_dict({key: t.contiguous() for key, t in state.items()}, assign=True)
    return model


def fit_head(state, model, source, path):
    """The state with the head that the model asks for: the checkpoint's, or a fresh one."""
    name, other = ("classifier", "lm_head") if model.classifier else ("lm_head", "classifier")
    state = {key: t for key, t in state.items() if not key.startswith(other + ".")}
    output = state.get("classifier.out_proj.weight")
    if output is not None and output.shape[:1] != (model.num_labels,):  # pretrained on another task
        state = {key: t for key, t in state.items() if not key.startswith("classifier.")}
    if not any(key.startswith(name + ".") for key in state):
        model.fresh_head = True
        body = {key: t for key, t in model.state_dict().items() if not key.startswith(name + ".")}
        check_keys(state, body, path)  # before a head is made, of a size that only a damaged config has
        fresh = Classifier(model.config, model.num_labels) if model.classifier else LMHead(model.config)
        state.update({f"{name}.{key}": t for key, t in fresh.state_dict().items()})
        what = f"{model.num_labels} label{'s' * (model.num_labels > 1)}" if model.classifier else "masked tokens"
        print(f"head     {source} has no head for {what}: a fresh one is trained from scratch")
    return state


def save_pretrained(model, folder, dtype=None):
    """Write config.json and model.safetensors as `transformers` reads and writes them, in `dtype` if one is given."""
    kind, folder = family(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: t.detach().to("cpu", dtype).contiguous() for key, t in kind.to_hub(model.state_dict()).items()}
    write(folder / "model.safetensors", lambda part: save_file(state, part, {"format": "pt"}))
    write_json(folder / "config.json", {**asdict(model.config), "model_type": model.config.model_type,
                                        "tie_word_embeddings": True, **kind.describe(model)})


def read_config(folder):
    """GPTConfig or RobertaConfig of a checkpoint folder; ValueError for anything this file does not compute exactly."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is no checkpoint folder: it holds no config.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only {' or '.join(map(repr, FAMILIES))}")
    Config = FAMILIES[kind].config
    for key, good in FAMILIES[kind].expected.items():
        if raw.get(key, good[0]) not in good:
            raise ValueError(f"{path}: {key} {raw[key]!r} is not supported, only {' or '.join(map(repr, good))}")
    lacking = {f.name for f in fields(Config)} - raw.keys() - {"pad_token_id"}
    if kind == "roberta" and lacking:  # `transformers` would take defaults that are not roberta-base's
        raise ValueError(f"{path} lacks {min(lacking)}")
    config = Config(**{f.name: raw[f.name] for f in fields(Config) if f.name in raw})
    for name, value in asdict(config).items():
        if name.startswith("layer_norm"):
            if not (isinstance(value, float) and 0 < value < 1):
                raise ValueError(f"{path}: {name} must be in (0, 1), not {value!r}")
        elif not (name == "n_inner" and value is None):
            most = 1000 if name in ("n_layer", "num_hidden_layers") else 2**20  # more only in a damaged file
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{path}: {name} must be a whole number in 1..{most}, not {value!r}")
    C, heads = (("n_embd", "n_head") if kind == "gpt2" else ("hidden_size", "num_attention_heads"))
    if getattr(config, C) % getattr(config, heads):
        raise ValueError(f"{path}: {C} {getattr(config, C)} is no multiple of {heads} {getattr(config, heads)}")
    if kind == "roberta" and min(config.max_position_embeddings - 2, config.vocab_size - 1) < 4:
        raise ValueError(f"{path}: max_position_embeddings {config.max_position_embeddings} or vocab_size "
                         f"{config.vocab_size} leaves nothing beside what RoBERTa needs for itself")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2 keeps its linears as Conv1D, weight (d_in, d_out), the transpose of nn.Linear's, with q, k and v fused.

GPT2_NAMES = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def to_gpt2(state):
    """Our names and orientation -> GPT-2's, with q, k, v fused into c_attn (C, 3C)."""
    out = {}
    for key, t in state.items():
        module, _, kind = key.rpartition(".")
        leaf = ".".join(module.split(".")[2:])  # "h.0.attn.q" -> "attn.q"
        if leaf in ("attn.k", "attn.v"):
            continue  # they travel with q
        if leaf == "attn.q":
            t = torch.cat([state[f"{module[:-1]}{n}.{kind}"] for n in "qkv"])
            leaf, module = "attn.c_attn", module[:-1] + "c_attn"
        elif leaf in GPT2_NAMES:
            module = module.removesuffix(leaf) + GPT2_NAMES[leaf]
        out[f"transformer.{module}.{kind}"] = t.t() if leaf.startswith(("attn", "mlp")) and kind == "weight" else t
    return out


def from_gpt2(state, where="checkpoint"):
    """The reverse, with or without the `transformer.` prefix."""
    out = {}
    for key, t in state.items():
        key = key.removeprefix("transformer.")
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old checkpoints carry their causal mask along
        if key == "lm_head.weight":
            tied = state.get("transformer.wte.weight", state.get("wte.weight"))
            if tied is None or not torch.equal(t, tied):
                raise ValueError(f"{where}: lm_head.weight differs from wte.weight, only tied heads are supported")
            continue
        if key.startswith("h.") and key.endswith(".weight") and t.dim() == 2:
            t = t.t()
        if ".c_attn." in key and t.dim() and len(t) % 3 == 0:  # else it ends as an unexpected key
            out.update({key.replace("c_attn", n): part for n, part in zip("qkv", t.chunk(3), strict=True)})
            continue
        for ours, theirs in GPT2_NAMES.items():
            key = key.replace(f".{theirs}.", f".{ours}.")
        out[key] = t
    return out


def gpt2_module(name):
    """Our "h.0.attn.q" -> (its module in `transformers`, which third of that module's output it is, or None)."""
    block, leaf = name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:])
    if leaf in ("attn.q", "attn.k", "attn.v"):
        return f"transformer.{block}.attn.c_attn", "qkv".index(leaf[-1])
    return f"transformer.{block}.{GPT2_NAMES[leaf]}", None


def describe_gpt2(model):
    """What config.json says of a GPT beside its sizes."""
    return {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}


# ---------------------------------------------------------------------------------------------------------------------
# RoBERTa

ROBERTA_NAMES = {
    "wte": "embeddings.word_embeddings", "wpe": "embeddings.position_embeddings",
    "wtt": "embeddings.token_type_embeddings", "ln": "embeddings.LayerNorm",
    "attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense", "ln_1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "ln_2": "output.LayerNorm",
}


def to_roberta(state):
    """Our names -> RoBERTa's."""
    return {roberta_name(key): t for key, t in state.items()}


def roberta_name(key):
    """Our "h.0.attn.q.weight" -> "roberta.encoder.layer.0.attention.self.query.weight"; the heads' names are equal."""
    module, _, kind = key.rpartition(".")
    if module.startswith(("classifier", "lm_head")):
        return key
    block, leaf = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)", module).groups()
    return f"roberta.{f'encoder.layer.{block}.' if block else ''}{ROBERTA_NAMES[leaf]}.{kind}"


def from_roberta(state, where="checkpoint"):
    """The reverse, with or without the `roberta.` prefix, and without what neither head reads."""
    out, ours = {}, {theirs: name for name, theirs in ROBERTA_NAMES.items()}
    tied = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias"}
    for key, t in state.items():
        if key in tied:
            if tied[key] not in state or not torch.equal(t, state[tied[key]]):
                raise ValueError(f"{where}: {key} differs from {tied[key]}, only tied heads are supported")
            continue
        key = key.removeprefix("roberta.")
        if key.startswith("pooler.") or key == "embeddings.position_ids":
            continue  # BERT's pooler serves a loss that RoBERTa has not
        module, _, kind = key.rpartition(".")
        block, leaf = re.fullmatch(r"(?s)(?:encoder\.layer\.(\d+)\.)?(.*)", module).groups()
        if leaf in ours:
            key = f"{f'h.{block}.' if block else ''}{ours[leaf]}.{kind}"
        out[key] = t  # an unknown key ends as an unexpected one
    return out


def roberta_module(name):
    """Our "h.0.attn.q" -> (its module in `transformers`, None: it stands alone there)."""
    return roberta_name(f"{name}.weight").removesuffix(".weight"), None


def describe_roberta(model):
    """What config.json says of a RoBERTa beside its sizes; `transformers` counts the labels by their names."""
    kind = "ForSequenceClassification" if model.num_labels else "ForMaskedLM"
    about = {"architectures": [f"Roberta{kind}"], "hidden_act": "gelu", "type_vocab_size": 1, "bos_token_id": 0,
             "eos_token_id": 2}
    if model.num_labels:
        about["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        about["problem_type"] = "regression" if model.num_labels == 1 else "single_label_classification"
    return about


# ---------------------------------------------------------------------------------------------------------------------

class Family(NamedTuple):
    """A model_type of the hub."""
    config: type
    model: type
    expected: dict  # what we compute: other values of these keys of config.json would be another model
    to_hub: callable  # state dict -> the hub's
    from_hub: callable  # (the hub's state dict, where) -> state dict
    module: callable  # name of a linear -> (its module in `transformers`, which third of its output, or None)
    describe: callable  # model -> {key of config.json: value} beside the sizes
    conv1d: bool  # whether the hub's linears are Conv1D, with transposed weights


FAMILIES = {
    "gpt2": Family(GPTConfig, GPT, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "reorder_and_upcast_attn": (False,),
    }, to_gpt2, from_gpt2, gpt2_module, describe_gpt2, conv1d=True),
    "roberta": Family(RobertaConfig, RoBERTa, {
        "hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "type_vocab_size": (1,),
        "tie_word_embeddings": (True,), "is_decoder": (False,), "add_cross_attention": (False,), "bos_token_id": (0,),
        "pad_token_id": (1,), "eos_token_id": (2,),
    }, to_roberta, from_roberta, roberta_module, describe_roberta, conv1d=False),
}


def family(model):
    """The Family of one of our models."""
    return FAMILIES[model.config.model_type]
