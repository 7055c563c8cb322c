"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685.

    h = W x + b + s B A drop(x),        s = alpha / r

    x (..., d_in), h (..., d_out); W (d_out, d_in) and b (d_out) are pretrained and frozen;
    A (r, d_in) and B (d_out, r) are trained: r (d_in + d_out) numbers instead of d_in d_out.

    W_merged = W + s B A     exact up to one rounding: same architecture as the base, no extra cost

A starts random, U(-1, 1) / sqrt(d_in) as in the authors' code. B starts at zero, so the adapted
model starts as the pretrained one. At that moment dL/dA = 0, so B moves first. `apply` and `merge`
below serve all methods of the family.

What alpha does. Write B' = c B: a layer with c alpha and B computes the same as one with alpha and
B'. Adam moves B by the learning rate, however large its gradient is, so B' moves by c times that
rate, while A moves as before. So under Adam

    c alpha, one rate lr      is      alpha, with rate lr for A and c lr for B

exactly, as long as nothing else sees the size of B or of its gradient. Weight decay, clipping and
Adam's eps do. alpha is the learning rate of B. LoRA+ (Hayou et al. 2024, arXiv:2402.12354) sets the
ratio of both rates itself, to 16 for instance. rsLoRA is a ratio of sqrt(r), and Delta-LoRA with
K = 0 one of 1 + lambda. Under SGD, whose steps grow with the gradient, c alpha is a ratio of c^2.
`train.py --lr-ratio` sets the ratio.
"""
import math
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """An nn.Linear plus a trainable low-rank term. `weight` and `bias` keep their names, so that
    pretrained keys still fit.

    r: rank, 1..min(d_in, d_out). alpha: numerator of the scale. dropout: probability, on the input
    of A only. ValueError for values that no layer can have."""

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        # u = A drop(x)
        u = F.linear(self.drop(x), self.lora_A)  # (..., r)
        # h = W x + b + B (s u): scale u, only r numbers a token
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, self.lora_B)

    def delta(self):
        """Delta W = s B A (d_out, d_in): what merging adds to W."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @staticmethod
    def scale(r, alpha):
        """s = alpha / r"""
        return alpha / r

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        check(linear, r, alpha, dropout)
        self.weight, self.bias = linear.weight, linear.bias
        self.r, self.scaling = r, self.scale(r, alpha)
        # nn.Dropout(0.) would cost time
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        # Adapters stay fp32 on a bf16 base: bf16 would round their updates away
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.init_factors(*linear.weight.shape, device=linear.weight.device, dtype=dtype)

    def init_factors(self, d_out, d_in, **like):
        """Create the trained parameters. like: their device and dtype. `weight`, `r` and `scaling`
        are there already. What a method keeps frozen beside them is a buffer of its own."""
        self.lora_A = nn.Parameter(torch.empty(self.r, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, self.r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # a = sqrt 5: U(-1, 1) / sqrt(d_in)

    def as_lora(self):
        """(A' (r', d_in), B' (d_out, r')) with W_merged = W_0 + scaling B' A'. W_0 is the
        pretrained weight, which differs from W only where a method moves W."""
        return self.lora_A, self.lora_B

    def __call__(self, x):
        """`forward`. Where x is in bf16 and autocast is off, as in a model that `transformers`
        loads in bf16, it runs under autocast: torch refuses to multiply a bf16 x by an fp32
        factor."""
        if x.dtype.itemsize < 4 and not torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, x.dtype):
                return super().__call__(x)
        return super().__call__(x)

    # The rest of the contract. LoRA needs none of it; other methods override what they need.

    name = "this layer"  # its name in the model; `apply` sets it
    exact_merge = True  # False where merging approximates (ResLoRA's input and middle)
    # True where `weight` is a new fp32 tensor, which the method changes at the start or in training
    moves_weight = False
    exact_gradient = True  # False where the paper cuts the graph, as DoRA at its norm
    merges = ("exact",)  # the ways to merge: train.py measures all and keeps the first
    peft_type = "LORA"  # PEFT's name for these factors (LoHa and LoKr have their own)
    lr_scale = {}  # {name of a factor: its learning rate, as a multiple of the run's}

    @staticmethod
    def connect(chains):
        """Called once by `apply` with {target: [its layers, shallow to deep]}."""

    @staticmethod
    def begin(layers, steps, done=0):
        """Called before training, with the steps done already if it goes on. Returns the first step
        from which on the best checkpoint is chosen."""
        return 1

    @staticmethod
    def before_step(layers, step):
        """Called in step 1, 2, … between backward and clipping."""

    @staticmethod
    def after_step(layers, step):
        """Called after the optimizer's step."""

    @staticmethod
    def ranks(layers):
        """[rank of each layer] of a method that moves ranks between layers, else None."""

    @staticmethod
    def prepare_merge(model, merge, calibration):
        """Called before merging by one of `merges`. calibration: the arguments of
        reslora.calibrate."""

    @staticmethod
    def recompute(block):
        """The contexts of the two runs of a block whose activations are computed again."""
        return nullcontext(), nullcontext()

    def extra_repr(self):
        d_out, d_in = self.weight.shape
        return f"{d_in} -> {d_out}, r={self.r}, scaling={self.scaling:g}"


def check(linear, r, alpha, dropout):
    """ValueError for values that no layer can have."""
    d_out, d_in = linear.weight.shape
    most = min(d_in, d_out)
    if not (isinstance(r, int) and 1 <= r <= most):
        raise ValueError(f"rank {r} is not in 1..{most} for a linear of {d_in} -> {d_out}")
    if not 0 < alpha <= 1e6:
        raise ValueError(f"alpha {alpha} is not above 0 and at most 10^6")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")


def apply(model, adapter, targets, **hparams):
    """Freeze `model` and put an `adapter` in the place of every nn.Linear named in `targets`.

    adapter: a class like LoRALinear. targets: a list; each is the end of a module's name, "q" or
    "attn.q", with * for any one part, "decoder.layers.*.self_attn.q". hparams: go to the class, r=,
    alpha=, … Returns the new layers, chain after chain, see `chains_of`.

    Raises ValueError, and leaves the model as it was, for a target without a linear, a tied weight,
    or bad hparams. A parent that reads its linear's weight itself, as nn.MultiheadAttention does,
    bypasses the adapter.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of names, not {targets!r}")
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has adapters already: name all targets in one call")
    own = adapter.delta is not LoRALinear.delta or adapter.moves_weight
    if own and adapter.as_lora is LoRALinear.as_lora:
        raise ValueError(f"{adapter.__name__} overrides delta, or moves weight, so it must "
                         "override as_lora too: exports rely on it")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name}
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    new, target_of = {}, {}
    for target in targets:
        names = [name for name in linears if matches(name, target)]
        if not names:
            raise ValueError(f"target {target!r} matches no linear of the model"
                             f"{instead(model, target)}")
        for name in names:
            if name in new:
                raise ValueError(f"target {target!r}: {name} is meant by an earlier target already")
            if type(linears[name]) is not nn.Linear:
                raise ValueError(f"target {target!r}: {name} is a {type(linears[name]).__name__}, "
                                 "which computes its product in a way of its own: an adapter needs "
                                 "an nn.Linear")
            if uses.count(id(linears[name].weight)) > 1:
                raise ValueError(f"target {target!r}: {name} shares its weight with another module")
            if adapter.moves_weight and not isinstance(linears[name].weight, nn.Parameter):
                raise ValueError(f"target {target!r}: {name} has its weight in 4 bits, and "
                                 f"{adapter.__name__} moves it")
            new[name] = adapter(linears[name], **hparams).train(linears[name].training)
            new[name].name, target_of[name] = name, target
            for factor in new[name].lr_scale:
                if not hasattr(new[name], factor):
                    raise ValueError(f"{adapter.__name__}.lr_scale names {factor!r}, which is no "
                                     "parameter of it")
    chains = {chain: [new[name] for name in sorted(names, key=list(linears).index)]
              for chain, names in chains_of(target_of, linears).items()}
    if len(chains) > len(targets) and adapter.connect is not LoRALinear.connect:
        print("chains  ", ", ".join(f"{chain} ({len(layers)})" for chain, layers in chains.items()))
    adapter.connect(chains)
    model.requires_grad_(False)  # the base: the adapters are not part of the model yet
    for name, layer in new.items():
        model.set_submodule(name, layer)
    return [layer for chain in chains.values() for layer in chain]


def matches(name, target):
    """Whether a module's name ends in a target, in which * stands for any one part."""
    parts, wanted = name.split("."), target.split(".")
    ends = zip(reversed(wanted), reversed(parts), strict=False)
    return len(wanted) <= len(parts) and all(w in ("*", part) for w, part in ends)


def chains_of(target_of, linears):
    """{chain: [names of its layers]}: the linears that are each other's neighbours in depth.

    target_of: {name of a linear: its target}. Layers are one chain where their names are equal but
    for numbers, and their shapes are equal: blocks.0.attn.q and blocks.1.attn.q. Where several
    numbers differ, as in stages.0.blocks.1.q, the last counts the layers and the others part the
    chains. A number behind "experts" parts, since experts stand side by side. What a target with a
    * matches has no neighbours outside of it, and with two * or more it is one chain."""
    alike, chains = {}, {}
    for name, target in target_of.items():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts)
                   if part.isdecimal() and parts[i - 1] != "experts"]
        kind = tuple("*" if i in numbers else part for i, part in enumerate(parts))
        shape, pattern = tuple(linears[name].weight.shape), target if "*" in target else None
        key = (pattern,) if target.count("*") > 1 else (pattern, shape, kind)
        alike.setdefault(key, []).append(name)
    for (pattern, *shape), names in alike.items():
        # [[first part of each name], [second part], …]
        columns = zip(*(name.split(".") for name in names), strict=False)
        differ = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        parted = {}
        for name in names:
            parts = name.split(".")
            if differ:
                parts[differ[-1]] = "*"
            parted.setdefault(".".join(parts) if shape else pattern, []).append(name)
        for chain, members in parted.items():
            chains[f"{chain} {shape[0]}" if chain in chains else chain] = members
    return chains


def instead(model, target):
    """In words, which linears a model has, where none is called `target`."""
    for name, m in model.named_modules():
        if name and matches(name, target):
            return f": {name} is a {type(m).__name__}"
    known = sorted({name.rpartition(".")[2] for name, m in model.named_modules()
                    if name and isinstance(m, nn.Linear)})
    return f"; its linears are: {', '.join(known) or 'none'}"


@torch.no_grad()
def merge(model):
    """Fold every adapter into a plain nn.Linear with the original key and dtype; return the model.

    (A W that Delta-LoRA moves stays fp32.) Call it outside autocast. ValueError, before any weight
    is touched, where there is nothing to merge or a merged weight would not be finite."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers or "" in layers:
        raise ValueError("nothing to merge: the model holds no adapters (any more)")
    for name, layer in layers.items():
        if not merged(layer).isfinite().all():
            raise ValueError(f"merging {name} would give NaN or inf: nothing was merged")
    for name, layer in layers.items():
        d_out, d_in = layer.weight.shape
        linear = nn.Linear(d_in, d_out, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(merged(layer), requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear.train(layer.training))
    return model


def merged(layer):
    """W + Delta W, summed in fp32 and rounded once to W's dtype."""
    return (layer.weight + layer.delta()).to(layer.weight.dtype)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(3, 8)
    layers = apply(model, LoRALinear, ["0", "2"], r=2, alpha=4)
    model(x).square().sum().backward()
    print(f"{model}\nafter one backward at B = 0:")
    for name, p in model.named_parameters():
        gradient = "frozen" if p.grad is None else f"|gradient| {p.grad.norm():.3f}"
        print(f"  {name:8} {str(tuple(p.shape)):8}", gradient)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    out = model(x)
    error = (merge(model)(x) - out).abs().max()
    print(f"B random: merged and unmerged differ by {error:.0e}")
