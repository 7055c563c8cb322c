"""AdaLoRA, DyLoRA, LoHa and LoKr beside their papers' lines by hand and beside PEFT."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import adapt, factors, one_step, tiny_gpt, tokens

import lora
from baselines.adalora import AdaLoRALinear, budget
from baselines.dylora import DyLoRALinear
from baselines.loha import LoHaLinear
from baselines.lokr import LoKrLinear, divisors
from lora import LoRALinear
from rslora import RsLoRALinear, rank_stabilised


def linear(d_in=12, d_out=18):
    return nn.Linear(d_in, d_out).double().requires_grad_(False)


def filled(layer):
    """No factor of the layer is zero."""
    for p in factors([layer]):
        nn.init.normal_(p)
    return layer.eval()


def close(a, b, tolerance=1e-12):
    return (a - b).abs().max() <= tolerance * b.abs().max()


# The update of W is the paper's

def adalora_update(layer):
    """s sum_k B_k E_k A_k with s = alpha / r of the target rank."""
    A, E, B = layer.lora_A, layer.lora_E[:, 0], layer.lora_B
    assert A.shape == (5, 12) and B.shape == (18, 5)
    return 6 / 4 * sum(torch.outer(B[:, k], A[k]) * E[k] for k in range(5))


def dylora_update(layer, b):
    """alpha / b times the first b ranks."""
    return 6 / b * sum(torch.outer(layer.lora_B[:, k], layer.lora_A[k]) for k in range(b))


def loha_update(layer):
    """s (W1a W1b) o (W2a W2b), element by element; of rank r^2."""
    a1, b1, a2, b2 = layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b
    rows = [[(a1[i] @ b1[:, j]) * (a2[i] @ b2[:, j]) for j in range(12)] for i in range(18)]
    update = 6 / layer.r * torch.stack([torch.stack(row) for row in rows])
    assert torch.linalg.matrix_rank(update) == min(layer.r**2, 12)
    return update


def lokr_update(layer):
    """Block (i, j) is s W1_ij W2; W2 in two factors below half of its larger side, else whole."""
    assert (layer.lokr_w2 is None) == (layer.r < 3)
    W2 = layer.lokr_w2_a @ layer.lokr_w2_b if layer.r < 3 else layer.lokr_w2
    assert layer.lokr_w1.shape == (3, 3) and W2.shape == (6, 4)
    return torch.cat([torch.cat([6 / layer.r * layer.lokr_w1[i, j] * W2 for j in range(3)], 1)
                      for i in range(3)])


@pytest.mark.parametrize("adapter, r, own, by_hand", [
    (AdaLoRALinear, 4, dict(init_rank=5), adalora_update),
    (LoHaLinear, 3, {}, loha_update), (LoHaLinear, 4, {}, loha_update),  # r^2 below d_in, and not
    (LoKrLinear, 2, {}, lokr_update), (LoKrLinear, 3, {}, lokr_update)])
def test_an_update_is_the_papers_and_dropout_falls_on_its_input(adapter, r, own, by_hand):
    """h = W x + b + update x, and in training W x + b + update drop(x); delta and the factors of an
    export are the update, in both forms that LoHa and LoKr have."""
    layer = filled(adapter(linear(), r, alpha=6, dropout=0.5, **own))
    x, update = torch.randn(2, 7, 12, dtype=torch.float64), by_hand(layer)
    Wx = x @ layer.weight.T + layer.bias
    assert close(layer(x), Wx + x @ update.T) and close(layer.delta(), update)
    A, B = layer.as_lora()
    assert close(layer.scaling * B @ A, update) and (adapter != LoHaLinear or len(A) == r**2)
    torch.manual_seed(3)
    h = layer.train()(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert 0.3 < (dropped == 0).double().mean() < 0.7 and close(h, Wx + dropped @ update.T)


@pytest.mark.parametrize("b", [1, 2, 5])
def test_dylora_trains_at_the_drawn_rank_and_evaluates_at_the_cut(b):
    """The first b ranks by alpha / b, dropout included; neither of the two touches the other."""
    layer = filled(DyLoRALinear(linear(), 5, alpha=6, dropout=0.5))
    x, update = torch.randn(7, 12, dtype=torch.float64), dylora_update(layer, b)
    Wx = x @ layer.weight.T + layer.bias
    layer.draw(b)
    assert close(layer(x), Wx + x @ dylora_update(layer, 5).T)
    layer.train().cut_at(3)
    torch.manual_seed(3)
    h = layer(x)
    torch.manual_seed(3)
    assert close(h, Wx + nn.functional.dropout(x, 0.5) @ update.T)
    layer.eval().cut_at(b)
    A, B = layer.as_lora()
    assert close(layer(x), Wx + x @ update.T) and close(layer.delta(), update)
    assert len(A) == b and close(layer.scaling * B @ A, update)


def test_divisors_are_as_near_to_each_other_as_can_be():
    """768 = 24 * 32; a prime has only 1 and itself."""
    assert [divisors(d) for d in (768, 1024, 127, 1)] == [(24, 32), (32, 32), (1, 127), (1, 1)]


@pytest.mark.parametrize("adapter, d_in, d_out, r, own, zero, columns", [
    (AdaLoRALinear, 576, 400, 64, dict(init_rank=96), "lora_E", dict(lora_A=None, lora_B=None)),
    (DyLoRALinear, 576, 400, 64, {}, "lora_B", dict(lora_A=576)),
    (LoHaLinear, 576, 400, 64, {}, "hada_w2_a", dict(hada_w1_a=64, hada_w1_b=576, hada_w2_b=576)),
    (LoKrLinear, 576, 400, 64, {}, "lokr_w1", dict(lokr_w2=24)),
    (LoKrLinear, 2500, 2500, 20, {}, "lokr_w1", dict(lokr_w2_a=20, lokr_w2_b=50))])
def test_where_training_starts(adapter, d_in, d_out, r, own, zero, columns):
    """One factor is zero; the others are U(-1, 1) / sqrt(columns), and in AdaLoRA N(0, .02^2)."""
    layer = adapter(nn.Linear(d_in, d_out), r, 16, **own)
    trained = {name: p for name, p in layer.named_parameters() if name not in ("weight", "bias")}
    assert trained.keys() == {zero, *columns} and not trained[zero].any()
    for name, n in columns.items():
        std = 0.02 if n is None else (3 * n) ** -0.5
        assert trained[name].std().item() == pytest.approx(std, rel=0.06), name
        assert (trained[name].abs().max() <= 3**0.5 * std) == (n is not None)


# PEFT, on copied factors

def peft_layer(layer, kind, **config):
    """PEFT's layer of the same shape with our factors, W and b in it."""
    peft = pytest.importorskip("peft", reason="the oracle, in [dev]")
    model = nn.Sequential()
    model.add_module("q", nn.Linear(*layer.weight.shape[::-1]).double())
    model = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q"], **config)).double()
    theirs = model.base_model.model.q
    theirs.base_layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    for name, p in layer.named_parameters():
        if name not in ("weight", "bias"):
            getattr(theirs, name)["default"].data.copy_(p)
    return theirs, model


def test_loha_and_lokr_are_pefts_on_the_same_factors():
    """Forward and delta agree to 1e-6."""
    for adapter, kind, r in ((LoHaLinear, "LoHaConfig", 3), (LoKrLinear, "LoKrConfig", 2),
                             (LoKrLinear, "LoKrConfig", 4)):
        layer, x = filled(adapter(linear(), r, alpha=6)), torch.randn(7, 12, dtype=torch.float64)
        theirs, model = peft_layer(layer, kind, r=r, alpha=6)
        assert close(theirs.get_delta_weight("default"), layer.delta(), 1e-6)
        assert close(model.eval()(x), layer(x), 1e-6)


def test_adalora_is_pefts_after_its_constants():
    """PEFT scales by alpha / (R + 1e-5) and takes the mean of the unsquared norms; ours alpha / r
    and squares."""
    layer = filled(AdaLoRALinear(linear(), r=4, alpha=6, init_rank=5))
    theirs, model = peft_layer(layer, "AdaLoraConfig", init_r=5, target_r=4, lora_alpha=6,
                               total_step=10, orth_reg_weight=0.5)
    factor = (6 / 4) / (6 / (5 + 1e-5))
    assert close(factor * theirs.get_delta_weight("default"), layer.delta(), 1e-6)

    class Output:
        loss = torch.zeros((), dtype=torch.float64)
    model.base_model.model.forward = lambda: Output()  # PEFT adds its term to a loss
    mean_norm = model.base_model.forward().loss / 0.5
    A, B, one = layer.lora_A, layer.lora_B, torch.eye(5)
    norms = [(A @ A.T - one).norm(), (B.T @ B - one).norm()]
    assert close(mean_norm, sum(norms) / 2, 1e-6)
    assert close(layer.orthogonality(), sum(norm**2 for norm in norms), 1e-6)


# AdaLoRA's budget

def adapted(steps, **own):
    model = tiny_gpt()
    own = dict(budget_warmup=3, budget_final=4, budget_every=2, orth=0.1, **own)
    layers = adapt(model, "adalora", own, r=2, random=False)
    first = layers[0].begin(layers, steps)
    return model, layers, torch.optim.AdamW(factors(layers), 1e-2), first


def test_the_budget_falls_as_a_cube_and_ends_at_the_target():
    """b(t) with n = 8 layers, r_0 = 3, r = 2, by hand: 24 for t <= t_i, 16 from T - t_f on."""
    _, layers, _, first = adapted(15)
    assert first == 11
    hand = [24] * 3 + [16 + math.floor(8 * (1 - (t - 3) / 8) ** 3) for t in range(4, 11)] + [16] * 5
    assert [budget(layers, t) for t in range(1, 16)] == hand
    assert hand[3] == 21 and hand[6] == 17


def test_scores_by_hand_choose_the_triplets_of_the_whole_model():
    """S_k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk), s = Ibar U, number by number over a run: with
    the weights before the step and the gradient of the whole loss, from the first step to the last
    allocation. The b(t) largest stay."""
    model, layers, optimizer, first = adapted(15)
    means = {}  # {(layer, factor): (Ibar, U)}
    for step in range(1, 16):
        optimizer.zero_grad()
        model(*tokens())[1].backward()
        layers[0].before_step(layers, step)
        by_hand = []
        for i, layer in enumerate(layers):
            s = {}
            for name in "AEB":
                w = getattr(layer, f"lora_{name}")
                Ibar, U = means.get((i, name), (0 * w, 0 * w))
                if step <= first:
                    importance = (w * w.grad).abs()
                    Ibar = 0.85 * Ibar + 0.15 * importance
                    means[i, name] = Ibar, 0.85 * U + 0.15 * (importance - Ibar).abs()
                s[name] = (means[i, name][0] * means[i, name][1]).tolist()
            by_hand += [E[0] + sum(A) / 16 + sum(B) / 16 for E, A, B in zip(
                s["E"], s["A"], zip(*s["B"], strict=True), strict=True)]
        found = torch.cat([layer.scores() for layer in layers]).tolist()
        assert found == pytest.approx(by_hand, rel=1e-9, abs=0) and min(found) > 0
        optimizer.step()
        layers[0].after_step(layers, step)
        chosen = sorted(range(24), key=by_hand.__getitem__)[-budget(layers, step):]
        masks = torch.cat([layer.mask[:, 0] for layer in layers])
        if step in (4, 6, 8, 10, 11):
            assert masks.nonzero()[:, 0].tolist() == sorted(chosen)


def test_ranks_may_come_back_until_the_choice_is_final():
    """After an allocation b(t) triplets are there, and all again one step later, some of them for
    good; from T - t_f on the choice stands. Layers end with different ranks."""
    model, layers, optimizer, first = adapted(31)
    chosen = {}
    for step in range(1, 32):
        one_step(model, layers, optimizer, step, tokens(8))
        alive = torch.cat([layer.lora_E[:, 0] != 0 for layer in layers])
        assert alive.sum() == (budget(layers, step) if step % 2 == 0 or step >= first else 24)
        if step % 2 == 0 or step >= first:
            chosen[step] = set(alive.nonzero()[:, 0].tolist())
            assert step < 4 or alive.sum() == sum(AdaLoRALinear.ranks(layers))
        for layer in layers:  # an export has the triplets that have come back
            A, B = layer.as_lora()
            assert close(layer.scaling * B @ A, layer.delta())
    assert any(chosen[step + 2] - chosen[step] for step in range(4, first - 2, 2))
    assert all(chosen[step] == chosen[first] for step in range(first, 32))
    ranks = AdaLoRALinear.ranks(layers)
    assert len(set(ranks)) > 1 and ranks == [len(layer.as_lora()[0]) for layer in layers]


def test_the_loss_has_the_orthogonality_term():
    """The gradient that the optimizer sees in every step is that of C + gamma sum of O, by autograd
    over both."""
    model, layers, _, _ = adapted(20)
    for p in factors(layers):
        nn.init.normal_(p, std=0.3)
    some = tokens()

    def O(layer):  # noqa: E743
        A, B, one = layer.lora_A, layer.lora_B, torch.eye(3)
        return sum(torch.trace(M @ M.T) for M in (A @ A.T - one, B.T @ B - one))
    whole = torch.autograd.grad(model(*some)[1] + 0.1 * sum(map(O, layers)), factors(layers))
    for step in (1, 2):
        model.zero_grad()
        model(*some)[1].backward()
        layers[0].before_step(layers, step)
        assert all(close(p.grad, g) for p, g in zip(factors(layers), whole, strict=True))


def test_numbers_that_do_not_fit_are_refused():
    """Phases longer than the run; a start below the target; a rank or a cut beyond the linear's; a
    rank that leaves LoKr none to stabilise."""
    layer = AdaLoRALinear(linear(), 4, 6, budget_warmup=6, budget_final=4)
    with pytest.raises(ValueError, match="budget_warmup 6 and budget_final 4 .* in a run of 10"):
        layer.begin([layer], 10)
    for adapter, r, own, message in (
            *((AdaLoRALinear, 4, {name: value}, f"{name} {value}") for name, value in (
                ("init_rank", 3), ("init_rank", 13), ("init_rank", 4.5), ("orth", math.nan),
                ("orth", -1.0), ("budget_every", 0), ("budget_every", 1.5), ("budget_final", -1))),
            (AdaLoRALinear, 13, {}, r"rank 13 is not in 1\.\.12"),
            *((DyLoRALinear, 4, dict(cut=cut), rf"cut {named} is not in 1\.\.4") for cut, named in (
                (0, 0), (5, 5), ([2, 5], 5), ([2.5], 2.5), ([True], True))),
            (rank_stabilised(LoKrLinear), 4, {}, "rank 4 makes both .* full .* must be below 3")):
        with pytest.raises(ValueError, match=message):
            adapter(linear(), r, 6, **own)
    starts = [AdaLoRALinear(linear(), r, 6).init_rank for r in (1, 4, 5, 10, 12)]
    assert starts == [2, 6, 8, 12, 12]
    for r, cut, merges in ((6, None, [6, 1, 2, 4]), (8, 2, [2]), (8, [4, 1], [4, 1])):
        assert DyLoRALinear(linear(), r, 6, cut=cut).merges == merges
    for adapter in (AdaLoRALinear, DyLoRALinear):
        with pytest.raises(RuntimeError, match="call begin first"):
            adapter.before_step([adapter(linear(), 2, 6)], 1)


# DyLoRA's ranks

@pytest.mark.parametrize("frozen", [False, True])
def test_ranks_that_were_not_drawn_rest_whatever_the_optimizer_does(frozen):
    """Momentum and weight decay move no slice beyond b, and with `frozen` none but the b-th, bit
    for bit; the drawn ones move. One b serves the whole model."""
    model = tiny_gpt()
    layers = adapt(model, "dylora", dict(frozen=frozen), r=4)
    optimizer = torch.optim.AdamW(factors(layers), 1e-2, weight_decay=0.5)
    layers[0].begin(layers, 20)
    drawn = set()
    for step in range(1, 21):
        b, = {layer.b for layer in layers}
        drawn.add(b)
        before = [(layer.lora_A.clone(), layer.lora_B.clone()) for layer in layers]
        one_step(model, layers, optimizer, step, tokens())
        for layer, (A, B) in zip(layers, before, strict=True):
            moved = {k for k in range(4) if not (torch.equal(layer.lora_A[k], A[k])
                                                 and torch.equal(layer.lora_B[:, k], B[:, k]))}
            assert moved == ({b - 1} if frozen else set(range(b)))
    assert drawn == {1, 2, 3, 4}


def test_the_draws_are_uniform_and_belong_to_the_step():
    """b over 2,000 steps; a run that begins at step 1,000 draws as one that has come there; another
    seed differs."""
    def draws(seed, done):
        torch.manual_seed(seed)
        layer = DyLoRALinear(linear(), 4, 6)
        layer.begin([layer], 2000, done)
        found = []
        for step in range(done + 1, 2001):
            found.append(layer.b)
            layer.before = layer.lora_A.clone(), layer.lora_B.clone()
            layer.after_step([layer], step)
        return found
    whole = draws(0, 0)
    assert all(440 < whole.count(b) < 560 for b in range(1, 5))
    assert draws(0, 1000) == whole[1000:] and draws(1, 0) != whole


def test_frozen_has_the_gradient_of_its_rank_alone():
    """The gradient of the b-th rank is the unfrozen one's."""
    grads, x = [], torch.randn(5, 12, dtype=torch.float64)
    for frozen in (False, True):
        torch.manual_seed(0)
        layer = filled(DyLoRALinear(linear(), 4, 6, frozen=frozen)).train()
        layer.begin([layer], 10)
        layer.draw(3)
        layer(x).square().sum().backward()
        layer.before_step([layer], 1)
        grads.append((layer.lora_A.grad, layer.lora_B.grad.T))
    for other, one in zip(*grads, strict=True):
        assert torch.equal(one[2], other[2]) and other[:2].any(1).all()
        assert not other[3].any() and not one[:2].any()


def test_a_layer_that_a_step_does_not_use_is_no_trouble():
    """Without a gradient importance rests, ranks are put back as they were."""
    for layer in (AdaLoRALinear(linear(), 2, 6), DyLoRALinear(linear(), 2, 6, frozen=True)):
        layer.orth = 0
        layer.begin([layer], 10)
        layer.before_step([layer], 1)
        before = {name: p.clone() for name, p in layer.named_parameters()}
        layer.after_step([layer], 1)
        assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_rank_stabilised_methods_scale_by_the_root():
    """AdaLoRA by the root of the target rank, DyLoRA of b, LoHa and LoKr of r; LoRA is rsLoRA."""
    assert RsLoRALinear(linear(), 4, 6).scaling == 3
    for adapter in (LoRALinear, AdaLoRALinear, LoHaLinear, LoKrLinear):
        assert rank_stabilised(adapter)(linear(100, 100), 4, 6).scaling == 3, adapter
    layer = rank_stabilised(DyLoRALinear)(linear(), 9, 6)
    assert layer.scaling == 2
    layer.draw(4)
    assert layer.s_b.tolist() == [3] * 4 + [0] * 5
    layer.cut_at(1)
    assert layer.scaling == 6


def test_what_a_method_trains():
    """Trained numbers at r = 8 of a linear of 768 -> 768."""
    for adapter, count in ((LoRALinear, 8 * 1536), (AdaLoRALinear, 12 * 1536 + 12),
                           (DyLoRALinear, 8 * 1536), (LoHaLinear, 16 * 1536),
                           (LoKrLinear, 24 * 24 + 16 * 32)):
        model = nn.ModuleDict({"q": nn.Linear(768, 768)})
        layers = lora.apply(model, adapter, ["q"], r=8, alpha=16)
        assert sum(p.numel() for p in factors(layers)) == count, adapter
