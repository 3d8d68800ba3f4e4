"""Two processes with DistributedDataParallel: replicas stay equal and mean what they should."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import of_group
from reference.nets import conv_bn, images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import robustflat as rf
from robustflat.train.step import TrainStep

STEPS = 3
METHODS: dict[str, Any] = {
    "none": rf.no_perturbation(),
    "awp": rf.awp(0.1),
    "awp3": rf.awp(0.1, steps=3),
    "sam": rf.sam(0.2),
    "asam": rf.asam(0.5),
    "gsam": rf.gsam(0.2, 0.4),
    "nsam": rf.nsam(rf.sam(0.2), 2),
    "msam": rf.msam(rf.sam(0.2), 2),
    "msam_gsam": rf.msam(rf.gsam(0.2, 0.4), 2),
    "named": rf.sam(0.2, parameters=r"re:^4\."),
    "gnp": rf.gnp(0.2),
    "gam": rf.gam(0.2, 0.2),
    "zsharp": rf.zsharp(0.2, 0.5),
    "rwp": rf.rwp(0.1, 2.4, 2),
    "esam": rf.esam(0.2, 0.6, 0.8),
    "fsam": rf.fsam(0.2),
    "vasso": rf.vasso(0.2, 0.5),
    "momentum_sam": rf.momentum_sam(0.2),
    "looksam": rf.looksam(0.2, every=2),
    "lesam": rf.lesam(0.2, 0.1),
    "random": rf.random_weights(0.2),
    "rwp_mix": rf.rwp_mix(0.05),
}
# Those that can climb the loss of all processes together.
TOGETHER = {
    name: weights.synchronised("global")
    for name, weights in METHODS.items()
    if not name.startswith("msam") and name not in ("none", "nsam", "esam", "named")
}
# In one process, the same as a perturbation of its own for the 4 rows of each of two processes.
SINGLE: dict[str, Any] = {
    "none": rf.no_perturbation(),
    **{m: rf.msam(METHODS[m], 4) for m in ("awp", "awp3", "sam", "asam", "gsam", "named")},
    "msam": rf.msam(rf.sam(0.2), 2),
    "msam_gsam": rf.msam(rf.gsam(0.2, 0.4), 2),
}


def step(weights: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(weights, rf.msam):
        return weights.backward(lambda r: F.cross_entropy(model(x[r]), y[r]), model)
    if getattr(weights, "batches", 1) > 1:
        return weights.backward(lambda i: F.cross_entropy(model(x.flip(-1) if i else x), y), model)
    reduction = "none" if weights.wants_rows else "mean"
    return weights.backward(
        lambda: F.cross_entropy(model(x), y, reduction=reduction),
        model,
        generator=torch.Generator().manual_seed(7),
    )


def small() -> nn.Module:
    """Without BatchNorm, whose statistics are of one process's rows."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 3, 3), nn.Linear(3 * 4, 3)
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), last).double()


def follow(weights: Any, model: nn.Module, rows: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Three steps, each with an attack; what came of them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    attack = rf.fgsm("linf", 0.05, mode="batch")
    grads = []
    for seed in range(STEPS):
        x, y = (rows(t) for t in images(8, seed))
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        if seed:  # at the first step, the descent alone
            x = attack(bare, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        step(weights, model, x, y)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        grads.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
        optimizer.step()
    return {
        "grads": grads,
        "weights": [p.detach().clone() for p in model.parameters()],
        "statistics": [b.clone() for b in model.buffers()],
        "memory": weights.state_dict().get("tensors") or [],
    }


def overflow(rank: int) -> list[int]:
    """What a method that remembers has counted, where one process overflows in its second step."""
    model, weights, steps = DistributedDataParallel(small()), rf.fsam(0.1), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        x, y = (t[4 * rank : 4 * rank + 4] for t in images(8, i))
        factor = 1e306 if (i, rank) == (1, 1) else 1.0
        model.zero_grad()
        weights.backward(
            lambda x=x, y=y, factor=factor: F.cross_entropy(model(x), y) * factor,
            model,
            scaler=scaler,
        )
        steps.append(weights.state_dict()["steps"])
    return steps


def accumulated(rank: int) -> dict[str, list[Tensor]]:
    """The gradient of two batches in one step, the first under ``no_sync``."""
    found = {}
    for name in ("sam", "gsam"):
        model = DistributedDataParallel(small())
        for i in range(2):
            x, y = (t[4 * rank : 4 * rank + 4] for t in images(8, i))
            with model.no_sync() if i == 0 else contextlib.nullcontext():
                step(METHODS[name], model, x, y)
        found[name] = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    return found


PARTS = {"none": METHODS["none"], "awp": TOGETHER["awp"], "gsam": TOGETHER["gsam"]}


def in_parts(model: nn.Module, name: str, parts: int, mine: slice) -> list[Tensor]:
    """The weights after two steps of a run."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step = TrainStep(
        attack=rf.pgd("linf", 0.1, 2, start="zero"),
        objective=rf.trades(),
        optimizer=optimizer,
        accumulate=parts,
    )
    for seed in range(2):
        x, y = images(8, seed)
        step(model, [(x[mine], y[mine])], PARTS[name])
    return [p.detach().clone() for p in model.parameters()]


def process(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, weights in METHODS.items():
        for split in ("own", "same"):
            model = DistributedDataParallel(conv_bn())
            rows = (lambda t: t[4 * rank : 4 * rank + 4]) if split == "own" else (lambda t: t)
            try:
                results[f"{name}-{split}"] = follow(weights, model, rows)
            except Exception as error:  # told by the parent, so that one does not hide the others
                results[f"{name}-{split}"] = repr(error)
    for name, weights in TOGETHER.items():
        model = DistributedDataParallel(small())
        try:
            results[f"{name}-together"] = follow(
                weights, model, lambda t: t[4 * rank : 4 * rank + 4]
            )
        except Exception as error:
            results[f"{name}-together"] = repr(error)
    results["overflow"] = overflow(rank)
    results["accumulated"] = accumulated(rank)
    results["parts"] = {
        name: in_parts(DistributedDataParallel(small()), name, 2, slice(4 * rank, 4 * rank + 4))
        for name in PARTS
    }
    # An attack handed the wrapped model must not upset its gradient reduction.
    model = DistributedDataParallel(conv_bn())
    x, y = (t[4 * rank : 4 * rank + 4] for t in images(8))
    for _ in range(2):
        x_adv = rf.pgd("linf", 0.1, 2)(model, x, y)
        rf.awp(0.1).backward(lambda: F.cross_entropy(model(x_adv), y), model)  # noqa: B023
    results["attacked"] = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    # A failure inside leaves the weights of every process whole, and the next step works.
    before = [p.detach().clone() for p in model.parameters()]

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        rf.sam(0.1).backward(interrupted, model)
    results["restored"] = all(
        torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
    )
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_group(process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("split", ["own", "same"])
@pytest.mark.parametrize("method", METHODS)
def test_replicas_stay_bit_equal(ranks: list[dict[str, Any]], method: str, split: str) -> None:
    one, two = (r[f"{method}-{split}"] for r in ranks)
    assert isinstance(one, dict), one
    for a, b in zip(one["weights"], two["weights"], strict=True):
        assert torch.equal(a, b)
    for g, h in zip(one["grads"], two["grads"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(g, h, strict=True))
    assert bool(one["memory"]) == (method in ("fsam", "vasso", "momentum_sam", "looksam"))
    assert all(torch.equal(a, b) for a, b in zip(one["memory"], two["memory"], strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_rows_everywhere_are_one_process(ranks: list[dict[str, Any]], method: str) -> None:
    got = ranks[1][f"{method}-same"]
    assert isinstance(got, dict), got
    expected = follow(METHODS[method], conv_bn(), lambda t: t)
    for a, b in zip(got["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(got["statistics"], expected["statistics"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", SINGLE)
def test_processes_perturb_for_their_own_rows_and_average(
    ranks: list[dict[str, Any]], method: str
) -> None:
    # Only the first step: BatchNorm sees 4 rows in each process, and so it does in a chunk.
    got = ranks[0][f"{method}-own"]
    assert isinstance(got, dict), got
    model = conv_bn()
    x, y = images(8, 0)
    if method == "none":
        (
            F.cross_entropy(model(x[:4]), y[:4]) / 2 + F.cross_entropy(model(x[4:]), y[4:]) / 2
        ).backward()
    else:
        step(SINGLE[method], model, x, y)
    for a, p in zip(got["grads"][0], model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


def test_attacks_and_faults_leave_the_reduction_whole(ranks: list[dict[str, Any]]) -> None:
    for a, b in zip(ranks[0]["attacked"], ranks[1]["attacked"], strict=True):
        assert torch.equal(a, b)
    assert all(r["restored"] for r in ranks)


@pytest.mark.parametrize("method", TOGETHER)
def test_processes_that_climb_together_are_one(ranks: list[dict[str, Any]], method: str) -> None:
    one, two = (r[f"{method}-together"] for r in ranks)
    assert isinstance(one, dict), one
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    expected = follow(METHODS[method], small(), lambda t: t)
    for a, b in zip(one["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_an_overflow_in_one_process_is_one_in_all(ranks: list[dict[str, Any]]) -> None:
    assert [r["overflow"] for r in ranks] == [[1, 1, 2], [1, 1, 2]]


@pytest.mark.parametrize("method", ["sam", "gsam"])
def test_gradients_accumulate_under_no_sync(ranks: list[dict[str, Any]], method: str) -> None:
    expected = small()
    total = [torch.zeros_like(p) for p in expected.parameters()]
    for i in range(2):
        x, y = images(8, i)
        for part in (slice(0, 4), slice(4, 8)):
            expected.zero_grad()
            step(METHODS[method], expected, x[part], y[part])
            for t, p in zip(total, expected.parameters(), strict=True):
                t += p.grad / 2  # type: ignore[operator]
    for r in ranks:
        for a, b in zip(r["accumulated"][method], total, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", PARTS)
def test_processes_that_see_parts_are_one(ranks: list[dict[str, Any]], method: str) -> None:
    expected = in_parts(small(), method, 1, slice(None))
    for r in ranks:
        for a, b in zip(r["parts"][method], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_static_graph_is_refused() -> None:
    class Static(DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.module, self.static_graph = small(), True

    with pytest.raises(ValueError, match="Leave static_graph out"):
        rf.sam(0.1).backward(lambda: torch.zeros(()), Static())
