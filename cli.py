"""What the commands share: flags, devices, and errors as one line with exit code 2."""
import argparse
import os
import re
import shlex
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

# One of several processes that torchrun has started, else the only one
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class Parser(argparse.ArgumentParser):
    """Flags are written in full. With `files` @FILE reads flags from a file, # begins a comment there. Errors are
    ValueErrors."""

    def __init__(self, name, description, files=True):
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, fromfile_prefix_chars="@" if files else None,
                         epilog="@FILE reads flags from a file, one a line." if files else None)

    def convert_arg_line_to_args(self, line):
        return shlex.split(re.sub(r"(^|\s)#.*", "", line))

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, argv=None):
        try:
            return self.parse_intermixed_args(argv)  # flags may stand before, between and behind the rest
        except RecursionError:
            raise ValueError("a file of flags includes itself") from None


def pick_device(name, dtype):
    """(device, dtype, autocast context) of --device and --dtype; of several processes each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose cpu, cuda or mps") from None
    ready = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not ready.get(device.type, False) or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine or this build of torch has none")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, dtype, torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def join(device):
    """Meet the other processes: gradients travel by nccl between GPUs, by gloo between CPUs. The first one writes."""
    if WORLD == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait while the first one evaluates, however long that takes
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def command(name, parse, run, argv=None):
    """run(parse(argv)), with every expected failure as one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show

    def end(message, code=2):
        print(f"{name}: " + " ".join(message.split()), file=sys.stderr)
        raise SystemExit(code) from None
    try:
        return run(parse(argv))
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as e:
        end(str(e))
    except torch.OutOfMemoryError as e:
        end(f"out of memory: a smaller --batch-size may help, in training with --grad-accum ({str(e).splitlines()[0]})")
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as e:
        if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        end(f"--compile does not work on this machine: {' '.join(str(e).split()[:12])}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
