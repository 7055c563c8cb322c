"""What README says of the code is true: the table, the snippets, the sizes, who imports whom, and
how to add things."""
import re
import sys
import textwrap
import types

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from conftest import ROOT, factors, tiny_gpt
from test_train import command, few_records  # noqa: F401

import data
import lora
import train
from methods import METHODS, Method
from reslora import ResLoRALinear, calibrate

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "docs/own-model.md", "CONTRIBUTING.md", "data/README.md", "RESULTS.md", "LOG.md")}
README, OWN_MODEL = PAGES["README.md"], PAGES["docs/own-model.md"]


def snippet(page, word):
    """The one block of Python on a page that has a word in it."""
    found, = (s for s in re.findall(r"```python\n(.*?)```", PAGES[page], re.S) if word in s)
    return found


def test_the_table_of_methods():
    """For each file the trained numbers of a 768 -> 768 linear at r 8, and how it merges."""
    rows = [line.split("|")[1:-1] for line in OWN_MODEL.splitlines()
            if re.match(r"\| \S.* \| \[", line)]
    of = {method.adapter.__module__.replace(".", "/") + ".py": method.adapter
          for method in METHODS.values() if method.adapter}
    files = {re.search(r"\[(.*?)\]", row[1])[1]: row for row in rows}
    assert files.keys() == of.keys()
    for file, (_, _, trained, merges) in files.items():
        layers = lora.apply(nn.ModuleList([nn.ModuleDict({"q": nn.Linear(768, 768)})
                                           for _ in range(2)]), of[file], ["q"], r=8, alpha=16)
        number = int(re.search(r"[\d,]+", trained)[0].replace(",", ""))
        assert number == sum(p.numel() for p in factors(layers[:1])), file
        assert ("approximately" in merges) == (file == "reslora.py") and "exactly" in merges
        assert f"]({file})" in README
    full = sum(p.numel() for p in nn.Linear(768, 768).parameters())
    assert full == 590592 and f"{full:,}" in OWN_MODEL


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """Links into the repository, and the scripts and recipes of its commands."""
    text, here = PAGES[page], (ROOT / page).parent
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (here / link.partition("#")[0]).exists(), link
    named = re.findall(r"python ((?:tests/)?\w+\.py)", text) + re.findall(r"@(\S+\.args)", text)
    if page != "LOG.md":  # which tells of scripts that are gone
        named += re.findall(r"\bsh ((?:experiments|pretraining)/\w+\.sh)", text)
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_link_into_a_page_meets_a_heading(page):
    """A link PAGE#anchor, and one inside a page, names a heading as GitHub spells it."""
    for link in re.findall(r"\]\(([\w./]*#[^)]+)\)", PAGES[page]):
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).read_text() if name else PAGES[page]
        headings = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                    for title in re.findall(r"^#+ (.*)$", target, re.M)}
        assert anchor in headings, link


# The house

def test_experiments_import_each_other_without_a_circle():
    """experiments/X imports experiments/Y, at the top or inside a function, only if Y does not come
    back to X."""
    files = list((ROOT / "experiments").glob("*.py"))
    edges = {file.stem: set(re.findall(r"from experiments\.(\w+) import", file.read_text())) |
             {name.strip() for line in re.findall(r"from experiments import (.*)", file.read_text())
              for name in line.split(",")} for file in files}

    def reached(name, seen):
        for other in edges[name] - seen:
            seen = reached(other, seen | {other})
        return seen
    assert not [name for name in edges if name in reached(name, set())]


# The snippets, as somebody who reads nothing else would use them

class Block(nn.Module):
    """Self-attention with the usual names, on a residual stream."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + F.scaled_dot_product_attention(self.q_proj(x), x, self.v_proj(x))


class Own(nn.Module):
    """(B, T) -> logits (B, T, 11), or with `classes` (B, classes)."""

    def __init__(self, classes=0):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 16), nn.Sequential(*(Block() for _ in range(3)))
        self.classes, self.head = classes, nn.Linear(16, classes or 11)

    def forward(self, idx):
        x = self.blocks(self.embed(idx))
        return self.head(x.mean(1) if self.classes else x)


def test_the_snippet_for_your_own_model_runs():
    """As it stands: adapters go in, train, are calibrated, and the merged model is nearly the
    trained one."""
    code = snippet("README.md", "calibrate")
    train_it = """
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(idx).transpose(1, 2), idx.roll(1, 1)).backward()
        optimizer.step()
    """
    calibration = code.index("# for ResLoRA")
    idx = torch.randint(1, 11, (8, 12))
    scope = {"torch": torch, "F": F, "model": Own(), "idx": idx, "batches": [idx],
             "pad_id": 0}
    exec(re.sub(r"^\.\.\..*$", textwrap.dedent(train_it), code[:calibration], flags=re.M), scope)
    before = scope["model"](idx)
    exec(code[calibration:], scope)
    assert not any(isinstance(m, lora.LoRALinear) for m in scope["model"].modules())
    assert 0 < (scope["model"](idx) - before).norm() / before.norm() < 0.2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_a_classifier_of_your_own_is_calibrated_with_its_margins(grad, frozen):
    """README's expression for M works whether gradients are on or off where calibrate is called,
    and on a model that is frozen altogether; and A* is another one than without M."""
    model, idx = Own(classes=3), torch.randint(1, 11, (8, 12))
    layers = lora.apply(model, ResLoRALinear, ["q_proj", "v_proj"], r=2, alpha=4)
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    model.eval().requires_grad_(not frozen)
    margin = eval(re.search(r"`margin=(lambda logits: \(logits\.amax.*?\.sum\(\))`", OWN_MODEL)[1])
    with torch.set_grad_enabled(grad):
        calibrate(model, [idx], real=lambda idx: idx != 0, margin=margin)
        weighted = layers[1].A_star.clone()
        calibrate(model, [idx], real=lambda idx: idx != 0)
    assert (weighted - layers[1].A_star).norm() > 1e-4
    lora.merge(model)


def test_layers_without_neighbours_are_said():
    """Layers of unlike shapes are chains of one layer: apply warns. An nn.Sequential's "0", "2" and
    "4" of one shape are one chain, and nothing is warned. A layer alone is LoRA with 2 alpha under
    `input`, plain LoRA else."""
    for own, same in (({}, "LoRA with 2 alpha"), ({"shortcut": "block"}, "plain LoRA"),
                      ({"pre_num": 0}, "plain LoRA")):
        flat = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 10), nn.Tanh(),
                             nn.Linear(10, 11))
        with pytest.warns(UserWarning, match=f"single layer without neighbours, so it is {same}"):
            layers = lora.apply(flat, ResLoRALinear, ["0", "2", "4"], r=2, alpha=4, **own)
        assert not any(layer.earlier for layer in layers)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x).tanh()
    layers = lora.apply(nn.Sequential(*(Wrapped() for _ in range(3))), ResLoRALinear, ["fc"], r=2,
                        alpha=4)
    assert [len(layer.earlier) for layer in layers] == [0, 1, 1]


def test_the_snippet_that_loads_a_run_elsewhere_gives_our_logits(tmp_path, base):
    """PEFT on the base and the merged folder in transformers, loaded as docs/own-model.md does,
    agree with generate's model."""
    import generate
    train.main(command(base, tmp_path / "run", "--method", "reslora", "--save-merged"))
    code = snippet("docs/own-model.md", "PeftModel")
    for theirs, ours in (("data/tiny-gpt", base),
                         ("out/restaurants-reslora-r64-s0", tmp_path / "run"),
                         ("out/RUN/merged", tmp_path / "run/merged")):
        code = code.replace(theirs, str(ours))
    scope = {}
    exec(code, scope)
    assert scope["peft"] is peft if "peft" in scope else scope["transformers"] is transformers
    idx = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        ours = generate.load_run(tmp_path / "run")[0](idx)[0]
        for theirs in (scope["model"], scope["merged"]):
            torch.testing.assert_close(theirs.eval()(idx).logits, ours, rtol=1e-4, atol=1e-4)


# A new method is one file and one line; a new dataset is one file and its name

class Shifted(lora.LoRALinear):
    """A throw-away method with vectors among its factors and a delta that is not zero at first:
    LoRA plus a trained diagonal, with LoRA+'s larger rate for B."""

    lr_scale = {"lora_B": 16.0}

    def init_factors(self, d_out, d_in, **like):
        super().init_factors(d_out, d_in, **like)
        self.shift = nn.Parameter(torch.full((min(d_out, d_in),), 0.01, **like))

    def as_lora(self):
        n = len(self.shift)
        eye = torch.eye(n, device=self.shift.device, dtype=self.shift.dtype)
        right = torch.cat([eye, eye.new_zeros(n, self.weight.shape[1] - n)], 1)
        left = torch.cat([torch.diag(self.shift), eye.new_zeros(len(self.weight) - n, n)])
        return torch.cat([self.lora_A, right]), torch.cat([self.lora_B, left], 1)

    def delta(self):
        A, B = self.as_lora()
        return self.scaling * (B @ A)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(self.drop(x), self.delta())


def test_a_new_method_is_a_class_and_a_line(tmp_path, base, monkeypatch):
    """--method works with training, merging, export, and PEFT's logits from that moment."""
    monkeypatch.setitem(METHODS, "shifted", Method(Shifted))
    metrics = train.main(command(base, tmp_path, "--method", "shifted", "--save-merged"))["metrics"]
    assert metrics["merged"]["loss"] == pytest.approx(metrics["unmerged"]["loss"], abs=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged",
                                                               dtype=torch.float32).eval()
    idx = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(theirs(idx).logits, merged(idx).logits, rtol=1e-4, atol=1e-4)


def test_the_template_of_contributing_is_a_method(tmp_path, base, monkeypatch):
    """VeRA as it stands there, with its line in methods.py: it trains, merges exactly, and PEFT's
    folder holds it as a LoRA."""
    scope = {"__name__": "vera"}
    exec(snippet("CONTRIBUTING.md", "VeRA"), scope)
    monkeypatch.setitem(METHODS, "vera", Method(scope["VeRALinear"]))
    metrics = train.main(command(base, tmp_path, "--method", "vera", "--lr", "0.1"))["metrics"]
    assert metrics["unmerged"]["loss"] < metrics["base"]["loss"]
    assert metrics["merged"]["loss"] == pytest.approx(metrics["unmerged"]["loss"], rel=1e-4)
    assert (tmp_path / "adapter_config.json").exists()
    layers = lora.apply(tiny_gpt(), scope["VeRALinear"], ["q", "v"], r=2, alpha=6)
    assert len({layer.A.data_ptr() for layer in layers}) == 2
    layer = scope["VeRALinear"](nn.Linear(5, 7), r=2, alpha=6)
    nn.init.normal_(layer.b_v)
    x, (A, B) = torch.randn(3, 5), layer.as_lora()
    for delta in (layer.delta(), layer.scaling * B @ A):
        torch.testing.assert_close(F.linear(x, layer.weight + delta, layer.bias), layer(x))


def test_a_run_keeps_the_ratio_of_the_rates_at_every_step(tmp_path, base, monkeypatch):
    """In the loop too, under warm-up and decay: B's group has 16 times the rate of the others, step
    for step."""
    monkeypatch.setitem(METHODS, "shifted", Method(Shifted))
    rates, real = [], torch.optim.SGD.step

    def step(optimizer, *args):
        rates.append({group["lr_scale"]: group["lr"] for group in optimizer.param_groups})
        return real(optimizer, *args)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    train.main(command(base, tmp_path, "--method", "shifted", "--optimizer", "sgd", "--lr", "1e-3"))
    assert len(rates) == 6 and len({rate[1.0] for rate in rates}) > 3
    assert all(rate[16.0] == pytest.approx(16 * rate[1.0]) for rate in rates)


def test_a_method_without_as_lora_is_refused_before_it_trains():
    """A class that changes delta but says nothing of its export would export nonsense."""
    class Half(lora.LoRALinear):
        def delta(self):
            return super().delta() / 2
    with pytest.raises(ValueError, match="Half overrides delta, or moves weight, so it must "):
        lora.apply(nn.ModuleDict({"q": nn.Linear(4, 4)}), Half, ["q"], r=2, alpha=2)

    class Faster(lora.LoRALinear):
        lr_scale = {"loraB": 16}
    with pytest.raises(ValueError, match="Faster.lr_scale names 'loraB', which is no parameter"):
        lora.apply(nn.ModuleDict({"q": nn.Linear(4, 4)}), Faster, ["q"], r=2, alpha=2)


def test_a_new_dataset_is_a_file_and_its_name(tmp_path, small_roberta, monkeypatch):
    """Three classes, generated: no other entry is needed, and the rows of the report are its
    metrics."""
    module = types.ModuleType("data.colours")
    words = {"red": "warm bright fire", "green": "grass leaf moss", "blue": "sea sky deep"}
    rows = [((f"it is {word} .",), label) for label, name in enumerate(words)
            for word in words[name].split()]
    module.LABELS, module.METRICS = tuple(words), ("accuracy",)
    module.load = lambda: {"train": rows * 4, "validation": rows, "test": rows}
    monkeypatch.setitem(sys.modules, "data.colours", module)
    monkeypatch.setattr(data, "colours", module, raising=False)
    monkeypatch.setattr(data, "GENERATED", (*data.GENERATED, "colours"))
    monkeypatch.setattr(data, "DATASETS", (*data.DATASETS, "colours"))
    monkeypatch.setattr(data, "load", lambda name, data_dir=None, source=None: module.load())
    result = train.main(["--model", str(small_roberta), "--dataset", "colours", "--out",
                         str(tmp_path), "--rank", "4", "--epochs", "2"])
    assert (result["metrics"]["merged"].keys() == {"loss", "accuracy"}
            and result["settings"]["batch_size"] == 32)
