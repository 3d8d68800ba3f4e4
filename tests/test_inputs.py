"""Input attacks against closed forms on linear models and against the published loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from reference import inputs as ref
from reference.nets import CLASSES, conv_bn, images, mlp
from torch import Tensor, nn

import robustflat as rf
from robustflat import Ball
from robustflat.perturb import attack_losses

DUAL = {1: math.inf, 1.5: 3, 2: 2, 3: 1.5, math.inf: 1}


def binary(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A linear model of two classes, data far inside the box, and the signed margins."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 16, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2).double())
    with torch.no_grad():
        net[1].weight.copy_(w)
    x = torch.rand(7, 1, 4, 4, generator=g, dtype=torch.float64) * 0.4 + 0.3
    y = torch.randint(2, (7,), generator=g)
    logits = net(x).detach()
    signed = logits.gather(1, y[:, None]).squeeze(1) - logits.gather(1, 1 - y[:, None]).squeeze(1)
    return net, x, y, signed, w[0] - w[1]


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("start", ["zero", "uniform"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_linear_models_reach_their_worst_case_loss(p: float, start: str, loss: str) -> None:
    net, x, y, signed, d = binary()
    eps = 0.1
    attack = rf.pgd(p, eps, 60, 0.05, start, loss=loss, keep="best")  # type: ignore[arg-type]
    x_adv = attack(net, x, y, generator=torch.Generator().manual_seed(0))
    assert Ball(p, eps).size([x_adv - x])[0].max() <= eps * (1 + 1e-9)
    reached = F.cross_entropy(net(x_adv), y, reduction="none")
    worst = F.softplus(-(signed - eps * torch.linalg.vector_norm(d, DUAL[p])))
    torch.testing.assert_close(reached, worst, rtol=1e-6, atol=0)
    assert (worst > F.cross_entropy(net(x), y, reduction="none") * 1.01).all()


@pytest.mark.parametrize("p", [1.5, 3])
def test_one_step_is_optimal_for_every_norm_on_linear_models(p: float) -> None:
    net, x, y, signed, d = binary()
    x_adv = rf.fgsm(p, 0.1)(net, x, y)
    worst = F.softplus(-(signed - 0.1 * torch.linalg.vector_norm(d, DUAL[p])))
    reached = F.cross_entropy(net(x_adv), y, reduction="none")
    torch.testing.assert_close(reached, worst, rtol=1e-9, atol=0)


def test_the_box_is_part_of_the_linf_worst_case() -> None:
    net, _, y, _, d = binary()
    x = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    eps = 0.4
    x_adv = rf.pgd("linf", eps, 40)(net, x, y)
    toward = torch.where(y == 0, -1.0, 1.0).double()[:, None] * d
    flat = x.flatten(1)
    corner = torch.where(toward > 0, (flat + eps).clamp(max=1), (flat - eps).clamp(min=0))
    torch.testing.assert_close(x_adv.flatten(1), corner, rtol=0, atol=1e-9)
    unboxed = rf.pgd("linf", eps, 40, box=None)(net, x, y)
    torch.testing.assert_close(unboxed.flatten(1), flat + eps * toward.sign(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("eps_over_margin", [0.999, 1.001])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_margin_of_a_linear_model_is_found(p: float, eps_over_margin: float) -> None:
    # The distance to the decision boundary is |f_0 - f_1| / ||w_0 - w_1||_q.
    net, x, _, _, d = binary()
    y = net(x).argmax(1)
    logits = net(x).detach()
    distance = (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(d, DUAL[p])
    for i in range(len(x)):
        eps = float(distance[i]) * eps_over_margin
        attack = rf.pgd(p, eps, 20, eps / 4, "zero", box=None)
        fooled = net(attack(net, x[i : i + 1], y[i : i + 1])).argmax(1) != y[i]
        assert bool(fooled) == (eps_over_margin > 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_follows_the_released_pgd(norm: str, training: bool) -> None:
    model = conv_bn().train(training)
    if not training:
        model[1].running_var.fill_(0.3)
        model[1].running_mean.fill_(0.1)
    x, y = images()
    x.view(-1)[:20:4] = 0.0
    x.view(-1)[1:20:4] = 1.0
    eps, alpha = (0.1, 0.03) if norm == "linf" else (0.5, 0.2)
    (start,) = Ball(math.inf if norm == "linf" else 2, eps).sample([x])
    frozen = copy.deepcopy(model)
    if norm == "linf":
        expected = ref.pgd_linf(frozen, x, y, eps, alpha, 7, start)
    else:
        expected = ref.pgd_l2(frozen, x, y, eps, alpha, 7, start, floor=0.0)
        # What the released code adds to the norm shows, with a gradient as small as here.
        released = ref.pgd_l2(frozen, x, y, eps, alpha, 7, start)
        torch.testing.assert_close(released, expected, rtol=1e-6, atol=1e-8)
    mode = "batch" if training else "eval"
    attack = rf.pgd(norm, eps, 7, alpha, mode=mode)  # type: ignore[arg-type]
    got = attack(model, x, y, starts=[start])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got - x).abs().max() > 0.05


def test_draws_its_own_start_from_the_generator() -> None:
    model = conv_bn().eval()
    x, y = images()
    attack = rf.pgd("linf", 0.1, 3, 0.03)
    (start,) = Ball(math.inf, 0.1).sample([x], torch.Generator().manual_seed(5))
    expected = ref.pgd_linf(model, x, y, 0.1, 0.03, 3, start)
    model.zero_grad()
    got = attack(model, x, y, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("corners", [False, True])
def test_follows_the_released_trades_attack(corners: bool) -> None:
    # With pixels at 0 and 1, the released start leaves the box before its first step.
    model = conv_bn()
    x, _ = images(margin=0.01)
    if corners:
        g = torch.Generator().manual_seed(4)
        x = (x > 0.5).double() * (torch.rand(x.shape, generator=g) < 0.9)
    noise = torch.empty_like(x).normal_(0, 1e-3, generator=torch.Generator().manual_seed(3)) * 1e3
    expected = ref.trades_attack(model, x, 0.1, 0.02, 8, noise)
    attack = rf.pgd("linf", 0.1, 8, 0.02, "normal", loss="kl")
    y = torch.zeros(len(x), dtype=torch.long)
    got = attack(model, x, y, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    given = attack(model, x, y, starts=[0.001 * noise])
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_results_stay_in_ball_and_box_and_are_fresh(norm: str) -> None:
    model = mlp(dtype=torch.float32)
    x, y = images(dtype=torch.float32)
    x.view(-1)[:40] = (x.view(-1)[:40] > 0.5).float()
    x.requires_grad_()
    original = x.detach().clone()
    for start in ("zero", "uniform", "sphere", "normal"):
        x_adv = rf.pgd(norm, 0.3, 5, start=start)(model, x, y)  # type: ignore[arg-type]
        p = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
        assert Ball(p, 0.3).size([x_adv - x.detach()])[0].max() <= 0.3 + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert not x_adv.requires_grad
        assert x_adv.shape == x.shape
        assert (x_adv - original).abs().flatten(1).amax(1).min() > 1e-3
        assert x_adv.data_ptr() != x.data_ptr()
        assert torch.equal(x, original)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_rows_are_attacked_independently_of_their_batch() -> None:
    model = mlp(dtype=torch.float64)
    x, y = images()
    for norm in ("linf", "l2", "l1"):
        attack = rf.pgd(norm, 0.2, 4, start="zero")
        whole = attack(model, x, y)
        alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-14)


def test_restarts_keep_the_highest_loss_of_each_image() -> None:
    model = mlp(dtype=torch.float64)
    x, y = images(12)
    x = x * 0.2 + 0.4
    one = rf.pgd("linf", 0.4, 1, 0.01)
    many = rf.pgd("linf", 0.4, 1, 0.01, restarts=4)
    g = torch.Generator().manual_seed(0)
    tries = torch.stack([one(model, x, y, generator=g) for _ in range(4)])
    losses = torch.stack([F.cross_entropy(model(t), y, reduction="none") for t in tries])
    assert len(losses.argmax(0).unique()) > 1
    got = many(model, x, y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        F.cross_entropy(model(got), y, reduction="none"), losses.amax(0), rtol=1e-12, atol=0
    )


def test_best_iterate_is_never_below_any_other() -> None:
    model = mlp(dtype=torch.float64)
    x, y = images()
    # Steps twice the ball's radius bounce.
    best = rf.pgd("linf", 0.3, 7, 0.6, "zero", keep="best")(model, x, y)
    top = F.cross_entropy(model(best), y, reduction="none")
    for steps in range(8):
        other = rf.pgd("linf", 0.3, steps, 0.6, "zero")(model, x, y)
        assert (F.cross_entropy(model(other), y, reduction="none") <= top + 1e-12).all()


def test_attack_losses_are_their_formulas() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, generator=g, dtype=torch.float64)
    c = torch.randn(5, 4, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    p, q = c.softmax(1), z.softmax(1)
    for i in range(5):
        right, others = float(z[i, y[i]]), sorted(float(z[i, j]) for j in range(4) if j != y[i])
        ranked = sorted(z[i].tolist(), reverse=True)
        expected = {
            "ce": -math.log(float(q[i, y[i]])),
            "kl": float((p[i] * (p[i] / q[i]).log()).sum()),
            "margin": others[-1] - right,
            "dlr": (others[-1] - right) / (ranked[0] - ranked[2] + 1e-12),
        }
        for name, value in expected.items():
            target = c if name == "kl" else y
            assert float(attack_losses[name](z, target)[i]) == pytest.approx(value, rel=1e-10)


def test_soft_labels_are_climbed() -> None:
    model = mlp(dtype=torch.float64)
    x, y = images()
    attack = rf.pgd("linf", 0.2, 3, start="zero")
    hard, soft = attack(model, x, y), attack(model, x, F.one_hot(y, CLASSES).double())
    torch.testing.assert_close(hard, soft, rtol=1e-12, atol=1e-14)


def test_works_without_gradients_and_inside_no_grad() -> None:
    model = mlp()
    x, y = images(dtype=torch.float32)
    attack = rf.pgd("linf", 0.2, 3, start="zero")
    expected = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), expected)
    model.requires_grad_(False)
    assert torch.equal(attack(model, x, y), expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rf.pgd("l9"), "norm"),
        (lambda: rf.pgd(eps=-1), "radius"),
        (lambda: rf.pgd(steps=-1), "steps"),
        (lambda: rf.pgd(loss="hinge"), "loss"),  # type: ignore[arg-type]
        (lambda: rf.pgd(mode="train"), "mode"),  # type: ignore[arg-type]
        (lambda: rf.pgd(restarts=0), "restarts"),
        (lambda: rf.pgd(restarts=2, start="zero"), "restarts"),
        (lambda: rf.fgsm(loss="kl"), "kl"),
        # The divergence has no gradient at the image: this would be no attack at all.
        (lambda: rf.pgd(loss="kl", start="zero"), "kl"),
        # Nothing projects onto this ball, so it should not be found out at the first batch.
        (lambda: rf.pgd(1.5, 0.1, 10), "1.5"),
    ],
)
def test_attacks_that_cannot_work_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_dlr_refuses_two_classes() -> None:
    net, x, y, _, _ = binary()
    with pytest.raises(ValueError, match="3 classes"):
        rf.pgd(loss="dlr")(net, x, y)
