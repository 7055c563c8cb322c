"""The family on an image generator of diffusers: a UNet that takes noise off, led by a text.

    python -m examples.diffusion --method reslora --shortcut block
        a tiny UNet, which has learned in seconds to draw filled shapes, learns to draw outlines
    python -m examples.diffusion --model HUBID --data FOLDER
        a Stable Diffusion of the hub; FOLDER has pictures, and metadata.jsonl with a file_name and
        a text a line
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import lora
from checkpoints.adapters import save_adapter
from examples import toys
from methods import METHODS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
for flag, default in {"method": "reslora", "shortcut": "input", "model": "", "data": "",
                      "steps": 250, "K": 20, "out": "out/diffusion"}.items():
    parser.add_argument(f"--{flag}", default=default, type=type(default))
TARGETS = [f"{attention}.{linear}" for attention in ("attn1", "attn2")
           for linear in ("to_q", "to_k", "to_v", "to_out.0")]


def described(folder, pipe):
    """(latents (N, C, h, w), states (N, T, D)) of the pictures of a folder and their texts."""
    rows = [json.loads(line) for line in (Path(folder) / "metadata.jsonl").open(encoding="utf-8")]
    images = pipe.image_processor.preprocess(
        [Image.open(Path(folder, row["file_name"])).convert("RGB") for row in rows], 512, 512)
    ids = pipe.tokenizer([row["text"] for row in rows], padding="max_length", truncation=True,
                         return_tensors="pt").input_ids
    latents = torch.cat([pipe.vae.encode(image[None]).latent_dist.sample() for image in images])
    return latents * pipe.vae.config.scaling_factor, pipe.text_encoder(ids)[0]


def batches(data, steps, noises, seed=0):
    """Step by step (noisy pictures, their times, states of the texts, the noise)."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (16,), generator=draw)
        x, t = data[0][rows], torch.randint(1000, (16,), generator=draw)
        noise = torch.randn(x.shape, generator=draw)
        yield noises.add_noise(x, noise, t), t, data[1][rows], noise


def fit(unet, layers, steps, lr, given):
    """The loop, with what a method does around a step."""
    method = type(layers[0]) if layers else lora.LoRALinear
    optimizer = torch.optim.AdamW([p for p in unet.train().parameters() if p.requires_grad])
    method.begin(layers, steps)
    for step, (x, t, states, noise) in enumerate(given, 1):
        optimizer.param_groups[0]["lr"] = lr * min(step / 20, 1 - (step - 1) / steps)
        F.mse_loss(unet(x, t, states).sample, noise).backward()
        method.before_step(layers, step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(layers, step)


@torch.no_grad()
def report(name, unet, data, noises, out):
    """The loss on the noise; draws eight samples."""
    unet.eval()
    loss = sum(F.mse_loss(unet(x, t, states).sample, noise).item()
               for x, t, states, noise in batches(data, 8, noises, seed=1)) / 8
    x = torch.randn(data[0][:8].shape, generator=torch.Generator().manual_seed(2))
    noises.set_timesteps(25)
    for t in noises.timesteps:
        x = noises.step(unet(x, t, data[1][:8]).sample, t, x).prev_sample
    if x.shape[1] == 3:  # pictures, and no latents
        pixels = torch.cat([*x.clamp(-1, 1) * 127.5 + 127.5], 2).permute(1, 2, 0).byte()
        Image.fromarray(pixels.numpy()).resize((1024, 128), 0).save(out / f"{name}.png")
    print(f"{name:9} loss {loss:.4f}")
    return loss


def main(argv=None):
    """Returns the losses of the base, the unmerged and the merged model."""
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    noises = DDIMScheduler(1000)
    if args.model:
        pipe = DiffusionPipeline.from_pretrained(args.model)
        unet, noises = pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config)
        with torch.no_grad():
            data = described(args.data, pipe)
    else:
        (filled, kinds), (outlined, kinds_2) = (toys.shapes(4000, style) for style in (False, True))
        unet, base = toys.painter(), (filled, toys.words(kinds, 0))
        fit(unet, [], 250, 4e-3, batches(base, 250, noises))
        data = outlined, toys.words(kinds_2, 1)
    losses = [report("base", unet, data, noises, out)]
    own = {"reslora": dict(shortcut=args.shortcut), "deltalora": dict(delta_start=args.K)}
    layers = lora.apply(unet, METHODS[args.method].adapter, TARGETS, r=8, alpha=16,
                        **own.get(args.method, {}))
    lr = 2e-2 / (3 if args.method == "deltalora" else 1)  # W follows B A, and moves lambda as far
    fit(unet, layers, args.steps, lr, batches(data, args.steps, noises))
    losses.append(report("unmerged", unet, data, noises, out))
    layers[0].prepare_merge(unet, layers[0].merges[0], dict(
        batches=list(batches(data, 8, noises)), run=lambda batch: unet(*batch[:3])))
    save_adapter(out, unet, args.model or "base")
    # diffusers' load_lora_weights takes a scale of 1 where a file says none
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {name.removeprefix("base_model.model."): t for name, t in
               load_file(out / "adapter_model.safetensors").items()}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers={
        name: t * config["lora_alpha"] / t.shape[1] if "lora_B" in name else t
        for name, t in tensors.items()})
    return [*losses, report("merged", lora.merge(unet), data, noises, out)]


if __name__ == "__main__":
    main()
