"""alpha is the learning rate of B: which methods are one and the same under Adam, and what breaks
that."""
import math

import pytest
import torch
from conftest import adapt, batch, every_model, tiny_gpt, tiny_roberta, unscaled
from test_train import command, few_records, refused  # noqa: F401

import generate
import train
from methods import METHODS
from run import folder

STEPS, R, ALPHA, RATE = 30, 3, 4.0, "1e-2"
ADAM = "--weight-decay 0 --clip 0"  # and eps -> 0
SGD = "--optimizer sgd --weight-decay 0 --clip 0"


def trained(tiny, method="lora", own=None, alpha=ALPHA, flags=ADAM, eps=1e-30):
    """Thirty steps of train.py's loop in float64, warm-up and decay of the rate included: the
    losses and the logits."""
    torch.manual_seed(0)
    model = tiny()
    some = batch(model)
    layers = adapt(model, method, own or {}, r=R, alpha=alpha, random=False)
    args = train.parse(["--lr", RATE, *flags.split(), "--device", "cpu", "--dtype", "float32",
                        "--steps", str(STEPS)])
    train.set_ratio(layers, args.lr_ratio)
    optimizer = train.make_optimizer(model, args)
    losses = []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, args) * group["lr_scale"]
            group["eps"] = eps
        params = [p for p in model.parameters() if p.requires_grad]
        losses.append(train.one_step(model, params, optimizer, unscaled(), METHODS[method].adapter,
                                     layers, [(*some, 1.0)], step, args)[0])
    assert losses[-1] < losses[0]
    return torch.cat([torch.stack(losses), model(some[0])[0].flatten()]).detach()


def apart(a, b):
    return (a - b).abs().max().item()


@every_model
def test_under_adam_c_alpha_is_a_rate_of_B_that_is_c_times_that_of_A(tiny):
    """LoRA with 3 alpha is LoRA with alpha and ratio 3; it is not LoRA with 3 times the rate."""
    scaled = trained(tiny, alpha=3 * ALPHA)
    assert apart(scaled, trained(tiny, flags=f"{ADAM} --lr-ratio 3")) < 1e-12
    assert apart(scaled, trained(tiny, flags=f"{ADAM} --lr 3e-2")) > 1e-3


@every_model
def test_under_adam_rslora_is_a_ratio_of_sqrt_r(tiny):
    """rsLoRA is LoRA whose B learns sqrt(r) times as fast as A."""
    assert apart(trained(tiny, "rslora"),
                 trained(tiny, flags=f"{ADAM} --lr-ratio {math.sqrt(R)!r}")) < 1e-12


@every_model
def test_under_adam_delta_lora_from_the_first_step_is_a_ratio_of_1_plus_lambda(tiny):
    """K = 0, lambda 2 is LoRA with 3 alpha, which is ratio 3; with K = 1 it is another method."""
    ratio = trained(tiny, flags=f"{ADAM} --lr-ratio 3")
    assert apart(trained(tiny, "deltalora", dict(delta_lambda=2.0, delta_start=0)), ratio) < 1e-12
    assert apart(trained(tiny, "deltalora", dict(delta_lambda=2.0, delta_start=1)), ratio) > 1e-3


@every_model
def test_under_sgd_c_alpha_is_a_ratio_of_c_squared(tiny):
    """A step of SGD is as long as the gradient: LoRA with 3 alpha is ratio 9, and not 3."""
    scaled = trained(tiny, alpha=3 * ALPHA, flags=SGD)
    assert apart(scaled, trained(tiny, flags=f"{SGD} --lr-ratio 9")) < 1e-12
    assert apart(scaled, trained(tiny, flags=f"{SGD} --lr-ratio 3")) > 1e-6


def test_under_sgd_delta_lora_from_the_first_step_is_lora_with_more_alpha_at_a_smaller_rate():
    """Its gradients lack the factor 1 + lambda, so both rates are divided by it."""
    delta = trained(tiny_gpt, "deltalora", dict(delta_lambda=2.0, delta_start=0),
                    flags=f"{SGD} --lr 3e-2")
    assert apart(delta, trained(tiny_gpt, alpha=3 * ALPHA, flags=f"{SGD} --lr 1e-2")) < 1e-12


@pytest.mark.parametrize("flags, eps",
                         [("--weight-decay 0 --clip 0.1", 1e-30),
                          ("--weight-decay 0.1 --clip 0", 1e-30), (ADAM, 1e-3)],
                         ids=["clip", "decay", "eps"])
def test_clipping_decay_and_eps_break_the_identity(flags, eps):
    """Each of them sees the size of B or of its gradient."""
    scaled = trained(tiny_gpt, alpha=3 * ALPHA, flags=flags, eps=eps)
    assert apart(scaled, trained(tiny_gpt, flags=f"{flags} --lr-ratio 3", eps=eps)) > 1e-4


def test_a_limit_of_clipping_1_plus_lambda_times_smaller_restores_delta_lora_s_identity():
    """Both its gradients are 1 + lambda times smaller than those of LoRA with (1 + lambda) alpha.
    With c alpha and a ratio of c only B's is, so no limit restores that. (torch adds 1e-6 to the
    norm that it clips: hence no 1e-12.)"""
    own = dict(delta_lambda=2.0, delta_start=0)
    scaled = trained(tiny_gpt, alpha=3 * ALPHA, flags="--weight-decay 0 --clip 0.3")
    assert apart(scaled, trained(tiny_gpt, "deltalora", own,
                                 flags="--weight-decay 0 --clip 0.1")) < 1e-6
    assert apart(scaled, trained(tiny_gpt, "deltalora", own,
                                 flags="--weight-decay 0 --clip 0.3")) > 1e-2
    for limit in (0.1, 0.2, 0.3, 0.9):
        assert apart(scaled, trained(tiny_gpt,
                                     flags=f"--weight-decay 0 --clip {limit} --lr-ratio 3")) > 1e-2


# The flag

def test_the_ratio_is_that_of_B_over_A_and_a_head_learns_at_the_rate():
    """Every lora_B has ratio times --lr, every other parameter --lr, a head's too; decay stays on
    matrices only."""
    model = tiny_roberta()
    layers = adapt(model, "lora", {})
    args = train.parse("--lr 1e-3 --lr-ratio 16 --weight-decay 0.1 --device cpu".split())
    train.set_ratio(layers, args.lr_ratio)
    groups = train.make_optimizer(model, args).param_groups
    rates = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups
             for p in group["params"]}
    for layer in layers:
        assert rates.pop(id(layer.lora_B)) == (16, 0.1) and rates.pop(id(layer.lora_A)) == (1, 0.1)
    assert len(rates) == len(list(model.classifier.parameters()))
    assert {scale for scale, _ in rates.values()} == {1}


def test_a_ratio_is_resumed_and_named(tmp_path, base):
    """result.json has it, the default folder's name has it, --resume keeps it without the flag, and
    the resumed run has the weights of the uninterrupted one, which are not those of ratio 1;
    generate.py reads the run."""
    flags = ["--method", "lora", "--lr-ratio", "16", "--steps", "6", "--eval-every", "2"]
    whole = train.main(command(base, tmp_path / "whole", *flags))
    assert whole["settings"]["lr_ratio"] == 16
    assert train.parse(["--lr-ratio", "16"]).out.name == "restaurants-lora-r8-ratio16-s0"
    assert train.parse([]).out.name == "restaurants-lora-r8-s0"

    def stop(path, model, optimizer, step, *rest, real=folder.save_state):
        real(path, model, optimizer, step, *rest)
        if step == 4:
            raise KeyboardInterrupt
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(folder, "save_state", stop)
        train.main(command(base, part, *flags))
    resumed = train.main(["--resume", "--out", str(part)])
    assert resumed["metrics"] == whole["metrics"]
    plain = train.main(command(base, tmp_path / "plain", *flags[:2]))
    assert plain["settings"]["lr_ratio"] == 1 and plain["metrics"] != whole["metrics"]
    generate.load_run(part)


@pytest.mark.parametrize("method", ["loha", "lokr", "full"])
def test_methods_without_A_and_B_refuse_a_ratio(tmp_path, base, method, capsys):
    """One line and exit code 2, and nothing is written."""
    assert "this method has no factors A and B" in refused(
        capsys, command(base, tmp_path / "run", "--method", method, "--lr-ratio", "4"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, K",
                         [("--steps 50", 3), ("--steps 5", 1), ("--steps 50 --warmup 0", 1),
                          ("--steps 50 --warmup 0.19", 9), ("--steps 50 --warmup 7", 7)])
def test_K_is_the_end_of_the_warm_up(tmp_path, base, flags, K):
    """Delta-LoRA's W moves from the step after the warm-up on: 6 % of 50 steps are 3. It is at
    least 1, or the run would be LoRA with another alpha."""
    run = train.Run(train.parse([*command(base, tmp_path, "--method", "deltalora"),
                                 *flags.split()]))
    assert (run.settings.method_flags["delta_start"] == run.identity["delta_start"] == K
            == run.layers[0].delta_start)
