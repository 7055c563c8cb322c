"""GPT-2, small enough to read in one sitting. It knows nothing of adapters.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": a pre-LayerNorm transformer with learned
positions and the output projection tied to the token embedding. Three things differ from the usual code: q, k and v
are separate linears (GPT-2 stores them fused as `c_attn`; they are split on loading), so that an adapter on "q" and "v"
is an adapter on q and v; the vocabulary is projected onto only at positions that have a target; and the base has no
dropout of its own, which GPT-2's config sets to 0.1.

Shapes: B batch, T time, C channels (n_embd), nh heads, hs = C / nh, V vocabulary, S length of the cache.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


@dataclass
class GPTConfig:  # names as in GPT-2's config.json
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP, 4 C unless told
    layer_norm_epsilon: float = 1e-5


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, cache=None, pos=None):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, -1) for f in (self.q, self.k, self.v))  # (B, T, nh, hs) each
        mask = None
        if cache is not None:  # (2, B, S, nh, hs): write k, v at their positions, then read everything up to them
            rows = torch.arange(B, device=x.device)[:, None]
            cache[0, rows, pos], cache[1, rows, pos] = k.to(cache.dtype), v.to(cache.dtype)
            k, v = cache  # (B, S, nh, hs)
            mask = (torch.arange(k.size(1), device=x.device) <= pos[..., None])[:, None]  # (B, 1, T, S)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T or S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, inner)
        self.down = nn.Linear(inner, config.n_embd)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # "gelu_new" in GPT-2's config


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=None):
        x = x + self.attn(self.ln_1(x), cache, pos)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's init; what writes into the residual stream shrinks with its number of writers
                writes = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, pos=None):
        """(B, T) token ids -> (B, T, C), before the last LayerNorm. With a cache, `pos` (B, T) says where each is."""
        if idx.size(1) > self.config.n_positions:
            raise ValueError(f"{idx.size(1)} tokens do not fit the model's context of {self.config.n_positions}")
        positions = self.wpe.weight[: idx.size(1)] if pos is None else self.wpe(pos)
        x = self.wte(idx) + positions
        for i, block in enumerate(self.h):
            x = block(x) if cache is None else block(x, cache[i], pos)
        return x

    def head(self, x):
        """(..., C) -> (..., V). The output matrix is the token embedding."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """Logits of every position (B, T, V) and None, or with targets (B, T) the logits of the N positions that have
        one (N, V) and their mean cross entropy in nats; -100 marks a position without a target.

        Targets may stay on the CPU: then picking the positions makes a GPU wait for nothing.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x), None
        targets = targets.flatten()
        where = (targets != -100).nonzero().flatten()  # (N,)
        x = x.flatten(0, 1).index_select(0, where.to(x.device, non_blocking=True))  # (N, C)
        logits = self.head(x)
        targets = targets[where].to(x.device, non_blocking=True)
        return logits, F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    @torch.no_grad()
    def generate(self, prompts, max_new, stop):
        """Greedy continuation of a list of token lists, each up to `stop` or `max_new` tokens, all decoded together.

        Prompts are padded on the right. What the padding wrote into the cache is overwritten, position by position, by
        the tokens generated there before anyone may look at it.
        """
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued: begin with <|endoftext|>")
        device = self.wte.weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        T = max(map(len, prompts))
        max_new = min(max_new, self.config.n_positions - T)
        if max_new < 1:
            raise ValueError(f"a prompt of {T} tokens leaves no room in a context of {self.config.n_positions}")
        idx = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
        B, nh = len(prompts), self.config.n_head
        cache = self.wte.weight.new_zeros(len(self.h), 2, B, T + max_new, nh, self.config.n_embd // nh)
        x = self.hidden(idx, cache, torch.arange(T, device=device).expand(B, T))
        x = x[torch.arange(B, device=device), lengths - 1]  # (B, C): each row's last real token
        out, done = [], torch.zeros(B, dtype=torch.bool, device=device)
        for t in range(max_new):
            token = self.head(x).argmax(-1)  # (B,)
            out.append(token)
            done |= token == stop
            if done.all() or t + 1 == max_new:
                break
            x = self.hidden(token[:, None], cache, (lengths + t)[:, None])[:, 0]
        rows = torch.stack(out, 1).tolist()
        return [row[: row.index(stop)] if stop in row else row for row in rows]

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors as `transformers` reads and writes them for GPT-2."""
        config = {**asdict(self.config), "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                  "activation_function": "gelu_new", "tie_word_embeddings": True}
        state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in to_gpt2(self.state_dict()).items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "model.safetensors", lambda part: save_file(state, part, {"format": "pt"}))
        write(folder / "config.json", lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints. GPT-2 keeps its linears as Conv1D, weight (d_in, d_out): the transpose of nn.Linear.

def write(path, write_to):
    """Let `write_to(temporary path)` write a file, then put it in its place at once: it is whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        write_to(part)
        part.chmod(0o644)
        os.replace(part, path)
    except (OSError, SafetensorError) as e:  # a full disk is either of them
        raise OSError(f"{path} cannot be written: {e}") from None
    finally:
        if part.is_file():
            part.unlink()


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


def read_config(folder):
    """GPTConfig of a checkpoint folder; ValueError for anything this file does not compute exactly."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint folder: it holds no config.json") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object")
    expected = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "tie_word_embeddings": (True,), "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
                "reorder_and_upcast_attn": (False,)}
    for key, good in expected.items():
        if raw.get(key, good[0]) not in good:
            raise ValueError(f"{path}: {key} {raw[key]!r} is not supported, only {' or '.join(map(repr, good))}")
    config = GPTConfig(**{f.name: raw[f.name] for f in fields(GPTConfig) if f.name in raw})
    for name, value in asdict(config).items():
        if name == "layer_norm_epsilon":
            if not (isinstance(value, float) and 0 < value < 1):
                raise ValueError(f"{path}: {name} must be in (0, 1), not {value!r}")
        elif not (name == "n_inner" and value is None):
            most = 1000 if name == "n_layer" else 2**20  # nobody's model, but somebody's damaged file
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{path}: {name} must be a whole number in 1..{most}, not {value!r}")
    return config


def read_safetensors(path):
    """{name: tensor} of one file; ValueError when it is missing, cut short or no safetensors at all."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file: {e}") from None


def check_keys(found, wanted, where):
    """Refuse a state dict with missing, unexpected or mis-shaped entries, naming the first of them."""
    for what, keys in (("lacks", wanted.keys() - found.keys()), ("holds unexpected", found.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{where} {what} {min(keys)}{more}")
    for key, t in wanted.items():
        if found[key].shape != t.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(found[key].shape)}, not {tuple(t.shape)}")


def locate(source):
    """A local checkpoint folder for a folder or a Hugging Face hub id."""
    if Path(source).is_dir():
        return Path(source)
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ValueError(f"model folder {source} does not exist")
    from huggingface_hub import snapshot_download  # not needed, and slow to import, for a local folder
    from huggingface_hub.errors import HFValidationError
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", "model.safetensors", "*.tiktoken"],
                                      etag_timeout=5))
    except (OSError, HFValidationError) as e:
        raise ValueError(f"model {source!r} is neither a folder nor to be had from the hub ({type(e).__name__}): "
                         "give --model a folder with config.json and model.safetensors") from None


def from_pretrained(source):
    """folder or hub id -> GPT in fp32 on the CPU. ValueError for a checkpoint that is incomplete or of another kind."""
    folder = locate(source)
    with torch.device("meta"):  # no memory, no initial values: the file brings both
        model = GPT(read_config(folder))
    path = folder / "model.safetensors"
    state = {k: v.float().contiguous() for k, v in from_gpt2(read_safetensors(path), path).items()}
    check_keys(state, model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    return model
