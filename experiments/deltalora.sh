#!/bin/sh
# Delta-LoRA over lambda and K, beside LoRA with alpha and, for lambda 2, with (1 + lambda) alpha. 180 steps of restaurants.
# sh experiments/deltalora.sh [--quick]
set -e
cd "$(dirname "$0")/.."
# shellcheck disable=SC2086
python -m experiments.compare experiments/results/deltalora $1 --lr 1.2e-2 2.4e-2 4.8e-2 --seeds 3 --best-lr \
    --title "restaurants: test loss, each row at its best rate" \
    --row "LoRA, alpha: --method lora" \
    --row "LoRA, 3 alpha: --method lora --alpha 48" \
    --also "Delta-LoRA, lambda .5, K 18: --method deltalora --delta-lambda 0.5" \
    --row "Delta-LoRA, lambda 2, K 0: --method deltalora --delta-start 0" \
    --row "Delta-LoRA, lambda 2, K 18: --method deltalora" \
    --also "Delta-LoRA, lambda 4, K 18: --method deltalora --delta-lambda 4" \
    -- --dataset restaurants --rank 16 --eval-every 30
