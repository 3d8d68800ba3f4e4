"""Training runs: one step, the loop around it, and what a run leaves behind."""

from robustflat.errors import TrainingDivergedError
from robustflat.train.around import Listener
from robustflat.train.loop import Trainer
from robustflat.train.run import train

__all__ = ["Listener", "Trainer", "TrainingDivergedError", "train"]
