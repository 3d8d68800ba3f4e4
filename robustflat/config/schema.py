"""The schema of a run: its keys, their types, defaults and meanings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from robustflat.config.perturbations import (
    AttackConfig,
    ObjectiveConfig,
    PgdConfig,
    WeightsConfig,
    check_together,
)
from robustflat.config.values import (
    Count,
    NonNegative,
    Number,
    Positive,
    Section,
    Share,
    Whole,
)

Decay = Annotated[Share, Field(lt=1)]


class AugmentConfig(Section):
    """Random changes of the training images, drawn anew in every epoch."""

    crop: Whole = 0
    flip: bool = False
    cutout: Whole = 0


class LabelNoiseConfig(Section):
    """Wrong labels in the training split."""

    kind: Literal["symmetric", "asymmetric"] = "symmetric"
    rate: Share
    seed: Whole = 0


class ExtraDataConfig(Section):
    """Additional, perhaps pseudo-labelled, training images from a file (RST and its successors)."""

    path: str
    fraction: Annotated[Share, Field(gt=0, lt=1)] = 0.5


class MixConfig(Section):
    """Convex mixtures of training images and labels."""

    name: Literal["mixup", "cutmix"]
    alpha: Positive = 1.0


class DataConfig(Section):
    """Which images, and how they are split."""

    name: str = "digits"
    root: str = "data"
    download: bool = False
    train_samples: Count | None = None
    test_samples: Count | None = None
    validation_samples: Whole = 200
    image_size: Count | None = None
    cache: bool = True
    augment: AugmentConfig = AugmentConfig()
    label_noise: LabelNoiseConfig | None = None
    extra: ExtraDataConfig | None = None
    mix: MixConfig | None = None


class ModelConfig(Section):
    """Which network; ``options`` are its own."""

    name: str = "small_cnn"
    options: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class SgdConfig(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    decay_all: bool = True
    clip: Positive | None = None

    @model_validator(mode="after")
    def _can_be_built(self) -> SgdConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0. Set momentum, or nesterov: false")
        return self


class AdamWConfig(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    lr: Positive = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    decay_all: bool = True
    clip: Positive | None = None


class ConstantConfig(Section):
    """The base learning rate throughout."""

    name: Literal["constant"]
    warmup_epochs: NonNegative = 0


class PiecewiseConfig(Section):
    """Multiplied by ``factor`` at each milestone, given as a share of the epochs."""

    name: Literal["piecewise"] = "piecewise"
    milestones: tuple[Share, ...] = (0.5, 0.75)
    factor: Share = 0.1
    warmup_epochs: NonNegative = 0


class CosineConfig(Section):
    """Half a cosine from the base learning rate to ``final`` times it."""

    name: Literal["cosine"]
    final: Share = 0.0
    warmup_epochs: NonNegative = 0


class LinearConfig(Section):
    """A line from the base learning rate to ``final`` times it."""

    name: Literal["linear"]
    final: Share = 0.0
    warmup_epochs: NonNegative = 0


class OneCycleConfig(Section):
    """Up to the base learning rate at ``peak`` (share of the epochs), then down to ``final``."""

    name: Literal["one_cycle"]
    peak: Annotated[Share, Field(gt=0, lt=1)] = 0.4
    initial: Share = 0.0
    final: Share = 0.0


class EmaConfig(Section):
    """Exponential moving average of the weights."""

    name: Literal["ema"]
    decay: Decay = 0.995
    start_epoch: Whole = 0


class SwaConfig(Section):
    """Equal average of the weights at the end of each epoch (Izmailov et al. 2018)."""

    name: Literal["swa"]
    start_epoch: Whole
    every: Count = 1


class TrainConfig(Section):
    """Length, precision and care of the training."""

    epochs: Count = 20
    batch_size: Count = 128
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    deterministic: bool = False
    average: Annotated[EmaConfig | SwaConfig, Field(discriminator="name")] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    checkpoint_minutes: Positive = 15
    tensorboard: bool = True


class MonitorConfig(Section):
    """What is measured on the validation split and on a fixed part of the training split.

    Every ``every`` epochs clean and robust accuracy and loss, by PGD with ``steps`` steps; every
    ``flatness_every`` epochs (0: never) the ``flatness`` measures, on training images.
    """

    every: Whole = 1
    steps: Count = 10
    train_samples: Count = 500
    flatness_every: Whole = 0
    flatness: tuple[str, ...] = ("ascent_robust", "hessian_max")
    flatness_samples: Count = 256


class EvaluateConfig(Section):
    """What ``robustflat evaluate`` runs by default; ``samples`` of the test split."""

    attacks: tuple[str, ...] = ("pgd-20", "autoattack")
    samples: Count | None = None
    gap_samples: Count = 1000
    batch_size: Count = 200


class FlatnessConfig(Section):
    """What ``robustflat flatness`` measures by default, on training and test images."""

    measures: tuple[str, ...] = ("worst_clean", "worst_robust", "average_clean", "average_robust")
    samples: Count = 500
    options: dict[str, Number | int | str | bool] = Field(default_factory=dict)


def _named_by_default(name: str) -> BeforeValidator:
    """A section of several kinds is of this one where its keys do not say."""
    return BeforeValidator(lambda v: {"name": name, **v} if isinstance(v, dict) else v)


Optimizer = Annotated[
    Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")],
    _named_by_default("sgd"),
]
Schedule = Annotated[
    Annotated[
        ConstantConfig | PiecewiseConfig | CosineConfig | LinearConfig | OneCycleConfig,
        Field(discriminator="name"),
    ],
    _named_by_default("piecewise"),
]


class RunConfig(Section):
    """One training run and what is measured of it.

    ``threads`` is the number of CPU threads. Small networks are fastest with one, and sums over
    another number of threads are rounded differently.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Whole = 0
    output: str = "runs"
    device: str = "auto"
    threads: Count | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: AttackConfig
    objective: ObjectiveConfig
    weights: WeightsConfig
    optimizer: Optimizer = SgdConfig()
    schedule: Schedule = PiecewiseConfig()
    train: TrainConfig = TrainConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    flatness: FlatnessConfig = FlatnessConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        problems = check_together(self.attack, self.objective, self.weights)
        weights, train = self.weights, self.train
        if weights.name != "none":
            if weights.warmup_epochs >= train.epochs:
                problems.append(
                    f"weights.warmup_epochs is {weights.warmup_epochs} of train.epochs "
                    f"{train.epochs}, so the weights would never be perturbed. Lower it, or set "
                    "weights: {name: none}"
                )
            elif weights.last_epoch is not None and weights.last_epoch <= weights.warmup_epochs:
                problems.append(
                    f"weights.last_epoch is {weights.last_epoch} and weights.warmup_epochs "
                    f"{weights.warmup_epochs}, so the weights would never be perturbed. Set "
                    "last_epoch later, or weights: {name: none}"
                )
            if weights.chunk is not None and weights.chunk > train.batch_size:
                problems.append(
                    f"weights.chunk is {weights.chunk} but train.batch_size only "
                    f"{train.batch_size}: a chunk is a part of the batch. Choose at most "
                    f"{train.batch_size}"
                )
        if train.average is not None and train.average.start_epoch >= train.epochs:
            problems.append(
                f"train.average.start_epoch is {train.average.start_epoch} of train.epochs "
                f"{train.epochs}, so nothing would be averaged. Start earlier"
            )
        warmup = 0 if isinstance(self.schedule, OneCycleConfig) else self.schedule.warmup_epochs
        if warmup >= train.epochs:
            problems.append(
                f"schedule.warmup_epochs is {warmup:g} of train.epochs {train.epochs}, so the base "
                "learning rate would never be reached. Lower it"
            )
        if (
            isinstance(self.attack, PgdConfig)
            and self.attack.loss in ("margin", "dlr")
            and self.data.mix is not None
        ):
            problems.append(
                f"attack.loss {self.attack.loss} is not defined for the mixed labels of data.mix "
                f"{self.data.mix.name}. Leave data.mix out, or use attack.loss ce or kl"
            )
        if self.objective.name == "mart" and self.data.mix is not None:
            problems.append(
                f"objective mart is not defined for the mixed labels of data.mix "
                f"{self.data.mix.name}. Leave data.mix out, or use objective adversarial or trades"
            )
        if self.data.validation_samples == 0 and self.monitor.every:
            problems.append(
                "monitor.every asks for validation but data.validation_samples is 0, so there "
                "would be no best checkpoint. Set data.validation_samples, or monitor.every: 0 to "
                "keep the last checkpoint only"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
