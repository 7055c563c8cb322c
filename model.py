"""GPT-2, Llama and RoBERTa: the architectures and nothing else. They know nothing of adapters or of
files, but for one hook that the caller may set for activation checkpointing.

GPT      Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": reads from left
         to right, LayerNorm before each part of a block, output tied to the token embedding.
Llama    Touvron et al. 2023, arXiv:2302.13971: as GPT, with RMSNorm, rotary positions, a gated
         MLP, and no biases. In Llama 3 and Mistral heads share keys and values. Qwen 2 has a bias
         on q, k and v, and Qwen 3 has norms on q and k.
RoBERTa  Liu et al. 2019, arXiv:1907.11692: reads in both directions, LayerNorm after each part, and
         a head that predicts masked tokens or classifies the whole text.

All have one interface, so that nothing outside asks which of them it has: `config` with vocab_size,
context, width, n_layer, n_head, n_kv_head, head_dim and inner; `hidden(idx)`, (B, T) token ids ->
(B, T, C); `head(x)`, (..., C) -> (..., V); `forward(idx, targets=None) -> (logits, loss)`;
`classifier`, a module or None; `causal`: whether it can write.

Three things differ from the usual code. GPT-2's q, k and v are separate linears, so that an adapter
on "q" and "v" is an adapter on q and v. The vocabulary is projected onto only at positions that
have a target, a part of them at a time. The base has no dropout, which the published configs set to
0.1.

Shapes: B batch, T time, C = width channels, nh heads of queries, nkv heads of keys and values,
hs = head_dim, V vocabulary, L labels, S length of the cache.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from loss import vocabulary_loss, with_targets

# -------------------------------------------------------------------------------------------------
# What all three are made of

class Config:
    """What every config answers, whatever its family's config.json calls it. GPT-2 has names of its
    own."""
    width = property(lambda self: self.hidden_size)
    n_layer = property(lambda self: self.num_hidden_layers)
    n_head = property(lambda self: self.num_attention_heads)
    n_kv_head = property(lambda self: self.n_head)  # heads share keys and values in Llama only
    head_dim = property(lambda self: self.width // self.n_head)
    inner = property(lambda self: self.intermediate_size)  # width of the MLP


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C). mask (B, 1, 1 or T, S): True where a position may be attended to.
    None: causal.

    rope: cos and sin of `rotary`, or None. cache (2, B, S, nkv, hs): keys and values of earlier
    tokens. at: where x's own keys and values go in the cache, (rows, positions).
    qk_norm_eps: Qwen 3 has an RMSNorm over each head of q and of k."""

    def __init__(self, config, qkv_bias=True, o_bias=True, qk_norm_eps=None):
        super().__init__()
        C, nh, nkv, hs = config.width, config.n_head, config.n_kv_head, config.head_dim
        if hs == C // nh and C % nh:  # a config may give hs itself
            raise ValueError(f"{C} channels are not a multiple of {nh} heads")
        if nh % nkv:
            raise ValueError(f"{nh} heads are not a multiple of {nkv} heads of keys and values")
        self.head_dim, self.heads_per_kv = hs, nh // nkv  # so many heads share keys and values
        self.q = nn.Linear(C, nh * hs, bias=qkv_bias)
        self.k = nn.Linear(C, nkv * hs, bias=qkv_bias)
        self.v = nn.Linear(C, nkv * hs, bias=qkv_bias)
        self.o = nn.Linear(nh * hs, C, bias=o_bias)
        self.q_norm = nn.RMSNorm(hs, eps=qk_norm_eps) if qk_norm_eps else None
        self.k_norm = nn.RMSNorm(hs, eps=qk_norm_eps) if qk_norm_eps else None

    def forward(self, x, rope=None, mask=None, cache=None, at=None):
        q = self.q(x).unflatten(-1, (-1, self.head_dim))  # (B, T, nh, hs)
        k = self.k(x).unflatten(-1, (-1, self.head_dim))  # (B, T, nkv, hs)
        v = self.v(x).unflatten(-1, (-1, self.head_dim))  # (B, T, nkv, hs)
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache[0][at], cache[1][at] = k.to(cache.dtype), v.to(cache.dtype)
            k, v = cache  # (B, S, nkv, hs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh or nkv, T or S, hs)
        # Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): nh / nkv neighbouring
        # heads share keys and values. On a GPU, torch has a fast kernel for that in half precision
        # and without a mask only.
        grouped = self.heads_per_kv > 1
        if grouped and q.is_cuda and (mask is not None or q.dtype.itemsize > 2):
            k, v = (t.repeat_interleave(self.heads_per_kv, 1) for t in (k, v))
            grouped = False
        # a single new token sees all that is there
        causal = mask is None and (cache is None or x.size(1) > 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           enable_gqa=grouped)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C). approximate: "tanh" is GPT-2's GELU, "none" the exact one of
    RoBERTa."""

    def __init__(self, C, inner, approximate):
        super().__init__()
        self.up = nn.Linear(C, inner)
        self.down = nn.Linear(inner, C)
        self.approximate = approximate

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def initialise(module, residual_std=0.02):
    """BERT's and GPT-2's start: N(0, .02^2). What writes into the residual stream has
    N(0, residual_std^2)."""
    for name, p in module.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(p, std=residual_std if residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class Transformer(nn.Module):
    causal = False  # whether it can write
    # for activation checkpointing: a function of a block, the context_fn of torch.utils.checkpoint
    recompute = None

    def run(self, block, *inputs):
        """block(*inputs), or with activation checkpointing the same without keeping what it
        computes on the way."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False,
                              context_fn=lambda: self.recompute(block))
        return block(*inputs)


class Causal(Transformer):
    """What GPT and Llama share: (B, T) token ids -> logits of the next tokens. ValueError beyond
    `context` tokens. Both have the modules wte, wpe (None: positions are rotary), h, ln_f and
    lm_head (None: the output is tied to wte)."""

    causal, classifier = True, None

    def hidden(self, idx, cache=None, pos=0):
        """(B, T) token ids -> (B, T, C), before the last norm.

        With a cache (n_layer, 2, B, S, nkv, hs), `pos` (B, T) is the position of each token, which
        sees all up to there. Or `pos` is a number: 0 for whole prompts that fill the cache, S - 1
        for one more token a row."""
        T, mask = idx.size(1), None
        if T > self.context:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.context}")
        if isinstance(pos, int):  # slices and no mask: fewer small operations
            at = slice(None), slice(pos, None)
            pos = torch.arange(pos, pos + T, device=idx.device)  # (T,)
        else:
            at = torch.arange(len(idx), device=idx.device)[:, None], pos
            past = torch.arange(cache.size(3), device=idx.device) <= pos[..., None]
            mask = past[:, None]  # (B, 1, T, S)
        # with norms in fp32 the sums are, too, on bf16 weights
        x = self.wte(idx).to(self.ln_f.weight.dtype)
        rope = None
        if self.wpe:
            x = x + self.wpe(pos)
        else:
            rope = rotary(pos, self.config)
        for n, block in enumerate(self.h):
            x = self.run(block, x, rope, mask, None if cache is None else cache[n], at)
        return x

    @property
    def output(self):  # (V, C)
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def head(self, x):
        """(..., C) -> (..., V): the last norm, then the output projection."""
        return F.linear(self.ln_f(x), self.output)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """(logits (B, T, V), None), or with targets (B, T) (None, their mean cross entropy in
        nats). -100 marks a position without a target."""
        x = self.hidden(idx)
        if targets is None:
            return self.head(x), None
        x, targets = with_targets(x, targets)
        return None, vocabulary_loss(self.ln_f(x), self.output, None, targets, label_smoothing)


# -------------------------------------------------------------------------------------------------
# GPT-2

@dataclass
class GPTConfig(Config):
    """Field names as in GPT-2's config.json."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP, 4 C unless told
    layer_norm_epsilon: float = 1e-5
    model_type, tied = "gpt2", True
    width = property(lambda self: self.n_embd)
    context = property(lambda self: self.n_positions)  # the longest sequence, in tokens
    inner = property(lambda self: self.n_inner or 4 * self.n_embd)


class GPTBlock(nn.Module):
    """(B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config.width, config.inner, "tanh")  # "gelu_new" in GPT-2's config.json

    def forward(self, x, rope=None, mask=None, cache=None, at=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache, at)
        return x + self.mlp(self.ln_2(x))


class GPT(Causal):
    def __init__(self, config):
        super().__init__()
        self.config, self.context = config, config.context
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.width, eps=config.layer_norm_epsilon)
        self.lm_head = None
        # as GPT-2: what writes into the residual stream starts smaller
        initialise(self, 0.02 / math.sqrt(2 * config.n_layer))


# -------------------------------------------------------------------------------------------------
# Llama

@dataclass
class LlamaConfig(Config):
    """Field names as in the config.json of llama, mistral, qwen2 and qwen3; the numbers are
    SmolLM2-135M's."""
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    max_position_embeddings: int = 8192
    sliding_window: int | None = None  # mistral: how far back a token sees
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = True
    model_type: str = "llama"
    n_kv_head = property(lambda self: self.num_key_value_heads)
    tied = property(lambda self: self.tie_word_embeddings)

    @property
    def context(self):
        return min(self.max_position_embeddings, self.sliding_window or math.inf)


def rotary(pos, config):
    """cos and sin (..., 1, hs / 2), fp32, of the angles pos * w_i by which rotary position
    embedding (Su et al. 2021, arXiv:2104.09864) turns the channels i and i + hs / 2 of every head.
    pos (...): positions of tokens."""
    # w_i = theta^(-2 i / hs), i = 0 .. hs / 2 - 1
    i = torch.arange(config.head_dim // 2, device=pos.device, dtype=torch.float32)
    w = config.rope_theta ** (-2 * i / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        # Chen et al. 2023, arXiv:2306.15595: every position is divided by the factor
        w = w / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        # Llama 3.1: slow rotations, with few turns in the original context, are slowed down further
        # by the factor
        turns = w * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        s = ((turns - low) / (high - low)).clamp(0, 1)
        w = (1 - s) * w / scaling["factor"] + s * w
    angle = pos[..., None, None] * w
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (B, T, heads, hs), its channel pairs (a, b) turned: (a cos - b sin, b cos + a sin)"""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, -1)  # (B, T, heads, hs / 2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GatedMLP(nn.Module):
    """(B, T, C) -> (B, T, C), SwiGLU (Shazeer 2020, arXiv:2002.05202)"""

    def __init__(self, C, inner):
        super().__init__()
        self.gate = nn.Linear(C, inner, bias=False)
        self.up = nn.Linear(C, inner, bias=False)
        self.down = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        # silu(z) = z / (1 + e^-z)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """(B, T, C) -> (B, T, C). RMSNorm is x / sqrt(mean(x^2) + eps) * weight: LayerNorm without its
    mean and its bias."""

    def __init__(self, config):
        super().__init__()
        kind, eps = config.model_type, config.rms_norm_eps
        self.ln_1 = nn.RMSNorm(config.width, eps=eps)
        self.attn = Attention(config, qkv_bias=kind == "qwen2", o_bias=False,
                              qk_norm_eps=eps if kind == "qwen3" else None)
        self.ln_2 = nn.RMSNorm(config.width, eps=eps)
        self.mlp = GatedMLP(config.width, config.inner)

    def forward(self, x, rope=None, mask=None, cache=None, at=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache, at)
        return x + self.mlp(self.ln_2(x))


class Llama(Causal):
    def __init__(self, config):
        super().__init__()
        self.config, self.context = config, config.context
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.width), None
        self.h = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.width, eps=config.rms_norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self, 0.02 / math.sqrt(2 * config.n_layer))  # as GPT-2


# -------------------------------------------------------------------------------------------------
# RoBERTa

@dataclass
class RobertaConfig(Config):
    """Field names as in RoBERTa's config.json; the numbers are roberta-base's."""
    vocab_size: int = 50265
    max_position_embeddings: int = 514  # the first pad_token_id + 1 of them are never a token's
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    model_type, tied = "roberta", True

    @property
    def context(self):
        return self.max_position_embeddings - self.pad_token_id - 1


class RobertaBlock(nn.Module):
    """(B, T, C) -> (B, T, C). mask (B, 1, 1, T): True at tokens that are no padding."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.attn = Attention(config)
        self.ln_1 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.mlp = MLP(C, config.inner, "none")
        self.ln_2 = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x, mask):
        x = self.ln_1(x + self.attn(x, mask=mask))
        return self.ln_2(x + self.mlp(x))


class LMHead(nn.Module):
    """(..., C) -> (..., C), what the token embedding is multiplied with, and the bias (V,) of the
    product."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.layer_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialise(self)

    def forward(self, x):
        return self.layer_norm(F.gelu(self.dense(x)))


class Classifier(nn.Module):
    """(B, T, C) -> (B, L), from the first token, <s>."""

    def __init__(self, config, num_labels):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, num_labels)
        initialise(self)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x[:, 0])))


class RoBERTa(Transformer):
    """num_labels 0: a masked language model; 1: regression; more: a classifier. The other head is
    None."""

    def __init__(self, config, num_labels=0):
        super().__init__()
        C = config.width
        self.config, self.context, self.num_labels = config, config.context, num_labels
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.max_position_embeddings, C)
        self.wtt = nn.Embedding(1, C)  # token types: a leftover of BERT, with a single row
        self.ln = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.h = nn.ModuleList(RobertaBlock(config) for _ in range(config.n_layer))
        self.lm_head = None if num_labels else LMHead(config)
        initialise(self)
        self.classifier = Classifier(config, num_labels) if num_labels else None

    def hidden(self, idx):
        """(B, T) token ids, padded anywhere with the padding id -> (B, T, C)."""
        if idx.size(1) > self.context:
            raise ValueError(f"{idx.size(1)} tokens do not fit the model's context of "
                             f"{self.context}")
        real = idx != self.config.pad_token_id  # (B, T)
        # positions count the real tokens, from pad_token_id + 1; padding stands at pad_token_id
        pos = real.cumsum(1) * real + self.config.pad_token_id
        x = self.wte(idx) + self.wpe(pos) + self.wtt.weight[0]
        x = self.ln(x.to(self.ln.weight.dtype))
        for block in self.h:
            x = self.run(block, x, real[:, None, None])  # nobody looks at padding
        return x

    def head(self, x):
        """(..., C) -> (..., V): which token was masked."""
        return F.linear(self.lm_head(x), self.wte.weight, self.lm_head.bias)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """(logits, loss). Masked LM: as GPT. Classifier: logits (B, L), targets (B,) whole numbers,
        the mean cross entropy in nats. Regression: logits (B, 1), targets (B,) real numbers, the
        mean squared error."""
        x = self.hidden(idx)
        if self.lm_head and targets is None:
            return self.head(x), None
        if self.lm_head:
            x, targets = with_targets(x, targets)
            return None, vocabulary_loss(self.lm_head(x), self.wte.weight, self.lm_head.bias,
                                         targets, label_smoothing)
        logits = self.classifier(x)
        if targets is None:
            return logits, None
        targets = targets.to(x.device, non_blocking=True)
        if self.num_labels == 1:
            return logits, F.mse_loss(logits.squeeze(1).float(), targets)
        return logits, F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
