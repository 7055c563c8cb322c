#!/bin/sh
# Does a larger rank help? LoRA and rsLoRA at ranks 4 to 128, AdamW and SGD, at one rate for all and at each one's best.
# sh runs/rslora.sh [--quick]
set -e
cd "$(dirname "$0")/.."
grid() {  # optimizer, rates
    # shellcheck disable=SC2086
    python compare.py "results/rslora-$1" $QUICK --lr $2 --rank 4 16 64 128 --best-lr --plot rank \
        --title "restaurants, $1, each at its best rate" \
        --row "LoRA: --method lora" --row "rsLoRA: --method rslora" -- --dataset restaurants --optimizer $1 --eval-every 30
}
QUICK=$1
grid adamw "3e-3 1.2e-2 4.8e-2"
grid sgd "0.3 1 3 10"
