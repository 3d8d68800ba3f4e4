"""Several optimizer steps of every newer method beside the plain writing-out of its released code.

In float64, with momentum and weight decay, on a net with BatchNorm and on one whose GroupNorm and
LayerNorm no name gives away. What is drawn at random is read off the weights that the passes see,
so the reference takes the very same draws, however they were made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import newer, newer_choosing
from reference.nets import conv_bn, group_layer, images
from torch import Tensor, nn

import robustflat as rf

STEPS = 6


def never_idle() -> nn.Module:
    """No bias that BatchNorm takes out again, no ReLU that dies: every tensor has a gradient."""
    net = conv_bn()
    net[0].bias = None
    net[2] = nn.Tanh()
    return net


NETS: dict[str, Callable[[], nn.Module]] = {"batchnorm": conv_bn, "no batchnorm": group_layer}

# Preset and reference. Made anew for each test: most remember something between steps.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "sam norm": (
        lambda: rf.sam(0.5, parameters="norm"),
        lambda: newer.Sam(0.5, "norm", statistics="centre"),
    ),
    "sam no_norm": (
        lambda: rf.sam(0.5, parameters="no_norm"),
        lambda: newer.Sam(0.5, "no_norm", statistics="centre"),
    ),
    "asam norm": (
        lambda: rf.asam(0.5, 0.05, parameters="norm"),
        lambda: newer.Asam(0.5, 0.05, "norm"),
    ),
    "gnp": (lambda: rf.gnp(0.5, 0.7), lambda: newer.Gnp(0.5, 0.7)),
    "fsam": (lambda: rf.fsam(0.5, 0.8, 0.7), lambda: newer.Fsam(0.5, 0.8, 0.7)),
    "fsam, defaults": (lambda: rf.fsam(0.5), lambda: newer.Fsam(0.5, 1.0, 0.6)),
    "vasso": (lambda: rf.vasso(0.5, 0.4), lambda: newer.Vasso(0.5, 0.4, floor=0.0)),
    "momentum_sam": (lambda: rf.momentum_sam(0.5, 0.8), lambda: newer.MomentumSam(0.5, 0.8)),
    "momentum_sam, defaults": (lambda: rf.momentum_sam(0.5), lambda: newer.MomentumSam(0.5, 0.9)),
    "looksam": (lambda: rf.looksam(0.5, 0.7, 2), lambda: newer.LookSam(0.5, 0.7, 2)),
    "looksam, defaults": (lambda: rf.looksam(0.5, 0.7), lambda: newer.LookSam(0.5, 0.7, 5)),
    "rwp": (
        lambda: rf.rwp(0.1, 1.1, 4, 0.5),
        lambda: newer_choosing.Rwp(0.1, 1.1, 4, 0.5),
    ),
    "rwp, defaults": (lambda: rf.rwp(0.1), lambda: newer_choosing.Rwp(0.1, 1.7, 10, 0.01)),
    "gam": (
        lambda: rf.gam(0.5, 0.3, 0.4, 0.6, 0.3),
        lambda: newer.Gam(0.5, 0.3, 0.4, 0.6, 0.3),
    ),
    "zsharp": (lambda: rf.zsharp(0.3, 0.7), lambda: newer_choosing.ZSharp(0.3, 0.7)),
    # The quantile is itself an entry: of 27 the middle, of any the smallest, which is dropped.
    "zsharp, median": (lambda: rf.zsharp(0.3, 0.5), lambda: newer_choosing.ZSharp(0.3, 0.5)),
    "zsharp, 0": (lambda: rf.zsharp(0.3, 0.0), lambda: newer_choosing.ZSharp(0.3, 0.0)),
    "zsharp, defaults": (lambda: rf.zsharp(0.3), lambda: newer_choosing.ZSharp(0.3, 0.95)),
    "esam": (
        lambda: rf.esam(0.5, 1.0, 0.6),
        lambda: newer_choosing.Esam(0.5, 1.0, 0.6, floor=0.0),
    ),
    "esam, all examples": (
        lambda: rf.esam(0.5, 1.0, 0.99),
        lambda: newer_choosing.Esam(0.5, 1.0, 0.99, floor=0.0),
    ),
}
ROWS = ("rwp", "esam")  # Their closure gives one loss a row.


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)


def batch_loss(seed: int) -> newer.Loss:
    x, y = images(8, seed=seed)

    def loss(m: nn.Module, rows: bool = False) -> Tensor:
        return F.cross_entropy(m(x), y, reduction="none" if rows else "mean")

    return loss


def assert_agree(ours: nn.Module, theirs: nn.Module, step: int) -> None:
    """Tensor by tensor, relative to the tensor's norm, the running statistics included."""
    expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    for n, t in [*ours.named_parameters(), *ours.named_buffers()]:
        difference = float((t.detach().double() - expected[n].detach().double()).norm())
        size = max(float(expected[n].detach().double().norm()), 1e-3)
        assert difference <= 1e-9 * size, f"{n} after step {step}: {difference / size}"


def assert_not_plain(ours: nn.Module, net: Callable[[], nn.Module]) -> None:
    """The method did something that SGD does not."""
    plain = net()
    optimizer = sgd(plain)
    for k in range(STEPS):
        optimizer.zero_grad()
        batch_loss(k)(plain).backward()
        optimizer.step()
    assert any(
        (a - b).norm() > 1e-4 * b.norm()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )


class Followed:
    """A net under the preset beside the same net under the reference."""

    def __init__(self, weights: Any, reference: Any, net: Callable[[], nn.Module], rows: bool):
        self.weights, self.reference, self.net, self.rows = weights, reference, net, rows
        self.ours, self.theirs = net(), net()
        self.optimizers = sgd(self.ours), sgd(self.theirs)
        self.passes: list[dict[str, Tensor]] = []

    def step_ours(self, k: int, **options: Any) -> None:
        """One step of the preset; ``passes`` holds the weights that its passes saw."""
        loss = batch_loss(k)
        self.passes = []

        def closure() -> Tensor:
            self.passes.append({n: p.detach().clone() for n, p in self.ours.named_parameters()})
            return loss(self.ours, rows=True) if self.rows else loss(self.ours)

        self.optimizers[0].zero_grad()
        before = {n: p.detach().clone() for n, p in self.ours.named_parameters()}
        value = self.weights.backward(closure, self.ours, **options)
        assert value.isfinite()
        assert value.dim() == 0
        if "step" not in options:
            for n, p in self.ours.named_parameters():
                assert torch.equal(p, before[n]), n
            self.optimizers[0].step()

    def step_theirs(self, k: int, *extra: Any) -> None:
        self.reference.step(self.theirs, self.optimizers[1], batch_loss(k), *extra)
        assert_agree(self.ours, self.theirs, k)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("case", CASES)
def test_follows_its_reference(case: str, net: str) -> None:
    preset, reference = CASES[case]
    pair = Followed(preset(), reference(), NETS[net], case.startswith(ROWS))
    for k in range(STEPS):
        pair.step_ours(k)
        pair.step_theirs(k)
    assert_not_plain(pair.ours, NETS[net])


@pytest.mark.parametrize("case", CASES)
def test_adds_to_the_gradient(case: str) -> None:
    rows = case.startswith(ROWS)
    one, two = (Followed(CASES[case][0](), None, conv_bn, rows) for _ in range(2))
    x, y = images(8, seed=0)
    for p in two.ours.parameters():
        p.grad = torch.full_like(p, 0.25)
    for pair in (one, two):
        pair.weights.backward(
            lambda m=pair.ours: F.cross_entropy(m(x), y, reduction="none" if rows else "mean"),
            pair.ours,
        )
    for p, q in zip(one.ours.parameters(), two.ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad + 0.25, q.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("net", NETS)
def test_rwp_in_its_released_order(net: str) -> None:
    reference = newer_choosing.Rwp(0.1, 1.1, 3, 0.01, released_order=True)
    pair = Followed(rf.rwp(0.1, 1.1, 3), reference, NETS[net], True)
    for k in range(STEPS):
        pair.step_ours(k, step=pair.optimizers[0].step)
        pair.step_theirs(k)


@pytest.mark.parametrize("net", NETS)
def test_mixed_random_perturbation_follows_its_reference(net: str) -> None:
    pair = Followed(rf.rwp_mix(0.3, 0.6), newer.RwpMix(0.3, 0.6), NETS[net], False)
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor] = []
    for k in range(STEPS):
        w = {n: p.detach().clone() for n, p in pair.ours.named_parameters()}
        pair.step_ours(k, generator=generator)
        assert len(pair.passes) == 2
        (seen,) = [p for p in pair.passes if not torch.equal(p["0.weight"], w["0.weight"])]
        draws = {}
        for n, t in w.items():
            size = t.flatten(1).norm(dim=1) if t.dim() > 1 else t.norm()
            scale = 0.3 * size.reshape(-1, *[1] * (t.dim() - 1)).expand_as(t)
            # BatchNorm's biases start at 0 and have no noise then.
            draws[n] = torch.where(scale > 0, (seen[n] - t) / scale, torch.zeros_like(t))
            drawn += list(draws[n][scale > 0])
        pair.step_theirs(k, draws)
    values = torch.stack(drawn)
    # Standard normal: independent from element to element, not scaled to a length.
    assert abs(float(values.mean())) < 0.15
    assert float(values.std()) == pytest.approx(1, abs=0.1)
    assert float((values.abs() < 1).double().mean()) == pytest.approx(0.683, abs=0.06)
    assert len(values.unique()) == len(values)
    assert_not_plain(pair.ours, NETS[net])


@pytest.mark.parametrize("net", [never_idle, group_layer])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_esam_with_dropped_tensors_follows_its_reference(
    net: Callable[[], nn.Module], gamma: float
) -> None:
    reference = newer_choosing.Esam(0.3, 0.6, gamma, floor=0.0)
    pair = Followed(rf.esam(0.3, 0.6, gamma), reference, net, True)
    generator = torch.Generator().manual_seed(1)
    shares = []
    for k in range(4 * STEPS):
        w = {n: p.detach().clone() for n, p in pair.ours.named_parameters()}
        pair.step_ours(k % STEPS, generator=generator)
        kept = {n for n in w if any(not torch.equal(p[n], w[n]) for p in pair.passes)}
        if k == 0:
            assert kept == set(w)
        shares.append(len(kept) / len(w))
        pair.step_theirs(k % STEPS, kept)
    assert sum(shares[1:]) / len(shares[1:]) == pytest.approx(0.6, abs=0.15)
    assert len(set(shares[1:])) > 2


# The radius of LE-SAM: the budget alone, the cap alone, and now one, now the other.
@pytest.mark.parametrize("rho_max", [9.0, 0.05, 0.4])
@pytest.mark.parametrize("net", NETS)
def test_lesam_follows_its_reference(net: str, rho_max: float) -> None:
    pair = Followed(rf.lesam(rho_max, 0.2), newer.Lesam(rho_max, floor=0.0), NETS[net], False)
    for k in range(STEPS):
        pair.step_ours(k)
        pair.step_theirs(k, 0.2)
    assert_not_plain(pair.ours, NETS[net])


def test_memories_are_not_shared_by_two_presets() -> None:
    for case, (preset, reference) in CASES.items():
        if not case.startswith(("fsam", "vasso", "momentum_sam", "looksam")):
            continue
        one = Followed(preset(), reference(), group_layer, False)
        other = Followed(preset(), copy.deepcopy(one.reference), group_layer, False)
        for k in range(3):
            for pair in (one, other):
                pair.step_ours(k)
                pair.step_theirs(k)
