"""Who gets gradient, the closed forms of the papers, and the motion of what moves without one."""
import functools

import pytest
import torch
import torch.nn as nn
from conftest import (
    adapt,
    batch,
    every_model,
    every_variant,
    factors,
    head_of,
    tiny_gpt,
    tokens,
    train_steps,
    variants,
)
from test_equations import ALPHA, Chain, R, chain, delta_layer, equal

import lora
from deltalora import DeltaLoRALinear
from lora import LoRALinear
from methods import METHODS
from reslora import ResLoRALinear
from rslora import RsLoRALinear
from run import machine


@every_model
@every_variant
def test_only_the_adapters_get_gradient_and_at_the_start_only_the_factor_that_is_0(method, hparams,
                                                                                   tiny):
    """Every base parameter's gradient is None; at B = 0 dL/dA = 0 and dL/dB != 0; with B random
    both are not 0. A factor that no 0 multiplies has the gradient of finite differences. The head
    of a classifier gets gradient too."""
    for random in (False, True):
        model = tiny()
        layers, some = adapt(model, method, hparams, random=random), batch(model)
        model(*some)[1].backward()
        adapters = {id(p) for p in factors(layers) + head_of(model)}
        for p in model.parameters():
            assert p.requires_grad == (id(p) in adapters)
            assert (p.grad is not None) == (id(p) in adapters)
        assert not (random and any(not p.any() for p in factors(layers)))
        for p in factors(layers):
            # DoRA's magnitude for one, or both factors of PiSSA
            if p.grad.any() != (random or not p.any()):
                assert slope(model, some, p) == pytest.approx(p.grad.sum().item(),
                                                              rel=1e-4) and p.grad.any()


@torch.no_grad()
def slope(model, some, p, eps=1e-5):
    """What the loss gains, per unit, when all numbers of a factor grow together: by finite
    differences."""
    losses = []
    for sign in (1, -1):
        p.add_(sign * eps)
        losses.append(model(*some)[1].item())
        p.sub_(sign * eps)
    return (losses[0] - losses[1]) / (2 * eps)


@every_model
@every_variant
def test_training_changes_the_adapters_and_nothing_else(method, hparams, tiny):
    """After some steps A, B and a head have changed and the base is as it was, but for a W that the
    method may move."""
    model = tiny()
    layers = adapt(model, method, hparams, random=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train_steps(model, layers, 12)
    assert losses[-1] < losses[0]
    changing = {id(p) for p in factors(layers) + head_of(model)}
    may_move = {id(layer.weight) for layer in layers if layer.moves_weight}
    if method == "adalora":  # a layer that it left no rank has E = 0, as at the start
        changing -= {id(layer.lora_E) for layer in layers if not layer.lora_E.any()}
        assert any(layer.lora_E.any() for layer in layers)
    for name, p in model.named_parameters():
        assert id(p) in may_move or torch.equal(p, before[name]) == (id(p) not in changing), name


@every_model
@every_variant
def test_gradcheck(method, hparams, tiny):
    """The gradient of the loss by autograd is that by finite differences, through the whole
    model."""
    if not METHODS[method].adapter.exact_gradient:
        pytest.skip("the paper cuts a part of the forward from the graph")
    model = tiny(n_layer=2)
    idx, targets = batch(model, 1, 4)
    layers = adapt(model, method, hparams, r=2)
    torch.autograd.gradcheck(lambda *_: model(idx, targets)[1], factors(layers), fast_mode=True)


# of a method's variants those whose forward differs; -1 once, where every block is another graph
DIFFERENT = [v for v in variants() if v.values[1].get("pre_num") in (None, 2)
             and not v.values[1].get("cut") and not v.values[1].get("delta_start")
             or v.id.startswith("reslora input -1")]


@pytest.mark.parametrize("method, hparams", DIFFERENT)
def test_compiled_blocks_have_the_same_gradients(method, hparams, monkeypatch):
    """With its blocks traced by torch.compile, and with them what travels between ResLoRA's layers
    and the ranks that DyLoRA draws, a model has the loss and the gradients of the plain one, step
    after step and whatever the shape of a batch. Few graphs serve all shapes. (No code is
    generated: that takes minutes.)"""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    model = tiny_gpt()
    layers = adapt(model, method, hparams)
    compiled = machine.compiled(model)
    assert {id(p) for p in compiled.parameters()} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(factors(layers), 0.1)
    layers[0].begin(layers, 5)
    for step, shape in enumerate([(4, 10), (4, 11), (2, 16), (5, 7), (4, 12)], 1):
        some = tokens(*shape)
        plain = torch.autograd.grad(model(*some)[1], factors(layers))
        loss = compiled(*some)[1]
        assert equal(loss, model(*some)[1])
        loss.backward()
        assert all(equal(p.grad, g) for p, g in zip(factors(layers), plain, strict=True))
        layers[0].before_step(layers, step)
        optimizer.step()
        optimizer.zero_grad()
        layers[0].after_step(layers, step)
    m = len(model.h) if hparams.get("pre_num") == -1 else hparams.get("pre_num", 0)
    # one where x has no gradient yet, one where it has, and one for each number of layers that may
    # be behind
    assert 0 < len(graphs) <= 2 + m + 1
    torch._dynamo.reset()


# Closed forms: g_n = dL/dh_n, rows instead of columns. dL/d(out) of the chain is 1 everywhere.

def gradients(model, layers, x):
    """x_n, g_n of a chain and the gradients of A and B, with retained activations."""
    seen = []

    def hook(layer, args, h):
        args[0].retain_grad() if args[0].requires_grad else None
        h.retain_grad()
        seen.append((args[0], h))
    handles = [layer.register_forward_hook(hook) for layer in layers]
    model(x).sum().backward()
    for handle in handles:
        handle.remove()
    return [x.detach() for x, _ in seen], [h.grad for _, h in seen], [x.grad for x, _ in seen]


def test_closed_form_gradients_of_the_input_shortcut():
    """dB_n = s g_n (A_n (x_n + x_{n-1}))^T, dA_n = s B_n^T g_n (x_n + x_{n-1})^T; dL/dx_n gains s
    A^T B^T g_{n+1}. In layer 0 x_{-1} = x_0: its gradients have the factor 2."""
    model, layers, x = chain(ResLoRALinear, shortcut="input", pre_num=1)
    xs, gs, dxs = gradients(model, layers, x.requires_grad_())
    s = ALPHA / R
    for n, (q, x, g) in enumerate(zip(layers, xs, gs, strict=True)):
        total = x + xs[n - 1] if n else 2 * x
        assert equal(q.lora_B.grad, s * g.T @ (total @ q.lora_A.T))
        assert equal(q.lora_A.grad, s * (g @ q.lora_B).T @ total)
        dx = g @ (q.weight + (1 if n else 2) * s * q.lora_B @ q.lora_A)
        if n + 1 < len(layers):
            after = layers[n + 1]
            dx = dx + s * gs[n + 1] @ after.lora_B @ after.lora_A  # the added path
        assert equal(dxs[n], dx)


@pytest.mark.parametrize("m", [1, 2])
def test_closed_form_gradients_of_the_block_shortcut(m):
    """dB_k = s sum_{j=k..k+m} g_j (A_k x_j)^T, dA_k = s sum_j B_k^T g_j x_j^T."""
    model, layers, x = chain(ResLoRALinear, shortcut="block", pre_num=m)
    xs, gs, _ = gradients(model, layers, x)
    s = ALPHA / R
    for k, q in enumerate(layers):
        users = range(k, min(k + m, len(layers) - 1) + 1)
        assert equal(q.lora_B.grad, s * sum(gs[j].T @ (xs[j] @ q.lora_A.T) for j in users))
        assert equal(q.lora_A.grad, s * sum((gs[j] @ q.lora_B).T @ xs[j] for j in users))


@pytest.mark.parametrize("m", [1, 2])
def test_closed_form_gradients_of_the_middle_shortcut(m):
    """du_k = s sum_{j=k..k+m} B_j^T g_j, dA_k = du_k x_k^T, dB_n = s g_n (sum_k u_{n-k})^T."""
    model, layers, x = chain(ResLoRALinear, shortcut="middle", pre_num=m)
    xs, gs, _ = gradients(model, layers, x)
    s, us = ALPHA / R, [x @ q.lora_A.T for x, q in zip(xs, layers, strict=True)]
    for k, q in enumerate(layers):
        du = s * sum(gs[j] @ layers[j].lora_B for j in range(k, min(k + m, len(layers) - 1) + 1))
        assert equal(q.lora_A.grad, du.T @ xs[k])
        assert equal(q.lora_B.grad, s * gs[k].T @ sum(us[max(0, k - m):k + 1]))


def test_the_extra_gradient_path_is_closed_at_B_0_and_is_BA_later():
    """dh_n/dx_{n-1} with x_n held fixed is 0 at B = 0 and s B_n A_n afterwards (eq. 16)."""
    layers = [ResLoRALinear(nn.Linear(6, 6).double(), 2, 3) for _ in range(2)]
    ResLoRALinear.connect({"q": layers})
    x1 = torch.randn(6, dtype=torch.float64)

    def h1(x0):
        layers[0](x0)
        return layers[1](x1)
    x0 = torch.randn(6, dtype=torch.float64)
    assert (torch.autograd.functional.jacobian(h1, x0) == 0).all()
    nn.init.normal_(layers[1].lora_B)
    assert equal(torch.autograd.functional.jacobian(h1, x0),
                 1.5 * layers[1].lora_B @ layers[1].lora_A)


def test_at_B_0_a_shortcut_changes_only_the_gradient_of_B():
    """input and middle: dB is that of the longer sum, in the first layer of input of twice x;
    block: dB_k collects the layers that borrow block k."""
    for shortcut in ("input", "block", "middle"):
        torch.manual_seed(0)
        model, layers, x = chain(ResLoRALinear, shortcut=shortcut)
        torch.manual_seed(0)
        plain, plain_layers, _ = chain(LoRALinear)
        for layer in layers + plain_layers:
            nn.init.zeros_(layer.lora_B)
        for net in (model, plain):
            net(x).sum().backward()
        for n, (a, b) in enumerate(zip(layers, plain_layers, strict=True)):
            assert (a.lora_A.grad == 0).all() and (b.lora_A.grad == 0).all()
            # who has no partner
            alone = n == {"input": None, "middle": 0, "block": len(layers) - 1}[shortcut]
            assert equal(a.lora_B.grad, b.lora_B.grad) == alone
            assert equal(a.lora_B.grad, 2 * b.lora_B.grad) == (shortcut == "input" and n == 0)


# rsLoRA

def test_rank_growth_of_the_first_update():
    """One SGD step from B = 0: the update's size is flat in r with alpha / sqrt r and falls as 1 /
    r with alpha / r; with Adam it is flat with alpha / r and grows as sqrt r with alpha / sqrt r.
    Growth from r 8 to r 512."""
    def update(adapter, optimizer, r):
        sizes = []
        for seed in range(8):
            torch.manual_seed(seed)
            layer, x, y = adapter(nn.Linear(512, 512), r, 16), torch.randn(512), torch.randn(512)
            (layer(x) * y).sum().backward()
            optimizer([layer.lora_B]).step()
            sizes.append((layer.delta() @ x).norm().item())
        return sum(sizes) / len(sizes)

    def growth(adapter, optimizer):
        return update(adapter, optimizer, 512) / update(adapter, optimizer, 8)
    assert growth(RsLoRALinear, lambda p: torch.optim.SGD(p, 1e-6)) == pytest.approx(1, rel=0.25)
    assert growth(LoRALinear, lambda p: torch.optim.SGD(p, 1e-6)) == pytest.approx(1 / 64, rel=0.25)
    assert growth(LoRALinear, lambda p: torch.optim.Adam(p, 1e-3)) == pytest.approx(1, rel=0.25)
    assert growth(RsLoRALinear, lambda p: torch.optim.Adam(p, 1e-3)) == pytest.approx(8, rel=0.25)


def test_gradient_of_B_at_the_start_is_flat_in_rank_only_with_the_root():
    """dL/dB = s g (A x)^T at B = 0, and |A x| grows as sqrt(r): s sqrt(r) is constant with the root
    alone."""
    def norm(adapter, r):
        torch.manual_seed(0)
        layer, x = adapter(nn.Linear(512, 512), r, 16), torch.randn(64, 512)
        layer(x).square().sum().backward()
        return layer.lora_B.grad.norm().item()
    assert norm(RsLoRALinear, 512) / norm(RsLoRALinear, 8) == pytest.approx(1, rel=0.15)
    assert norm(LoRALinear, 512) / norm(LoRALinear, 8) == pytest.approx(1 / 8, rel=0.15)


def test_delta_lora_is_lora_with_a_weight_that_follows_by_hand():
    """Oracle: y = W_0 x + s B A x + [t > K] lambda s (sg(B) sg(A) - B_K A_K) x, by autograd, gives
    the same run."""
    layer, x, y = delta_layer(2)
    W_0, b = layer.weight.clone(), layer.bias.clone()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    ours, hand = (torch.optim.AdamW(p, 1e-2) for p in ([layer.lora_A, layer.lora_B], [A, B]))
    S = None
    for t in range(1, 8):
        follow = 0 if S is None else 2.0 * 1.5 * (B.detach() @ A.detach() - S)
        loss = (x @ (W_0 + 1.5 * B @ A + follow).T + b - y).square().mean()
        assert equal((layer(x) - y).square().mean(), loss)
        for optimizer, value in ((ours, (layer(x) - y).square().mean()), (hand, loss)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        layer.after_step([layer], t)
        S = B.detach() @ A.detach() if t == 2 else S
        assert equal(layer.lora_A, A) and equal(layer.lora_B, B)


def test_dL_dW_is_dL_dBA_over_s_without_dropout_and_only_then():
    """W may follow B A because their gradients agree: x^T g both. Dropout on A's input breaks
    that."""
    for p in (0.0, 0.5):
        torch.manual_seed(0)
        layer, x = LoRALinear(nn.Linear(6, 5).double(), 2, 3,
                              dropout=p), torch.randn(9, 6, dtype=torch.float64)
        BA = (torch.randn(5, 2, dtype=torch.float64)
              @ torch.randn(2, 6, dtype=torch.float64)).requires_grad_()
        loss = (x @ layer.weight.T + layer.scaling * layer.drop(x) @ BA.T).square().sum()
        dW, dBA = torch.autograd.grad(loss, (layer.weight, BA))
        assert equal(dW, dBA / layer.scaling) == (p == 0)
    with pytest.raises(ValueError, match="dropout"):
        DeltaLoRALinear(nn.Linear(4, 4), 2, 2, dropout=0.1)


def test_delta_lora_keeps_W_in_fp32_on_a_bf16_base():
    """A bf16 W would swallow most of each update; its copy is fp32 and the small steps add up."""
    layer = DeltaLoRALinear(nn.Linear(32, 32).bfloat16(), 2, 2, delta_start=0)
    assert layer.weight.dtype == torch.float32 and not layer.weight.requires_grad
    W = layer.weight.clone()
    for t in range(1, 101):
        with torch.no_grad():
            layer.lora_B.add_(1e-5)
        layer.after_step([layer], t)
    expected = 2.0 * 1.0 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight - W, expected.detach(), rtol=0.01, atol=1e-6)


def test_adapters_are_fp32_on_a_bf16_base():
    """lora_A, lora_B and their gradients are fp32 under autocast; the frozen base stays bf16."""
    model = Chain().bfloat16()
    layers = lora.apply(model, LoRALinear, ["q"], r=R, alpha=ALPHA)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(3, 6))
    out.float().sum().backward()
    for layer in layers:
        assert layer.weight.dtype == torch.bfloat16
        assert layer.lora_B.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_outside_autocast_answers_in_the_half_precision_of_its_input(dtype):
    """And as exactly as that precision allows: fp16 has three bits more than bf16."""
    layer = LoRALinear(nn.Linear(32, 32).to(dtype), 4, 4)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(50, 32).to(dtype)
    h = layer(x)
    W = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = x.double() @ W.T + layer.bias.double()
    assert h.dtype == dtype and not torch.is_autocast_enabled("cpu")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(h.double(), exact, rtol=2 * eps, atol=2 * eps)
