"""With ``sync: global`` several processes take the very step of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forked import WORLD, of_group
from reference.nets import group_layer, images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import robustflat as rf
from robustflat.data import share
from robustflat.perturb.compiled import Compiled
from robustflat.train.step import TrainStep

ROWS = 7  # 4 rows for one process and 3 for the other
METHODS: dict[str, Any] = {
    "none": rf.no_perturbation(),
    "awp": rf.awp(0.1),
    "awp3": rf.awp(0.1, steps=3),
    "amp": rf.amp(0.1),
    "sam": rf.sam(0.2),
    "asam": rf.asam(0.5),
    "gsam": rf.gsam(0.2, 0.4),
}


def follow(
    method: str, sync: Any, model: nn.Module, rank: int, world: int, attacked: Any = None
) -> list[Tensor]:
    """Three steps of a process; the weights that came of them, and the losses."""
    step = TrainStep(
        attack=rf.pgd("l2", 0.3, 2, start="zero"),
        objective=rf.trades(2.0),
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2),
        attacked=attacked,
    )
    weights = METHODS[method].synchronised(sync)
    counts = share(ROWS, ROWS + 1, 0, rank=rank, world=world) if world > 1 else 1.0
    losses = []
    for seed in range(3):
        x, y = (t[rank::world] for t in images(ROWS, seed))
        value, _ = step(model, [(x, y)], weights, share=counts)
        losses.append(value)
    return [*(p.detach().clone() for p in model.parameters()), torch.stack(losses)]


def process(rank: int) -> dict[str, Any]:
    results = {
        f"{method}-{sync}": follow(
            method, sync, DistributedDataParallel(group_layer()), rank, WORLD
        )
        for method in METHODS
        for sync in ("global", "local")
    }
    around = DistributedDataParallel(group_layer())
    attacked = Compiled(around.module, backend="aot_eager")
    results["compiled"] = follow("awp", "global", around, rank, WORLD, attacked)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_group(process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_on_the_whole_batch(
    ranks: list[dict[str, Any]], method: str
) -> None:
    *expected, losses = follow(method, "local", group_layer(), 0, 1)
    of_ranks = [r[f"{method}-global"] for r in ranks]
    for *weights, _ in of_ranks:
        for a, b in zip(weights, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    mean = torch.stack([found[-1] for found in of_ranks]).mean(0)
    torch.testing.assert_close(mean, losses, rtol=1e-9, atol=1e-12)


def test_they_do_so_with_the_attack_compiled(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for a, b in zip(found["compiled"], found["awp-global"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_perturbations_of_their_own_are_another_method(
    ranks: list[dict[str, Any]], method: str
) -> None:
    ours, theirs = ranks[0][f"{method}-local"], ranks[0][f"{method}-global"]
    change = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    assert change > 1e-12
    # Yet the replicas stay equal.
    for a, b in zip(ours[:-1], ranks[1][f"{method}-local"][:-1], strict=True):
        assert torch.equal(a, b)
