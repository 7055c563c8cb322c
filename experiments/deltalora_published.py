"""Delta-LoRA with the paper's settings, beside its baselines: the paper's, and those it leaves out.

    python -m experiments.deltalora_published

The shipped GPT, 300 steps of `restaurants`, r 16 on q and v. Delta-LoRA with lambda .5 and 2, K at
the end of the warm-up or after a tenth of the run. Beside it LoRA, LoRA at three times
Delta-LoRA's rates (its Table 6), LoRA with (1 + lambda) alpha, which is what Delta-LoRA is for
K = 0, LoRA of the rank 2 r of its update, and full fine-tuning of q and v alone, its second
reference. Three rates on seed 0, five other seeds at the best. Writes
deltalora-published.csv and .png.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from compare import RESULTS, compare, parse
from lora import LoRALinear
from methods import METHODS, Method


class WholeLinear(LoRALinear):
    """h = (W + D) x + b with all of D (d_out, d_in) trained from 0: full fine-tuning of this linear
    alone. r and alpha say nothing here."""

    def init_factors(self, d_out, d_in, **like):
        self.lora_D = nn.Parameter(torch.zeros(d_out, d_in, **like))

    def forward(self, x):
        return F.linear(x, self.weight + self.lora_D, self.bias)

    def delta(self):
        return self.lora_D

    def as_lora(self):
        D = self.lora_D
        return torch.eye(D.size(1), device=D.device, dtype=D.dtype), D / self.scaling


def known():
    """In every process: the method that this experiment alone has."""
    METHODS["whole"] = Method(WholeLinear)


RATES, LOW = "1.2e-2 2.4e-2 4.8e-2", "6e-3 1.2e-2 2.4e-2"
ROWS = {"LoRA": f"--method lora --lr {RATES}",
        "LoRA, 3 times the rate": "--method lora --lr 1.8e-2 3.6e-2 7.2e-2",
        "LoRA, 1.5 alpha": f"--method lora --alpha 24 --lr {RATES}",
        "LoRA, 3 alpha": f"--method lora --alpha 48 --lr {LOW}",
        "LoRA r 32, 2 alpha": f"--method lora --rank 32 --alpha 32 --lr {RATES}",
        "q and v in full": "--method whole --lr 1.5e-3 3e-3 6e-3",
        **{f"Delta-LoRA, lambda {scale}, K {K}": f"--method deltalora --delta-lambda {scale} {more}"
           f"--lr {RATES if scale == '.5' else LOW}"
           for scale in (".5", "2") for K, more in (("warm-up", ""), ("30", "--delta-start 30 "))}}


def main():
    known()
    compare(parse([str(RESULTS / "deltalora-published"), *(word for name, flags in ROWS.items()
                   for word in ("--row", f"{name}: --rank 16 {flags}")), "--lr", "1e-2",
                   "--best-lr", "--seeds", "6", "--title",
                   "Delta-LoRA as published, beside its baselines", "--", "--dataset",
                   "restaurants", "--steps", "300", "--eval-every", "50"]), setup=known)


if __name__ == "__main__":
    main()
