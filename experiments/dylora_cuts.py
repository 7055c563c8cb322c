"""One DyLoRA r 32 cut at every rank, beside LoRA r 32 truncated to it by SVD and LoRA trained at
it.

    python -m experiments.dylora_cuts [--quick]      writes experiments/results/dylora.csv

On restaurants. Each row at the one of RATES with the lowest validation loss (seed 0; of DyLoRA at
its full rank, of the truncated LoRA before truncation). Losses are nats per target token on the
test split.
"""
import argparse

from compare import RESULTS, ROOT, cell, folder, pool, read_csv, validation, write_csv

RATES = (1.2e-2, 2.4e-2, 4.8e-2)
CUTS = (1, 2, 4, 8, 16, 32)
FULL = CUTS[-1]


def flags(method, rank, lr, seed):
    return ["--method", method, "--rank", rank, "--lr", lr, "--seed", seed]


def train_one(*key):
    """{test metrics of every stage}"""
    return cell(flags(*key))["metrics"]


def truncated(lr, seed):
    """{rank: test metrics} of the trained LoRA r 32 with its update cut to the first singular
    values."""
    import torch

    import train
    from checkpoints.adapters import load_adapter
    from checkpoints.pretrained import from_pretrained
    from evaluation import evaluate
    evaluate.SCORED = 0  # as in compare.cell
    out = folder(flags("lora", FULL, lr, seed))
    run = train.Run(train.parse(["--rank", str(FULL), "--lr", str(lr), "--seed", str(seed), "--out",
                                 str(out)]))
    trained = from_pretrained(run.source)
    load_adapter(trained, out)
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three ranks, at known "
                        "rates, into out/quick")
    quick = parser.parse_args().quick
    cuts, seeds = ((1, 8, 32), 1) if quick else (CUTS, 3)
    kinds = [("dylora", FULL), *(("lora", rank) for rank in cuts)]
    rates = dict.fromkeys(kinds, RATES)
    if quick:
        known = {(r["adapter"].split()[0].lower(), int(r["rank"])): [float(r["lr"])]
                 for r in read_csv(RESULTS / "dylora.csv") if "SVD" not in r["adapter"]}
        rates = {kind: known[kind] for kind in kinds}
    with pool(2) as workers:
        list(workers.map(train_one,
                         *zip(*[(*kind, lr, 0) for kind in kinds for lr in rates[kind]],
                              strict=True)))
        best = {kind: min(rates[kind],
                          key=lambda lr, kind=kind: validation(folder(flags(*kind, lr, 0)))[0])
                for kind in kinds}
        keys = [(*kind, best[kind], seed) for kind in kinds for seed in range(seeds)]
        metrics = dict(zip(keys, workers.map(train_one, *zip(*keys, strict=True)), strict=True))
        svd = list(workers.map(truncated, [best["lora", FULL]] * seeds, range(seeds)))
    rows = []
    for seed in range(seeds):
        for b in cuts:
            dylora = metrics["dylora", FULL, best["dylora", FULL], seed]
            by = {"DyLoRA r 32, cut": (best["dylora", FULL],
                                       dylora["merged" if b == FULL else f"merged at rank {b}"]),
                  "LoRA r 32, truncated by SVD": (best["lora", FULL], svd[seed][b]),
                  "LoRA trained at the rank": (best["lora", b],
                                               metrics["lora", b, best["lora", b], seed]["merged"])}
            rows += [dict(adapter=adapter, rank=b, lr=lr, seed=seed,
                          **{k: round(v, 5) for k, v in values.items()})
                     for adapter, (lr, values) in by.items()]
    where = ROOT / "out/quick" if quick else RESULTS
    write_csv(where / "dylora.csv", rows)
    from experiments import tables
    print(*tables.dylora(where), sep="\n")


if __name__ == "__main__":
    main()
