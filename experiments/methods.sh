#!/bin/sh
# All methods at the trained numbers of LoRA r 16 (LoKr has far fewer), each at its best of its rates; beside them LoRA
# whose B learns faster, LoRA with more scale or rank, and full fine-tuning. Seed 0 chooses the rate, five other seeds
# report. Small starts (AdaLoRA, LoHa, LoKr) want larger rates.
# sh experiments/methods.sh [--quick]      reviews; with E2E=FOLDER (python -m experiments.e2e_split) real E2E text too
set -e
cd "$(dirname "$0")/.."
MERGES="--merge regression,bi,bw,none"
grid() {  # dataset, more flags of compare.py, rates, those of ratio 4, of 16, of small starts, full fine-tuning, flags
    # shellcheck disable=SC2086
    python compare.py "experiments/results/methods-$1" $QUICK --lr $3 --seeds 6 --best-lr $2 \
        --title "$1: test loss after merging, each at its best rate" \
        --row "LoRA r 16: --method lora --rank 16" \
        --row "LoRA r 16, ratio 4: --method lora --rank 16 --lr-ratio 4 --lr $4" \
        --also "LoRA r 16, ratio 16: --method lora --rank 16 --lr-ratio 16 --lr $5" \
        --row "LoRA r 16, 3 alpha: --method lora --rank 16 --alpha 48 --lr $4" \
        --also "LoRA r 32, 2 alpha: --method lora --rank 32 --alpha 32" \
        --row "rsLoRA r 16: --method rslora --rank 16 --lr $4" \
        --row "ResLoRA input: --method reslora --rank 16 $MERGES" \
        --also "ResLoRA block: --method reslora --rank 16 --shortcut block" \
        --row "ResLoRA middle: --method reslora --rank 16 --shortcut middle $MERGES" \
        --row "Delta-LoRA: --method deltalora --rank 16 --lr $4" \
        --row "AdaLoRA 16 to 11: --method adalora --init-rank 16 --rank 11 --lr $6" \
        --also "DyLoRA: --method dylora --rank 16 --cut 16" \
        --also "LoHa r 8: --method loha --rank 8 --lr $6" \
        --also "LoKr: --method lokr --rank 16 --lr $6" \
        --row "full fine-tuning: --method full --lr $7" -- --dataset $1 $8
}
QUICK=$1
grid reviews "" "1.5e-3 3e-3 6e-3" "7.5e-4 1.5e-3 3e-3" "3.75e-4 7.5e-4 1.5e-3" "5e-3 1e-2 2e-2 4e-2" "5e-4 1e-3 2e-3" \
    "--eval-every 100"
if [ -n "$QUICK" ]; then
    exit
elif [ -n "$E2E" ]; then
    grid e2e "--forgetting world" "1.2e-2 2.4e-2 4.8e-2 9.6e-2" "6e-3 1.2e-2 2.4e-2 4.8e-2" "3e-3 6e-3 1.2e-2" \
        "3e-2 6e-2 1.2e-1 2.4e-1" "1.5e-3 3e-3 6e-3 1.2e-2" "--eval-every 30 --data-dir $E2E"
else
    echo "note: E2E=FOLDER adds the real E2E text; python -m experiments.e2e_split makes the folder" >&2
fi
