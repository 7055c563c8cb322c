"""Every table of RESULTS.md and LOG.md is made from what was measured, which stands in
experiments/results."""
import csv
import json
import re
import statistics

import pytest
from conftest import ROOT

from compare import spread
from experiments import bench, tables

RESULTS, LOG = ((ROOT / page).read_text() for page in ("RESULTS.md", "LOG.md"))
MARKS = [(page, name) for page in (RESULTS, LOG)
         for name in re.findall(r"<!-- table: (\S+) -->", page)]


def test_the_table_of_times_is_what_was_measured():
    """Each cell is in experiments/results."""
    found = json.loads((ROOT / "experiments/results/bench-amd-epyc-2-threads.json").read_text())
    rows = {name: {row["row"]: row for row in preset["steps"]} for name, preset in found.items()}
    text = section("2026-11-22: time and memory")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
             if line.startswith("| ")]
    table = [cells for cells in table if len(cells) == 11]
    columns = {"ms": "{:,.1f}", "of lora": "{:.2f}", "of peer": "{:.2f}", "peak GB": "{:.2f}",
               "of floor": "{:.2f}"}
    assert len(table) == 1 + len(bench.ROWS) + 1
    for name, *cells in table[1:]:
        of = [rows[preset].get(name, {}).get(column) for preset in ("tiny", "gpt2-small")
              for column in columns]
        assert cells == ["" if value is None else form.format(value)
                         for value, form in zip(of, [*columns.values()] * 2, strict=True)], name


def results(name):
    """The rows of a csv, numbers as numbers."""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(ROOT / "experiments/results" / name, newline="") as f:
        return [{column: number(text) for column, text in row.items()} for row in csv.DictReader(f)]


def section(title):
    """The text under the heading of LOG.md that begins with `title`."""
    level, text = re.search(rf"^(##+) {re.escape(title)}[^\n]*\n(.*)", LOG,
                            re.M | re.S).groups()
    return re.split(rf"^#{{2,{len(level)}}} ", text, maxsplit=1, flags=re.M)[0]


def table(title, number=0):
    """Cells of the rows of a section's first table, or of a later one, without its header."""
    tables = [block.splitlines() for block in section(title).split("\n\n") if block.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[number][2:]]


@pytest.mark.parametrize("page, name", MARKS, ids=[name for _, name in MARKS])
def test_the_tables_are_their_csv(page, name):
    """Behind each mark stands what experiments/tables.py makes of the csv files, and nothing
    else."""
    made = tables.TABLES[name]()
    found = page.partition(f"<!-- table: {name} -->\n\n")[2].splitlines()
    assert len(made) > 3 and found[:len(made)] == made and not found[len(made)]


def test_no_number_without_a_mark():
    """Tables of RESULTS.md that experiments/tables.py does not make: the verdicts alone."""
    made = set(re.findall(r"<!-- table: \S+ -->\n\n(\|.*)", RESULTS))
    others = set(re.findall(r"\n\n(\| .*)", RESULTS)) - made
    assert [header.split("|")[1].strip() for header in others] == ["question"]


@pytest.mark.parametrize("dataset, judge, high",
                         [("restaurants", "loss", False), ("reviews", "accuracy", True)])
def test_the_tables_of_difficulty_are_their_csv(dataset, judge, high):
    """Each row is the rate with the best validation, and its numbers are the csv's."""
    rows = results(f"difficulty-{dataset}.csv")
    names = {"base": None, "LoRA, r 4": ("lora", 4), "LoRA, r 64": ("lora", 64),
             "full fine-tuning": ("full", ""), "head only": ("head", "")}
    for name, rate, loss, *more in table(f"`{dataset}`"):
        if names[name] is None:
            assert (f"{rows[0]['base loss']:.3f}" == loss and f"{rows[0]['base slots']:.1%}"
                    == more[0].replace(" ", ""))
            continue
        same = [r for r in rows if (r["method"], r["rank"]) == names[name]]
        best = (max if high else min)(same, key=lambda r: r[f"validation {judge}"])
        tried = sorted({r["lr"] for r in same})
        assert (float(rate.strip("*")) == best["lr"]
                and ("*" in rate) == (best["lr"] in (tried[0], tried[-1]))), name
        assert loss == f"{best['final loss']:.3f}"
        columns = ("slots", "names") if dataset == "restaurants" else ("accuracy",)
        shares = [best[f"final {column}"] for column in columns]
        assert more == ["100 %" if share == 1 else f"{share:.1%}".replace("%", " %")
                        for share in shares]


def test_nats_per_character_share_the_same_nats_among_characters():
    """Tokens times nats per token are characters times nats per character."""
    sizes = {r["base"]: r for r in results("real-characters.csv")}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in section("2026-11-28: on a base that was").splitlines()]
    rows = [row for row in cells if row and row[0] in sizes]
    assert len(rows) == 4
    for base, *_, token, character in rows:
        nats = float(character) * sizes[base]["characters"]
        assert float(token) * sizes[base]["targets"] == pytest.approx(nats, rel=2e-3), base


def test_the_theorem_holds_under_sgd_and_turns_around_under_adam():
    """Means of five seeds: two rows are flat within a fifth, the others are not; of the table,
    computed here again."""
    sizes = {}
    for row in results("rank-theorem.csv"):
        sizes.setdefault((row["optimizer"], row["method"]), {}).setdefault(row["rank"],
                                                                           []).append(row["branch"])
    rows = table("2026-11-22: is rsLoRA's theorem true")
    for (name, *cells), by_rank in zip(rows, sizes.values(), strict=True):
        means = [statistics.mean(values) for values in by_rank.values()]
        assert cells == [f"{value:.2g}" for value in means] and all(len(v) == 5
                                                                    for v in by_rank.values())
        assert (max(means) < 1.2 * min(means)) == (name in ("SGD, rsLoRA", "Adam, LoRA"))


@pytest.mark.parametrize("number, dataset",
                         [*enumerate(re.findall(r"<!-- table: merge-at-(\S+) -->", LOG))])
def test_the_tables_of_deployed_models_computed_again(number, dataset):
    """Mean and range over five seeds at each row's best rate, and what is between it and both LoRAs
    seed by seed."""
    rows = [r for r in results(f"merge-at-{dataset}.csv") if r["best"]]
    for name, rate, seeds, unmerged, merged, *_, above, above_3 in table(
            "2026-11-22: does a merged ResLoRA beat LoRA", number):
        same = [r for r in rows if r["row"] == name]
        assert float(rate.strip("*")) == same[0]["lr"] and int(seeds) == len(same) == 5
        assert unmerged == f"{statistics.mean(r['unmerged loss'] for r in same):.3f}"
        assert merged == spread(same, "merged loss")
        for said, other in ((above, "LoRA"), (above_3, "LoRA, 3 alpha")):
            lora = {r["seed"]: r["merged loss"] for r in rows if r["row"] == other}
            more = [r["merged loss"] - lora[r["seed"]] for r in same]
            error = statistics.stdev(more) / len(same)**0.5
            assert said == ("" if name in ("LoRA", other) else f"{statistics.mean(more):+.4f} "
                            f"({error:.4f})")


def test_every_file_that_the_results_name_exists():
    """Links into the repository, and the scripts of its commands."""
    text = RESULTS + LOG
    named = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named += re.findall(r"sh\s+(experiments/\w+\.sh)", text)
    named += [f"experiments/{name}.py"
              for name in re.findall(r"python\s+-m\s+experiments\.(\w+)", text)]
    named += re.findall(r"@(experiments/recipes/\w+\.args)", text)
    assert len(named) > 60
    for name in named:
        assert (ROOT / name).exists(), name


