"""ResLoRA: Identity Residual Mapping in Low-Rank Adaption. Shi et al. 2024, arXiv:2402.18039.

LoRA gives each layer its own low-rank branch; a gradient on its way to a shallow branch passes through all the frozen
layers above. ResLoRA adds shortcuts between the branches of neighbouring layers. Layers with the same target (all q,
all v) form a chain; x_n is the input and h_n the output of its n-th layer, counted from 0; m = pre_num,
m' = min(m, n); m = 0 is plain LoRA:

    input    h_n = W_n x_n + b + s B_n A_n (x_n + sum_{k=1..m'} x_{n-k})             (eq. 4; the paper has m = 1)
    block    h_n = W_n x_n + b + s sum_{k=0..m'} B_{n-k} A_{n-k} x_n                 (eq. 5)
    middle   h_n = W_n x_n + b + s B_n sum_{k=0..m'} A_{n-k} x_{n-k}                 (eq. 6)

Nothing is detached: the added gradient path, B_n A_n from h_n straight to x_{n-1}, is the point. It is closed at B = 0
and opens as B grows. The first layer of a chain has no predecessor and is plain LoRA. (The authors' code doubles its
input for `input`; the equation does not ask for that.)

Merging. Deployed, a layer should be one matrix again. `block` reads only x_n and merges exactly. `input` and `middle`
read other layers' activations, so their merged form approximates: the branch A_n x_n + z_n, with the shortcut's part

    z_n = A_n sum_k x_{n-k}   (input)            z_n = sum_k A_{n-k} x_{n-k}   (middle)              z_n is (r,)

is replaced by A*_n x_n. The paper's merges scale A by ratios of norms, which has the right size but not the direction.
Ours asks for the best matrix: neighbouring x_n share the residual stream, so z_n is largely a linear function of x_n.
Over the tokens of a few calibration batches,

    minimise over P   E |z_n - P x_n|^2     =>     P E[x x^T] = E[z x^T]     =>     P_n = E[z x^T] (E[x x^T] + eps I)^-1
    A*_n = A_n + P_n        W*_n = W_n + s B_n A*_n        merge = "regression"

This P is best for every B_n at once, since each component of z is fitted on its own. The rank stays r and the result is
an ordinary LoRA. With eps = 0 no linear merge has a smaller error of z on the calibration tokens.
"""
import torch
import torch.nn.functional as F

from lora import LoRALinear

SHORTCUTS = ("input", "block", "middle")
MERGES = ("regression", "input", "weight", "none")


class ResLoRALinear(LoRALinear):
    """LoRALinear with a shortcut from the `pre_num` earlier layers of its chain (-1: all of them).

    merge: how `calibrate` approximates `input` and `middle`; several names, separated by commas, are tried in train.py.
    """

    def __init__(self, linear, r, alpha, dropout=0.0, shortcut="input", pre_num=1, merge="regression"):
        super().__init__(linear, r, alpha, dropout)
        self.shortcut, self.pre_num, self.merges = shortcut, pre_num, tuple(merge.split(","))
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut {shortcut!r} is not one of {', '.join(SHORTCUTS)}")
        if pre_num < -1:
            raise ValueError(f"pre_num {pre_num} is neither a number of layers (0, 1, …) nor -1 for all of them")
        for how in self.merges:
            self.check_merge(how)
        self.earlier = []  # the layers n-1, n-2, …, n-m' of the chain; a plain list registers no submodules
        self.inbox, self.outbox = [], None  # see `exchange`
        self.A_star = None  # (r, d_in), what `calibrate` found

    def check_merge(self, how):
        if how not in MERGES:
            raise ValueError(f"merge {how!r} is not one of {', '.join(MERGES)}")
        if how == "weight" and self.shortcut == "input" and self.pre_num not in (0, 1):
            raise ValueError(f"merge 'weight' is defined by the paper for pre_num 1 only, not {self.pre_num}, "
                             "when the shortcut is 'input'")

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
            for layer, after in zip(chain, chain[1:], strict=False):
                layer.outbox = after.inbox

    def exchange(self, own):
        """Hand `own` to the next layer and return what the m' layers before this one handed over, nearest first.

        A link is one plain list, shared by two neighbours, full only between their two calls: no activation outlives
        the forward, nothing is global or in the state dict, copies of the model have links of their own.
        """
        if self.earlier and not self.inbox:
            raise RuntimeError("ResLoRA layers must be called in chain order, each once per forward: "
                               "this one was called before its predecessor")
        received = self.inbox.pop() if self.earlier else []
        if self.outbox is not None and self.pre_num:
            self.outbox[:] = [[own, *received][:None if self.pre_num == -1 else self.pre_num]]
        return received

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        A, B = self.lora_A, self.lora_B
        if self.shortcut == "input":
            # u = A_n drop(x_n + sum_k x_{n-k})
            u = F.linear(self.drop(sum(self.exchange(x), x)), A)  # (..., r)
        elif self.shortcut == "middle":
            # u = sum_{k=0..m'} A_{n-k} drop(x_{n-k}): own terms travel, not running sums
            u = F.linear(self.drop(x), A)
            u = sum(self.exchange(u), u)
        else:
            # B u = sum_k B_{n-k} A_{n-k} drop(x_n): the blocks stacked are one product of rank (m' + 1) r
            A, B = self.stacked()
            u = F.linear(self.drop(x), A)  # (..., (m' + 1) r)
        # h_n = W_n x_n + b + s B u
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, B)

    def stacked(self):
        """A ((m' + 1) r, d_in) and B (d_out, (m' + 1) r) of the blocks n, n-1, …, n-m'."""
        window = [self, *self.earlier]
        return torch.cat([layer.lora_A for layer in window]), torch.cat([layer.lora_B for layer in window], 1)

    # Merging

    @property
    def exact_merge(self):
        """Without an earlier layer, or reading nothing but x_n, the layer is a LoRA as it stands."""
        return self.shortcut == "block" or not self.earlier

    def as_lora(self):
        """(A', B') with W_merged = W + s B' A': stacked blocks, or B and the calibrated A*."""
        if self.shortcut == "block":
            return self.stacked()
        if self.exact_merge:
            return self.lora_A, self.lora_B
        if self.A_star is None:
            raise RuntimeError(f"shortcut {self.shortcut!r} merges only approximately: call calibrate first")
        return self.A_star, self.lora_B

    @staticmethod
    def after_step(layers, step):
        """A step makes an earlier calibration stale."""
        for layer in layers:
            layer.A_star = None

    @staticmethod
    @torch.no_grad()
    def calibrate(layers, run, how=None):
        """Find A* of every layer. how: a name of MERGES, by default the layers' first.

        `run()` is a generator: it sends one batch after the other through the model, in eval mode, and yields after
        each the positions that count (B, T), False for padding. Memory: the inputs of all layers for one batch.
        """
        layers = [layer for layer in layers if not layer.exact_merge]
        how = how or (layers[0].merges[0] if layers else None)
        for layer in layers:
            layer.check_merge(how)
        if layers:
            (regression if how == "regression" else paper_merge)(layers, run, how)


def inputs(layers, run):
    """Yield for every calibration batch {layer: its inputs (N, d_in)}, N counting the tokens that are no padding."""
    seen = {}
    wanted = set(layers).union(*(layer.earlier for layer in layers))
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0]})) for layer in wanted]
    try:
        for real in run():
            yield {layer: x[real].to(layer.lora_A.dtype) for layer, x in seen.items()}
    finally:
        for hook in hooks:
            hook.remove()


def regression(layers, run, how=None, eps=1e-3):
    """A*_n = A_n + P_n, P_n = E[z x^T] (E[x x^T] + eps I)^-1, eps in units of the mean diagonal of E[x x^T]."""
    xx, zx = {layer: 0 for layer in layers}, {layer: 0 for layer in layers}
    for x in inputs(layers, run):
        for layer in layers:
            if layer.shortcut == "input":
                z = sum(x[e] for e in layer.earlier) @ layer.lora_A.T  # (N, r)
            else:
                z = sum(x[e] @ e.lora_A.T for e in layer.earlier)
            xx[layer] = xx[layer] + x[layer].T @ x[layer]  # (d_in, d_in): sums do as well as means
            zx[layer] = zx[layer] + z.T @ x[layer]  # (r, d_in)
    for layer in layers:
        C = xx[layer].double()
        C.diagonal().add_(eps * C.diagonal().mean())
        P = torch.linalg.solve(C, zx[layer].double().T).T  # C is symmetric
        layer.A_star = layer.lora_A + P.to(layer.lora_A.dtype)


def paper_merge(layers, run, how):
    """The merges of the paper (section 3.3), and "none", which drops the shortcut.

    input (merge_bi)    A* = (1 + sum_k f_{n-k} / f_n) A_n      f: mean norm of x, with shortcut middle of A x
    weight (merge_bw)   middle: A* = A_n + sum_k f_{n-k} / f_n A_{n-k}                         f: mean norm of x
                        input:  A* = (1 + f*_{n-2} / f*_{n-1}) A_n; f* = |W*| of the layers merged before, a_1 = 1
    """
    f, star = {}, {}
    for x in inputs(layers, run) if how != "none" else ():
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
            before = layer.earlier[0]  # layers come shallow to deep, so it is merged already
            for e in (before, *before.earlier):
                if e not in star:
                    star[e] = (e.weight + e.delta()).norm()
            a = star[before.earlier[0]] / star[before] if before.earlier else 1
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

    x = torch.randn(512, 16) @ torch.randn(16, 16)
    for shortcut in SHORTCUTS:
        torch.manual_seed(0)
        model = Chain()
        base = model(x)
        layers = apply(model, ResLoRALinear, ["q"], r=2, alpha=4, shortcut=shortcut, pre_num=1)
        for layer in layers:
            nn.init.normal_(layer.lora_B, std=0.1)
        out = model(x)
        out.square().sum().backward()
        ranks = [len(layer.stacked()[0]) if shortcut == "block" else layer.r for layer in layers]
        print(f"{shortcut:6}  A {tuple(layers[0].lora_A.shape)}  B {tuple(layers[0].lora_B.shape)}  ranks {ranks}")
        print("        |dL/dA|", *(f"{layer.lora_A.grad.norm():8.1f}" for layer in layers))

        def run(trial):
            trial(x)
            yield torch.ones(512, dtype=torch.bool)

        for how in MERGES:
            trial = copy.deepcopy(model)
            ResLoRALinear.calibrate([block["q"] for block in trial.h], lambda trial=trial: run(trial), how)
            error = (merge(trial)(x) - out).norm() / (out - base).norm()
            print(f"        merge {how:10} error {error:.4f} of what the adapter does")
            if shortcut == "block":
                break  # exact, there is nothing to choose
