#!/bin/sh
# How hard an embedded task is: LoRA r 4 and r 64 and full fine-tuning, for reviews also the head alone; three rates each.
# sh experiments/difficulty.sh restaurants|reviews      writes experiments/results/difficulty-$1.csv, five minutes on two cores
set -e
cd "$(dirname "$0")/.."
case "$1" in
    restaurants) lora="1.2e-2 2.4e-2 4.8e-2" full="3e-3 6e-3 1.2e-2" head="" ;;
    reviews) lora="1.5e-3 3e-3 6e-3" full="5e-4 1e-3 2e-3" head="3e-3 1e-2 3e-2" ;;
    *) echo "usage: sh experiments/difficulty.sh restaurants|reviews" >&2; exit 2 ;;
esac
run() { python train.py --dataset "$DATASET" --out "out/difficulty-$DATASET/$1" $2; }
DATASET=$1
for lr in $lora; do
    for rank in 4 64; do run "lora-$rank-$lr" "--method lora --rank $rank --lr $lr"; done
done
for lr in $full; do run "full-$lr" "--method full --lr $lr"; done
for lr in $head; do run "head-$lr" "--method head --lr $lr"; done
python -m experiments.collect "out/difficulty-$DATASET"/* > "experiments/results/difficulty-$DATASET.csv"
