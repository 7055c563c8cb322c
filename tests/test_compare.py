"""compare.py: the grid, its choice of rates, its csv."""
import shlex
from concurrent.futures import Future

import pytest

import compare
import train

TEXT = "".join(f"the {a} {b} ran to the {c} .\n" for a in ("old", "red", "big", "wet") for b in ("dog", "cat", "hen")
               for c in ("hill", "lake", "tree", "barn")) * 4


@pytest.fixture
def grid(tmp_path, base, monkeypatch):
    """Runs a tiny grid with more flags; returns the rows as they stand in the csv."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(compare, "ROOT", tmp_path)

    def run(*more, rows=("LoRA: --method lora", "block: --method reslora --shortcut block")):
        rows = [word for row in rows for word in ("--row", row)]
        compare.main([str(tmp_path / "grid"), *rows, "--lr", "1e-4", "1e-2", "--jobs", "1", *more, "--", "--model",
                      str(base), "--dataset", "text", "--data-dir", str(tmp_path / "text.txt"), "--steps", "6",
                      "--context", "16", "--batch-size", "4"])
        return compare.read(tmp_path / "grid.csv")
    monkeypatch.setattr(compare, "pool", lambda jobs: Inline())
    return run


class Inline:
    """A pool of this process alone."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, f, *given):
        done = Future()
        done.set_result(f(*given))
        return done


def test_a_grid_is_every_run_once_and_its_best_rates(grid, tmp_path, monkeypatch):
    """All rates on seed 0, all seeds at the rate with the best validation; a second call trains nothing; a csv row's
    flags give its numbers again."""
    rows = grid("--seeds", "2", "--best-lr", "--rank", "2", "4")
    assert len(rows) == 2 * 2 * (2 + 1) and (tmp_path / "grid.png").stat().st_size > 5000
    for label in ("LoRA", "block"):
        for rank in ("2", "4"):
            mine = [r for r in rows if (r["row"], r["rank"]) == (label, rank)]
            first = {r["lr"]: float(r["validation loss"]) for r in mine if r["seed"] == "0"}
            best = min(first, key=first.get)
            assert first.keys() == {"0.0001", "0.01"} and {r["lr"] for r in mine if r["best"] == "1"} == {best}
            assert [r["seed"] for r in mine if r["lr"] == best] == ["0", "1"]
    flags = [str(tmp_path / "text.txt") if word == "FOLDER" else word for word in shlex.split(rows[3]["flags"])]
    result = train.train(train.parse([*flags, "--out", str(tmp_path / "again")]))
    assert result["metrics"]["merged"]["loss"] == pytest.approx(float(rows[3]["merged loss"]), abs=1e-5)
    monkeypatch.setattr(train, "train", None)
    assert grid("--seeds", "2", "--best-lr", "--rank", "2", "4") == rows


@pytest.mark.parametrize("plot", ["lr", "step"])
def test_pictures_of_curves(grid, tmp_path, plot):
    """Against the rate, all rates are shown; against the step, the logs of the best."""
    assert len(grid("--plot", plot, "--rank", "2")) == 4
    assert (tmp_path / "grid.png").stat().st_size > 5000


def test_quick_runs_the_best_rates_of_the_csv_and_leaves_it(grid, tmp_path):
    """One run for each row, at the rate that the csv calls best, written elsewhere."""
    rows = grid("--rank", "2")
    before = (tmp_path / "grid.csv").read_text()
    grid("--rank", "2", "--quick")
    assert (tmp_path / "grid.csv").read_text() == before
    quick = compare.read(tmp_path / "out/quick/grid.csv")
    assert [r["lr"] for r in quick] == [r["lr"] for r in rows if r["best"] == "1"] and len(quick) == 2


def test_forgetting_is_the_loss_on_another_text(grid):
    """Of the base, the same for all, and of what each run has merged."""
    rows = [r for r in grid("--forgetting", "stdlib", "--rank", "2") if r["lr"] == "0.01"]
    assert len({r["base loss on stdlib"] for r in rows}) == 1
    assert len({r["merged loss on stdlib"] for r in rows} | {rows[0]["base loss on stdlib"]}) == 3


@pytest.mark.parametrize("flags, message", [
    (["--row", "LoRA --method lora"], "is not 'LABEL: flags'"), (["--row", "a:", "--row", "a:"], "of its own"),
    (["--row", "a:", "--seeds", "0"], "1 or more"), ([], "--row"), (["--row", "a: --method qlora"], "qlora"),
])
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        compare.main([str(tmp_path / "x"), "--lr", "1", "--jobs", "1", *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and message in said[-1] and said[-1].startswith("compare.py: ")
    assert not list(tmp_path.glob("*.csv"))
