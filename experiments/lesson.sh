#!/bin/sh
# The grid of lesson.ipynb's last chapter: short runs, so that a class can repeat one, or add a row of its own. Some ten
# minutes on two cores.
# sh experiments/lesson.sh
set -e
cd "$(dirname "$0")/.."
exec python compare.py experiments/results/lesson --best-lr --seeds 5 --lr 1.2e-2 2.4e-2 4.8e-2 9.6e-2 \
    --plot none --row "LoRA: --method lora" --row "LoRA, 3 alpha: --method lora --alpha 48" \
    --row "ResLoRA input: --method reslora" \
    -- --dataset restaurants --rank 16 --steps 60 --eval-every 30 --test-texts 256
