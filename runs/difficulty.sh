#!/bin/sh
# How hard `restaurants` is: the base, LoRA r 4, LoRA r 64 and full fine-tuning, three rates each.
# sh runs/difficulty.sh      writes results/difficulty.csv, five minutes on two cores
set -e
cd "$(dirname "$0")/.."
for lr in 1.2e-2 2.4e-2 4.8e-2; do
    for rank in 4 64; do
        python train.py --method lora --rank $rank --lr $lr --out out/difficulty/lora-$rank-$lr
    done
done
for lr in 3e-3 6e-3 1.2e-2; do
    python train.py --method full --lr $lr --out out/difficulty/full-$lr
done
mkdir -p results
python runs/collect.py out/difficulty/* > results/difficulty.csv
