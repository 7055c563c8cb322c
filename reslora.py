"""ResLoRA: Identity Residual Mapping in Low-Rank Adaption. Shi et al. 2024, arXiv:2402.18039.

LoRA gives each layer a low-rank branch of its own, so a gradient reaches the branch of a shallow
layer only through the layers above it. ResLoRA adds shortcuts between the branches of neighbours.

Layers of one kind (all q, or all v) are a chain, see lora.chains_of. Layer n, counted from 0, has
input x_n and output h_n. (x_{n+1} is not h_n: the rest of the transformer's block lies between.) A
shortcut reaches m = pre_num layers back, where there are so many: m' = min(m, n), or m' = n for
m = -1.

    input    h_n = W_n x_n + b_n + s B_n A_n drop(x_n + sum_{k=1..m'} x_{n-k})
    block    h_n = W_n x_n + b_n + s sum_{k=0..m'} B_{n-k} A_{n-k} drop(x_n)
    middle   h_n = W_n x_n + b_n + s B_n sum_{k=0..m'} A_{n-k} drop(x_{n-k})

    x_n (..., d_in), h_n (..., d_out), W_n (d_out, d_in), A_n (r, d_in), B_n (d_out, r)

The paper has m = 1 for `input`. There is nothing before the first layer of a chain. `block` and
`middle` are plain LoRA there. `input` takes x_{-1} = x_0 in the first layer, as the paper says
after its eq. 2:

    input    h_0 = W_0 x_0 + b_0 + s B_0 A_0 drop(x_0 + x_0)

That is LoRA with twice the scale. For m = 1 the branch of every layer then reads a sum of two
inputs. For pre_num = 0 there is no shortcut: every layer is plain LoRA, the first one too.

The gradient. Nothing that is passed on is detached, because the gradient has to take the same way
back. Let g_n = dL/dh_n and m = 1. Beside its usual gradient, x_{n-1} gets

    s A_n^T B_n^T g_n        with `input` (the paper's eq. 16)
    s A_{n-1}^T B_n^T g_n    with `middle`

and hands it on to the layers below. With `middle` A_{n-1} gets a gradient from g_n as well. All of
these contain B_n, so they are zero at the start, where B = 0. With `block` g_n also gives a
gradient to A_{n-1} and B_{n-1}. That of B_{n-1} is s g_n (A_{n-1} x_n)^T, not zero at the start.

`block` applies dropout to x_n once, for all its products B A; the authors' code does it anew for
each of them.

Merging turns a layer into one matrix again. `block` reads only x_n, so it merges exactly. The first
layer of a chain merges exactly too: with `middle` it is plain LoRA, and with `input` it is LoRA
with 2 A_0 in the place of A_0. In all other layers of `input` and `middle` the shortcut adds
s B_n z_n, which depends on inputs of other layers:

    z_n = A_n sum_{k=1..m'} x_{n-k}   (input)      z_n = sum_{k=1..m'} A_{n-k} x_{n-k}   (middle)

A matrix that multiplies x_n can only approximate z_n. The paper puts a multiple of the layer's own
term in its place. The multiple is a ratio of norms, so the length is right and the direction is
not. We fit z_n by least squares instead. In a transformer a block adds only a little to what it
reads, so x_n and x_{n-1} are alike, and z_n is nearly a linear function P_n x_n. With E, the mean
over the tokens of a few calibration batches:

    minimise over P   E |z_n - P x_n|^2     =>     P_n E[x x^T] = E[z x^T]
    A*_n = A_n + P_n        W*_n = W_n + s B_n A*_n

z_n has r numbers a token, so P_n has the shape of A_n, and the rank stays r.

A classifier predicts once per text, and only a few tokens of a text matter for that. Let M be the
margin, the prediction as one number. By the chain rule, and to first order, an error z_n - P x_n at
a token changes M by at most s |B_n^T dM/dh_n| |z_n - P x_n|. With a margin we minimise the square
of that; s is the same for all tokens and may be left out.

    minimise over P   E w |z_n - P x_n|^2     =>     P_n E[w x x^T] = E[w z x^T]
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

    merge: how `calibrate` approximates `input` and `middle`: a name of MERGES, or a list of them
    whose first is the default. Layers of `input` and `middle` must be called in chain order, each
    once per forward. nn.DataParallel breaks this order, and so does activation checkpointing
    without `recompute`."""

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
            # u_n = A_n drop(x_n) is the layer's own term, and only that is passed on
            u = F.linear(self.drop(x), A)  # (..., r)
            # u = sum_{k=0..m'} u_{n-k}
            for u_earlier in self.exchange(u):  # u_{n-1}, …, u_{n-m'}
                u = u + u_earlier
        else:
            # B A drop(x_n) = sum_{k=0..m'} B_{n-k} A_{n-k} drop(x_n), where B and A are stacked:
            # one product of rank (m' + 1) r
            A, B = self.stacked()
            u = F.linear(self.drop(x), A)  # (..., (m' + 1) r)
        # h_n = W_n x_n + b_n + s B u
        return F.linear(x, self.weight, self.bias) + F.linear(self.scaling * u, B)

    def exchange(self, own):
        """Return the activations of the m' earlier layers, the nearest first, and hand `own` to the
        next layer.

        A layer's `inbox` is empty, or it holds one list: what the layers before have passed on. The
        layer takes that list out, puts its own activation in front of it, cuts it to as many as the
        next layer reads, and puts it into its `outbox`, which is the next layer's inbox. So an
        inbox is filled by one layer and emptied by the next. With m = 2:

            layer 0 hands on [x_0], layer 1 hands on [x_1, x_0], layer 2 hands on [x_2, x_1]"""
        if self.earlier and not self.inbox:
            raise RuntimeError(f"{self.name} came before {self.earlier[0].name}: ResLoRA "
                               "layers must be called in chain order, each once. Activation "
                               "checkpointing calls them again: see ResLoRALinear.recompute. "
                               f"{self.parted()}")
        received = self.inbox.pop() if self.earlier else []
        for before, other in zip(self.earlier, received, strict=True):
            if other.shape[:-1] != own.shape[:-1]:
                raise RuntimeError(f"{before.name} was called on a sequence of shape "
                                   f"{tuple(other.shape)} and {self.name} on {tuple(own.shape)}: "
                                   f"they are no neighbours. {self.parted()}")
        if self.sends:
            passed_on = [own, *received][:self.sends]
            # [:] because the neighbour has the same list; it also replaces what a forward that
            # ended in an error has left there
            self.outbox[:] = [passed_on]
        return received

    def parted(self):
        """In words, the target whose layers have the same first number."""
        parts = self.name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()][1:]
        pattern = ".".join("*" if i in numbers else part for i, part in enumerate(parts))
        return (f"A target such as {pattern!r} makes a chain of its own" if numbers
                else "The shortcut 'block' does not need their order")

    @staticmethod
    def connect(chains):
        """Called by lora.apply with {chain: [its layers, shallow to deep]}. Tells every layer which
        ones are before it, and gives neighbours a list in common, to pass activations on."""
        for name, chain in chains.items():
            for n, layer in enumerate(chain):
                shape, first_shape = tuple(layer.weight.shape), tuple(chain[0].weight.shape)
                if shape != first_shape:
                    raise ValueError(f"ResLoRA needs layers of one shape: {name}, layer {n}, has "
                                     f"{shape}, the first {first_shape}")
                reach = n if layer.pre_num == -1 else min(layer.pre_num, n)  # m'
                layer.earlier = chain[n - reach:n][::-1]  # the nearest first
            for layer, after in pairwise(chain):
                layer.outbox = after.inbox  # the same list
                layer.sends = len(after.earlier)
        alone = [name for name, chain in chains.items() if len(chain) == 1]
        if alone:
            same = "LoRA with 2 alpha" if chains[alone[0]][0].doubles else "plain LoRA"
            more = f" (and so are {len(alone) - 1} more)" * (len(alone) > 1)
            warnings.warn(f"ResLoRA: {alone[0]} is a single layer without neighbours, so it is "
                          f"{same}{more}. Layers form a chain when their names are equal but for a "
                          "number: blocks.0.fc and blocks.1.fc", stacklevel=3)

    @property
    def doubles(self):
        """True for the first layer of `input`, where x_{-1} = x_0. For pre_num = 0 none does."""
        return self.shortcut == "input" and not self.earlier and self.pre_num != 0

    def stacked(self):
        """A ((m' + 1) r, d_in) and B (d_out, (m' + 1) r) of the blocks n, n-1, …, n-m'."""
        layers = [self, *self.earlier]
        return (torch.cat([layer.lora_A for layer in layers]),
                torch.cat([layer.lora_B for layer in layers], 1))

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
        # the layers n-1, …, n-m'; in a plain list they do not become submodules of this one
        self.earlier = []
        self.inbox, self.outbox, self.sends = [], [], 0  # see `exchange`
        self.register_buffer("A_star", None, persistent=False)  # A* (r, d_in), see `calibrate`

    def as_lora(self):
        """(A', B') with W_merged = W + s B' A': the stacked factors, 2 A_0, A, or A*."""
        if self.shortcut == "block":
            return self.stacked()
        if self.doubles:
            return 2 * self.lora_A, self.lora_B
        if self.exact_merge:
            return self.lora_A, self.lora_B
        if self.A_star is None:
            raise RuntimeError(f"shortcut {self.shortcut!r} merges only approximately: call "
                               "calibrate first")
        return self.A_star, self.lora_B

    @property
    def exact_merge(self):
        """True for a layer whose branch reads nothing but x_n, and so is a LoRA already."""
        return self.shortcut == "block" or not self.earlier

    @staticmethod
    def after_step(layers, step):
        """Called after each optimizer step: A* of an earlier calibration does not fit any more."""
        for layer in layers:
            layer.A_star = None

    @staticmethod
    def recompute(block):
        """For torch's activation checkpointing (context_fn), which runs a block once in the forward
        and again in the backward. The inboxes are kept now and filled again for the second run."""
        layers = [m for m in block.modules() if isinstance(m, ResLoRALinear)]
        kept = [list(layer.inbox) for layer in layers]

        @contextmanager
        def again():
            for layer, inbox in zip(layers, kept, strict=True):
                layer.inbox[:] = inbox
            try:
                yield
            finally:
                for layer in layers:
                    layer.inbox.clear()
                    layer.outbox.clear()
        return nullcontext(), again()

    @staticmethod
    def prepare_merge(model, merge, calibration):
        """Called before merging: `calibrate` by the merge of this name."""
        calibrate(model, merge=merge, **calibration)


@torch.no_grad()
def calibrate(model, batches, run=None, real=None, margin=None, merge=None, eps=1e-3):
    """Find A*, which takes the place of A in the merged weight, for every layer that merges only
    approximately. Call it again when weights have changed.

    batches: some training data in batches of any kind, a dozen for a language model, thousands of
        texts for a classifier.
    run: a function that sends a batch through the model and returns the output. None: the model.
    real: takes a batch, returns a tensor (B, T), True at tokens that are not padding. None: all.
        Of an encoder-decoder a list of two; a layer takes the one of its input's length.
    margin: for a classifier, takes the output, returns the sum over the texts of the largest logit
        minus the mean logit; where a label is a number, the sum of the predictions. None for a
        language model.
    merge: a name of MERGES. None: the layers' own default.
    eps: of the regression: eps times the mean of a diagonal is added to it."""
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
    """For each batch yield two dicts, of `layers` and of all that they read from: {layer: its
    inputs at the N real tokens (N, d_in)} and {layer: their weights w (N, 1), 1 without a
    margin}."""
    wanted = list(set(layers).union(*(layer.earlier for layer in layers)))
    inputs, outputs = {}, {}

    def keep(layer, args, h):
        inputs[layer] = args[0].detach()
        if margin:
            outputs[layer] = h
            if not h.requires_grad:
                h.requires_grad_()  # nothing trains: h has no graph of its own yet
    for batch in batches:
        hooks = [layer.register_forward_hook(keep) for layer in wanted]
        try:
            with torch.set_grad_enabled(margin is not None):
                output = run(batch)
                M = margin(output) if margin else None
        finally:
            for hook in hooks:
                hook.remove()
        masks = real(batch) if real else []
        mask = {layer: mask_for(x, masks) for layer, x in inputs.items()}
        w = dict.fromkeys(wanted, 1)
        if margin:
            slopes = torch.autograd.grad(M, [outputs[layer] for layer in wanted])
            for layer, dM_dh in zip(wanted, slopes, strict=True):
                # w = |B^T dM/dh|^2
                B = layer.lora_B
                w[layer] = (dM_dh[mask[layer]].to(B.dtype) @ B).square().sum(-1, keepdim=True)
        yield {layer: x[mask[layer]].to(layer.lora_A.dtype) for layer, x in inputs.items()}, w
    if not inputs:
        raise ValueError("calibration needs at least one batch: batches is empty")


def mask_for(x, masks):
    """Of the masks (B, T) the one that fits inputs x (B, T, d_in); all True where there is none."""
    masks = [masks] if torch.is_tensor(masks) else masks
    fitting = [mask for mask in masks if mask.shape == x.shape[:-1]]
    if masks and (not fitting or any(not torch.equal(fitting[0], mask) for mask in fitting[1:])):
        raise ValueError(f"`real` gives masks of {[tuple(mask.shape) for mask in masks]}: exactly "
                         f"one has to fit inputs of {tuple(x.shape)}")
    return fitting[0] if fitting else torch.ones_like(x[..., 0], dtype=torch.bool)


def regression(layers, seen, eps):
    """A*_n = A_n + P_n with P_n (E[w x x^T] + ridge I) = E[w z x^T], which is solvable where few
    directions of x occur: ridge is eps times the mean diagonal. seen: of `layer_inputs`."""
    xx, zx = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for x, w in seen:
        for layer in layers:
            if layer.shortcut == "input":
                z = sum(x[earlier] for earlier in layer.earlier) @ layer.lora_A.T  # (N, r)
            else:
                z = sum(x[earlier] @ earlier.lora_A.T for earlier in layer.earlier)  # (N, r)
            # sums in the place of means: the factor 1 / N cancels in P
            xx[layer] = xx[layer] + x[layer].T @ (w[layer] * x[layer])  # (d_in, d_in)
            zx[layer] = zx[layer] + z.T @ (w[layer] * x[layer])  # (r, d_in)
    for layer in layers:
        C = xx[layer].cpu().double()
        # the tiny number is for x = 0, where the mean diagonal is 0 too
        C.diagonal().add_(eps * C.diagonal().mean() + torch.finfo(C.dtype).tiny)
        # P C = zx is C P^T = zx^T, since C is symmetric
        P = torch.linalg.solve(C, zx[layer].cpu().double().T).T  # (r, d_in)
        layer.A_star = layer.lora_A + P.to(layer.lora_A)


def paper_merge(layers, seen, merge):
    """The merges of the paper, and "none", which drops the shortcut. The paper has m = 1; the sums
    over k are ours.

    bi   input    A*_n = (1 + sum_{k=1..m'} f_{n-k} / f_n) A_n          f_n = |x_n|
    bi   middle   the same                                              f_n = |A_n x_n|
    bw   middle   A*_n = A_n + sum_{k=1..m'} (f_{n-k} / f_n) A_{n-k}    f_n = |x_n|
    bw   input    A*_n = (1 + a_n) A_n      a_n = |W*_{n-2}| / |W*_{n-1}|, a_1 = 1

    Norms are Frobenius norms. Those of activations are summed over the calibration batches. The
    paper takes them from a sliding window during training, its code from the last 100 batches. The
    paper leaves open which norm bw of middle has; |x_n| is its code's. In that code merge_flag 3 is
    merge_bw and 4 is merge_bi, while the README of that code has them the other way round."""
    f, W_star = {}, {}
    if merge == "bi" or (merge == "bw" and layers[0].shortcut == "middle"):
        for x, _ in seen:
            for layer, x_n in x.items():
                of_branch = merge == "bi" and layer.shortcut == "middle"  # |A_n x_n|
                f[layer] = f.get(layer, 0) + (x_n @ layer.lora_A.T if of_branch else x_n).norm()
    for layer in layers:
        A = layer.lora_A
        if merge == "none":
            layer.A_star = A.clone()
        elif merge == "bi":
            layer.A_star = (1 + sum(f[e] for e in layer.earlier) / f[layer]) * A
        elif layer.shortcut == "middle":
            layer.A_star = A + sum(f[e] / f[layer] * e.lora_A for e in layer.earlier)
        else:
            # layers come shallow to deep, so the one before is merged already (layer 0 exactly)
            before = layer.earlier[0]
            W_star[before] = (before.weight + before.delta()).norm()
            a = W_star[before.earlier[0]] / W_star[before] if before.earlier else 1
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
    x, fresh = torch.randn(512, 16), torch.randn(512, 16)
    print("four layers, r 2, B random; error of the merged output over what the adapter does")
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
            name = merge if shortcut != "block" else "exact"
            print(f"        merge {name:10}  error {share:.4f}")
