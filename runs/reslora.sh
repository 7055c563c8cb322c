#!/bin/sh
# ResLoRA's training: curves of the three structures beside LoRA, and how many earlier layers join in.
# sh runs/reslora.sh [--quick]      (what merging keeps: runs/merges.py, runs/merge_at.sh)
set -e
cd "$(dirname "$0")/.."
# shellcheck disable=SC2086
python compare.py results/reslora-curves $1 --lr 1.2e-2 2.4e-2 4.8e-2 --seeds 3 --plot step \
    --title "restaurants, r 16, each at its best rate" --metric "unmerged loss" \
    --row "LoRA: --method lora" --row "input: --method reslora" \
    --row "block: --method reslora --shortcut block" --row "middle: --method reslora --shortcut middle" \
    -- --dataset restaurants --rank 16 --eval-every 30
# shellcheck disable=SC2086
python compare.py results/reslora-pre-num $1 --lr 1.2e-2 2.4e-2 4.8e-2 --best-lr --metric "unmerged loss" \
    --title "restaurants, r 16, each at its best rate, before merging" \
    --row "m 0 (LoRA): --method reslora --pre-num 0" \
    --row "input, m 1: --method reslora" --row "input, m 2: --method reslora --pre-num 2" \
    --row "input, m 4: --method reslora --pre-num 4" --row "input, all: --method reslora --pre-num -1" \
    --row "block, m 1: --method reslora --shortcut block" \
    --row "block, m 2: --method reslora --shortcut block --pre-num 2" \
    --row "block, m 4: --method reslora --shortcut block --pre-num 4" \
    --row "block, all: --method reslora --shortcut block --pre-num -1" \
    --row "middle, m 1: --method reslora --shortcut middle" \
    --row "middle, m 2: --method reslora --shortcut middle --pre-num 2" \
    --row "middle, m 4: --method reslora --shortcut middle --pre-num 4" \
    --row "middle, all: --method reslora --shortcut middle --pre-num -1" \
    -- --dataset restaurants --rank 16 --eval-every 30
