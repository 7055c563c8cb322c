"""Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices. Zi et al. 2023,
arXiv:2309.02411.

LoRA, and after the optimizer step t > K = delta_start (t = 1, 2, …) the pretrained weight follows
the branch:

    h   = W_t x + b + s B_t A_t x,        s = alpha / r
    W_t = W_{t-1} + lambda s (B_t A_t - B_{t-1} A_{t-1})          lambda = delta_lambda

    x (..., d_in), h (..., d_out), W (d_out, d_in), A (r, d_in), B (d_out, r)

W has no gradient and no optimizer state. Why it may follow the branch: without dropout in the
branch, dL/dW = (1/s) dL/d(BA), so the motion of B A stands in for a gradient step of W. (This is a
heuristic, because B A does not move along -dL/d(BA).) Dropout in the branch breaks the equality and
is refused.

The paper waits about as long as the warm-up. On E2E and WebNLG it uses lambda = 2 and K = 500,
about 2 % of its E2E run. On GLUE lambda is .5 and K is the warm-up of each task, and on XSum with
BART lambda is .5 and K = 1000. It counts t from 0 with the same condition t > K, so there W begins
to move one step later than here.

The sum telescopes, since what one step subtracts is what the step before has added:

    W_T = W_0 + lambda s (B_T A_T - B_K A_K)
    merged: W_T + s B_T A_T = W_0 + s [(1 + lambda) B_T | -lambda B_K] [A_T ; A_K]

So the total update is a plain LoRA of rank 2 r at most (of rank r for K = 0, since B_0 = 0), and an
exported adapter needs nothing but A_T, B_T, A_K and B_K. With K = 0 the layer computes what
(1 + lambda) s B A would, while the gradient carries only s. Adam ignores such a factor. So this
Delta-LoRA is LoRA with (1 + lambda) alpha, up to Adam's eps, weight decay and clipping, and that
LoRA is the fair baseline. Clipping sees gradients 1 + lambda times smaller here: a limit that is
1 + lambda times smaller makes the two equal again.
"""
import torch

from lora import LoRALinear


class DeltaLoRALinear(LoRALinear):
    """LoRALinear whose W follows the delta of B A from step delta_start + 1 on. `forward` and
    `delta` are LoRA's."""

    moves_weight = True  # so W is fp32: in bf16 most elements would ignore so small an update

    @staticmethod
    @torch.no_grad()
    def after_step(layers, step):
        """W += lambda s (B_t A_t - B_{t-1} A_{t-1}), in place, as one product of rank 2 r: no d x d
        temporary. It is written with the differences of the factors, so that no two large products
        cancel:

        B_t A_t - B_{t-1} A_{t-1} = (B_t - B_{t-1}) A_t + B_{t-1} (A_t - A_{t-1})
        """
        for layer in layers:
            if step > layer.delta_start:
                B = torch.cat([layer.lora_B - layer.B_prev, layer.B_prev], 1)  # (d_out, 2r)
                A = torch.cat([layer.lora_A, layer.lora_A - layer.A_prev])  # (2r, d_in)
                # W_t = W_{t-1} + lambda s [B_t - B_{t-1} | B_{t-1}] [A_t ; A_t - A_{t-1}]
                layer.weight.addmm_(B, A, alpha=layer.delta_lambda * layer.scaling)
                layer.W_has_moved.fill_(True)
            elif step == layer.delta_start:
                layer.A_K.copy_(layer.lora_A)
                layer.B_K.copy_(layer.lora_B)
            if step >= layer.delta_start:
                layer.A_prev.copy_(layer.lora_A)
                layer.B_prev.copy_(layer.lora_B)

    def __init__(self, linear, r, alpha, dropout=0.0, delta_lambda=2.0, delta_start=500):
        check(dropout, delta_lambda, delta_start)
        super().__init__(linear, r, alpha)
        if self.weight.dtype != self.lora_A.dtype:
            W = self.weight.to(self.lora_A.dtype)
            self.weight = torch.nn.Parameter(W, requires_grad=False)
        self.delta_lambda, self.delta_start = delta_lambda, delta_start
        # Adapter-sized copies of the factors: after the last step, and after step K
        self.register_buffer("A_prev", self.lora_A.detach().clone())
        self.register_buffer("B_prev", self.lora_B.detach().clone())
        self.register_buffer("A_K", self.lora_A.detach().clone())
        self.register_buffer("B_K", self.lora_B.detach().clone())
        self.register_buffer("W_has_moved", torch.tensor(False, device=linear.weight.device))

    def as_lora(self):
        """(A', B') of the branch and the motion of W together, relative to W_0:
        A' = [A_T ; A_K] (2r, d_in) and B' = [(1 + lambda) B_T | -lambda B_K] (d_out, 2r).
        The rank is r before W has moved, and for K = 0."""
        if not self.W_has_moved:
            return self.lora_A, self.lora_B
        B_T = (1 + self.delta_lambda) * self.lora_B
        if not self.B_K.any():  # K = 0
            return self.lora_A, B_T
        return (torch.cat([self.lora_A, self.A_K]),
                torch.cat([B_T, -self.delta_lambda * self.B_K], 1))

    @staticmethod
    def begin(layers, steps, done=0):
        """Refuse a run that would end before W moves: it is plain LoRA."""
        K = layers[0].delta_start
        if K >= steps:
            raise ValueError(f"delta_start {K} leaves W where it is in a run of {steps} steps: it "
                             f"must be below {steps}")
        return 1


def check(dropout, delta_lambda, delta_start):
    """ValueError for values that the method does not have."""
    if dropout:
        raise ValueError("Delta-LoRA has no dropout in the branch (dL/dW = dL/d(BA) / s needs "
                         f"that): dropout must be 0, not {dropout}")
    if not (isinstance(delta_start, int) and delta_start >= 0):
        raise ValueError(f"delta_start {delta_start} is not a number of steps, 0 or more")
    if not 0 <= delta_lambda <= 1e6:
        raise ValueError(f"delta_lambda {delta_lambda} is not in [0, 1e6]")


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    linear = torch.nn.Linear(8, 8).requires_grad_(False)
    layer = DeltaLoRALinear(linear, r=2, alpha=4, delta_start=3)
    W_0, optimizer = layer.weight.clone(), torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
    print(*(f"{name} {tuple(p.shape)} " for name, p in layer.named_parameters()))
    for step in range(1, 9):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.after_step([layer], step)
        moved = (layer.weight - W_0).norm()
        print(f"step {step}  loss {loss:.4f}",
              f"W follows, |W - W_0| {moved:.4f}" if step > layer.delta_start else "plain LoRA")
    merged, (A, B) = layer.weight + layer.delta(), layer.as_lora()
    rank = torch.linalg.matrix_rank(merged - W_0, atol=1e-5)
    print(f"rank of the total update: {rank}, from r = {layer.r}")
    print(f"W_0 plus a LoRA of rank {len(A)} is the merged weight: they differ by "
          f"{(W_0 + layer.scaling * B @ A - merged).abs().max():.0e}")
