"""The mean cross entropy over a vocabulary, and its gradient, without the table of all logits.

    z = x W^T + b
    L = -mean_n sum_v y_v log softmax(z_n)_v        dL/dz_n = (softmax(z_n) - y_n) / N

    x (N, C): the N tokens that have a target; W (V, C): the output embedding; b (V,) or None;
    z (N, V). y_n (V,): 1 at the target; with label smoothing eps it is 1 - eps there, and
    everywhere eps / V more.

2,048 tokens of GPT-2 have 412 MB of logits, and autograd would hold them three times. Here a chunk
of tokens passes through forward and backward at once: its part of dL/dx = dL/dz W is computed while
its logits are there.

In bf16 the products have factors in bf16 and results in fp32. Logits of the real GPT-2 are near
-70, where neighbours in bf16 are half a nat apart; rounding them there would shift the loss.
"""
import math

import torch

CHUNK = 2**25  # logits at a time: 134 MB in fp32


def with_targets(x, targets):
    """x (B, T, C), targets (B, T) -> the N rows of x with a target (N, C), and these targets (N,).
    Targets may stay on the CPU: then it finds these positions without waiting for the GPU."""
    targets = targets.flatten()
    where = (targets != -100).nonzero().flatten()  # (N,)
    x = x.flatten(0, 1).index_select(0, where.to(x.device, non_blocking=True))
    return x, targets[where].to(x.device, non_blocking=True)


def vocabulary_loss(x, W, b, targets, label_smoothing=0.0):
    """L in nats, a scalar in fp32 or wider: x (N, C), W (V, C), b (V,) or None, targets (N,). NaN
    for N = 0."""
    if not len(x):
        return x.sum() * math.nan
    return VocabularyLoss.apply(x, W, b, targets, label_smoothing, torch.is_grad_enabled())


class VocabularyLoss(torch.autograd.Function):
    """`vocabulary_loss` of at least one token. eps: the label smoothing. learning: whether
    gradients are wanted."""

    @staticmethod
    def forward(ctx, x, W, b, targets, eps, learning):
        device, (N, V) = x.device.type, (len(x), len(W))
        arithmetic = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device)
                      else x.dtype)
        wide = torch.promote_types(arithmetic, torch.float32)
        ctx.N, ctx.dtypes = N, [None if t is None else t.dtype for t in (x, W, b)]
        x, W = x.to(arithmetic), W.to(arithmetic)
        if device != "cuda":  # only CUDA multiplies bf16 factors to an fp32 result
            x, W = x.to(wide), W.to(wide)
        result = {} if W.dtype == wide else {"out_dtype": wide}
        dx, dW, db = (torch.zeros_like(t) if learning and need else None
                      for t, need in zip((x, W, b), ctx.needs_input_grad[:3], strict=True))
        n = math.ceil(N / math.ceil(N * V / CHUNK))  # tokens of a chunk, as many in each
        buffer, L = x.new_empty(n, V, dtype=wide), x.new_zeros((), dtype=wide)
        with torch.autocast(device, enabled=False):
            for start in range(0, N, n):
                x_n, target = x[start:start + n], targets[start:start + n, None]  # (n, C), (n, 1)
                # z = x W^T + b; all that follows works in place
                z = torch.mm(x_n, W.T, **result, out=buffer[:len(x_n)])  # (n, V)
                z = z if b is None else z.add_(b)
                # softmax(z) stays the same, and e^z cannot overflow
                z.sub_(z.amax(1, keepdim=True))
                # L of a token = -sum_v y_v z_v + log sum_v e^(z_v)
                L -= (1 - eps) * z.gather(1, target).sum() + (eps / V * z.sum() if eps else 0)
                total = z.exp_().sum(1, keepdim=True)  # (n, 1)
                L += total.log().sum()
                if not learning:
                    continue
                # N dL/dz = softmax(z) - y; the division by N is left to `backward`
                dz = z.div_(total).scatter_add_(1, target, z.new_full(target.shape, eps - 1))
                dz = dz.sub_(eps / V) if eps else dz
                if db is not None:
                    db += dz.sum(0)
                dz = dz.to(W.dtype)
                if dx is not None:
                    torch.mm(dz, W, out=dx[start:start + n])
                if dW is not None:
                    dW.addmm_(dz.T, x_n)
        ctx.save_for_backward(dx, dW, db)
        return L / N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        scale = gradient / ctx.N
        return *(None if d is None else d.to(dtype) * scale.to(dtype) for d, dtype in
                 zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None, None, None
