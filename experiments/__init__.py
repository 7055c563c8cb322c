"""What was measured, and the scripts that measure it again. RESULTS.md has the claims, LOG.md every
experiment.

    bench.py              time and memory of a training step, beside transformers + peft
    tables.py             the tables of both, made from the csv files
    plane.py              the plane (lr_A, lr_B) of LoRA on SmolLM2, and the methods on it
    rank_theorem.py       rsLoRA's theorem: sizes after one step, by rank up to 2,048
    rslora.sh             does a larger rank help, with alpha / r and alpha / sqrt(r), AdamW and SGD
    reslora.sh            ResLoRA's training curves; how many earlier layers should join in
    reslora_apart.py      is a shortcut's gain in the forward or in its gradient
    gradients.py          the gradient's norm in each layer
    merges.py             what each merge keeps of ResLoRA, on four datasets
    merges_best.sh        does a merged ResLoRA keep what it gained over LoRA
    calibration.py        how many tokens merging by regression needs
    deltalora.sh          lambda and K, beside LoRA with 3 alpha
    deltalora_published.py  with the paper's K, beside its baselines and those it leaves out
    deltalora_weights.py  rank and spectrum of the update, how far W turns, W in bf16
    methods.sh            all methods at as many trained parameters as LoRA, and what they forget
    dylora_cuts.py        one DyLoRA cut at all ranks, beside truncated and trained LoRA
    e2e_split.py          the E2E split of RESULTS.md, and the official one, from the public files
    smollm2.py            SmolLM2-135M, a real pretrained Llama, as a folder, from a package of PyPI
    real_base.sh          the comparison on SmolLM2 and E2E's official test set, for hours
    real_merges.py        what each merge keeps of ResLoRA on SmolLM2
    lesson.sh             the small grid of lessons/3-comparison.ipynb
    gpu.sh                everything for one GPU, in parts, in one command: not run on one yet
    gpt2_medium_e2e.sh, roberta_base_glue.sh, metamath_gsm8k.sh
                          at published sizes, for a GPU: not measured yet

`python -m experiments.NAME` or `sh experiments/NAME.sh`; most take --quick, a few minutes on two
cores. recipes/ holds the papers' settings as files of flags, results/ what the scripts wrote.
"""
