"""The schema of attacks, objectives and weight perturbations, and what each of them builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

import robustflat.objectives as objectives
from robustflat.config.values import (
    Count,
    NonNegative,
    Norm,
    Section,
    Whole,
)
from robustflat.perturb import (
    SCALES,
    Ascent,
    Ball,
    InputPerturbation,
    WeightPerturbation,
    amp,
    asam,
    awp,
    awp_global,
    fgsm,
    gsam,
    msam,
    no_perturbation,
    nsam,
    parse_norm,
    pgd,
    random_weights,
    sam,
)
from robustflat.perturb.scales import check_selection
from robustflat.perturb.weights import STATISTICS

WeightMethod = WeightPerturbation | msam


class NoAttackConfig(Section):
    """Train on the images as they are."""

    name: Literal["none"]


class PgdConfig(Section):
    """Projected gradient descent; ``auto`` takes what the objective's paper uses."""

    name: Literal["pgd"] = "pgd"
    norm: Norm = "linf"
    eps: NonNegative
    steps: Count = 10
    step_size: NonNegative | None = None
    start: Literal["auto", "uniform", "sphere", "zero", "normal"] = "auto"
    loss: Literal["auto", "ce", "kl", "margin", "dlr"] = "auto"
    restarts: Count = 1
    mode: Literal["eval", "batch"] = "eval"
    keep: Literal["last", "best"] = "last"

    def build(self, objective: objectives.Objective) -> InputPerturbation:
        """The attack, with ``auto`` filled in for ``objective``."""
        options = objective.attack_options
        loss = options["loss"] if self.loss == "auto" else self.loss
        start: Any = options["start"] if self.start == "auto" else self.start
        return pgd(
            self.norm,
            self.eps,
            self.steps,
            self.step_size,
            start,
            loss=loss,
            restarts=self.restarts,
            mode=self.mode,
            keep=self.keep,
        )


class FgsmConfig(Section):
    """One step of one radius."""

    name: Literal["fgsm"]
    norm: Norm = "linf"
    eps: NonNegative
    mode: Literal["eval", "batch"] = "eval"

    def build(self, objective: objectives.Objective) -> InputPerturbation:
        """The attack, on the objective's own loss."""
        return fgsm(self.norm, self.eps, loss=objective.attack_options["loss"], mode=self.mode)


AttackConfig = Annotated[NoAttackConfig | PgdConfig | FgsmConfig, Field(discriminator="name")]


class StandardConfig(Section):
    """Cross-entropy of the clean images."""

    name: Literal["standard"]
    label_smoothing: NonNegative = 0.0

    def build(self) -> objectives.Objective:
        """The objective."""
        return objectives.standard(label_smoothing=self.label_smoothing)


class AdversarialConfig(Section):
    """Cross-entropy of the adversarial images."""

    name: Literal["adversarial"] = "adversarial"
    label_smoothing: NonNegative = 0.0

    def build(self) -> objectives.Objective:
        """The objective."""
        return objectives.adversarial(label_smoothing=self.label_smoothing)


class TradesConfig(Section):
    """TRADES."""

    name: Literal["trades"]
    beta: NonNegative = 6.0

    def build(self) -> objectives.Objective:
        """The objective."""
        return objectives.trades(self.beta)


class MartConfig(Section):
    """MART."""

    name: Literal["mart"]
    beta: NonNegative = 6.0

    def build(self) -> objectives.Objective:
        """The objective."""
        return objectives.mart(self.beta)


ObjectiveConfig = Annotated[
    StandardConfig | AdversarialConfig | TradesConfig | MartConfig, Field(discriminator="name")
]


class NoWeightsConfig(Section):
    """Leave the weights where they are."""

    name: Literal["none"] = "none"

    def build(self) -> WeightMethod:
        """The method that does nothing."""
        return no_perturbation()


class Perturbing(Section, ABC):
    """What every weight perturbation can be told.

    ``warmup_epochs`` and ``last_epoch`` bound the epochs in which it acts (the latter counted from
    1), ``every`` lets it act in every k-th step only. ``radius_schedule: lr`` shrinks the radius
    with the learning rate. ``chunk`` perturbs for every chunk of the batch (mSAM); ``batches``
    climbs several batches together (n-SAM). ``reattack: ascent`` attacks the inputs anew before
    every further ascent step (the alternating rounds of AWP's paper), ``descent`` also before the
    descent. ``step_at: perturbed`` takes the optimizer's step before restoring, as AWP's released
    code does.
    """

    parameters: str | None = None
    statistics: Literal["perturbed", "centre", "both"] | None = None
    warmup_epochs: Whole = 0
    last_epoch: Count | None = None
    every: Count = 1
    radius_schedule: Literal["constant", "lr"] = "constant"
    chunk: Count | None = None
    batches: Count = 1
    reattack: Literal["never", "ascent", "descent"] = "never"
    step_at: Literal["centre", "perturbed"] = "centre"

    @abstractmethod
    def preset(self) -> WeightPerturbation:
        """The perturbation without its wrappers."""

    def build(self) -> WeightMethod:
        """The method, wrapped for chunks or batches if asked."""
        method = self.preset()
        if self.batches > 1:
            method = nsam(method, self.batches)
        return method if self.chunk is None else msam(method, self.chunk)

    def _make(
        self, constructor: Callable[..., WeightPerturbation], *args: Any
    ) -> WeightPerturbation:
        """Call a preset, leaving its own defaults where nothing is said."""
        said = {"parameters": self.parameters, "statistics": self.statistics}
        return constructor(*args, **{k: v for k, v in said.items() if v is not None})

    @model_validator(mode="after")
    def _can_be_built(self) -> Perturbing:
        if self.chunk is not None and self.step_at == "perturbed":
            raise ValueError(
                "chunk gives every part of the batch its own perturbed weights, so step_at cannot "
                "be perturbed. Use step_at: centre, or leave chunk out"
            )
        self.build()
        return self


class AwpConfig(Perturbing):
    """Adversarial weight perturbation."""

    name: Literal["awp"]
    gamma: NonNegative
    steps: Count = 1

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.awp`."""
        return self._make(awp, self.gamma, self.steps)


class AwpGlobalConfig(Perturbing):
    """AWP with one ratio for all parameters together."""

    name: Literal["awp_global"]
    gamma: NonNegative

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.awp_global`."""
        return self._make(awp_global, self.gamma)


class AmpConfig(Perturbing):
    """Adversarial model perturbation."""

    name: Literal["amp"]
    epsilon: NonNegative
    inner_lr: NonNegative = 1.0
    steps: Count = 1
    group: Literal["tensor", "global"] = "tensor"

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.amp`."""
        return self._make(amp, self.epsilon, self.inner_lr, self.steps, self.group)


class SamConfig(Perturbing):
    """Sharpness-aware minimisation."""

    name: Literal["sam"]
    rho: NonNegative
    norm: Norm = "l2"
    steps: Count = 1

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.sam`."""
        return self._make(sam, self.rho, self.norm, self.steps)


class AsamConfig(Perturbing):
    """Adaptive SAM."""

    name: Literal["asam"]
    rho: NonNegative
    eta: NonNegative = 0.01

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.asam`."""
        return self._make(asam, self.rho, self.eta)


class GsamConfig(Perturbing):
    """Surrogate gap guided SAM."""

    name: Literal["gsam"]
    rho: NonNegative
    alpha: NonNegative

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.gsam`."""
        return self._make(gsam, self.rho, self.alpha)


class RandomConfig(Perturbing):
    """A random direction of AWP's size."""

    name: Literal["random"]
    gamma: NonNegative
    group: Literal["row", "tensor", "global"] = "tensor"

    def preset(self) -> WeightPerturbation:
        """See :func:`robustflat.random_weights`."""
        return self._make(random_weights, self.gamma, self.group)


class CustomConfig(Perturbing):
    """A perturbation of one's own: ball, scale, selection and ascent spelled out."""

    name: Literal["custom"]
    norm: Norm = "l2"
    radius: NonNegative
    group: Literal["row", "tensor", "global"]
    scale: str = "one"
    steps: Whole = 1
    step_size: NonNegative = 1.0
    start: Literal["zero", "uniform", "sphere", "normal"] = "zero"
    direction: Literal["steepest", "raw"] = "steepest"
    keep: Literal["last", "best"] = "last"

    def preset(self) -> WeightPerturbation:
        """Exactly what the keys say."""
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        return WeightPerturbation(
            name="custom",
            ball=Ball(parse_norm(self.norm), self.radius, self.group),
            ascent=Ascent(self.steps, self.step_size, self.start, self.direction, self.keep),
            scale=SCALES[self.scale],
            parameters=check_selection(self.parameters or "all"),
            statistics=self.statistics or STATISTICS[0],
        )


WeightsConfig = Annotated[
    NoWeightsConfig
    | AwpConfig
    | AwpGlobalConfig
    | AmpConfig
    | SamConfig
    | AsamConfig
    | GsamConfig
    | RandomConfig
    | CustomConfig,
    Field(discriminator="name"),
]


def check_together(
    attack: NoAttackConfig | PgdConfig | FgsmConfig,
    objective: StandardConfig | AdversarialConfig | TradesConfig | MartConfig,
    weights: Section,
) -> list[str]:
    """What is wrong with this combination, one sentence each."""
    problems = []
    built = objective.build()
    if built.needs_attack and isinstance(attack, NoAttackConfig):
        problems.append(
            f"objective {objective.name} trains on adversarial images but attack is none. "
            "Configure an attack, or use objective standard"
        )
    if isinstance(weights, Perturbing) and weights.reattack != "never":
        if isinstance(attack, NoAttackConfig) or not built.needs_attack:
            problems.append(
                f"weights.reattack is {weights.reattack} but there is nothing to attack again: "
                f"objective is {objective.name}, attack is {attack.name}. Use reattack: never"
            )
        if weights.chunk is not None or weights.batches > 1:
            problems.append(
                "weights.reattack works with one perturbation of the whole batch, not with chunk "
                "or batches. Use reattack: never"
            )
    if not isinstance(attack, NoAttackConfig):
        try:
            # What monitors and evaluates the run.
            pgd(attack.norm, attack.eps)
            if built.needs_attack:
                attack.build(built)
        except ValueError as error:
            problems.append(f"attack: {error}".rstrip("."))
    return problems
