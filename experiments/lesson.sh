#!/bin/sh
# The grid of lessons/3-comparison.ipynb: short runs, so that a class can repeat one, or add a row of its own. Seed 0
# chooses the rate, five other seeds report. A few minutes on two cores.
# sh experiments/lesson.sh
set -e
cd "$(dirname "$0")/.."
exec python compare.py experiments/results/lesson --best-lr --seeds 6 --lr 6e-3 1.2e-2 2.4e-2 4.8e-2 \
    --plot none --row "LoRA: --method lora" --row "LoRA, 3 alpha: --method lora --alpha 48" \
    --row "ResLoRA input: --method reslora" \
    -- --dataset restaurants --rank 16 --steps 30 --batch-size 16 --eval-every 30 --test-texts 64
