"""The one registry. A new method is one file, with a class like LoRALinear, and one line here."""
import math
from typing import NamedTuple

import torch.nn as nn

import lora
from baselines.adalora import AdaLoRALinear
from baselines.dylora import DyLoRALinear
from baselines.loha import LoHaLinear
from baselines.lokr import LoKrLinear
from deltalora import DeltaLoRALinear
from lora import LoRALinear
from reslora import MERGES, SHORTCUTS, ResLoRALinear
from rslora import RsLoRALinear, rank_stabilised


class Method(NamedTuple):
    """What train.py has to know of a method."""
    adapter: type | None  # a class like LoRALinear; None: the method has no adapter
    # {name: arguments for argparse} of its own flags; a default may be a function of (steps,
    # warmup)
    flags: dict = {}
    # the flags that only merging reads, which a resumed run may change
    merge_only_flags: tuple = ()
    trains_base: bool = False  # True where all parameters train
    # True where a run cannot be made longer: AdaLoRA plans its ranks for it
    fixed_length: bool = False


class NoAdapter(LoRALinear):
    """Stands for "no adapter" in the training loop: `full` and `head` have no layers, and all hooks
    do nothing."""


def ranks(text):
    """"8,4" -> [8, 4]"""
    return [int(b) for b in text.split(",")]


METHODS = {
    "lora": Method(LoRALinear),
    "rslora": Method(RsLoRALinear),
    "reslora": Method(ResLoRALinear, {
        "shortcut": dict(choices=SHORTCUTS, default="input",
                         help="what earlier layers of a chain pass on (input)"),
        "pre_num": dict(type=int, default=1,
                        help="m, the number of earlier layers; -1: all, 0: plain LoRA (1)"),
        "merge": dict(type=lambda names: names.split(","), default=["regression"],
                      help=f"{'|'.join(MERGES)}; after commas, more merges to measure beside the "
                           "first (regression)"),
    }, merge_only_flags=("merge",)),
    "deltalora": Method(DeltaLoRALinear, {
        "delta_lambda": dict(type=float, default=2.0,
                             help="how far W follows the delta of B A (2)"),
        # the paper: lambda 2 and K 500 on E2E and WebNLG, lambda .5 and the task's warm-up on GLUE,
        # .5 and 1000 on XSum
        "delta_start": dict(type=int, default=lambda steps, warmup: max(1, math.floor(warmup)),
                            help="K, steps before W moves (those of the warm-up, at least 1; 0: "
                                 "from the first step)"),
    }),
    # What the papers compare with
    "adalora": Method(AdaLoRALinear, {
        "init_rank": dict(type=int, help="r_0, ranks per layer at the start; --rank of them remain "
                                         "on average (1.5 r)"),
        "orth": dict(type=float, default=0.1,
                     help="gamma, weight of the orthogonality of A and B in the loss (.1)"),
        "budget_warmup": dict(type=int, default=lambda steps, warmup: steps // 10,
                              help="t_i, steps before the first ranks are taken away (a tenth of "
                                   "the run)"),
        "budget_final": dict(type=int, default=lambda steps, warmup: steps * 4 // 10,
                             help="t_f, steps at the end in which the ranks stay as they are (four "
                                  "tenths)"),
        "budget_every": dict(type=int, default=lambda steps, warmup: max(1, steps // 100),
                             help="steps between two allocations of ranks (a hundredth of the "
                                  "run)"),
    }, fixed_length=True),
    "dylora": Method(DyLoRALinear, {
        "frozen": dict(action="store_true", default=False,
                       help="train only the last of the drawn ranks"),
        "cut": dict(type=ranks, help="the rank to merge and export at; after commas, more ranks to "
                                     "measure beside it (--rank, and the powers of two)"),
    }, merge_only_flags=("cut",)),
    "loha": Method(LoHaLinear),
    "lokr": Method(LoKrLinear),
    # Without adapters, the reference lines: every parameter trains, or nothing but the head of a
    # classifier.
    "full": Method(None, trains_base=True),
    "head": Method(None),
}


def adapt(model, settings):
    """Put the adapters of a run into a model, or unfreeze what the method trains instead: (class,
    layers).

    settings: a dict with method, rank, alpha, dropout, targets, rs and the method's own flags, as
    in result.json. A classifier's head is trained with every method. ValueError for a target that
    lies in the head.
    """
    method, layers = METHODS[settings["method"]], []
    adapter = method.adapter or NoAdapter
    if method.adapter:
        adapter = rank_stabilised(adapter) if settings["rs"] else adapter
        targets = settings["targets"].split(",")
        for name, m in model.named_modules():
            outside = not name.startswith("h.")  # what stands outside the blocks is the head
            if outside and isinstance(m, nn.Linear) and any(lora.matches(name, target)
                                                            for target in targets):
                raise ValueError(f"--targets {settings['targets']}: {name} belongs to the head, "
                                 "which is no place for an adapter")
        flags = {name: settings[name] for name in method.flags}
        layers = lora.apply(model, adapter, targets, r=settings["rank"], alpha=settings["alpha"],
                            dropout=settings["dropout"], **flags)
    elif not method.trains_base:
        model.requires_grad_(False)
    if model.classifier:
        model.classifier.requires_grad_(True)
    return adapter, layers
