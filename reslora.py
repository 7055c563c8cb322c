"""ResLoRA: Identity Residual Mapping in Low-Rank Adaption. Shi et al. 2024, arXiv:2402.18039.

LoRA gives each layer a low-rank branch of its own, so a gradient reaches a shallow branch only
through all the frozen layers above it. ResLoRA adds shortcuts between the branches of neighbours.
Layers with the same target (all q, or all v) are a chain. Layer n, counted from 0, has input x_n
and output h_n. The shortcut reaches m = pre_num layers back, and fewer at the beginning of the
chain: m' = min(m, n), or m' = n for m = -1.

    input    h_n = W_n x_n + b_n + s B_n A_n drop(x_n + sum_{k=1..m'} x_{n-k})    the paper: m = 1
    block    h_n = W_n x_n + b_n + s sum_{k=0..m'} B_{n-k} A_{n-k} drop(x_n)
    middle   h_n = W_n x_n + b_n + s B_n sum_{k=0..m'} A_{n-k} drop(x_{n-k})

    x_n (..., d_in), h_n (..., d_out), W_n (d_out, d_in), A_n (r, d_in), B_n (d_out, r)

The first layer of a chain has no earlier one. `block` and `middle` are plain LoRA there. `input`
sets x_{-1} = x_0, so that every layer's branch reads a sum of the same size (the paper says so
after its eq. 2):

    input    h_0 = W_0 x_0 + b_0 + s B_0 A_0 drop(x_0 + x_0)

That is LoRA with twice the scale. With m = 0 there is no shortcut, and every layer is plain LoRA.

Nothing is detached: the added gradient path is the point. Let g_n = dL/dh_n and m = 1. With
`input` x_{n-1} gains the gradient s A_n^T B_n^T g_n (the paper's eq. 16), with `middle` it gains
s A_{n-1}^T B_n^T g_n. Both contain B_n, so these paths are closed at the start, where B = 0. With
`block` A_{n-1} and B_{n-1} receive a gradient from g_n too, and that of B_{n-1} is open at once.
`block` drops x_n once for all its blocks; the authors' code draws a mask for each.

Merging turns a layer into one matrix again. `block` reads only x_n and merges exactly. So does the
first layer of `input`, by A*_0 = 2 A_0. Elsewhere `input` and `middle` read what other layers
read, so a matrix that multiplies x_n can only approximate them. The part of the branch that comes
from the shortcut is

    z_n = A_n sum_{k=1..m'} x_{n-k}   (input)      z_n = sum_{k=1..m'} A_{n-k} x_{n-k}   (middle)

z_n has r numbers. The paper lets x_n stand for x_{n-k} and corrects its size by ratios of norms,
but not its direction. Ours is least squares. Neighbouring x_n are strongly correlated (the residual
stream), so z_n is nearly a linear function P_n x_n, where P_n is (r, d_in). It is fitted over the
tokens of a few calibration batches. The rank stays r.

    minimise over P   E |z_n - P x_n|^2     =>     P_n = E[z x^T] E[x x^T]^-1
    A*_n = A_n + P_n        W*_n = W_n + s B_n A*_n

A classifier predicts once per text, and few of its tokens matter. Let M be its prediction as one
number, its margin. To first order, an error z_n - P x_n at a token changes M by at most
s |B_n^T dM/dh_n| |z_n - P x_n|. So where there is a margin, the fit is weighted:

    minimise over P   E w |z_n - P x_n|^2     =>     P_n = E[w z x^T] E[w x x^T]^-1
    w = |B_n^T dM/dh_n|^2
"""
import warnings
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F

import lora

SHORTCUTS = ("input", "block", "middle")
MERGES = ("regression", "bi", "bw", "none")


class ResLoRALinear(lora.LoRALinear):
    """LoRALinear with a shortcut from the `pre_num` earlier layers of its chain (-1: all of them).

    merge: how `calibrate` approximates `input` and `middle`, a name of MERGES or a list of them,
    default first. Layers must be called in chain order, each once per forward. nn.DataParallel
    breaks this order, and so does activation checkpointing that does not use `recompute`."""

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        A, B = self.lora_A, self.lora_B
        if self.shortcut == "input":
            # u = A_n drop(x_n + sum_{k=1..m'} x_{n-k}); in the first layer x_{-1} = x_0
            total = x + x if self.doubles else x
            for x_earlier in self.exchange(x):  # x_{n-1}, …, x_{n-m'}
                total = total + x_earlier
            u = F.linear(self.drop(total), A)  # (..., r)
        elif self.shortcut == "middle":
            # u = sum_{k=0..m'} u_{n-k}, where u_n = A_n drop(x_n) is each layer's own term
            u = F.linear(self.drop(x), A)  # (..., r)
            for u_earlier in self.exchange(u):  # u_{n-1}, …, u_{n-m'}
                u = u + u_earlier
        else:
            # B u = sum_{k=0..m'} B_{n-k} A_{n-k} drop(x_n): one product of rank (m' + 1) r
            A, B = self.stacked()
            u = F.linear(self.drop(x), A)  # (..., (m' + 1) r)
        # h_n = W_n x_n + b_n + s B u
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, B)

    def exchange(self, own):
        """Return the activations of the m' earlier layers, the nearest first, and pass on `own`.

        Every layer has a mailbox, its `inbox`. A layer finds there one list, with what the layers
        before it have passed on, and takes it out. It puts its own activation in front of that
        list, keeps as many as the next layer reads, and puts them into the next layer's mailbox,
        which is its `outbox`. So a mailbox is full only between the calls of two neighbours."""
        if self.earlier and not self.inbox:
            raise RuntimeError("ResLoRA layers must be called in chain order, each once, and this "
                               "one came too early. Activation checkpointing calls them again: see "
                               "ResLoRALinear.recompute")
        received = self.inbox.pop() if self.earlier else []
        if self.sends:
            window = [own, *received]
            self.outbox[:] = [window[:self.sends]]  # replaces what an interrupted forward has left
        return received

    @staticmethod
    def connect(chains):
        """Tell every layer which layers are before it, and give neighbours a mailbox in common."""
        for target, chain in chains.items():
            for n, layer in enumerate(chain):
                shape, first = tuple(layer.weight.shape), tuple(chain[0].weight.shape)
                if shape != first:
                    raise ValueError(f"ResLoRA needs layers of one shape: {target}[{n}] has "
                                     f"{shape}, the first {first}")
                m = n if layer.pre_num == -1 else min(layer.pre_num, n)
                layer.earlier = chain[n - m:n][::-1]
            for layer, after in pairwise(chain):
                layer.outbox, layer.sends = after.inbox, len(after.earlier)
            if len(chain) == 1:
                same = "LoRA with 2 alpha" if chain[0].doubles else "plain LoRA"
                warnings.warn(f"ResLoRA: {target} is a single layer without neighbours, so it is "
                              f"{same}. Layers form a chain when their names end alike: "
                              "blocks.0.fc and blocks.1.fc", stacklevel=3)

    @property
    def doubles(self):
        """True for the first layer of `input`, where x_{-1} = x_0. With m = 0 nothing doubles."""
        return self.shortcut == "input" and not self.earlier and self.pre_num != 0

    def stacked(self):
        """A ((m' + 1) r, d_in) and B (d_out, (m' + 1) r) of the blocks n, n-1, …, n-m'."""
        window = [self, *self.earlier]
        return (torch.cat([layer.lora_A for layer in window]),
                torch.cat([layer.lora_B for layer in window], 1))

    def delta(self):
        """Delta W = s B' A' (d_out, d_in), with the factors of `as_lora`."""
        A, B = self.as_lora()
        return self.scaling * (B @ A)

    def __init__(self, linear, r, alpha, dropout=0.0, shortcut="input", pre_num=1,
                 merge="regression"):
        super().__init__(linear, r, alpha, dropout)
        self.shortcut, self.pre_num = shortcut, pre_num
        self.merges = [merge] if isinstance(merge, str) else list(merge)
        check(self, self.merges)
        self.earlier = []  # the layers n-1, …, n-m'; a plain list registers no submodules
        self.inbox, self.outbox, self.sends = [], [], 0  # see `exchange`
        self.register_buffer("A_star", None, persistent=False)  # A* (r, d_in), see `calibrate`

    def as_lora(self):
        """(A', B') with W_merged = W + s B' A': the stacked blocks, or A* and B."""
        if self.shortcut == "block":
            return self.stacked()
        # A*_0 = 2 A_0 where x_{-1} = x_0, and A_0 in the first layer of the others
        A = (2 if self.doubles else 1) * self.lora_A if self.exact_merge else self.A_star
        if A is None:
            raise RuntimeError(f"shortcut {self.shortcut!r} merges only approximately: call "
                               "calibrate first")
        return A, self.lora_B

    @property
    def exact_merge(self):
        """True for a layer that reads nothing but x_n, and so is a LoRA as it stands."""
        return self.shortcut == "block" or not self.earlier

    @staticmethod
    def after_step(layers, step):
        """An optimizer step makes an earlier calibration stale."""
        for layer in layers:
            layer.A_star = None

    @staticmethod
    def recompute(block):
        """The contexts of a checkpointed block's two runs. The second one, in the backward, must
        find in the mailboxes what the first found there."""
        layers = [m for m in block.modules() if isinstance(m, ResLoRALinear)]
        mailboxes = [list(layer.inbox) for layer in layers]

        @contextmanager
        def again():
            for layer, window in zip(layers, mailboxes, strict=True):
                layer.inbox[:] = window
            try:
                yield
            finally:
                for layer in layers:
                    layer.inbox.clear()
                    layer.outbox.clear()
        return nullcontext(), again()

    @staticmethod
    def prepare_merge(model, merge, calibration):
        """`calibrate` with one of `merges`."""
        calibrate(model, merge=merge, **calibration)


@torch.no_grad()
def calibrate(model, batches, run=None, real=None, margin=None, merge=None, eps=1e-3):
    """Find A* of every layer that merges only approximately. Call it again when weights changed.

    batches: some training data in batches of any kind, a dozen for a language model, thousands of
        texts for a classifier.
    run: a function that sends a batch through the model and returns the output. None: the model.
    real: a function of a batch: which of its tokens are no padding, a tensor of True and False in
        the shape of the inputs without d_in. None: all are real.
    margin: for a classifier, a function of the output: the sum over the texts of the largest logit
        minus the mean logit, or of a regression's predictions. None for a language model.
    merge: a name of MERGES. None: the first that the layers were made with.
    eps: of the regression, see there."""
    layers = [m for m in model.modules() if isinstance(m, ResLoRALinear) and not m.exact_merge]
    if not layers:
        return
    merge = merge or layers[0].merges[0]
    check(layers[0], [merge])
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        seen = layer_inputs(layers, batches, run or model, real, margin)
        if merge == "regression":
            regression(layers, seen, eps)
        else:
            paper_merge(layers, seen, merge)
    finally:
        for module, mode in training.items():
            module.training = mode


def layer_inputs(layers, batches, run, real, margin):
    """Yield for each batch {layer: its inputs at the N real tokens (N, d_in)} and {layer: their
    weights w (N, 1), or 1 without a margin}, of `layers` and all that they read from."""
    wanted = list(set(layers).union(*(layer.earlier for layer in layers)))
    inputs, outputs = {}, {}

    def keep(layer, args, h):
        inputs[layer] = args[0].detach()
        if margin:
            outputs[layer] = h
            if not h.requires_grad:
                h.requires_grad_()  # a model that is frozen altogether has no graph of its own
    for batch in batches:
        hooks = [layer.register_forward_hook(keep) for layer in wanted]
        try:
            with torch.set_grad_enabled(margin is not None):
                output = run(batch)
                M = margin(output) if margin else None
        finally:
            for hook in hooks:
                hook.remove()
        mask = real(batch) if real else torch.ones_like(inputs[wanted[0]][..., 0], dtype=torch.bool)
        w = dict.fromkeys(wanted, 1)
        if margin:
            slopes = torch.autograd.grad(M, [outputs[layer] for layer in wanted])
            for layer, dM_dh in zip(wanted, slopes, strict=True):
                # w = |B^T dM/dh|^2
                B = layer.lora_B
                w[layer] = (dM_dh[mask].to(B.dtype) @ B).square().sum(-1, keepdim=True)
        yield {layer: x[mask].to(layer.lora_A.dtype) for layer, x in inputs.items()}, w
    if not inputs:
        raise ValueError("calibration needs at least one batch: batches is empty")


def regression(layers, seen, eps):
    """A*_n = A_n + P_n with P_n = E[w z x^T] (E[w x x^T] + eps I)^-1, eps in units of the mean
    diagonal of E[w x x^T]. seen: see `layer_inputs`."""
    xx, zx = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for x, w in seen:
        for layer in layers:
            if layer.shortcut == "input":
                z = sum(x[earlier] for earlier in layer.earlier) @ layer.lora_A.T  # (N, r)
            else:
                z = sum(x[earlier] @ earlier.lora_A.T for earlier in layer.earlier)  # (N, r)
            # sums do as well as means
            xx[layer] = xx[layer] + x[layer].T @ (w[layer] * x[layer])  # (d_in, d_in)
            zx[layer] = zx[layer] + z.T @ (w[layer] * x[layer])  # (r, d_in)
    for layer in layers:
        C = xx[layer].cpu().double()
        # the tiny number keeps it solvable for x = 0
        C.diagonal().add_(eps * C.diagonal().mean() + torch.finfo(C.dtype).tiny)
        # P_n C = E[w z x^T], and A*_n = A_n + P_n
        P = torch.linalg.solve(C, zx[layer].cpu().double().T).T  # (r, d_in); C is symmetric
        layer.A_star = layer.lora_A + P.to(layer.lora_A)


def paper_merge(layers, seen, merge):
    """The merges of the paper, which has m = 1, and "none", which drops the shortcut.

    merge_bi            A*_n = (1 + sum_{k=1..m'} f_{n-k} / f_n) A_n       f: |x|, with middle |A x|
    merge_bw   middle   A*_n = A_n + sum_{k=1..m'} f_{n-k} / f_n A_{n-k}                      f: |x|
               input    A*_n = (1 + a_n) A_n,  a_1 = 1,  a_n = f*_{n-2} / f*_{n-1}
                        f*: |W*| of the layers that are merged already

    Norms are Frobenius norms, here summed over calibration batches. The paper takes them from a
    sliding window during training, its code from the last 100 batches. That merge_bw of middle has
    |x| is from that code. In it merge_flag 3 is merge_bw and 4 is merge_bi, while the README beside
    it has them the other way round."""
    f, f_star = {}, {}
    if merge == "bi" or merge == "bw" and layers[0].shortcut == "middle":
        for x, _ in seen:
            for layer, x_n in x.items():
                by_branch = merge == "bi" and layer.shortcut == "middle"
                f[layer] = f.get(layer, 0) + (x_n @ layer.lora_A.T if by_branch else x_n).norm()
    for layer in layers:
        A = layer.lora_A
        if merge == "none":
            layer.A_star = A.clone()
        elif merge == "bi":
            layer.A_star = (1 + sum(f[e] for e in layer.earlier) / f[layer]) * A
        elif layer.shortcut == "middle":
            layer.A_star = A + sum(f[e] / f[layer] * e.lora_A for e in layer.earlier)
        else:
            before = layer.earlier[0]  # layers come shallow to deep, so it has its A* already
            f_star[before] = (before.weight + before.delta()).norm()
            a = f_star[before.earlier[0]] / f_star[before] if before.earlier else 1
            layer.A_star = (1 + a) * A


def check(layer, merges):
    """ValueError for a shortcut, pre_num or merge that does not exist."""
    if layer.shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut {layer.shortcut!r} is not one of {', '.join(SHORTCUTS)}")
    if layer.pre_num < -1:
        raise ValueError(f"pre_num {layer.pre_num} is neither a number of layers (0, 1, …) nor -1")
    for merge in merges:
        if merge in ("input", "weight"):
            new = "bi" if merge == "input" else "bw"
            raise ValueError(f"merge {merge!r} is called {new!r} now, as in the paper: merge_{new}")
        if merge not in MERGES:
            raise ValueError(f"merge {merge!r} is not one of {', '.join(MERGES)}")
        if merge == "bw" and layer.shortcut == "input" and layer.pre_num not in (0, 1):
            raise ValueError(f"merge 'bw' of shortcut 'input' is defined for pre_num 1 only, not "
                             f"{layer.pre_num}")


if __name__ == "__main__":
    from collections import OrderedDict
    from copy import deepcopy
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(16, 16)))
                                 for _ in range(4)))
    for block in base:
        torch.nn.init.eye_(block.q.weight)  # x_{n+1} = x_n + …, as in a residual stream
    x, fresh = torch.randn(2, 512, 16)
    print("four layers, r 2, B random; errors of merges, as shares of what the adapter does")
    for shortcut in SHORTCUTS:
        model = deepcopy(base)
        layers = lora.apply(model, ResLoRALinear, ["q"], r=2, alpha=4, shortcut=shortcut)
        for layer in layers:
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        model(x).square().mean().backward()
        print(f"{shortcut:6}  |dL/dA|", *(f"{layer.lora_A.grad.norm():.2f}" for layer in layers))
        for merge in MERGES if shortcut != "block" else ["regression"]:  # block merges exactly
            calibrate(model, [x], merge=merge)
            error = lora.merge(deepcopy(model))(fresh) - model(fresh)
            share = error.norm() / (model(fresh) - base(fresh)).norm()
            print(f"        merge {merge:10}  error {share:.4f}")
