"""Bytes of a base in 4 bits against bf16: of the frozen linears, and of a process that loads a
checkpoint; and the count for a Llama of 7 billion weights, of which nothing is made.

    python -m experiments.qlora_memory FOLDER      a checkpoint folder, that of smollm2.py
"""
import os
import subprocess
import sys

import torch
import torch.nn as nn

import qlora
from checkpoints.pretrained import load
from experiments.bench import PRESETS
from model import Llama

LOAD = """
import sys, threading, time, torch
from checkpoints.pretrained import load

def resident():  # (memory of its own, with the file's pages that it has mapped)
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    own, mapped = (int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile"))
    return own, own + mapped
start, highest = resident(), (0, 0)
def watch():
    global highest
    while True:
        highest = tuple(map(max, highest, resident()))
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
model, _ = load(sys.argv[1], dtype=torch.bfloat16, bits=int(sys.argv[2]) or None)
for p in model.parameters():
    p.max()  # a file is read where it is used
print(*(a - b for a, b in zip(highest, start)), resident()[1] - start[1])
"""


def linears(model):
    """The weights of the linears in the blocks."""
    return [m.weight for m in model.h.modules() if isinstance(m, nn.Linear)]


def size(weight):
    """Bytes of a weight, in 4 bits or not."""
    parts = weight.parameters() if isinstance(weight, qlora.NF4) else [weight]
    return sum(p.nbytes for p in parts)


def main(folder):
    for bits in (0, 4):
        model, _ = load(folder, dtype=torch.bfloat16, bits=bits or None)
        # what is freed goes back to the system at once
        done = subprocess.run([sys.executable, "-c", LOAD, folder, str(bits)], capture_output=True,
                              text=True, check=True,
                              env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
        own, highest, after = map(float, done.stdout.split())
        print(f"{bits or 16} bits: linears {sum(map(size, linears(model))) / 1e6:.1f} MB; loading "
              f"takes {own:.0f} MB at its highest, {highest:.0f} MB with the pages of the file, "
              f"which the system may drop; {after:.0f} MB stay")
    with torch.device("meta"):
        model = Llama(PRESETS["llama-7b"][0])
    n = sum(w.numel() for w in linears(model))
    rest = sum(p.numel() for p in model.parameters()) - n
    packed = sum(w.numel() // 2 + w.numel() // 64 + 4 * w.numel() // (64 * 256) + 4
                 for w in linears(model))
    print(f"llama-7b: {n:,} weights in linears, {2 * n / 1e9:.2f} GB in bf16 and "
          f"{packed / 1e9:.2f} GB in 4 bits ({packed / (2 * n):.3f}); {2 * rest / 1e9:.2f} GB of "
          "the rest in bf16")


if __name__ == "__main__":
    main(*sys.argv[1:])
