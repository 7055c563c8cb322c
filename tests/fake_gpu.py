"""A GPU that computes nothing, for machines without one: train.py and generate.py run on it as on a
real one.

    python tests/fake_gpu.py NAME.txt

The file has commands, one a line; NAME.json gets {command: what failed, "" if nothing}.

A tensor on it knows its shape, type and device, and nothing else: it is torch's FakeTensor, on a
device of the kind that torch lets Python define. An operation with one tensor there and one on the
CPU is an error, as on a GPU. What is read back is 1. Inside a training step reading is an error
too: there it would make the CPU wait for a real GPU.
"""
import functools
import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
from data import restaurants  # noqa: E402
from evaluation import evaluate, plots  # noqa: E402
from run import machine  # noqa: E402


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", Backend())
# torch.tensor(…, device="gpu") is made on the CPU and copied
torch._C._set_only_lift_cpu_tensors(True)
torch.set_num_threads(1)
GPU, aten = torch.device("gpu:0"), torch.ops.aten
FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # a copy of a model is on the same device
READS = aten._local_scalar_dense.default, aten.item.default


class FakeGpu(TorchDispatchMode):
    """Inside, tensors can be made on the device "gpu", copied to it and read from it. in_step:
    reading is an error."""
    fake, in_step = FakeTensorMode(), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in READS and isinstance(args[0], FakeTensor):
            return self.read(args[0]).item()
        copies = function.overloadpacket in (aten._to_copy, aten.to)
        if copies and isinstance(args[0], FakeTensor) and str(device) == "cpu":
            return self.read(args[0]).to(kwargs.get("dtype"))
        if (function is aten.copy_.default
                and isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor)):
            to, source = args[:2]
            source = self.faked(source) if isinstance(to, FakeTensor) else self.read(source)
            return function(to, source, *args[2:])
        if function is aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = args[0], [i for index in args[1] for i in self.numbered(index)]
        if device is not None and torch.device(device) == GPU:
            with self.fake:
                return function(*map(self.faked, args), **kwargs)
        return function(*args, **kwargs)

    def numbered(self, index):
        """A mask as the numbers of its True elements, which are all: how many there are is read
        from the GPU."""
        if index is None or index.dtype != torch.bool:
            return [index]
        with self.fake:
            return [torch.zeros(index.numel(), dtype=torch.long, device=GPU) for _ in index.shape]

    def faked(self, value):
        real = torch.is_tensor(value) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value

    def read(self, tensor):
        """A tensor of ones on the CPU."""
        if self.in_step:
            raise RuntimeError("the CPU waits for the GPU inside a training step")
        return torch.ones(tensor.shape, dtype=tensor.dtype)


gpu = FakeGpu()


def tolist(tensor, real=torch.Tensor.tolist):
    return real(gpu.read(tensor) if isinstance(tensor, FakeTensor) else tensor)


def one_step(*args, real=train.one_step):
    gpu.in_step = True
    try:
        return real(*args)
    finally:
        gpu.in_step = False


def pick_device(name, dtype):
    dtype = "float32" if dtype == "auto" else dtype
    return (GPU, dtype, torch.autocast("gpu", torch.bfloat16) if dtype == "bfloat16"
            else nullcontext())


def run(line):
    command, *flags = line.split()
    if command == "train.py":
        train.train(train.parse(flags))
    else:
        generate.generate(generate.parse([*flags, "--max-new", "4"]))


if __name__ == "__main__":
    torch.Tensor.tolist, train.one_step = tolist, one_step
    machine.pick_device = generate.pick_device = pick_device
    torch.Generator = lambda device="cpu", real=torch.Generator: real()
    data.load = functools.cache(lambda *args, load=data.load: {
        split: rows[:12] for split, rows in load(*args).items()})
    evaluate.SCORED, restaurants.MAX_NEW = 3, 5
    plots.draw_curve = plots.draw_ranks = train.print_examples = lambda *_: None
    held = {}
    for line in Path(sys.argv[1]).read_text().splitlines():
        try:
            with gpu:
                run(line)
            held[line] = ""
        except Exception:
            held[line] = traceback.format_exc()
    Path(sys.argv[1]).with_suffix(".json").write_text(json.dumps(held))
