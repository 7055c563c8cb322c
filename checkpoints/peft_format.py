"""What a PEFT adapter folder says: which settings make a plain LoRA, which tensors it has, which
scale.

    read_adapter(folder) -> (config, tensors, names in the file)
"""
import math
import re

import regex

from checkpoints.files import read_json, read_safetensors
from checkpoints.weights import short

PREFIX = "base_model.model."  # PEFT's, before every key
# The first value is also what an absent key means. With others the adapter is no plain LoRA: PEFT's
# pissa, olora, corda and the like change W itself, again at every loading.
PLAIN = {"peft_type": ("LORA",), "bias": ("none",),
         "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
# Keys that say where an adapter is and how it was trained. Any other key that is set makes it
# another method: DoRA's use_dora, KaSA's kasa_config, a bias on B, trained embeddings, …
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
        "fan_in_fan_out", "lora_dropout", "task_type", "auto_mapping", "peft_version",
        "base_model_name_or_path", "revision", "inference_mode", "megatron_config", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        "runtime_config", "ensure_weight_tying", "velora_config", "monteclora_config"}
# What these two need while they train, and an evaluation does not
TRAINING_ONLY = {"velora_config": ".lora_velora_embed",
                 "monteclora_config": ".lora_monteclora_sampler."}


def read_adapter(folder):
    """(config, {name: tensor}, {name: the name in the file}) of an adapter folder, names without
    PEFT's prefix; ValueError for what is no plain LoRA."""
    if not (folder / "adapter_config.json").exists() and (folder / "config.json").exists():
        raise ValueError(f"{folder} is a model and no adapter: give it as --model")
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for key, good in PLAIN.items():
        if config.get(key, good[0]) not in good:
            raise ValueError(f"{folder}: {key} {config[key]!r} is not supported, only "
                             f"{' or '.join(map(repr, good))}")
    for key, value in config.items():
        if value and key not in PLAIN.keys() | READ:
            raise ValueError(f"{folder}: {key} {str(value)[:60]} is not supported, an adapter with "
                             "it is no plain LoRA")
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder} has its weights in adapter_model.bin, and only safetensors are "
                         "read here: PEFT's PeftModel.from_pretrained(base, "
                         "folder).save_pretrained(folder) writes them")
    tensors, origin = {}, {}
    for key, t in read_safetensors(path).items():
        name = short(key)
        if not name.startswith(PREFIX):
            raise ValueError(f"{path}: {key} does not begin with {PREFIX}")
        if any(config.get(flag) and part in name for flag, part in TRAINING_ONLY.items()):
            continue
        if not t.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or inf")
        if "lora_" in name and (t.dim() != 2 or not t.numel()):
            raise ValueError(f"{path}: {key} has shape {tuple(t.shape)}, which is no matrix")
        # torch.compile wraps the model inside of PEFT's; a raw state dict has the adapter's name in
        # it
        name = re.sub(r"\.(modules_to_save\.)?default\.", ".", short(name.removeprefix(PREFIX)))
        tensors[name], origin[name] = t.float(), key
    return config, tensors, origin


def take_head(tensors, prefix):
    """Take the head out of the tensors of an adapter: (our classifier's, names of heads of other
    tasks). What lies beside the prefix and is no factor is a head, but for lm_head, which no
    adapter changes."""
    beside = [name for name in tensors if "lora_" not in name
              and not name.startswith((prefix, "lm_head."))]
    kept = [name for name in beside if name.startswith("classifier.") and name.count(".") > 1]
    others = sorted({name.split(".")[0] for name in beside if name not in kept})
    taken = {name: tensors.pop(name) for name in beside}
    return {name: taken[name] for name in kept}, others


def peft_scaling(config, module, rank, where):
    """PEFT's lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. The first pattern that
    matches the end of the module's name, as a regular expression, goes before either."""
    def of(name, default):
        try:
            # of the library `regex`, because that gives up on a pattern that does not end
            values = [value for key, value in (config.get(f"{name}_pattern") or {}).items()
                      if regex.fullmatch(rf"(.*\.)?({key})", module, timeout=1)]
        except (regex.error, AttributeError, OverflowError, RecursionError, TimeoutError,
                MemoryError) as e:
            raise ValueError(f"{where}: {name}_pattern {str(config[f'{name}_pattern'])[:80]} is "
                             f"not a valid pattern: {e}") from None
        return values[0] if values else config.get({"rank": "r", "alpha": "lora_alpha"}[name],
                                                   default)
    r, alpha = of("rank", 8), of("alpha", 8)
    if r != rank or type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e30:
        raise ValueError(f"{where}: {module} has rank {rank}, its config says r {r!r} and "
                         f"lora_alpha {alpha!r}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)
