"""What the README says of the code is true."""
import json
import re

import torch.nn as nn
from conftest import ROOT, factors

import bench
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


def test_the_table_of_times_is_what_was_measured():
    """Each cell, and the numbers below the table, are in results/."""
    found = json.loads((ROOT / "results/bench-amd-epyc-2-threads.json").read_text())
    rows = {name: {row["row"]: row for row in preset["steps"]} for name, preset in found.items()}
    text = README[README.index("### Time and memory"):]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = [cells for cells in table if len(cells) == 11]
    columns = {"ms": "{:,.1f}", "of lora": "{:.2f}", "of peer": "{:.2f}", "peak GB": "{:.2f}", "of floor": "{:.2f}"}
    assert len(table) == 1 + len(bench.ROWS) + 1
    for name, *cells in table[1:]:
        of = [rows[preset].get(name, {}).get(column) for preset in ("tiny", "gpt2-small") for column in columns]
        assert cells == ["" if value is None else form.format(value)
                         for value, form in zip(of, [*columns.values()] * 2, strict=True)], name
    for preset, form in (("tiny", "{:.1f}"), ("gpt2-small", "{:.2f}")):
        ours, theirs = (form.format(value) for value in found[preset]["e2e"].values())
        assert f"{ours} examples" in text or f"{ours} against" in text
        assert f"against {theirs} for {preset.split()[0]}" in " ".join(text.split())
    peer = bench.PEER
    assert f"takes {rows['tiny compiled']['lora']['of peer']:.2f} of the peer's" in text
    base = rows["roberta-base"]
    assert f"{base['lora']['of peer']:.2f} of the peer's time, {base['lora']['of floor']:.2f} of it" in text
    assert f"near the floor too ({base[peer]['of floor']:.2f})" in text
    first = found["tiny"]["first step"]
    assert f"{first['ours']:.1f} s against {first[peer]:.1f} s for tiny" in text
    for preset in found.values():
        assert preset["command"].startswith("python bench.py")


def test_every_file_that_the_readme_names_exists():
    """Links into the repository, and the scripts of its commands."""
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named += re.findall(r"(?:python|sh) ((?:runs/)?\w+\.(?:py|sh))", README)
    named += re.findall(r"@(runs/\w+\.args)", README)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name
