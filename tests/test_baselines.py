"""AdaLoRA, DyLoRA, LoHa and LoKr beside their papers' lines by hand and beside PEFT."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import adapt, factors, one_step, tiny_gpt, tokens, train_steps

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


# The forward and the delta are the paper's

def test_adalora_is_an_svd_by_hand():
    """h = W x + b + s B diag(E) A x with s = alpha / r of the target rank, and delta = s sum_k B_k E_k A_k."""
    layer, x = filled(AdaLoRALinear(linear(), r=4, alpha=6, init_rank=5)), torch.randn(7, 12, dtype=torch.float64)
    A, E, B = layer.lora_A, layer.lora_E[:, 0], layer.lora_B
    assert A.shape == (5, 12) and B.shape == (18, 5)
    update = 6 / 4 * sum(torch.outer(B[:, k], A[k]) * E[k] for k in range(5))
    assert close(layer(x), x @ (layer.weight + update).T + layer.bias) and close(layer.delta(), update)


@pytest.mark.parametrize("b", [1, 2, 5])
def test_dylora_at_rank_b_by_hand(b):
    """h = W x + b + alpha / b times the first b ranks, in training at the drawn b, in evaluation at r or a cut."""
    layer, x = filled(DyLoRALinear(linear(), r=5, alpha=6)), torch.randn(7, 12, dtype=torch.float64)
    update = 6 / b * sum(torch.outer(layer.lora_B[:, k], layer.lora_A[k]) for k in range(b))
    h = x @ (layer.weight + update).T + layer.bias
    assert close(layer(x), h) == (b == 5)
    layer.train().draw(b)
    assert close(layer(x), h)
    layer.eval().cut_at(b)
    assert close(layer(x), h) and close(layer.delta(), update)
    A, B = layer.as_lora()
    assert len(A) == b and close(layer.scaling * B @ A, update)


@pytest.mark.parametrize("r", [3, 4])
def test_loha_by_hand(r):
    """The forward sums over pairs as long as r^2 is below the sides, delta multiplies element by element: both are
    (W1a W1b) o (W2a W2b), of rank r^2."""
    layer, x = filled(LoHaLinear(linear(), r, alpha=2 * r)), torch.randn(7, 12, dtype=torch.float64)
    a1, b1, a2, b2 = layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b
    update = torch.stack([torch.stack([2 * (a1[i] @ b1[:, j]) * (a2[i] @ b2[:, j]) for j in range(12)])
                          for i in range(18)])
    assert close(layer(x), x @ (layer.weight + update).T + layer.bias) and close(layer.delta(), update)
    assert torch.linalg.matrix_rank(update) == min(r**2, 12)
    A, B = layer.as_lora()
    assert len(A) == r**2 and close(2 * B @ A, update)


@pytest.mark.parametrize("r, low", [(2, True), (3, False)])
def test_lokr_by_hand(r, low):
    """Block (i, j) of the update is s W1_ij W2, with W2 in two factors below half of its larger side, else whole."""
    layer, x = filled(LoKrLinear(linear(), r, alpha=6)), torch.randn(7, 12, dtype=torch.float64)
    assert (layer.lokr_w2 is None) == low
    W2 = layer.lokr_w2_a @ layer.lokr_w2_b if low else layer.lokr_w2
    assert layer.lokr_w1.shape == (3, 3) and W2.shape == (6, 4)
    update = torch.cat([torch.cat([6 / r * layer.lokr_w1[i, j] * W2 for j in range(3)], 1) for i in range(3)])
    assert close(layer(x), x @ (layer.weight + update).T + layer.bias) and close(layer.delta(), update)
    A, B = layer.as_lora()
    assert close(layer.scaling * B @ A, update)


def test_divisors_are_as_near_to_each_other_as_can_be():
    """768 = 24 * 32; a prime has only 1 and itself."""
    assert [divisors(d) for d in (768, 1024, 3072, 128, 127, 1)] == [(24, 32), (32, 32), (48, 64), (8, 16), (1, 127),
                                                                      (1, 1)]


@pytest.mark.parametrize("adapter, own, zero, stds", [
    (AdaLoRALinear, dict(init_rank=96), "lora_E", dict(lora_A=0.02, lora_B=0.02)),
    (DyLoRALinear, {}, "lora_B", dict(lora_A=1 / math.sqrt(3 * 576))),
    (LoHaLinear, {}, "hada_w2_a", dict(hada_w1_a=1 / math.sqrt(3 * 64), hada_w1_b=1 / math.sqrt(3 * 576),
                                       hada_w2_b=1 / math.sqrt(3 * 576))),
    (LoKrLinear, {}, "lokr_w1", dict(lokr_w2=1 / math.sqrt(3 * 24)))])
def test_where_training_starts(adapter, own, zero, stds):
    """One factor is zero; the others have the spread that the file says: U(-1, 1) / sqrt(n) has 1 / sqrt(3 n)."""
    layer = adapter(nn.Linear(576, 400), 64, 16, **own)
    trained = {name: p for name, p in layer.named_parameters() if name not in ("weight", "bias")}
    assert trained.keys() == {zero, *stds} and not trained[zero].any()
    for name, std in stds.items():
        assert trained[name].std().item() == pytest.approx(std, rel=0.05), name


def test_lokr_starts_its_small_factors_like_loras_A():
    """W2a (c, r) within 1 / sqrt(r), W2b (r, d) within 1 / sqrt(d)."""
    layer = LoKrLinear(nn.Linear(10000, 10000), 40, 16)
    for p, n in ((layer.lokr_w2_a, 40), (layer.lokr_w2_b, 100)):
        assert p.abs().max() <= n**-0.5 and p.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.05)


def test_dropout_falls_on_the_input_of_the_update_only():
    """Of every method here, as of LoRA: in training W x + b is untouched."""
    for adapter in (AdaLoRALinear, DyLoRALinear, LoHaLinear, LoKrLinear):
        layer, x = filled(adapter(linear(), r=2, alpha=6, dropout=0.5)).train(), torch.randn(7, 12, dtype=torch.float64)
        torch.manual_seed(3)
        h = layer(x)
        torch.manual_seed(3)
        assert close(h, x @ layer.weight.T + layer.bias + nn.functional.dropout(x, 0.5) @ layer.delta().T)


# PEFT, on copied factors

def peft_layer(config, layer):
    """PEFT's layer of the same shape with our factors, W and b in it."""
    peft = pytest.importorskip("peft", reason="the oracle; pip install -r requirements-dev.txt")
    model = nn.Sequential()
    model.add_module("q", nn.Linear(*layer.weight.shape[::-1]).double())
    model = peft.get_peft_model(model, getattr(peft, config.pop("kind"))(target_modules=["q"], **config)).double()
    theirs = model.base_model.model.q
    theirs.base_layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    for name, p in layer.named_parameters():
        if name not in ("weight", "bias"):
            getattr(theirs, name)["default"].data.copy_(p)
    return theirs, model


@pytest.mark.parametrize("adapter, kind, r", [(LoHaLinear, "LoHaConfig", 3), (LoKrLinear, "LoKrConfig", 2),
                                              (LoKrLinear, "LoKrConfig", 4)])
def test_loha_and_lokr_are_pefts_on_the_same_factors(adapter, kind, r):
    """Forward and delta agree to 1e-6."""
    layer, x = filled(adapter(linear(), r, alpha=6)), torch.randn(7, 12, dtype=torch.float64)
    theirs, model = peft_layer(dict(kind=kind, r=r, alpha=6), layer)
    assert close(theirs.get_delta_weight("default"), layer.delta(), 1e-6)
    assert close(model.eval()(x), layer(x), 1e-6)


def test_adalora_is_pefts_after_its_constants():
    """PEFT scales by alpha / (R + 1e-5) and takes the mean of the unsquared norms; ours alpha / r and squares."""
    layer = filled(AdaLoRALinear(linear(), r=4, alpha=6, init_rank=5))
    theirs, model = peft_layer(dict(kind="AdaLoraConfig", init_r=5, target_r=4, lora_alpha=6, total_step=10,
                                    orth_reg_weight=0.5), layer)
    factor = (6 / 4) / (6 / (5 + 1e-5))
    assert close(factor * theirs.get_delta_weight("default"), layer.delta(), 1e-6)

    class Output:
        loss = torch.zeros((), dtype=torch.float64)
    model.base_model.model.forward = lambda: Output()  # PEFT adds its term to the loss of what the model returns
    mean_norm = model.base_model.forward().loss / 0.5
    A, B, one = layer.lora_A, layer.lora_B, torch.eye(5)
    norms = [(A @ A.T - one).norm(), (B.T @ B - one).norm()]
    assert close(mean_norm, sum(norms) / 2, 1e-6)
    assert close(layer.orthogonality(), sum(norm**2 for norm in norms), 1e-6)


def test_the_importance_of_triplets_is_pefts():
    """Two EMAs over three steps of weights and gradients, then the masks of three budgets, as PEFT's allocator sets
    them. (It keeps the means of A and B summed with E's score, as the paper does.)"""
    layer = filled(AdaLoRALinear(linear(), r=2, alpha=6, init_rank=6))
    theirs, model = peft_layer(dict(kind="AdaLoraConfig", init_r=6, target_r=2, lora_alpha=6, total_step=10), layer)
    allocator = model.base_model.rankallocator
    layer.orth = 0
    AdaLoRALinear.begin([layer], 100)
    for step in range(1, 4):
        for name in ("lora_A", "lora_E", "lora_B"):
            p, q = getattr(layer, name), getattr(theirs, name)["default"]
            p.data.add_(torch.randn_like(p))
            q.data.copy_(p)
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        allocator.update_ipt(model)
        AdaLoRALinear.before_step([layer], step)
        for name in "AEB":  # PEFT's keys are the names of its parameters
            theirs_of = [next(t for key, t in kept.items() if f"lora_{name}" in key)
                         for kept in (allocator.exp_avg_ipt, allocator.exp_avg_unc)]
            assert close(getattr(layer, f"Ibar_{name}"), theirs_of[0])
            assert close(getattr(layer, f"U_{name}"), theirs_of[1])
    for left in (5, 3, 1):
        scores = layer.scores()
        allocator.mask_to_budget(model, left)
        kept = theirs.lora_E["default"][:, 0] != 0
        assert set(scores.topk(left).indices.tolist()) == set(kept.nonzero()[:, 0].tolist())
        theirs.lora_E["default"].data.copy_(layer.lora_E)


# AdaLoRA's budget

def adapted(steps, **own):
    model = tiny_gpt()
    own = dict(budget_warmup=3, budget_final=4, budget_every=2, orth=0.1, **own)
    layers = adapt(model, "adalora", own, r=2, random=False)
    first = layers[0].begin(layers, steps)
    return model, layers, torch.optim.AdamW(factors(layers), 1e-2), first


def test_the_budget_falls_as_a_cube_and_ends_at_the_target():
    """b(t) of the paper with n = 8 layers, R = 3, r = 2, by hand: 24 for t <= t_i, 16 from T - t_f on."""
    _, layers, _, first = adapted(15)
    assert first == 11
    hand = [24] * 3 + [16 + math.floor(8 * (1 - (t - 3) / 8) ** 3) for t in range(4, 11)] + [16] * 5
    assert [budget(layers, t) for t in range(1, 16)] == hand
    assert hand[3] == 21 and hand[6] == 17


def test_ranks_go_one_by_one_may_come_back_and_stand_at_the_end():
    """After an allocation the model has exactly b(t) triplets; others revive with the next step; from T - t_f on the
    choice is the same and what was not chosen stays zero. Layers end with different ranks."""
    model, layers, optimizer, first = adapted(31)
    revived, before, last = False, None, []
    for step in range(1, 32):
        one_step(model, layers, optimizer, step, tokens(8))
        alive = torch.cat([layer.lora_E[:, 0] != 0 for layer in layers])
        if 3 < step <= first and (step % 2 == 0 or step == first):
            assert alive.sum() == sum(AdaLoRALinear.ranks(layers)) == budget(layers, step)
            if before is not None:
                revived |= bool((alive & ~before).any())
            before = alive
        elif 3 < step < first:
            assert alive.sum() == 24  # the gradient of E does not know the mask
            for layer in layers:
                A, B = layer.as_lora()
                assert close(layer.scaling * B @ A, layer.delta())  # revived triplets count
        if step >= first:
            last.append(alive)
            assert alive.sum() == 16
    assert revived and all(torch.equal(last[0], x) for x in last)
    assert len(set(AdaLoRALinear.ranks(layers))) > 1
    assert AdaLoRALinear.ranks(layers) == [len(layer.as_lora()[0]) for layer in layers]


def test_importance_is_seen_from_the_first_step_to_the_last_allocation():
    """Ibar of E by hand, with the weights before the step, through the warm-up up to T - t_f, and not later."""
    model, layers, optimizer, first = adapted(15)
    hand, seen = torch.zeros(3, 1), []
    for step in range(1, 16):
        if step > 1:
            optimizer.zero_grad()
        model(*tokens())[1].backward()
        E = layers[0].lora_E
        if step <= first:
            hand = 0.85 * hand + 0.15 * (E * E.grad).detach().abs()
        layers[0].before_step(layers, step)
        optimizer.step()
        layers[0].after_step(layers, step)
        assert close(layers[0].Ibar_E, hand) or not hand.any()
        seen.append(layers[0].Ibar_E.clone())
    assert first == 11 and seen[1].any() and not torch.equal(seen[9], seen[10]) and torch.equal(seen[10], seen[14])


def test_the_loss_has_the_orthogonality_term():
    """The gradient that the optimizer sees in every step is that of C + gamma sum of O, by autograd over both."""
    model, layers, _, _ = adapted(20)
    for p in factors(layers):
        nn.init.normal_(p, std=0.3)
    some = tokens()

    def O(layer):  # noqa: E743
        A, B, one = layer.lora_A, layer.lora_B, torch.eye(3)
        return torch.trace((A @ A.T - one) @ (A @ A.T - one).T) + torch.trace((B.T @ B - one) @ (B.T @ B - one).T)
    whole = torch.autograd.grad(model(*some)[1] + 0.1 * sum(map(O, layers)), factors(layers))
    for step in (1, 2):
        model.zero_grad()
        model(*some)[1].backward()
        layers[0].before_step(layers, step)
        assert all(close(p.grad, g) for p, g in zip(factors(layers), whole, strict=True))


def test_training_makes_the_factors_orthonormal():
    """With a term that is strong enough, A A^T and B^T B are nearly I after some steps, and without it they are not."""
    def distance(orth):
        torch.manual_seed(0)
        model = tiny_gpt()
        layers = adapt(model, "adalora", dict(orth=orth), r=2, random=False)
        train_steps(model, layers, 60, lr=3e-2)
        return sum(layer.orthogonality().item() for layer in layers) / len(layers)
    assert distance(1.0) < 0.1 < 1 < distance(0.0)


def test_a_budget_that_does_not_fit_is_refused():
    """Phases longer than the run; a start below the target; bad numbers."""
    layer = AdaLoRALinear(linear(), 4, 6, budget_warmup=6, budget_final=4)
    with pytest.raises(ValueError, match="budget_warmup 6 and budget_final 4 leave no step .* in a run of 10"):
        layer.begin([layer], 10)
    for own, message in ((dict(init_rank=3), "init_rank 3 is not in 4..12"), (dict(init_rank=13), "init_rank 13"),
                         (dict(orth=-1.0), "orth -1.0"), (dict(orth=math.nan), "orth nan"),
                         (dict(budget_every=0), "budget_every 0"), (dict(budget_final=-1), "budget_final -1"),
                         (dict(budget_every=1.5), "budget_every 1.5"), (dict(init_rank=4.5), "init_rank 4.5")):
        with pytest.raises(ValueError, match=message):
            AdaLoRALinear(linear(), 4, 6, **own)
    assert [AdaLoRALinear(linear(), r, 6).init_rank for r in (1, 4, 5, 10, 12)] == [2, 6, 8, 12, 12]
    with pytest.raises(ValueError, match="rank 13 is not in 1..12"):
        AdaLoRALinear(linear(), 13, 6)


# DyLoRA's ranks

@pytest.mark.parametrize("frozen", [False, True])
def test_ranks_that_were_not_drawn_rest_whatever_the_optimizer_does(frozen):
    """Momentum and weight decay move no slice beyond b, and with `frozen` none but the b-th, bit for bit; the drawn
    ones move. One b serves the whole model."""
    model = tiny_gpt()
    layers = adapt(model, "dylora", dict(frozen=frozen), r=4)
    optimizer = torch.optim.AdamW(factors(layers), 1e-2, weight_decay=0.5)
    layers[0].begin(layers, 40)
    drawn = set()
    for step in range(1, 41):
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
    """b over 2,000 steps; a run that begins at step 1,000 draws as one that has come there; another seed differs."""
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
    """The forward is that of b ranks; the gradient of the b-th rank is the unfrozen one's."""
    grads = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        layer, x = filled(DyLoRALinear(linear(), 4, 6, frozen=frozen)).train(), torch.randn(5, 12, dtype=torch.float64)
        layer.begin([layer], 10)
        layer.draw(3)
        layer(x).square().sum().backward()
        layer.before_step([layer], 1)
        grads[frozen] = layer.lora_A.grad.clone(), layer.lora_B.grad.T.clone()
    for one, other in zip(grads[True], grads[False], strict=True):
        assert torch.equal(one[2], other[2]) and other[:2].any() and not other[3].any() and not one[:2].any()


def test_a_cut_beyond_the_ranks_is_refused():
    """1..r."""
    for cut, named in ((0, 0), (5, 5), ([2, 5], 5), ([2.5], 2.5), ([True], True)):
        with pytest.raises(ValueError, match=rf"cut {named} is not in 1\.\.4"):
            DyLoRALinear(linear(), 4, 6, cut=cut)
    assert DyLoRALinear(linear(), 6, 6).merges == [6, 1, 2, 4]
    assert DyLoRALinear(linear(), 8, 6, cut=2).merges == [2]
    assert DyLoRALinear(linear(), 8, 6, cut=[4, 1]).merges == [4, 1]


@pytest.mark.parametrize("adapter", [AdaLoRALinear, DyLoRALinear])
def test_a_loop_that_forgets_to_begin_is_told_so(adapter):
    """A budget needs the length of the run, draws need a seed."""
    with pytest.raises(RuntimeError, match="call begin first"):
        adapter.before_step([adapter(linear(), 2, 6)], 1)


def test_a_layer_that_a_step_does_not_use_is_no_trouble():
    """Without a gradient importance rests, ranks are put back as they were."""
    for layer in (AdaLoRALinear(linear(), 2, 6), DyLoRALinear(linear(), 2, 6, frozen=True)):
        layer.orth = 0
        layer.begin([layer], 10)
        layer.before_step([layer], 1)
        before = {name: p.clone() for name, p in layer.named_parameters()}
        layer.after_step([layer], 1)
        assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


# rsLoRA inside the others

def test_rank_stabilised_methods_scale_by_the_root():
    """AdaLoRA by the root of the target rank, DyLoRA by that of b, LoHa and LoKr of r; LoRA becomes rsLoRA."""
    assert rank_stabilised(LoRALinear)(linear(), 4, 6).scaling == RsLoRALinear(linear(), 4, 6).scaling == 3
    assert rank_stabilised(AdaLoRALinear)(linear(), 4, 6).scaling == 3
    assert rank_stabilised(LoHaLinear)(linear(), 4, 6).scaling == 3
    assert rank_stabilised(LoKrLinear)(linear(100, 100), 4, 6).scaling == 3
    layer = rank_stabilised(DyLoRALinear)(linear(), 9, 6)
    assert layer.scaling == 2
    layer.draw(4)
    assert layer.s_b.tolist() == [3] * 4 + [0] * 5
    layer.cut_at(1)
    assert layer.scaling == 6


def test_lokr_with_both_factors_full_has_no_rank_to_stabilise():
    """It is refused with the rank that would have one."""
    with pytest.raises(ValueError, match="rank 4 makes both factors of LoKr full .* must be below 3"):
        rank_stabilised(LoKrLinear)(linear(), 4, 6)


def test_every_method_leaves_the_same_number_of_parameters_to_count_on():
    """Trained numbers at r = 8 of a linear of 768 -> 768: what the README's table says."""
    count = {}
    for name, adapter in (("lora", LoRALinear), ("adalora", AdaLoRALinear), ("dylora", DyLoRALinear),
                          ("loha", LoHaLinear), ("lokr", LoKrLinear)):
        layer = lora.apply(nn.ModuleDict({"q": nn.Linear(768, 768)}), adapter, ["q"], r=8, alpha=16)
        count[name] = sum(p.numel() for p in factors(layer))
    assert count == dict(lora=8 * 1536, adalora=12 * 1536 + 12, dylora=8 * 1536, loha=16 * 1536, lokr=24 * 24 + 16 * 32)
