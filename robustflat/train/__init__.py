"""Training runs: one step, the loop around it, and what a run leaves behind."""

from robustflat.train.loop import Listener, Trainer, TrainingDivergedError
from robustflat.train.run import train

__all__ = ["Listener", "Trainer", "TrainingDivergedError", "train"]
