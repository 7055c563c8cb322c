"""Does a merged ResLoRA beat LoRA, and does it help to merge before the end of training?

    python -m experiments.merge_at [--e2e FOLDER] [--quick]

Writes merge-at-<dataset>.csv and .png. Five seeds at each row's best rate, on restaurants, reviews and, with --e2e, on
real E2E text. One row is merged by regression after nine tenths of the steps. Its last tenth trains the plain LoRA, A*
and B, that the layers have become (Adam's moments of A go on as those of A*), so what is deployed was also trained.
LoRA with 3 alpha stands beside them, because a larger alpha makes the branch larger, as a shortcut probably does.

Merging on the way brought nothing, so it is not a feature of reslora.py but the subclass below.
"""
import argparse

import torch

from experiments.compare import RESULTS, compare, parse
from methods import METHODS, Method
from reslora import ResLoRALinear

NAME = "reslora-merged-at"
RATES = {"restaurants": "1.2e-2 2.4e-2 4.8e-2 9.6e-2", "reviews": "1.5e-3 3e-3 6e-3",
         "e2e": "1.2e-2 2.4e-2 4.8e-2 9.6e-2"}
EVERY = {"reviews": "100"}  # steps between validations, else 30
ALL = "--merge regression,input,weight,none"
ROWS = {"LoRA": "--method lora", "LoRA, 3 alpha": "--method lora --alpha 48",
        "input, merged at the end": f"--method reslora {ALL}", "input, merged at .9": f"--method {NAME} --share 0.9",
        "block": "--method reslora --shortcut block",
        "middle, merged at the end": f"--method reslora --shortcut middle {ALL}"}
ALSO = "block", "middle, merged at the end"  # rows that --quick leaves out


class MergedOnTheWay(ResLoRALinear):
    """ResLoRALinear whose layers become plain LoRA after `share` of the steps."""

    batches = None  # the calibration batches of this process's run, see `register`

    def __init__(self, linear, r, alpha, dropout=0.0, share=0.9, **own):
        super().__init__(linear, r, alpha, dropout, **own)
        if not 0 < share < 1:
            raise ValueError(f"share {share} is not a share of the steps, above 0 and below 1")
        self.share, self.merge_step = share, None

    @staticmethod
    def begin(layers, steps, done=0):
        """The step after which the layers are LoRA: weights from before it may not be kept. A resumed run that is
        behind it begins as LoRA."""
        at = max(1, round(layers[0].share * steps))
        for layer in layers:
            layer.merge_step = at
            if done >= at:
                layer.drop_shortcut()
        return at

    @staticmethod
    @torch.no_grad()
    def after_step(layers, step):
        """After the step of merging, A* takes the place of A and the shortcut goes."""
        ResLoRALinear.after_step(layers, step)
        if step == layers[0].merge_step:
            ResLoRALinear.calibrate(layers, MergedOnTheWay.batches, "regression")
            for layer in layers:
                if layer.shortcut != "block":
                    # A_n <- A*_n
                    layer.lora_A.copy_(layer.as_lora()[0])
                layer.drop_shortcut()

    def drop_shortcut(self):
        self.earlier, self.sends, self.pre_num = [], 0, 0


def register():
    """Make the subclass a method of this process, and give it the calibration batches of the process's run."""
    import train

    class Run(train.Run):
        def __init__(self, args):
            super().__init__(args)
            MergedOnTheWay.batches = staticmethod(lambda: self.calibration_batches(self.model))
    METHODS[NAME] = Method(MergedOnTheWay, {"share": dict(type=float, default=0.9, help="of the steps before merging")})
    train.Run = Run


def grid(dataset, quick, folder):
    """The rows of one dataset."""
    rows = [word for label, flags in ROWS.items() for word in ("--also" if label in ALSO else "--row",
                                                              f"{label}: {flags}")]
    flags = ["--dataset", dataset, "--rank", "16", "--eval-every", EVERY.get(dataset, "30")]
    return compare(parse([str(RESULTS / f"merge-at-{dataset}"), *rows, "--lr", *RATES[dataset].split(), "--seeds", "5",
                          "--best-lr", "--title", f"{dataset}: what is deployed, test loss after merging",
                          *["--quick"] * quick, "--", *flags, *(["--data-dir", folder] if folder else [])]), register)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", help="folder of the real E2E data (python -m experiments.e2e_split)")
    parser.add_argument("--quick", action="store_true", help="one seed of the main rows of restaurants, into out/quick")
    args = parser.parse_args()
    register()
    for dataset in ["restaurants"] if args.quick else RATES:
        if dataset != "e2e" or args.e2e:
            grid(dataset, args.quick, args.e2e if dataset == "e2e" else None)


if __name__ == "__main__":
    main()
