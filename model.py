"""GPT-2 and RoBERTa, small enough to read in one sitting. They know nothing of adapters.

GPT      Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": reads from left to right, LayerNorm
         before each part of a block, output projection tied to the token embedding.
RoBERTa  Liu et al. 2019, arXiv:1907.11692: reads in both directions, LayerNorm after each part; a head that predicts
         masked tokens, or one that classifies the whole text.

Three things differ from the usual code: q, k and v are separate linears in both (GPT-2 stores them fused as `c_attn`;
they are split on loading), so that an adapter on "q" and "v" is an adapter on q and v; the vocabulary is projected onto
only at positions that have a target, a few of them at a time; and the base has no dropout of its own, which the
published configs set to 0.1.

Shapes: B batch, T time, C channels, nh heads, hs = C / nh, V vocabulary, L labels, S length of the cache.
"""
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hub

ROOT = Path(__file__).resolve().parent
# Names for checkpoints: the two that are shipped, and the hub's
MODELS = {"tiny-gpt": ROOT / "data/tiny-gpt", "tiny-roberta": ROOT / "data/tiny-roberta",
          **{f"gpt2{s}": f"openai-community/gpt2{s}" for s in ("", "-medium", "-large", "-xl")},
          **{f"roberta-{s}": f"FacebookAI/roberta-{s}" for s in ("base", "large")}}


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C). mask (B, 1, 1 or T, S): True where a position may be looked at; None: causal.

    cache (2, B, S, nh, hs), at: keys and values of what was seen, and the index (rows, positions) where x's go.
    """

    def __init__(self, C, n_head):
        super().__init__()
        if C % n_head:
            raise ValueError(f"{C} channels are no multiple of {n_head} heads")
        self.n_head = n_head
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, mask=None, cache=None, at=None):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, -1) for f in (self.q, self.k, self.v))  # (B, T, nh, hs) each
        if cache is not None:
            cache[0][at], cache[1][at] = k.to(cache.dtype), v.to(cache.dtype)
            k, v = cache  # (B, S, nh, hs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T or S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C). approximate: "tanh" is GPT-2's GELU, "none" is the exact one, RoBERTa's."""

    def __init__(self, C, inner, approximate):
        super().__init__()
        self.up = nn.Linear(C, inner)
        self.down = nn.Linear(inner, C)
        self.approximate = approximate

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def picked(x, targets):
    """x (B, T, C), targets (B, T) -> the N rows of x that have a target (N, C), and these targets (N,).

    Targets may stay on the CPU: then picking the positions makes a GPU wait for nothing.
    """
    targets = targets.flatten()
    where = (targets != -100).nonzero().flatten()  # (N,)
    x = x.flatten(0, 1).index_select(0, where.to(x.device, non_blocking=True))
    return x, targets[where].to(x.device, non_blocking=True)


CHUNK = 2**25  # logits at a time: 134 MB in fp32, where 2,048 tokens of GPT-2 have 412 MB, thrice to autograd


class VocabularyLoss(torch.autograd.Function):
    """Mean cross entropy in nats of logits z = x W^T + b (N, V), of which at most CHUNK numbers are in memory at once.

    x (N, C), W (V, C), b (V,) or None, targets (N,). With e = exp(z - max z), s = sum e and, for label smoothing eps,
    q = (1 - eps) onehot + eps / V

        loss = mean(log s + max z - sum q z)        N dloss/dz = softmax(z) - q = (e - s q) / s

    The gradient needs nothing but the logits, so forward computes it while they are there, in their place: no product
    is done twice, and backward finds dloss/dx (N, C) ready. A frozen W costs nothing.
    """

    @staticmethod
    def forward(ctx, x, W, b, targets, eps, train):
        N, V, loss = len(x), len(W), 0
        dx, dW, db = (torch.zeros_like(t) if train and needed else None
                      for t, needed in zip((x, W, b), ctx.needs_input_grad[:3], strict=True))
        n = max(1, CHUNK // V)
        for i in range(0, N, n):
            x_n, t = x[i:i + n], targets[i:i + n, None]
            z = F.linear(x_n, W, b)  # (n, V)
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            # q z = (1 - eps) z_t + eps mean z
            qz = (1 - eps) * z.gather(1, t) + (eps * z.mean(1, keepdim=True) if eps else 0)
            top = z.amax(1, keepdim=True)
            e = z.sub_(top).exp_()
            s = e.sum(1, keepdim=True)
            loss = loss + (s.log() + top - qz).sum() / N
            if dx is not None or dW is not None or db is not None:
                # s N dloss/dz = e - s q; the factor 1 / s goes to the smaller tensors, unless they are narrow
                dz = e.scatter_add_(1, t, (eps - 1) * s)
                dz = dz.sub_(eps / V * s) if eps else dz
                if db is not None:
                    db += (dz / s).sum(0) / N
                if W.dtype != dz.dtype:
                    dz, s = dz.div_(s).to(W.dtype), 1
                if dx is not None:
                    dx[i:i + n] = dz @ W / (s * N)
                if dW is not None:
                    dW += dz.T @ (x_n / (s * N)).to(dz.dtype)
                del dz
            del z, e  # before the next chunk is made
        ctx.save_for_backward(dx, dW, db)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return *(None if d is None else gradient * d for d in ctx.saved_tensors), None, None, None


def vocabulary_loss(x, W, b, targets, label_smoothing=0.0):
    """VocabularyLoss; NaN, as F.cross_entropy says, where there is no target at all."""
    if not len(x):
        return x.sum() * math.nan
    return VocabularyLoss.apply(x, W, b, targets, label_smoothing, torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2

@dataclass
class GPTConfig:  # names as in GPT-2's config.json
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP, 4 C unless told
    layer_norm_epsilon: float = 1e-5


class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.attn = Attention(C, config.n_head)
        self.ln_2 = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.mlp = MLP(C, config.n_inner or 4 * C, "tanh")  # "gelu_new" in GPT-2's config

    def forward(self, x, mask=None, cache=None, at=None):
        x = x + self.attn(self.ln_1(x), mask, cache, at)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """(B, T) token ids -> logits of the next tokens; ValueError beyond `context` tokens."""

    classifier, fresh_head = None, False  # what a RoBERTa may have

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.context = config.n_positions  # the longest sequence, in tokens
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's init: writers into the residual stream shrink with the root of their number
                writes = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, pos=None):
        """(B, T) token ids -> (B, T, C), before the last LayerNorm.

        With a cache (L, 2, B, S, nh, hs), `pos` (B, T) says where each token stands; it looks at all up to there. Or
        `pos` is a number: 0 for whole prompts that fill the cache, S - 1 for one more token a row.
        """
        if idx.size(1) > self.context:
            raise ValueError(f"{idx.size(1)} tokens do not fit the model's context of {self.context}")
        if cache is None:
            x = self.wte(idx) + self.wpe.weight[: idx.size(1)]
            for block in self.h:
                x = block(x)
            return x
        if isinstance(pos, int):  # slices and no mask: many small operations less
            at, mask = (slice(None), slice(pos, None)), None
            x = self.wte(idx) + self.wpe.weight[pos:pos + idx.size(1)]
        else:
            at = torch.arange(len(idx), device=idx.device)[:, None], pos
            mask = (torch.arange(cache.size(3), device=idx.device) <= pos[..., None])[:, None]  # (B, 1, T, S)
            x = self.wte(idx) + self.wpe(pos)
        for block, kept in zip(self.h, cache, strict=True):
            x = block(x, mask, kept, at)
        return x

    def head(self, x):
        """(..., C) -> (..., V). The output matrix is the token embedding."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """(logits of every position (B, T, V), None), or with targets (B, T) (None, the mean cross entropy in nats of
        the positions that have one); -100 marks a position without a target.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x), None
        x, targets = picked(x, targets)
        return None, vocabulary_loss(self.ln_f(x), self.wte.weight, None, targets, label_smoothing)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors as `transformers` reads and writes them for GPT-2."""
        config = {**asdict(self.config), "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                  "activation_function": "gelu_new", "tie_word_embeddings": True}
        save(folder, config, to_gpt2(self.state_dict()), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# RoBERTa

@dataclass
class RobertaConfig:  # names as in RoBERTa's config.json; the numbers are roberta-base's
    vocab_size: int = 50265
    max_position_embeddings: int = 514  # the first pad_token_id + 1 of them are never a token's
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1


class RobertaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.attn = Attention(C, config.num_attention_heads)
        self.ln_1 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.mlp = MLP(C, config.intermediate_size, "none")
        self.ln_2 = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x, mask):
        x = self.ln_1(x + self.attn(x, mask))
        return self.ln_2(x + self.mlp(x))


class LMHead(nn.Module):
    """(..., C) -> (..., V): which token was masked. The output matrix is the token embedding `wte`."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def features(self, x):
        """(..., C) -> (..., C), what the embedding is multiplied with."""
        return self.layer_norm(F.gelu(self.dense(x)))

    def forward(self, x, wte):
        return F.linear(self.features(x), wte.weight, self.bias)


class Classifier(nn.Module):
    """(B, T, C) -> (B, L), from the first token, <s>."""

    def __init__(self, config, num_labels):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)
        for linear in (self.dense, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x[:, 0])))


class RoBERTa(nn.Module):
    """num_labels 0: a masked language model; 1: regression; more: a classifier. The other head is None.

    fresh_head: whether `from_pretrained` had to make it.
    """

    def __init__(self, config, num_labels=0):
        super().__init__()
        C = config.hidden_size
        self.config, self.num_labels, self.fresh_head = config, num_labels, False
        self.context = config.max_position_embeddings - config.pad_token_id - 1  # the longest sequence, in tokens
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.max_position_embeddings, C)
        self.wtt = nn.Embedding(1, C)  # token types: a leftover of BERT, with a single row
        self.ln = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.h = nn.ModuleList(RobertaBlock(config) for _ in range(config.num_hidden_layers))
        self.lm_head = None if num_labels else LMHead(config)
        for name, p in self.named_parameters():  # BERT's init
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.classifier = Classifier(config, num_labels) if num_labels else None

    def hidden(self, idx):
        """(B, T) token ids, padded anywhere with the padding id -> (B, T, C)."""
        if idx.size(1) > self.context:
            raise ValueError(f"{idx.size(1)} tokens do not fit the model's context of {self.context}")
        real = idx != self.config.pad_token_id  # (B, T)
        # positions count the real tokens, from pad_token_id + 1; padding stands at pad_token_id
        pos = real.cumsum(1) * real + self.config.pad_token_id
        x = self.ln(self.wte(idx) + self.wpe(pos) + self.wtt.weight[0])
        for block in self.h:
            x = block(x, real[:, None, None])  # nobody looks at padding
        return x

    def forward(self, idx, labels=None, label_smoothing=0.0):
        """(logits, loss); without labels the loss is None.

        Classifier: logits (B, L), labels (B,) whole numbers, the mean cross entropy in nats. Regression: logits (B, 1),
        labels (B,) real numbers, the mean squared error. Masked LM: as GPT, -100 where nothing is asked.
        """
        x = self.hidden(idx)
        if self.classifier:
            logits = self.classifier(x)
            if labels is None:
                return logits, None
            labels = labels.to(x.device, non_blocking=True)
            if self.num_labels == 1:
                return logits, F.mse_loss(logits.squeeze(1).float(), labels)
        else:
            if labels is None:
                return self.lm_head(x, self.wte), None
            x, labels = picked(x, labels)
            head = self.lm_head
            return None, vocabulary_loss(head.features(x), self.wte.weight, head.bias, labels, label_smoothing)
        return logits, F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors as `transformers` reads and writes them for RoBERTa."""
        kind = "ForSequenceClassification" if self.num_labels else "ForMaskedLM"
        config = {**asdict(self.config), "model_type": "roberta", "architectures": [f"Roberta{kind}"],
                  "hidden_act": "gelu", "type_vocab_size": 1, "tie_word_embeddings": True, "bos_token_id": 0,
                  "eos_token_id": 2}
        if self.num_labels:  # `transformers` counts the labels by their names
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
            config["problem_type"] = "regression" if self.num_labels == 1 else "single_label_classification"
        save(folder, config, {roberta_name(key): t for key, t in self.state_dict().items()}, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: the files

def write(path, write_to):
    """Let `write_to(temporary path)` write a file, then put it in its place at once: it is whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        write_to(part)
        part.chmod(0o644)  # safetensors would leave it 0600
        os.replace(part, path)
    except (OSError, SafetensorError) as e:  # a full disk is either of them
        raise OSError(f"{path} cannot be written: {e}") from None
    finally:
        if part.is_file():
            part.unlink()


def save(folder, config, state, dtype):
    """Write a checkpoint folder."""
    state = {key: t.detach().to("cpu", dtype).contiguous() for key, t in state.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", lambda part: save_file(state, part, {"format": "pt"}))
    write(folder / "config.json", lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))


# model_type -> (our config, what we compute: other values of these keys would be another model)
CONFIGS = {
    "gpt2": (GPTConfig, {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "tie_word_embeddings": (True,),
                         "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                         "add_cross_attention": (False,), "reorder_and_upcast_attn": (False,)}),
    "roberta": (RobertaConfig, {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
                                "type_vocab_size": (1,), "tie_word_embeddings": (True,), "is_decoder": (False,),
                                "add_cross_attention": (False,), "bos_token_id": (0,), "pad_token_id": (1,),
                                "eos_token_id": (2,)}),
}


def read_config(folder):
    """GPTConfig or RobertaConfig of a checkpoint folder; ValueError for anything this file does not compute exactly."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is no checkpoint folder: it holds no config.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only 'gpt2' or 'roberta'")
    Config, expected = CONFIGS[kind]
    for key, good in expected.items():
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
            most = 1000 if name in ("n_layer", "num_hidden_layers") else 2**20  # nobody's model, but a damaged file's
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{path}: {name} must be a whole number in 1..{most}, not {value!r}")
    C, heads = (("n_embd", "n_head") if kind == "gpt2" else ("hidden_size", "num_attention_heads"))
    if getattr(config, C) % getattr(config, heads):
        raise ValueError(f"{path}: {C} {getattr(config, C)} is no multiple of {heads} {getattr(config, heads)}")
    if kind == "roberta" and min(config.max_position_embeddings - 2, config.vocab_size - 1) < 4:
        raise ValueError(f"{path}: max_position_embeddings {config.max_position_embeddings} or vocab_size "
                         f"{config.vocab_size} leaves nothing beside what RoBERTa needs for itself")
    return config


def read_json(path):
    """The JSON object in a file; ValueError if it holds none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError, OSError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def read_safetensors(path):
    """{name: tensor} of one file; ValueError when it is missing, cut short or no safetensors at all."""
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file: {e}") from None
    for name, t in found.items():
        if t.is_complex():
            raise ValueError(f"{path}: {name} is of complex numbers")
    return found


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
    that the checkpoint has. A head that it does not have is a fresh one, and a line says so. ValueError for a
    checkpoint that is incomplete or of another kind.
    """
    folder = locate(source)
    config, path = read_config(folder), folder / "model.safetensors"
    state = {key: t.float() for key, t in read_safetensors(path).items()}
    with torch.device("meta"):  # no memory, no initial values: the file brings both
        if isinstance(config, GPTConfig):
            if num_labels:
                raise ValueError(f"{source} is a GPT-2, which has no classification head here: choose a RoBERTa")
            model, state = GPT(config), from_gpt2(state, path)
        else:
            own = state.get("classifier.out_proj.weight", torch.empty(0))
            model = RoBERTa(config, own.shape[0] if num_labels is None and own.dim() else num_labels or 0)
            state = from_roberta(state, path)
    if isinstance(model, RoBERTa):
        state = fit_head(state, model, source, path)
    check_keys(state, model.state_dict(), path)
    model.load_state_dict({key: t.contiguous() for key, t in state.items()}, assign=True)
    return model


def fit_head(state, model, source, path):
    """The state with the head that the model asks for: the checkpoint's, or a fresh one."""
    name, other = ("classifier", "lm_head") if model.classifier else ("lm_head", "classifier")
    state = {key: t for key, t in state.items() if not key.startswith(other + ".")}
    found = state.get("classifier.out_proj.weight")
    if found is not None and found.shape[:1] != (model.num_labels,):  # pretrained on another task
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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: the names. GPT-2 keeps its linears as Conv1D, weight (d_in, d_out): the transpose of nn.Linear.

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


ROBERTA_NAMES = {
    "wte": "embeddings.word_embeddings", "wpe": "embeddings.position_embeddings",
    "wtt": "embeddings.token_type_embeddings", "ln": "embeddings.LayerNorm",
    "attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense", "ln_1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "ln_2": "output.LayerNorm",
}


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
