"""Where a run's randomness comes from: every stream is a function of seed, purpose and step."""

from __future__ import annotations

from typing import Literal

import torch

from robustflat.data import generator_for

Purpose = Literal["model", "order", "attack", "global", "mix", "monitor", "batches", "weights"]
_CODES: dict[Purpose, int] = {
    "model": 0,
    "order": 1,
    "attack": 2,
    "global": 3,
    "mix": 4,
    "monitor": 5,
    "batches": 6,
    "weights": 7,
}


def derived_seed(seed: int, purpose: Purpose, *where: int) -> int:
    """A seed of 62 bits that depends on these values and on nothing else.

    So a run is a function of its configuration and step: a resumed one draws what the
    uninterrupted one would have drawn, and no stream shifts another.
    """
    generator = generator_for(seed, _CODES[purpose], *where)
    return int(torch.randint(2**62, (), generator=generator))
