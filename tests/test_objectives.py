"""Objectives against their formulas, values and gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from reference import inputs as ref
from reference.nets import CLASSES, conv_bn, images, mlp
from torch import Tensor, nn

import robustflat as rf
from robustflat.objectives import Objective


def agree(model: nn.Module, ours: Tensor, theirs: Tensor, rtol: float = 1e-12) -> None:
    parameters = list(model.parameters())
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    got = torch.autograd.grad(ours, parameters)
    expected = torch.autograd.grad(theirs, parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


def batch() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = mlp(dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    x, y = images(8)
    return model, x, (x + 0.3 * torch.randn_like(x)).clamp(0, 1), y


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_standard_and_adversarial_look_at_their_own_images(smoothing: float) -> None:
    model, x, x_adv, y = batch()
    for objective, seen in ((rf.standard, x), (rf.adversarial, x_adv)):
        log_p = F.log_softmax(model(seen), 1)
        target = F.one_hot(y, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES
        theirs = -(target * log_p).sum(1).mean()
        agree(model, objective(label_smoothing=smoothing)(model, x, x_adv, y), theirs)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_and_mart_follow_their_formulas(beta: float) -> None:
    model, x, x_adv, y = batch()
    agree(
        model, rf.trades(beta)(model, x, x_adv, y), ref.trades_loss(model, x, x_adv, y, beta), 1e-10
    )
    agree(model, rf.mart(beta)(model, x, x_adv, y), ref.mart_loss(model, x, x_adv, y, beta), 1e-10)


@pytest.mark.parametrize("objective", [rf.standard(), rf.adversarial(), rf.trades(2.0)])
def test_soft_labels_agree_with_hard_ones(objective: object) -> None:
    model, x, x_adv, y = batch()
    soft = F.one_hot(y, CLASSES).double()
    agree(model, objective(model, x, x_adv, soft), objective(model, x, x_adv, y))  # type: ignore[operator]


def test_soft_labels_are_mixed_linearly() -> None:
    model, x, x_adv, y = batch()
    other = (y + 1) % CLASSES
    soft = 0.3 * F.one_hot(y, CLASSES).double() + 0.7 * F.one_hot(other, CLASSES).double()
    for objective in (rf.standard(), rf.adversarial(), rf.trades(2.0)):
        a, b = objective(model, x, x_adv, y), objective(model, x, x_adv, other)
        agree(model, objective(model, x, x_adv, soft), 0.3 * a + 0.7 * b, 1e-10)


def test_mart_refuses_soft_labels() -> None:
    model, x, x_adv, y = batch()
    with pytest.raises(ValueError, match="soft"):
        rf.mart()(model, x, x_adv, F.one_hot(y, CLASSES).double())


def test_impossible_settings_are_refused() -> None:
    for make in (
        lambda: rf.trades(-1.0),
        lambda: rf.mart(float("nan")),
        lambda: rf.trades(float("inf")),
        lambda: rf.standard(label_smoothing=1.0),
        lambda: rf.adversarial(label_smoothing=-0.1),
    ):
        with pytest.raises(ValueError, match="got"):
            make()


def test_an_objective_of_one_s_own_may_have_annotations_that_cannot_be_resolved() -> None:
    @dataclass
    class Own(Objective):
        weight: Nowhere = 2.0  # noqa: F821 # type: ignore[name-defined]

    assert Own().weight == 2.0


@pytest.mark.parametrize("objective", [rf.adversarial(), rf.trades(), rf.mart()])
def test_confidently_wrong_outputs_stay_finite(objective: object) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.tensor([[200.0, -200.0, 0.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.z * (x.flatten(1).sum(1, keepdim=True) - 0.5).sign()

    model = Fixed()
    x = torch.zeros(2, 1, 1, 1)
    for y in (torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 2])):
        loss = objective(model, x, torch.ones_like(x), y)  # type: ignore[operator]
        (g,) = torch.autograd.grad(loss, model.z)
        assert loss.isfinite()
        assert g.isfinite().all()


def test_forward_passes_of_each_objective() -> None:
    # BatchNorm sees the clean and the adversarial batch once each, and only where they are used.
    for objective, seen in (
        (rf.standard(), "c"),
        (rf.adversarial(), "a"),
        (rf.trades(), "ca"),
        (rf.mart(), "ca"),
        (rf.trades(0.0), "c"),
    ):
        model = conv_bn()
        x, y = images()
        x_adv = x.flip(-1) * 0.5
        expected = copy.deepcopy(model)
        for c in seen:
            expected(x if c == "c" else x_adv)
        objective(model, x, x_adv, y)
        for a, b in zip(model.buffers(), expected.buffers(), strict=True):
            assert torch.equal(a, b)
