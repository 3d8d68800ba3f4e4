"""Owns the part of a large grid that is run: random walks that change one key at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustflat.errors import UserError
from robustflat.study.ranking import SEED
from robustflat.study.schema import Walks

ATTEMPTS = 1000
Grid = Mapping[str, Sequence[Any]]
Indices = dict[str, int]


@dataclass(frozen=True)
class Chosen:
    """One combination: its block of the grid, and the index of a value for each of its keys."""

    block: int
    index: Mapping[str, int]

    def __hash__(self) -> int:
        return hash((self.block, *self.index.values()))


def varied(grid: Grid) -> list[str]:
    """The keys that a walk changes: those of several values, but for the seed."""
    return [key for key, values in grid.items() if len(values) > 1 and key != SEED]


def walks(grid: Grid, design: Walks) -> Iterator[Chosen]:
    """The combinations of one block of a grid that a design runs, walk after walk.

    Args:
        grid: the values of each key.
        design: how many walks, and the seed of their drawing.

    Raises:
        UserError: if the grid has too few combinations for so many walks.
    """
    draw = random.Random(design.seed)
    used: Counter[tuple[str, int]] = Counter()
    seen: set[Chosen] = set()
    for done in range(design.walks):
        for _ in range(ATTEMPTS):
            walk = [Chosen(0, index) for index in _walk(grid, used, draw)]
            if not seen & set(walk):
                break
        else:
            raise UserError(
                f"The grid has too few combinations for design.walks = {design.walks}: after "
                f"{done} walks no other was found. Ask for fewer, or leave out design to run them "
                "all."
            )
        seen |= set(walk)
        for chosen in walk:
            used.update(chosen.index.items())
            for seed in range(len(grid.get(SEED, [None]))):
                yield Chosen(0, {**chosen.index, SEED: seed} if SEED in grid else chosen.index)


def _walk(grid: Grid, used: Mapping[tuple[str, int], int], draw: random.Random) -> list[Indices]:
    """One walk; values that were used least before it come first."""

    def another(key: str, but: int | None = None) -> int:
        rest = [i for i in range(len(grid[key])) if i != but]
        least = min(used[key, i] for i in rest)
        return draw.choice([i for i in rest if used[key, i] == least])

    here: Indices = {key: 0 if key == SEED else another(key) for key in grid}
    found = [here]
    for key in draw.sample(order := varied(grid), len(order)):
        here = {**here, key: another(key, here[key])}
        found.append(here)
    return found
