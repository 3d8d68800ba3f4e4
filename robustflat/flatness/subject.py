"""Owns what is measured: one model on one set of examples, and what its measures share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.team import Team
from robustflat.flatness.closure import Closure, Count, attack_starts, starts_of
from robustflat.flatness.options import Options
from robustflat.flatness.store import Store
from robustflat.perturb import InputPerturbation, select

LossKind = Literal["clean", "robust", "robust_fixed"]
T = TypeVar("T")
Draw = Callable[[list[Tensor], torch.Generator], list[Tensor]]


@dataclass(eq=False)
class Subject:
    """A model and the examples that it is measured on.

    Attributes:
        model: in eval mode.
        x: images.
        y: labels.
        batch_size: examples in a pass.
        seed: every random number depends on it and on what it is for, not on what came before.
        store: keeps finished parts.
        prefix: of this subject's keys in the store.
        cache: what measures share in memory; by keys that tell everything it depends on.
        count: told of every pass.
        initial: the weights before training, by name, where they are known.
        team: processes that share the passes.
        images: how many there were before the first so many were chosen, if some were.
        searched: what attacks are given in place of the model: the same, compiled.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    _: KW_ONLY
    batch_size: int
    seed: int
    store: Store = field(default_factory=Store)
    prefix: str = ""
    cache: dict[Any, Any] = field(default_factory=dict)
    count: Count = lambda kind, examples: None
    initial: Mapping[str, Tensor] | None = None
    team: Team = field(default_factory=Team)
    images: int | None = None
    searched: nn.Module | None = None

    def __len__(self) -> int:
        return len(self.x)

    def closure(self, options: Options, loss: LossKind) -> Closure:
        """The clean loss; the robust one, remade at all weights; or that at fixed examples.

        Fixed adversarial examples are made once, at the present weights, which must then be the
        centre.
        """
        clean = Closure(
            model=self.model,
            x=self.x,
            y=self.y,
            batch_size=self.batch_size,
            count=self.count,
            searched=self.searched,
            normalise_logits=options.normalise_logits,
            team=self.team,
        )
        if loss == "clean":
            return clean
        if loss == "robust":
            return self._attacking(clean, options.attack)
        fixed = self.once(
            ("fixed", options.attack), lambda: self._attacking(clean, options.attack).attacked()
        )
        return replace(clean, x=fixed)

    def derived(self, options: Options, loss: LossKind) -> Closure:
        """The loss whose derivatives are taken: clean, or robust at fixed examples."""
        return self.closure(options, "clean" if loss == "clean" else "robust_fixed")

    def parameters(self, options: Options, default: str) -> dict[str, nn.Parameter]:
        """The weights that are moved or differentiated, by name."""
        try:
            return select(self.model, options.parameters or default)
        except ValueError as error:
            raise UserError(str(error)) from None

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator of its own for every purpose, on the CPU."""
        text = "/".join(map(str, (self.seed, *purpose)))
        words = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return torch.Generator().manual_seed(words >> 1)

    def draw(self, draw: Draw, like: Sequence[Tensor], *purpose: object) -> list[Tensor]:
        """Random tensors, the same on every device and in every memory format.

        Args:
            draw: fills tensors on the CPU of the shapes and types of ``like``, with a generator.
            like: gives shapes, types and devices.
            *purpose: as :meth:`generator`.
        """
        blank = [torch.empty(t.shape, dtype=t.dtype) for t in like]
        drawn = draw(blank, self.generator(*purpose))
        return [d.to(t.device) for d, t in zip(drawn, like, strict=True)]

    def part(self, key: str, compute: Callable[[], T]) -> T:
        """A part of a measurement that JSON can hold: computed, or read from the store."""
        found = self.store.get(f"{self.prefix}/{key}")
        if found is None:
            found = compute()
            self.keep(key, found)
        result: T = found
        return result

    def keep(self, key: str, part: Any) -> None:
        """Put a part into the store, unless it is there."""
        key = f"{self.prefix}/{key}"
        if self.store.get(key) is None:
            self.store.put(key, part)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What several measures share, kept in memory."""
        if key not in self.cache:
            self.cache[key] = compute()
        result: T = self.cache[key]
        return result

    def _attacking(self, clean: Closure, attack: InputPerturbation) -> Closure:
        starts = self.once(
            ("starts", attack),
            lambda: tuple(
                self.draw(partial(attack_starts, attack), [self.x] * starts_of(attack), "attack")
            ),
        )
        return replace(clean, attack=attack, starts=starts)


def signs(blank: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Rademacher variables, for :meth:`Subject.draw`."""
    return [t.bernoulli_(0.5, generator=generator) * 2 - 1 for t in blank]


def normal(blank: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Standard normal variables, likewise."""
    return [t.normal_(generator=generator) for t in blank]
