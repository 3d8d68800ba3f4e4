"""Low precision: autocast, bfloat16 weights, float16 with a gradient scaler."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustflat as rf
from robustflat.train.step import TrainStep

METHODS = {
    "awp": rf.awp(0.5),
    "awp2": rf.awp(0.5, steps=2),
    "awp_global": rf.awp_global(0.5),
    "amp": rf.amp(0.5, 10.0, steps=2),
    "sam": rf.sam(1.0),
    "sam_linf": rf.sam(0.1, "linf"),
    "sam_l1": rf.sam(1.0, "l1"),
    "sam_1.5": rf.sam(1.0, 1.5),
    "asam": rf.asam(2.0),
    "gsam": rf.gsam(1.0, 0.4),
    "random": rf.random_weights(0.5),
}


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    difference = torch.cat([(p - q).flatten() for p, q in zip(a, b, strict=True)]).norm()
    return float(difference / torch.cat([q.flatten() for q in b]).norm())


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.detach().clone() for p in model.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("region", ["outside", "inside"])
@pytest.mark.parametrize("method", METHODS)
def test_the_perturbation_has_its_effect_under_autocast(method: str, region: str) -> None:
    # Autocast caches low-precision copies of the weights: in one region around everything, weights
    # changed in place would be ignored, and the gradient would be that at the centre.
    model = mlp()
    x, y = images(16, dtype=torch.float32)
    weights = METHODS[method]
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    precise = copy.deepcopy(model)
    F.cross_entropy(precise(x), y).backward()
    plain = grads(precise)
    precise.zero_grad()
    weights.backward(lambda: F.cross_entropy(precise(x), y), precise, generator=g())
    expected = grads(precise)
    effect = relative(expected, plain)
    assert effect > 0.1
    before = [p.detach().clone() for p in model.parameters()]
    if region == "outside":
        with autocast():
            model(x)  # fills the cache
            weights.backward(lambda: F.cross_entropy(model(x), y), model, generator=g())
            after = model(x)
        with autocast():
            assert torch.equal(after, model(x))  # nor is a cached perturbed weight left behind
    else:

        def loss() -> Tensor:
            with autocast():
                return F.cross_entropy(model(x), y)

        weights.backward(loss, model, generator=g())
    assert relative(grads(model), expected) < 0.2 * effect
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["awp", "sam", "asam", "amp"])
def test_perturbed_has_its_effect_in_one_autocast_region(method: str) -> None:
    model = mlp()
    x, y = images(16, dtype=torch.float32)
    with autocast():
        centre = F.cross_entropy(model(x), y)
        with METHODS[method].perturbed(lambda: F.cross_entropy(model(x), y), model):
            inside = F.cross_entropy(model(x), y)
        outside = F.cross_entropy(model(x), y)
    assert float(inside.detach()) > float(centre.detach()) + 0.05
    assert torch.equal(outside, centre)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_attack_and_descent_in_one_autocast_region(loss: Any) -> None:
    # An attack's forward passes without gradient must not leave detached weight copies behind.
    model = mlp()
    x, y = images(16, dtype=torch.float32)
    attack = rf.pgd("linf", 0.2, 2, start="normal", loss=loss, restarts=2)
    with autocast():
        x_adv = attack(model, x, y)
        rf.no_perturbation().backward(lambda: rf.adversarial()(model, x, x_adv, y), model)
    assert x_adv.dtype == torch.float32
    got = grads(model)
    F.cross_entropy(model(x_adv), y).backward()
    assert all(g.any() for g in got)
    model.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    assert relative(got, grads(model)) < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_do_not_drift(dtype: torch.dtype, method: str) -> None:
    model = mlp(dtype=dtype)
    x, y = images(8, dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    weights = METHODS[method]
    with weights.perturbed(loss, model):
        moved = [p.detach().clone() for p in model.parameters()]
    assert relative(moved, before) > 0.01
    for _ in range(100 if method in ("awp", "sam", "asam", "random") else 5):
        weights.backward(loss, model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad.dtype == dtype for p in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["awp", "sam", "sam_1.5", "asam", "amp"])
def test_ball_arithmetic_of_low_precision_weights_is_in_float32(method: str) -> None:
    # The displacement has the size it should have to float32's precision, before it is rounded.
    model = mlp(dtype=torch.bfloat16)
    x, y = images(8, dtype=torch.bfloat16)
    twin = mlp(dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    weights = METHODS[method]
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    if weights.ascent.steps > 1:
        weights = replace(weights, ascent=replace(weights.ascent, steps=1))
    found = torch.autograd.grad(loss(), list(model.parameters()))
    # A linear function with the same gradient, in float32.
    linear = lambda: sum(  # noqa: E731
        (p * g.float()).sum() for p, g in zip(twin.parameters(), found, strict=True)
    )
    with weights.perturbed(linear, twin):
        expected = [p.detach().to(torch.bfloat16) for p in twin.parameters()]
    with weights.perturbed(loss, model):
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=2**-8, atol=1e-4)
            assert (p == e).double().mean() > 0.9


def test_attacks_on_low_precision_models() -> None:
    model = mlp(dtype=torch.bfloat16)
    x, y = images(8, dtype=torch.bfloat16)
    for norm in ("linf", "l2", "l1"):
        x_adv = rf.pgd(norm, 0.25, 3)(model, x, y)
        assert x_adv.dtype == torch.bfloat16
        assert x_adv.isfinite().all()
        assert not torch.equal(x_adv, x)


# float16: a gradient scaler.


def scaled(enabled: bool = True, scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_changes_nothing_but_the_scale(method: str, enabled: bool) -> None:
    # Powers of two multiply exactly, so that the unscaled gradient is the same to rounding.
    model = conv_bn(dtype=torch.float32)
    x, y = images(8, dtype=torch.float32)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    value = METHODS[method].backward(loss, model, generator=g())
    expected = grads(model)
    scaler = scaled(enabled)
    model.zero_grad()
    again = METHODS[method].backward(loss, model, generator=g(), scaler=scaler)
    assert float(again) == pytest.approx(float(value), rel=1e-5)
    if enabled:
        assert relative(grads(model), [e * 1024 for e in expected]) < 1e-5
    scaler.unscale_(torch.optim.SGD(model.parameters(), 0.1))
    assert relative(grads(model), expected) < 1e-5


def test_a_scaler_works_through_msam_and_nsam() -> None:
    model = mlp()
    x, y = images(8, dtype=torch.float32)
    for weights, loss in (
        (rf.msam(rf.gsam(1.0, 0.4), 4), lambda r: F.cross_entropy(model(x[r]), y[r])),
        (rf.nsam(rf.amp(1.0, 3.0), 2), lambda i: F.cross_entropy(model(x.flip(0) if i else x), y)),
    ):
        model.zero_grad()
        weights.backward(loss, model)  # type: ignore[arg-type]
        expected = grads(model)
        scaler = scaled()
        model.zero_grad()
        weights.backward(loss, model, scaler=scaler)  # type: ignore[arg-type]
        assert relative(grads(model), [e * 1024 for e in expected]) < 1e-5


@pytest.mark.parametrize("where", ["ascent", "descent", "neither"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_an_overflow_in_either_pass_skips_the_step(method: str, where: str) -> None:
    model = mlp()
    x, y = images(8, dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    weights = METHODS[method]
    at = {"ascent": 1, "descent": weights.ascent.steps + 1, "neither": 0}[where]
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        # Finite, but 1024 times it is not.
        return F.cross_entropy(model(x), y) * (1e37 if calls == at else 1.0)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = scaled()
    weights.backward(loss, model, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    skipped = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert skipped == (where != "neither")
    assert scaler.get_scale() == (1024.0 if where == "neither" else 512.0)


def test_float16_autocast_with_a_scaler() -> None:
    model = mlp()
    x, y = images(8, dtype=torch.float32)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return F.cross_entropy(model(x), y)

    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5), scaled()
    first = float(loss().detach())
    for _ in range(20):
        rf.sam(0.05).backward(loss, model, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert float(loss().detach()) < 0.9 * first


class Casts(TorchDispatchMode):
    """Counts copies of the network's matrices in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shapes = [p.shape for p in model.parameters() if p.ndim > 1]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16:
            self.count += found.shape in self.shapes
        return found


@pytest.mark.parametrize(
    "attack", [rf.pgd("l2", 0.5, 5), rf.pgd("l2", 0.5, 4, loss="kl", restarts=2)]
)
@pytest.mark.parametrize("reattack", ["never", "descent"])
def test_a_whole_attack_casts_the_weights_once_and_to_the_same_images(
    attack: Any, reattack: Any
) -> None:
    x, y = images(6, dtype=torch.float32)
    counts, ends = [], []
    for together in (True, False):
        model = conv_bn(dtype=torch.float32)

        def apart(net: nn.Module, *given: Any, **more: Any) -> Tensor:
            """The attack, each pass in a region of its own."""

            def one(images: Tensor) -> Tensor:
                torch.clear_autocast_cache()
                found: Tensor = net(images)
                torch.clear_autocast_cache()
                return found

            class Each(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.net = net

                def forward(self, images: Tensor) -> Tensor:
                    return one(images)

            return attack(Each(), *given, generator=more["generator"])  # type: ignore[no-any-return]

        step = TrainStep(
            attack=attack if together else apart,  # type: ignore[arg-type]
            objective=rf.adversarial(),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            precision=torch.bfloat16,
            reattack=reattack,
        )
        for _ in range(2):
            with Casts(model) as casts:
                step(model, [(x, y)], rf.awp(0.3), torch.Generator().manual_seed(2))
        counts.append(casts.count)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    attacks = 1 if reattack == "never" else 2
    # Two matrices, in the climb, in the descent and once an attack; after each pass without
    # gradient, as of the clean images and at the end of a start, anew.
    times = 3 if attack.loss == "kl" else 1
    assert counts[0] == 2 * (attacks * times + 2)
    assert counts[0] < counts[1]
