"""The one registry: name -> (class, its own flags). A new method is a file and a line here.

A flag is what argparse takes; a default may also be a function of the number of steps.
"""
from deltalora import DeltaLoRALinear
from lora import LoRALinear
from reslora import MERGES, SHORTCUTS, ResLoRALinear
from rslora import RsLoRALinear

METHODS = {
    "lora": (LoRALinear, {}),
    "rslora": (RsLoRALinear, {}),
    "reslora": (ResLoRALinear, {
        "shortcut": dict(choices=SHORTCUTS, default="input", help="what the earlier layers of a chain pass on (input)"),
        "pre_num": dict(type=int, default=1, help="how many earlier layers join in; -1: all, 0: plain LoRA (1)"),
        "merge": dict(type=lambda names: names.split(","), default=["regression"],
                      help=f"{'|'.join(MERGES)}; more, after commas, are measured beside it (regression)"),
    }),
    "deltalora": (DeltaLoRALinear, {
        "delta_lambda": dict(type=float, default=2.0, help="how far W follows the delta of B A (2)"),
        "delta_start": dict(type=int, default=lambda steps: min(500, steps // 10),
                            help="K, steps before W moves (a tenth of the run, at most 500)"),
    }),
    # Without adapters, the reference lines: every parameter trains, or nothing but the head of a classifier.
    "full": (None, {}),
    "head": (None, {}),
}
