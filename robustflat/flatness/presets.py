"""Owns the published measurements of sharpness, one row of settings each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from robustflat.perturb import InputPerturbation, pgd

# From the threat's norm and eps to the attack that a paper used.
AttackOf = Callable[[float, float], InputPerturbation]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What somebody published.

    Attributes:
        summary: one line.
        kind: of sharpness.
        loss: which loss is measured.
        options: those that differ from the defaults.
        split: of the data set; None where it is not said.
        attack: of the robust loss.
    """

    summary: str
    kind: Literal["worst", "ascent", "average"]
    loss: Literal["clean", "robust", "robust_fixed"] = "clean"
    options: Mapping[str, Any]
    split: Literal["train", "test"] | None = None
    attack: AttackOf | None = None


def _stutz_attack(norm: float, eps: float) -> InputPerturbation:
    # 20 steps of 0.007 at eps 0.0314, the best iterate kept.
    return pgd(norm, eps, 20, 0.007 / 0.0314 * eps, "uniform", keep="best")


_STUTZ: dict[str, Any] = {
    "loss": "robust", "split": "test", "attack": _stutz_attack,
}  # fmt: skip
_LAYERS: dict[str, Any] = {
    "ball": "tensor", "weight_norm": "l2", "examples": 1000, "parameters": "no_norm",
}  # fmt: skip
_ADAPTIVE: dict[str, Any] = {
    "ball": "adaptive", "parameters": "all", "m": 128, "examples": 1024, "normalise_logits": True,
}  # fmt: skip
_WEN: dict[str, Any] = {
    "ball": "global", "weight_norm": "l2", "parameters": "all", "radius": 0.05,
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    # Definition of the released code: mean over 10 weights of the sphere ||v_l|| = 0.5 ||w_l||, on
    # 1,000 test images (there the first ones, here with all classes in their shares).
    "stutz2021_average": Preset(
        summary="average-case robust flatness of Stutz et al. 2021",
        kind="average",
        options={**_LAYERS, "radius": 0.5, "samples": 10, "distribution": "sphere"},
        **_STUTZ,
    ),
    # 10 restarts, 20 steps of 0.01 ||w_l|| in ||v_l|| <= 0.003 ||w_l||. Its code takes one batch
    # and one input step in each; here every step sees all examples, and remakes them.
    "stutz2021_worst": Preset(
        summary="worst-case robust flatness of Stutz et al. 2021",
        kind="worst",
        options={
            **_LAYERS, "radius": 0.003, "restarts": 10, "steps": 20, "step_size": 0.01 / 0.003,
        },
        **_STUTZ,
    ),
    # |v| <= rho |w| for every entry, 128 examples at a time, logits normalised; 20 steps of 2 rho
    # (plain projected ascent, the best iterate, where its code has APGD).
    "andriushchenko2023_worst": Preset(
        summary="adaptive worst-case linf sharpness of Andriushchenko et al. 2023",
        kind="worst",
        options={
            **_ADAPTIVE, "weight_norm": "linf", "radius": 2e-3, "steps": 20, "step_size": 2.0,
            "restarts": 1,
        },
        split="train",
    ),
    "andriushchenko2023_average": Preset(
        summary="adaptive average-case sharpness of Andriushchenko et al. 2023",
        kind="average",
        options={
            **_ADAPTIVE, "weight_norm": "l2", "radius": 0.05, "samples": 100,
            "distribution": "normal",
        },
        split="train",
    ),
    # The perturbation of training: one step of gamma ||w_l||, at fixed adversarial examples.
    "wu2020": Preset(
        summary="rise of the robust loss under AWP's own perturbation (Wu et al. 2020)",
        kind="ascent",
        loss="robust_fixed",
        options={"ball": "tensor", "weight_norm": "l2", "parameters": "matrices", "radius": 5e-3},
    ),
    "wen2023_worst": Preset(
        summary="worst-direction sharpness of Wen et al. 2023", kind="worst", options=_WEN
    ),
    "wen2023_ascent": Preset(
        summary="ascent-direction sharpness of Wen et al. 2023", kind="ascent", options=_WEN
    ),
    "wen2023_average": Preset(
        summary="average-direction sharpness of Wen et al. 2023",
        kind="average",
        options={**_WEN, "samples": 50, "distribution": "sphere"},
    ),
}  # fmt: skip
