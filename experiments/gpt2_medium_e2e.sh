#!/bin/sh
# The methods on gpt2-medium and the whole E2E data with LoRA's recipe, each at its best of three rates; for one GPU.
# sh experiments/gpt2_medium_e2e.sh [--quick]
# BLEU: python generate.py out/compare/RUN --beams 10 --length-penalty .9, RUN as in the csv
set -e
cd "$(dirname "$0")/.."
# shellcheck disable=SC2086
python compare.py experiments/results/gpt2-medium-e2e $1 --lr 1e-4 2e-4 4e-4 --seeds 3 --best-lr \
    --title "E2E, gpt2-medium, r 4: test loss after merging" \
    --row "LoRA: --method lora" --row "LoRA, 3 alpha: --method lora --alpha 96" \
    --row "rsLoRA: --method rslora" --row "ResLoRA input: --method reslora" \
    --row "ResLoRA block: --method reslora --shortcut block" \
    --row "ResLoRA middle: --method reslora --shortcut middle --pre-num 4" \
    --row "Delta-LoRA: --method deltalora --dropout 0" --row "full: --method full --lr 1e-5 2e-5 4e-5" \
    -- @experiments/recipes/e2e_gpt2_medium.args
