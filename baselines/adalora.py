"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023,
arXiv:2303.10512.

LoRA in the form of a singular value decomposition. Ranks can then be taken away one at a time,
wherever in the model they matter least:

    h = W x + b + s B diag(E) A drop(x),        s = alpha / r

    A (r_0, d_in), E (r_0, 1), B (d_out, r_0) are the paper's Q, Lambda, P (the paper has no s).
    Every layer begins with r_0 = init_rank ranks, 1.5 r by default. At the end r ranks per layer
    are left on average: r n in n layers.

A and B start random, N(0, .02^2), and E at zero, so at first only E receives a gradient from the
task. A term in the loss pulls the rows of A and the columns of B towards orthonormality, so that
E_k says how much the k-th triplet (B_k, E_k, A_k) does. C is the loss of the task, and 1 the unit
matrix:

    L = C + gamma sum over the layers of O,      O = |A A^T - 1|_F^2 + |B^T B - 1|_F^2
                                                 gamma = orth

The gradient of O is large at first. It is clipped together with that of C, as one gradient of L.
train.py logs the loss C alone, and the norm of the whole gradient.

The importance of one number w with gradient g is |w g|: to first order, how much L would change if
w were set to zero. One batch gives a noisy estimate, so the importance and its uncertainty are
averaged over the steps (beta = .85), and

    I = |w g|      Ibar <- beta_1 Ibar + (1 - beta_1) I      U <- beta_2 U + (1 - beta_2) |I - Ibar|
    s(w) = Ibar U
    S_k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk)

Every budget_every steps there is an allocation: the b(t) triplets of the whole model with the
largest S_k stay, and the other E_k are set to zero. The next gradients may revive those, until the
next allocation. In the last t_f of the T steps the choice is final:

    b(t) = r_0 n                                                              t <= t_i
    b(t) = r n + (r_0 - r) n (1 - (t - t_i) / (T - t_i - t_f))^3, floored      t_i < t < T - t_f
    b(t) = r n                                                                T - t_f <= t

    t_i = budget_warmup, t_f = budget_final, t a multiple of budget_every

PEFT differs from the paper in three places, where this file follows the paper. PEFT, like the
authors' code, uses the mean of unsquared norms for O, so its gammas (.1 to .5) do not carry over.
It computes the importance with the weights after the step, this file with the weights that g
belongs to. It scales by alpha / (r_0 + 1e-5), this file by the target rank. For b(t) this file
follows the code: the numerator in the paper, t - t_i - t_f, begins above r_0 n and does not end at
r n.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear

BETA = 0.85  # beta_1 and beta_2, as in all of the paper's experiments


class AdaLoRALinear(LoRALinear):
    """LoRALinear of rank `init_rank` whose ranks are masked until r are left per layer, on average
    over the model.

    init_rank: None for 1.5 r, at most min(d_in, d_out). budget_warmup, budget_final, budget_every:
    in steps.
    """

    def __init__(self, linear, r, alpha, dropout=0.0, init_rank=None, orth=0.1, budget_warmup=0,
                 budget_final=0, budget_every=1):
        super().__init__(linear, r, alpha, dropout)
        self.init_rank = init_rank or min(math.ceil(1.5 * r), *linear.weight.shape)  # r_0
        self.orth = orth  # gamma
        self.steps = None  # T, see `begin`
        self.budget_warmup, self.budget_final = budget_warmup, budget_final
        self.budget_every = budget_every
        check(self, init_rank)
        new, (d_out, d_in) = self.lora_A.data.new_empty, linear.weight.shape
        self.lora_A = nn.Parameter(new(self.init_rank, d_in).normal_(std=0.02))
        self.lora_E = nn.Parameter(new(self.init_rank, 1).zero_())
        self.lora_B = nn.Parameter(new(d_out, self.init_rank).normal_(std=0.02))
        # 1 for the triplets of the last allocation
        self.register_buffer("mask", torch.ones_like(self.lora_E))
        for name in "AEB":  # Ibar and U of each factor
            self.register_buffer(f"Ibar_{name}", torch.zeros_like(getattr(self, f"lora_{name}")))
            self.register_buffer(f"U_{name}", torch.zeros_like(getattr(self, f"lora_{name}")))

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        # u = diag(E) A drop(x)
        u = self.lora_E[:, 0] * F.linear(self.drop(x), self.lora_A)  # (..., r_0)
        # h = W x + b + s B u
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, self.lora_B)

    def delta(self):
        """s B diag(E) A (d_out, d_in)"""
        return self.scaling * (self.lora_B @ (self.lora_E * self.lora_A))

    def as_lora(self):
        """(A', B') = (A, B diag(E)) of the triplets that are left: a rank of its own for each
        layer, even 0."""
        left = (self.mask[:, 0] == 1) | (self.lora_E[:, 0] != 0)  # chosen, or revived since
        return self.lora_A[left], self.lora_B[:, left] * self.lora_E[left, 0]

    # The budget

    @staticmethod
    def begin(layers, steps, done=0):
        """The first step of the last phase: before it the model has more ranks than it is to end
        with. ValueError if the phases do not fit into the run."""
        first = layers[0]  # all have the same budget
        if first.budget_warmup + first.budget_final >= steps:
            raise ValueError(f"budget_warmup {first.budget_warmup} and budget_final "
                             f"{first.budget_final} leave no step between them in a run of "
                             f"{steps}: together they must be below {steps}")
        for layer in layers:
            layer.steps = steps
        return steps - first.budget_final

    @staticmethod
    def before_step(layers, step):
        """The orthogonality term joins the gradient; the importance of all weights is updated."""
        if layers[0].steps is None:
            raise RuntimeError("AdaLoRA's budget depends on the length of the run: call begin "
                               "first")
        if layers[0].orth:
            sum(layer.orth * layer.orthogonality() for layer in layers).backward()
        if step <= layers[0].steps - layers[0].budget_final:
            for layer in layers:
                layer.update_importance()

    @staticmethod
    @torch.no_grad()
    def after_step(layers, step):
        """Choose b(t) triplets where it is time to, and mask the others."""
        first, last = layers[0], layers[0].steps - layers[0].budget_final
        if first.budget_warmup < step <= last and (step % first.budget_every == 0 or step == last):
            scores = torch.cat([layer.scores() for layer in layers])
            chosen = torch.zeros_like(scores)
            chosen[scores.topk(budget(layers, step)).indices] = 1
            masks = chosen.split([layer.init_rank for layer in layers])
            for layer, mask in zip(layers, masks, strict=True):
                layer.mask.copy_(mask[:, None])
                layer.lora_E.mul_(layer.mask)
        elif step > last:
            for layer in layers:
                layer.lora_E.mul_(layer.mask)

    @staticmethod
    def ranks(layers):
        """[triplets of the last allocation] of each layer; until the next one the others take part
        too"""
        return torch.stack([layer.mask.sum() for layer in layers]).int().tolist()

    def orthogonality(self):
        """O = |A A^T - 1|_F^2 + |B^T B - 1|_F^2, a number"""
        A, B, unit = self.lora_A, self.lora_B, torch.eye(self.init_rank, device=self.lora_A.device)
        return (A @ A.T - unit).square().sum() + (B.T @ B - unit).square().sum()

    @torch.no_grad()
    def update_importance(self):
        """One step of both EMAs, of every factor that has a gradient."""
        for name in "AEB":
            w, Ibar, U = (getattr(self, kind + name) for kind in ("lora_", "Ibar_", "U_"))
            if w.grad is not None:
                importance = (w * w.grad).abs()
                # Ibar <- beta_1 Ibar + (1 - beta_1) I
                Ibar.lerp_(importance, 1 - BETA)
                # U <- beta_2 U + (1 - beta_2) |I - Ibar|
                U.lerp_((importance - Ibar).abs(), 1 - BETA)

    def scores(self):
        """S_k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk), with s = Ibar U: (r_0,)"""
        return ((self.Ibar_E * self.U_E)[:, 0] + (self.Ibar_A * self.U_A).mean(1)
                + (self.Ibar_B * self.U_B).mean(0))


def budget(layers, step):
    """b(t), the number of ranks that the whole model may have after step t, counted from 1."""
    first = layers[0]
    t, T, t_i, t_f = step, first.steps, first.budget_warmup, first.budget_final
    start, end = sum(layer.init_rank for layer in layers), sum(layer.r for layer in layers)
    if t <= t_i:
        return start
    if t >= T - t_f:
        return end
    # b(t) = r n + (r_0 - r) n (1 - (t - t_i) / (T - t_i - t_f))^3
    return end + int((start - end) * (1 - (t - t_i) / (T - t_i - t_f)) ** 3)


def check(layer, init_rank):
    """ValueError for an init_rank, gamma or number of steps that cannot be."""
    most = min(layer.weight.shape)
    if init_rank is not None and not (isinstance(init_rank, int) and layer.r <= init_rank <= most):
        raise ValueError(f"init_rank {init_rank} is not in {layer.r}..{most}, from the target rank "
                         "to the linear's own")
    if not 0 <= layer.orth <= 1e6:
        raise ValueError(f"orth {layer.orth} is not in [0, 1e6]")
    for name, least in (("budget_warmup", 0), ("budget_final", 0), ("budget_every", 1)):
        value = getattr(layer, name)
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} {value} is not a number of steps, {least} or more")


if __name__ == "__main__":
    from lora import apply

    torch.manual_seed(0)
    x, y = torch.randn(256, 8), torch.randn(256, 8)
    y[:, :4] = x @ torch.randn(8, 4)  # only the first layer has something to learn, of rank 4
    model = nn.ModuleDict({name: nn.Linear(8, 4) for name in ("hard", "easy")})
    layers = apply(model, AdaLoRALinear, ["hard", "easy"], r=2, alpha=4, init_rank=4,
                   budget_warmup=40, budget_final=60)
    AdaLoRALinear.begin(layers, 200)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    for step in range(1, 201):
        loss = (torch.cat([model["hard"](x), model["easy"](x)], 1) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        AdaLoRALinear.before_step(layers, step)
        optimizer.step()
        AdaLoRALinear.after_step(layers, step)
        if step % 20 == 0:
            print(f"step {step:3}  loss {loss:.3f}  budget {budget(layers, step)}  ranks: hard "
                  "{}, easy {}".format(*AdaLoRALinear.ranks(layers)))
    print(f"|A A^T - 1|^2 + |B^T B - 1|^2 of the first layer: {layers[0].orthogonality():.3f}")
