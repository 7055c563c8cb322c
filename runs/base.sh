#!/bin/sh
# The shipped base, data/tiny-gpt, from scratch: its vocabulary, its weights, then fp16. About an hour on two cores.
# sh runs/base.sh [STEPS]
set -e
cd "$(dirname "$0")/.."
python - <<'EOF'
import torch
from data import bpe, world
from model import GPT, GPTConfig
torch.manual_seed(0)
folder = "out/base-init"
GPT(GPTConfig(vocab_size=2048, n_positions=256, n_embd=128, n_layer=6, n_head=4)).save_pretrained(folder)
bpe.save(bpe.train([text for _, text in world.load()["train"][:30000]], 2047), folder)
EOF
python train.py --method full --model out/base-init --dataset world --steps "${1:-5000}" --batch-size 64 \
    --lr 6e-3 --schedule cosine --warmup 0.02 --weight-decay 0.05 --eval-every 500 --out out/base --save-merged
python - <<'EOF'
import shutil, torch
from model import from_pretrained
from_pretrained("out/base/merged").save_pretrained("data/tiny-gpt", torch.float16)
shutil.copyfile("out/base/merged/tokenizer.tiktoken", "data/tiny-gpt/tokenizer.tiktoken")
EOF
