"""The family on an image classifier of `transformers`, ViT.

    python -m examples.images --method reslora --shortcut block
        a tiny ViT, which has learned in seconds to tell filled shapes apart, learns it of outlines
    python -m examples.images --model google/vit-base-patch16-224-in21k --data FOLDER
        a model of the hub on pictures that lie in one folder a class
"""
import argparse
from pathlib import Path

import torch
import transformers as hf
from PIL import Image

import lora
from checkpoints.adapters import save_adapter
from examples import toys
from methods import METHODS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
for flag, default in {"method": "reslora", "shortcut": "input", "model": "", "data": "",
                      "steps": 300, "K": 20, "out": "out/images"}.items():
    parser.add_argument(f"--{flag}", default=default, type=type(default))


def pictures(folder, processor):
    """({"train", "test"}: (pictures (N, 3, H, W), labels (N,)), names of the classes); every tenth
    picture is for the test."""
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names)
             for path in sorted(Path(folder, name).iterdir())]
    if not files:
        raise SystemExit(f"{folder} has no folders with pictures in them")
    x = torch.cat([processor(Image.open(path).convert("RGB"), return_tensors="pt").pixel_values
                   for path, _ in files])
    y, test = torch.tensor([label for _, label in files]), torch.arange(len(files)) % 10 == 0
    return {"train": (x[~test], y[~test]), "test": (x[test], y[test])}, names


def batches(data, steps, size=32):
    """Step by step `size` pictures and their classes, in a random order."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (size,), generator=draw)
        yield dict(pixel_values=data[0][rows], labels=data[1][rows])


def fit(model, layers, steps, lr, data):
    """The loop, with what a method does around a step."""
    method = type(layers[0]) if layers else lora.LoRALinear
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad])
    method.begin(layers, steps)
    for step, batch in enumerate(batches(data, steps), 1):
        optimizer.param_groups[0]["lr"] = lr * min(step / 20, 1 - (step - 1) / steps)
        model(**batch).loss.backward()
        method.before_step(layers, step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(layers, step)


@torch.no_grad()
def report(name, model, data):
    out = model.eval()(pixel_values=data[0], labels=data[1])
    accuracy = (out.logits.argmax(1) == data[1]).float().mean()
    print(f"{name:9} loss {out.loss:.4f}  accuracy {accuracy:.3f}")
    return out.loss.item()


def main(argv=None):
    """Returns the test losses of the base, the unmerged and the merged model."""
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.model:
        data, names = pictures(args.data, hf.AutoImageProcessor.from_pretrained(args.model))
        model = hf.AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=len(names), ignore_mismatched_sizes=True)
    else:
        model = toys.classifier()
        fit(model, [], 600, 2e-3, toys.shapes(8000, outlined=False))
        data = {"train": toys.shapes(4000, True, noise=0.2),
                "test": toys.shapes(500, True, noise=0.2, seed=1)}
    losses = [report("base", model, data["test"])]
    own = {"reslora": dict(shortcut=args.shortcut), "deltalora": dict(delta_start=args.K)}
    layers = lora.apply(model, METHODS[args.method].adapter, ["q_proj", "v_proj"], r=8, alpha=16,
                        **own.get(args.method, {}))
    model.classifier.requires_grad_(bool(args.model))  # a new head has to learn
    fit(model, layers, args.steps, 1e-2, data["train"])
    losses.append(report("unmerged", model, data["test"]))
    layers[0].prepare_merge(model, layers[0].merges[0], dict(
        batches=list(batches(data["train"], 16)), run=lambda batch: model(**batch)))
    save_adapter(args.out, model, args.model or "base")
    return [*losses, report("merged", lora.merge(model), data["test"])]


if __name__ == "__main__":
    main()
