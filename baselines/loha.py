"""LoHa: low-rank Hadamard product. FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; for adapters:
LyCORIS, Yeh et al. 2023, arXiv:2309.14859.

    h = W x + b + s ((W1a W1b) o (W2a W2b)) drop(x),      s = alpha / r      o: element by element

    W1a, W2a (d_out, r); W1b, W2b (r, d_in): twice LoRA's parameters. The rank of the product is up
    to r^2, where LoRA with as many parameters has 2 r.

Why r^2: row i of W1a W1b is a sum over k of W1a_ik W1b_k, and the product of two sums is a sum over
all pairs,

    (W1a W1b)_ij (W2a W2b)_ij = sum_{k,l} (W1a_ik W2a_il) (W1b_kj W2b_lj)

so LoHa is a LoRA of rank r^2. The columns of its B' (d_out, r^2) are products of all pairs of
columns, and the rows of its A' (r^2, d_in) products of all pairs of rows. As long as r^2 is below
the sides of W, the forward uses this form and builds no matrix of the size of W.

W2a starts at zero as in LyCORIS (PEFT: W2b). The other three start like LoRA's A, U(-1, 1) /
sqrt(columns), as in PEFT. LyCORIS draws much larger values, N(0, 1) and N(0, .01), so its learning
rates do not carry over. The names are its own.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear


class LoHaLinear(LoRALinear):
    """LoRALinear with two pairs of factors, multiplied element by element."""

    peft_type = "LOHA"

    def init_factors(self, d_out, d_in, **like):
        """Two of LoRA's pairs: a (d_out, r), b (r, d_in)."""
        for pair in ("w1", "w2"):
            a = nn.Parameter(torch.empty(d_out, self.r, **like))
            b = nn.Parameter(torch.empty(self.r, d_in, **like))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            setattr(self, f"hada_{pair}_a", a)
            setattr(self, f"hada_{pair}_b", b)
        nn.init.zeros_(self.hada_w2_a)

    def as_lora(self):
        """(A', B') of rank r^2: A'_{(k,l)} = W1b_k o W2b_l and B'_{(k,l)} = W1a_k o W2a_l, rows and
        columns."""
        A = self.hada_w1_b[:, None] * self.hada_w2_b  # (r, 1, d_in) * (r, d_in)
        B = self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]  # (d_out, r, 1) * (d_out, 1, r)
        return A.flatten(0, 1), B.flatten(1)

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        h = F.linear(x, self.weight, self.bias)
        if self.r**2 >= min(self.weight.shape):
            # h = W x + b + s ((W1a W1b) o (W2a W2b)) drop(x)
            return h + F.linear(self.drop(x), self.delta())
        A, B = self.as_lora()
        # u = A' drop(x)
        u = F.linear(self.drop(x), A)  # (..., r^2)
        # h = W x + b + s B' u
        return h + F.linear(self.scaling * u, B)

    def delta(self):
        """s (W1a W1b) o (W2a W2b)  (d_out, d_in)"""
        return self.scaling * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)


if __name__ == "__main__":
    torch.manual_seed(0)
    for r in (1, 2, 4):
        loha, plain = LoHaLinear(nn.Linear(24, 24), r, 1), LoRALinear(nn.Linear(24, 24), 2 * r, 1)
        nn.init.normal_(loha.hada_w2_a)
        nn.init.normal_(plain.lora_B)
        ranks = [torch.linalg.matrix_rank(layer.delta()).item() for layer in (loha, plain)]
        x = torch.randn(5, 24)
        error = (loha(x) - x @ (loha.weight + loha.delta()).T - loha.bias).abs().max()
        print(f"{4 * r * 24} parameters: LoHa r {r} has rank {ranks[0]}, "
              f"LoRA r {2 * r} has rank {ranks[1]}; "
              f"the sum over pairs and the product differ by {error:.0e}")
