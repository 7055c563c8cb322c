"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685.

    h = W x + b + s B A drop(x),        s = alpha / r

    x (..., d_in), h (..., d_out); W (d_out, d_in) and b (d_out) are pretrained and frozen;
    A (r, d_in) and B (d_out, r) are trained: r (d_in + d_out) numbers in place of d_in d_out.

    W_merged = W + s B A          exact up to one rounding: the deployed model is the base, with other numbers in it.

A starts random, U(-1, 1) / sqrt(d_in) as in the authors' code, and B at zero, so the adapted model starts as the
pretrained one; at that moment dL/dA = 0, and B moves first. Below the layer stands the surgery, which every method of
the family shares: `apply` puts adapters into a model with named nn.Linears, `merge` folds them away again.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """An nn.Linear plus a trainable low-rank term. `weight` and `bias` keep their names, and pretrained keys with them;
    `apply` freezes them.

    r: rank, 1..min(d_in, d_out). alpha: numerator of the scale. dropout: probability, on the input of A only. On a base
    in bf16 or fp16 call the model under autocast.
    """

    exact_merge = True  # False where merging approximates (ResLoRA input, middle)
    moves_weight = False  # True where the method also changes W (Delta-LoRA)
    merges = ("exact",)  # ways to merge, the first is kept (ResLoRA and DyLoRA have several)
    peft_type = "LORA"  # what PEFT calls the factors, where it knows them by their names (LoHa, LoKr)

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        d_out, d_in = linear.weight.shape
        if not (isinstance(r, int) and 1 <= r <= min(d_in, d_out)):
            raise ValueError(f"rank {r} is not in 1..{min(d_in, d_out)} for a linear of {d_in} -> {d_out}")
        if not 0 < alpha <= 1e6:
            raise ValueError(f"alpha {alpha} is not above 0 and at most 10^6")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is not in [0, 1)")
        self.weight, self.bias = linear.weight, linear.bias
        self.r, self.scaling = r, self.scale(r, alpha)
        self.dropout = nn.Dropout(dropout) if dropout else None  # nn.Dropout(0.) would cost time
        # Adapters are fp32 even on a bf16 base: their updates are too small for bf16. float64 stays float64.
        self.factors(d_out, d_in, device=linear.weight.device,
                     dtype=torch.promote_types(linear.weight.dtype, torch.float32))

    def factors(self, d_out, d_in, **like):
        """Create what is trained."""
        self.lora_A = nn.Parameter(torch.empty(self.r, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, self.r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # this a makes it U(-1, 1) / sqrt(d_in)

    @staticmethod
    def scale(r, alpha):
        """s = alpha / r"""
        return alpha / r

    def drop(self, x):
        """(..., d_in) -> (..., d_in)"""
        return x if self.dropout is None else self.dropout(x)

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        # u = A drop(x)
        u = F.linear(self.drop(x), self.lora_A)  # (..., r)
        # h = W x + b + s B u, the scale on u, which is the smallest tensor here
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, self.lora_B)

    def delta(self):
        """Delta W = s B A (d_out, d_in): what merging adds to W as it is now."""
        return self.scaling * (self.lora_B @ self.lora_A)

    # The rest of the contract. Methods override what they need; LoRA needs none of it.

    def as_lora(self):
        """(A', B') of the plain LoRA that the layer amounts to, counted from the pretrained W_0, at the same scaling:
        W_merged = W_0 + scaling B' A'; A' (r', d_in), B' (d_out, r')."""
        return self.lora_A, self.lora_B

    @staticmethod
    def connect(chains):
        """Called once by `apply`, with {target: [layers, shallow to deep]}."""

    @staticmethod
    def begin(layers, steps, done=0):
        """Called before training: `steps` in all, of which a resumed run has `done`. Returns the first step whose
        weights may be kept as the best; ValueError if the steps do not suit the method."""
        return 1

    @staticmethod
    def before_step(layers, step):
        """Called before each real optimizer step, counted from 1, when all gradients are there and not yet clipped."""

    @staticmethod
    def after_step(layers, step, run=None):
        """Called after each real optimizer step; `run` as in calibrate, for a method that merges while it trains."""

    @staticmethod
    def ranks(layers):
        """[rank given to each layer], for a method that changes it; None for all others."""

    @staticmethod
    def calibrate(layers, run, how=None):
        """Called before merging; `run()` sends the calibration batches through the model (see reslora.py)."""

    def extra_repr(self):
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, r={self.r}, scaling={self.scaling:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Surgery: the same for every method and every architecture.

def apply(model, adapter, targets, **hparams):
    """Freeze `model` and put an `adapter` (a class like LoRALinear) in the place of every nn.Linear named in `targets`.

    targets: a list; each is the last part or parts of a module's name, "q" or "attn.q". hparams go to the class: r=,
    alpha=, … Returns the new layers: all of the first target in order of registration, taken for depth, then the next
    target's. The parent must call its linear: a module that reads the linear's weight itself bypasses an adapter
    (nn.MultiheadAttention does, and nn.TransformerEncoderLayer in eval mode).
    Raises ValueError, and leaves the model as it was, for a target without a linear, a tied weight, or bad hparams.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of names, not {targets!r}")
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has adapters already: name all targets in one call")
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name}
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    chains, new = {}, {}
    for target in targets:
        names = [n for n in linears if n == target or n.endswith("." + target)]
        if not names:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in linears})) or "none"
            raise ValueError(f"target {target!r} matches no linear of the model; its linears are: {known}")
        for name in names:
            if name in new:
                raise ValueError(f"target {target!r}: {name} is meant by an earlier target already")
            if uses.count(id(linears[name].weight)) > 1:
                raise ValueError(f"target {target!r}: {name} shares its weight with another module")
            new[name] = adapter(linears[name], **hparams).train(linears[name].training)
        chains[target] = [new[n] for n in names]
    adapter.connect(chains)
    model.requires_grad_(False)  # the base: the adapters are not part of the model yet
    for name, layer in new.items():
        replace(model, name, layer)
    return [layer for chain in chains.values() for layer in chain]


@torch.no_grad()
def merge(model):
    """Fold every adapter into a plain nn.Linear with the original key and dtype (Delta-LoRA's W stays fp32); returns
    the model. Call it outside autocast.

    Raises ValueError when there is nothing to merge, or, before any weight is touched, on a value that is not finite.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers or "" in layers:
        raise ValueError("nothing to merge: the model holds no adapters (any more)")
    for name, layer in layers.items():
        if not merged(layer).isfinite().all():
            raise ValueError(f"merging {name} would give NaN or inf: nothing was merged")
    for name, layer in layers.items():
        linear = nn.Linear(*layer.weight.shape[::-1], bias=layer.bias is not None, device="meta").train(layer.training)
        linear.weight, linear.bias = layer.weight, layer.bias
        linear.weight.copy_(merged(layer))
        replace(model, name, linear)
    return model


def merged(layer):
    """W + Delta W, summed in fp32 and rounded once to W's dtype."""
    return (layer.weight + layer.delta()).to(layer.weight.dtype)


def replace(model, name, module):
    """Set the submodule with the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


if __name__ == "__main__":
    from collections import OrderedDict

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 16), tanh=nn.Tanh(), down=nn.Linear(16, 4)))
    base = model(x)
    layers = apply(model, LoRALinear, ["up", "down"], r=2, alpha=4)
    print(model)
    print(f"at B = 0 the output differs from the base by {(model(x) - base).abs().max():.0e}")
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        state = "frozen" if p.grad is None else f"|gradient| {p.grad.norm():.3f}"
        print(f"  {name:11} {str(tuple(p.shape)):8} {state}")
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    out = model(x)
    print(f"with B random the output differs from the base by {(out - base).abs().max():.2f}")
    print(f"merged and unmerged differ by {(merge(model)(x) - out).abs().max():.0e}")
