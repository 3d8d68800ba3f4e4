"""Moving weights and putting every bit of them back, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import Odd, conv_bn, images, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustflat as rf
from robustflat.perturb import attack_mode, buffers_kept, displaced, evaluating, kept

METHODS = {
    "awp": rf.awp(0.1),
    "awp3": rf.awp(0.1, steps=3),
    "awp_global": rf.awp_global(0.1),
    "amp": rf.amp(0.1, steps=2),
    "sam": rf.sam(0.1),
    "sam_linf": rf.sam(0.1, "linf", steps=2),
    "asam": rf.asam(0.5),
    "gsam": rf.gsam(0.1, 0.4),
    "random": rf.random_weights(0.1),
    "gnp": rf.gnp(0.1),
    "gam": rf.gam(0.1, 0.1),
    "zsharp": rf.zsharp(0.1, 0.5),
    "fsam": rf.fsam(0.1),
    "looksam": rf.looksam(0.1, every=2),
    "momentum_sam": rf.momentum_sam(0.1),
    "rwp_mix": rf.rwp_mix(0.1),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must survive: values, storages, training flags and requires_grad."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {n: t.detach().clone() for n, t in tensors},
        "storage": {n: (id(t), t.data_ptr()) for n, t in tensors},
        "requires_grad": {n: t.requires_grad for n, t in tensors},
        "training": {n: m.training for n, m in model.named_modules()},
        "tracking": {n: getattr(m, "track_running_stats", 0) for n, m in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any], buffers: bool = True) -> None:
    after = snapshot(model)
    for key in ("storage", "requires_grad", "training", "tracking"):
        assert after[key] == before[key]
    own = {n for n, _ in model.named_buffers()}
    for n, value in before["values"].items():
        if buffers or n not in own:
            assert torch.equal(after["values"][n], value), n


def test_displacements_start_from_the_centre_each_time() -> None:
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    storage = p.data_ptr()
    with displaced([p]) as move:
        for _ in range(3):
            move([torch.tensor([0.5, -1.0])])
            assert p.tolist() == [1.5, 1.0]
        move([torch.zeros(2)])
        assert p.tolist() == [1.0, 2.0]
        move([torch.ones(2)])
        (p**2).sum().backward()
    assert p.tolist() == [1.0, 2.0]
    assert p.grad is not None
    assert p.grad.tolist() == [4.0, 6.0]
    assert p.data_ptr() == storage
    assert p.is_leaf
    assert p.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restoring_is_exact_in_every_precision(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=g).to(dtype).requires_grad_()
    before = p.detach().clone()
    for _ in range(100):
        with displaced([p]) as move:
            move([torch.randn(1000, generator=g) * 0.3])
            assert not torch.equal(p, before)
    assert torch.equal(p, before)


def test_low_precision_weights_take_a_float32_displacement() -> None:
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    with displaced([p]) as move:
        move([torch.tensor([0.0, 0.5, 1e-4, -1.0])])
        assert p.tolist() == [1.0, 1.5, 1.0, 0.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("carry", [False, True])
def test_restored_after_any_exception(error: type[BaseException], carry: bool) -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(error), displaced([p], carry=carry) as move:  # noqa: PT012
        move([torch.ones(3)])
        raise error("boom")
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_carry_keeps_what_was_done_inside() -> None:
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    with displaced([p], carry=True) as move:
        move([torch.full((2,), 8.0)])
        move([torch.full((2,), 0.5)])
        with torch.no_grad():
            p.mul_(2)
    assert p.tolist() == [2.5, 4.5]
    with displaced([p], carry=True):
        pass
    assert p.tolist() == [2.5, 4.5]


def test_a_failed_move_is_undone() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError), displaced([p, q]) as move:
        move([torch.ones(3), torch.ones(7)])
    assert p.tolist() == [1.0] * 3
    assert q.tolist() == [1.0] * 2


def test_kept_and_buffers_kept() -> None:
    model = conv_bn()
    before = snapshot(model)
    with buffers_kept(model):
        model(images()[0])
        assert model[1].num_batches_tracked == 1
        model[1].running_mean.fill_(float("nan"))
    assert_same(model, before)
    counter = torch.tensor(3)
    with pytest.raises(KeyboardInterrupt), kept([counter]):  # noqa: PT012
        counter.add_(1)
        raise KeyboardInterrupt
    assert counter.item() == 3
    with kept([]):
        pass


class Rebinds(nn.Module):
    """Assigns its buffer anew in every forward pass instead of changing it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.net(x)


def test_buffers_that_are_assigned_anew_are_kept() -> None:
    model = Rebinds()
    with buffers_kept(model):
        model(images(dtype=torch.float32)[0])
    assert model.seen.item() == 0
    assert dict(model.named_buffers())["seen"] is model.seen


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_modes_come_back_module_by_module(mode: str) -> None:
    model = nn.Sequential(conv_bn(), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Tanh()))
    model[1].eval()
    model[3].eval()
    model[3][0].train()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), attack_mode(model, mode):  # type: ignore[arg-type]  # noqa: PT012
        live = [n for n, m in model.named_modules() if m.training]
        assert live == (["0.1"] if mode == "batch" else [])
        raise KeyboardInterrupt
    assert_same(model, before)
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert_same(model, before)
    with pytest.raises(ValueError, match="mode"), attack_mode(model, "train"):  # type: ignore[arg-type]
        pass


# Faults injected at every operation.


class Boom(BaseException):
    """No kind of error that anything could be expecting."""


class FailAt(TorchDispatchMode):
    """Raises once, at the n-th operation, before it runs (or after it ran)."""

    def __init__(self, n: int, after: bool = False) -> None:
        super().__init__()
        self.n, self.after, self.calls = n, after, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        now = self.calls == self.n
        if now and not self.after:
            raise Boom(str(func))
        result = func(*args, **(kwargs or {}))
        if now:
            raise Boom(str(func))
        return result


@contextmanager
def injected(n: int, after: bool) -> Iterator[FailAt]:
    mode = FailAt(n, after)
    try:
        with mode:
            yield mode
    except Boom:
        pass


def fail_everywhere(
    model: nn.Module, run: Callable[[], object], buffers: bool = True, every: int = 1
) -> None:
    """Run once for every operation, failing there; the model must come back unchanged."""
    before = snapshot(model)
    pristine = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    model.zero_grad()
    with FailAt(0) as counting:
        run()
    total = counting.calls
    assert total > 20
    for n in range(1, total + 1, every):
        model.zero_grad()  # a gradient that is there already takes other operations
        for t, value in zip((*model.parameters(), *model.buffers()), pristine, strict=True):
            t.data.copy_(value)
        with injected(n, after=n % 2 == 0) as mode:
            run()
        assert mode.calls >= n
        assert_same(model, before, buffers)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_weights_survive_a_fault_at_every_operation_of_backward(method: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(3, dtype=torch.float32)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    weights = deepcopy(METHODS[method])
    weights.backward(loss, model)  # so that there is something to remember
    run = lambda: deepcopy(weights).backward(loss, model)  # noqa: E731
    fail_everywhere(model, run, buffers=False)


@pytest.mark.parametrize("method", ["awp", "asam", "sam"])
def test_buffers_survive_a_fault_at_every_operation_of_backward(method: str) -> None:
    # One for each setting of statistics: perturbed, both, centre.
    model = conv_bn(dtype=torch.float32)
    x, y = images(3, dtype=torch.float32)
    before = snapshot(model)
    with FailAt(0) as counting:
        METHODS[method].backward(lambda: F.cross_entropy(model(x), y), model)
    changed = []
    for n in range(1, counting.calls + 1):
        model.zero_grad()
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            t.data.copy_(before["values"][name])
        completed = False
        with injected(n, after=False):
            METHODS[method].backward(lambda: F.cross_entropy(model(x), y), model)
            completed = True
        assert not completed
        if any(not torch.equal(b, before["values"][k]) for k, b in model.named_buffers()):
            changed.append(n)
    assert not changed, f"buffers left changed by a fault at operations {changed}"


@pytest.mark.parametrize("method", ["awp", "gsam"])
def test_weights_survive_a_fault_at_every_operation_of_perturbed(method: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(3, dtype=torch.float32)

    def run() -> None:
        loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
        with METHODS[method].perturbed(loss, model):
            loss().backward()

    fail_everywhere(model, run, buffers=False)


def test_weights_survive_a_fault_while_stepping_at_the_perturbed_weights() -> None:
    # Only a run that fails is looked at: one that ends has taken its step.
    model = mlp()
    x, y = images(3, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)

    def run() -> None:
        model.zero_grad()
        rf.awp(0.5).backward(lambda: F.cross_entropy(model(x), y), model, step=optimizer.step)

    selected = [n for n, p in model.named_parameters() if p.ndim > 1]
    with FailAt(0) as counting:
        run()
    left = {}
    for n in range(1, counting.calls + 1):
        for name, p in model.named_parameters():
            p.data.copy_(before["values"][name])
        completed = False
        with injected(n, after=False) as mode:
            run()
            completed = True
        assert mode.calls >= n
        assert not completed
        stepped = {
            k: (p - before["values"][k]).norm() / before["values"][k].norm()
            for k, p in model.named_parameters()
            if k in selected
        }
        # Gamma is 0.5 and the step is small: a displaced weight is told from a stepped one.
        if max(stepped.values()) > 0.2:
            left[n] = stepped
    assert not left, f"weights left displaced by a fault at operations {sorted(left)}"


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_models_survive_a_fault_at_every_operation_of_an_attack(norm: str, mode: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(3, dtype=torch.float32)
    attack = rf.pgd(norm, 0.1, 2, restarts=2, mode=mode)  # type: ignore[arg-type]
    fail_everywhere(model, lambda: attack(model, x, y), every=3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("method", METHODS)
def test_errors_of_the_closure_pass_through(method: str, error: type[BaseException]) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(3, dtype=torch.float32)
    weights = METHODS[method]
    for at in range(1, weights.passes + 1):
        before = snapshot(model)
        calls = 0

        def loss(at: int = at) -> Tensor:
            nonlocal calls
            calls += 1
            value = F.cross_entropy(model(x), y)
            if calls == at:
                raise error("from the closure")
            return value

        with pytest.raises(error, match="from the closure"):
            weights.backward(loss, model)
        assert calls == at
        assert_same(model, before, buffers=False)


@pytest.mark.parametrize("method", ["awp", "asam", "sam"])
def test_buffers_survive_an_error_of_the_closure(method: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(3, dtype=torch.float32)
    before = snapshot(model)
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        value = F.cross_entropy(model(x), y)
        if calls == 2:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        METHODS[method].backward(loss, model)
    assert_same(model, before)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("momentum_sam", "rwp_mix")])
def test_frozen_tied_unused_and_zero_parameters(method: str) -> None:
    model = Odd()
    x, y = images(4, dtype=torch.float32)
    before = snapshot(model)
    weights = METHODS[method]
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    with weights.perturbed(loss, model, generator=torch.Generator().manual_seed(0)):
        inside = snapshot(model)["values"]
        assert model.first.weight is model.again.weight
        loss().backward()
    moved = {n for n, v in inside.items() if not torch.equal(v, before["values"][n])}
    assert {"first.weight", "head.weight"} <= moved
    assert not {"frozen.weight", "frozen.bias"} & moved
    if method != "random":
        # No gradient, no move. (A random direction needs none.)
        assert not {"unused.weight", "unused.bias"} & moved
    if method in ("awp", "awp3", "random"):
        assert not any(n.endswith("bias") for n in moved)
        assert "zero.weight" not in moved  # relative to a norm of zero
    else:
        assert "zero.weight" in moved
    assert_same(model, before)
    model.zero_grad()
    weights.backward(loss, model)
    assert_same(model, before)
    assert model.frozen.weight.grad is None
    # A zero gradient in place of none would let weight decay and momentum move it.
    assert model.unused.weight.grad is None
    assert model.first.weight.grad is not None


def test_tied_weights_move_by_one_displacement() -> None:
    model = Odd()
    x, y = images(4, dtype=torch.float32)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    w = model.first.weight.detach().clone()
    (g,) = torch.autograd.grad(loss(), model.first.weight)
    with rf.awp(0.1).perturbed(loss, model):
        v = model.first.weight.detach() - w
    torch.testing.assert_close(v, 0.1 * w.norm() * g / g.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_added_as_by_backward(method: str) -> None:
    model, apart = mlp(), mlp()
    x, y = images(4, dtype=torch.float32)
    weights, g = METHODS[method], torch.Generator()
    for part in (slice(0, 2), slice(2, 4)):
        for accumulating, m in ((True, model), (False, apart)):
            before = [torch.zeros_like(p) if p.grad is None else p.grad for p in apart.parameters()]
            if not accumulating:
                m.zero_grad()
            weights.backward(
                lambda m=m, part=part: F.cross_entropy(m(x[part]), y[part]),
                m,
                generator=g.manual_seed(0),
            )
    for p, q, first in zip(model.parameters(), apart.parameters(), before, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert first.any()
        torch.testing.assert_close(p.grad, first + q.grad)


def test_the_value_is_a_detached_scalar() -> None:
    model = mlp()
    x, y = images(4, dtype=torch.float32)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    value = rf.sam(0.1).backward(loss, model)
    assert not value.requires_grad
    assert value.shape == ()
