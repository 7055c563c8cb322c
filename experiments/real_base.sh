#!/bin/sh
# The comparisons on a base that was really pretrained: SmolLM2-135M on E2E with its official test set. Each row at the
# best of its rates, three seeds there. Minutes a run on a CPU: the csv files grow run by run, and a grid that was
# stopped goes on from them.
# sh experiments/real_base.sh SMOLLM2 E2E      folders of experiments/smollm2.py and, with test.txt, e2e_split.py
set -e
cd "$(dirname "$0")/.."
MODEL=$1 FOLDER=$2
MORE="2e-3 4e-3 8e-3 1.6e-2"      # where 8e-3 was the best of three
LARGE="5e-4 1e-3 2e-3 4e-3 8e-3"  # of a larger scale
ALL="--targets q,k,v,o,gate,up,down"
grid() {  # name, steps, title, flags of compare.py
    to=experiments/results/$1 steps=$2 title=$3
    shift 3
    python compare.py "$to" --long --best-lr --seeds 3 --lr 2e-3 4e-3 8e-3 --title "$title" "$@" \
        -- --model "$MODEL" --dataset e2e --data-dir "$FOLDER" --steps "$steps" --batch-size 8 --eval-every "$steps" \
        --test-texts 256
}
# all methods on q and v; on all linears r 3 has as many trained numbers as r 16 on q and v
grid real-base 50 "SmolLM2-135M on E2E: test loss after merging" \
    --row "LoRA r 16: --method lora --rank 16 --lr 1e-3 $MORE" \
    --row "LoRA r 16, 3 alpha: --method lora --rank 16 --alpha 48 --lr $LARGE" \
    --row "ResLoRA input: --method reslora --rank 16" \
    --row "full fine-tuning: --method full --lr 1e-4 2e-4 4e-4" \
    --row "ResLoRA middle: --method reslora --rank 16 --shortcut middle --lr $MORE" \
    --row "ResLoRA block: --method reslora --rank 16 --shortcut block --lr $MORE" \
    --row "rsLoRA r 16: --method rslora --rank 16 --lr 1e-3 2e-3 4e-3 8e-3" \
    --row "Delta-LoRA: --method deltalora --rank 16 --delta-start 5" \
    --row "LoRA r 32, 2 alpha: --method lora --rank 32 --alpha 32 --lr $MORE" \
    --row "LoRA r 3 on all linears: --method lora --rank 3 $ALL"
# the shipped GPT on the same texts: how far it ends from full fine-tuning
python compare.py experiments/results/real-toy --best-lr --seeds 3 --plot none --lr 2.4e-2 4.8e-2 9.6e-2 \
    --row "LoRA r 16: --method lora --rank 16" --row "full fine-tuning: --method full --lr 3e-3 6e-3 1.2e-2 2.4e-2" \
    -- --dataset e2e --data-dir "$FOLDER" --eval-every 30 --test-texts 256
# the rank, on all linears up to the width of k and v, in bf16, which takes two thirds of the time
BF16="$ALL --dtype bfloat16 --test-texts 128"
grid real-ranks 20 "SmolLM2-135M on E2E, all linears, AdamW" --rank 4 16 64 192 --plot rank \
    --row "LoRA: --method lora $BF16" --row "rsLoRA: --method rslora $BF16 --lr 2.5e-4 5e-4 1e-3 2e-3 4e-3"
