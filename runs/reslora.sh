#!/bin/sh
# ResLoRA: how many earlier layers should join in, and what does each merge keep? Then the curves of the three structures
# beside LoRA, at one rate for all and at each one's best; they are runs of the first grid with two more seeds.
# sh runs/reslora.sh [--quick]      (does the merged model beat LoRA: runs/merge_at.sh)
set -e
cd "$(dirname "$0")/.."
MERGES="--merge regression,input,weight,none"
FEWER="--merge regression,input,none"  # the paper's weight merge of input is defined for one earlier layer
# shellcheck disable=SC2086
python compare.py results/reslora-pre-num $1 --lr 1.2e-2 2.4e-2 4.8e-2 --best-lr --metric "unmerged loss" \
    --title "restaurants, r 16, each at its best rate, before merging" \
    --row "LoRA (m 0): --method lora" \
    --row "input, m 1: --method reslora $MERGES" \
    --row "input, m 2: --method reslora --pre-num 2 $FEWER" \
    --row "input, all: --method reslora --pre-num -1 $FEWER" \
    --row "block, m 1: --method reslora --shortcut block" \
    --row "block, m 2: --method reslora --shortcut block --pre-num 2" \
    --row "block, all: --method reslora --shortcut block --pre-num -1" \
    --row "middle, m 1: --method reslora --shortcut middle $MERGES" \
    --row "middle, m 2: --method reslora --shortcut middle --pre-num 2 $MERGES" \
    --row "middle, all: --method reslora --shortcut middle --pre-num -1 $MERGES" \
    -- --dataset restaurants --rank 16 --eval-every 30
curves() {  # name, more flags of compare.py, title
    # shellcheck disable=SC2086
    python compare.py "results/reslora-curves-$1" $QUICK $2 --seeds 3 --plot step --title "restaurants, r 16, $3" \
        --metric "unmerged loss" --row "LoRA: --method lora" --row "input: --method reslora $MERGES" \
        --row "block: --method reslora --shortcut block" --row "middle: --method reslora --shortcut middle $MERGES" \
        -- --dataset restaurants --rank 16 --eval-every 30
}
QUICK=$1
curves best "--lr 1.2e-2 2.4e-2 4.8e-2 --best-lr" "each at its best rate"
curves equal "--lr 1.2e-2" "all at rate 1.2e-2"
