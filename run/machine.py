"""Where a run computes: the device, its arithmetic, the processes, torch.compile."""
import copy
import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

# One of several processes that torchrun has started, or the only one
try:
    RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= RANK < WORLD:
        raise ValueError(f"RANK {RANK} of WORLD_SIZE {WORLD}")
except ValueError as e:
    sys.exit(f"the environment does not come from torchrun: {e}")


def pick_device(name, dtype):
    """(device, dtype, autocast context) of --device and --dtype. Of several processes each has a
    GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose cpu, cuda or mps") from None
    ready = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}.get(device.type, False)
    if ready and device.type == "cuda":
        ready = (device.index or 0) < torch.cuda.device_count()
    if not ready:
        raise ValueError(f"--device {name}: this machine or this build of torch has none")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        try:
            torch.zeros(1, device=device) + 1
        except RuntimeError as e:
            card = torch.cuda.get_device_name(device)
            raise ValueError(f"--device {name}: this build of torch cannot compute on {card}: "
                             f"{e}") from None
    if dtype == "auto":
        dtype = "float32"
        if device.type == "cuda":
            dtype = fastest(torch.cuda.get_device_capability(device))
    half = dtype != "float32"
    amp = torch.autocast(device.type, getattr(torch, dtype)) if half else nullcontext()
    return device, dtype, amp


def fastest(capability):
    """The fast arithmetic of a GPU: bf16 from Ampere on, capability 8. A V100 and a T4, 7, are fast
    in fp16 alone."""
    return {7: "float16"}.get(capability[0], "bfloat16" if capability[0] > 7 else "float32")


def join(device):
    """Meet the other processes: gradients travel by nccl between GPUs, by gloo between CPUs. Only
    the first process prints and writes."""
    if WORLD == 1 or dist.is_initialized():
        return
    # the others wait while the first one evaluates, however long that takes
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def parallel(model, seed):
    """The model as a training step calls it. DDP averages gradients over the processes, and only
    gradients. Updates outside the optimizer, as of Delta-LoRA's W, are deterministic, so all
    processes agree on them. Each process has random numbers of its own, for dropout."""
    if RANK:
        torch.manual_seed(hash((seed[0], RANK, seed[1])))
    if WORLD == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)


def compiled(model):
    """A model that shares every weight with `model`, with blocks that are compiled where they are
    first called.

    Blocks are alike, so two or three compilations serve all of them and batches of any length. The
    exception is ResLoRA with pre_num -1, where every block differs. `model` itself stays as it is:
    evaluation has other shapes, and calibration needs hooks, which compiled code does not call."""
    # torch's 8 are too few for pre_num -1, and for the methods of a bench
    torch._dynamo.config.recompile_limit = 256
    shared = {id(p): p for p in model.parameters()}
    blocks = {id(block): torch.compile(block, dynamic=True) for block in model.h}
    return copy.deepcopy(model, {**shared, **blocks})


def accumulating(forward, more):
    """The context of one forward and backward. While `more` of them follow in this step, processes
    keep their gradients to themselves: they exchange them once, after the last."""
    return forward.no_sync() if WORLD > 1 and more else nullcontext()


def mean_over_processes(values):
    """A tensor, averaged over the processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD
