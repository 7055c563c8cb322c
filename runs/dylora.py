"""One DyLoRA r 32 cut at every rank, beside LoRA r 32 truncated to it by SVD and LoRA trained at it.

    python runs/dylora.py [--seeds 3] [--jobs 2]      writes results/dylora.csv

On restaurants. Each row at the one of RATES with the lowest validation loss (seed 0; of DyLoRA at its full rank, of the
truncated LoRA before truncation). Losses are nats per target token on the test split.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import ROOT, cell, folder, pool, validation, write_csv  # noqa: E402

RATES = (1.2e-2, 2.4e-2, 4.8e-2)
CUTS = (1, 2, 4, 8, 16, 32)
FULL = CUTS[-1]


def flags(method, rank, lr, seed):
    return ["--method", method, "--rank", rank, "--lr", lr, "--seed", seed]


def train_one(*key):
    """{test metrics of every stage}"""
    return cell(flags(*key))["metrics"]


def truncated(lr, seed):
    """{rank: test metrics} of the trained LoRA r 32 with its update cut to the first singular values."""
    import torch

    import checkpoint
    import train
    from model import from_pretrained
    train.SCORED = 0  # as in compare.cell
    out = folder(flags("lora", FULL, lr, seed))
    run = train.Run(train.parse(["--rank", str(FULL), "--lr", str(lr), "--seed", str(seed), "--out", str(out)]))
    trained = from_pretrained(run.source)
    checkpoint.load_adapter(trained, out)
    deltas = [trained.get_submodule(place).delta().detach() for place in run.names]
    found = {}
    for b in CUTS:
        with torch.no_grad():
            for layer, delta in zip(run.layers, deltas, strict=True):
                U, S, V = torch.linalg.svd(delta)
                layer.lora_A.zero_()[:b] = V[:b]
                layer.lora_B.zero_()[:, :b] = U[:, :b] * S[:b] / layer.scaling
        found[b] = run.report(run.model)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    kinds = [("dylora", FULL), *(("lora", rank) for rank in CUTS)]
    with pool(args.jobs) as workers:
        list(workers.map(train_one, *zip(*[(*kind, lr, 0) for kind in kinds for lr in RATES], strict=True)))
        best = {kind: min(RATES, key=lambda lr, kind=kind: validation(folder(flags(*kind, lr, 0)))[0])
                for kind in kinds}
        keys = [(*kind, best[kind], seed) for kind in kinds for seed in range(args.seeds)]
        metrics = dict(zip(keys, workers.map(train_one, *zip(*keys, strict=True)), strict=True))
        cuts = list(workers.map(truncated, [best["lora", FULL]] * args.seeds, range(args.seeds)))
    rows = []
    for seed in range(args.seeds):
        for b in CUTS:
            dylora = metrics["dylora", FULL, best["dylora", FULL], seed]
            by = {"DyLoRA r 32, cut": (best["dylora", FULL], dylora["merged" if b == FULL else f"merged by cut {b}"]),
                  "LoRA r 32, truncated by SVD": (best["lora", FULL], cuts[seed][b]),
                  "LoRA trained at the rank": (best["lora", b], metrics["lora", b, best["lora", b], seed]["merged"])}
            rows += [dict(adapter=adapter, rank=b, lr=lr, seed=seed, **{k: round(v, 5) for k, v in values.items()})
                     for adapter, (lr, values) in by.items()]
    write_csv(ROOT / "results/dylora.csv", rows)
    print_table(rows)


def print_table(rows):
    """Markdown: mean and range of the seeds."""
    print("| | " + " | ".join(f"r {b}" for b in CUTS) + " |\n" + "|---" * (len(CUTS) + 1) + "|")
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        print(f"| {adapter}", end=" |")
        for b in CUTS:
            losses = [row["loss"] for row in rows if (row["adapter"], row["rank"]) == (adapter, b)]
            print(f" {sum(losses) / len(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})", end=" |")
        print()


if __name__ == "__main__":
    main()
