"""Owns how a tuple of whole numbers becomes a random generator, apart from torch's global one."""

from __future__ import annotations

import numpy as np
import torch

from robustflat.errors import UserError


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator that depends on these numbers and on nothing else.

    Different tuples give unrelated streams (numpy's SeedSequence hashes them), so `(seed, epoch)`
    and `(seed, epoch, batch, rank)` can be used side by side.

    Args:
        *keys: Whole numbers, not negative.

    Returns:
        The generator.

    Raises:
        UserError: If a number is negative.
    """
    return torch.Generator().manual_seed(seed_for(*keys))


def seed_for(*keys: int) -> int:
    """The seed of such a generator, of 64 bits; see :func:`generator_for`."""
    if any(key < 0 for key in keys):
        raise UserError(f"Seeds must not be negative, got {keys}.")
    # The length goes in first: SeedSequence itself takes (3,) and (3, 0) for the same.
    words = np.random.SeedSequence([len(keys), *keys]).generate_state(1, np.uint64)
    return int(words[0])
