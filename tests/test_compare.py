"""compare.py: the grid, its choice of rates, its csv."""
import contextlib
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

import compare
import train
from checkpoints.files import write_csv
from evaluation import evaluate
from evaluation.plots import picture
from experiments import tables

TEXT = "".join(f"the {a} {b} ran to the {c} .\n" for a in ("old", "red", "big", "wet")
               for b in ("dog", "cat", "hen") for c in ("hill", "lake", "tree", "barn")) * 4


@pytest.fixture
def grid(tmp_path, base, monkeypatch):
    """Runs a tiny grid with more flags; returns the rows as they stand in the csv."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(evaluate, "SCORED", evaluate.SCORED)  # cell sets it
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    drawn = []

    @contextlib.contextmanager
    def watched(path, **options):
        with picture(path, **options) as (figure, axis):
            yield figure, axis
        drawn.append(axis)
    monkeypatch.setattr(compare, "picture", watched)

    def run(*more, rows=("LoRA: --method lora", "block: --method reslora --shortcut block")):
        rows = [word for row in rows for word in ("--row", row)]
        compare.main([str(tmp_path / "grid"), *rows, "--lr", "1e-4", "1e-2", "--jobs", "1", *more,
                      "--", "--model", str(base), "--dataset", "text", "--data-dir",
                      str(tmp_path / "text.txt"), "--steps", "6", "--context", "16", "--batch-size",
                      "4"])
        return compare.read_csv(tmp_path / "grid.csv")
    run.drawn = drawn
    monkeypatch.setattr(compare, "pool", lambda jobs, setup=None: ThreadPoolExecutor(1))
    return run


def test_a_grid_is_every_run_once_and_its_best_rates(grid, base, tmp_path, monkeypatch):
    """All rates on seed 0, all seeds at the rate with the best validation; a second call trains
    nothing; a csv row's flags give its numbers again."""
    grid_of = "--seeds", "2", "--best-lr", "--rank", "2", "4", "--plot", "rank"
    rows = grid(*grid_of)
    assert len(rows) == 2 * 2 * (2 + 1)
    for label in ("LoRA", "block"):
        for rank in ("2", "4"):
            mine = [r for r in rows if (r["row"], r["rank"]) == (label, rank)]
            first = {r["lr"]: float(r["validation loss"]) for r in mine if r["seed"] == "0"}
            best = min(first, key=first.get)
            assert first.keys() == {"0.0001",
                                    "0.01"} and {r["lr"] for r in mine if r["best"]
                                                 == "1"} == {best}
            assert [r["seed"] for r in mine if r["lr"] == best] == ["0", "1"]
    places = {"FOLDER": str(tmp_path / "text.txt"), "MODEL": str(base)}
    flags = [places.get(word, word) for word in shlex.split(rows[3]["flags"])]
    result = train.train(train.parse([*flags, "--out", str(tmp_path / "again")]))
    assert result["metrics"]["merged"]["loss"] == pytest.approx(float(rows[3]["merged loss"]),
                                                                abs=1e-5)
    monkeypatch.setattr(train, "train", None)
    assert grid(*grid_of) == rows


def test_pictures_are_of_the_csv_and_the_logs(grid, tmp_path):
    """Against the rate a line over all rates, against the step the training loss of the best."""
    rows = grid("--plot", "lr", "--rank", "2")
    grid("--plot", "step", "--rank", "2")
    by_rate, by_step = grid.drawn
    for i, label in enumerate(("LoRA", "block")):
        mine = sorted((r for r in rows if r["row"] == label), key=lambda r: float(r["lr"]))
        x, y = by_rate.lines[i].get_data()
        assert list(x) == [1e-4, 1e-2] and list(y) == [float(r["merged loss"]) for r in mine]
        best = next(r for r in mine if r["best"] == "1")
        log = compare.read_csv(tmp_path / "out/compare" / best["run"] / "log.csv")
        x, y = by_step.lines[i].get_data()
        assert list(x) == [int(r["step"]) for r in log]
        assert list(y) == [float(r["train_loss"]) for r in log]
        name = by_step.get_legend_handles_labels()[1][i]
        assert name == f"{label}, rate {float(best['lr']):g}"


def test_quick_runs_the_best_rates_of_the_csv_and_leaves_it(grid, tmp_path):
    """One run for each row and rank, at the rate that the csv calls best for it; its numbers,
    written elsewhere."""
    ranks = "--rank", "2", "4", "--plot", "rank"
    rows = grid(*ranks)
    for r in rows:  # as if other rates had been the best, for each rank another
        r["best"] = str(int((r["rank"] == "2") == (r["lr"] == "0.01")))
    compare.write_csv(tmp_path / "grid.csv", rows)
    before = (tmp_path / "grid.csv").read_text()
    grid(*ranks, "--also", "more: --method rslora", "--quick")
    assert (tmp_path / "grid.csv").read_text() == before
    quick = compare.read_csv(tmp_path / "out/quick/grid.csv")
    assert {(r["row"], r["rank"], r["lr"], r["merged loss"])
            for r in quick} == {(r["row"], r["rank"], r["lr"], r["merged loss"]) for r in rows
                                if r["best"] == "1"} and len(quick) == 4


def test_a_rate_is_chosen_by_the_metric_and_at_a_tie_by_the_loss(monkeypatch):
    """Losses are better low, accuracies high; what diverged is the worst."""
    monkeypatch.setattr(compare, "folder", lambda flags: flags)
    monkeypatch.setattr(compare, "flags_of", lambda args, *key: key[0])
    found = {"a": (0.7, 0.5, True), "b": (0.9, 0.6, True), "c": (0.9, 0.4, True),
             "d": (0.2, 0.2, False), "e": (0.1, 0.1, False)}
    monkeypatch.setattr(compare, "validation", found.get)
    results = dict.fromkeys([(k,) for k in found], {}) | {("x",): {"diverged": "at step 1"}}

    def best(keys):
        return min(keys, key=lambda k: compare.worth(None, (k,), results))
    assert (best("abc"), best("de"), best("xa"), best("xe")) == ("c", "e", "a", "e")


def test_the_best_rate_of_a_csv_has_the_lowest_loss_or_the_highest_accuracy(tmp_path, capsys):
    """A long grid whose csv knows every run does none: it reads its rates back. Of a classifier the
    rate with the highest accuracy is the best, of a language model that with the lowest loss, also
    where both stand in one csv. A rate at an end of those that were tried is said to be there."""
    named = {"reads: --dataset reviews": "validation accuracy", "writes:": "validation loss"}
    argv, rates = [word for row in named for word in ("--row", row)], [0.1, 0.2, 0.3]
    argv += ["--lr", *map(str, rates), "--best-lr", "--long", "--plot", "none"]
    args = compare.parse([str(tmp_path / "x"), *argv])
    for values, best, ends in (
            ((0.5, 0.9, 0.7), {"reads": 0.2, "writes": 0.1}, ["writes"]),
            ((0.7, 0.5, 0.9), {"reads": 0.3, "writes": 0.2}, ["reads"])):
        rows = []
        for row, metric in named.items():
            label = row.split(":")[0]
            for lr, value in zip(rates, values, strict=True):
                run = compare.folder(compare.flags_of(args, label, None, lr, 0)).name
                rows.append({"row": label, "rank": 8, "lr": lr, "seed": 0, "best": 0, "trained": 5,
                             metric: value, "merged loss": 1.0, "run": run})
        write_csv(tmp_path / "x.csv", rows)
        found = compare.compare(args)
        assert {row["row"]: row["lr"] for row in found if row["best"]} == best
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in said if "end of its range" in line] == ends


def test_a_table_marks_a_rate_at_an_end_of_those_that_were_tried(tmp_path, monkeypatch):
    """The lowest and the highest of a row at a rank, and neither one between them nor the only
    one."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rates = {"low": "0.012", "between": "0.024", "high": "0.048"}
    rows = [{"row": row, "rank": "4", "lr": lr, "best": int(lr == best)}
            for row, best in rates.items() for lr in rates.values()]
    rows += [{"row": "only", "rank": "4", "lr": "3.0", "best": 1},
             {"row": "only", "rank": "8", "lr": "0.5", "best": 0}]  # of another range
    write_csv(tmp_path / "x.csv", rows)
    assert {row: [r["tried"] for r in same] for row, same in tables.best("x").items()} == {
        "low": ["1.2e-2*"], "between": ["2.4e-2"], "high": ["4.8e-2*"], "only": ["3"]}


def test_what_lies_between_two_rows_and_what_a_merge_keeps_by_hand():
    """Rows are paired by their seeds, in whatever order: 0.1, 0.2 and 0.3 are 0.2, with a standard
    deviation of 0.1 over the root of 3. A seed that diverged is counted beside the mean of
    the others. Of a gain from 5 to 3 a merge at 3.5 keeps three quarters."""
    one, other = ([{"seed": seed, "merged loss": loss} for seed, loss in some.items()]
                  for some in ({0: 0.3, 1: 0.5, 2: 0.7}, {2: 0.4, 1: 0.3, 0: 0.2}))
    assert tables.paired(one, other) == "+0.2000 (0.0577)"
    assert tables.paired(one[:1], other) == "+0.1000"
    rows = [{"loss": "0.25"}, {"loss": "", "diverged": "at step 3"}, {"loss": "0.75"}]
    assert compare.spread(rows, "loss") == "0.500 (0.250-0.750), 1 diverged"
    losses = {"base loss": "5", "unmerged loss": "3", "merged loss": "3.5"}
    assert tables.kept(losses, "regression") == 0.75


@pytest.mark.parametrize("dataset, unit",
                         [("restaurants", "nats per target token"), ("reviews", "nats per text"),
                          ("glue/stsb", "squared error")])
def test_a_picture_says_the_unit_of_its_loss(tmp_path, dataset, unit):
    """A language model's, a classifier's, a regression's."""
    row = {"row": "LoRA", "dataset": dataset, "method": "lora", "flags": "", "merged loss": "0.5"}
    args = Namespace(plot="rows", metric="merged loss", title="")
    with picture(tmp_path / "a.png") as (_, axis):
        compare.fill(args, axis, [row], {("LoRA",): [row]})
        assert f"({unit})" in axis.get_xlabel()


def test_a_picture_against_ranks_has_a_tick_for_each_and_every_shortcut_its_look(tmp_path):
    """Ranks and rates stand on a logarithmic axis; a row's seeds stand beside each other, around
    its name."""
    def row(label, rank, loss, flags=""):
        return {"row": label, "dataset": "restaurants", "method": label, "flags": flags,
                "rank": rank, "lr": "0.1", "merged loss": loss, "best": "1"}
    rows = [row("lora", 2, "0.5"), row("lora", 16, "0.4"), row("lora", 16, "0.2")]
    for plot, scale in (("rank", "log"), ("lr", "log"), ("rows", "linear")):
        with picture(tmp_path / "a.png") as (_, axis):
            compare.fill(Namespace(plot=plot, metric="merged loss", title=""), axis, rows,
                         {("lora",): rows})
            assert axis.get_xscale() == scale
            x, y = axis.lines[0].get_data()
            if plot == "rank":
                assert [text.get_text() for text in axis.get_xticklabels()] == ["2", "16"]
                assert list(x) == [2, 16] and list(y) == pytest.approx([0.5, 0.3])
            if plot == "rows":
                assert sum(y) == pytest.approx(0) and len(set(y)) == 3 and list(x) == [0.5, 0.4,
                                                                                       0.2]
                assert [text.get_text() for text in axis.get_yticklabels()] == ["lora"]
    looks = [compare.style(row("reslora", 2, "1", f"--shortcut {name}"))
             for name in ("input", "block", "middle")]
    looks += [compare.style(row(method, 2, "1"))
              for method in ("lora", "rslora", "deltalora", "full")]
    assert len(set(looks)) == 7 and compare.style(row("reslora", 2, "1")) == looks[0]
    assert compare.style(row("reslora-merged-at", 2, "1", "--shortcut block")) == looks[1]


def test_the_same_flags_are_the_same_run():
    """In any order, of a flag given twice the last; a different value is another run."""
    one = compare.folder(["--lr", "1", "--seed", 0])
    assert one == compare.folder(["--seed", "0", "--lr", "1"]) == compare.folder(["--lr", 2,
                                                                                  "--seed", 0,
                                                                                  "--lr", 1])
    assert one not in (compare.folder(["--lr", 2, "--seed", 0]),
                       compare.folder(["--lr", 1, "--lr", 2, "--seed", 0]))


def test_the_same_bytes_elsewhere_are_the_same_run_and_others_here_another(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.jsonl").write_text("one")
    here, there = (compare.folder(["--lr", 1, "--data-dir", tmp_path / name / "my.jsonl"])
                   for name in ("a", "b"))
    assert here == there
    (tmp_path / "a/my.jsonl").write_text("two")
    assert compare.folder(["--lr", 1, "--data-dir", tmp_path / "a/my.jsonl"]) != there


def test_full_fine_tuning_has_no_rank_and_forgetting_is_the_loss_on_another_text(grid):
    """In a grid over ranks it is one run at each of its own rates, and a line across. Forgetting is
    measured of the base, the same for all, and of what each run has merged."""
    own = "LoRA: --method lora", "full: --method full --lr .1 .2"
    rows = grid("--forgetting", "stdlib", "--rank", "2", "4", "--plot", "rank", rows=own)
    full = [r for r in rows if r["row"] == "full"]
    assert [(r["rank"], r["lr"]) for r in full] == [("", "0.1"), ("", "0.2")] and len(rows) == 6
    best = next(float(r["merged loss"]) for r in full if r["best"] == "1")
    assert list(grid.drawn[0].lines[1].get_ydata()) == [best, best]
    before = {r["base loss on stdlib"] for r in rows}
    assert len(before) == 1 and len({r["merged loss on stdlib"] for r in rows} | before) == 7


# Which method, at which rate

@pytest.fixture
def ask(grid, tmp_path, base, monkeypatch, capsys):
    """The first form on a tiny text; the rows of its csv and what it printed."""
    def ask(methods, *more):
        capsys.readouterr()
        flags = ["--model", str(base), "--dataset", "text", "--data-dir",
                 str(tmp_path / "text.txt"), "--steps", "6", "--context", "16", "--batch-size", "4"]
        compare.main(["--methods", methods, "--jobs", "1", "--to", str(tmp_path / "to"), *flags,
                      *more])
        return compare.read_csv(tmp_path / "to.csv"), capsys.readouterr().out
    return ask


def test_each_method_finds_its_rate_and_meets_lora_of_its_size(ask, tmp_path, monkeypatch):
    """The rates lie a factor of two apart around the best, which is inside; the seeds that are
    compared did not choose it. The last line's command gives its row's number again, and a second
    call trains nothing."""
    rows, said = ask("rslora,deltalora", "--seeds", "2", "--delta-start", "1")
    labels = ["lora", "rslora = lora, alpha 45.25", "lora, alpha 48", "deltalora"]
    assert list(dict.fromkeys(row["row"] for row in rows)) == labels
    for label in labels:
        mine = [row for row in rows if row["row"] == label]
        first = {float(r["lr"]): float(r["validation loss"]) for r in mine if r["seed"] == "0"}
        rates, best = sorted(first), min(first, key=first.get)
        assert all(b == pytest.approx(2 * a) for a, b in zip(rates, rates[1:], strict=False))
        assert rates[0] < best < rates[-1]
        assert {(r["seed"], float(r["lr"])) for r in mine if r["seed"] != "0"} == {
            ("1", best), ("2", best)}
        assert {float(r["lr"]) for r in mine if r["best"] == "1"} == {best}
        assert ("--alpha 48" in mine[0]["flags"]) == (label == "lora, alpha 48")
        assert ("--delta-start 1" in mine[0]["flags"]) == (label == "deltalora")
    table = [line for line in said.splitlines() if line.startswith("| ")][1:]
    against = [line.split(" | ")[3].strip() for line in table]
    assert against == ["", "lora", "", "lora, alpha 48"]
    command = shlex.split(said.strip().splitlines()[-1])
    assert command[:2] == ["python", "train.py"] and "--seed" in command
    result = train.train(train.parse([*command[2:], "--out", str(tmp_path / "again")]))
    rate, seed = (command[command.index(flag) + 1] for flag in ("--lr", "--seed"))
    assert any(float(row["merged loss"]) == pytest.approx(result["metrics"]["merged"]["loss"],
                                                          abs=1e-5)
               for row in rows if row["seed"] == seed and float(row["lr"]) == float(rate))
    monkeypatch.setattr(train, "fit", lambda run: pytest.fail("a run was repeated"))
    assert ask("rslora,deltalora", "--seeds", "2", "--delta-start", "1")[0] == rows


@pytest.mark.parametrize("flags, name, alpha", [
    (["reslora"], "reslora input", 32), (["reslora", "--pre-num", "2"], "reslora input", 48),
    (["reslora", "--pre-num", "0"], "reslora input", 16),
    (["reslora", "--shortcut", "block"], "reslora block", 16),
    (["reslora", "--shortcut", "middle", "--pre-num", "2"], "reslora middle", 16),
    (["deltalora", "--delta-lambda", ".5", "--alpha", "8"], "deltalora", 12),
    (["rslora", "--rank", "4"], "rslora = lora, alpha 32", 16), (["loha"], "loha", 16)])
def test_the_lora_that_a_variant_must_beat(flags, name, alpha):
    """Input reads 1 + m layers, W of Delta-LoRA moves by lambda B A more; all else is as large as
    LoRA's."""
    args = compare.parse(["--methods", *flags])
    rows = {label: train.parse(words) for label, words in args.rows.items()}
    assert rows[args.against[name]].method == "lora" and rows[args.against[name]].alpha == alpha
    assert "lora" in rows and len(rows) == 2 + (rows["lora"].alpha != alpha)


@pytest.mark.parametrize("best", [1e-4, 2e-3, 5e-2])
def test_a_search_goes_on_until_the_best_rate_is_inside(ask, monkeypatch, best):
    """Of a loss with its minimum far away on either side, and with all that is larger diverging."""
    tried = []

    def cell(flags, forgetting, test):
        rate, seed = (float(flags[flags.index(f) + 1]) for f in ("--lr", "--seed"))
        tried.append((rate, seed))
        return {"diverged": "no"} if rate > 3 * best else {"loss": abs(math.log(rate / best))}
    monkeypatch.setattr(compare, "cell", cell)
    monkeypatch.setattr(compare, "worth", lambda args, key, results: (
        results[key].get("loss", math.inf), 0))
    monkeypatch.setattr(compare, "seconds_of", lambda flags: 1)
    monkeypatch.setattr(compare, "tidy", lambda *_: {"row": "lora"})
    with pytest.raises(SystemExit):  # no numbers to show
        ask("lora", "--seeds", "2")
    rates = sorted({rate for rate, seed in tried if seed == 0})
    nearest = min(rates, key=lambda rate: abs(math.log(rate / best)))
    assert rates[0] < nearest < rates[-1] and len(tried) == len(set(tried)) == len(rates) + 2
    assert {rate for rate, seed in tried if seed} == {nearest}


def test_where_every_rate_diverges_a_search_ends_with_code_1(ask, monkeypatch):
    monkeypatch.setattr(compare, "cell", lambda *_: {"diverged": "at step 1"})
    monkeypatch.setattr(compare, "seconds_of", lambda flags: 1)
    with pytest.raises(SystemExit) as e:
        ask("lora,reslora")
    assert "every run diverged" in str(e.value.code)  # a text: Python prints it and exits with 1


def test_the_recommended_method_beats_lora_by_two_standard_errors(capsys):
    """By hand: losses of three seeds; within the error plain LoRA is recommended, with its own
    rate; what is better high is compared the right way round."""
    def rows(label, values, chosen, lr):
        return [{"row": label, "rank": 8, "lr": lr, "seed": seed, "best": 1, chosen: value,
                 chosen.replace("validation", "merged"): value + 1, "merged loss": 3.0}
                for seed, value in enumerate(values, 1)]
    for chosen, sign in (("validation loss", 1), ("validation accuracy", -1)):
        for other, wins in (([0.5, 0.6, 0.4], True), ([0.98, 1.1, 0.7], False)):
            args = Namespace(
                rows={"lora": ["--method", "lora"], "block": ["--method", "reslora"]}, flags=[],
                to="x", against={"block": "lora"}, rates={("lora", None): [.1, .2, .4],
                                                  ("block", None): [.2, .4]})
            table = rows("lora", [sign * v for v in (1.0, 1.1, 0.9)], chosen, .2)
            table += rows("block", [sign * v for v in other], chosen, .4)
            compare.say(args, table, chosen)
            said = capsys.readouterr().out
            assert said.strip().splitlines()[-1] == (
                "python train.py --method reslora --lr 0.4 --seed 1" if wins
                else "python train.py --method lora --lr 0.2 --seed 1")
            # of one seed nothing is known to be better
            compare.say(args, [row for row in table if row["seed"] == 1], chosen)
            assert "--method lora" in capsys.readouterr().out.strip().splitlines()[-1]
            lines = [line for line in said.splitlines() if line.startswith("| block")]
            gain = [sign * (a - b) for a, b in zip(other, (1.0, 1.1, 0.9), strict=True)]
            error = statistics.stdev(gain) / 3**0.5
            if chosen == "validation accuracy":
                assert f"| {statistics.mean(gain):+.4f} ({error:.4f}) |" in lines[0]
            assert "0.4 (the last that was tried)" in lines[0]


@pytest.mark.parametrize("flags, message", [
    (["--methods", "lora,qlora"], "--methods 'qlora' is not one of"),
    (["--methods", "lora", "--lr", "1"], "--lr is set by the comparison"),
    (["--methods", "lora", "--seeds", "0"], "1 or more"),
    (["--methods", "lora", "--merge", "bw"], "--merge is for none of --methods lora"),
    (["--methods", "reslora", "--shortcut", "best"], "--shortcut"),
    (["--methods", "lora", "--rank", "x"], "--rank"),
    (["--methods", "lora", "out/x"], "out/x")])
def test_a_bad_question_is_one_line(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(compare, "answer", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        compare.main(flags)
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(said) == 1 and message in said[0]


@pytest.mark.parametrize("flags, message",
                         [(["--row", "LoRA --method lora"], "is not 'LABEL: flags'"),
                          (["--row", "a:", "--row", " a : "], "no other row"),
                          (["--row", ":"], "is not 'LABEL: flags'"),
                          (["--row", "a:", "--seeds", "0"], "1 or more"), ([], "--row"),
                          (["--row", "a: --method qlora"], "qlora"),
                          (["--row", "a: --rank=2", "--rank", "4"], "--rank is set by the grid"),
                          (["--row", "a: --lr"], "own rates are"),
                          (["--row", "a: --lr 1 b"], "numbers, not --lr 1 b"),
                          (["--row", "a:", "--", "--lr", "1"], "--lr is set"),
                          (["--row", "a:", "--", "--seed", "1"], "--seed is set"),
                          (["--row", "a:", "--rank", "2", "4"], "several ranks"),
                          (["--row", "a:", "--forgetting", "world", "--", "--dataset", "reviews"],
                           "--forgetting world is the loss of a GPT"),])
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        compare.main([str(tmp_path / "x"), "--lr", "1", "--jobs", "1", *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert (e.value.code == 2 and len(said) == 1 and message in said[0]
            and said[0].startswith("compare.py: "))
    assert not list(tmp_path.glob("*.csv"))


def test_a_long_grid_goes_on_from_its_csv(grid, tmp_path, monkeypatch):
    """Only the chosen rates are measured on the test split, with the numbers of an ordinary grid;
    what the csv knows is not run again where the folders are lost, and a run that it lacks is the
    only one that is done."""
    ordinary = {r["run"]: r for r in grid("--seeds", "2", "--best-lr")}
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "grid.csv").unlink()
    rows = grid("--seeds", "2", "--best-lr", "--long")
    assert {r["run"] for r in rows} == ordinary.keys()
    for r in rows:
        plain = ordinary[r["run"]]
        known = "best", "flags", "trained", "validation loss", "kept step"
        assert {name: plain[name] for name in known}.items() \
            <= r.items()
        assert r["merged loss"] == (plain["merged loss"] if r["best"] == "1" else "")
    shutil.rmtree(tmp_path / "out")
    lost = next(r for r in rows if r["seed"] == "1")
    compare.write_csv(tmp_path / "grid.csv", [r for r in rows if r is not lost])
    ran, cell = [], compare.cell
    monkeypatch.setattr(compare, "cell",
                        lambda flags, *more: ran.append(flags) or cell(flags, *more))
    again = grid("--seeds", "2", "--best-lr", "--long")
    timeless = [{name: value for name, value in r.items() if "seconds" not in name} for r in again]
    assert timeless == [{name: r[name] for name in timeless[0]} for r in rows]
    assert [compare.folder(flags).name for flags in ran] == [lost["run"]]


def test_a_grid_keeps_what_diverged(grid, tmp_path, monkeypatch):
    """It is a row that says why and no end of the grid, and is not run again where the folders are
    lost; the other rows have their best rate and are drawn."""
    wild = "LoRA: --method lora", "wild: --method full --optimizer sgd --clip 0 --lr 1e30"
    rows = grid("--best-lr", "--long", rows=wild)
    assert [r["row"] for r in rows if "not finite" in r["diverged"]] == ["wild"]
    assert [(r["row"], r["best"]) for r in rows] == [("LoRA", "0"), ("LoRA", "1"), ("wild", "0")]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(compare, "cell", None)
    assert grid("--best-lr", "--long", rows=wild) == rows
    shown = [float(r["merged loss"]) for r in rows if r["best"] == "1"]
    assert [list(line.get_xdata()) for line in grid.drawn[-1].lines] == [shown]


def test_a_run_that_fails_ends_a_grid_whose_other_rows_wait():
    """Runs that had not begun are cancelled, and those who wait for them are told. In a process of
    its own: a grid that hangs would hang the tests."""
    code = """
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
import compare
def cell(flags, *more):
    time.sleep(0.1)
    if "bad" in flags:
        raise ValueError("this row cannot run")
    return {"diverged": True}
compare.cell = cell
args = Namespace(long=False, best_lr=False, seeds=1, jobs=2, forgetting=None, flags=[],
                 rows=dict(bad=["bad"], good=[]))
rates = {("bad", None): [1], ("good", None): range(1, 21)}
with ThreadPoolExecutor(2) as workers:
    compare.Grid(args, None, rates, workers, Namespace(update=lambda: None)).all()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           timeout=60)
    assert ended.returncode == 1 and "this row cannot run" in ended.stderr.splitlines()[-1]


def test_an_ordinary_run_is_set_up_once_and_read_back(grid, tmp_path, capsys, monkeypatch):
    """One call of train.train for each run, which does not resume. The late columns are those of
    the last tenth of the log, of six rows the last one. Read back after a change of the code, runs
    are said to be from before it."""
    asked, whole = [], train.train
    monkeypatch.setattr(train, "train", lambda args: asked.append(args.resume) or whole(args))
    monkeypatch.setattr(compare, "only_train", None)
    rows = grid("--best-lr")
    assert len(rows) == 4 and asked == [False] * 4
    for row in rows:
        last = compare.read_csv(tmp_path / "out/compare" / row["run"] / "log.csv")[-1]
        assert last["step"] == "6"
        for name, column in (("training loss", "train_loss"), ("gradient norm", "grad_norm")):
            assert float(row[f"late {name}"]) == pytest.approx(float(last[column]), abs=1e-5)
    assert "changed" not in capsys.readouterr().out
    monkeypatch.setattr(compare, "code", lambda: "another")
    grid("--best-lr")
    assert "4 runs are from before the code changed" in capsys.readouterr().out
