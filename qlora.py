"""QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al. 2023, arXiv:2305.14314.

    h = W x + b + s B A drop(x),    W = dequantise(code, c_2, c_1, mean),    s = alpha / r

    x (..., d_in), h (..., d_out), W (d_out, d_in); b, A and B as in LoRA

The pretrained W, frozen, is most of the memory that fine-tuning takes. Here every number of it is
one of 16 values, times the largest absolute value of its block of 64 neighbours. i counts the
numbers of W row by row, j the blocks of 64:

    W_i = NF4[code_i] absmax_j                  j = i // 64        4 bits a weight
    absmax_j = D[c_2,j] c_1,k + mean            k = j // 256       and 8 / 64 + 32 / (64 * 256) more

(eq. 5 and 6 of the paper, where A, B and the products are in bf16.) So 4.13 bits a weight hold what
took 16. W is not trained and needs no gradient: A and B are trained in fp32, as in LoRA. A layer
rebuilds W where it needs it, once in the forward and once more in the backward, and forgets it each
time.

NF4. Weights of a trained network are roughly normal. The paper wants 16 values that each stand for
equally many weights: quantiles of the normal distribution, scaled to [-1, 1]. Its eq. 4 takes the
mean of neighbouring quantiles; the authors' code, and the table of the paper's appendix, take
quantiles at even steps, as `normal_float` does. Zero must be one of the values, since padding and
pruned weights are exactly zero. So 8 values are positive, 7 are negative, and each side has steps
of its own.

Double quantisation. An absmax in fp32 for each 64 weights would take half a bit a weight. None of
them is negative and they are alike, so their mean is taken off, and the rest is quantised to 8
bits, in blocks of 256 with a largest value c_1 of their own. The paper says that the 8 bits are an
FP8. The authors' library, bitsandbytes, has a code D whose steps are smallest near zero (Dettmers
et al. 2022, arXiv:2110.02861). The bytes here are those of bitsandbytes on a CPU.

`quantise` changes nothing but `weight`: what stands there is a module of the class NF4 and no
tensor. torch asks any argument of F.linear(x, self.weight, self.bias) for a __torch_function__, and
NF4 has one. So every method that leaves W unchanged works on 4 bits as it is. Delta-LoRA moves W,
and refuses.

Merging. The adapter was trained beside the rounded W. `lora.merge` adds it to that, which is exact
up to one rounding to W's dtype, and the result is an ordinary weight again. Adding it to the W
before rounding, as many do, gives another model. So does quantising the sum to 4 bits again, where
what is small against the grid is lost. `train.py --base-bits 4` measures all three.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK, BLOCK_2 = 64, 256  # weights that share an absmax, absmaxes that share a c_1

# What `normal_float` computes, rounded as bitsandbytes has it: the same bytes mean the same weights
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)


def normal_float():
    """The 16 values (fp64): quantiles Q(p) of N(0, 1), divided by the largest.

    p runs in equal steps from 1/2 to 1 - delta: 8 steps for the positive values and 7 for the
    negative ones. At p = 1 the quantile would be infinite. delta is bitsandbytes' constant, the
    mean of 1 / 32 and 1 / 30."""
    delta = (1 / 32 + 1 / 30) / 2
    positive, negative = (torch.special.ndtri(torch.linspace(0.5, 1 - delta, steps + 1,
                                                             dtype=torch.float64))
                          for steps in (8, 7))
    return torch.cat([-negative.flip(0), positive[1:]]) / positive[-1]


def dynamic_map():
    """D (256,): 0, 1, and +-10^(i-6) times the centres of 2^i equal parts of [.1, 1], for
    i = 0 .. 6: seven powers of ten, the larger ones in more parts."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [centres, -centres]
    return torch.cat(values).sort().values


# NF4's values in pairs (256, 2), one for each byte = 16 * first + second; and D (256,)
PAIRS = torch.cartesian_prod(torch.tensor(NF4_VALUES), torch.tensor(NF4_VALUES))
D = dynamic_map()


def nearest(x, values):
    """For each x the index of the nearest of the sorted `values`."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


def blocks(x, size):
    """x in blocks (n, size), the last one filled up with zeros."""
    missing = -x.numel() % size
    return (F.pad(x.flatten(), (0, missing)) if missing else x).view(-1, size)


class NF4(nn.Module):
    """A matrix W (d_out, d_in) in 4 bits, in the place of the tensor `weight` of a linear.

    shape, dtype: of W. code: uint8, two numbers a byte. c_2: uint8, one for each block of 64.
    c_1: fp32, one for each 64 * 256. mean (1,): fp32. All four are flat, and parameters without
    gradient: they move with the model, and a run saves only what trains. ValueError for other
    sizes."""

    def __init__(self, shape, dtype, code, c_2, c_1, mean):
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype
        check_sizes(self.numel(), code, c_2, c_1, mean)
        for name, t in dict(code=code, c_2=c_2, c_1=c_1, mean=mean).items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))
        self.register_buffer("PAIRS", PAIRS.to(code.device), persistent=False)
        self.register_buffer("D", D.to(code.device), persistent=False)

    def dequantise(self, dtype=None):
        """W (d_out, d_in), in its own dtype or another one; computed in fp32."""
        # absmax_j = D[c_2,j] c_1 + mean
        absmax = blocks(self.D[self.c_2.int()], BLOCK_2) * self.c_1[:, None] + self.mean
        absmax = absmax.flatten()[:len(self.c_2), None]
        # W_i = NF4[code_i] absmax
        W = blocks(F.embedding(self.code.int(), self.PAIRS), BLOCK).mul_(absmax)
        return W.flatten()[:self.numel()].view(self.shape).to(dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """torch calls this where it meets an NF4 and expects a tensor."""
        kwargs = kwargs or {}
        if function is F.linear:
            return linear(*args, **kwargs)
        def dense(value):
            return value.dequantise() if isinstance(value, NF4) else value
        return function(*map(dense, args), **{name: dense(v) for name, v in kwargs.items()})

    @property
    def device(self):
        return self.code.device

    def numel(self):
        return self.shape.numel()

    def _apply(self, fn, recurse=True):
        """What .to(…) calls. All four parts follow to another device. In a change of dtype they
        stay, and W is dequantised to that type from then on."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        for name, p in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(p.to(like.device), requires_grad=False))
        self.PAIRS, self.D = self.PAIRS.to(like.device), self.D.to(like.device)
        self.dtype = like.dtype
        return self

    def extra_repr(self):
        return f"{tuple(self.shape)} in 4 bits"


def to_nf4(W):
    """A matrix W of real numbers, taken in fp32 -> NF4. ValueError for NaN and inf."""
    check(W)
    W_blocks = blocks(W.detach().float(), BLOCK)
    absmax = W_blocks.abs().amax(1)
    x = W_blocks * (1 / absmax.clamp(min=1e-38))[:, None]  # in [-1, 1]
    if W.numel() % BLOCK:  # as bitsandbytes does in a block that is not full
        absmax[-1].clamp_(min=1e-38)
        x[-1] = W_blocks[-1] / absmax[-1]
    # code_i = the nearest of the 16 values; two of them a byte, the first in the upper half
    values = torch.tensor(NF4_VALUES, device=W.device)
    code = nearest(x, values).flatten()
    code = code[:W.numel() + W.numel() % 2]
    code = code[0::2] << 4 | code[1::2]
    # c_2,j = the nearest of D to (absmax_j - mean) / c_1
    mean = absmax.mean()
    x = blocks(absmax - mean, BLOCK_2)
    c_1 = x.abs().amax(1)
    x = x * (1 / c_1.clamp(min=1e-38))[:, None]
    # bitsandbytes rounds to one of 65,536 steps first, on a CPU
    x = (((x + 1) * 0.5 * 65535 + 0.5).floor() * 2) / 65535 - 1
    c_2 = nearest(x, D.to(W.device)) * (c_1 > 0)[:, None]
    return NF4(W.shape, W.dtype, code, c_2.flatten()[:len(absmax)], c_1, mean[None])


class Linear(torch.autograd.Function):
    """h = W x + b for an NF4. Autograd would keep the dequantised W of every layer until the
    backward, and so the memory of the whole model. This function keeps none of them, and
    dequantises once more in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.weight, ctx.x_dtype = weight, x.dtype
        return F.linear(x, weight.dequantise(dtype), bias)

    @staticmethod
    def backward(ctx, grad_h):
        # dL/dx = W^T dL/dh;  dL/db is the sum of dL/dh over all but the channels
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_h @ ctx.weight.dequantise(grad_h.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_b = grad_h.reshape(-1, grad_h.size(-1)).sum(0)
        return grad_x, None, grad_b, None


def linear(input, weight, bias=None):
    """F.linear with an NF4: W is computed in the type of the product, autocast's or x's."""
    kind = input.device.type
    amp = torch.is_autocast_enabled(kind)
    return Linear.apply(input, weight, bias, torch.get_autocast_dtype(kind) if amp else input.dtype)


def quantise(module):
    """Turn the nn.Linear `module`, or all of those in it, to 4 bits, in place; return it.

    A linear that shares its weight with another module, as a tied output does, stays as it is. Give
    the blocks of a model and not the whole, so that its head stays too: quantise(model.h).
    ValueError where there are adapters already: they go into a model in 4 bits, by lora.apply."""
    if any(hasattr(m, "as_lora") for m in module.modules()):
        raise ValueError("there are adapters already: quantise first, then lora.apply")
    uses = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    for m in module.modules():
        if type(m) is nn.Linear and isinstance(m.weight, nn.Parameter):
            if uses.count(id(m.weight)) == 1:
                put(m, to_nf4(m.weight))
    return module


def put(linear, W):
    """Give a linear an NF4 as its weight."""
    del linear.weight  # torch refuses a module in the place of a parameter
    linear.weight = W


def dequantise(module, dtype=None):
    """The reverse: every weight in 4 bits becomes an ordinary frozen one again, rounded as it is;
    returns `module`."""
    for m in module.modules():
        if isinstance(getattr(m, "weight", None), NF4):
            m.weight = nn.Parameter(m.weight.dequantise(dtype), requires_grad=False)
    return module


def total(module):
    """How many numbers a module has, in however many bits."""
    packed = [m for m in module.modules() if isinstance(m, NF4)]
    inside = sum(p.numel() for m in packed for p in m.parameters())
    return sum(p.numel() for p in module.parameters()) - inside + sum(m.numel() for m in packed)


def check(W):
    """ValueError for a W that has no 4-bit form."""
    if not W.is_floating_point():
        raise ValueError(f"a weight of {W.dtype} cannot be turned to 4 bits: it is no real number")
    if not W.isfinite().all():
        raise ValueError("a weight with NaN or inf cannot be turned to 4 bits")


def check_sizes(n, code, c_2, c_1, mean):
    """ValueError for parts of a 4-bit matrix of n numbers that are not of its size."""
    blocks_1 = -(-n // BLOCK)
    wanted = -(-n // 2), blocks_1, -(-blocks_1 // BLOCK_2), 1
    sizes = tuple(t.numel() for t in (code, c_2, c_1, mean))
    if sizes != wanted:
        raise ValueError(f"{n} weights in 4 bits have parts of {wanted} numbers, not {sizes}")


if __name__ == "__main__":
    import lora
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    x, exact = torch.randn(32, 256), [m.weight.detach() for m in (model[0], model[2])]
    quantise(model)
    for m, W in zip((model[0], model[2]), exact, strict=True):
        size = sum(p.numel() * p.element_size() for p in m.weight.parameters())
        error = (m.weight.dequantise() - W).norm() / W.norm()
        print(f"{tuple(W.shape)}: {size / W.numel():.3f} bytes a weight, 2 in bf16; "
              f"|W_4 - W| / |W| = {error:.3f}")
    layers = lora.apply(model, lora.LoRALinear, ["0", "2"], r=4, alpha=8)
    model(x).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    print("trained:", ", ".join(trained))
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    out = model(x)
    error = (lora.merge(model)(x) - out).abs().max()
    print(f"merged into the dequantised W: differs by {error:.0e}")
