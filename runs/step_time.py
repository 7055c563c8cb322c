"""A LoRA step here and in transformers + peft: same weights, same batch, alternating in one process, medians.

    python runs/step_time.py            needs requirements-dev.txt; a minute on two cores

4 layers, d 256, r 16, batches of 8 x 128 tokens: GPT-2 predicting every token of a vocabulary of 2,048, and a RoBERTa
telling two classes apart, its texts padded from 64 to 128 tokens.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification  # noqa: E402

import lora  # noqa: E402
from model import from_pretrained  # noqa: E402

WARM_UP, STEPS = 5, 35
torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=256, n_embd=256, n_layer=4, n_head=8, resid_pdrop=0,
                                  embd_pdrop=0, attn_pdrop=0))
idx = torch.randint(4, 2048, (8, 128))
targets = torch.cat([idx[:, 1:], torch.full((8, 1), -100)], 1)  # transformers shifts its labels itself
roberta = RobertaForSequenceClassification(RobertaConfig(
    vocab_size=2048, max_position_embeddings=258, hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
    intermediate_size=1024, type_vocab_size=1, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
texts = torch.where(torch.arange(128) < torch.linspace(64, 128, 8).long()[:, None], idx, 1)
labels = torch.randint(0, 2, (8,))

CASES = {
    "GPT-2": (gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True), ("q,v", "q,k,v"), (idx, targets),
              dict(input_ids=idx, labels=idx)),
    "RoBERTa": (roberta, dict(target_modules=["query", "value"], task_type="SEQ_CLS"), ("q,v",), (texts, labels),
                dict(input_ids=texts, attention_mask=(texts != 1).long(), labels=labels)),
}
for case, (theirs, target, choices, ours_in, theirs_in) in CASES.items():
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        for names in choices:
            model = from_pretrained(folder)
            lora.apply(model, lora.LoRALinear, names.split(","), r=16, alpha=16)
            if case == "RoBERTa":
                model.classifier.requires_grad_(True)  # as peft does
            steps[f"ours, {names}"] = model, lambda model=model, given=ours_in: model(*given)[1]
    theirs = get_peft_model(theirs, LoraConfig(r=16, lora_alpha=16, **target)).train()
    peer = "peft, " + ",".join(target["target_modules"])
    steps[peer] = theirs, lambda model=theirs, given=theirs_in: model(**given).loss
    optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
                  for name, (model, _) in steps.items()}
    seconds = {name: [] for name in steps}
    for _ in range(WARM_UP + STEPS):
        for name, (_, loss) in steps.items():
            start = time.perf_counter()
            loss().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
    for name, value in median.items():
        trained = sum(p.numel() for p in steps[name][0].parameters() if p.requires_grad)
        print(f"{case:8} {name:18} {trained:8,} parameters train  {1e3 * value:7.1f} ms a step, "
              f"{value / median[peer]:.2f} of peft's")
