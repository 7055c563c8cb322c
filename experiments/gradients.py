"""How large is the gradient of each layer's adapter, in LoRA and in ResLoRA's structures?

    python -m experiments.gradients [--seeds 3] [--quick]
        writes experiments/results/reslora-gradients.csv and .png

180 steps of restaurants, r 16 on q and v, rate 1.2e-2 for all: the norm of a layer's dL/dA and
dL/dB together, before clipping, its mean over the steps. The base has six layers; a chain is the q,
or the v, of all of them. A shortcut makes what A or B multiplies larger, and so their gradients:
what shows whether early layers gain is the shape over the depth.
"""
import argparse
import contextlib
import io

from checkpoints.files import check_writable
from compare import RESULTS, ROOT, STYLES, groups, mean, pool, write_csv
from evaluation.plots import picture

ROWS = {"LoRA": ("lora", "--method lora"), "input, m 1": ("input", "--method reslora"),
        "block, m 1": ("block", "--method reslora --shortcut block"),
        "middle, m 1": ("middle", "--method reslora --shortcut middle"),
        "middle, all": ("middle", "--method reslora --shortcut middle --pre-num -1")}


def norms(label, seed):
    """One run: [{row, seed, target, layer, gradient norm}]"""
    import lora
    import train
    from evaluation import evaluate
    evaluate.SCORED = 0
    seen = []

    def before_step(layers, step):  # the training loop calls it between backward and clipping
        seen.append([sum(p.grad.square().sum() for p in (layer.lora_A, layer.lora_B)).sqrt()
                     for layer in layers])
    # of this process, which does nothing else
    lora.LoRALinear.before_step = staticmethod(before_step)
    out = ROOT / "out/gradients" / f"{label.replace(', ', '-').replace(' ', '')}-{seed}"
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(train.parse([*ROWS[label][1].split(), "--rank", "16", "--lr", "1.2e-2",
                                     "--seed", str(seed), "--eval-every", "180", "--out",
                                     str(out)]))
        check_writable(run.settings.out)
        run.adapter.begin(run.layers, run.settings.steps)
        train.fit(run)
    rows = []
    for name, values in zip(run.names, zip(*seen, strict=True), strict=True):  # name: h.0.attn.q
        _, layer, _, target = name.split(".")
        rows.append({"row": label, "seed": seed, "target": target, "layer": int(layer),
                     "gradient norm": f"{mean([v.item() for v in values]):.5g}"})
    return sorted(rows, key=lambda row: (row["target"], row["layer"]))


def draw(rows, path):
    """A panel for each target: norm against layer, a line a row, its width the seeds."""
    targets = groups(rows, "target")
    with picture(path, 1, len(targets), figsize=(8, 3.6), sharey=True) as (figure, axes):
        for axis, ((target,), same) in zip(axes, targets.items(), strict=True):
            used = set()
            for (label,), mine in groups(same, "row").items():
                colour, marker, line = STYLES[ROWS[label][0]]
                layers = [layer for (layer,) in groups(mine, "layer")]
                points = [[float(r["gradient norm"]) for r in at]
                          for at in groups(mine, "layer").values()]
                axis.plot(layers, list(map(mean, points)), line, color=colour, marker=marker,
                          label=label, fillstyle="none" if colour in used else "full")
                low, high = list(map(min, points)), list(map(max, points))
                axis.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
                used.add(colour)
            axis.set(title=f"adapters on {target}", xlabel="layer", yscale="log")
            axis.set_xticks(layers)
            axis.set_yticks(ticks := [0.01, 0.02, 0.03, 0.05, 0.1], map(str, ticks))
            axis.minorticks_off()
            axis.grid(alpha=0.25, which="both", axis="y")
        axes[0].set_ylabel("norm of the gradient, mean of the run")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                      frameon=False, fontsize=9)


def main(labels, seeds, where):
    with pool(2) as workers:
        keys = [(label, seed) for seed in range(seeds) for label in labels]
        rows = [row for found in workers.map(norms, *zip(*keys, strict=True)) for row in found]
    write_csv(where / "reslora-gradients.csv", rows)
    draw(rows, where / "reslora-gradients.png")
    from experiments import tables
    print(*tables.gradients(where), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three rows, into out/quick")
    args = parser.parse_args()
    main(list(ROWS)[::2] if args.quick else ROWS, args.seeds,
         ROOT / "out/quick" if args.quick else RESULTS)
