#!/bin/sh
# The shipped RoBERTa, data/tiny-roberta, from scratch: its vocabulary, its weights by masked words, then fp16.
# sh pretraining/base_roberta.sh [STEPS]        about half an hour on one core
set -e
cd "$(dirname "$0")/.."
python - <<'EOS'
import torch
from checkpoints.pretrained import save_pretrained
from model import RoBERTa, RobertaConfig
from pretraining import opinions, vocabulary
torch.manual_seed(0)
folder = "out/roberta-init"
model = RoBERTa(RobertaConfig(vocab_size=1024, max_position_embeddings=130, hidden_size=128, num_hidden_layers=4,
                              num_attention_heads=4, intermediate_size=512))
for name, p in model.named_parameters():
    if name.startswith("h.") and p.dim() == 2:
        p.data *= 2.5  # BERT's 0.02 is for 768 channels; with 128 attention would begin blind
save_pretrained(model, folder)
vocabulary.make([text for _, text in opinions.load()["train"][:60000]], 1019, folder, roberta=True)
EOS
python train.py --method full --model out/roberta-init --dataset opinions --steps "${1:-20000}" --batch-size 64 \
    --lr 1e-3 --warmup 200 --schedule linear --eval-every 1000 --out out/roberta --save-merged
python - <<'EOS'
import shutil, torch
from checkpoints.pretrained import from_pretrained, save_pretrained
save_pretrained(from_pretrained("out/roberta/merged"), "data/tiny-roberta", torch.float16)
for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(f"out/roberta/merged/{name}", f"data/tiny-roberta/{name}")
EOS
