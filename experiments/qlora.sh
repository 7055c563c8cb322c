#!/bin/sh
# What 4 bits cost, and what each way to merge costs. The shipped GPT has weights in 16 bits that were never in 4 before;
# SmolLM2's folder was rounded to another grid of 4 bits on its way to us. Each row at the best of its rates.
# sh experiments/qlora.sh E2E [SMOLLM2]      folders of E2E's texts and of experiments/smollm2.py
set -e
cd "$(dirname "$0")/.."
grid() {  # name, seeds, flags of compare.py
    to=experiments/results/qlora-$1 seeds=$2
    shift 2
    python compare.py "$to" --long --best-lr --seeds "$seeds" --jobs 1 --plot none "$@"
}
FP32="--method lora --targets q,k,v,o,up,down"
grid restaurants 5 --lr 2.5e-3 5e-3 1e-2 --row "LoRA: $FP32" --row "QLoRA: $FP32 --base-bits 4 --save-merged" \
    -- --dataset restaurants --eval-every 60
grid e2e 5 --lr 2.5e-3 5e-3 1e-2 --row "LoRA: $FP32" --row "QLoRA: $FP32 --base-bits 4 --save-merged" \
    -- --dataset e2e --data-dir "$1" --eval-every 50 --test-texts 256
[ -z "$2" ] || grid smollm2 3 --lr 2e-3 4e-3 --row "LoRA: --method lora" --row "QLoRA: --method lora --base-bits 4 --save-merged" \
    -- --model "$2" --dataset e2e --data-dir "$1" --rank 16 --targets q,k,v,o,gate,up,down --steps 30 --batch-size 8 \
    --eval-every 30 --test-texts 128
