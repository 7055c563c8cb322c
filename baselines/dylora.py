"""DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation. Valipour et al. 2022, arXiv:2210.07558.

One training serves all ranks up to r. Every step draws a rank b, uniformly from 1..r and the same
for the whole model, and uses only the first b ranks:

    h = W x + b + s_b B_{:, 1..b} A_{1..b} drop(x),        s_b = alpha / b

    A (r, d_in), B (d_out, r) as in LoRA. The first ranks take part in every draw and learn what
    matters most; the last one only refines the others. So the trained adapter can be cut at any b,
    without a search over r:

    W_merged = W + s_b B_{:, 1..b} A_{1..b}

With `frozen`, the paper's faster form, the forward is the same and only the b-th rank, A_b and
B_{:, b}, is trained.

Ranks that a step does not train must stay where they are. They have no gradient, but an optimizer
with momentum or weight decay would move them all the same, so they are put back after its step.
(The optimizer's moments are not put back: they decay in steps without a gradient and take part when
the rank is drawn again.)

The demo, python -m baselines.dylora, also shows what DyLoRA must be compared with: an ordinary LoRA
whose product B A is truncated to its first singular values.
"""
import random

import torch
import torch.nn.functional as F

from lora import LoRALinear


class DyLoRALinear(LoRALinear):
    """LoRALinear trained at a random rank 1..r, evaluated at r, merged at a cut.

    frozen: train the last of the drawn ranks alone. cut: a rank to merge at or a list of them, the
    first is kept, the others are measured beside it; None: r, and beside it the powers of two.
    """

    def __init__(self, linear, r, alpha, dropout=0.0, frozen=False, cut=None):
        super().__init__(linear, r, alpha, dropout)
        self.alpha, self.frozen, self.seed = alpha, frozen, None
        # s_b for the first b ranks, 0 for the others, (r,): a tensor, so that a new b costs no new
        # compilation
        self.register_buffer("s_b", self.lora_A.new_empty(r), persistent=False)
        self.draw(r)
        powers = [2**i for i in range(r.bit_length())]
        self.merges = [cut] if isinstance(cut, int) else list(cut or dict.fromkeys([r, *powers]))
        for b in [*self.merges, r]:
            self.cut_at(b)

    def draw(self, b):
        """Train at rank b, 1..r, from now on."""
        self.b = b
        self.s_b[:b], self.s_b[b:] = self.scale(b, self.alpha), 0

    def cut_at(self, b):
        """Evaluate and merge at rank b from now on; ValueError if it is not in 1..r."""
        if not (type(b) is int and 1 <= b <= self.r):
            raise ValueError(f"cut {b} is not in 1..{self.r}, the ranks of the adapter")
        self.cut, self.scaling = b, self.scale(b, self.alpha)

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        A, B, s_b = self.lora_A, self.lora_B, self.s_b
        if not self.training:
            (A, B), s_b = self.as_lora(), self.scaling
        # u = s_b A_{1..b} drop(x)
        u = s_b * F.linear(self.drop(x), A)  # (..., r), in training 0 beyond b
        # h = W x + b + B_{:, 1..b} u
        return F.linear(x, self.weight, self.bias) + F.linear(u, B)

    @property
    def exact_merge(self):
        """True if the first of `merges` keeps all ranks."""
        return self.merges[0] == self.r

    def as_lora(self):
        """(A', B') of rank b: the first ranks, up to the cut."""
        return self.lora_A[:self.cut], self.lora_B[:, :self.cut]

    def delta(self):
        """s_b B_{:, 1..b} A_{1..b} (d_out, d_in), for b = cut"""
        A, B = self.as_lora()
        return self.scaling * (B @ A)

    @staticmethod
    def begin(layers, steps, done=0):
        """Draw for the first step. Draws depend on a seed and the step: a resumed run goes on with
        the same."""
        seed = torch.randint(2**62, ()).item()
        for layer in layers:
            layer.seed = seed
        draw_for(layers, done + 1)
        return 1

    @staticmethod
    @torch.no_grad()
    def before_step(layers, step):
        """Keep the factors, and with `frozen` no gradient but that of the b-th rank."""
        if layers[0].seed is None:
            raise RuntimeError("DyLoRA draws its ranks from a seed: call begin first")
        for layer in layers:
            layer.before = layer.lora_A.clone(), layer.lora_B.clone()
            if layer.frozen and layer.lora_A.grad is not None:
                layer.lora_A.grad[:layer.b - 1] = 0
                layer.lora_B.grad[:, :layer.b - 1] = 0

    @staticmethod
    @torch.no_grad()
    def after_step(layers, step):
        """Put the ranks back that this step did not train; draw for the next."""
        for layer in layers:
            A, B = layer.before
            first = layer.b - 1 if layer.frozen else 0
            for rest in (slice(first), slice(layer.b, None)):
                layer.lora_A[rest] = A[rest]
                layer.lora_B[:, rest] = B[:, rest]
            layer.before = None
        draw_for(layers, step + 1)

    @staticmethod
    def prepare_merge(model, merge, calibration):
        """Cut every layer at rank `merge`."""
        for layer in model.modules():
            if isinstance(layer, DyLoRALinear):
                layer.cut_at(merge)


def draw_for(layers, step):
    """A new b, the same for the whole model."""
    b = random.Random(f"{layers[0].seed}/{step}").randint(1, layers[0].r)
    for layer in layers:
        layer.draw(b)


if __name__ == "__main__":
    torch.manual_seed(0)
    x, W = torch.randn(256, 8), torch.randn(8, 4) @ torch.randn(4, 8) / 4
    linear = torch.nn.Linear(8, 8).requires_grad_(False)
    y = linear(x) + x @ W.T  # what is missing has rank 4

    def show(name, losses):
        print(f"{name:36}", *(f"r {b}: {loss:.3f}  " for b, loss in enumerate(losses, 1)))

    def loss(update):
        return (linear(x) + x @ update.T - y).square().mean()

    def trained(always=None):
        """The layer after 1000 steps; always: the same b in all of them, which is LoRA."""
        layer = DyLoRALinear(linear, r=4, alpha=4)
        layers, optimizer = [layer], torch.optim.AdamW([layer.lora_A, layer.lora_B], 2e-2)
        layer.begin(layers, 1000)
        for step in range(1, 1001):
            if always:
                layer.draw(always)
            (layer(x) - y).square().mean().backward()
            layer.before_step(layers, step)
            optimizer.step()
            layer.after_step(layers, step)
            optimizer.zero_grad()
        return layer.requires_grad_(False)
    dylora, plain = trained(), trained(always=4)
    cuts = []
    for b in range(1, 5):
        dylora.cut_at(b)
        cuts.append(loss(dylora.delta()))
    show("DyLoRA, b drawn from 1..4, cut at", cuts)
    show("LoRA r 4, its first ranks",
         [loss(plain.lora_B[:, :b] @ plain.lora_A[:b]) for b in range(1, 5)])
    U, S, V = torch.linalg.svd(plain.delta())
    show("LoRA r 4, its first singular values",
         [loss(U[:, :b] * S[:b] @ V[:b]) for b in range(1, 5)])
