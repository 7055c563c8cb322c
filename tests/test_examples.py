"""The examples, five steps each: they run, and what they write is read by PEFT and diffusers."""
import itertools
import json
import math

import diffusers
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from examples import diffusion, images, summarise, toys

METHODS = ["lora", "reslora --shortcut middle", "deltalora --K 1"]


def five_steps(monkeypatch, example):
    """Of every loop; and the base, as it was before its adapters."""
    real, bases = example.fit, []

    def fit(model, layers, steps, lr, given):
        if layers:
            bases.append({key: t.clone() for key, t in model.state_dict().items()})
        given = itertools.islice(given, 5) if not isinstance(given, tuple) else given
        real(model, layers, 5, lr, given)
    monkeypatch.setattr(example, "fit", fit)
    return bases


@pytest.mark.parametrize("method", [*METHODS, "lora --t5"])
def test_summarise(method, tmp_path, monkeypatch):
    five_steps(monkeypatch, summarise)
    losses = summarise.main(["--method", *method.split(), "--out", str(tmp_path)])
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    model, _ = toys.summariser("t5" in method)
    peft.PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_images(method, tmp_path, monkeypatch):
    five_steps(monkeypatch, images)
    losses = images.main(["--method", *method.split(), "--out", str(tmp_path)])
    assert all(map(math.isfinite, losses))
    peft.PeftModel.from_pretrained(toys.classifier(), tmp_path)


def test_pictures_of_a_folder(tmp_path):
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(11):
            Image.new("RGB", (20, 20), colour).save(tmp_path / name / f"{i}.png")

    class Processor:
        def __call__(self, image, return_tensors):
            self.pixel_values = torch.tensor(image.getpixel((0, 0))).float().view(1, 3, 1, 1)
            return self
    data, names = images.pictures(tmp_path, Processor())
    assert names == ["blue", "red"]
    assert len(data["train"][1]) == 19 and len(data["test"][1]) == 3
    for x, y in data.values():
        assert torch.equal(x[:, 0, 0, 0] > 0, y == 1)


@pytest.mark.filterwarnings("ignore:ResLoRA. .* is a single layer")
@pytest.mark.parametrize("method", METHODS)
def test_diffusion_writes_what_diffusers_reads(method, tmp_path, monkeypatch):
    bases = five_steps(monkeypatch, diffusion)
    seen, real = [], diffusion.lora.merge
    monkeypatch.setattr(diffusion.lora, "merge", lambda unet: seen.append(real(unet)) or seen[-1])
    monkeypatch.setattr(diffusion.DDIMScheduler, "set_timesteps", lambda self, n, real=(
        diffusion.DDIMScheduler.set_timesteps): real(self, 2))
    losses = diffusion.main(["--method", *method.split(), "--out", str(tmp_path)])
    assert all(map(math.isfinite, losses))
    x, t, states = torch.randn(2, 3, 16, 16), torch.tensor([5, 700]), torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = seen[0].eval()(x, t, states).sample
    weights = {key: value for key, value in
               bases[0].items() if "lora" not in key and "_K" not in key and "_prev" not in key
               and "W_has" not in key and "A_star" not in key}
    for load in ("diffusers", "peft"):
        unet = toys.painter()
        unet.load_state_dict(weights)
        if load == "peft":
            unet = peft.PeftModel.from_pretrained(unet, tmp_path)
        else:
            pipe = diffusers.StableDiffusionPipeline
            state, alphas = pipe.lora_state_dict(str(tmp_path))
            pipe.load_lora_into_unet(state, alphas, unet)
        with torch.no_grad():
            found = unet.eval()(x, t, states).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(Image.open(tmp_path / f"{name}.png").size == (1024, 128)
               for name in ("base", "unmerged", "merged"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == 2 * 48
