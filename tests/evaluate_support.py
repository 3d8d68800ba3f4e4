"""Models and data that the evaluation's tests share."""

from __future__ import annotations

import functools
from typing import Any

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import robustflat as rf
from robustflat.evaluate import Evaluation, Work, choose
from robustflat.evaluate.record import Record


def evaluate(
    model: Any,
    data: Any,
    attacks: Any = ("autoattack",),
    norm: Any = "linf",
    eps: Any = None,
    seed: Any = 0,
    *,
    samples: Any = None,
    shard: Any = None,
    store: Any = None,
    **work: Any,
) -> Evaluation:
    """The evaluation, with all that it takes as keywords."""
    chosen = choose(data, samples, shard)
    return rf.evaluate(model, chosen, attacks, norm, eps, seed, store=store, work=Work(**work))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return x, torch.tensor(data.target)


def held_out(count: int) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[1500 : 1500 + count].clone(), y[1500 : 1500 + count].clone()


@functools.cache
def _state(steps: int | None) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _net()
        x, y = digits()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        attack = rf.pgd(eps=0.15, steps=3)
        for _ in range(6 if steps is None else 1):
            for rows in torch.randperm(1500).split(64)[:steps]:
                x_adv = attack(model, x[rows], y[rows])
                loss = F.cross_entropy(model(x_adv), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.state_dict()


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def trained(steps: int | None = None) -> nn.Sequential:
    """A small network with BatchNorm, adversarially trained on digits; in eval mode.

    For six epochs, or only so many steps.
    """
    model = _net()
    model.load_state_dict(_state(steps))
    return model.eval()


def linear(classes: int, pixels: tuple[int, int, int], seed: int = 0) -> nn.Sequential:
    """Logits W x + b."""
    generator = torch.Generator().manual_seed(seed)
    size = pixels[0] * pixels[1] * pixels[2]
    layer = nn.Linear(size, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, size, generator=generator))
        # Centred: the middle of the box lies on every boundary, so that margins are small.
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    return nn.Sequential(nn.Flatten(), layer).eval()


def shorten(monkeypatch: pytest.MonkeyPatch) -> type:
    """AutoAttack with small budgets, also where it is compared with."""
    official = pyautoattack.AutoAttack

    class Short(official):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.square.n_queries = 60
            self.fab.n_iter = 6
            for attack in (self.apgd, self.apgd_targeted):
                attack.n_iter = attack.n_iter_orig = 12
                attack.n_iter_2, attack.n_iter_min, attack.size_decr = 2, 1, 1

    monkeypatch.setattr(pyautoattack, "AutoAttack", Short)
    return Short


def empty_record(count: int, **settings: Any) -> Record:
    """A record of examples that the model classifies, before any attack."""
    nothing = torch.zeros(count, dtype=torch.int64)
    return Record(
        settings=settings,
        right=torch.ones(count, dtype=torch.bool),
        positions=nothing,
        labels=nothing,
        predictions=nothing,
    )
