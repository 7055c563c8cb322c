#!/bin/sh
# MetaMathQA to GSM8K, where published numbers stand beside ours: the methods with PEFT's recipe on Llama-3.2-3B, or with
# that of wassname/lora-lite on Qwen3-0.6B-Base. The published runs have one rate and one seed; here each row has three
# rates and three seeds at the best. For one GPU.
# sh experiments/metamath_gsm8k.sh [qwen3_06b | llama32_3b] [--quick]
set -e
cd "$(dirname "$0")/.."
model=${1:-qwen3_06b}
# shellcheck disable=SC2086
python compare.py "experiments/results/metamath-$model" $2 --long --lr 1e-4 2e-4 4e-4 --seeds 3 --best-lr \
    --title "MetaMathQA to GSM8K, $model, r 32: exact match after merging" --metric "merged exact_match" \
    --row "LoRA: --method lora" --row "LoRA, 3 alpha: --method lora --alpha 192" \
    --row "LoRA, twice the rank: --method lora --rank 64 --alpha 128" --row "rsLoRA: --method rslora" \
    --row "ResLoRA input: --method reslora" --row "ResLoRA block: --method reslora --shortcut block" \
    --row "ResLoRA middle: --method reslora --shortcut middle" --row "Delta-LoRA: --method deltalora" \
    -- "@experiments/recipes/metamathqa_$model.args"
