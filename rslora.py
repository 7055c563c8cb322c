"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski 2023,
arXiv:2312.03732.

    h = W x + b + s B A drop(x),        s = alpha / sqrt(r)          LoRA: alpha / r

    x (..., d_in), h (..., d_out), W (d_out, d_in), A (r, d_in), B (d_out, r)

Nothing else changes. Why the square root? B starts at 0, and the variance of A's entries does not
depend on r. So one SGD step makes the branch s B A x proportional to s^2 r: one s from the forward,
one from the gradient of B, and r terms in the sum. The paper's theorem: outputs and input gradients
keep their size as r grows if and only if s is Theta(1 / sqrt(r)). With alpha / r a larger rank
learns less and less.

Adam normalises the gradient. After its first step the branch is proportional to s r: constant in r
with alpha / r, growing as sqrt(r) with alpha / sqrt(r).

rsLoRA(alpha) is exactly LoRA(alpha sqrt(r)). Under Adam that is LoRA(alpha) whose B learns sqrt(r)
times as fast as A (see lora.py). So retune the rate before you credit the rank.

The square root works with any method that scales by alpha / r, AdaLoRA for example, which the paper
leaves open: `rank_stabilised(AdaLoRALinear)`, or the flag --rs.
"""
import math

from lora import LoRALinear


class RsLoRALinear(LoRALinear):
    """LoRALinear with the rank-stabilised scale."""

    @staticmethod
    def scale(r, alpha):
        """s = alpha / sqrt(r)"""
        return alpha / math.sqrt(r)  # new


def rank_stabilised(adapter):
    """A class like LoRALinear -> the same method with rsLoRA's scale. Its layers cannot be pickled,
    as the class has no place in a module; their state dicts can."""
    return type("Rs" + adapter.__name__, (adapter,), {"scale": staticmethod(RsLoRALinear.scale)})


if __name__ == "__main__":
    import torch
    import torch.nn as nn

    print("size of the branch s B A x after one step from B = 0")
    print("512 channels, alpha 16, mean of 10 seeds")
    columns = "SGD, alpha/r", "alpha/sqrt(r)", "Adam, alpha/r", "alpha/sqrt(r)"
    print(" " * 6, *(f"{column:>15}" for column in columns))
    linear = nn.Linear(512, 512)
    for r in (8, 64, 512):
        print(f"r {r:<4}", end="")
        for optimizer in (torch.optim.SGD, torch.optim.Adam):
            for cls in (LoRALinear, RsLoRALinear):
                size = 0
                for seed in range(10):
                    torch.manual_seed(seed)
                    layer, x = cls(linear, r, alpha=16), torch.randn(512)
                    layer(x).square().sum().backward()
                    optimizer([layer.lora_B], lr=1e-3).step()
                    size += (layer.delta() @ x).square().mean().sqrt().item() / 10
                print(f" {size:15.4f}", end="")
        print()
