#!/bin/sh
# The comparison on a base that was really pretrained: SmolLM2-135M on E2E with its official test set. Each row at its
# best of three rates, three seeds there. Many minutes a run on a CPU: the csv grows run by run, and a grid that was
# stopped goes on from it.
# sh experiments/real_base.sh SMOLLM2 E2E      folders of experiments/smollm2.py and of experiments/e2e_split.py
set -e
cd "$(dirname "$0")/.."
LARGE="1e-3 2e-3 4e-3"  # of rows with a larger scale
exec python -m experiments.compare experiments/results/real-base --long --best-lr --seeds 3 --lr 2e-3 4e-3 8e-3 \
    --title "SmolLM2-135M on E2E: test loss after merging" \
    --row "LoRA r 16: --method lora --rank 16 --lr 1e-3 2e-3 4e-3 8e-3" \
    --row "LoRA r 16, 3 alpha: --method lora --rank 16 --alpha 48 --lr 5e-4 $LARGE" \
    --row "ResLoRA input: --method reslora --rank 16" \
    --row "full fine-tuning: --method full --lr 1e-4 2e-4 4e-4" \
    --row "ResLoRA middle: --method reslora --rank 16 --shortcut middle" \
    --row "ResLoRA block: --method reslora --rank 16 --shortcut block" \
    --row "rsLoRA r 16: --method rslora --rank 16 --lr $LARGE" \
    --row "Delta-LoRA: --method deltalora --rank 16" \
    --row "LoRA r 32, 2 alpha: --method lora --rank 32 --alpha 32" \
    -- --model "$1" --dataset e2e --data-dir "$2" --steps 50 --batch-size 8 --eval-every 50 --test-texts 256
