"""The tables of RESULTS.md and LOG.md, made from the csv files under experiments/results/.

    python -m experiments.tables [--write]
        prints them; --write puts each behind its mark on its page

tests/test_results.py compares both. A cell with a range is the mean of the seeds, the lowest and
the highest. * marks a rate at the end of those that were tried: a better one may lie beyond.
"""
import argparse
import json
import re

from compare import (
    RESULTS,
    ROOT,
    groups,
    mean,
    paired,
    read_csv,
    spread,
    with_error,
    write,
)

# of experiments/merges.py
RATES = {"restaurants": "2.4e-2", "stdlib": "2.4e-2", "e2e": "2.4e-2", "reviews": "3e-3"}
# rows of the master table -> of the bench
BENCH = {"LoRA r 16": "lora", "rsLoRA r 16": "rslora", "ResLoRA input": "reslora input m 1",
         "ResLoRA block": "reslora block m 1", "ResLoRA middle": "reslora middle m 1",
         "Delta-LoRA": "deltalora", "full fine-tuning": "full"}
MERGES = "regression", "bi", "bw", "none"


def best(name):
    """{row: its runs at its best rate} of a csv of compare.py; each gets "tried": that rate, marked
    if at an end."""
    rows = read_csv(RESULTS / f"{name}.csv")
    for same in groups(rows, "row", "rank").values():
        tried = sorted({float(r["lr"]) for r in same})
        for r in same:
            r["tried"] = rate(r["lr"]) + "*" * (len(tried) > 1
                                                and float(r["lr"]) in (tried[0], tried[-1]))
    return {row: same for (row,), same in groups([r for r in rows if r["best"] == "1"],
                                                 "row").items()}


def rate(lr):
    """0.024 -> 2.4e-2, 3.0 -> 3"""
    lr = float(lr)
    return f"{lr:g}" if lr >= 1 else f"{lr:.1e}".replace("e-0", "e-").replace(".0e", "e")


def average(rows, column, digits=3):
    return f"{mean([float(r[column]) for r in rows]):.{digits}f}"


def markdown(header, rows):
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header),
            *(f"| {' | '.join(row)} |" for row in rows)]


def deployed(name):
    """Each row of a grid at its best rate, before and after merging, against LoRA seed by seed."""
    by_row = best(name)
    against = [row for row in ("LoRA", "LoRA, 3 alpha") if row in by_row]
    accuracy = ["merged accuracy"] * bool(by_row["LoRA"][0].get("merged accuracy"))
    return markdown(["", "rate", "seeds", "unmerged", "merged", *accuracy,
                     *(f"above {other}" for other in against)],
                    [[row, same[0]["tried"], str(len(same)), average(same, "unmerged loss"),
                      spread(same, "merged loss"), *(average(same, column) for column in accuracy),
                      *("" if row in ("LoRA", other) else paired(same, by_row[other])
                        for other in against)] for row, same in by_row.items()])


def pre_num():
    """Unmerged loss of one seed by structure and m, each at its best rate."""
    by_row = best("reslora-pre-num")
    lora = by_row.pop("LoRA (m 0)")[0]
    structures, ms = (list(dict.fromkeys(row.split(", ")[i] for row in by_row)) for i in (0, 1))

    def cell(row):
        return f"{float(row['unmerged loss']):.3f} ({row['tried']})"
    return markdown(["", *structures], [
        ["m 0: LoRA", *[cell(lora)] * len(structures)],
        *([m, *(cell(by_row[f"{structure}, {m}"][0]) for structure in structures)] for m in ms)])


def loss(row, how):
    """Of a row of a csv, as it is unmerged, or merged by a name of MERGES; None where that was not
    asked for."""
    column = "merged" if how == "regression" else f"merged by {how}" if how in MERGES else how
    by_row = row.get(f"{column} loss")
    return float(by_row) if by_row else None


def kept(row, how):
    """Share of the unmerged model's gain over the base that the merge keeps."""
    return (loss(row, "base") - loss(row, how)) / (loss(row, "base") - loss(row, "unmerged"))


def merges(where=RESULTS):
    """Loss before and after each merge, one seed; what regression keeps of the base's gain."""
    def cells(row):
        return [f"{value:.3f}" if (value := loss(row, how)) is not None else "-"
                for how in ("unmerged", *MERGES)]
    files = [where / f"merges-{dataset}.csv" for dataset in RATES]
    rows = [row for file in files if file.exists() for row in read_csv(file)]
    return markdown(["dataset", "structure", "unmerged", "**regression**", *MERGES[1:],
                     "kept by regression"],
                    [[r["dataset"], r["row"], *cells(r), f"{kept(r, 'regression'):.1%}"]
                     for r in rows])


def calibration(where=RESULTS):
    """Merged loss by texts, mean of the draws."""
    by_row = groups(read_csv(where / "calibration.csv"), "dataset", "row")
    texts = list(groups(next(iter(by_row.values())), "texts"))
    return markdown(["", "unmerged", "1 text", *(f"{n} texts" for (n,) in texts[1:]),
                     "shortcut dropped"],
                    [[f"{dataset}: {row}", average(same, "unmerged loss"),
                      *(average(at, "merged loss") for at in groups(same, "texts").values()),
                      average(same, "merged by none loss")]
                     for (dataset, row), same in by_row.items()])


def real_merges(where=RESULTS):
    """Loss before and after each merge on SmolLM2, the regression on 64, 16 and 4 texts; what 64
    keep of the gain."""
    rows = []
    for (row,), same in groups(read_csv(where / "real-merges.csv"), "row").items():
        by_row = {(r["merge"], r["texts"]): r["merged loss"] for r in same
                 if r["eps"] in ("", "0.001")}
        cells = [by_row.get(way) for way in (("regression", "64"), ("regression", "16"),
                                            ("regression", "4"), ("bi", "64"), ("bw", "64"),
                                            ("none", "0"))]
        share = kept({**same[0], "merged loss": by_row["regression", "64"]}, "regression")
        rows.append([row, f"{float(same[0]['unmerged loss']):.4f}",
                     *(f"{float(c):.4f}" if c else "-" for c in cells), f"{share:.2%}"])
    return markdown(["structure", "unmerged", "regression, 64 texts", "16 texts", "4 texts",
                     *MERGES[1:], "kept by regression"], rows)


def real_texts():
    """What the best runs write, and the loss on the plain text before and after."""
    rows = read_csv(RESULTS / "real-texts.csv")
    before = f"{float(rows[0]['base loss on stdlib']):.3f}"
    return markdown(["", "BLEU", "NIST", "ROUGE-L", "CIDEr", f"Python text, {before} before"],
                    [[r["row"],
                      *(f"{float(r[name]):.{digits}f}"
                        for name, digits in (("BLEU", 1), ("NIST", 2), ("ROUGE_L", 3), ("CIDEr", 2),
                                             ("merged loss on stdlib", 3)))] for r in rows])


def real_characters():
    """LoRA and full fine-tuning on both bases, in nats per token and per character."""
    table = []
    for size in read_csv(RESULTS / "real-characters.csv"):
        grid = best("real-toy" if size["base"] == "tiny-gpt" else "real-base")
        for row in ("LoRA r 16", "full fine-tuning"):
            loss = mean([float(r["merged loss"]) for r in grid[row]])
            share = int(size["targets"]) / int(size["characters"])
            table.append([size["base"], row, grid[row][0]["tried"], f"{loss:.3f}",
                          f"{loss * share:.3f}"])
    return markdown(["base", "", "rate", "nats per token", "nats per character"], table)


def gradients(where=RESULTS):
    """Norms by layer, mean of the seeds."""
    rows = read_csv(where / "reslora-gradients.csv")
    return markdown(["", *(f"layer {layer}" for (layer,) in groups(rows, "layer"))],
                    [[f"{target}: {row}",
                      *(average(at, "gradient norm", 4) for at in groups(same, "layer").values())]
                     for target in ("q", "v")
                     for (row,), same in groups([r for r in rows if r["target"] == target],
                                                "row").items()])


def by_rank(name):
    """Header and rows of a table: test loss by rank at each one's best rate, mean of the seeds;
    rsLoRA against LoRA."""
    own = {row: groups(same, "rank") for row, same in best(name).items()}
    rows = [[f"{row}, best rate",
             *(f"{average(r, 'merged loss')} ({r[0]['tried']})" for r in same.values())]
            for row, same in own.items()]
    rows += [["rsLoRA above LoRA",
              *(paired(r, own["LoRA"][rank]) for rank, r in own["rsLoRA"].items())]]
    return ["", *(f"r {r}" for (r,) in own["LoRA"])], rows


def at_one_rate(by_row, columns):
    """More rows of that table, from {row: its runs by rank at one rate, one seed} and {what is
    shown: column}."""
    return [[f"{row}, rate {rate(same[0]['lr'])}: {name}",
             *(f"{float(r[column]):.3f}" for r in same)] for name, column in columns.items()
            for row, same in by_row.items()]


def rslora(optimizer):
    """Loss by rank at the best rates, and at one rate, with the gradient norm beside it."""
    header, rows = by_rank(f"rslora-{optimizer}")
    one = best(f"rslora-{optimizer}-fixed")
    return markdown(header, rows
                    + at_one_rate(one, {"loss": "merged loss",
                                        "gradient norm": "late gradient norm"}))


def real_ranks():
    """The same on SmolLM2. At one rate the loss is that of the validation texts: only the best were
    tested."""
    header, rows = by_rank("real-ranks")
    one = [r for r in read_csv(RESULTS / "real-ranks.csv") if (r["lr"], r["seed"])
           == ("0.002", "0")]
    one = {row: same for (row,), same in groups(one, "row").items()}
    names = {"validation loss": "validation loss", "gradient norm": "late gradient norm"}
    return markdown(header, rows + at_one_rate(one, names))


def deltalora():
    """Each lambda and K; lambda 2 beside its fair baseline, LoRA with (1 + lambda) alpha."""
    by_row = best("deltalora")
    return markdown(["", "rate", "seeds", "test loss", "above LoRA", "above LoRA with 3 alpha"],
                    [[row, same[0]["tried"], str(len(same)), spread(same, "merged loss"),
                      "" if row == "LoRA, alpha" else paired(same, by_row["LoRA, alpha"]),
                      paired(same, by_row["LoRA, 3 alpha"]) if "lambda 2" in row else ""]
                     for row, same in by_row.items()])


def clipping():
    """Delta-LoRA K 0 and LoRA with 3 alpha at one high rate, with and without clipping."""
    by_row = best("deltalora-clip")
    other = by_row["LoRA, 3 alpha"]
    return markdown(["", "test loss", "above LoRA with 3 alpha"], [
        [row, spread(same, "merged loss"), "" if same is other else paired(same, other)]
        for row, same in by_row.items()])


def weights(where=RESULTS):
    """Rank and cosine over the layers."""
    rows = []
    for (row, lr), same in groups(read_csv(where / "deltalora-weights.csv"), "row", "lr").items():
        ranks = sorted({int(r["rank"]) for r in same})
        moved = [float(r["share of the motion"]) for r in same if r["share of the motion"]]
        rows.append([row, rate(lr), f"{float(same[0]['unmerged loss']):.3f}",
                     f"{ranks[0]}" + f" to {ranks[-1]}" * (len(ranks) > 1), average(same, "cosine"),
                     f"{mean(moved):.2f}" if moved else ""])
    return markdown(["", "rate", "test loss", "rank of W' - W_0", "cosine of W_0 and W'",
                     "motion that W made"], rows)


def dylora(where=RESULTS):
    """Loss by rank."""
    rows = read_csv(where / "dylora.csv")
    return markdown(["", *(f"r {b}" for (b,) in groups(rows, "rank"))], [
        [adapter, *(spread(at, "loss") for at in groups(same, "rank").values())]
        for (adapter,), same in groups(rows, "adapter").items()])


def theorem(where=RESULTS):
    """Size of the branch after one step by rank, mean of the seeds."""
    rows = read_csv(where / "rank-theorem.csv")
    names = {"lora": "LoRA", "rslora": "rsLoRA"}
    return markdown(["branch", *(f"r {r}" for (r,) in groups(rows, "rank"))], [
        [f"{optimizer}, {names[method]}",
         *(f"{mean([float(r['branch']) for r in at]):.2g}" for at in groups(same, "rank").values())]
        for (optimizer, method), same in groups(rows, "optimizer", "method").items()])


def decoding():
    """Seconds with the cache, and how many times as long the other ways take."""
    rows = []
    for (prompts, beams), same in groups(read_csv(RESULTS / "decoding.csv"), "prompts",
                                         "beams").items():
        ways = {r["way"]: r for r in same}
        times = (ways.get(way, {}).get("of cached") for way in ("transformers", "uncached"))
        rows.append([prompts, beams, f"{float(ways['cached']['seconds']):.2f} s",
                     *(f"{float(of):.1f} times" if of else "" for of in times)])
    return markdown(["prompts", "beams", "with the cache", "`transformers`", "without a cache"],
                    rows)


def methods(name, more=None, against=("LoRA r 16",)):
    """Each method at its best rate, and seed by seed against some of the others: `more` are
    {header: column} beside the loss."""
    by_row, more = best(name), more or {}
    return markdown(["", "trained", "rate", "test loss", *(f"above {other}" for other in against),
                     *more], [[row, f"{int(same[0]['trained']):,}", same[0]["tried"],
                               spread(same, "merged loss"),
                               *("" if row in (against[0], other) else paired(same, by_row[other])
                                 for other in against),
                               *(spread(same, column) for column in more.values())]
                              for row, same in by_row.items()])


def master():
    """Every method on every base: merged loss with its standard error, difference to LoRA of one
    rate; what it forgets, and what a step of it costs."""
    grids = {"SmolLM2, E2E": best("real-base"), "GPT, e2e": best("methods-e2e"),
             "RoBERTa, reviews": best("methods-reviews")}
    bench = json.loads((RESULTS / "real-bench.json").read_text())["smollm2-135m"]["steps"]
    steps = {step["row"]: step for step in bench}
    rows = []
    labels = dict.fromkeys(label for grid in reversed(grids.values()) for label in grid)
    for label in sorted(labels, key=lambda label: label == "full fine-tuning"):
        cells = []
        for grid in grids.values():
            same = grid.get(label)
            cells += ["", ""] if not same else [
                with_error([float(r["merged loss"]) for r in same], sign="", digits=3),
                "" if label == "LoRA r 16" else paired(same, grid["LoRA r 16"], digits=3)]
        known = grids["GPT, e2e"].get(label)
        forgets = mean([float(r["merged loss on world"]) - float(r["base loss on world"])
                        for r in known]) if known else None
        step = steps.get(BENCH.get(label))
        rows.append([label, *cells, f"+{forgets:.2f}" if known else "",
                     *([f"{step['of lora']:.2f}", f"{step['peak GB']:.2f}"] if step else ["", ""])])
    return markdown(["", *(name for base in grids for name in (base, "above LoRA")), "forgets",
                     "step", "GB"], rows)


def same():
    """rsLoRA, LoRA with 3 alpha and Delta-LoRA K 0 beside their cells of the plane."""
    by_row = {r["row"]: f"{float(r['merged loss']):.5f}" for r in
              read_csv(RESULTS / "plane-same.csv")}
    cells = {"rsLoRA": "ratio 4", "3 alpha": "ratio 3", "Delta-LoRA K 0": "ratio 3"}
    return markdown(["", "exact", "its cell, exact", "as by default", "its cell, as by default"],
                    [[name, by_row[f"{name} exact"], by_row[f"{cell} exact"], by_row[name],
                      by_row[cell]] for name, cell in cells.items()])


def qlora():
    """What 4 bits cost before and after training, and what each way to merge adds."""
    names = {"qlora-restaurants": "restaurants", "qlora-e2e": "E2E",
             "qlora-smollm2": "E2E, SmolLM2"}
    merges = ("merged, saved in bfloat16", "merged, in 4 bits again", "merged into W before 4 bits")
    rows = []
    for file, name in names.items():
        plain, packed = (best(file)[row] for row in ("LoRA", "QLoRA"))
        base, base_4 = (average(same, "base loss", 4) for same in (plain, packed))
        rows.append([name, str(len(packed)), base, base_4, average(plain, "unmerged loss", 4),
                     average(packed, "unmerged loss", 4), paired(packed, plain, "unmerged loss"),
                     *(with_error([float(r[f"{merge} loss"]) - float(r["unmerged loss"])
                                   for r in packed]) for merge in merges)])
    return markdown(["", "seeds", "base", "base in 4 bits", "LoRA", "QLoRA", "QLoRA above LoRA",
                     "merged, in bf16", "merged, in 4 bits again", "merged into W before 4 bits"],
                    rows)


TABLES = {
    "qlora": qlora, "master": master, "plane-same": same,
    **{name: lambda name=name: deployed(name)
       for name in ("merge-at-restaurants", "merge-at-reviews", "merge-at-e2e",
                    "reslora-curves-best")},
    "reslora-pre-num": pre_num, "merges": merges, "calibration": calibration,
    "reslora-gradients": gradients,
    "real-merges": real_merges, "real-texts": real_texts, "real-characters": real_characters,
    "real-ranks": real_ranks,
    "real-base": lambda: methods("real-base", against=("LoRA r 16", "LoRA r 16, 3 alpha",
                                                       "full fine-tuning")),
    "rslora-adamw": lambda: rslora("adamw"), "rslora-sgd": lambda: rslora("sgd"),
    "deltalora": deltalora, "deltalora-clip": clipping,
    "deltalora-weights": weights, "dylora": dylora, "rank-theorem": theorem, "decoding": decoding,
    "methods-e2e": lambda: methods("methods-e2e", {"pretraining text": "merged loss on world"}),
    "methods-reviews": lambda: methods("methods-reviews", {"accuracy": "merged accuracy"}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the pages")
    args = parser.parse_args()
    for file in (ROOT / "RESULTS.md", ROOT / "LOG.md"):
        page = file.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table: (\S+) -->", page):
            table = "\n".join(TABLES[name]())
            print(f"\n{name}\n\n{table}")
            page, times = re.subn(rf"(<!-- table: {name} -->\n\n)(?:\|.*\n)*\n*",
                                  lambda mark, t=table: f"{mark[1]}{t}\n\n", page)
            if times != 1:
                raise ValueError(f"{file.name} has <!-- table: {name} --> and an empty line "
                                 f"{times} times, not once")
        if args.write:
            write(file, lambda part, text=page: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
