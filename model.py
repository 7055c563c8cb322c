"""GPT-2 and RoBERTa: the architectures and nothing else. They know nothing of adapters or of files.

GPT      Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": reads from left to right, LayerNorm
         before each part of a block, output projection tied to the token embedding.
RoBERTa  Liu et al. 2019, arXiv:1907.11692: reads in both directions, LayerNorm after each part, and a head that
         predicts masked tokens or classifies the whole text.

Both have one interface, so that nothing outside asks which of them it has: `config` with vocab_size, context, width,
n_layer, n_head, n_kv_head, head_dim and inner; `hidden(idx)`, (B, T) token ids -> (B, T, C); `head(x)`, (..., C) ->
(..., V); `forward(idx, targets=None) -> (logits, loss)`; `classifier`, a module or None; `causal`: can it write.

Three things differ from the usual code. q, k and v are separate linears (GPT-2 stores them fused as `c_attn`; they are
split on loading), so that an adapter on "q" and "v" is an adapter on q and v. The vocabulary is projected onto only at
positions that have a target, a part of them at a time. The base has no dropout, which the published configs set to 0.1.

Shapes: B batch, T time, C = width channels, nh heads, hs = head_dim, V vocabulary, L labels, S length of the cache.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import LinearCrossEntropyOptions


class Config:  # what every config answers, whatever names its family's config.json has for it
    head_dim = property(lambda self: self.width // self.n_head)
    n_kv_head = property(lambda self: self.n_head)  # no heads share their keys and values here


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C). mask (B, 1, 1 or T, S): True where a position may be attended to; None: causal.

    cache (2, B, S, nh, hs): keys and values of earlier tokens. at: the index (rows, positions) where x's are stored."""

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


def with_targets(x, targets):
    """x (B, T, C), targets (B, T) -> the N rows of x with a target (N, C), and these targets (N,). Targets may stay on
    the CPU: then it finds these positions without waiting for the GPU."""
    targets = targets.flatten()
    where = (targets != -100).nonzero().flatten()  # (N,)
    x = x.flatten(0, 1).index_select(0, where.to(x.device, non_blocking=True))
    return x, targets[where].to(x.device, non_blocking=True)


CHUNK = 2**25  # logits at a time: 134 MB in fp32. 2,048 tokens of GPT-2 have 412 MB, and autograd holds them thrice.


def vocabulary_loss(x, W, b, targets, label_smoothing=0.0):
    """Mean cross entropy in nats of logits x W^T + b: x (N, C), W (V, C), b (V,) or None, targets (N,). NaN for N = 0.

    torch's chunked loss computes the gradient of a chunk of logits while the chunk is there, so the logits (N, V) never
    stand in memory as a whole. It has no label smoothing, and in bf16 it rounds the loss: there it is the plain one."""
    if not len(x):
        return x.sum() * math.nan
    if not (label_smoothing or x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)):
        options = LinearCrossEntropyOptions(allow_retain_graph=True, batch_chunk_size=max(1, CHUNK // len(W)),
                                            chunking_method=None)
        return F.linear_cross_entropy(x, W, targets, linear_bias=b, options=options)
    z = F.linear(x, W, b)  # (N, V)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.cross_entropy(z, targets, label_smoothing=label_smoothing)


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
    model_type = "gpt2"
    width = property(lambda self: self.n_embd)
    context = property(lambda self: self.n_positions)  # the longest sequence, in tokens
    inner = property(lambda self: self.n_inner or 4 * self.n_embd)


class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.width
        self.ln_1 = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.attn = Attention(C, config.n_head)
        self.ln_2 = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.mlp = MLP(C, config.inner, "tanh")  # "gelu_new" in GPT-2's config

    def forward(self, x, mask=None, cache=None, at=None):
        x = x + self.attn(self.ln_1(x), mask, cache, at)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """(B, T) token ids -> logits of the next tokens; ValueError beyond `context` tokens."""

    causal, classifier, fresh_head = True, None, False

    def __init__(self, config):
        super().__init__()
        self.config, self.context = config, config.context
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.width, eps=config.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's init: writers into the residual stream shrink with the root of their number
                writes = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, pos=None):
        """(B, T) token ids -> (B, T, C), before the last LayerNorm.

        With a cache (n_layer, 2, B, S, nh, hs), `pos` (B, T) is the position of each token, which sees all up to there.
        Or `pos` is a number: 0 for whole prompts that fill the cache, S - 1 for one more token a row."""
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
        """(logits (B, T, V), None), or with targets (B, T) (None, their mean cross entropy in nats). -100 marks a
        position without a target."""
        x = self.hidden(idx)
        if targets is None:
            return self.head(x), None
        x, targets = with_targets(x, targets)
        return None, vocabulary_loss(self.ln_f(x), self.wte.weight, None, targets, label_smoothing)

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
    model_type = "roberta"
    width = property(lambda self: self.hidden_size)
    context = property(lambda self: self.max_position_embeddings - self.pad_token_id - 1)
    n_layer = property(lambda self: self.num_hidden_layers)
    n_head = property(lambda self: self.num_attention_heads)
    inner = property(lambda self: self.intermediate_size)


class RobertaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.width
        self.attn = Attention(C, config.n_head)
        self.ln_1 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.mlp = MLP(C, config.inner, "none")
        self.ln_2 = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x, mask):
        x = self.ln_1(x + self.attn(x, mask))
        return self.ln_2(x + self.mlp(x))


class LMHead(nn.Module):
    """(..., C) -> (..., C), what the token embedding is multiplied with, and the bias (V,) of the product."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.layer_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x):
        return self.layer_norm(F.gelu(self.dense(x)))


class Classifier(nn.Module):
    """(B, T, C) -> (B, L), from the first token, <s>."""

    def __init__(self, config, num_labels):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, num_labels)
        for linear in (self.dense, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x[:, 0])))


class RoBERTa(nn.Module):
    """num_labels 0: a masked language model; 1: regression; more: a classifier. The other head is None."""

    causal, fresh_head, labels = False, False, None  # set by `from_pretrained`: is the head new, names of the classes

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

    def head(self, x):
        """(..., C) -> (..., V): which token was masked."""
        return F.linear(self.lm_head(x), self.wte.weight, self.lm_head.bias)

    def forward(self, idx, targets=None, label_smoothing=0.0):
        """(logits, loss). Masked LM: as GPT. Classifier: logits (B, L), targets (B,) whole numbers, the mean cross
        entropy in nats. Regression: logits (B, 1), targets (B,) real numbers, the mean squared error."""
        x = self.hidden(idx)
        if self.lm_head and targets is None:
            return self.head(x), None
        if self.lm_head:
            x, targets = with_targets(x, targets)
            return None, vocabulary_loss(self.lm_head(x), self.wte.weight, self.lm_head.bias, targets, label_smoothing)
        logits = self.classifier(x)
        if targets is None:
            return logits, None
        targets = targets.to(x.device, non_blocking=True)
        if self.num_labels == 1:
            return logits, F.mse_loss(logits.squeeze(1).float(), targets)
        return logits, F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
