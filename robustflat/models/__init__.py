"""Models that take images in [0, 1], made by name, and the loading of weights from elsewhere."""

from robustflat.models.loading import load_model
from robustflat.models.named import MODELS, build
from robustflat.models.normalized import Normalize, Normalized
from robustflat.models.state import load_state

__all__ = ["MODELS", "Normalize", "Normalized", "build", "load_model", "load_state"]
