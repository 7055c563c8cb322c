"""rsLoRA's theorem, measured: after one step, how large are the branch and the gradient that it
passes on, by rank?

    python -m experiments.rank_theorem [--quick]
        writes experiments/results/rank-theorem.csv and .png; seconds

One linear of 2,048 -> 2,048, alpha 16, a random input x, loss |h - y|^2 / 2 against a random y, one
step from B = 0 with SGD or Adam (rate 1e-4), five seeds. branch: root mean square of s B A x;
gradient: that of s A^T B^T g, g = dL/dh after the step, the branch's share of dL/dx. The theorem
says which scale keeps both where they are as r grows, under SGD: s^2 r is constant for alpha /
sqrt(r). Under Adam the branch goes as s r, constant for alpha / r. The gradient holds A^T A x, of
which the part along x goes as r and the rest as sqrt(r); below r = d the rest is the larger one, so
there the gradient goes as s^2 sqrt(r) under SGD and as s sqrt(r) under Adam. What the theorem says
of it begins at ranks near d.
"""
import sys

import torch
import torch.nn as nn

from compare import RESULTS, ROOT, STYLES, groups, mean, write_csv
from evaluation.plots import picture
from lora import LoRALinear
from rslora import RsLoRALinear

D, RATE = 2048, 1e-4
RANKS = (4, 16, 64, 256, 1024, 2048)


def one_step(cls, optimizer, r, seed):
    """(branch, gradient) after a step."""
    torch.manual_seed(seed)
    linear = nn.Linear(D, D).requires_grad_(False)
    x, y = torch.randn(D), torch.randn(D)
    layer = cls(linear, r, alpha=16)
    ((layer(x) - y).square().sum() / 2).backward()
    optimizer([layer.lora_A, layer.lora_B], lr=RATE).step()
    with torch.no_grad():
        branch = layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
        g = layer(x) - y
        gradient = layer.scaling * g @ layer.lora_B @ layer.lora_A
    return branch.square().mean().sqrt().item(), gradient.square().mean().sqrt().item()


def main(seeds):
    rows = []
    for name, optimizer in (("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam)):
        for method, cls in (("lora", LoRALinear), ("rslora", RsLoRALinear)):
            for r in RANKS:
                for seed in range(seeds):
                    branch, gradient = one_step(cls, optimizer, r, seed)
                    rows.append(dict(optimizer=name, method=method, rank=r, seed=seed,
                                     branch=f"{branch:.5g}", gradient=f"{gradient:.5g}"))
    return rows


def draw(rows, path):
    """A panel for each optimizer: sizes against rank, both axes logarithmic."""
    names = {"lora": "LoRA, s = alpha / r", "rslora": "rsLoRA, s = alpha / sqrt(r)"}
    with picture(path, 1, 2, figsize=(8, 3.8), sharey=True) as (figure, axes):
        for axis, optimizer in zip(axes, ("SGD", "Adam"), strict=True):
            for (name, method), same in groups(rows, "optimizer", "method").items():
                if name == optimizer:
                    colour, marker, _ = STYLES[method]
                    points = groups(same, "rank")
                    for what, line in (("branch", "-"), ("gradient", ":")):
                        sizes = [mean([float(r[what]) for r in at]) for at in points.values()]
                        axis.loglog([r for (r,) in points], sizes, line, color=colour,
                                    marker=marker, label=f"{names[method]}: {what}")
            axis.set_xticks(RANKS, map(str, RANKS), fontsize=8)
            axis.minorticks_off()
            axis.set(title=optimizer, xlabel="rank r")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("root mean square after one step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                      frameon=False, fontsize=9)


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    to = ROOT / "out/quick" if quick else RESULTS
    found = main(1 if quick else 5)
    write_csv(to / "rank-theorem.csv", found)
    draw(found, to / "rank-theorem.png")
    for (name, method), same in groups(found, "optimizer", "method").items():
        sizes = [mean([float(r["branch"]) for r in at]) for at in groups(same, "rank").values()]
        print(f"{name:5} {method:7} branch at r {', '.join(map(str, RANKS))}: "
              + ", ".join(f"{size:.4f}" for size in sizes))
