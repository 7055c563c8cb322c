"""What the README says of the code is true."""
import re

import torch.nn as nn
from conftest import ROOT, factors

import lora
from methods import METHODS

README = (ROOT / "README.md").read_text()


def test_the_table_of_methods():
    """For each file its number of lines, the trained numbers of a 768 -> 768 linear at r 8, and how it merges."""
    rows = [line.split("|")[1:-1] for line in README.splitlines() if re.match(r"\| \S.* · .*\| \[", line)]
    rows = [row for row in rows if len(row) == 6]
    of = {method.adapter.__module__.replace(".", "/") + ".py": method.adapter
          for method in METHODS.values() if method.adapter}
    assert len(rows) == len(of) == 8
    for _, _, file, lines, trained, merges in rows:
        file = re.search(r"\[(.*?)\]", file)[1]
        assert int(lines) == len((ROOT / file).read_text().splitlines()), file
        layers = lora.apply(nn.ModuleDict({"q": nn.Linear(768, 768)}), of[file], ["q"], r=8, alpha=16)
        assert int(re.search(r"[\d,]+", trained)[0].replace(",", "")) == sum(p.numel() for p in factors(layers)), file
        assert ("approximately" in merges) == (file == "reslora.py") and "exactly" in merges
    assert "590,592" in README and sum(p.numel() for p in nn.Linear(768, 768).parameters()) == 590592


def test_every_file_that_the_readme_names_exists():
    """Links into the repository, and the scripts of its commands."""
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named += re.findall(r"(?:python|sh) ((?:runs/)?\w+\.(?:py|sh))", README)
    named += re.findall(r"@(runs/\w+\.args)", README)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name
