"""One perturbation abstraction, delta = T * u with u in a ball, for inputs and weights."""

from robustflat.perturb.ascent import Ascent, maximise
from robustflat.perturb.ball import Ball, parse_norm
from robustflat.perturb.chunks import msam
from robustflat.perturb.displace import buffers_kept, displaced, kept
from robustflat.perturb.inputs import InputPerturbation, attack_losses, fgsm, nfgsm, no_attack, pgd
from robustflat.perturb.modes import attack_mode, evaluating
from robustflat.perturb.perturbation import Perturbation
from robustflat.perturb.presets.adversarial import amp, awp, awp_global, rwp
from robustflat.perturb.presets.plain import custom, no_perturbation, random_weights, rwp_mix
from robustflat.perturb.presets.remembering import fsam, lesam, looksam, momentum_sam, vasso
from robustflat.perturb.presets.sharpness import asam, esam, gam, gnp, gsam, nsam, sam, zsharp
from robustflat.perturb.scales import SCALES, select
from robustflat.perturb.watch import Watch
from robustflat.perturb.weights import WeightPerturbation

__all__ = [
    "SCALES", "Ascent", "Ball", "InputPerturbation", "Perturbation", "Watch",
    "WeightPerturbation", "amp", "asam", "attack_losses", "attack_mode", "awp", "awp_global",
    "buffers_kept", "custom", "displaced", "esam", "evaluating", "fgsm", "fsam", "gam", "gnp",
    "gsam", "kept", "lesam", "looksam", "maximise", "momentum_sam", "msam", "nfgsm",
    "no_attack", "no_perturbation", "nsam", "parse_norm", "pgd", "random_weights", "rwp",
    "rwp_mix", "sam", "select", "vasso", "zsharp",
]  # fmt: skip
