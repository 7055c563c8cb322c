"""What Delta-LoRA does to W: rank and singular values of the total update, how far W turns, what
bf16 weights would do.

    python -m experiments.deltalora_weights [--quick]
        writes experiments/results/deltalora-weights.csv and .png

Restaurants, r 16 on q and v, seed 0, at a high and a low rate: LoRA with alpha and with 3 alpha,
Delta-LoRA (lambda 2, K 18), and Delta-LoRA whose W is rounded to bf16 after every step, as it would
be if it were kept in bf16. One csv row for each layer; W' is the merged matrix, with the branch,
W_0 the base's (in bf16 for the last). The rank counts singular values of W' - W_0 above 1e-4 of the
largest.
"""
import argparse

from compare import RESULTS, ROOT, STYLES, groups, mean, pool, trained, write_csv
from evaluation.plots import picture

R = 16
ROWS = {"LoRA, alpha": "--method lora", "LoRA, 3 alpha": "--method lora --alpha 48",
        "Delta-LoRA": "--method deltalora", "Delta-LoRA, W in bf16": "--method deltalora-bf16"}


def measured(label, lr):
    """One run: [{row, lr, layer, loss, rank, cosine, share of the motion, singular values}]"""
    import torch

    from checkpoints.pretrained import from_pretrained
    from deltalora import DeltaLoRALinear
    from methods import METHODS, Method

    class InBF16(DeltaLoRALinear):
        """W is rounded to bf16 after each of its steps."""

        def __init__(self, linear, **hparams):
            super().__init__(linear, **hparams, delta_lambda=2.0, delta_start=18)

        @staticmethod
        @torch.no_grad()
        def after_step(layers, step):
            DeltaLoRALinear.after_step(layers, step)
            for layer in layers:
                layer.weight.copy_(layer.weight.bfloat16())

    METHODS["deltalora-bf16"] = Method(InBF16)
    run = trained(["--dataset", "restaurants", "--rank", R, "--eval-every", 30,
                   *ROWS[label].split(), "--lr", f"{lr:g}", "--seed", 0])
    loss, base = run.report(run.model)["loss"], from_pretrained(run.source).to(run.settings.device)
    rows = []
    for name, layer in zip(run.names, run.layers, strict=True):
        W_0, W = base.get_submodule(name).weight, layer.weight.detach().double()
        W_0 = (W_0.bfloat16() if "bf16" in label else W_0).double()
        branch = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()
        S = torch.linalg.svdvals(W + branch - W_0)
        row = {"row": label, "lr": lr, "layer": name, "unmerged loss": round(loss, 5),
               "rank": (S > 1e-4 * S[0]).sum().item(),
               "cosine": round((W_0 * (W + branch)).sum().item()
                               / (W_0.norm() * (W + branch).norm()).item(), 5)}
        if hasattr(layer, "delta_lambda"):
            # W should have moved by lambda s (B_T A_T - B_K A_K)
            asked = layer.delta_lambda * (branch - layer.scaling
                                          * (layer.B_K @ layer.A_K).detach().double())
            row["share of the motion"] = round(((W - W_0) * asked).sum().item()
                                               / asked.square().sum().item(), 4)
        rows.append({**row, "singular values": " ".join(f"{s:.4g}" for s in S[:3 * R].tolist())})
    return rows


def draw(rows, path):
    """Singular values of the total update, mean of the layers, at the highest rate."""
    looks = {"LoRA, alpha": ("lora", "full"), "LoRA, 3 alpha": ("lora", "none"),
             "Delta-LoRA": ("deltalora", "full"), "Delta-LoRA, W in bf16": ("deltalora", "none")}
    high = max(row["lr"] for row in rows)
    with picture(path, figsize=(6.4, 3.8)) as (_, axis):
        for (label,), same in groups([row for row in rows if row["lr"] == high], "row").items():
            method, fill = looks[label]
            colour, marker, line = STYLES[method]
            values = zip(*(map(float, row["singular values"].split()) for row in same), strict=True)
            values = [mean(at) for at in values]
            axis.semilogy(range(1, len(values) + 1), values, line, color=colour, marker=marker,
                          fillstyle=fill, ms=5, label=label)
        for at, name in ((R, "r"), (2 * R, "2 r")):
            axis.axvline(at + 0.5, color="0.5", lw=0.8)
            axis.text(at + 0.7, 0.95, name, transform=axis.get_xaxis_transform(), color="0.3",
                      va="top")
        axis.set(xlabel="number of the singular value", ylabel="singular value of W' - W_0 (mean "
                 "of the layers)", ylim=(1e-4, None))
        axis.legend(frameon=False, fontsize=9, loc="lower left")
        axis.set_title(f"restaurants, r {R}, rate {high:g}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)


def main(rates, where):
    with pool(2) as workers:
        jobs = [workers.submit(measured, label, lr) for lr in rates for label in ROWS]
        rows = [row for job in jobs for row in job.result()]
    write_csv(where / "deltalora-weights.csv", rows)
    draw(rows, where / "deltalora-weights.png")
    from experiments import tables
    print(*tables.weights(where), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the high rate only, into out/quick")
    quick = parser.parse_args().quick
    main([2.4e-2] if quick else [2.4e-2, 1e-3], ROOT / "out/quick" if quick else RESULTS)
