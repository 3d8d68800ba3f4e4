"""Train image classifiers that withstand adversarial inputs, and show why they do."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustflat.errors import UserError
    from robustflat.evaluate import evaluate
    from robustflat.flatness import flatness
    from robustflat.landscapes import landscape
    from robustflat.objectives import adversarial, gkl, ikl, mart, mlcat, rebat, standard, trades
    from robustflat.perturb.ascent import Ascent
    from robustflat.perturb.ball import Ball
    from robustflat.perturb.chunks import msam
    from robustflat.perturb.inputs import InputPerturbation, fgsm, nfgsm, pgd
    from robustflat.perturb.perturbation import Perturbation
    from robustflat.perturb.presets.adversarial import amp, awp, awp_global, rwp
    from robustflat.perturb.presets.plain import custom, no_perturbation, random_weights, rwp_mix
    from robustflat.perturb.presets.remembering import fsam, lesam, looksam, momentum_sam, vasso
    from robustflat.perturb.presets.sharpness import asam, esam, gam, gnp, gsam, nsam, sam, zsharp
    from robustflat.perturb.watch import Watch
    from robustflat.perturb.weights import WeightPerturbation
    from robustflat.runs.loaded import Run, load_run

__version__ = "0.1.0"

__all__ = [
    "Ascent", "Ball", "InputPerturbation", "Perturbation", "Run", "UserError", "Watch",
    "WeightPerturbation", "adversarial", "amp", "asam", "awp", "awp_global", "custom", "esam",
    "evaluate", "fgsm", "flatness", "fsam", "gam", "gkl", "gnp", "gsam", "ikl", "landscape",
    "lesam", "load_run", "looksam", "mart", "mlcat", "momentum_sam", "msam", "nfgsm",
    "no_perturbation", "nsam", "pgd", "random_weights", "rebat", "rwp", "rwp_mix", "sam",
    "standard", "trades", "vasso", "zsharp",
]  # fmt: skip

# Where each is; all others are of `perturb`. Imported when asked for: the command line's help and
# mistakes need no torch.
_OBJECTIVES = ("adversarial", "gkl", "ikl", "mart", "mlcat", "rebat", "standard", "trades")
_MODULES = {
    "UserError": "errors",
    "evaluate": "evaluate",
    "flatness": "flatness",
    "landscape": "landscapes",
    "Run": "runs.loaded",
    "load_run": "runs.loaded",
    **dict.fromkeys(_OBJECTIVES, "objectives"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'perturb')}")
    found = globals()[name] = getattr(module, name)
    if _MODULES.get(name) == name:
        # So that `import robustflat.evaluate.gaps as gaps`, which looks here, finds the module.
        found.__dict__ = vars(module)
    return found


class _Package(ModuleType):
    """A package whose functions keep their names although packages inside are called the same.

    Such a function has the attributes of the package, too.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
