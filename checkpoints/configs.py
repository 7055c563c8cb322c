"""config.json of the hub's folders -> the configs of model.py. What model.py does not compute
exactly is refused.

    read_config(folder) -> GPTConfig, LlamaConfig or RobertaConfig
"""
import math
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from checkpoints.files import read_json
from model import GPTConfig, LlamaConfig, RobertaConfig

NULL_MEANS_DEFAULT = "n_inner", "head_dim", "num_key_value_heads", "sliding_window"


def read_config(folder):
    """The config of a checkpoint folder; ValueError for anything that model.py does not compute
    exactly."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is no checkpoint folder: it holds no config.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only "
                         f"{' or '.join(map(repr, KINDS))}")
    if kind != "gpt2" and is_nf4(raw.get("quantization_config")):
        del raw["quantization_config"]  # GPT-2's q, k and v are one matrix there, and three here
    Config, complete, required, expected = KINDS[kind]
    for key, good in expected.items():
        if raw.get(key, good[0]) not in good:
            raise ValueError(f"{path}: {key} {raw[key]!r} is not supported, only "
                             f"{' or '.join(map(repr, good))}")
    # `transformers` would take defaults that are another model's
    if lacking := sorted(set(required) - raw.keys()):
        raise ValueError(f"{path} lacks {lacking[0]}")
    values = {f.name: raw[f.name] for f in fields(Config) if f.name in raw}
    for name, value in values.items():
        check_value(path, name, value)
    return Config(**{**values, **complete(raw, path)})


def is_nf4(quantization):
    """Whether a quantization_config is that of qlora.py, as bitsandbytes writes it."""
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
              "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
    return isinstance(quantization, dict) and wanted.items() <= quantization.items()


def check_value(path, name, value):
    """ValueError for a value of config.json that no model has."""
    if name in ("model_type", "rope_scaling",
                "rope_theta") or value is None and name in NULL_MEANS_DEFAULT:
        return  # checked elsewhere
    if name == "tie_word_embeddings":
        if type(value) is not bool:
            raise ValueError(f"{path}: {name} must be true or false, not {value!r}")
    elif name.endswith(("eps", "epsilon")):
        if not (number(value) and value < 1):
            raise ValueError(f"{path}: {name} must be in (0, 1), not {value!r}")
    else:
        # more only in a damaged file
        most = {"n_layer": 1000, "num_hidden_layers": 1000,
                "max_position_embeddings": 2**26}.get(name, 2**20)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{path}: {name} must be a whole number in 1..{most}, not {value!r}")


def check_heads(path, **sizes):
    """ValueError if the heads do not share the channels evenly; sizes: both, under the file's
    names."""
    (width, C), (name, heads) = sizes.items()
    if C % heads:
        raise ValueError(f"{path}: {width} {C} is not a multiple of {name} {heads}")


def number(value):
    """Whether a value of a JSON file is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


# --------------------------------------------------------------------------------------------------
# What stands in config.json under other names, or follows from the rest, by family

def complete_gpt2(raw, path):
    check_heads(path, n_embd=raw.get("n_embd", GPTConfig.n_embd),
                n_head=raw.get("n_head", GPTConfig.n_head))
    return {}


def complete_roberta(raw, path):
    check_heads(path, hidden_size=raw["hidden_size"],
                num_attention_heads=raw["num_attention_heads"])
    if min(raw["max_position_embeddings"] - 2, raw["vocab_size"] - 1) < 4:
        raise ValueError(f"{path}: max_position_embeddings {raw['max_position_embeddings']} or "
                         f"vocab_size {raw['vocab_size']} leaves nothing beside what RoBERTa needs "
                         "for itself")
    return {}


def complete_llama(raw, path):
    """What stands in config.json under other names, or follows from the rest."""
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    kv, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    kv = heads if kv is None else kv
    if head_dim is None:
        check_heads(path, hidden_size=hidden, num_attention_heads=heads)
        head_dim = hidden // heads
    if heads % kv:
        raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of "
                         f"num_key_value_heads {kv}")
    if head_dim % 2:
        raise ValueError(f"{path}: head_dim {head_dim} is odd, rotary positions turn pairs of "
                         "channels")
    kinds = raw.get("layer_types")
    if kinds is not None and set(kinds if isinstance(kinds, list)
                                 else [kinds]) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types {str(kinds)[:60]} is not supported, only "
                         "full_attention in every layer")
    window = raw.get("sliding_window", 4096) if raw["model_type"] == "mistral" else None
    theta, scaling = rope(raw, path)
    return dict(num_key_value_heads=kv, head_dim=head_dim, sliding_window=window, rope_theta=theta,
                rope_scaling=scaling, tie_word_embeddings=raw.get("tie_word_embeddings", False))


def rope(raw, path):
    """(rope_theta, rope_scaling) of config.json. `transformers` 5 has both in rope_parameters,
    older ones apart."""
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        raise ValueError(f"{path}: rope_scaling {old!r} and rope_parameters {new!r} "
                         "must be objects")
    theta = {**raw, **new, **old}.get("rope_theta", 10000.0)
    if not number(theta):
        raise ValueError(f"{path}: rope_theta must be a number above 0, not {theta!r}")
    plain = [{key: value for key, value in each.items() if key not in ("rope_theta", "type")}
             | {"rope_type": each.get("rope_type", each.get("type", "default"))}
             for each in (old, new) if each]
    if len(plain) == 2 and plain[0] != plain[1]:
        raise ValueError(f"{path}: rope_scaling {old} contradicts rope_parameters {new}")
    scaling = plain[0] if plain else {"rope_type": "default"}
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: partial_rotary_factor {scaling['partial_rotary_factor']!r} is "
                         "not supported, only 1")
    if scaling["rope_type"] == "default":
        return float(theta), None
    if scaling["rope_type"] not in ("llama3", "linear"):
        raise ValueError(f"{path}: rope_type {scaling['rope_type']!r} is not supported, only "
                         "'default', 'linear' or 'llama3'")
    if scaling["rope_type"] == "linear":
        if not number(scaling.get("factor")):
            raise ValueError(f"{path}: factor of rope_type linear must be a number above 0, not "
                             f"{scaling.get('factor')!r}")
        return float(theta), {"rope_type": "linear", "factor": scaling["factor"]}
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    for key in keys:
        if not number(scaling.get(key)):
            raise ValueError(f"{path}: {key} of rope_type llama3 must be a number above 0, not "
                             f"{scaling.get(key)!r}")
    if scaling["factor"] < 1 or scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"{path}: rope_type llama3 needs factor >= 1 and low_freq_factor < "
                         f"high_freq_factor, not {scaling}")
    return float(theta), {"rope_type": "llama3", **{key: scaling[key] for key in keys}}


# --------------------------------------------------------------------------------------------------

class Kind(NamedTuple):
    """What config.json of one model_type may say."""
    config: type
    complete: callable  # (config.json, its path) -> the fields that the file has under other names
    required: tuple  # keys whose absence would mean another number in `transformers` than here
    # {key: the values that mean what we compute}; the first one is that of an absent key
    expected: dict


def llama(*required, attention_bias=(False,)):
    """The Kind of one of Llama's model_types."""
    return Kind(LlamaConfig, complete_llama,
                ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "max_position_embeddings", "rms_norm_eps", *required,),
                {"hidden_act": ("silu",), "attention_bias": attention_bias, "mlp_bias": (False,),
                 "attention_dropout": (0.0,), "partial_rotary_factor": (1.0, None),
                 "rope_interleaved": (False,), "use_sliding_window": (False,),
                 "use_mrope": (False,), "add_cross_attention": (False,),
                 "quantization_config": (None,),})


KINDS = {"gpt2": Kind(GPTConfig, complete_gpt2, (),
                      {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                       "tie_word_embeddings": (True,), "scale_attn_weights": (True,),
                       "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
                       "reorder_and_upcast_attn": (False,), "quantization_config": (None,),}),
         "roberta": Kind(RobertaConfig, complete_roberta,
                         ("vocab_size", "max_position_embeddings", "hidden_size",
                          "num_hidden_layers", "num_attention_heads", "intermediate_size",
                          "layer_norm_eps",),
                         {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
                          "type_vocab_size": (1,), "tie_word_embeddings": (True,),
                          "is_decoder": (False,), "add_cross_attention": (False,),
                          "bos_token_id": (0,), "pad_token_id": (1,), "eos_token_id": (2,),
                          "quantization_config": (None,),}), "llama": llama(),
         "mistral": llama("num_key_value_heads"),
         "qwen2": llama("num_key_value_heads", attention_bias=(True,)),
         "qwen3": llama("num_key_value_heads", "head_dim"),}
