"""Training runs: one step, the loop around it, and what a run leaves behind."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustflat.errors import TrainingDivergedError
    from robustflat.train.listeners import Listener
    from robustflat.train.loop import Trainer
    from robustflat.train.run import train

__all__ = ["Listener", "Trainer", "TrainingDivergedError", "train"]
_HOMES = {
    "Listener": "robustflat.train.listeners",
    "Trainer": "robustflat.train.loop",
    "TrainingDivergedError": "robustflat.errors",
    "train": "robustflat.train.run",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: a step by itself needs none of a run's packages."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
