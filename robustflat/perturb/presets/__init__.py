"""The weight perturbations of the literature: choices of ball, ascent, scale and rules."""

from robustflat.perturb.presets.adversarial import amp, awp, awp_global, rwp
from robustflat.perturb.presets.plain import custom, no_perturbation, random_weights, rwp_mix
from robustflat.perturb.presets.remembering import fsam, lesam, looksam, momentum_sam, vasso
from robustflat.perturb.presets.sharpness import asam, esam, gam, gnp, gsam, nsam, sam, zsharp

__all__ = [
    "amp",
    "asam",
    "awp",
    "awp_global",
    "custom",
    "esam",
    "fsam",
    "gam",
    "gnp",
    "gsam",
    "lesam",
    "looksam",
    "momentum_sam",
    "no_perturbation",
    "nsam",
    "random_weights",
    "rwp",
    "rwp_mix",
    "sam",
    "vasso",
    "zsharp",
]
