"""Owns the targets: what a measure is to rank, by name, and which way is worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# What a run's measured splits are asked for.
_FIGURES = ("robust_accuracy", "robust_loss", "clean_accuracy", "clean_loss")
ATTACKED = "attacked_accuracy"


@dataclass(frozen=True)
class Target:
    """A target.

    Attributes:
        name: as users call it.
        title: in words.
        worse: +1 if more of it is worse, -1 if less is; statistics take worse * value.
        percent: whether it is a share of images.
    """

    name: str
    title: str
    worse: Literal[-1, 1]
    percent: bool


def _targets() -> dict[str, Target]:
    found = {}
    for figure in _FIGURES:
        words, percent = figure.replace("_", " "), figure.endswith("accuracy")
        found[f"test_{figure}"] = Target(
            f"test_{figure}", f"{words} on test", -1 if percent else 1, percent
        )
        found[f"gap_{figure}"] = Target(f"gap_{figure}", f"{words} gap", 1, percent)
    found[ATTACKED] = Target(ATTACKED, "accuracy under all attacks on test", -1, True)
    return found


TARGETS: dict[str, Target] = _targets()


def figures(gap: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Every target but ``attacked_accuracy``, from the gap of one checkpoint.

    Args:
        gap: as ``Gap.to_dict`` of the splits train and test gives it.

    Returns:
        By target: ``value``, and ``low`` and ``high`` of its interval over images.
    """
    return {
        **{f"test_{name}": dict(gap["splits"]["test"][name]) for name in _FIGURES},
        **{f"gap_{name}": dict(gap["gaps"]["train-test"][name]) for name in _FIGURES},
    }
