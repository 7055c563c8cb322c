#!/bin/sh
# All methods at the trained numbers of LoRA r 16, or what comes near, each at its best of three rates, three seeds there;
# beside them LoRA with more scale or rank, and full fine-tuning at one rate.
# sh runs/methods.sh [--quick]      reviews; with E2E=FOLDER (runs/e2e_split.py) real E2E text too
set -e
cd "$(dirname "$0")/.."
grid() {  # dataset, more flags of compare.py, rates, the rates of full fine-tuning, steps between validations, flags
    # shellcheck disable=SC2086
    python compare.py "results/methods-$1" $QUICK --lr $3 --seeds 3 --best-lr $2 \
        --title "$1: test loss after merging, each method at its best rate" \
        --row "LoRA r 16: --method lora --rank 16" \
        --row "LoRA r 16, 3 alpha: --method lora --rank 16 --alpha 48" \
        --row "LoRA r 32: --method lora --rank 32 --alpha 32" \
        --row "rsLoRA r 16: --method rslora --rank 16" \
        --row "ResLoRA input: --method reslora --rank 16" \
        --row "ResLoRA input, merged at .9: --method reslora --rank 16 --merge-at 0.9" \
        --row "ResLoRA block: --method reslora --shortcut block --rank 16" \
        --row "ResLoRA middle: --method reslora --shortcut middle --rank 16" \
        --row "Delta-LoRA: --method deltalora --rank 16" \
        --row "AdaLoRA 16 to 11: --method adalora --init-rank 16 --rank 11" \
        --row "DyLoRA: --method dylora --rank 16 --cut 16" \
        --row "LoHa r 8: --method loha --rank 8" \
        --row "LoKr: --method lokr --rank 16" \
        --row "full fine-tuning: --method full --lr $4" -- --dataset $1 --eval-every $5 $6
}
QUICK=$1
grid reviews "" "3e-3 1e-2 3e-2" 1e-3 100
if [ -n "$E2E" ]; then
    grid e2e "--forgetting world" "1.2e-2 2.4e-2 4.8e-2" 3e-3 30 "--data-dir $E2E"
else
    echo "note: E2E=FOLDER adds the real E2E text; python runs/e2e_split.py makes the folder" >&2
fi
