"""Owns the one interface behind which every attack runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustflat.errors import UserError, nearest

Run = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """An attack on a batch.

    Attributes:
        name: As shown beside its figure.
        identity: Its parameters, as JSON: two attacks with equal identities are the same.
        run: From the model (eval mode, frozen, float32 logits), images [N, C, H, W], labels [N]
            and a seed to images of the same shape; those not broken may be anything. It keeps
            nothing between calls, so that a batch can be attacked again after a kill.
        black_box: Whether it only looks at outputs.
        bounded: Whether it keeps to the ball by itself; if not, its images outside are no surprise.
        passes: Forward passes that it takes for an image at most, one with a gradient counted
            twice; None where nobody knows.
        stored: From places among the examples to images that were made before, in place of `run`.
        tried_first: Whether it is tried on two images before anything is paid for, as nobody knows
            what it does.
    """

    name: str
    identity: dict[str, Any]
    run: Run
    black_box: bool = False
    bounded: bool = True
    passes: int | None = None
    stored: Callable[[Tensor], Tensor] | None = None
    tried_first: bool = False

    def searching_in(self, precision: str) -> Attack:
        """The same attack, under the name and the identity that it has in this precision."""
        if precision == "fp32":
            return self
        identity = {**self.identity, "precision": precision}
        return replace(self, name=f"{self.name}@{precision}", identity=identity)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What one request asks for: an attack, or several, each on what the ones before left.

    Attributes:
        name: As it is asked for and shown, such as "pgd-20" or "autoattack".
        attacks: In their order.
        notes: Sentences on how they differ from what was asked for.
    """

    name: str
    attacks: Sequence[Attack]
    notes: Sequence[str] = field(default=())


def check_options(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse options that an attack does not have.

    Raises:
        UserError: Naming the first unknown option and the nearest known one.
    """
    for key in options:
        if key not in allowed:
            hint = nearest(key, allowed, 1)
            raise UserError(
                f"The attack {name!r} has no option {key!r}.{hint} Its options: "
                f"{', '.join(allowed)}."
            )


def as_json(value: object) -> object:
    """An option as it can be written to JSON."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that attacks draw from; Python's and numpy's are put back."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
