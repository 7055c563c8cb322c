"""A LoRA step here and in transformers + peft: same weights, same batch, alternating in one process, medians.

    python runs/step_time.py        needs requirements-dev.txt; half a minute on two cores
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import lora  # noqa: E402
from model import from_pretrained  # noqa: E402

WARM_UP, STEPS = 5, 35

torch.manual_seed(0)
theirs = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=256, n_embd=256, n_layer=4, n_head=8,
                                    resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
idx = torch.randint(0, 2048, (8, 128))
targets = torch.cat([idx[:, 1:], torch.full((8, 1), -100)], 1)  # transformers shifts its labels itself
models = {}
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    for names in ("q,v", "q,k,v"):
        models[f"ours, {names}"] = from_pretrained(folder)
        lora.apply(models[f"ours, {names}"], lora.LoRALinear, names.split(","), r=16, alpha=16)
models["peft, c_attn"] = get_peft_model(theirs, LoraConfig(r=16, lora_alpha=16, target_modules=["c_attn"],
                                                           fan_in_fan_out=True))
optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
              for name, model in models.items()}
seconds = {name: [] for name in models}
for _ in range(WARM_UP + STEPS):
    for name, model in models.items():
        start = time.perf_counter()
        loss = model(input_ids=idx, labels=idx).loss if "peft" in name else model(idx, targets)[1]
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        seconds[name].append(time.perf_counter() - start)
median = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
for name, value in median.items():
    print(f"{name:14} {1e3 * value:7.1f} ms a step, {value / median['peft, c_attn']:.2f} of peft's")
