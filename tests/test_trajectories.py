"""Several optimizer steps of every method beside the plain writing-out of its published update.

In float64, with momentum, weight decay and BatchNorm in train mode; weights and, where the source
says what becomes of them, running statistics agree to 1e-9.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import inputs as ref_inputs
from reference import weights as ref
from reference.nets import conv_bn, images
from torch import Tensor, nn

import robustflat as rf
from robustflat import Ball

STEPS = 4
Reference = Callable[[nn.Module, torch.optim.Optimizer, ref.Loss], None]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [images(6, seed=s) for s in range(STEPS)]


def assert_agree(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-9) -> None:
    """Tensor by tensor, relative to the tensor's norm."""
    expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    for n, t in [*ours.named_parameters(), *ours.named_buffers()]:
        difference = (t.detach().double() - expected[n].detach().double()).norm()
        assert difference <= rtol * max(float(expected[n].detach().double().norm()), 1e-3), n


def differ(ours: nn.Module, theirs: nn.Module, by: float = 1e-6) -> bool:
    return any(
        (a - b).norm() > by * b.norm()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def at(v: Callable[[nn.Module, ref.Loss], dict[str, Tensor]], bn: str) -> Reference:
    return lambda m, o, loss: ref.step_at(m, o, loss, v(m, loss), bn)


CASES: dict[str, tuple[Any, Reference]] = {
    "awp": (rf.awp(0.05), at(lambda m, f: ref.awp_form1(m, f, 0.05, 1), "perturbed")),
    "awp3": (rf.awp(0.05, steps=3), at(lambda m, f: ref.awp_form1(m, f, 0.05, 3), "perturbed")),
    "awp_global": (rf.awp_global(0.05), at(lambda m, f: ref.awp_global(m, f, 0.05), "both")),
    "amp": (rf.amp(0.02, 0.5), at(lambda m, f: ref.amp(m, f, 0.02, 0.5, 1, False), "both")),
    "amp3": (
        # A ball that some tensors reach and others do not.
        rf.amp(0.05, 0.2, 3, statistics="perturbed"),
        at(lambda m, f: ref.amp(m, f, 0.05, 0.2, 3, False), "perturbed"),
    ),
    "amp3_global": (
        rf.amp(0.05, 0.2, 3, "global", statistics="perturbed"),
        at(lambda m, f: ref.amp(m, f, 0.05, 0.2, 3, True), "perturbed"),
    ),
    "amp_inside": (rf.amp(9.0, 0.3), at(lambda m, f: ref.amp(m, f, 9.0, 0.3, 1, False), "both")),
    "sam": (rf.sam(0.2), at(lambda m, f: ref.sam(m, f, 0.2), "centre")),
    "sam_linf": (rf.sam(0.02, "linf"), at(lambda m, f: ref.sam(m, f, 0.02, math.inf), "centre")),
    "sam_1.5": (rf.sam(0.2, 1.5), at(lambda m, f: ref.sam(m, f, 0.2, 1.5), "centre")),
    "sam_3": (rf.sam(0.2, 3.0), at(lambda m, f: ref.sam(m, f, 0.2, 3.0), "centre")),
    "sam3": (rf.sam(0.2, steps=3), at(lambda m, f: ref.sam(m, f, 0.2, 2, 3), "centre")),
    "sam_both": (
        rf.sam(0.2, statistics="both"),
        at(lambda m, f: ref.sam(m, f, 0.2), "both"),
    ),
    "asam": (rf.asam(0.5, 0.01), at(lambda m, f: ref.asam(m, f, 0.5, 0.01), "both")),
    "asam_eta_0": (rf.asam(0.5, 0.0), at(lambda m, f: ref.asam(m, f, 0.5, 0.0), "both")),
    "gsam": (rf.gsam(0.2, 0.4), lambda m, o, f: ref.gsam_step(m, o, f, 0.2, 0.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_follows_its_reference(case: str) -> None:
    weights, reference = CASES[case]
    ours = conv_bn()
    theirs, plain = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizers = [sgd(m) for m in (ours, theirs, plain)]
    for x, y in batches():
        ours.zero_grad()
        value = weights.backward(lambda x=x, y=y: F.cross_entropy(ours(x), y), ours)
        optimizers[0].step()
        assert value.isfinite()
        reference(theirs, optimizers[1], lambda m, x=x, y=y: F.cross_entropy(m(x), y))
        optimizers[2].zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizers[2].step()
    assert_agree(ours, theirs)
    # And the method did something that plain SGD does not.
    assert differ(ours, plain, 1e-4)


@pytest.mark.parametrize("chunk", [2, 4, 6])
def test_msam_follows_its_reference(chunk: int) -> None:
    weights = rf.msam(rf.sam(0.2), chunk)
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    for x, y in batches():
        ours.zero_grad()
        weights.backward(lambda r, x=x, y=y: F.cross_entropy(ours(x[r]), y[r]), ours)
        one.step()
        parts = [
            (
                lambda m, s=s, x=x, y=y: F.cross_entropy(m(x[s : s + chunk]), y[s : s + chunk]),
                len(x[s : s + chunk]) / len(x),
            )
            for s in range(0, len(x), chunk)
        ]
        ref.msam_step(theirs, two, parts, 0.2)
    assert_agree(ours, theirs)


def test_nsam_follows_its_reference() -> None:
    weights = rf.nsam(rf.sam(0.2), 3)
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    data = batches()
    for k in range(STEPS):
        order = [data[(k + i) % STEPS] for i in range(3)]
        ours.zero_grad()
        weights.backward(
            lambda i, order=order: F.cross_entropy(ours(order[i][0]), order[i][1]), ours
        )
        one.step()
        mean = lambda m, order=order: sum(F.cross_entropy(m(x), y) for x, y in order) / 3  # noqa: E731
        v = ref.sam(theirs, mean, 0.2)
        first = lambda m, order=order: F.cross_entropy(m(order[0][0]), order[0][1])  # noqa: E731
        ref.step_at(theirs, two, first, v, "centre")
    assert_agree(ours, theirs)


@pytest.mark.parametrize("group", ["row", "tensor", "global"])
def test_random_perturbation_with_the_same_draw(group: str) -> None:
    weights = rf.random_weights(0.1, group)  # type: ignore[arg-type]
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    for k, (x, y) in enumerate(batches()):
        g = torch.Generator().manual_seed(k)
        ours.zero_grad()
        weights.backward(lambda x=x, y=y: F.cross_entropy(ours(x), y), ours, generator=g)
        one.step()
        g = torch.Generator().manual_seed(k)
        draws = {
            n: torch.empty_like(p).normal_(generator=g)
            for n, p in theirs.named_parameters()
            if p.dim() > 1
        }
        v = ref.random_relative(theirs, draws, 0.1, group)
        loss = lambda m, x=x, y=y: F.cross_entropy(m(x), y)  # noqa: E731
        ref.step_at(theirs, two, loss, v, "perturbed")
    assert_agree(ours, theirs)


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_awp_in_its_released_order(lr: float) -> None:
    # The proxy's learning rate cancels; the optimizer steps at the perturbed weights.
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    for x, y in batches():
        ours.zero_grad()
        rf.awp(0.05).backward(lambda x=x, y=y: F.cross_entropy(ours(x), y), ours, step=one.step)
        ref.awp_released_step(theirs, two, lambda m, x=x, y=y: F.cross_entropy(m(x), y), 0.05, lr)
    assert_agree(ours, theirs)


def test_the_two_orders_differ_by_lr_times_weight_decay_times_v() -> None:
    default, released, reference = (conv_bn() for _ in range(3))
    x, y = images()
    o = sgd(default)
    default.zero_grad()
    rf.awp(0.05).backward(lambda: F.cross_entropy(default(x), y), default)
    o.step()
    o = sgd(released)
    released.zero_grad()
    rf.awp(0.05).backward(lambda: F.cross_entropy(released(x), y), released, step=o.step)
    v = ref.awp_released_step(reference, sgd(reference), lambda m: F.cross_entropy(m(x), y), 0.05)
    for (n, a), b in zip(default.named_parameters(), released.parameters(), strict=True):
        expected = 0.1 * 5e-2 * v[n] if n in v else torch.zeros_like(a)
        torch.testing.assert_close((a - b).detach(), expected, rtol=1e-8, atol=1e-14)
    assert max(float(t.norm()) for t in v.values()) > 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_double_perturbation_at_awp(norm: str) -> None:
    """AT-AWP: PGD from a random start, then AWP on the very loss that is descended."""
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    eps, alpha = (0.1, 0.03) if norm == "linf" else (0.5, 0.2)
    attack, weights = rf.pgd(norm, eps, 5, alpha), rf.awp(0.05)
    objective = rf.adversarial()
    for k, (x, y) in enumerate(batches()):
        x_adv = attack(ours, x, y, generator=torch.Generator().manual_seed(k))
        ours.zero_grad()
        weights.backward(lambda x=x, a=x_adv, y=y: objective(ours, x, a, y), ours)
        one.step()
        p = math.inf if norm == "linf" else 2
        (start,) = Ball(p, eps).sample([x], torch.Generator().manual_seed(k))
        theirs.eval()
        if norm == "linf":
            expected = ref_inputs.pgd_linf(theirs, x, y, eps, alpha, 5, start)
        else:
            expected = ref_inputs.pgd_l2(theirs, x, y, eps, alpha, 5, start, floor=0.0)
        theirs.train()
        loss = lambda m, a=expected, y=y: F.cross_entropy(m(a), y)  # noqa: E731
        ref.step_at(theirs, two, loss, ref.awp_form1(theirs, loss, 0.05, 1), "perturbed")
    assert_agree(ours, theirs)


def test_double_perturbation_trades_awp() -> None:
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    attack = rf.pgd("linf", 0.1, 5, 0.02, "normal", loss="kl")
    weights, objective = rf.awp(0.02), rf.trades(6.0)
    for k in range(STEPS):
        x, y = images(6, seed=k, margin=0.01)
        x_adv = attack(ours, x, y, generator=torch.Generator().manual_seed(k))
        ours.zero_grad()
        weights.backward(lambda x=x, a=x_adv, y=y: objective(ours, x, a, y), ours, step=one.step)
        g = torch.Generator().manual_seed(k)
        noise = torch.empty_like(x).normal_(0, 1e-3, generator=g) / 1e-3
        expected = ref_inputs.trades_attack(theirs, x, 0.1, 0.02, 5, noise)
        loss = lambda m, x=x, a=expected, y=y: ref_inputs.trades_loss(m, x, a, y, 6.0)  # noqa: E731
        ref.awp_released_step(theirs, two, loss, 0.02, 0.1)
    assert_agree(ours, theirs)


def test_double_perturbation_mart_sam() -> None:
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    one, two = sgd(ours), sgd(theirs)
    attack, weights, objective = rf.pgd("linf", 0.1, 5, 0.02, "zero"), rf.sam(0.1), rf.mart(6.0)
    for x, y in batches():
        x_adv = attack(ours, x, y)
        ours.zero_grad()
        weights.backward(lambda x=x, a=x_adv, y=y: objective(ours, x, a, y), ours)
        one.step()
        theirs.eval()
        expected = ref_inputs.pgd_linf(theirs, x, y, 0.1, 0.02, 5, torch.zeros_like(x))
        theirs.train()
        loss = lambda m, x=x, a=expected, y=y: ref_inputs.mart_loss(m, x, a, y, 6.0)  # noqa: E731
        ref.step_at(theirs, two, loss, ref.sam(theirs, loss, 0.1), "centre")
    assert_agree(ours, theirs)
