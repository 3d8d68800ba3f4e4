"""The reduction ladder: where one method is another, it is so bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import Unweighted, conv_bn, images, mlp
from torch import Tensor, nn

import robustflat as rf

Backward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def whole(weights: Any) -> Backward:
    return lambda m, x, y: weights.backward(lambda: F.cross_entropy(m(x), y), m)


def sliced(weights: Any) -> Backward:
    return lambda m, x, y: weights.backward(lambda r: F.cross_entropy(m(x[r]), y[r]), m)


def numbered(weights: Any) -> Backward:
    # A wrapper of one batch calls its closure without an index, like what it wraps.
    return whole(weights)


def rowwise(weights: Any) -> Backward:
    return lambda m, x, y: weights.backward(lambda: F.cross_entropy(m(x), y, reduction="none"), m)


def alternating(one: Backward, two: Backward) -> Backward:
    """``one`` in steps 0, 2, 4, ...; by the seed of the images, which the model counts."""

    def backward(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (one, two)[len(m.values) % 2](m, x, y)  # type: ignore[arg-type]

    return backward


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    value = F.cross_entropy(model(x), y)
    value.backward()
    return value.detach()


LADDER: dict[str, tuple[Backward, Backward]] = {
    "none is sgd": (whole(rf.no_perturbation()), plain),
    "awp 0 is sgd": (whole(rf.awp(0.0)), plain),
    "awp 0 of 3 steps is sgd": (whole(rf.awp(0.0, steps=3)), plain),
    "awp_global 0 is sgd": (whole(rf.awp_global(0.0)), plain),
    "amp 0 is sgd": (whole(rf.amp(0.0)), plain),
    "sam 0 is sgd": (whole(rf.sam(0.0)), plain),
    "sam 0 of p 1.5 is sgd": (whole(rf.sam(0.0, 1.5, 4)), plain),
    "asam 0 is sgd": (whole(rf.asam(0.0)), plain),
    "gsam 0 is sgd": (whole(rf.gsam(0.0, 0.4)), plain),
    "random 0 is sgd": (whole(rf.random_weights(0.0)), plain),
    "gsam of alpha 0 is sam": (whole(rf.gsam(0.1, 0.0)), whole(rf.sam(0.1))),
    "msam of one chunk is sam": (sliced(rf.msam(rf.sam(0.1), 6)), whole(rf.sam(0.1))),
    "msam of one chunk is awp": (sliced(rf.msam(rf.awp(0.1), 6)), whole(rf.awp(0.1))),
    "nsam of one batch is sam": (numbered(rf.nsam(rf.sam(0.1), 1)), whole(rf.sam(0.1))),
    "gnp of alpha 1 is sam": (whole(rf.gnp(0.1, 1.0)), whole(rf.sam(0.1))),
    "gnp 0 is sgd": (whole(rf.gnp(0.0)), plain),
    "fsam of sigma 0 is sam": (whole(rf.fsam(0.1, 0.0)), whole(rf.sam(0.1))),
    "fsam 0 is sgd": (whole(rf.fsam(0.0)), plain),
    "vasso of theta 1 is sam": (
        whole(rf.vasso(0.1, 1.0, statistics="centre")),
        whole(rf.sam(0.1)),
    ),
    "momentum_sam 0 is sgd": (whole(rf.momentum_sam(0.0)), plain),
    "looksam of every step is sam": (whole(rf.looksam(0.1, every=1)), whole(rf.sam(0.1))),
    "looksam of alpha 0 is sam in every second step": (
        whole(rf.looksam(0.1, 0.0, 2)),
        alternating(whole(rf.sam(0.1)), plain),
    ),
    "lesam of a large sigma is sam": (
        whole(rf.lesam(0.1, 1e9, statistics="centre")),
        whole(rf.sam(0.1)),
    ),
    "rwp_mix of alpha 0 is sgd": (whole(rf.rwp_mix(0.1, 0.0)), plain),
    "rwp_mix 0 is sgd": (whole(rf.rwp_mix(0.0)), plain),
    "gam of gamma 0 and beta1 1 is sam": (
        whole(rf.gam(0.1, 0.1, beta1=1.0, gamma=0.0)),
        whole(rf.sam(0.1)),
    ),
    "gam 0 is sgd": (whole(rf.gam(0.0, 0.0)), plain),
    "esam of all tensors and examples is sam": (
        rowwise(rf.esam(0.1, 1.0, 1.0, statistics="centre")),
        rowwise(rf.sam(0.1)),
    ),
    "esam 0 is sgd": (whole(rf.esam(0.0)), plain),
    "zsharp 0 is sgd": (whole(rf.zsharp(0.0)), plain),
    "rwp 0 is sgd": (whole(rf.rwp(0.0)), plain),
    "rwp below every loss is sgd": (rowwise(rf.rwp(0.1, 0.0)), rowwise(rf.no_perturbation())),
    "rwp of one step above every loss is global awp of matrices": (
        rowwise(rf.rwp(0.1, 1e9, 1, 1.0)),
        rowwise(rf.awp_global(0.1, parameters="matrices", statistics="perturbed")),
    ),
}
# Not to the last bit: a sum of parts, a path by another way, or a point of the ball's surface that
# is projected onto the ball and may lie outside by rounding.
NEARLY = {
    "gam of gamma 0 and beta1 1 is sam",
    "rwp_mix of alpha 0 is sgd",
    "lesam of a large sigma is sam",
}


@pytest.mark.parametrize("rung", LADDER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_steps_are_bit_equal(rung: str, dtype: torch.dtype) -> None:
    models = [conv_bn(dtype=dtype) for _ in range(2)]
    for backward, model in zip(LADDER[rung], models, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        model.values = []  # type: ignore[assignment]
        for seed in range(3):
            model.zero_grad()
            model.values.append(backward(model, *images(6, seed, dtype)))  # type: ignore[operator,union-attr]
            optimizer.step()
    one, two = models
    if rung in NEARLY:
        rtol = 1e-12 if dtype == torch.float64 else 1e-4
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
        return
    assert all(torch.equal(a, b) for a, b in zip(one.values, two.values, strict=True))  # type: ignore[arg-type]
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(a, b)


def test_asam_whose_scale_is_one_is_sam() -> None:
    # T = 1 on every parameter whose name does not contain "weight".
    x, y = images(dtype=torch.float32)
    one, two = Unweighted(), Unweighted()
    rf.asam(0.1, eta=0.5).backward(lambda: F.cross_entropy(one(x), y), one)
    rf.sam(0.1).backward(lambda: F.cross_entropy(two(x), y), two)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    # Where names do contain it, the two differ.
    one, two = mlp(), mlp()
    rf.asam(0.1).backward(lambda: F.cross_entropy(one(x), y), one)
    rf.sam(0.1).backward(lambda: F.cross_entropy(two(x), y), two)
    assert not torch.equal(one[1].weight.grad, two[1].weight.grad)  # type: ignore[union-attr]


def same_loss(a: Tensor, b: Tensor, model: nn.Module) -> None:
    assert torch.equal(a, b)
    parameters = list(model.parameters())
    for g, h in zip(
        torch.autograd.grad(a, parameters), torch.autograd.grad(b, parameters), strict=True
    ):
        assert torch.equal(g, h)


def test_objectives_that_reduce_to_cross_entropy() -> None:
    x, y = images(dtype=torch.float32)
    x_adv = (x + 0.2).clamp(max=1)
    model = mlp()
    ce = lambda z: F.cross_entropy(model(z), y, reduction="none").mean()  # noqa: E731
    same_loss(rf.trades(0.0)(model, x, x_adv, y), ce(x), model)
    same_loss(rf.standard(label_smoothing=0.0)(model, x, x_adv, y), ce(x), model)
    same_loss(rf.adversarial(label_smoothing=0.0)(model, x, x_adv, y), ce(x_adv), model)
    same_loss(rf.adversarial()(model, x, x, y), rf.standard()(model, x, x, y), model)


@pytest.mark.parametrize("eps", [8 / 255, 0.3, 0.03])
def test_one_linf_step_from_zero_is_fgsm(eps: float) -> None:
    model = mlp()
    x, y = images(64, dtype=torch.float32)
    x.view(-1)[:200] = (x.view(-1)[:200] > 0.5).float()
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y).backward()
    assert leaf.grad is not None
    textbook = (x + eps * leaf.grad.sign()).clamp(0, 1)
    assert torch.equal(rf.pgd("linf", eps, 1, eps, "zero")(model, x, y), textbook)
    assert torch.equal(rf.fgsm("linf", eps)(model, x, y), textbook)
    assert (textbook != x).any()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("start", ["zero", "uniform", "normal"])
def test_no_radius_gives_the_image(norm: str, start: str) -> None:
    model = mlp()
    x, y = images(dtype=torch.float32)
    for attack in (rf.pgd(norm, 0.0, start=start), rf.fgsm(norm, 0.0)):  # type: ignore[arg-type]
        x_adv = attack(model, x, y)
        assert torch.equal(x_adv, x)
        assert x_adv.data_ptr() != x.data_ptr()


def test_no_steps_from_zero_give_the_image() -> None:
    model = mlp()
    x, y = images(dtype=torch.float32)
    assert torch.equal(rf.pgd("linf", 0.1, 0, start="zero")(model, x, y), x)


def test_an_off_perturbation_costs_one_call() -> None:
    model = conv_bn()
    x, y = images()
    for weights in (rf.sam(0.0, steps=3), rf.gsam(0.0), rf.amp(0.0), rf.no_perturbation()):
        calls = []
        weights.backward(lambda calls=calls: calls.append(1) or F.cross_entropy(model(x), y), model)
        assert len(calls) == 1
        assert weights.is_off
        before = copy.deepcopy(model.state_dict())
        with weights.perturbed(lambda: F.cross_entropy(model(x), y), model):
            assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
