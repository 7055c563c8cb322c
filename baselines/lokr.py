"""LoKr: low-rank Kronecker product. KronA, Edalati et al. 2022, arXiv:2212.10650; LyCORIS, Yeh et
al. 2023, arXiv:2309.14859.

    h = W x + b + s (W1 kron W2) drop(x),        s = alpha / r

    d_out = a c and d_in = b d with a <= c and b <= d, as near to each other as they divide
    (768 = 24 * 32);
    W1 (a, b), W2 (c, d), and if r < max(c, d) / 2 that is W2a W2b, (c, r) and (r, d).

Block (i, j) of W1 kron W2 is W1_ij W2: the same small matrix, repeated with different factors. So
there are few parameters, and the rank, which is the product of both ranks, may still be full. The
big matrix is never built: with x reshaped to a matrix X (b, d),

    (W1 kron W2) x = W1 X W2^T        as a matrix (a, c)

W1 starts at zero and the rest like LoRA's A, U(-1, 1) / sqrt(columns), as in PEFT, whose names
these are. (LyCORIS starts W2, or W2b, at zero.) When both factors are full, r only divides alpha,
as in PEFT, while LyCORIS has s = 1. There is no rank then whose square root rsLoRA could take.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear


class LoKrLinear(LoRALinear):
    """LoRALinear with a Kronecker product in the place of B A."""

    peft_type = "LOKR"

    def init_factors(self, d_out, d_in, **like):
        """W1, and W2 whole or as two factors; the other is None."""
        (a, c), (b, d) = divisors(d_out), divisors(d_in)
        self.lokr_w1 = nn.Parameter(torch.zeros(a, b, **like))
        self.lokr_w2 = self.lokr_w2_a = self.lokr_w2_b = None
        if self.r < max(c, d) / 2:
            self.lokr_w2_a = nn.Parameter(torch.empty(c, self.r, **like))
            self.lokr_w2_b = nn.Parameter(torch.empty(self.r, d, **like))
            nn.init.kaiming_uniform_(self.lokr_w2_a, a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.lokr_w2_b, a=math.sqrt(5))
        elif self.scale is not LoRALinear.scale:
            raise ValueError(f"rank {self.r} makes both factors of LoKr full for a linear of "
                             f"{d_in} -> {d_out}, which leaves no rank whose root could be taken: "
                             f"it must be below {max(c, d) / 2:g}")
        else:
            self.lokr_w2 = nn.Parameter(torch.empty(c, d, **like))
            nn.init.kaiming_uniform_(self.lokr_w2, a=math.sqrt(5))

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        X = self.drop(x).unflatten(-1, (self.lokr_w1.shape[1], -1))  # (..., b, d)
        # X W2^T, or X W2b^T W2a^T
        if self.lokr_w2 is None:
            X = F.linear(F.linear(X, self.lokr_w2_b), self.lokr_w2_a)  # (..., b, c)
        else:
            X = F.linear(X, self.lokr_w2)  # (..., b, c)
        # h = W x + b + s W1 (X W2^T)
        return F.linear(x, self.weight, self.bias) + ((self.scaling * self.lokr_w1) @ X).flatten(-2)

    def delta(self):
        """s W1 kron W2  (d_out, d_in)"""
        W2 = self.lokr_w2_a @ self.lokr_w2_b if self.lokr_w2 is None else self.lokr_w2
        return self.scaling * torch.kron(self.lokr_w1, W2)

    def as_lora(self):
        """(A', B') = (I kron W2b, W1 kron W2a), of rank b r; with W2 whole (I kron W2, W1 kron I),
        of rank b c."""
        W1 = self.lokr_w1  # (a, b)
        W2a, W2b = self.lokr_w2_a, self.lokr_w2_b
        if self.lokr_w2 is not None:
            W2a, W2b = torch.eye(len(self.lokr_w2)).to(W1), self.lokr_w2
        return torch.kron(torch.eye(W1.shape[1]).to(W1), W2b), torch.kron(W1, W2a)


def divisors(d):
    """(m, n) with m n = d and m <= n, as near to each other as can be."""
    m = next(m for m in range(math.isqrt(d), 0, -1) if d % m == 0)
    return m, d // m


if __name__ == "__main__":
    torch.manual_seed(0)
    for r in (2, 8, 16):
        layer, x = LoKrLinear(nn.Linear(768, 768), r, 1), torch.randn(5, 768)
        nn.init.normal_(layer.lokr_w1)
        size = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("lokr"))
        error = (layer(x) - x @ (layer.weight + layer.delta()).T - layer.bias).abs().max()
        print(f"768 -> 768, r {r:2}: {size:5} parameters (LoRA {2 * r * 768}), rank of the update "
              f"{torch.linalg.matrix_rank(layer.delta())}; W1 X W2^T and W1 kron W2 differ by "
              f"{error:.0e}")
