"""Pictures of a run.

    python -m evaluation.plots      draws docs/shortcuts.png, ResLoRA's shortcuts
"""
import contextlib
import importlib.util
import math
from pathlib import Path

from checkpoints.files import write
from evaluation.metrics import library

MAKER = "lora-family"  # stands in every picture


def drawn_here(path):
    """Whether a picture is one of ours."""
    return MAKER.encode() in path.read_bytes()[:2000]


def available():
    """Whether pictures can be drawn; a line says so if not."""
    if importlib.util.find_spec("matplotlib"):
        return True
    print("note     no picture is drawn: matplotlib is not installed")
    return False


@contextlib.contextmanager
def picture(path, rows=1, columns=1, **options):
    """(figure, axes) of matplotlib to draw on; what is drawn is written to a PNG file."""
    library("matplotlib").use("Agg")
    plt = library("matplotlib.pyplot")
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    yield figure, axes
    write(path, lambda part: figure.savefig(part, dpi=150, format="png",
                                            metadata={"Software": MAKER}))
    plt.close(figure)


def draw_curve(path, rows, title, base, metric="loss"):
    """Losses against steps, and the task's metric if it has another, as a picture.

    rows: of log.csv. base: {metric: value} of the base on the test split. A point of the training
    loss is its mean over the steps since the last validation, so that all points average over
    equally many steps.
    """
    panels = ["loss"] if metric == "loss" else ["loss", metric]
    training = even_means(rows)
    with picture(path, 1, len(panels), figsize=(2 + 4 * len(panels), 3.6),
                 squeeze=False) as (figure, axes):
        for axis, name in zip(axes[0], panels, strict=True):
            if name == "loss":
                axis.plot(*zip(*training, strict=True), color="0.6", marker=".", label="training")
            points = [(row["step"], row[f"val_{name}"]) for row in rows
                      if row["val_loss"] is not None]
            axis.plot(*zip(*points, strict=True), color="C0", marker="o", ms=3, label="validation")
            if name in base:
                axis.axhline(base[name], color="0.3", ls=":", label="base (test split)")
            axis.set(xlabel="step", ylabel="loss (nats)" if name == "loss" else name)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        figure.suptitle(title)


def even_means(rows):
    """[(step, mean training loss of the steps since the last validation)]. A row's loss is the mean
    of the steps since the row before, and NaN where float16 has skipped all of them."""
    points, total, before, steps = [], 0.0, 0, 0
    for row in rows:
        if not math.isnan(row["train_loss"]):
            total += row["train_loss"] * (row["step"] - before)
            steps += row["step"] - before
        before = row["step"]
        if row["val_loss"] is not None:
            points.append((before, total / steps if steps else math.nan))
            total, steps = 0.0, 0
    return points


def draw_ranks(path, rows, names, title):
    """The rank of every layer against steps, as a picture with the last ranks written out; `names`:
    [layer]."""
    ranks = [list(map(int, row["ranks"].split())) for row in rows]  # a list of layers for each row
    with picture(path, figsize=(6, 1.2 + 0.22 * len(names))) as (figure, axis):
        steps = [0, *(row["step"] for row in rows)]
        mesh = axis.pcolormesh(steps, range(len(names) + 1), list(zip(*ranks, strict=True)), vmin=0,
                               cmap="viridis")
        axis.set(xlabel="step", title=title)
        axis.set_yticks([n + 0.5 for n in range(len(names))],
                        [f"{name.removeprefix('h.')}: {last}"
                         for name, last in zip(names, ranks[-1], strict=True)])
        axis.invert_yaxis()
        figure.colorbar(mesh, label="rank")


def draw_shortcut(axis, shortcut):
    """Layers n-1 and n of a ResLoRA chain as a graph, from inputs at the bottom to outputs at the
    top. Dashed: what the shortcut adds to LoRA."""
    places = {"x": (0.5, 0), "W": (-0.15, 1.15), "A": (1, 1), "B": (1, 2), "h": (0.5, 3)}
    # n: 0 for n-1, 1 for n
    at = {(name, n): (x + 3 * n, y) for name, (x, y) in places.items() for n in (0, 1)}
    edges = [((start, n), (end, n)) for n in (0, 1)
             for start, end in ("xW", "Wh", "xA", "AB", "Bh")]
    # A and B of layer n-1, once more
    again = {("A", 2): (5, 1), ("B", 2): (5, 2)} if shortcut == "block" else {}
    more = {"input": [(("x", 0), ("A", 1))], "middle": [(("A", 0), ("B", 1))],
            "block": [(("x", 1), ("A", 2)), (("A", 2), ("B", 2)), (("B", 2), ("h", 1))]}[shortcut]
    for (start, end), added in [*((edge, False) for edge in edges),
                                *((edge, True) for edge in more)]:
        style = dict(color="C3", lw=2.2, ls="--") if added else dict(color="0.35", lw=1.3)
        axis.annotate("", (at | again)[end], (at | again)[start],
                      arrowprops=dict(arrowstyle="->", shrinkA=15, shrinkB=15, mutation_scale=15,
                                      **style))
    for (name, n), place in (at | again).items():
        box = dict(boxstyle="round,pad=.35",
                   fc={"W": "0.85", "x": "none", "h": "none"}.get(name, "white"),
                   ec="none" if name in "xh" else "C3" if n == 2 else "0.35",
                   ls="--" if n == 2 else "-")
        axis.text(*place, f"${name}_{{{'n' if n == 1 else 'n-1'}}}$", ha="center", va="center",
                  fontsize=13, bbox=box)
    axis.set(xlim=(-0.8, 5.6 if again else 4.6), ylim=(-0.4, 3.4), title=shortcut)
    axis.axis("off")


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs/shortcuts.png"
    with picture(page, 1, 3, figsize=(11.5, 2.9)) as (_, panels):
        for panel, name in zip(panels, ("input", "block", "middle"), strict=True):
            draw_shortcut(panel, name)
