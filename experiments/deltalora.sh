#!/bin/sh
# Delta-LoRA over lambda and K, beside LoRA with alpha and, for lambda 2, with (1 + lambda) alpha. 180 steps of restaurants.
# Then, at the highest rate, what clipping has to do with the distance between Delta-LoRA K 0 and LoRA with 3 alpha.
# sh experiments/deltalora.sh [--quick]
set -e
cd "$(dirname "$0")/.."
# shellcheck disable=SC2086
python compare.py experiments/results/deltalora $1 --lr 1.2e-2 2.4e-2 4.8e-2 --seeds 3 --best-lr \
    --title "restaurants: test loss, each row at its best rate" \
    --row "LoRA, alpha: --method lora" \
    --row "LoRA, 3 alpha: --method lora --alpha 48" \
    --also "Delta-LoRA, lambda .5, K 18: --method deltalora --delta-lambda 0.5 --delta-start 18" \
    --row "Delta-LoRA, lambda 2, K 0: --method deltalora --delta-start 0" \
    --row "Delta-LoRA, lambda 2, K 18: --method deltalora --delta-start 18" \
    --also "Delta-LoRA, lambda 4, K 18: --method deltalora --delta-lambda 4 --delta-start 18" \
    -- --dataset restaurants --rank 16 --eval-every 30
[ -z "$1" ] || exit 0
python compare.py experiments/results/deltalora-clip --lr 4.8e-2 --seeds 3 --plot none \
    --row "LoRA, 3 alpha: --method lora --alpha 48" \
    --row "LoRA, ratio 3: --method lora --lr-ratio 3" \
    --row "Delta-LoRA, K 0: --method deltalora --delta-start 0" \
    --row "Delta-LoRA, K 0, clip a third: --method deltalora --delta-start 0 --clip 0.3333333333" \
    --row "LoRA, 3 alpha, no clipping: --method lora --alpha 48 --clip 0" \
    --row "LoRA, ratio 3, no clipping: --method lora --lr-ratio 3 --clip 0" \
    --row "Delta-LoRA, K 0, no clipping: --method deltalora --delta-start 0 --clip 0" \
    -- --dataset restaurants --rank 16 --eval-every 30
