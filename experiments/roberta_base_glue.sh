#!/bin/sh
# The methods on roberta-base and four GLUE tasks with LoRA's recipe of each task, each at its best of three rates; for
# one GPU. Delta-LoRA has the lambda and the length of its paper, and K at the end of the warm-up as there.
# sh experiments/roberta_base_glue.sh [--quick]
set -e
cd "$(dirname "$0")/.."
for task in sst2 mrpc cola rte; do
    metric="merged accuracy"
    case $task in
        sst2) recipe="--epochs 60" ;;
        mrpc) recipe="--epochs 30" ;;
        cola) recipe="--epochs 80 --batch-size 32" metric="merged matthews" ;;
        rte) recipe="--epochs 80 --batch-size 32" ;;
    esac
    # shellcheck disable=SC2086
    python compare.py "experiments/results/roberta-base-$task" $1 --lr 2e-4 4e-4 8e-4 --seeds 3 --best-lr \
        --title "$task, roberta-base, r 8: validation after merging" --metric "$metric" \
        --row "LoRA: --method lora" --row "LoRA, 3 alpha: --method lora --alpha 24" \
        --row "rsLoRA: --method rslora" --row "ResLoRA input: --method reslora" \
            --row "ResLoRA block: --method reslora --shortcut block" \
        --row "ResLoRA middle: --method reslora --shortcut middle --pre-num 4" \
        --row "Delta-LoRA: --method deltalora --delta-lambda 0.5 --context 256" --row "AdaLoRA: --method adalora" \
        --row "full: --method full --lr 1e-5 2e-5 4e-5" \
        -- @experiments/recipes/glue_sst2_roberta_base.args --dataset "glue/$task" $recipe
done
