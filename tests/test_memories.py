"""What weight perturbations remember: resumed, skipped, moved, per model, equal on processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images, mlp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from train_support import differences, rows, same_run, saved, trained

import robustflat as rf
from robustflat.train.step import TrainStep

MAKE: dict[str, Callable[[], Any]] = {
    "fsam": lambda: rf.fsam(0.1),
    "vasso": lambda: rf.vasso(0.1, 0.4),
    "momentum_sam": lambda: rf.momentum_sam(0.1),
    "looksam": lambda: rf.looksam(0.1, every=3),
    "lesam": lambda: rf.lesam(0.5, 0.05, steps=8),
    "esam": lambda: rf.esam(0.1),
}


def walk(
    model: nn.Module, weights: Any, seeds: range, optimizer: torch.optim.Optimizer | None = None
) -> list[Tensor]:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for seed in seeds:
        x, y = images(6, seed)
        optimizer.zero_grad()
        weights.backward(
            lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"),
            model,
            generator=torch.Generator().manual_seed(seed),
        )
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_a_loaded_memory_goes_on_bit_for_bit(name: str) -> None:
    model, optimizer = conv_bn(), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    weights = MAKE[name]()
    walk(model, weights, range(4), optimizer)
    half = copy.deepcopy((model.state_dict(), optimizer.state_dict(), weights.state_dict()))
    whole = walk(model, weights, range(4, 7), optimizer)

    again = conv_bn()
    other = torch.optim.SGD(again.parameters(), 0.1, momentum=0.9)
    again.load_state_dict(half[0])
    other.load_state_dict(half[1])
    fresh = MAKE[name]()
    fresh.load_state_dict(half[2])
    assert equal(walk(again, fresh, range(4, 7), other), whole)

    forgetful = conv_bn()
    other = torch.optim.SGD(forgetful.parameters(), 0.1, momentum=0.9)
    forgetful.load_state_dict(half[0])
    other.load_state_dict(half[1])
    assert not equal(walk(forgetful, MAKE[name](), range(4, 7), other), whole)


@pytest.mark.parametrize("name", MAKE)
def test_another_model_begins_anew(name: str) -> None:
    weights = MAKE[name]()
    first = walk(conv_bn(), weights, range(4))
    assert equal(walk(conv_bn(), weights, range(4)), first)


@pytest.mark.parametrize("name", MAKE)
def test_a_changed_radius_keeps_the_memory(name: str) -> None:
    model, weights = conv_bn(), MAKE[name]()
    walk(model, weights, range(3))
    smaller = weights.scaled(0.5)
    assert smaller.ball.radius == 0.5 * weights.ball.radius
    walk(model, smaller, range(3, 4))
    assert weights.state_dict()["steps"] == 4
    assert differences(weights.state_dict(), smaller.state_dict()) == []


def test_states_of_another_kind_are_refused() -> None:
    remembering, forgetful = rf.fsam(0.1), rf.sam(0.1)
    walk(conv_bn(), remembering, range(1))
    with pytest.raises(ValueError, match="has none memory, and the state given holds one"):
        forgetful.load_state_dict(remembering.state_dict())
    with pytest.raises(ValueError, match="fsam has one memory, and the state given holds none"):
        rf.fsam(0.1).load_state_dict({})
    rf.sam(0.1).load_state_dict(rf.awp().state_dict())
    strange = rf.fsam(0.1)
    strange.load_state_dict(remembering.state_dict())
    with pytest.raises(ValueError, match="does not fit the 4 parameters"):
        walk(mlp(dtype=torch.float64), strange, range(1))


@pytest.mark.parametrize("name", ["fsam", "vasso", "momentum_sam", "looksam"])
def test_an_overflow_is_not_remembered(name: str) -> None:
    model, weights = conv_bn(dtype=torch.float32), MAKE[name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def take(bad: bool) -> None:
        x, y = images(6, dtype=torch.float32)
        optimizer.zero_grad()
        factor = 1e37 if bad else 1.0
        weights.backward(lambda: F.cross_entropy(model(x), y) * factor, model, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    take(bad=True)
    assert weights.state_dict() == {"steps": 0, "tensors": None}
    take(bad=False)
    before = copy.deepcopy(weights.state_dict())
    assert all(t.isfinite().all() for t in before["tensors"])
    take(bad=True)
    assert differences(weights.state_dict(), before) == []


@pytest.mark.parametrize("name", ["fsam", "vasso", "momentum_sam", "looksam"])
def test_what_is_remembered_is_not_scaled(name: str) -> None:
    found = []
    for scale in (None, 1024.0):
        model, weights = conv_bn(), MAKE[name]()
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        for seed in range(2):
            x, y = images(6, seed)
            model.zero_grad()
            weights.backward(
                lambda m=model, x=x, y=y: F.cross_entropy(m(x), y), model, scaler=scaler
            )
        found.append((weights.state_dict()["tensors"], [p.grad for p in model.parameters()]))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a * 1024, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["fsam", "momentum_sam", "looksam", "lesam"])
def test_a_step_that_is_skipped_leaves_no_trace(name: str) -> None:
    """A batch whose loss is nan, under the policy to skip it, might as well not have been."""
    ends = []
    for with_bad in (True, False):
        model, weights = conv_bn(dtype=torch.float32), MAKE[name]()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step = TrainStep(
            attack=None, objective=rf.standard(), optimizer=optimizer, skip_nonfinite=True
        )
        model.train()
        for seed in range(4):
            x, y = images(6, seed, torch.float32)
            if with_bad and seed in (0, 2):
                step(model, [(x * float("nan"), y)], weights)
            step(model, [(x, y)], weights)
        ends.append((model.state_dict(), weights.state_dict()))
    assert differences(ends[0][0], ends[1][0]) == []
    assert differences(ends[0][1], ends[1][1]) == []


@pytest.mark.parametrize("name", MAKE)
def test_an_error_leaves_the_memory_as_it_was(name: str) -> None:
    model, weights = conv_bn(), MAKE[name]()
    walk(model, weights, range(3))
    before = copy.deepcopy(weights.state_dict())
    last = weights.passes

    def loss() -> Tensor:
        nonlocal last
        last -= 1
        if last == 0:
            raise KeyboardInterrupt
        x, y = images(6)
        return F.cross_entropy(model(x), y, reduction="none")

    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(KeyboardInterrupt):
        weights.backward(loss, model, generator=torch.Generator().manual_seed(0))
    assert differences(weights.state_dict(), before) == []
    assert equal([p.grad for p in model.parameters() if p.grad is not None], grads)


def test_a_memory_follows_its_weights() -> None:
    weights, model = rf.fsam(0.1), mlp()
    x, y = images(4, dtype=torch.float32)
    weights.backward(lambda: F.cross_entropy(model(x), y), model)
    assert weights.to("meta") is weights
    assert all(t.is_meta for t in weights.state_dict()["tensors"])
    model.to("meta")
    model.zero_grad()
    x, y = x.to("meta"), y.to("meta")
    weights.backward(lambda: F.cross_entropy(model(x), y), model)
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


# What each looks at: forward and backward passes of the whole batch.
@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (lambda: rf.no_perturbation(), [1, 1]),
        (lambda: rf.awp(0.1), [2, 2]),
        (lambda: rf.awp(0.1, 3), [4, 4]),
        (lambda: rf.awp(0.0, 3), [1, 1]),
        (lambda: rf.gam(0.1), [4, 4]),
        (lambda: rf.rwp(0.1, steps=4), [5, 5]),
        (lambda: rf.momentum_sam(0.1), [1, 1]),
        (lambda: rf.looksam(0.1, every=2), [2, 1, 2, 1]),
        (lambda: rf.random_weights(0.1), [1, 1]),
        (lambda: rf.rwp_mix(0.1), [2, 2]),
        (lambda: rf.custom(0.1, steps=2, keep="best", start="uniform"), [4, 4]),
        (lambda: rf.esam(0.1), [2, 2]),
    ],
)
def test_the_stated_passes_are_those_made(make: Callable[[], Any], passes: list[int]) -> None:
    model, weights = conv_bn(), make()
    for expected in passes:
        calls = 0

        def loss() -> Tensor:
            nonlocal calls
            calls += 1
            x, y = images(6)
            return F.cross_entropy(model(x), y, reduction="none")

        stated = weights.passes
        weights.backward(loss, model, generator=torch.Generator().manual_seed(0))
        assert (stated, calls) == (expected, expected)


@pytest.mark.parametrize("name", ["rwp", "esam"])
def test_examples_are_chosen_from_rows_only(name: str) -> None:
    weights = {"rwp": rf.rwp(0.1), "esam": rf.esam(0.1)}[name]
    model, (x, y) = conv_bn(), images(6)
    with pytest.raises(ValueError, match="one loss a row"):
        weights.backward(lambda: F.cross_entropy(model(x), y), model)


@pytest.mark.parametrize("inner", ["fsam", "looksam", "esam", "momentum_sam", "lesam", "vasso"])
def test_msam_and_nsam_refuse_what_remembers(inner: str) -> None:
    with pytest.raises(ValueError, match="remembers"):
        rf.msam(MAKE[inner](), 2)
    with pytest.raises(ValueError, match="remembers"):
        rf.nsam(MAKE[inner](), 2)


def test_esam_descends_the_examples_that_rose() -> None:
    # Losses that are linear in the weights: loss_i = a_i . w, so rise_i = a_i . v.
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    model = nn.Module()
    model.w = w
    a = torch.tensor([[3.0, 0], [0, 1], [-1, 0], [0, -2], [2, 2], [1, 1]], dtype=torch.float64)
    rf.esam(0.5, beta=1.0, gamma=0.5).backward(lambda: a @ w, model)
    v = a.mean(0) / a.mean(0).norm() * 0.5
    rise = a @ v
    third = rise.sort(descending=True).values[2]
    torch.testing.assert_close(w.grad, a[rise > third].mean(0))
    assert (rise > third).sum() == 2


def test_esam_drops_whole_tensors_from_the_second_step_on() -> None:
    model = conv_bn()
    before = [p.detach().clone() for p in model.parameters()]
    weights = rf.esam(0.1, beta=0.5)
    x, y = images(6)
    loss = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    moved = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        with weights.perturbed(loss, model, generator=g):
            moved.append(
                [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
            )
        weights.backward(loss, model, generator=torch.Generator().manual_seed(seed))
    assert all(moved[0])
    assert not all(moved[1])
    assert any(moved[1])
    assert moved[1] != moved[2]


def test_lesam_shrinks_as_scheduled() -> None:
    weights = rf.lesam(1.0, 0.1, steps=6, warmup=2, hold=3)
    model = nn.Linear(1, 1, bias=False).double()
    radii = []
    for _ in range(7):
        start = model.weight.detach().clone()
        # A gradient of length 1: the radius is sigma itself.
        with weights.perturbed(lambda: model.weight.sum(), model):
            radii.append(float((model.weight.detach() - start).abs()))
        weights.backward(lambda: model.weight.sum(), model)
    assert radii == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.05, 0.0, 0.0], abs=1e-12)


# --- in the trainer

RICH: dict[str, Any] = {"train__epochs": 3, "objective": {"name": "trades"}}


@pytest.mark.parametrize("name", ["fsam", "looksam", "momentum_sam"])
def test_runs_remember_across_a_break(name: str, tmp_path: Any) -> None:
    from train_support import config

    from robustflat.train import train

    class Stop:
        def on_start(self, epochs: int, steps: int, done: int) -> None: ...

        def on_step(self, epoch: int, step: int, values: Any) -> None:
            if (epoch, step) == (1, 1):
                raise KeyboardInterrupt

        def on_epoch(self, row: dict[str, Any]) -> None: ...

        def on_end(self) -> None: ...

    said = RICH | {"weights": {"name": name}, "train__checkpoint_minutes": 1e-9}
    whole = trained(tmp_path / "whole", **said)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "broken", **said), listeners=lambda f: [Stop()])
    broken = trained(tmp_path / "broken", resume=True, **said)
    same_run(whole, broken)
    assert rows(whole)
    state = saved(whole.last)["weights"]
    assert state["steps"] == 3 * 4
    assert state["tensors"]


# --- bounds, wrappers, and what the review of exactness asks for


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rf.fsam(lmbda=2), "fsam's lmbda must be <= 1, got 2"),
        (lambda: rf.fsam(sigma=-1), "fsam's sigma must be >= 0"),
        (lambda: rf.vasso(theta=3), "theta"),
        (lambda: rf.momentum_sam(momentum=1), "momentum must be < 1"),
        (lambda: rf.gam(beta1=4), "beta1"),
        (lambda: rf.gnp(alpha=1.5), "alpha"),
        (lambda: rf.esam(gamma=-1), "gamma"),
        (lambda: rf.esam(beta=0), "beta"),
        (lambda: rf.zsharp(quantile=1.5), "quantile"),
        (lambda: rf.rwp(threshold=-1), "threshold"),
        (lambda: rf.rwp_mix(alpha=2), "alpha"),
        (lambda: rf.looksam(every=0), "every"),
        (lambda: rf.msam(rf.msam(rf.sam(), 2), 2), "wrapper"),
        (lambda: rf.nsam(rf.msam(rf.sam(), 2), 2), "wrapper"),
        (lambda: rf.nsam(rf.nsam(rf.sam(), 3), 2), "wrapper"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("make", [rf.no_perturbation, lambda: rf.sam(0.0), lambda: rf.looksam()])
def test_buffers_survive_an_error_where_nothing_is_perturbed(make: Callable[[], Any]) -> None:
    model, weights = conv_bn(), make()
    if weights.remembers:
        walk(model, weights, range(1))
    before = [b.clone() for b in model.buffers()]

    def loss() -> Tensor:
        model(images(6)[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.backward(loss, model)
    assert equal(list(model.buffers()), before)


def test_an_overflow_of_what_is_not_moved_is_not_remembered_either() -> None:
    model = conv_bn(dtype=torch.float32)
    weights = rf.fsam(0.1, parameters="norm")
    x, y = images(6, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss() -> Tensor:
        # A gradient of the last layer alone that is too large for its scale.
        return F.cross_entropy(model(x), y) + model[-1].bias.sum() * 1e36

    weights.backward(loss, model, scaler=scaler)
    assert weights.state_dict()["steps"] == 0


@pytest.mark.parametrize(
    ("name", "copies"),
    [("awp", 1), ("sam", 1), ("asam", 1), ("amp", 1), ("zsharp", 1), ("esam", 1), ("gnp", 2)],
)
def test_a_descent_holds_the_centre_and_what_its_rule_needs(name: str, copies: int) -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(128, 128) for _ in range(4)))
    x, y = torch.rand(8, 128), torch.zeros(8, dtype=torch.long)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def loss() -> Tensor:
        with record_function("a pass begins"):
            pass
        return F.cross_entropy(model(x), y, reduction="none")

    weights = getattr(rf, name)(0.1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        weights.backward(loss, model)
    held, at = 0, []
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
        elif event.name() == "a pass begins":
            at.append(held / size)
    assert at[-1] == pytest.approx(copies, abs=0.05)
