#!/bin/sh
# Does a larger rank help? LoRA and rsLoRA at ranks 4 to 128, the width of the model, with AdamW and with SGD: at each one's
# best rate, and at one rate for all. The runs at one rate are among those of the grid.
# sh experiments/rslora.sh [--quick]
set -e
cd "$(dirname "$0")/.."
grid() {  # name, optimizer, LoRA's rates, rsLoRA's, more flags of compare.py, title
    # shellcheck disable=SC2086
    python compare.py "experiments/results/rslora-$1" $QUICK --lr $3 --rank 4 16 64 128 --plot rank $5 --title "restaurants, $2, $6" \
        --row "LoRA: --method lora --lr $3" --row "rsLoRA: --method rslora --lr $4" \
        -- --dataset restaurants --optimizer $2 --eval-every 30
}
QUICK=$1
grid adamw adamw "2.4e-2 4.8e-2 9.6e-2" "6e-3 1.2e-2 2.4e-2" "--best-lr --seeds 3" "each at its best rate"
[ -z "$QUICK" ] || exit 0
grid adamw-fixed adamw 2.4e-2 2.4e-2 "--plot none" "all at rate 2.4e-2"
grid sgd sgd "1 3 10 30 100" "0.3 1 3" --best-lr "each at its best rate"
# A and B at rates of their own: under SGD rsLoRA is LoRA with a ratio of r. Seed 0 chooses, five other seeds report
python compare.py experiments/results/rslora-sgd-apart --best-lr --seeds 6 --rank 4 16 64 --plot rank --lr 0.3 1 3 \
    --title "restaurants, SGD, A and B at rates of their own" \
    --row "LoRA: --method lora --lr 1 3 10 30" --row "rsLoRA: --method rslora" \
    --row "LoRA, ratio 16: --method lora --lr-ratio 16 --lr 0.3 1 3 10" --row "LoRA, ratio 64: --method lora --lr-ratio 64" \
    --row "LoRA, ratio 256: --method lora --lr-ratio 256 --lr 0.1 0.3 1 3" \
    -- --dataset restaurants --optimizer sgd --eval-every 30
grid sgd-fixed sgd 1 1 "--plot none" "all at rate 1"
