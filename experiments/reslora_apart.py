"""ResLoRA taken apart, m 1: is it what a shortcut adds to the forward, or the gradient that it lets
through?

    python -m experiments.reslora_apart [--seeds 5]

The shipped GPT on `restaurants`, r 16 on q and v. Each shortcut three times: whole; in the forward
alone, with what it brings detached, of `block` the earlier factors; in the gradient alone, where it
brings t - t.detach(), which is zero. Neither is LoRA. Beside them LoRA with 2 alpha. Three rates on
seed 0, and five seeds at the best. Gradient alone merges exactly: it computes what LoRA computes.
Writes experiments/results/reslora-apart.csv and .png.
"""
import argparse

import torch.nn.functional as F

from compare import RESULTS, compare, parse
from methods import METHODS, Method
from reslora import SHORTCUTS, ResLoRALinear

PARTS = "forward", "gradient"


class Apart(ResLoRALinear):
    """ResLoRALinear with one part of its shortcut."""

    def __init__(self, *args, part="forward", **hparams):
        self.part = part
        super().__init__(*args, **hparams)

    def only(self, t):
        """What the shortcut brings: the number, or the way of its gradient."""
        return t.detach() if self.part == "forward" else t - t.detach()

    def exchange(self, own):
        return [self.only(t) for t in super().exchange(own)]

    def forward(self, x):
        plain = F.linear(x, self.weight, self.bias)
        x_drop = self.drop(x)
        if self.doubles:
            # x_{-1} = x_0 is a shortcut too
            self.exchange(x)  # hands x on
            u = F.linear(x_drop + self.only(x_drop), self.lora_A)
            return plain + F.linear(self.scaling * u, self.lora_B)
        if self.shortcut == "block":
            h = plain + self.scaling * F.linear(F.linear(x_drop, self.lora_A), self.lora_B)
            for layer in self.earlier:
                A, B = layer.lora_A, layer.lora_B
                if self.part == "forward":
                    A, B = A.detach(), B.detach()
                h_k = self.scaling * F.linear(F.linear(x_drop, A), B)
                h = h + (h_k if self.part == "forward" else self.only(h_k))
            return h
        return super().forward(x)

    @property
    def exact_merge(self):
        return self.part == "gradient" or super().exact_merge

    def as_lora(self):
        return (self.lora_A, self.lora_B) if self.part == "gradient" else super().as_lora()


def known():
    """In every process: the method that experiments alone have."""
    flags = METHODS["reslora"].flags
    METHODS["reslora-apart"] = Method(Apart, {**flags, "part": dict(choices=PARTS,
                                                                    default="forward")},
                                      merge_only_flags=("merge",))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    known()
    rows = ["--row", "LoRA: --method lora", "--row", "LoRA, 2 alpha: --method lora --alpha 32"]
    for shortcut in SHORTCUTS:
        rows += ["--row", f"{shortcut}: --method reslora --shortcut {shortcut}"]
        for part in PARTS:
            rows += ["--row", f"{shortcut}, {part}: --method reslora-apart --shortcut {shortcut} "
                     f"--part {part}"]
    compare(parse([str(RESULTS / "reslora-apart"), *rows, "--lr", "1.2e-2", "2.4e-2", "4.8e-2",
                   "--best-lr", "--seeds", str(args.seeds), "--title", "ResLoRA taken apart",
                   "--", "--dataset", "restaurants", "--rank", "16"]), setup=known)


if __name__ == "__main__":
    main()
