"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski 2023, arXiv:2312.03732.

    h = W x + b + s B A x,        s = alpha / sqrt(r)          LoRA: alpha / r

Nothing else changes. Why the root: with B = 0 and the entries of A iid with a variance that does not depend on r, one
SGD step makes B A x proportional to s^2 r (s once in the forward, once in the gradient of B, and r terms in the sum).
The size of outputs and of input gradients therefore stays Theta(1) as r grows if and only if s is Theta(1 / sqrt(r))
(theorem 3.2); with alpha / r a larger rank learns less and less. Under Adam, which normalises the gradient, the update
grows with sqrt(r) instead, which is also a higher learning rate: retune it before crediting the rank.

rsLoRA(alpha) is LoRA(alpha sqrt(r)) exactly. So the root goes with every method: `--rs` multiplies alpha by sqrt(r).
"""
import math

from lora import LoRALinear


class RsLoRALinear(LoRALinear):
    """LoRALinear with the rank-stabilised scale."""

    @staticmethod
    def scale(r, alpha):
        """s = alpha / sqrt(r)"""
        return alpha / math.sqrt(r)  # new


if __name__ == "__main__":
    import torch
    import torch.nn as nn

    print("size of B A x after one SGD step on sum(h), x and W of 512 channels, learning rate 1e-3")
    for r in (1, 8, 64, 512):
        sizes = []
        for cls in (LoRALinear, RsLoRALinear):
            torch.manual_seed(0)
            layer, x = cls(nn.Linear(512, 512), r, alpha=16), torch.randn(64, 512)
            layer(x).sum().backward()
            layer.lora_B.data -= 1e-3 * layer.lora_B.grad
            sizes.append((x @ layer.delta().T).norm().item())
        print(f"r {r:3}   LoRA, alpha / r: {sizes[0]:9.2f}   rsLoRA, alpha / sqrt(r): {sizes[1]:7.2f}")
