"""What installs it: pyproject.toml, requirements.txt and constraints.txt agree, and what is
optional is missed in one line."""
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from conftest import ROOT
from test_train import command, refused  # noqa: F401

import train
from evaluation import metrics, plots

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(name):
    return [line for line in (ROOT / name).read_text().splitlines()
            if line and not line.startswith("#")]


def test_requirements_are_the_projects_with_what_scores_and_draws():
    assert sorted(lines("requirements.txt")) == sorted(
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["eval"])


def test_ci_has_a_version_within_each_range():
    """constraints.txt names each package once, in a version that its range allows, and these are
    the versions that the tests run with."""
    packaging = pytest.importorskip("packaging.requirements")
    exact = dict(line.split("==") for line in lines("constraints.txt"))
    ranges = [packaging.Requirement(text) for text in (
        *PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), []))]
    ranges = [r for r in ranges if r.name != PROJECT["name"]]
    assert {r.name for r in ranges} == set(exact)
    for requirement in ranges:
        assert exact[requirement.name] in requirement.specifier, requirement
        found = metadata.version(requirement.name).partition("+")[0]
        assert found in requirement.specifier, (requirement, found)


def test_only_pages_become_modules():
    """Nothing named data, model or train gets into other people's site-packages."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(tool) == {"py-modules"}
    for name in tool["py-modules"]:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
        ours = {file.stem for file in ROOT.glob("*.py")} | {"data", "run", "checkpoints"}
        assert set(done.stdout.split()) & ours <= {"lora", name}


@pytest.fixture
def without(monkeypatch):
    """Call it with names of libraries that are then not installed."""
    def hide(*names):
        find = plots.importlib.util.find_spec
        monkeypatch.setattr(plots.importlib.util, "find_spec",
                            lambda name, *more: None if name in names else find(name, *more))
        for name in [*sys.modules, *names]:
            if name.partition(".")[0] in names:
                monkeypatch.setitem(sys.modules, name, None)
    return hide


def test_what_scores_is_missed_before_a_run(tmp_path, base, without, capsys):
    """A dataset that is judged by a library's metric names it in one line, before the base is
    measured."""
    without("sacrebleu")
    rows = "".join(f"a{i},b{i}\n" for i in range(40))
    (tmp_path / "train.csv").write_text("prompt,completion\n" + rows)
    said = refused(capsys, ["--model", str(base), "--dataset", "pairs", "--data-dir",
                            str(tmp_path), "--metric", "bleu", "--out", str(tmp_path / "out")])
    assert "sacrebleu is not installed: pip install -r requirements.txt" in said
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_a_run_has_no_picture(tmp_path, base, without, capsys):
    without("matplotlib")
    train.main(command(base, tmp_path / "out"))
    assert "no picture is drawn: matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "out/result.json").exists() and not list((tmp_path / "out").glob("*.png"))
    with pytest.raises(ValueError, match="matplotlib is not installed"):
        metrics.library("matplotlib.pyplot")


def test_the_repositorys_address_stands_in_one_place():
    """CITATION.cff and the pages name no address of it but the one in pyproject.toml."""
    address = PROJECT.get("urls", {}).get("Repository")
    for name in ("README.md", "CITATION.cff", "CONTRIBUTING.md", "docs/own-model.md"):
        named = re.findall(r"(?:repository-code: \"|git clone )(\S+?)\"?$",
                           (ROOT / name).read_text(), re.M)
        assert set(named) <= {address, "ADDRESS"}
