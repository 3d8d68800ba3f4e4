"""What becomes of BatchNorm's running statistics, counted and compared exactly."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images, mlp
from torch import Tensor, nn

import robustflat as rf

STATISTICS = ("perturbed", "centre", "both")
METHODS = {
    "awp": rf.awp(0.1),
    "awp3": rf.awp(0.1, steps=3),
    "awp_global": rf.awp_global(0.1),
    "amp2": rf.amp(0.1, steps=2),
    "sam": rf.sam(0.3),
    "sam3": rf.sam(0.3, steps=3),
    "asam": rf.asam(0.5),
    "gsam": rf.gsam(0.3, 0.4),
    "best": replace(rf.sam(0.3), ascent=rf.Ascent(2, 0.5, keep="best")),
}


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("method", METHODS)
def test_updates_are_counted_and_come_from_the_named_passes(method: str, statistics: Any) -> None:
    model = conv_bn()
    x, y = images()
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    weights = replace(METHODS[method], statistics=statistics)
    # The perturbed weights, by themselves.
    displaced = copy.deepcopy(model)
    with weights.perturbed(lambda: F.cross_entropy(displaced(x), y), displaced):
        moved = [p.detach().clone() for p in displaced.parameters()]
    expected = copy.deepcopy(model)
    if statistics in ("centre", "both"):
        expected(x)
    if statistics in ("perturbed", "both"):
        for p, q in zip(expected.parameters(), moved, strict=True):
            p.data.copy_(q)
        expected(x)
    weights.backward(loss, model)
    assert model[1].num_batches_tracked == (2 if statistics == "both" else 1)
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(model[1].running_var, expected[1].running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weights", "count"),
    [
        (rf.no_perturbation(), 1),
        (rf.awp(), 1),
        (rf.awp(steps=4), 1),
        (rf.random_weights(0.1), 1),
        (rf.sam(), 1),
        (rf.gsam(), 1),
        (rf.asam(), 2),
        (rf.amp(0.1), 2),
        (rf.awp_global(), 2),
        (rf.sam(0.0, statistics="both"), 1),
    ],
)
def test_updates_of_the_presets(weights: Any, count: int) -> None:
    model = conv_bn()
    x, y = images()
    weights.backward(lambda: F.cross_entropy(model(x), y), model)
    assert model[1].num_batches_tracked == count


@pytest.mark.parametrize(("statistics", "count"), [("perturbed", 1), ("centre", 1), ("both", 2)])
def test_updates_of_nsam_and_msam(statistics: Any, count: int) -> None:
    x, y = images()
    model = conv_bn()
    seen = copy.deepcopy(model)
    inner = rf.sam(0.3, statistics=statistics)
    rf.nsam(inner, 3).backward(lambda i: F.cross_entropy(model(x * (1 + i)), y), model)
    assert model[1].num_batches_tracked == count
    if statistics == "centre":  # of the batch that is descended, not of the others
        seen(x)
        assert torch.equal(model[1].running_mean, seen[1].running_mean)
    model = conv_bn()
    rf.msam(inner, 2).backward(lambda r: F.cross_entropy(model(x[r]), y[r]), model)
    assert model[1].num_batches_tracked == 3 * count


@pytest.mark.parametrize("objective", [rf.trades(), rf.mart()])
def test_two_forward_passes_update_twice(objective: Any) -> None:
    model = conv_bn()
    x, y = images()
    rf.awp(0.1).backward(lambda: objective(model, x, x.flip(-1), y), model)
    assert model[1].num_batches_tracked == 2


def test_perturbed_leaves_the_inside_to_its_user() -> None:
    x, y = images()
    for statistics, count in (("perturbed", 2), ("centre", 1), ("both", 3)):
        model = conv_bn()
        weights = rf.sam(0.3, statistics=statistics)  # type: ignore[arg-type]
        with weights.perturbed(lambda m=model: F.cross_entropy(m(x), y), model):
            model(x)
            model(x)
        assert model[1].num_batches_tracked == count


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_attacks_never_change_statistics(loss: Any, training: bool, mode: Any) -> None:
    model = conv_bn().train(training)
    x, y = images()
    before = buffers(model)
    rf.pgd("linf", 0.1, 3, start="normal", loss=loss, mode=mode, restarts=2)(model, x, y)
    rf.pgd("l2", 0.1, 3, start="normal", loss=loss, mode=mode, keep="best")(model, x, y)
    assert unchanged(model, before)
    assert all(m.training == training for m in model.modules())
    assert model[1].track_running_stats


def test_modes_differ_as_they_say() -> None:
    model = conv_bn()
    model[1].running_mean.normal_()
    x, y = images()
    fgsm = {m: rf.fgsm("linf", 0.1, mode=m)(model, x, y) for m in ("eval", "batch")}  # type: ignore[arg-type]
    for mode, x_adv in fgsm.items():
        copied = copy.deepcopy(model).train(mode == "batch")
        leaf = x.clone().requires_grad_()
        F.cross_entropy(copied(leaf), y).backward()
        assert leaf.grad is not None
        expected = (x + 0.1 * leaf.grad.sign()).clamp(0, 1)
        torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert not torch.equal(fgsm["eval"], fgsm["batch"])


def test_a_frozen_batchnorm_stays_frozen() -> None:
    model = conv_bn()
    model[1].eval()
    model[1].running_mean.normal_()
    x, y = images()
    before = buffers(model)
    # In "batch" mode too it goes on using its running statistics.
    one = rf.fgsm("linf", 0.1, mode="batch")(model, x, y)
    two = rf.fgsm("linf", 0.1, mode="eval")(model, x, y)
    assert torch.equal(one, two)
    for weights in METHODS.values():
        weights.backward(lambda: F.cross_entropy(model(x), y), model)
    assert unchanged(model, before)
    assert model.training
    assert not model[1].training


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)])
def test_layers_without_statistics(norm: nn.Module) -> None:
    model = conv_bn()
    model[1] = norm.double()
    x, y = images()
    for mode in ("eval", "batch"):
        x_adv = rf.pgd("linf", 0.1, 2, mode=mode)(model, x, y)  # type: ignore[arg-type]
        assert not torch.equal(x_adv, x)
    plain = [p.detach().clone() for p in model.parameters()]
    for weights in METHODS.values():
        assert weights.backward(lambda: F.cross_entropy(model(x), y), model).isfinite()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain, strict=True))
    assert not list(model.buffers())
    assert all(m.training for m in model.modules())


class Counting(nn.Module):
    """A buffer that every forward pass changes, in eval mode as in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.net(x)


def test_other_buffers_are_kept_by_attacks_and_ascents() -> None:
    model = Counting()
    x, y = images(6, dtype=torch.float32)
    rf.awp(0.1, steps=3).backward(lambda: F.cross_entropy(model(x), y), model)
    assert model.seen.item() == 6
    rf.pgd("linf", 0.1, 3)(model, x, y)
    assert model.seen.item() == 6


def test_momentum_none_and_nan_statistics_survive() -> None:
    # Cumulative averages divide by num_batches_tracked: an extra update would show.
    model = conv_bn()
    model[1].momentum = None
    x, y = images()
    expected = copy.deepcopy(model)
    expected(x)
    rf.sam(0.3, steps=3).backward(lambda: F.cross_entropy(model(x), y), model)
    assert unchanged(model, buffers(expected))
    model[1].running_mean.fill_(float("nan"))
    rf.pgd("linf", 0.1, 2, mode="batch")(model, x, y)
    assert model[1].running_mean.isnan().all()
    assert model[1].momentum is None
