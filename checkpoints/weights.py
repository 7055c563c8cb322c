"""The weights of a checkpoint folder: from the files that people have to one state dict in the
hub's own names.

    read_weights(folder)   {name in the file: tensor}, of one file or of shards with an index
    standard(state, …)     {the hub's name: tensor}, without what the model does not compute
"""
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

import qlora
from checkpoints.files import fingerprint, read_json, read_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = SINGLE, INDEX, "model-*-of-*.safetensors"  # what is downloaded
PICKLED = "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf"
# what torch's DataParallel and compile put before every name
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


def weight_files(folder):
    """[path], one or the shards that an index names. ValueError, with what is there instead, if
    there are none."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise ValueError(instead(folder))
    index, shards = folder / INDEX, read_index(folder)
    for file in sorted(set(shards.values())):
        if not (folder / file).exists():
            raise ValueError(f"{index} names {file}, which does not exist")
    return [folder / file for file in sorted(set(shards.values()))]


def read_index(folder):
    """{tensor: the file that has it} of the index of shards."""
    shards = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(shards, dict) and shards
            and all(isinstance(file, str) and Path(file).name == file for file in shards.values())):
        raise ValueError(f"{folder / INDEX} is damaged: its weight_map must say for each tensor "
                         "which file of the folder has it")
    return shards


def instead(folder):
    """In words, what a folder without model.safetensors holds, and what to do about it."""
    if (folder / "adapter_config.json").exists():
        return (f"{folder} is an adapter and no model: give its base as --model, and the adapter "
                f"as --init-from {folder}")
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return (f"{folder} has its weights in {pickled[0]}, and only safetensors are read here. In "
                "transformers, "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder) writes "
                "model.safetensors (of a RoBERTa: AutoModelForMaskedLM or "
                "AutoModelForSequenceClassification)")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return (f"{folder} has no {SINGLE}" + f", only {', '.join(others[:3])}: rename it if it is the "
            "model" * bool(others))


def read_weights(folder):
    """{name in the file: tensor}"""
    state, files = {}, weight_files(folder)
    for path in files:
        state.update(read_safetensors(path))
    if files[0].name != SINGLE and state.keys() != (named := read_index(folder).keys()):
        raise ValueError(f"{folder / INDEX} and its files have different tensors: "
                         f"{min(state.keys() ^ named)}")
    return state


def take_packed(state, folder):
    """{id of a tensor: qlora.NF4} of the matrices that bitsandbytes has turned to 4 bits. Each has
    six tensors in the files: they leave the state, and one without content stands for them."""
    packed, end = {}, ".quant_state.bitsandbytes__nf4"
    for key in [key for key in state if key.endswith(end)]:
        name = key.removesuffix(end)
        try:
            about = json.loads(bytes(state.pop(key).tolist()))
            parts = {part: state.pop(f"{name}.{part}") for part in
                     ("absmax", "nested_absmax", "quant_map", "nested_quant_map")}
            sizes = about["blocksize"], about["nested_blocksize"]
            values = parts["quant_map"].tolist(), parts["nested_quant_map"].tolist()
            ours = [*qlora.NF4_VALUES], qlora.D.tolist()
            if sizes != (qlora.BLOCK, qlora.BLOCK_2) or values != ours:
                raise ValueError(f"its blocks of {sizes} or its values are not those of nf4")
            W = qlora.NF4(about["shape"], torch.float32, state[name].flatten(), parts["absmax"],
                          parts["nested_absmax"], torch.tensor([about["nested_offset"]]))
        except (ValueError, KeyError, TypeError, RuntimeError) as e:
            raise ValueError(f"{folder}: {name} is no matrix in 4 bits that can be read, with "
                             f"double quantisation: {e!r}") from None
        state[name] = torch.empty(W.shape, device="meta")
        packed[id(state[name])] = W
    return packed


def stored_dtype(folder):
    """torch's dtype of the first matrix in the files."""
    with safe_open(weight_files(folder)[0], "pt") as f:
        return next((f.get_tensor(name).dtype for name in f.keys()
                     if len(f.get_slice(name).get_shape()) > 1), None)


def fingerprint_weights(folder):
    """16 hex digits that change with the bytes of the files that hold the weights. Files above
    64 MB, which would take seconds, are known by their size, their header and a megabyte in 256
    pieces."""
    prints = [fingerprint(path) if path.stat().st_size <= 2**26 else sampled(path)
              for path in weight_files(folder)]
    return prints[0] if len(prints) == 1 else fingerprint(prints)


def sampled(path):
    """A fingerprint of a large file of safetensors: its first 8 bytes say how long the header
    is."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = min(int.from_bytes(f.read(8), "little"), 2**24)
        pieces = [size, f.read(header)]
        for i in range(256):
            f.seek((size - 4096) * i // 255)
            pieces.append(f.read(4096))
    return fingerprint(pieces)


def short(key):
    """A name in the file without wrappers, and a LayerNorm's old names gamma and beta,
    TensorFlow's, as today's."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", WRAPPERS.sub("", key)))


def standard(state, expected, head, prefix, tied, ignored, where):
    """({the hub's name: tensor}, {the hub's name: the name in the file}, heads of other tasks that
    were left out).

    expected: the hub's names of what the model computes; head: how those of its head begin. prefix:
    that of all others, which a bare model's file does without. tied: {name: the name of the same
    tensor}; a file may have both, or one. ignored: a regular expression of names, without the
    prefix, that carry nothing. Whatever else stands beside the prefix is the head of another task.
    An unknown name behind the prefix stays, for check_keys to refuse.
    """
    has_prefix = any(short(key).startswith(prefix) for key in state)
    out, origin, heads = {}, {}, set()
    for key, t in state.items():
        name = short(key)
        if not has_prefix and name not in tied and (prefix + name in expected
                                                    or name not in expected):
            name = prefix + name
        if re.match(ignored, name.removeprefix(prefix)):
            continue
        # classifier.weight is the whole head of a model that labels each token
        ours = name.startswith((prefix, head)) and name not in ("classifier.weight",
                                                                "classifier.bias")
        if not ours and name not in expected and name not in tied:
            heads.add(name.split(".")[0])
        elif name in origin:
            raise ValueError(f"{where} holds both {origin[name]} and {key}")
        else:
            out[name], origin[name] = t, key
    for name, same in tied.items():
        if name not in out:
            continue
        t, key = out.pop(name), origin.pop(name)
        if same in out and not torch.equal(t, out[same]):
            raise ValueError(f"{where}: {key} differs from {origin[same]}, only tied heads are "
                             "supported")
        if same not in out and same in expected:
            out[same], origin[same] = t, key
    return out, origin, heads
