#!/bin/sh
# Does a merged ResLoRA keep what it gained over LoRA? The shipped GPT, 300 steps of real E2E text, m 1 and all, each
# row at its best of three rates, LoRA at its own; seed 0 chooses, three other seeds report. All merges of each run.
# sh experiments/merges_best.sh E2E      a folder of experiments/e2e_split.py
set -e
cd "$(dirname "$0")/.."
ALL="--merge regression,bi,bw,none"
python compare.py experiments/results/merges-best --best-lr --seeds 4 --lr 1.2e-2 2.4e-2 4.8e-2 --plot none \
    --row "LoRA: --method lora" \
    --row "input, m 1: --method reslora $ALL" \
    --row "input, all: --method reslora --pre-num -1 --merge regression,bi,none" \
    --row "middle, m 1: --method reslora --shortcut middle $ALL" \
    --row "middle, all: --method reslora --shortcut middle --pre-num -1 $ALL" \
    -- --dataset e2e --data-dir "$1" --rank 16 --steps 300 --eval-every 50
