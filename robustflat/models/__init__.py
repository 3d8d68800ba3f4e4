"""Models that take images in [0, 1], made by name, and the loading of weights from elsewhere."""

from robustflat.models.loading import load_model
from robustflat.models.named import MODELS, build
from robustflat.models.normalized import Normalize, Normalized
from robustflat.models.resnet import preact_resnet18, preact_resnet18_silu, resnet18, resnet50
from robustflat.models.small import SmallCNN, mlp
from robustflat.models.state import load_state
from robustflat.models.wide import wide_resnet, wide_resnet_silu

# Every built-in model is had under its name here too: robustflat.models:NAME, not normalised.
small_cnn = SmallCNN

__all__ = [
    "MODELS", "Normalize", "Normalized", "build", "load_model", "load_state", "mlp",
    "preact_resnet18", "preact_resnet18_silu", "resnet18", "resnet50", "small_cnn",
    "wide_resnet", "wide_resnet_silu",
]  # fmt: skip
