"""The README's tables of results, made from the csv files under results/.

    python runs/tables.py [--write]      prints them; --write puts each behind its <!-- table: name --> in the README

tests/test_readme.py compares both. A cell with a range is the mean of the seeds, the lowest and the highest.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from merges import MERGES, RATES, kept, loss  # noqa: E402

from compare import ROOT, groups, mean, read, spread, write  # noqa: E402

RESULTS = ROOT / "results"


def best(name):
    """{row: its runs at its best rate} of a csv of compare.py."""
    return {row: same for (row,), same in groups([r for r in read(RESULTS / f"{name}.csv") if r["best"] == "1"],
                                                 "row").items()}


def rate(lr):
    """0.024 -> 2.4e-2"""
    return re.sub(r"e-0", "e-", f"{float(lr):.1e}").replace(".0e", "e")


def average(rows, column, digits=3):
    return f"{mean([float(r[column]) for r in rows]):.{digits}f}"


def paired(rows, others, column):
    """What lies between two rows seed by seed: mean and standard error, "+0.0039 (0.0086)"."""
    of = {r["seed"]: float(r[column]) for r in others}
    differences = [float(r[column]) - of[r["seed"]] for r in rows]
    center = mean(differences)
    error = (sum((d - center)**2 for d in differences) / (len(differences) - 1) / len(differences))**0.5
    return f"{center:+.4f} ({error:.4f})"


def markdown(header, rows):
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


def deployed(name):
    """Each row of a grid at its best rate, before and after merging, and against LoRA seed by seed."""
    found = best(name)
    lora = found["LoRA"]
    return markdown(["", "rate", "seeds", "unmerged", "merged", "above LoRA"], [
        [row, rate(same[0]["lr"]), str(len(same)), average(same, "unmerged loss"), spread(same, "merged loss"),
         "" if same is lora else paired(same, lora, "merged loss")] for row, same in found.items()])


def pre_num():
    """Unmerged loss of one seed by structure and m, each at its best rate."""
    found = best("reslora-pre-num")
    lora = found.pop("LoRA (m 0)")[0]
    structures, ms = (list(dict.fromkeys(row.split(", ")[i] for row in found)) for i in (0, 1))

    def cell(row):
        return f"{float(row['unmerged loss']):.3f} ({rate(row['lr'])})"
    return markdown(["", *structures], [
        ["m 0: LoRA", *[cell(lora)] * len(structures)],
        *([m, *(cell(found[f"{structure}, {m}"][0]) for structure in structures)] for m in ms)])


def merges():
    """Loss before and after each merge, one seed; what regression keeps of the gain over the base."""
    def cells(row):
        return [f"{value:.3f}" if (value := loss(row, how)) is not None else "-" for how in ("unmerged", *MERGES)]
    rows = [r for dataset in RATES for r in read(RESULTS / f"merges-{dataset}.csv") if r["method"] == "reslora"]
    return markdown(["dataset", "structure", "unmerged", "**regression**", *MERGES[1:], "kept by regression"], [
        [r["dataset"], r["row"], *cells(r), f"{kept(r, 'regression'):.1%}"] for r in rows
        if not r["row"].startswith("block")])


def methods(name, more):
    """Each method at its best rate: `more` are {header: column} beside the loss."""
    found = best(name)
    return markdown(["", "trained", "rate", "test loss", *more, "seconds"], [
        [row, f"{int(same[0]['trained']):,}", rate(same[0]["lr"]), spread(same, "merged loss"),
         *(spread(same, column) for column in more.values()), average(same, "training seconds", 0)]
        for row, same in found.items()])


def deltalora():
    found = best("deltalora")
    lora = found["LoRA, 3 alpha"]
    return markdown(["", "rate", "seeds", "test loss", "above LoRA with 3 alpha"], [
        [row, rate(same[0]["lr"]), str(len(same)), spread(same, "merged loss"),
         "" if same is lora else paired(same, lora, "merged loss")] for row, same in found.items()])


def weights():
    """Rank and cosine over the layers."""
    rows = []
    for (row, lr), same in groups(read(RESULTS / "deltalora-weights.csv"), "row", "lr").items():
        ranks = sorted({int(r["rank"]) for r in same})
        moved = [float(r["share of the motion"]) for r in same if r["share of the motion"]]
        rows.append([row, rate(lr), f"{float(same[0]['unmerged loss']):.3f}",
                     f"{ranks[0]}" + f" to {ranks[-1]}" * (len(ranks) > 1), average(same, "cosine"),
                     f"{mean(moved):.2f}" if moved else ""])
    return markdown(["", "rate", "test loss", "rank of W' - W_0", "cosine of W_0 and W'", "motion that W made"], rows)


def gradients():
    """Norms by layer, of q and v together as they stand, mean over targets and seeds."""
    rows = read(RESULTS / "reslora-gradients.csv")
    layers = sorted({r["layer"] for r in rows})
    return markdown(["", *(f"layer {layer}" for layer in layers)], [
        [f"{row}: {target}", *(average(at, "gradient norm") for at in groups(same, "layer").values())]
        for (row, target), same in groups(rows, "row", "target").items()])


def calibration():
    found = groups(read(RESULTS / "calibration.csv"), "dataset", "row")
    texts = [r["texts"] for r in next(iter(found.values()))]
    return markdown(["texts", "unmerged", "no shortcut", *texts], [
        [f"{dataset}: {row}", *(f"{float(same[0][c]):.3f}" for c in ("unmerged loss", "merged by none loss")),
         *(f"{float(r['merged loss']):.3f}" for r in same)] for (dataset, row), same in found.items()])


def rslora(optimizer):
    """Loss by rank at the best and at one rate, and the gradient norm that goes with the latter."""
    own, one = best(f"rslora-{optimizer}"), best(f"rslora-{optimizer}-fixed")
    rows = [[f"{row}, best rate", *(f"{float(r['merged loss']):.3f} ({rate(r['lr'])})" for r in same)]
            for row, same in own.items()]
    for name, column in (("", "merged loss"), (", gradient norm", "late gradient norm")):
        rows += [[f"{row}, rate {rate(same[0]['lr'])}{name}", *(f"{float(r[column]):.3f}" for r in same)]
                 for row, same in one.items()]
    return markdown(["", *(f"r {r['rank']}" for r in own["LoRA"])], rows)


TABLES = {
    "merge-at-restaurants": lambda: deployed("merge-at-restaurants"),
    "reslora-curves-best": lambda: deployed("reslora-curves-best"),
    "reslora-pre-num": pre_num, "merges": merges, "calibration": calibration, "reslora-gradients": gradients,
    "rslora-adamw": lambda: rslora("adamw"), "deltalora": deltalora, "deltalora-weights": weights,
    "methods-e2e": lambda: methods("methods-e2e", {"loss on the pretraining text": "merged loss on world"}),
    "methods-reviews": lambda: methods("methods-reviews", {"accuracy": "merged accuracy"}),
}


def main():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"<!-- table: (\S+) -->", readme):
        table = "\n".join(TABLES[name]())
        print(f"\n{name}\n\n{table}")
        readme = re.sub(rf"(<!-- table: {name} -->\n\n)(?:\|.*\n)*", lambda found, t=table: f"{found[1]}{t}\n", readme)
    if "--write" in sys.argv:
        write(ROOT / "README.md", lambda part: part.write_text(readme))


if __name__ == "__main__":
    main()
