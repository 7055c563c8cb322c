"""Pictures of a run."""
import contextlib

from checkpoints.files import write


@contextlib.contextmanager
def picture(path, rows=1, columns=1, **options):
    """(figure, axes) of matplotlib to draw on; what is drawn is written to a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    yield figure, axes
    write(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    plt.close(figure)


def draw_curve(path, rows, title, metric="loss"):
    """Training and validation loss against steps, and the task's metric if it has another, as a picture."""
    panels = ["loss"] if metric == "loss" else ["loss", metric]
    with picture(path, 1, len(panels), figsize=(2 + 4 * len(panels), 3.6), squeeze=False) as (figure, axes):
        for axis, name in zip(axes[0], panels, strict=True):
            for column, style in ((f"train_{name}", dict(color="0.6", label="training")),
                                  (f"val_{name}", dict(color="C0", marker="o", ms=3, label="validation"))):
                points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), **style)
            axis.set(xlabel="step", ylabel="loss (nats)" if name == "loss" else name)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        figure.suptitle(title)


def draw_ranks(path, rows, names, title):
    """The rank of every layer against steps, as a picture with the last ranks written out; `names`: [layer]."""
    ranks = [list(map(int, row["ranks"].split())) for row in rows]  # a list of layers for each row
    with picture(path, figsize=(6, 1.2 + 0.22 * len(names))) as (figure, axis):
        steps = [0, *(row["step"] for row in rows)]
        mesh = axis.pcolormesh(steps, range(len(names) + 1), list(zip(*ranks, strict=True)), vmin=0, cmap="viridis")
        axis.set(xlabel="step", title=title)
        axis.set_yticks([n + 0.5 for n in range(len(names))],
                        [f"{name.removeprefix('h.')}: {last}" for name, last in zip(names, ranks[-1], strict=True)])
        axis.invert_yaxis()
        figure.colorbar(mesh, label="rank")
