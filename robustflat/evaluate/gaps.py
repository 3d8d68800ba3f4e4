"""Owns the robust-generalization gap: accuracy and loss per split, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.accuracy import Metrics, measure
from robustflat.evaluate.examples import Data, choose
from robustflat.evaluate.fast import compiled
from robustflat.evaluate.frozen import held
from robustflat.evaluate.intervals import LEVEL, bootstrap_means, percentiles
from robustflat.evaluate.kept import Kept
from robustflat.files import json_safe
from robustflat.perturb import InputPerturbation

FIGURES = ("clean_accuracy", "robust_accuracy", "clean_loss", "robust_loss")
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores(Kept):
    """How a model does on each example of a split.

    Attributes:
        clean_correct: bool [N].
        robust_correct: bool [N]: classified without the attack, and still with it.
        clean_loss: Cross-entropy, float [N].
        robust_loss: Cross-entropy at the attack's images, float [N].
    """

    clean_correct: Tensor
    robust_correct: Tensor
    clean_loss: Tensor
    robust_loss: Tensor

    def rows(self) -> Tensor:
        """The four figures of `FIGURES`, float64 [4, N]."""
        return torch.stack([getattr(self, field.name).double() for field in fields(self)])


@dataclass(frozen=True)
class Figure:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON; what is not finite is null."""
        found: dict[str, float | None] = json_safe(asdict(self))
        return found


Figures = dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Figures of every split, and how much worse the others are than the train split.

    Attributes:
        counts: Number of examples of each split.
        splits: For each split the figures of `FIGURES`.
        gaps: "train-test" and the like: for accuracies train minus the other, for losses the other
            minus train, so that more overfitting is a larger number in all four.
    """

    counts: dict[str, int]
    splits: dict[str, Figures]
    gaps: dict[str, Figures]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: stable keys, null for what is not finite."""
        return {"confidence": LEVEL, **json_safe(asdict(self))}


def scores(
    model: nn.Module,
    data: Data,
    attack: InputPerturbation,
    *,
    batch_size: int = 128,
    seed: int = 0,
    fast: bool = False,
) -> Scores:
    """Attack every example of a split; in eval mode, at the weights the model has.

    Args:
        model: Takes images in [0, 1], returns logits; computes where it is.
        data: The split, un-augmented: `(x, y)`, a loader, or a split of a data set.
        attack: The same one for every split that is compared.
        batch_size: Images at a time.
        seed: Of the attack's random starts.
        fast: Search with the model compiled, where it can be; the eager model is measured.

    Returns:
        Scores of all examples, on the CPU.

    Raises:
        UserError: If the data cannot be used.
    """
    chosen = choose(data)
    with held(model) as place, ExitStack() as stack:
        net = stack.enter_context(compiled(model, chosen.shape, place)) if fast else None

        def run(adversary: InputPerturbation | None) -> Metrics:
            parts = torch.arange(len(chosen)).split(batch_size)
            batches = ((chosen.images(at).to(place), chosen.labels[at].to(place)) for at in parts)
            generator = torch.Generator(place).manual_seed(seed)
            return measure(model, batches, adversary, generator, net)

        clean, attacked = run(None), run(attack)
    return Scores(
        clean_correct=clean.correct,
        robust_correct=clean.correct & attacked.correct,
        clean_loss=clean.losses,
        robust_loss=attacked.losses,
    )


def gap(splits: Mapping[str, Scores], *, resamples: int = RESAMPLES, seed: int = 0) -> Gap:
    """The gap between the train split and every other, from per-example scores.

    Intervals are 95 % percentile bootstrap intervals (Efron 1979): examples are drawn anew with
    replacement, in each split by itself, all four figures from the same draw.

    Args:
        splits: By name; one is "train".
        resamples: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        The figures.

    Raises:
        UserError: If there is no split "train".
    """
    if "train" not in splits:
        raise UserError(f"The gap needs a split named 'train', got {', '.join(splits) or 'none'}.")
    generator = torch.Generator().manual_seed(seed)
    values = {name: split.rows().mean(1) for name, split in splits.items()}
    draws = {
        name: bootstrap_means(split.rows(), resamples, generator) for name, split in splits.items()
    }
    gaps = {
        f"train-{name}": _worse(values["train"], values[name], draws["train"], draws[name])
        for name in splits
        if name != "train"
    }
    return Gap(
        counts={name: len(split.clean_loss) for name, split in splits.items()},
        splits={name: _figures(values[name], draws[name]) for name in splits},
        gaps=gaps,
    )


def overfitting(
    best: Scores, last: Scores, *, resamples: int = RESAMPLES, seed: int = 0
) -> Figures:
    """Robust overfitting (Rice et al. 2020): how much worse `last` is than `best`, on one split.

    Both are drawn with the same examples in every resample (a paired bootstrap), so what the two
    models share cancels.

    Args:
        best: Scores of the checkpoint of the best validation accuracy.
        last: Scores of the last one, on the same examples in the same order.
        resamples: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        The figures of `FIGURES`: for accuracies best minus last, for losses last minus best.

    Raises:
        UserError: If the two do not have equally many examples.
    """
    if len(best.clean_loss) != len(last.clean_loss):
        raise UserError(
            f"Best and last must be scored on the same examples, got {len(best.clean_loss)} and "
            f"{len(last.clean_loss)}."
        )
    both = torch.cat([best.rows(), last.rows()])
    draws = bootstrap_means(both, resamples, torch.Generator().manual_seed(seed))
    values = both.mean(1)
    half = len(FIGURES)
    return _worse(values[:half], values[half:], draws[:, :half], draws[:, half:])


def _worse(better: Tensor, worse: Tensor, better_draws: Tensor, worse_draws: Tensor) -> Figures:
    """Differences signed so that "worse is worse" is positive: accuracies fall, losses rise."""
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    return _figures((better - worse) * signs, (better_draws - worse_draws) * signs)


def _figures(values: Tensor, draws: Tensor) -> Figures:
    return {
        name: Figure(float(values[i]), *percentiles(draws[:, i])) for i, name in enumerate(FIGURES)
    }
