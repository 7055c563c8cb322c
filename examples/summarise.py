"""The family on an encoder-decoder of `transformers`: a text goes in, a shorter one comes out.

    python -m examples.summarise --method reslora --shortcut middle [--t5]
        a tiny BART or T5, which has learned in seconds to repeat how a text begins, learns to
        repeat how it ends
    python -m examples.summarise --model facebook/bart-base --data FOLDER --columns document,summary
        a model of the hub, on your pairs or XSum's; Delta-LoRA's paper has K 1000 there: --K 1000
"""
import argparse

import torch
import transformers as hf

import data
import lora
from checkpoints.adapters import save_adapter
from evaluation.metrics import rouge_l
from examples import toys
from methods import METHODS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
for flag, default in {"method": "reslora", "shortcut": "input", "model": "", "data": "", "K": 20,
                      "columns": "document,summary", "steps": 300, "out": "out/summarise"}.items():
    parser.add_argument(f"--{flag}", default=default, type=type(default))
parser.add_argument("--t5", action="store_true")


def batches(pairs, tokenizer, steps):
    """What the model takes, step by step: 32 texts, padding of the target marked by -100."""
    pad = dict(padding=True, truncation=True, max_length=512, return_tensors="pt")
    for step in range(steps):
        rows = [pairs[(step * 32 + i) % len(pairs)] for i in range(32)]
        given = tokenizer([source for source, _ in rows], **pad)
        wanted = tokenizer([text + tokenizer.eos_token for _, text in rows], **pad)
        yield dict(input_ids=given.input_ids, attention_mask=given.attention_mask,
                   labels=wanted.input_ids.masked_fill(wanted.attention_mask == 0, -100))


def fit(model, layers, steps, lr, given):
    """The loop, with what a method does around a step."""
    method = type(layers[0]) if layers else lora.LoRALinear
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad])
    method.begin(layers, steps)
    for step, batch in enumerate(given, 1):
        optimizer.param_groups[0]["lr"] = lr * min(step / 20, 1 - (step - 1) / steps)
        model(**batch).loss.backward()
        method.before_step(layers, step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(layers, step)


@torch.no_grad()
def report(name, model, tokenizer, pairs):
    given = list(batches(pairs, tokenizer, 4))
    loss = sum(model.eval()(**batch).loss.item() for batch in given) / 4
    ids = model.generate(given[0]["input_ids"], attention_mask=given[0]["attention_mask"],
                         max_new_tokens=60, do_sample=False)
    found = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rouge = rouge_l(found, [[text] for _, text in pairs[:32]])
    print(f"{name:9} loss {loss:.4f}  ROUGE-L {rouge:.3f}  {pairs[0][0][:60]} -> {found[0]}")
    return loss


def main(argv=None):
    """Returns the test losses of the base, the unmerged and the merged model."""
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.model:
        model = hf.AutoModelForSeq2SeqLM.from_pretrained(args.model)
        tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
        pairs = data.load("pairs", args.data, data.module("pairs", args.columns.split(","), None))
    else:
        model, tokenizer = toys.summariser(args.t5)
        fit(model, [], 1000, 4e-3, batches(toys.texts(slice(3), 32000), tokenizer, 1000))
        new = toys.texts(slice(-3, None), 8000)
        pairs = {"test": new[:128], "train": new[128:]}
    losses = [report("base", model, tokenizer, pairs["test"])]
    own = {"reslora": dict(shortcut=args.shortcut),
           "deltalora": dict(delta_lambda=0.5, delta_start=min(args.K, args.steps - 1))}
    targets = ["q", "v"] if model.config.model_type == "t5" else ["q_proj", "v_proj"]
    layers = lora.apply(model, METHODS[args.method].adapter, targets, r=8, alpha=16,
                        **own.get(args.method, {}))
    fit(model, layers, args.steps, 1e-2, batches(pairs["train"], tokenizer, args.steps))
    losses.append(report("unmerged", model, tokenizer, pairs["test"]))
    layers[0].prepare_merge(model, layers[0].merges[0], dict(
        batches=list(batches(pairs["train"], tokenizer, 16)), run=lambda batch: model(**batch),
        real=lambda batch: [batch["attention_mask"] == 1, batch["labels"] != -100]))
    save_adapter(args.out, model, args.model or "base")
    return [*losses, report("merged", lora.merge(model), tokenizer, pairs["test"])]


if __name__ == "__main__":
    main()
