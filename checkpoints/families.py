"""The families of the Hugging Face hub: the names and the layout of its weights <-> those of
model.py.

    FAMILIES[model_type], family(model) -> Family
"""
import re
from typing import NamedTuple

import torch
import torch.nn as nn

from model import GPT, Llama, RoBERTa, Transformer


class Family(NamedTuple):
    """A model_type of the hub."""
    model: type
    to_hub: callable  # state dict -> the hub's
    from_hub: callable  # the reverse
    # name of a linear -> (its module in `transformers`, which third of its output, or None)
    module: callable
    # (model, names of its classes) -> {key of config.json: value} beside the sizes
    describe: callable
    prefix: str  # of the hub's names, but those of a head
    tied: dict  # {hub's name: the name under which the same tensor is expected}
    # regular expression of the hub's names, without the prefix, that carry nothing the model
    # computes
    ignored: str
    conv1d: bool = False  # whether the hub's linears are Conv1D, with transposed weights


# --------------------------------------------------------------------------------------------------
# GPT-2 keeps its linears as Conv1D, weight (d_in, d_out), the transpose of nn.Linear's, with q, k
# and v fused.

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
        out[f"transformer.{module}.{kind}"] = (t.t() if leaf.startswith(("attn", "mlp")) and kind
                                               == "weight" else t)
    return out


def from_gpt2(state):
    """The reverse."""
    out = {}
    for key, t in state.items():
        key = key.removeprefix("transformer.")
        if key.startswith("h.") and key.endswith(".weight") and t.dim() == 2:
            t = t.t()
        if ".c_attn." in key:
            out.update({key.replace("c_attn", n): part
                        for n, part in zip("qkv", t.chunk(3), strict=True)})
            continue
        for ours, theirs in GPT2_NAMES.items():
            key = key.replace(f".{theirs}.", f".{ours}.")
        out[key] = t
    return out


def gpt2_module(name):
    """Our "h.0.attn.q" -> (its module in `transformers`, which third of that module's output it is,
    or None)."""
    block, leaf = name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:])
    if leaf in ("attn.q", "attn.k", "attn.v"):
        return f"transformer.{block}.attn.c_attn", "qkv".index(leaf[-1])
    return f"transformer.{block}.{GPT2_NAMES[leaf]}", None


def describe_gpt2(model, labels=None):
    """What config.json says of a GPT beside its sizes."""
    return {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
            "tie_word_embeddings": True}


# --------------------------------------------------------------------------------------------------
# RoBERTa and Llama have the same linears as we, under other names.

ROBERTA_NAMES = {"wte": "embeddings.word_embeddings", "wpe": "embeddings.position_embeddings",
                 "wtt": "embeddings.token_type_embeddings", "ln": "embeddings.LayerNorm",
                 "attn.q": "attention.self.query", "attn.k": "attention.self.key",
                 "attn.v": "attention.self.value", "attn.o": "attention.output.dense",
                 "ln_1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
                 "mlp.down": "output.dense", "ln_2": "output.LayerNorm",}
LLAMA_NAMES = {"wte": "embed_tokens", "ln_f": "norm", "ln_1": "input_layernorm",
               "ln_2": "post_attention_layernorm",
               **{f"attn.{leaf}": f"self_attn.{leaf}_proj" for leaf in "qkvo"},
               **{f"attn.{leaf}_norm": f"self_attn.{leaf}_norm" for leaf in "qk"},
               **{f"mlp.{leaf}": f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")},}


class Names:
    """Our "h.0.attn.q.weight" <-> the hub's "roberta.encoder.layer.0.attention.self.query.weight";
    the heads' names are equal. table: {our module: the hub's}. blocks: what the hub has for "h"."""

    def __init__(self, table, prefix, blocks):
        self.table, self.prefix, self.blocks = table, prefix, blocks
        self.ours = {theirs: name for name, theirs in table.items()}

    def name(self, key):
        """Our name of a tensor -> the hub's"""
        module, _, kind = key.rpartition(".")
        if module.startswith(("classifier", "lm_head")):
            return key
        block, leaf = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)", module).groups()
        return f"{self.prefix}{f'{self.blocks}.{block}.' if block else ''}{self.table[leaf]}.{kind}"

    def to_hub(self, state):
        return {self.name(key): t for key, t in state.items()}

    def from_hub(self, state):
        out = {}
        for key, t in state.items():
            module, _, kind = key.removeprefix(self.prefix).rpartition(".")
            block, leaf = re.fullmatch(rf"(?:{re.escape(self.blocks)}\.(\d+)\.)?(.*)",
                                       module).groups()
            out[f"{f'h.{block}.' if block else ''}{self.ours[leaf]}.{kind}" if leaf in self.ours
                else key] = t
        return out

    def module(self, name):
        """Our "h.0.attn.q" -> (its module in `transformers`, None: it stands alone there)."""
        return self.name(f"{name}.weight").removesuffix(".weight"), None


def describe_roberta(model, labels=None):
    """What config.json says of a RoBERTa beside its sizes; `transformers` counts the labels by
    their names."""
    kind = "ForSequenceClassification" if model.num_labels else "ForMaskedLM"
    about = {"architectures": [f"Roberta{kind}"], "hidden_act": "gelu", "type_vocab_size": 1,
             "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True}
    if model.num_labels:
        names = labels or [f"LABEL_{i}" for i in range(model.num_labels)]
        about["id2label"] = {str(i): name for i, name in enumerate(names)}
        about["label2id"] = {name: i for i, name in enumerate(names)}
        about["problem_type"] = ("regression" if model.num_labels == 1
                                 else "single_label_classification")
    return about


def describe_llama(model, labels=None):
    """What config.json says of a Llama beside its sizes."""
    kind = model.config.model_type
    about = {"architectures": [f"{kind.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    return about if kind == "qwen2" else {**about, "attention_bias": False}


# --------------------------------------------------------------------------------------------------

OF_ROBERTA = Names(ROBERTA_NAMES, "roberta.", "encoder.layer")
OF_LLAMA = Names(LLAMA_NAMES, "model.", "layers")
LLAMA = Family(Llama, OF_LLAMA.to_hub, OF_LLAMA.from_hub, OF_LLAMA.module, describe_llama,
               prefix="model.", tied={"lm_head.weight": "model.embed_tokens.weight"},
               # old checkpoints carry them along
               ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
FAMILIES = {
    "gpt2": Family(GPT, to_gpt2, from_gpt2, gpt2_module, describe_gpt2, prefix="transformer.",
                   tied={"lm_head.weight": "transformer.wte.weight"},
                   # old checkpoints carry their causal mask along
                   ignored=r"h\.\d+\.attn\.(bias|masked_bias)$",
                   conv1d=True),
    "roberta": Family(RoBERTa, OF_ROBERTA.to_hub, OF_ROBERTA.from_hub, OF_ROBERTA.module,
                      describe_roberta, prefix="roberta.",
                      tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                            "lm_head.decoder.bias": "lm_head.bias"},
                      # the pooler serves a loss of BERT's
                      ignored=r"pooler\.|embeddings\.(position_ids|token_type_ids)$"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
}


# Any other model, one of `transformers` say: its modules have their own names, and each linear
# stands alone.
OTHER = Family(nn.Module, None, None,
               lambda name: (name, None), None, prefix="", tied={}, ignored="$^")


def family(model):
    """The Family of a model."""
    return FAMILIES[model.config.model_type] if isinstance(model, Transformer) else OTHER
