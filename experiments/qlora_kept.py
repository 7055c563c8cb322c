"""How much of an adapter is left when the merged weight is rounded to 4 bits again.

    python -m experiments.qlora_kept BASE FOLDER [FOLDER ...]
        a checkpoint folder, and run folders of --base-bits 4 on it; prints rows of qlora-kept.csv

W_4 stands on points of the grid. What of W_4 + Delta W is nearer to the same point goes back to it.
With R = rounded(W_4 + Delta W) - W_4, over all adapted linears:

    kept = <R, Delta W> / |Delta W|^2
"""
import sys

import torch

import qlora
from checkpoints.adapters import load_adapter
from checkpoints.pretrained import load


def kept(base, folder):
    """(|Delta W| / |W_4|, kept) of a run."""
    model, _ = load(base, bits=4)
    of_W = of_delta = product = 0.0
    for layer in load_adapter(model, folder):
        W, delta = layer.weight.dequantise(torch.float32), layer.delta()
        R = qlora.to_nf4(W + delta).dequantise() - W
        of_W += W.square().sum().item()
        of_delta += delta.square().sum().item()
        product += (R * delta).sum().item()
    return (of_delta / of_W) ** 0.5, product / of_delta


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        print(folder, *(f"{value:.4f}" for value in kept(sys.argv[1], folder)), sep=",")
