#!/bin/sh
# Does a merged ResLoRA beat LoRA? Five paired seeds, each at its best rate; one is merged after nine tenths of the steps
# and finished as the LoRA that it has become. Beside them LoRA with 3 alpha: a larger alpha makes the branch larger,
# as a shortcut probably does.
# sh runs/merge_at.sh [--quick]      restaurants, reviews; with E2E=FOLDER (runs/e2e_split.py) real E2E text too
set -e
cd "$(dirname "$0")/.."
grid() {  # dataset, rates, more flags of train.py
    # shellcheck disable=SC2086
    python compare.py "results/merge-at-$1" $QUICK --lr $2 --seeds 5 --best-lr \
        --title "$1: what is deployed, test loss after merging" \
        --row "LoRA: --method lora" \
        --row "LoRA, 3 alpha: --method lora --alpha 48" \
        --row "input, merged at the end: --method reslora --merge regression,input,weight,none" \
        --row "input, merged at .9: --method reslora --merge-at 0.9" \
        --also "block: --method reslora --shortcut block" \
        --also "middle, merged at the end: --method reslora --shortcut middle --merge regression,input,weight,none" \
        -- --dataset $1 --rank 16 $3
}
QUICK=$1
grid restaurants "1.2e-2 2.4e-2 4.8e-2 9.6e-2" "--eval-every 30"
[ -z "$QUICK" ] || exit 0
grid reviews "1.5e-3 3e-3 6e-3" "--eval-every 100"
if [ -n "$E2E" ]; then
    grid e2e "1.2e-2 2.4e-2 4.8e-2 9.6e-2" "--eval-every 30 --data-dir $E2E"
else
    echo "note: E2E=FOLDER adds the real E2E text; python runs/e2e_split.py makes the folder" >&2
fi
