#!/bin/sh
# ResLoRA: how many earlier layers should join in, and what does each merge keep? Then the curves of the three structures
# beside LoRA, at one rate for all and, with two more seeds, at each one's best: runs of the first grid.
# sh experiments/reslora.sh [--quick]
set -e
cd "$(dirname "$0")/.."
MERGES="--merge regression,bi,bw,none"
FEWER="--merge regression,bi,none"  # the paper's merge_bw of input is defined for one earlier layer
# shellcheck disable=SC2086
python compare.py experiments/results/reslora-pre-num $1 --lr 1.2e-2 2.4e-2 4.8e-2 --best-lr --metric "unmerged loss" \
    --title "restaurants, r 16, each at its best rate, before merging" \
    --row "LoRA (m 0): --method lora" \
    --row "input, m 1: --method reslora $MERGES" \
    --also "input, m 2: --method reslora --pre-num 2 $FEWER" \
    --also "input, m 4: --method reslora --pre-num 4 $FEWER" \
    --also "input, all: --method reslora --pre-num -1 $FEWER" \
    --row "block, m 1: --method reslora --shortcut block" \
    --also "block, m 2: --method reslora --shortcut block --pre-num 2" \
    --also "block, m 4: --method reslora --shortcut block --pre-num 4" \
    --also "block, all: --method reslora --shortcut block --pre-num -1" \
    --row "middle, m 1: --method reslora --shortcut middle $MERGES" \
    --also "middle, m 2: --method reslora --shortcut middle --pre-num 2 $MERGES" \
    --also "middle, m 4: --method reslora --shortcut middle --pre-num 4 $MERGES" \
    --row "middle, all: --method reslora --shortcut middle --pre-num -1 $MERGES" \
    -- --dataset restaurants --rank 16 --eval-every 30
curves() {  # name, more flags of compare.py, title
    # shellcheck disable=SC2086
    python compare.py "experiments/results/reslora-curves-$1" $QUICK $2 --plot step --title "restaurants, r 16, $3" \
        --metric "unmerged loss" --row "LoRA: --method lora" --row "input: --method reslora $MERGES" \
        --row "block: --method reslora --shortcut block" --row "middle: --method reslora --shortcut middle $MERGES" \
        -- --dataset restaurants --rank 16 --eval-every 30
}
QUICK=$1
curves best "--lr 1.2e-2 2.4e-2 4.8e-2 --best-lr --seeds 3" "each at its best rate"
[ -n "$QUICK" ] || curves equal "--lr 1.2e-2" "all at rate 1.2e-2"
