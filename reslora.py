"""ResLoRA: Identity Residual Mapping in Low-Rank Adaption. Shi et al. 2024, arXiv:2402.18039.

LoRA gives each layer its own low-rank branch; a gradient on its way to a shallow branch passes through all the frozen
layers above. ResLoRA adds shortcuts between the branches of neighbouring layers. Layers with the same target (all q,
all v) form a chain; x_n is the input and h_n the output of its n-th layer, counted from 0; m = pre_num earlier layers
join in, m' = min(m, n), or all n for m = -1; m = 0 is plain LoRA. The sums below run over k:

    input    h_n = W_n x_n + b_n + s B_n A_n drop(x_n + sum_{1..m'} x_{n-k})                 the paper has m = 1
    block    h_n = W_n x_n + b_n + s sum_{0..m'} B_{n-k} A_{n-k} drop(x_n)
    middle   h_n = W_n x_n + b_n + s B_n sum_{0..m'} A_{n-k} drop(x_{n-k})

Nothing is detached: the added gradient path is the point. With g_n = dL/dh_n and m = 1, x_{n-1} gains s A_n^T B_n^T g_n
(input; the paper's eq. 16) or s A_{n-1}^T B_n^T g_n (middle); with block, A_{n-1} and B_{n-1} also hear from g_n. At
B = 0 all of these but the gradients of B are zero; they open as B grows. The first layer of a chain has no predecessor
and is plain LoRA. (The authors' code doubles its input for `input`; the equation does not ask for that.)

Merging. Deployed, a layer should be one matrix again. `block` reads only x_n and merges exactly. `input` and `middle`
read other layers' activations, so their merged form approximates: the branch A_n x_n + z_n, with the shortcut's part

    z_n = A_n sum_{1..m'} x_{n-k}   (input)          z_n = sum_{1..m'} A_{n-k} x_{n-k}   (middle)          z_n is (r,)

is replaced by A*_n x_n. The paper weighs A_n, or the earlier A, by ratios of norms: at best the size is right, never
the direction. Ours asks for the best matrix. Neighbouring x_n are strongly correlated (the residual stream), so z_n is
largely a linear function of x_n, and over the tokens of a few calibration batches

    minimise over P   E |z_n - P x_n|^2     =>     P E[x x^T] = E[z x^T]     =>     P_n = E[z x^T] E[x x^T]^-1
    A*_n = A_n + P_n        W*_n = W_n + s B_n A*_n        merge = "regression"

No linear merge has a smaller error of z on these tokens, and none of B z either, for any B: the residual z - P x is
uncorrelated with x, and so is B times it. The rank stays r and the result is a plain LoRA. In the code eps I, in units
of the mean diagonal, is added to E[x x^T] so that it can be solved. All layers are fitted at once, on activations of
the unmerged model; what merging the layers below changes is not seen. Fitting layer after layer on the model merged so
far does see it, costs a pass per layer, and where we tried it gave the same loss.

A language model is asked at every token; a classifier is asked once, and few tokens of a text decide. To first order
merging changes a number M that the model gives by s g^T B (z - P x) at each token, g = dM/dh_n, which is at most
s |B^T g| |z - P x|. So where calibration is given such an M, the least squares weigh each token by what depends on it:

    minimise over P   E w |z_n - P x_n|^2,    w = |B_n^T g_n|^2     =>     P_n = E[w z x^T] E[w x x^T]^-1

Merging can also come before the end: with merge_at = 0.9 the layers of `input` and `middle` are merged by regression
after nine tenths of the steps, and the last tenth trains the plain LoRA, A* and B, that they have become (Adam's
moments of A go on as those of A*). What is deployed is then what was trained; measured, it was no better for that.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F

from lora import LoRALinear

SHORTCUTS = ("input", "block", "middle")
MERGES = ("regression", "input", "weight", "none")


class ResLoRALinear(LoRALinear):
    """LoRALinear with a shortcut from the `pre_num` earlier layers of its chain (-1: all of them).

    merge: how `calibrate` approximates `input` and `middle`, a name of MERGES or a list of them, the first is kept.
    merge_at: the share of the steps, in (0, 1), after which these become plain LoRA; None: never.
    Layers must be called in chain order, each once per forward: activation checkpointing and nn.DataParallel do not.
    """

    def __init__(self, linear, r, alpha, dropout=0.0, shortcut="input", pre_num=1, merge="regression", merge_at=None):
        super().__init__(linear, r, alpha, dropout)
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut {shortcut!r} is not one of {', '.join(SHORTCUTS)}")
        if pre_num < -1:
            raise ValueError(f"pre_num {pre_num} is neither a number of layers (0, 1, …) nor -1 for all of them")
        self.shortcut, self.pre_num = shortcut, pre_num
        self.merges = [merge] if isinstance(merge, str) else list(merge)
        for how in self.merges:
            self.check_merge(how)
        if merge_at is not None and not 0 < merge_at < 1:
            raise ValueError(f"merge_at {merge_at} is not a share of the steps, above 0 and below 1")
        if merge_at is not None and shortcut == "block":
            raise ValueError("merge_at is for the shortcuts input and middle: block merges exactly at the end")
        if merge_at is not None and self.merges != ["regression"]:
            raise ValueError(f"merge_at merges by regression, not by {','.join(self.merges)}")
        self.merge_at, self.merge_step = merge_at, None
        self.earlier = []  # the layers n-1, n-2, …, n-m' of the chain; a plain list registers no submodules
        self.inbox, self.outbox, self.sends = [], [], 0  # see `exchange`
        self.register_buffer("A_star", None, persistent=False)  # (r, d_in), what `calibrate` found

    def check_merge(self, how):
        """ValueError unless `how` is a merge that this structure has."""
        if how not in MERGES:
            raise ValueError(f"merge {how!r} is not one of {', '.join(MERGES)}")
        if how == "weight" and self.shortcut == "input" and self.pre_num not in (0, 1):
            raise ValueError(f"merge 'weight' of shortcut 'input' is defined for pre_num 1 only, not {self.pre_num}")

    @staticmethod
    def connect(chains):
        """Tell every layer its predecessors, and give neighbours one list to hand activations over."""
        for target, chain in chains.items():
            for n, layer in enumerate(chain):
                if layer.weight.shape != chain[0].weight.shape:
                    raise ValueError(f"ResLoRA needs layers of one shape in a chain: {target}[{n}] is "
                                     f"{tuple(layer.weight.shape)}, {target}[0] is {tuple(chain[0].weight.shape)}")
                m = n if layer.pre_num == -1 else min(layer.pre_num, n)
                layer.earlier = chain[n - m:n][::-1]
            for layer, after in pairwise(chain):
                layer.outbox, layer.sends = after.inbox, len(after.earlier)

    def exchange(self, own):
        """Hand `own` to the next layer and return what the m' layers before this one handed over, nearest first.

        A link is one plain list, shared by two neighbours, full only between their two calls: no activation outlives
        a whole forward, nothing is global or in the state dict, and copies of the model have links of their own.
        """
        if self.earlier and not self.inbox:
            raise RuntimeError("ResLoRA layers must be called in chain order, each once per forward: "
                               "this one was called before its predecessor")
        received = self.inbox.pop() if self.earlier else []
        if self.sends:
            self.outbox[:] = [[own, *received][:self.sends]]
        return received

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        A, B = self.lora_A, self.lora_B
        if self.shortcut == "input":
            # u = A_n drop(x_n + sum_{1..m'} x_{n-k})
            u = F.linear(self.drop(sum(self.exchange(x), x)), A)  # (..., r)
        elif self.shortcut == "middle":
            # u = sum_{0..m'} A_{n-k} drop(x_{n-k}): each layer's own term travels, no running sum
            u = F.linear(self.drop(x), A)
            u = sum(self.exchange(u), u)
        else:
            # B u = sum_{0..m'} B_{n-k} A_{n-k} drop(x_n): the blocks, stacked, are one product of rank (m' + 1) r
            A, B = self.stacked()
            u = F.linear(self.drop(x), A)  # (..., (m' + 1) r)
        # h_n = W_n x_n + b_n + s B u
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, B)

    def stacked(self):
        """A ((m' + 1) r, d_in) and B (d_out, (m' + 1) r) of the blocks n, n-1, …, n-m'."""
        window = [self, *self.earlier]
        return torch.cat([layer.lora_A for layer in window]), torch.cat([layer.lora_B for layer in window], 1)

    # Merging

    @property
    def exact_merge(self):
        """True for a layer that reads nothing but x_n: it is a plain LoRA as it stands."""
        return self.shortcut == "block" or not self.earlier

    def as_lora(self):
        """(A', B') with W_merged = W + s B' A': the stacked blocks, or the calibrated A* and B."""
        if self.shortcut == "block":
            return self.stacked()
        if self.exact_merge:
            return self.lora_A, self.lora_B
        if self.A_star is None:
            raise RuntimeError(f"shortcut {self.shortcut!r} merges only approximately: call calibrate first")
        return self.A_star, self.lora_B

    def delta(self):
        """s B' A' (d_out, d_in)"""
        A, B = self.as_lora()
        return self.scaling * (B @ A)

    @staticmethod
    def begin(layers, steps, done=0):
        """With merge_at: the step after which the layers are LoRA; weights from before it may not be kept. A run that
        goes on behind it begins as LoRA."""
        if layers[0].merge_at is None:
            return 1
        at = max(1, round(layers[0].merge_at * steps))
        for layer in layers:
            layer.merge_step = at
            if done >= at:
                layer.drop_shortcut()
        return at

    def drop_shortcut(self):
        """Take the shortcut away: what is left is the plain LoRA of lora_A and lora_B."""
        self.earlier, self.sends = [], 0

    @staticmethod
    @torch.no_grad()
    def after_step(layers, step, run=None):
        """A step makes an earlier calibration stale; the one of merge_at puts A* in the place of A."""
        for layer in layers:
            layer.A_star = None
        if step == layers[0].merge_step:
            ResLoRALinear.calibrate(layers, run, "regression")
            for layer in layers:
                if not layer.exact_merge:
                    # A_n <- A*_n
                    layer.lora_A.copy_(layer.A_star)
                layer.drop_shortcut()

    @staticmethod
    @torch.no_grad()
    def calibrate(layers, run, how=None):
        """Find A* of every layer; again after any change of the weights. how: a name of MERGES, else the layers' first.

        `run()` is a generator: it sends one batch after the other through the model, in eval mode, and yields after
        each (mask, M): mask (B, T) is False for positions that do not count, padding; M is a number that the model
        gave, with its graph, whose gradient weighs the positions, or None. It holds all layers' inputs of a batch.
        """
        layers = [layer for layer in layers if not layer.exact_merge]
        if not layers:
            return
        how = how or layers[0].merges[0]
        layers[0].check_merge(how)
        if how == "regression":
            regression(layers, run)
        else:
            paper_merge(layers, run, how)


def layer_inputs(layers, run):
    """Yield for each calibration batch {layer: its inputs (N, d_in)} and {layer: weights w (N, 1), or 1}.

    N counts the tokens that the mask keeps.
    """
    seen, gave = {}, {}
    wanted = list(set(layers).union(*(layer.earlier for layer in layers)))

    def keep(layer, args, h):
        seen[layer], gave[layer] = args[0].detach(), h
    hooks = [layer.register_forward_hook(keep) for layer in wanted]
    try:
        for mask, M in run():
            w = dict.fromkeys(wanted, 1)
            if M is not None:
                for layer, g in zip(wanted, torch.autograd.grad(M, [gave[q] for q in wanted]), strict=True):
                    # w = |B^T g|^2
                    w[layer] = (g[mask].to(layer.lora_B.dtype) @ layer.lora_B).square().sum(-1, keepdim=True)
            gave.clear()  # and with it the graph
            yield {layer: x[mask].to(layer.lora_A.dtype) for layer, x in seen.items()}, w
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("calibration needs at least one batch: run() yielded none")


def regression(layers, run, eps=1e-3):
    """A*_n = A_n + P_n, P_n = E[w z x^T] (E[w x x^T] + eps I)^-1, eps in units of the mean diagonal of E[w x x^T]."""
    xx, zx = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for x, w in layer_inputs(layers, run):
        for layer in layers:
            if layer.shortcut == "input":
                z = sum(x[e] for e in layer.earlier) @ layer.lora_A.T  # (N, r)
            else:
                z = sum(x[e] @ e.lora_A.T for e in layer.earlier)
            xx[layer] = xx[layer] + x[layer].T @ (w[layer] * x[layer])  # (d_in, d_in); sums do as well as means
            zx[layer] = zx[layer] + z.T @ (w[layer] * x[layer])  # (r, d_in)
    for layer in layers:
        C = xx[layer].cpu().double()
        C.diagonal().add_(eps * C.diagonal().mean() + torch.finfo(C.dtype).tiny)  # x = 0 has a solution too
        # P_n C = E[w z x^T], and A*_n = A_n + P_n
        P = torch.linalg.solve(C, zx[layer].cpu().double().T).T  # (r, d_in); C is symmetric
        layer.A_star = layer.lora_A + P.to(layer.lora_A)


def paper_merge(layers, run, how):
    """The merges of the paper, and "none", which drops the shortcut.

    input (merge_bi)    A* = (1 + sum_{1..m'} f_{n-k} / f_n) A_n       f: mean norm of x, with shortcut middle of A x
    weight (merge_bw)   middle  A* = A_n + sum_{1..m'} f_{n-k} / f_n A_{n-k}                          f: mean norm of x
                        input   A* = (1 + a_n) A_n, a_1 = 1, a_n = f*_{n-2} / f*_{n-1}, f* = |W*|, already merged
    """
    f, f_star = {}, {}
    if how == "input" or how == "weight" and layers[0].shortcut == "middle":
        for x, _ in layer_inputs(layers, run):
            for layer, x_n in x.items():
                by_branch = how == "input" and layer.shortcut == "middle"
                f[layer] = f.get(layer, 0) + (x_n @ layer.lora_A.T if by_branch else x_n).norm()
    for layer in layers:
        A = layer.lora_A
        if how == "none":
            layer.A_star = A.clone()
        elif how == "input":
            layer.A_star = (1 + sum(f[e] for e in layer.earlier) / f[layer]) * A
        elif layer.shortcut == "middle":
            layer.A_star = A + sum(f[e] / f[layer] * e.lora_A for e in layer.earlier)
        else:
            before = layer.earlier[0]  # layers come shallow to deep: it has its A* already
            f_star[before] = (before.weight + before.delta()).norm()
            a = f_star[before.earlier[0]] / f_star[before] if before.earlier else 1
            layer.A_star = (1 + a) * A


if __name__ == "__main__":
    import copy

    import torch.nn as nn

    from lora import apply, merge

    class Chain(nn.Module):
        """x <- x + q(norm(x)), four times: a residual stream, as in a transformer."""

        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16)}) for _ in range(4))

        def forward(self, x):
            for block in self.h:
                x = x + block["q"](F.layer_norm(x, x.shape[-1:]))
            return x

    torch.manual_seed(0)
    mix, base, y = torch.randn(16, 16), Chain(), torch.randn(512, 16)
    x, fresh = torch.randn(512, 16) @ mix, torch.randn(512, 16) @ mix  # to calibrate on, to measure on
    print("a chain of four layers, r 2, B random; merge errors are shares of what the adapter does, on fresh inputs\n")
    for shortcut, m in (("input", 0), ("input", 1), ("block", 1), ("middle", 1)):
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        layers = apply(model, ResLoRALinear, ["q"], r=2, alpha=4, shortcut=shortcut, pre_num=m)
        for layer in layers:
            nn.init.normal_(layer.lora_B, std=0.1)
        (model(x) - y).square().mean().backward()
        ranks = [len(layer.stacked()[0]) if shortcut == "block" else layer.r for layer in layers]
        print(f"{shortcut if m else 'LoRA':6}  merged ranks {ranks}  |dL/dA|",
              *(f"{layer.lora_A.grad.norm():.3f}" for layer in layers))

        def run(trial):
            trial(x)
            yield torch.ones(512, dtype=torch.bool), None

        out = model(fresh)
        for how in MERGES if shortcut != "block" and m else ("exact",):
            trial = copy.deepcopy(model)
            if how != "exact":
                ResLoRALinear.calibrate([block["q"] for block in trial.h], lambda trial=trial: run(trial), how)
            error = (merge(trial)(fresh) - out).norm() / (out - base(fresh)).norm()
            print(f"        merge {how:10} error {error:.4f}")
