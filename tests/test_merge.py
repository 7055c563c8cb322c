"""Merging. First the adapter must change the output, then merging must not."""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import (
    adapt,
    batch,
    calibrated,
    every_model,
    every_variant,
    factors,
    real,
    tiny_gpt,
    tiny_roberta,
    tokens,
    train_steps,
)
from test_equations import Chain

import lora
from lora import LoRALinear
from methods import METHODS
from reslora import MERGES, ResLoRALinear, calibrate


@every_model
@every_variant
def test_merged_is_unmerged(method, hparams, tiny):
    """After training steps the adapter changes the logits and an exact merge does not; approximate
    ones say so."""
    model = tiny()
    idx = batch(model)[0]
    base = model(idx)[0]
    layers = adapt(model, method, hparams)
    train_steps(model, layers, 4)
    out = model.eval()(idx)[0]
    assert (out - base).abs().max() > 0.1
    exact = all(layer.exact_merge for layer in layers)
    assert exact == (hparams.get("shortcut", "block") == "block" and hparams.get("cut") is None)
    calibrated(model, layers)
    error = (lora.merge(model)(idx)[0] - out).abs().max()
    assert (error < 1e-12) == exact


@every_model
@every_variant
def test_merging_restores_the_architecture(method, hparams, tiny):
    """The merged model has the base's modules, keys and dtypes; a bf16 W that the method moves has
    become fp32."""
    moves = METHODS[method].adapter.moves_weight
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(dtype)
        keys = {k: (v.shape, torch.float32 if moves and k.endswith("q.weight") else v.dtype)
                for k, v in model.state_dict().items()}
        modules = [type(m) for m in model.modules()]
        layers = adapt(model, method, hparams, targets=["q"])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            calibrated(model, layers)
        lora.merge(model)
        assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == keys
        assert [type(m) for m in model.modules()] == modules


@every_variant
def test_a_bf16_tensor_that_a_method_moves_is_not_the_pretrained_one(method, hparams):
    """It has an fp32 tensor of its own: rounded to bf16, what moves it would be lost. The
    pretrained numbers stay, through the start, training and merging."""
    model = tiny_gpt(torch.bfloat16)
    given = [(p, p.detach().clone()) for p in model.parameters()]
    layers = adapt(model, method, hparams)
    with torch.autocast("cpu", torch.bfloat16):
        train_steps(model, layers, 4)
        calibrated(model, layers)
    assert all(torch.equal(p, before) for p, before in given)
    lora.merge(model)
    assert (all(torch.equal(p, before) for p, before in given)
            or not METHODS[method].adapter.moves_weight)


@every_variant
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_the_base_untouched(method, hparams, bad):
    """NaN or inf in one adapter: nothing at all is merged."""
    model = tiny_gpt()
    layers = calibrated(model, adapt(model, method, hparams))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    poisoned = factors(layers)[-1]
    with torch.no_grad():
        poisoned[(0,) * poisoned.dim()] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        lora.merge(model)
    now = model.state_dict(keep_vars=True)
    assert all(torch.equal(v, before[k]) or v is poisoned for k, v in now.items())
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == len(layers)


def test_merging_twice_is_refused():
    """The second merge finds no adapter and says so."""
    model = tiny_gpt()
    adapt(model, "lora", {})
    lora.merge(model)
    with pytest.raises(ValueError, match="nothing to merge"):
        lora.merge(model)


def test_merging_works_on_any_module():
    """Any nn.Module with named nn.Linears, bias or none, at any depth, even at the top."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(),
                          nn.ModuleDict({"out": nn.Linear(16, 4)})["out"])
    x = torch.randn(5, 8)
    base = model(x)
    for layer in lora.apply(model, LoRALinear, ["0", "2"], r=2, alpha=4):
        nn.init.normal_(layer.lora_B)
    out = model(x)
    assert (out - base).abs().max() > 0.1
    torch.testing.assert_close(lora.merge(model)(x), out)
    assert model[0].bias is None


# Surgery

def test_apply_returns_layers_in_chain_order():
    """All q from shallow to deep, then all v, as the targets were named."""
    model = tiny_gpt()
    layers = adapt(model, "lora", {}, targets=["v", "q"])
    assert layers == [b.attn.v for b in model.h] + [b.attn.q for b in model.h]


def test_bad_surgery_leaves_the_model_as_it_was():
    """Unknown target, rank out of range, tied weight, bad dropout: ValueError with the value,
    nothing replaced."""
    model = tiny_gpt()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for net, targets, hparams, message in [(model, ["q", "value"], dict(r=2), "'value' matches no "
                                            "linear.*down, k, o, q, up, v"),
                                           (model, ["q"], dict(r=0), "rank 0 is not in 1..16"),
                                           (model, ["q"], dict(r=17), "rank 17 is not in 1..16"),
                                           (model, ["q"], dict(r=2.0), "rank 2.0"),
                                           (model, ["q"], dict(r=2, alpha=0),
                                            "alpha 0 is not above 0"),
                                           (model, ["q"], dict(r=2, alpha=1e7), "alpha 10000000.0 "
                                            "is not above 0 and at most"),
                                           (model, ["q"], dict(r=2, dropout=1.0), "dropout 1.0"),
                                           (tied, ["0"], dict(r=2), "shares its weight"),
                                           (model, ["q", "attn.q"], dict(r=2),
                                            "meant by an earlier target"),
                                           (model, "qv", dict(r=2), "a list"),
                                           (model, [], dict(r=2), "a list"),
                                           (nn.Linear(4, 4), [""], dict(r=2), "matches no linear"),
                                           (nn.MultiheadAttention(4, 2), ["out_proj"], dict(r=2),
                                            "out_proj is a NonDynamicallyQuantizableLinear")]:
        modules, wanted = list(net.modules()), [p.requires_grad for p in net.parameters()]
        with pytest.raises(ValueError, match=message):
            lora.apply(net, LoRALinear, targets, **{"alpha": 1, **hparams})
        assert list(net.modules()) == modules and [p.requires_grad
                                                   for p in net.parameters()] == wanted


def test_a_second_apply_is_refused():
    """It would freeze the first one's adapters; those go on training."""
    model = tiny_gpt()
    layers = adapt(model, "lora", {}, targets=["q"])
    with pytest.raises(ValueError, match="has adapters already"):
        adapt(model, "lora", {}, targets=["v"])
    assert all(layer.lora_A.requires_grad for layer in layers)


def test_apply_keeps_train_and_eval():
    """Adapters put into a model in evaluation do not drop."""
    model = tiny_gpt().eval()
    adapt(model, "lora", {}, dropout=0.5)
    idx = tokens()[0]
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert not any(m.training for m in model.modules())


def test_merging_into_a_narrow_dtype_that_overflows_is_refused():
    """fp16 ends at 65504: an infinite weight is no merge."""
    model = nn.Sequential(nn.Linear(4, 4).half())
    layer, = lora.apply(model, LoRALinear, ["0"], r=2, alpha=2)
    nn.init.constant_(layer.lora_B, 1e6)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaN or inf"):
        lora.merge(model)
    assert torch.equal(layer.weight, before)


# ResLoRA's merges

APPROXIMATE = [(s, m) for s in ("input", "middle") for m in (1, 2)]


def trained_reslora(shortcut, m):
    torch.manual_seed(0)
    model = tiny_gpt()
    return model, adapt(model, "reslora", dict(shortcut=shortcut, pre_num=m))


def chain_inputs(model, layers, idx):
    """{layer: x_n (tokens, C)} of one forward."""
    xs = {}
    hooks = [q.register_forward_hook(lambda q, args, _: xs.update({q: args[0].flatten(0, 1)}))
             for q in layers]
    model(idx)
    for hook in hooks:
        hook.remove()
    return xs


def shortcut_part(layer, xs):
    """z_n by hand."""
    if layer.shortcut == "input":
        return sum(xs[e] for e in layer.earlier) @ layer.lora_A.T
    return sum(xs[e] @ e.lora_A.T for e in layer.earlier)


@pytest.mark.parametrize("shortcut, m", APPROXIMATE)
def test_regression_has_the_least_error_of_all_merges_on_its_calibration_data(shortcut, m):
    """With eps = 0: |z_n - (A* - A) x_n| of every layer is below that of the paper's merges and of
    any other matrix."""
    model, layers = trained_reslora(shortcut, m)
    idx = tokens(16, 16)[0]
    xs = chain_inputs(model, layers, idx)
    hard = [layer for layer in layers if not layer.exact_merge]
    assert len(hard) == 6

    def errors():
        return torch.stack([(shortcut_part(q, xs) - xs[q] @ (q.A_star - q.lora_A).T).square().sum()
                            for q in hard])
    calibrate(model, [idx], merge="regression", eps=0.0)
    best, A_star = errors(), [q.A_star for q in hard]
    for merge in MERGES[1:] if m == 1 else ("bi", "none"):
        calibrate(model, [idx], merge=merge)
        assert (best < 0.9 * errors()).all()
    for _ in range(5):
        for q, A in zip(hard, A_star, strict=True):
            q.A_star = A + 1e-3 * torch.randn_like(A)
        assert (best < errors()).all()
    # and it is the least squares solution of an independent solver
    for q, A in zip(hard, A_star, strict=True):
        P = torch.linalg.lstsq(xs[q], shortcut_part(q, xs)).solution.T
        torch.testing.assert_close(A, q.lora_A + P, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shortcut, m", APPROXIMATE)
def test_P_is_the_ridge_solution_whose_eps_is_in_units_of_the_mean_diagonal(shortcut, m):
    """64 channels, 40 tokens: fewer than channels, so eps decides. P = Z^T X (X^T X + 1e-3 mean_i
    (X^T X)_ii I)^-1."""
    model = Chain(3, 64, 64)
    layers = lora.apply(model, ResLoRALinear, ["q"], r=4, alpha=4, shortcut=shortcut, pre_num=m)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 40, 64, dtype=torch.float64)
    xs = chain_inputs(model, layers, x)
    calibrate(model, [x])
    for layer in layers[1:]:
        X, Z = xs[layer], shortcut_part(layer, xs)
        C = X.T @ X
        P = Z.T @ X @ torch.linalg.inv(C + 1e-3 * C.trace() / 64 * torch.eye(64))
        torch.testing.assert_close(layer.A_star, layer.lora_A + P, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shortcut, m", APPROXIMATE)
def test_a_classifiers_regression_weighs_tokens_by_what_the_output_hears_of_them(shortcut, m):
    """With a margin M, A* solves the least squares weighted by |B^T dM/dh|^2: by lstsq on rows
    scaled with its root, gradients by autograd of our own; and it is another A* than the unweighted
    one."""
    torch.manual_seed(0)
    model = tiny_roberta()
    layers = adapt(model, "reslora", dict(shortcut=shortcut, pre_num=m))
    hard = [layer for layer in layers if not layer.exact_merge]
    idx = batch(model, 24)[0]
    mask = idx != 1
    xs, gs = {}, {}

    def keep(layer, args, h):
        h.retain_grad()
        xs[layer], gs[layer] = args[0][mask].detach(), h
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    model(idx)[0].amax(1).sum().backward()
    for hook in hooks:
        hook.remove()
    more = dict(run=lambda idx: model(idx)[0], real=real(model), eps=0.0)
    calibrate(model, [idx], margin=lambda logits: logits.amax(1).sum(), **more)
    weighted = [layer.A_star for layer in hard]
    calibrate(model, [idx], **more)
    for layer, A_star in zip(hard, weighted, strict=True):
        root = (gs[layer].grad[mask] @ layer.lora_B).norm(dim=1, keepdim=True)
        P = torch.linalg.lstsq(root * xs[layer], root * shortcut_part(layer, xs)).solution.T
        torch.testing.assert_close(A_star, (layer.lora_A + P).detach(), rtol=1e-6, atol=1e-6)
        assert (A_star - layer.A_star).abs().max() > 1e-2


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_regression_beats_the_papers_merges_on_the_logits(shortcut):
    """On fresh tokens the regression-merged model is nearer to the unmerged one than any of the
    paper's."""
    model, layers = trained_reslora(shortcut, 1)
    train_steps(model, layers, 10)
    idx, out = tokens(8)[0], None
    out = model(idx)[0]
    error = {}
    for how in MERGES:
        trial = copy.deepcopy(model)
        calibrated(trial, [m for m in trial.modules() if isinstance(m, ResLoRALinear)], how)
        error[how] = (lora.merge(trial)(idx)[0] - out).norm().item()
    assert (error["regression"] == min(error.values())
            and error["none"] > 1.5 * error["regression"]), error


@pytest.mark.parametrize("shortcut, m", APPROXIMATE)
def test_the_papers_merges_are_the_papers(shortcut, m):
    """merge_bi and merge_bw by hand, from norms over two batches."""
    model, layers = trained_reslora(shortcut, m)
    batches = [tokens()[0], tokens()[0]]
    xs = [chain_inputs(model, layers, idx) for idx in batches]
    s = 5 / 3
    for how in ("none", "bi", "bw"):
        if how == "bw" and shortcut == "input" and m > 1:
            with pytest.raises(ValueError, match="pre_num 1 only, not 2"):
                calibrate(model, batches, merge=how)
            continue
        calibrate(model, batches, merge=how)
        for chain in (layers[:4], layers[4:]):
            f = [sum((x[q] @ q.lora_A.T if how == "bi" and shortcut == "middle" else x[q]).norm()
                     for x in xs) / 2 for q in chain]
            star = []
            for n, q in enumerate(chain):
                window = range(1, min(m, n) + 1)
                if n == 0 and shortcut == "input":
                    A = 2 * q.lora_A  # x_{-1} = x_0: exact under every merge
                elif how == "none":
                    A = q.lora_A
                elif how == "bi":
                    A = (1 + sum(f[n - k] / f[n] for k in window)) * q.lora_A
                elif shortcut == "middle":
                    A = q.lora_A + sum(f[n - k] / f[n] * chain[n - k].lora_A for k in window)
                else:
                    A = (1 + (0 if n == 0 else 1 if n == 1 else star[n - 2]
                              / star[n - 1])) * q.lora_A
                star.append((q.weight + s * q.lora_B @ A).norm())
                torch.testing.assert_close(q.as_lora()[0], A)


def test_calibration_leaves_padding_out():
    """Positions marked False do not count: A* is that of the real tokens alone."""
    model, layers = trained_reslora("input", 1)
    hard = [layer for layer in layers if not layer.exact_merge]
    idx = tokens(16, 8)[0]
    padded = torch.cat([idx, torch.zeros(16, 4, dtype=torch.long)], 1)
    calibrate(model, [padded], real=lambda idx: torch.arange(12).expand(16, 12) < 8)
    with_padding = [q.A_star for q in hard]
    calibrate(model, [idx])
    for a, q in zip(with_padding, hard, strict=True):
        torch.testing.assert_close(a, q.A_star)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_merging_without_calibration_is_refused(shortcut):
    """An approximate merge needs `calibrate`; a training step makes an earlier calibration
    stale."""
    model, layers = trained_reslora(shortcut, 1)
    with pytest.raises(RuntimeError, match="calibrate first"):
        lora.merge(model)
    calibrated(model, layers)
    train_steps(model, layers, 1)
    with pytest.raises(RuntimeError, match="calibrate first"):
        lora.merge(model)


def test_no_shortcut_is_exact():
    """pre_num 0 is plain LoRA and merges exactly under every name."""
    for how in MERGES:
        model, (idx, _) = tiny_gpt(), tokens()
        layers = adapt(model, "reslora", dict(pre_num=0, merge=how))
        out = model(idx)[0]
        assert all(layer.exact_merge for layer in layers)
        torch.testing.assert_close(lora.merge(model)(idx)[0], out)


@every_model
@pytest.mark.filterwarnings("ignore:ResLoRA. . is a single layer")
@pytest.mark.parametrize("m", [1, 2, -1])
@pytest.mark.parametrize("how", MERGES)
def test_the_first_layer_merges_exactly_without_calibration(tiny, how, m):
    """A chain of one layer of any shortcut is merged to 1e-12 under every merge, and no batch is
    asked for; with `input` its model is that of LoRA with 2 alpha."""
    if how == "bw" and m != 1:
        return
    for shortcut in ("input", "block", "middle"):
        torch.manual_seed(1)
        model, double = tiny(n_layer=1), None
        double = copy.deepcopy(model)
        idx = batch(model)[0]
        layers = adapt(model, "reslora", dict(shortcut=shortcut, pre_num=m, merge=how))
        plain = adapt(double, "lora", {}, alpha=10 if shortcut == "input" else 5)
        for a, b in zip(factors(layers), factors(plain), strict=True):
            b.data.copy_(a.data)
        out = model(idx)[0]
        torch.testing.assert_close(double(idx)[0], out, rtol=0, atol=1e-12)
        calibrate(model, None)
        torch.testing.assert_close(lora.merge(model)(idx)[0], out, rtol=0, atol=1e-12)


def test_delta_lora_merges_what_W_has_not_followed():
    """merged = W_T + s B_T A_T: the branch is added once, W's own motion is in W already."""
    model = tiny_gpt()
    layers = adapt(model, "deltalora", dict(delta_start=1), random=False)
    W_0 = [layer.weight.clone() for layer in layers]
    train_steps(model, layers, 5)
    totals = [layer.scaling * layer.as_lora()[1] @ layer.as_lora()[0] for layer in layers]
    lora.merge(model)
    merged = [b.attn.q.weight for b in model.h] + [b.attn.v.weight for b in model.h]
    for W, start, total in zip(merged, W_0, totals, strict=True):
        assert (W - start).abs().max() > 1e-3
        torch.testing.assert_close(W, start + total)
