"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685.

    h = W x + b + s B A x,        s = alpha / r                                        (eq. 3)

    x (..., d_in), h (..., d_out); W (d_out, d_in) and b (d_out) are pretrained and frozen;
    A (r, d_in) and B (d_out, r) are trained. r << d_in, d_out: few parameters, none of them needed at inference,

    W_merged = W + s B A          exact, the model is as fast as before.

A starts random and B at zero, so the adapted model starts as the pretrained one; at that moment dL/dA = 0, and B moves
first. Below the layer stands the surgery, which every method of the family shares: `apply` puts adapters into any
nn.Module with named nn.Linears, `merge` folds them away again.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus a trainable low-rank term. `weight` and `bias` keep their names: so do pretrained keys.

    r: rank, 1..min(d_in, d_out). alpha: numerator of the scale. dropout: probability, on the input of A only.
    """

    exact_merge = True   # False where merging approximates (ResLoRA input, middle)
    moves_weight = False  # True where the method also changes W (Delta-LoRA)
    merges = ("exact",)  # ways to merge, the first is kept (ResLoRA has several)

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        d_out, d_in = linear.weight.shape
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"rank {r} is not in 1..{min(d_in, d_out)} for a linear of {d_in} -> {d_out}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is not in [0, 1)")
        self.weight, self.bias = linear.weight, linear.bias
        self.r, self.alpha, self.scaling = r, alpha, self.scale(r, alpha)
        # Adapters are fp32 even on a bf16 base: their updates are too small for bf16. float64 stays float64.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        like = dict(device=linear.weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(-1, 1) / sqrt(d_in)
        self.dropout = nn.Dropout(dropout) if dropout else None  # nn.Dropout(0.) would cost time

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
        """Delta W (d_out, d_in), what merging adds to the weight as it is now."""
        A, B = self.as_lora()
        return self.scaling * (B @ A)

    def as_lora(self):
        """(A', B') of the ordinary LoRA that this layer is, counted from the pretrained W_0, at the same scaling:
        W_merged = W_0 + scaling B' A', A' (r', d_in), B' (d_out, r')."""
        return self.lora_A, self.lora_B

    # The rest of the contract. Plain LoRA needs none of it; methods that do override it.

    @staticmethod
    def connect(chains):
        """Called once by `apply`, with {target: [layers, shallow to deep]}."""

    @staticmethod
    def begin(layers, steps):
        """Called before training, with the number of steps; ValueError if they do not suit the method."""

    @staticmethod
    def after_step(layers, step):
        """Called after each real optimizer step, counted from 1."""

    @staticmethod
    def calibrate(layers, run, how=None):
        """Called before merging; `run()` sends the calibration batches through the model (see reslora.py)."""


# ---------------------------------------------------------------------------------------------------------------------
# Surgery: the same for every method, every architecture.

def apply(model, adapter, targets, **hparams):
    """Freeze `model` and put an `adapter` (a class like LoRALinear) in the place of every nn.Linear named in `targets`.

    A target is the last part or parts of a module's name: "q", or "attn.q". hparams go to the class: r=, alpha=, …
    Returns the new layers in chain order: all of the first target, shallow to deep, then the next target's.
    Raises ValueError, leaving the model as it was, for a target without a linear, a tied weight, or bad hparams.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    chains, new = {}, {}
    for target in dict.fromkeys(targets):
        names = [n for n in linears if n not in new and (n == target or n.endswith("." + target))]
        if not names:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in linears})) or "none"
            raise ValueError(f"target {target!r} matches no linear of the model; its linears are: {known}")
        for name in names:
            if uses.count(id(linears[name].weight)) > 1:
                raise ValueError(f"target {target!r}: {name} shares its weight with another module")
            new[name] = adapter(linears[name], **hparams)
        chains[target] = [new[n] for n in names]
    adapter.connect(chains)
    model.requires_grad_(False)  # the base; what the adapters made is not part of the model yet
    for name, layer in new.items():
        replace(model, name, layer)
    return [layer for chain in chains.values() for layer in chain]


def merge(model):
    """Fold every adapter into a plain nn.Linear with the original keys and dtypes; returns the model.

    Raises ValueError when there is nothing to merge, or, before any weight is touched, on a value that is not finite.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("nothing to merge: the model has no adapters (any more)")
    with torch.no_grad():
        for name, layer in layers.items():
            if not all(t.isfinite().all() for t in (layer.weight, *layer.as_lora())):
                raise ValueError(f"the adapter of {name} holds NaN or inf: nothing was merged")
        for name, layer in layers.items():
            linear = nn.Linear(*layer.weight.shape[::-1], bias=layer.bias is not None, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            linear.weight.copy_(layer.weight + layer.delta())  # summed in fp32, rounded once to the weight's dtype
            linear.train(layer.training)
            replace(model, name, linear)
    return model


def replace(model, name, module):
    """Set the submodule with the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    base = model(x)
    layers = apply(model, LoRALinear, ["0", "2"], r=2, alpha=4)
    for layer in layers:
        print(f"W {tuple(layer.weight.shape)}  A {tuple(layer.lora_A.shape)}  B {tuple(layer.lora_B.shape)}")
    print(f"at B = 0 the output changes by {(model(x) - base).abs().max():.0e}")
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        print(f"{name:9}", "no gradient" if p.grad is None else f"|gradient| {p.grad.norm():.3f}")
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    out = model(x)
    error = (merge(model)(x) - out).abs().max()
    print(f"with B random it changes by {(out - base).abs().max():.2f}, and merging changes that by {error:.0e}")
