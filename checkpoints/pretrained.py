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

from checkpoints import hub, tokenizers, weights
from checkpoints.files import check_keys, read_json, write, write_json
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
        return hub.fetch(source, ["config.json", *weights.PATTERNS, *tokenizers.FILES])
    except (OSError, ValueError) as e:
        raise ValueError(f"model {source!r} is neither a folder nor to be had from the hub ({type(e).__name__}): "
                         "give --model a folder with config.json and model.safetensors") from None


def from_pretrained(source, num_labels=None, labels=None):
    """Folder or hub id -> GPT or RoBERTa, by the model_type in config.json, in fp32 on the CPU.

    num_labels, RoBERTa only: 0 for the masked-LM head, 1 for regression, more for a classifier; None takes the head
    that the checkpoint has. labels, in its place: names of the classes 0, 1, …; a head that config.json gives the same
    names in another order is reordered. Where the checkpoint lacks the head, a fresh one is made and a line says so.
    ValueError for a checkpoint that is incomplete or of another kind.
    """
    folder, num_labels = locate(source), num_labels if labels is None else len(labels)
    config, state, files = read_config(folder), weights.read_weights(folder), weights.weight_files(folder)
    kind, where = FAMILIES[config.model_type], files[0] if len(files) == 1 else folder
    if kind.model.causal and num_labels:
        raise ValueError(f"{source} is a GPT-2, which has no classification head here: choose a RoBERTa")
    if num_labels is None and not kind.model.causal:
        sizes = [len(t) for key, t in state.items() if weights.short(key) == "classifier.out_proj.weight" and t.dim()]
        num_labels = sizes[0] if sizes else 0
    with torch.device("meta"):  # no memory, no initial values: the file brings both
        model = kind.model(config) if kind.model.causal else kind.model(config, num_labels)
        expected = kind.to_hub(model.state_dict())
    head = "classifier." if num_labels else "lm_head."
    state, origin, others = weights.standard(state, expected, head, kind.prefix, kind.tied, kind.ignored, where)
    bare = not any(name.startswith(kind.prefix) for name in map(weights.short, origin.values()))

    def named(name):
        return origin.get(name, name.removeprefix(kind.prefix) if bare else name)
    if model.causal:
        if others:
            print(f"head     {source}: left out is {', '.join(sorted(others))}, the head of another task")
    else:
        model.labels = tuple(labels or ()) or None
        state = fit_head(state, model, head, expected, others, source, where, named)
    check_keys(state, expected, where, named)
    if labels and not model.fresh_head:
        reorder_labels(state, labels, folder, source)
    model.load_state_dict({key: t.contiguous() for key, t in kind.from_hub(state).items()}, assign=True)
    return model


def fit_head(state, model, head, expected, others, source, where, named):
    """The state with the head that the model asks for: the checkpoint's, or a fresh one."""
    output = state.get("classifier.out_proj.weight")
    if output is not None and output.shape[:1] != (model.num_labels,):  # pretrained with other labels
        state = {key: t for key, t in state.items() if not key.startswith("classifier.")}
        others = {*others, "classifier"}
    found = f" (left out: {', '.join(sorted(others))})" * bool(others)
    if any(key.startswith(head) for key in state):
        if others - {"lm_head", "classifier"}:
            print(f"head     {source}{found}")
        return state
    model.fresh_head = True
    body = {key: t for key, t in expected.items() if not key.startswith(head)}
    check_keys(state, body, where, named)  # before a head is made, of a size that only a damaged config has
    fresh = Classifier(model.config, model.num_labels) if model.classifier else LMHead(model.config)
    what = f"{model.num_labels} label{'s' * (model.num_labels > 1)}" if model.classifier else "masked tokens"
    print(f"head     {source} has no head for {what}: a fresh one is trained from scratch{found}")
    return {**state, **{f"{head}{key}": t for key, t in fresh.state_dict().items()}}


def reorder_labels(state, labels, folder, source):
    """Put the rows of a classifier's output in the order of `labels`, if config.json has the same names in another
    order. Names such as LABEL_0 mean nothing: then the order is taken as it is, and so it is, with a line, where the
    names differ."""
    path = folder / "config.json"
    names = read_json(path).get("id2label") or {str(i): f"LABEL_{i}" for i in range(len(labels))}
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(labels))}:
        raise ValueError(f"{path}: id2label {names!r} does not name the {len(labels)} labels of the head")
    theirs = [plain(names[str(i)]) for i in range(len(labels))]
    ours = [plain(name) for name in labels]
    if theirs == ours or len(labels) == 1 or all(re.fullmatch(r"(label )?\d+", name) for name in theirs):
        return
    if sorted(theirs) != sorted(ours):
        print(f"labels   {source} calls them {', '.join(theirs)}, the data {', '.join(ours)}: taken in this order")
        return
    order = [theirs.index(name) for name in ours]
    for key in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        state[key] = state[key][order]
    print(f"labels   {source} has the order {', '.join(theirs)}: its head is matched by name")


def plain(name):
    """A label's name without what differs by habit: "NOT_ENTAILMENT" -> "not entailment"."""
    return re.sub(r"[\s_-]+", " ", str(name).strip().lower())


def save_pretrained(model, folder, dtype=None, more=()):
    """Write config.json and model.safetensors as `transformers` reads and writes them, in `dtype` if one is given.
    more: {key: value} that config.json is to have beside what describes the model."""
    kind, folder = family(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: t.detach().to("cpu", dtype).contiguous() for key, t in kind.to_hub(model.state_dict()).items()}
    write(folder / "model.safetensors", lambda part: save_file(state, part, {"format": "pt"}))
    write_json(folder / "config.json", {**dict(more), **asdict(model.config), "model_type": model.config.model_type,
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


def from_gpt2(state):
    """The reverse."""
    out = {}
    for key, t in state.items():
        key = key.removeprefix("transformer.")
        if key.startswith("h.") and key.endswith(".weight") and t.dim() == 2:
            t = t.t()
        if ".c_attn." in key:
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


def from_roberta(state):
    """The reverse."""
    out, ours = {}, {theirs: name for name, theirs in ROBERTA_NAMES.items()}
    for key, t in state.items():
        module, _, kind = key.removeprefix("roberta.").rpartition(".")
        block, leaf = re.fullmatch(r"(?:encoder\.layer\.(\d+)\.)?(.*)", module).groups()
        out[f"{f'h.{block}.' if block else ''}{ours[leaf]}.{kind}" if leaf in ours else key] = t
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
        names = model.labels or [f"LABEL_{i}" for i in range(model.num_labels)]
        about["id2label"] = {str(i): name for i, name in enumerate(names)}
        about["label2id"] = {name: i for i, name in enumerate(names)}
        about["problem_type"] = "regression" if model.num_labels == 1 else "single_label_classification"
    return about


# ---------------------------------------------------------------------------------------------------------------------

class Family(NamedTuple):
    """A model_type of the hub."""
    config: type
    model: type
    expected: dict  # what we compute: other values of these keys of config.json would be another model
    to_hub: callable  # state dict -> the hub's
    from_hub: callable  # the reverse
    module: callable  # name of a linear -> (its module in `transformers`, which third of its output, or None)
    describe: callable  # model -> {key of config.json: value} beside the sizes
    conv1d: bool  # whether the hub's linears are Conv1D, with transposed weights
    prefix: str  # of the hub's names, but those of a head
    tied: dict  # {hub's name: the name under which the same tensor is expected}
    ignored: str  # regular expression of the hub's names, without the prefix, that carry nothing the model computes


FAMILIES = {
    "gpt2": Family(GPTConfig, GPT, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "reorder_and_upcast_attn": (False,), "quantization_config": (None,),
    }, to_gpt2, from_gpt2, gpt2_module, describe_gpt2, conv1d=True, prefix="transformer.",
        tied={"lm_head.weight": "transformer.wte.weight"},
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)$"),  # old checkpoints carry their causal mask along
    "roberta": Family(RobertaConfig, RoBERTa, {
        "hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "type_vocab_size": (1,),
        "tie_word_embeddings": (True,), "is_decoder": (False,), "add_cross_attention": (False,), "bos_token_id": (0,),
        "pad_token_id": (1,), "eos_token_id": (2,), "quantization_config": (None,),
    }, to_roberta, from_roberta, roberta_module, describe_roberta, conv1d=False, prefix="roberta.",
        tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
              "lm_head.decoder.bias": "lm_head.bias"},
        ignored=r"pooler\.|embeddings\.(position_ids|token_type_ids)$"),  # the pooler serves a loss of BERT's
}


def family(model):
    """The Family of one of our models."""
    return FAMILIES[model.config.model_type]
