#!/bin/sh
# The shipped base, data/tiny-gpt, from scratch: its vocabulary, its weights, then fp16. About an hour on two cores.
# sh pretraining/base.sh [STEPS]
set -e
cd "$(dirname "$0")/.."
python - <<'EOF'
import torch
from checkpoints.pretrained import save_pretrained
from model import GPT, GPTConfig
from pretraining import vocabulary, world
torch.manual_seed(0)
folder = "out/base-init"
save_pretrained(GPT(GPTConfig(vocab_size=2048, n_positions=256, n_embd=128, n_layer=6, n_head=4)), folder)
vocabulary.make([text for _, text in world.load()["train"][:30000]], 2047, folder)
EOF
python train.py --method full --model out/base-init --dataset world --steps "${1:-5000}" --batch-size 64 \
    --lr 6e-3 --schedule cosine --warmup 0.02 --weight-decay 0.05 --eval-every 500 --out out/base --save-merged
python - <<'EOF'
import shutil, torch
from checkpoints.pretrained import from_pretrained, save_pretrained
save_pretrained(from_pretrained("out/base/merged"), "data/tiny-gpt", torch.float16)
for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(f"out/base/merged/{name}", f"data/tiny-gpt/{name}")
EOF
