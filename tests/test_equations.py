"""The forward of every method is the line of its paper, written here by hand on a chain of
layers."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
from conftest import adapt, every_variant, tiny_gpt, tokens

import lora
from deltalora import DeltaLoRALinear
from experiments import deltalora_published, reslora_apart
from lora import LoRALinear
from reslora import ResLoRALinear
from rslora import RsLoRALinear

N, D, R, ALPHA = 5, 6, 2, 3.0


class Chain(nn.Module):
    """x_{n+1} = tanh(h_n), cut or filled up with zeros to d_in numbers: the simplest network in
    which x_n differs from layer to layer."""

    def __init__(self, length=N, d_in=D, d_out=D):
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(d_in, d_out)}) for _ in range(length))
        self.double()

    def forward(self, x):
        for block in self.h:
            h = block["q"](x)
            x = after(h, x)
        return torch.tanh(h)


def after(h, x):
    """x_{n+1} (…, d_in) from h_n (…, d_out)."""
    return torch.tanh(h) @ torch.eye(h.shape[-1], x.shape[-1], dtype=h.dtype)


def by_hand(layers, x, shortcut=None, m=0, s=ALPHA / R):
    """[h_0, …, h_N] with the papers' equations as they stand: column vectors, one sum per line."""
    W, b, A, B = zip(*[(q.weight, q.bias, q.lora_A, q.lora_B) for q in layers], strict=True)
    xs, hs = [], []
    for n in range(len(layers)):
        xs.append(x)
        before = range(1, min(n if m == -1 else m, n) + 1)
        h = x @ W[n].T + b[n]
        if shortcut == "input" and n == 0 and m != 0:
            h = h + s * (x + x) @ A[n].T @ B[n].T  # x_{-1} = x_0
        elif shortcut == "input":
            h = h + s * (x + sum(xs[n - k] for k in before)) @ A[n].T @ B[n].T
        elif shortcut == "block":
            h = h + s * sum(x @ (B[n - k] @ A[n - k]).T for k in (0, *before))
        elif shortcut == "middle":
            h = h + s * sum(xs[n - k] @ A[n - k].T for k in (0, *before)) @ B[n].T
        else:
            h = h + s * x @ (B[n] @ A[n]).T
        hs.append(h)
        x = after(h, x)
    return hs


SHAPES = {"square": (D, D), "wide": (D + 2, D), "tall": (D, D + 2)}  # (d_in, d_out)


def chain(adapter, length=N, shape="square", **hparams):
    model = Chain(length, *SHAPES[shape])
    layers = lora.apply(model, adapter, ["q"], r=R, alpha=ALPHA, **hparams)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return model, layers, torch.randn(4, SHAPES[shape][0], dtype=torch.float64)


def equal(a, b, tolerance=1e-12):
    return (a - b).abs().max() <= tolerance


@pytest.mark.filterwarnings("ignore:ResLoRA. h.0.q is a single layer")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_reslora_forward_and_gradients_are_the_papers(shortcut, m, shape):
    """For chains of one to five layers h of the last layer, the loss, and the gradient of every A,
    B and of the input equal those of the equation by hand."""
    for length in range(1, N + 1):
        model, layers, x = chain(ResLoRALinear, length, shape, shortcut=shortcut, pre_num=m)
        x.requires_grad_()
        leaves = [x, *(p for layer in layers for p in (layer.lora_A, layer.lora_B))]
        ours, hand = model(x), torch.tanh(by_hand(layers, x, shortcut, m)[-1])
        assert equal(ours, hand) and equal(ours.square().sum(), hand.square().sum())
        for a, b in zip(*[torch.autograd.grad(y.square().sum(), leaves) for y in (ours, hand)],
                        strict=True):
            assert b.abs().max() > 1e-6 and equal(a, b)


def test_the_first_layer_of_the_input_shortcut_doubles_its_input():
    """h_0 = W_0 x_0 + b + s B_0 A_0 drop(x_0 + x_0), in training with dropout too; pre_num 0 is
    plain LoRA, and so is the first layer of `block` and of `middle`. The branch is 2 s B A, so is
    what is merged and exported."""
    x = torch.randn(7, 30, dtype=torch.float64)
    for shortcut, m, times in (("input", 1, 2), ("input", 2, 2), ("input", -1, 2), ("input", 0, 1),
                               ("block", 1, 1), ("middle", 1, 1)):
        layers = [ResLoRALinear(nn.Linear(30, 20).double(), 3, 6, dropout=0.5, shortcut=shortcut,
                                pre_num=m) for _ in range(2)]
        ResLoRALinear.connect({"q": layers})
        first = layers[0]
        nn.init.normal_(first.lora_B)
        torch.manual_seed(5)
        h = first(x)
        torch.manual_seed(5)
        dropped = torch.nn.functional.dropout(times * x, 0.5)
        W = first.weight
        assert equal(h, x @ W.T + first.bias + 2 * dropped @ first.lora_A.T @ first.lora_B.T)
        A, B = first.as_lora()
        assert first.exact_merge and equal(A, times * first.lora_A) and equal(B, first.lora_B)
        assert equal(first.eval()(x), x @ lora.merged(first).T + first.bias)


@pytest.mark.parametrize("m", [1, 2, -1])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_a_shortcut_matters(shortcut, m):
    """With the same factors, ResLoRA is not LoRA, and more earlier layers are not one."""
    _, layers, x = chain(ResLoRALinear, shortcut=shortcut, pre_num=m)
    out = by_hand(layers, x, shortcut, m)[-1]
    assert not equal(out, by_hand(layers, x)[-1], 1e-3)
    assert m == 1 or not equal(out, by_hand(layers, x, shortcut, 1)[-1], 1e-3)


@pytest.mark.parametrize("adapter, s",
                         [(LoRALinear, ALPHA / R), (RsLoRALinear, ALPHA / math.sqrt(R)),
                          (DeltaLoRALinear, ALPHA / R)])
def test_lora_forward_is_the_papers(adapter, s):
    """h = W x + b + s B A x, rsLoRA with the square root."""
    model, layers, x = chain(adapter)
    assert equal(model(x), torch.tanh(by_hand(layers, x, s=s)[-1]))


def test_rslora_is_lora_with_alpha_times_sqrt_r():
    """rsLoRA(alpha) = LoRA(alpha sqrt r), and so is any method with --rs, LoRA with it rsLoRA."""
    for r in (1, 4, 6):
        torch.manual_seed(1)
        a = RsLoRALinear(nn.Linear(6, 6), r, alpha=16)
        torch.manual_seed(1)
        b = LoRALinear(nn.Linear(6, 6), r, alpha=16 * math.sqrt(r))
        nn.init.ones_(a.lora_B)
        nn.init.ones_(b.lora_B)
        x = torch.randn(5, 6)
        torch.testing.assert_close(a(x), b(x))
    assert RsLoRALinear.forward is LoRALinear.forward  # so it costs what LoRA costs


def test_scales():
    """alpha 16: alpha / sqrt r is 8 at r 4, and alpha / r is 4."""
    assert [RsLoRALinear.scale(r, 16) for r in (4, 16, 64)] == [8, 4, 2]
    assert [LoRALinear.scale(r, 16) for r in (4, 16, 64)] == [4, 1, 0.25]


def test_a_fresh_A_is_uniform_within_one_over_sqrt_d_in():
    """A ~ U(-1, 1) / sqrt(d_in), whatever the rank; B = 0."""
    layer = LoRALinear(nn.Linear(400, 300), 64, 16)
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert (layer.lora_B == 0).all()


@every_variant
def test_a_fresh_adapter_is_the_base(method, hparams):
    """At B = 0 the logits are the pretrained model's, exactly; of a method that is not ours, which
    may write W anew as DoRA does, up to rounding."""
    model, idx = tiny_gpt(), tokens()[0]
    base = model(idx)[0]
    adapt(model, method, hparams, random=False)
    if method in ("lora", "rslora", "reslora", "deltalora", "adalora", "dylora", "loha", "lokr"):
        assert torch.equal(model(idx)[0], base)
    else:
        torch.testing.assert_close(model(idx)[0], base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_the_chains_of_a_gpt_are_its_q_and_its_v(shortcut, m):
    """Inside a GPT each adapted layer's output is the equation applied to the inputs that its own
    chain saw."""
    model = tiny_gpt()
    layers = adapt(model, "reslora", dict(shortcut=shortcut, pre_num=m))
    seen = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, out: seen.update({layer: (args[0], out)}))
    model(tokens()[0])
    for target in "qv":
        chain = [getattr(block.attn, target) for block in model.h]
        xs = [seen[q][0] for q in chain]
        for n, q in enumerate(chain):
            window = range(min(m, n) + 1)
            if shortcut == "input":
                branch = sum(xs[n - k] for k in (window if n else (0, 0))) @ q.lora_A.T @ q.lora_B.T
            elif shortcut == "block":
                branch = sum(xs[n] @ (chain[n - k].lora_B @ chain[n - k].lora_A).T for k in window)
            else:
                branch = sum(xs[n - k] @ chain[n - k].lora_A.T for k in window) @ q.lora_B.T
            assert equal(seen[q][1], xs[n] @ q.weight.T + q.bias + q.scaling * branch)


def test_dropout_falls_on_the_input_of_A_only():
    """In training the frozen W x + b is untouched; in evaluation nothing is dropped; 0 makes no
    module."""
    layer = LoRALinear(nn.Linear(50, 4), 2, 2, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 50)
    torch.manual_seed(3)
    h = layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    hand = (x @ layer.weight.T + layer.bias + layer.scaling * dropped @ layer.lora_A.T
            @ layer.lora_B.T)
    torch.testing.assert_close(h, hand)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta()).T + layer.bias)
    assert isinstance(LoRALinear(nn.Linear(4, 4), 2, 2).drop, nn.Identity)


@pytest.mark.parametrize("m", [1, 2])
def test_the_block_shortcut_drops_the_input_of_A(m):
    """In training with p 0.5: h_n is the docstring's formula by hand, with the mask of the same
    seed."""
    layers = [ResLoRALinear(nn.Linear(30, 30), 3, 6, dropout=0.5, shortcut="block", pre_num=m)
              for _ in range(3)]
    ResLoRALinear.connect({"q": layers})
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 30)
    torch.manual_seed(5)
    h = layers[2](x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    hand = x @ layers[2].weight.T + layers[2].bias
    for k in range(m + 1):
        hand = hand + layers[2].scaling * dropped @ layers[2 - k].lora_A.T @ layers[2 - k].lora_B.T
    torch.testing.assert_close(h, hand)


def test_input_shortcut_hands_over_the_raw_input():
    """x_{n-1} is stored before dropout: at p = 0.5 a surviving entry of the sum is 2 (x_n +
    x_{n-1})."""
    torch.manual_seed(0)
    layers = [ResLoRALinear(nn.Linear(40, 40), 40, 40, dropout=0.5) for _ in range(2)]
    ResLoRALinear.connect({"q": layers})
    with torch.no_grad():
        layers[1].weight.zero_(), layers[1].bias.zero_()
        layers[1].lora_A.copy_(torch.eye(40)), layers[1].lora_B.copy_(torch.eye(40))
    x0, x1 = torch.randn(7, 40), torch.randn(7, 40)
    layers[0](x0)
    out = layers[1](x1)
    kept = out != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(out[kept], 2 * (x0 + x1)[kept])


# What travels between the layers

@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_layer_called_out_of_order_fails_loudly(shortcut):
    """Without its predecessor's activation a layer raises; the next whole forward works."""
    model, layers, x = chain(ResLoRALinear, shortcut=shortcut)
    with pytest.raises(RuntimeError, match="chain order"):
        layers[2](x)
    out = model(x)
    with pytest.raises(RuntimeError, match="chain order"):
        layers[1](x)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_no_activation_outlives_a_forward_and_nothing_enters_the_state_dict(shortcut):
    """After a forward all links are empty; state dict and modules hold the adapters and no more. So
    it is after a forward that failed at any layer and a whole one behind it."""
    model, layers, x = chain(ResLoRALinear, shortcut=shortcut, pre_num=-1)
    out = model(x)
    assert not any(layer.inbox or layer.outbox for layer in layers)
    assert {k.rpartition(".")[2] for k in model.state_dict()} == {"weight", "bias", "lora_A",
                                                                  "lora_B"}
    assert sum(isinstance(m, ResLoRALinear) for m in model.modules()) == N
    for failing in range(1, N):
        with pytest.raises(RuntimeError):
            [layer(x) for layer in layers[:failing]], layers[failing](x[..., :2])
        assert torch.equal(model(x), out)
        assert not any(layer.inbox or layer.outbox for layer in layers)


@every_variant
def test_copies_and_pickles_are_models_of_their_own(method, hparams):
    """A deep copy and a pickled copy give the same logits and share nothing with the original."""
    model, (idx, _) = tiny_gpt(), tokens()
    adapt(model, method, hparams)
    out = model(idx)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(idx)[0], out)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(model(idx)[0], out)


def test_chains_need_one_shape():
    """A pattern whose one chain would have unequal linears is refused, with both shapes."""
    model = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}),
                           nn.ModuleDict({"q": nn.Linear(4, 6)})])
    model = nn.ModuleList([model])
    with pytest.raises(ValueError, match=r"\*\.\*\.q.*\(6, 4\).*\(4, 4\)"):
        lora.apply(model, ResLoRALinear, ["*.*.q"], r=2, alpha=2)
    assert all(isinstance(m["q"], nn.Linear) for m in model[0])


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_a_shortcut_taken_apart_is_the_forward_and_the_gradient_of_the_whole(shortcut):
    """experiments/reslora_apart.py: the forward alone has the whole one's values, the gradient
    alone LoRA's. An early factor's gradient, which takes the shortcut's way or does not, is another
    one; that of the last B, which only sees the values, is not."""
    found = {}
    for part in ("whole", "forward", "gradient", "lora"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3))).double()
        kind = {"whole": ResLoRALinear, "lora": lora.LoRALinear}.get(part, reslora_apart.Apart)
        of_part = {} if part == "lora" else {"shortcut": shortcut}
        if kind is reslora_apart.Apart:
            of_part["part"] = part
        layers = lora.apply(model, kind, ["q"], r=2, alpha=2, **of_part)
        for layer in layers:
            nn.init.normal_(layer.lora_B)
        x = torch.ones(1, 4, dtype=torch.float64)
        for block in model:
            x = x + torch.tanh(block["q"](x))
        x.square().sum().backward()
        found[part] = x.detach(), layers[0].lora_A.grad, layers[-1].lora_B.grad
    torch.testing.assert_close(found["whole"][0], found["forward"][0])
    torch.testing.assert_close(found["gradient"][0], found["lora"][0])
    assert not torch.allclose(found["whole"][0], found["lora"][0])
    # the last layer's B sees the same numbers, so it has the same gradient; an early A does not,
    # as it is reached on the shortcut's way or is not
    for same, other in (("whole", "forward"), ("gradient", "lora")):
        torch.testing.assert_close(found[same][2], found[other][2])
        assert not torch.allclose(found[same][1], found[other][1])


def test_full_fine_tuning_of_one_linear_is_w_plus_d():
    """experiments/deltalora_published.py: W + D computes what a linear of that weight does, D gets
    its gradient, and all forms of the update are D."""
    linear, x = nn.Linear(3, 5).double(), torch.randn(4, 3, dtype=torch.float64)
    layer = deltalora_published.WholeLinear(linear, r=2, alpha=6)
    nn.init.normal_(layer.lora_D)
    whole = nn.Linear(3, 5).double()
    whole.load_state_dict({"weight": linear.weight + layer.lora_D, "bias": linear.bias})
    torch.testing.assert_close(layer(x), whole(x))
    layer(x).square().sum().backward()
    whole(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_D.grad, whole.weight.grad)
    A, B = layer.as_lora()
    torch.testing.assert_close(layer.scaling * B @ A, layer.delta())
    torch.testing.assert_close(layer.delta(), whole.weight - linear.weight)


# Delta-LoRA

def delta_layer(start, dropout=0.0):
    torch.manual_seed(0)
    layer = DeltaLoRALinear(nn.Linear(6, 5).double(), 2, 3, delta_lambda=2.0, delta_start=start)
    layer.weight.requires_grad_(False)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    return layer, x, y


def test_with_lambda_0_W_rests_and_below_it_is_refused():
    layer = DeltaLoRALinear(nn.Linear(6, 5), 2, 3, delta_lambda=0, delta_start=0)
    before = layer.weight.clone()
    layer.begin([layer], 2)
    nn.init.normal_(layer.lora_B)
    layer.after_step([layer], 1)
    A, B = layer.as_lora()
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(B @ A, layer.lora_B @ layer.lora_A)
    with pytest.raises(ValueError, match="-1"):
        DeltaLoRALinear(nn.Linear(6, 5), 2, 3, delta_lambda=-1, delta_start=0)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_W_moves_as_algorithm_1_says(start):
    """After step t > K: W_t = W_{t-1} + lambda s (B_t A_t - B_{t-1} A_{t-1}); up to K it rests. t
    counts from 1."""
    layer, x, y = delta_layer(start)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], 1e-2)
    for t in range(1, 7):
        W, BA = layer.weight.clone(), layer.lora_B @ layer.lora_A
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.after_step([layer], t)
        moved = 2.0 * 1.5 * (layer.lora_B @ layer.lora_A - BA) if t > start else 0 * W
        assert equal(layer.weight - W, moved, 1e-14)
        assert (t > start) == bool(moved.abs().max() > 0)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_delta_lora_telescopes(start):
    """W_T = W_0 + lambda s (B_T A_T - B_K A_K); the total update is a LoRA of rank 2 r, of rank r
    for K = 0."""
    layer, x, y = delta_layer(start)
    W_0, optimizer = layer.weight.clone(), torch.optim.AdamW([layer.lora_A, layer.lora_B], 1e-2)
    for t in range(1, 9):
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.after_step([layer], t)
        if t == start:
            S = layer.lora_B.detach() @ layer.lora_A.detach()
    S = S if start else 0
    assert equal(layer.weight, W_0 + 2.0 * 1.5 * (layer.lora_B @ layer.lora_A - S), 1e-13)
    A, B = layer.as_lora()
    total = layer.weight + layer.delta() - W_0
    assert equal(total, layer.scaling * B @ A, 1e-13)
    rank = torch.linalg.matrix_rank(total, atol=1e-10).item()
    assert rank == len(A) == (4 if start else 2)
