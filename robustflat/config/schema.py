"""The schema of a run: its keys, their types, defaults and meanings."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from robustflat import registry
from robustflat.config.choice import Built, Choice
from robustflat.config.together import conflicts
from robustflat.config.values import (
    Count,
    NonNegative,
    Number,
    Positive,
    Section,
    Share,
    Whole,
    problem,
    problems,
)
from robustflat.objectives import FromFunction, Objective


class When(Section):
    """When a weight perturbation acts, and how strongly.

    From epoch ``from_epoch`` to ``until_epoch`` (both counted from 1, both included), in every
    ``every``-th step only. ``radius: lr`` shrinks the radius with the learning rate.
    """

    from_epoch: Count = 1
    until_epoch: Count | None = None
    every: Count = 1
    radius: Literal["constant", "lr"] = "constant"


class Around(Section):
    """How the step runs around a weight perturbation.

    ``reattack: ascent`` attacks the inputs anew before every further ascent step (the alternating
    rounds of AWP's paper), ``descent`` also before the descent. ``at: perturbed`` takes the
    optimizer's step before restoring, as AWP's released code does. ``sync: global`` lets all
    processes climb the loss of the whole batch; ``local`` each that of its own rows (m-sharpness).
    """

    reattack: Literal["never", "ascent", "descent"] = "never"
    at: Literal["centre", "perturbed"] = "centre"
    sync: Literal["local", "global"] = "local"


class Stage(Section):
    """From epoch ``from_epoch`` (counted from 1) on, the attack has these in place of its own."""

    from_epoch: Count
    eps: NonNegative | None = None
    steps: Count | None = None
    step_size: NonNegative | None = None


class Curriculum(Section):
    """How the attack grows over the training.

    Over the first ``warmup_epochs`` epochs eps rises in a line, from ``start`` times itself (lower
    values are lifted to it), at every step or once an epoch (``by``); the steps keep their share of
    it. ``stages`` give other values from some epoch on.
    """

    warmup_epochs: NonNegative = 0
    start: Share = 0.0
    by: Literal["step", "epoch"] = "step"
    stages: tuple[Stage, ...] = ()


class AttackSection(Built):
    """What every attack can be told beside its own keys."""

    curriculum: Curriculum = Curriculum()


class WeightsSection(Built):
    """What every weight perturbation can be told beside its own keys."""

    moved = {  # noqa: RUF012 - a ClassVar of Section
        "warmup_epochs": "For N epochs without it write when: {from_epoch: N + 1}",
        "last_epoch": "Write when: {until_epoch: N}",
        "every": "Write when: {every: N}",
        "radius_schedule": "Write when: {radius: lr}",
        "chunk": "Write {name: msam, chunk: M, inner: {name: sam, ...}}",
        "batches": "Write {name: nsam, batches: N, inner: {name: sam, ...}}",
        "reattack": "Write step: {reattack: ascent} or {reattack: descent}",
        "step_at": "Write step: {at: perturbed}",
    }

    when: When = When()
    step: Around = Around()

    def build(self, **offered: Any) -> Any:
        """The perturbation, synchronised as asked."""
        built = super().build(**offered)
        return built if self.step.sync == "local" else built.synchronised(self.step.sync)


class ObjectiveSection(Built):
    """An objective, which may be any function of one's own."""

    def build(self, **offered: Any) -> Objective:
        """The objective."""
        built = super().build(**offered)
        return built if isinstance(built, Objective) else FromFunction(built)


class OptimizerSection(Built):
    """What every optimizer can be told beside its own keys.

    With ``decay_all: false`` biases and normalisation are exempt from weight decay; ``clip`` is the
    largest global L2 norm of the gradient. ``fused`` takes a step in one kernel, ``foreach`` in one
    for each operation, where torch has such; left out, torch chooses by the device.
    """

    decay_all: bool = True
    clip: Positive | None = None
    fused: bool = False
    foreach: bool | None = None

    def build(self, **offered: Any) -> Any:
        """The optimizer, in the implementation asked for.

        Raises:
            ValueError: if it has none such.
        """
        if self.fused and self.foreach:
            raise ValueError("foreach and fused are two implementations: ask for one of them")
        taken = inspect.signature(self.kind.find(self.name)).parameters
        for key in ("fused", "foreach"):
            if getattr(self, key) and key not in taken:
                raise ValueError(f"{self.name} has no {key} implementation. Leave {key} out")
        # None lets torch choose; a fused: False would keep it from foreach.
        return super().build(**offered, fused=self.fused or None, foreach=self.foreach)

    def check(self) -> None:
        """Build it once for a single parameter."""
        import torch

        self.build(params=[torch.nn.Parameter(torch.zeros(1, 1))])


class ListenerSection(Built):
    """A listener is made only when a run begins: it may open files."""

    def check(self) -> None:
        """Nothing can be tried before."""


def _known_measure(name: str) -> str:
    from robustflat.flatness.measures import find

    find(name)
    return name


def _known_attack(name: str) -> str:
    from robustflat.evaluate.threat import Threat
    from robustflat.flatness.closure import attack_of

    attack_of(name, Threat.of("linf", 0.1))
    return name


# Of the robust loss. One start would be a fifth of the cost, but by it worst-direction sharpness
# of one net was 0.024 to 0.050 over four seeds, and by five 0.061 to 0.066 (docs/flatness.md).
ATTACK = "pgd-10-5"
Measure = Annotated[str, AfterValidator(_known_measure)]
Attack = Annotated[AttackSection, Choice(registry.attacks, AttackSection, unnamed="pgd")]
Objectives = Annotated[
    ObjectiveSection, Choice(registry.objectives, ObjectiveSection, unnamed="adversarial")
]
Weights = Annotated[WeightsSection, Choice(registry.weights, WeightsSection)]
Optimizer = Annotated[OptimizerSection, Choice(registry.optimizers, OptimizerSection, "sgd")]
Schedule = Annotated[Built, Choice(registry.schedules, unnamed="piecewise")]
Average = Annotated[Built, Choice(registry.averages)]
Augment = Annotated[Built, Choice(registry.augmentations, unnamed="standard")]
Listener = Annotated[ListenerSection, Choice(registry.listeners, ListenerSection)]


class LabelNoiseConfig(Section):
    """Wrong labels in the training split."""

    kind: Literal["symmetric", "asymmetric"] = "symmetric"
    rate: Share
    seed: Whole = 0


class ExtraDataConfig(Section):
    """Additional, perhaps generated or pseudo-labelled, training images (RST and its successors).

    ``path`` is a file, or a folder of shards that stay on disk; every batch has ``fraction`` of
    them, drawn from all, or from ``samples`` of them with equally many of every class.
    """

    path: str
    fraction: Annotated[Share, Gt(0), Lt(1)] = 0.5
    samples: Count | None = None


class MixConfig(Section):
    """Convex mixtures of training images and labels."""

    name: Literal["mixup", "cutmix"]
    alpha: Positive = 1.0


class DataConfig(Section):
    """Which images, and how they are split.

    ``place`` is where the training images are kept: on the ``device``, on the ``host``, or, by
    default, on the device if they take at most half of its free memory.

    Of an ``image_folder`` or ``webdataset`` the shorter side is brought to ``resize`` (by default
    ``image_size``) and the centre square of ``image_size`` cut out. ``cache: true`` decodes all
    files of a folder once, into the folder ``.decoded`` beside them; false reads them as they are
    needed, in ``workers`` processes (by default as many as there are CPU cores, at most 8). Figures
    do not depend on it.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    train_samples: Count | None = None
    test_samples: Count | None = None
    validation_samples: Whole = 200
    image_size: Count | None = None
    resize: Count | None = None
    cache: bool = True
    workers: Whole | None = None
    place: Literal["auto", "device", "host"] = "auto"
    augment: Augment = Field(default="standard", validate_default=True)
    label_noise: LabelNoiseConfig | None = None
    extra: ExtraDataConfig | None = None
    mix: MixConfig | None = None


class ModelConfig(Section):
    """Which network; ``options`` are its own.

    It begins with the ``weights`` of a file, with ``head: new`` all but those of its last layer,
    which are drawn anew: so weights trained on other classes can be trained on.
    """

    name: str = "small_cnn"
    options: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    head: Literal["loaded", "new"] = "loaded"


class AlarmConfig(Section):
    """What happens if robust validation accuracy collapses (catastrophic overfitting).

    It has collapsed if more than ``drop`` of its best is lost, once that was twice the accuracy of
    guessing. ``then: stop`` ends the run with a
    sentence; ``restart`` goes back to the last measured epoch before, and goes on with PGD of
    ``steps`` steps in place of the attack; a second collapse ends the run.
    """

    drop: Annotated[Share, Gt(0), Lt(1)] = 0.8
    then: Literal["stop", "restart"] = "stop"
    steps: Count = 10


_SEVERAL_PROCESSES = dict.fromkeys(
    ("fsdp", "fsdp2", "ddp", "parallel", "strategy", "distributed", "sharding", "shard"),
    "Several processes are started by torchrun, and every process of `train` holds the whole "
    "network, which averages, checkpoints, the monitor and its measures need. A network that does "
    "not fit is sharded (FSDP2) in a loop of one's own, by weights.backward(loss, "
    "fully_sharded_model)",
)


class TrainConfig(Section):
    """Length, precision and care of the training.

    ``stop_at_loss`` ends it at the first look of the monitor at which the robust loss on its
    training images is that or less (the clean loss without an attack), so that runs are compared at
    a common training loss (Jiang et al. 2020). ``patience`` ends it early, at the first look at
    which the epoch with the best robust validation accuracy is so many epochs ago.

    ``accumulate: K`` passes every batch through the network in K parts, one after the other, for
    networks and batches that do not fit into memory together. ``batch_size`` stays that of the
    whole batch, of which there is one optimizer step, one weight perturbation and one loss: without
    BatchNorm, which sees each part by itself, the step is that of ``accumulate: 1``. A perturbation
    for every part is ``weights: {name: msam, chunk: ROWS}``.

    ``compile: attack`` compiles the network for the passes of the attack, by torch.compile: its
    first step, and the first with a last batch of another size, take up to a minute longer, all
    others are shorter. It needs a C++ compiler, on a GPU Triton.

    ``cuda_graphs: true`` records those passes on a GPU and replays each by one launch. Not a bit of
    the run changes. The faster the GPU and the smaller the passes, the more is gained: on an H100,
    where they wait for Python, ``compile: attack`` gains nothing.
    """

    moved = {"tensorboard": "Write listeners: [tensorboard], or listeners: []"}  # noqa: RUF012
    elsewhere = _SEVERAL_PROCESSES

    epochs: Count = 20
    stop_at_loss: Positive | None = None
    patience: Count | None = None
    batch_size: Count = 128
    accumulate: Count = 1
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: Literal["attack"] | None = None
    cuda_graphs: bool = False
    sync_batchnorm: bool = False
    deterministic: bool = False
    average: Average | None = None
    alarm: AlarmConfig | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    checkpoint_minutes: Positive = 15


class EdgeConfig(Section):
    """Looks at the edge of stability, by Hessian-vector products on ``samples`` training images.

    Every so many steps or, at their first step, epochs, the largest eigenvalue is told beside
    2 / lr, the edges of the optimizer and of SAM, and the gradient's alignment to its eigenvector
    (see ``robustflat.train.edge``). A look costs at most 9 ``max_hvps`` forward passes over the
    samples and a few more for the attack; mostly half of it or less.
    """

    every: Count = 1
    unit: Literal["epochs", "steps"] = "epochs"
    samples: Count = 256
    max_hvps: Count = 30


class MonitorConfig(Section):
    """What is measured on the validation split and on a fixed part of the training split.

    Every ``every`` epochs clean and robust accuracy and loss, by PGD with ``steps`` steps; every
    ``flatness_every`` epochs (0: never) the ``flatness`` measures, on training images. Of every
    ``step_every``-th step (0: none) the values that it has anyway: losses at the centre and at the
    perturbed weights, gradients' norms and cosines, the perturbation's size, the attack's losses.
    Every ``pictures_every`` epochs and at the end (0: never) examples, confusion matrix and loss
    along a line, for TensorBoard; null: after the epochs that reach a multiple of 5,000 steps, so
    that they cost less than 2 % of a run however short its epochs are.
    """

    every: Whole = 1
    steps: Count = 10
    train_samples: Count = 500
    step_every: Whole = 10
    pictures_every: Whole | None = None
    flatness_every: Whole = 0
    flatness: tuple[Measure, ...] = ("ascent_robust", "hessian_max")
    flatness_samples: Count = 256
    edge: EdgeConfig | None = None


class EvaluateConfig(Section):
    """What ``robustflat evaluate`` runs by default; ``samples`` of the test split."""

    attacks: tuple[str, ...] = ("pgd-20", "autoattack")
    samples: Count | None = None
    gap_samples: Count = 1000
    batch_size: Count = 200


class FlatnessConfig(Section):
    """What ``robustflat flatness`` measures by default.

    ``attack`` is that of the robust loss, for the measures that are not published with their own:
    fgsm, pgd-STEPS or pgd-STEPS-RESTARTS, each also with :LOSS.
    """

    measures: tuple[Measure, ...] = (
        "worst_clean",
        "worst_robust",
        "average_clean",
        "average_robust",
    )
    samples: Count = 500
    attack: Annotated[str, AfterValidator(_known_attack)] = ATTACK
    options: dict[str, Number | int | str | bool] = Field(default_factory=dict)


class RunConfig(Section):
    """One training run and what is measured of it.

    ``threads`` is the number of CPU threads. Small networks are fastest with one, and sums over
    another number of threads are rounded differently. Keys of ``attack`` that are left out are
    those of the objective's paper.
    """

    elsewhere = _SEVERAL_PROCESSES

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Whole = 0
    output: str = "runs"
    device: str = "auto"
    threads: Count | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: Attack = Field(default="pgd", validate_default=True)
    objective: Objectives = Field(default="adversarial", validate_default=True)
    weights: Weights = Field(default="none", validate_default=True)
    optimizer: Optimizer = Field(default="sgd", validate_default=True)
    schedule: Schedule = Field(default="piecewise", validate_default=True)
    train: TrainConfig = TrainConfig()
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    evaluate: EvaluateConfig = EvaluateConfig()
    flatness: FlatnessConfig = Field(default_factory=FlatnessConfig)
    listeners: tuple[Listener, ...] = Field(default=("tensorboard",), validate_default=True)

    @property
    def threat(self) -> tuple[str | float, float] | None:
        """Norm and eps of the training attack; None if there is none, or it names none."""
        norm, eps = (getattr(self.attack, key, None) for key in ("norm", "eps"))
        return None if norm is None or eps is None else (norm, eps)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        said = {key: getattr(self.attack, key) for key in self.attack.model_fields_set}
        usual = self.objective.build().attack_options
        usual = {k: v for k, v in usual.items() if k in self.attack.own and k not in said}
        whole = self
        if usual:
            attack = type(self.attack).model_validate({**usual, **said})
            whole = self.model_copy(update={"attack": attack})
        found = conflicts(whole)
        if found:
            raise problems([problem("rule", text, loc) for loc, text in found])
        return whole
