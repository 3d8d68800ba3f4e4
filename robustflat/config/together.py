"""What cannot work although every section by itself can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from robustflat.perturb import pgd

if TYPE_CHECKING:
    from robustflat.config.schema import RunConfig

Conflict = tuple[tuple[str, ...], str]


def conflicts(config: RunConfig) -> list[Conflict]:
    """Every combination that cannot work: the key it is told at, and a sentence."""
    return [
        *_of_the_attack(config),
        *_of_the_curriculum(config),
        *_of_the_alarm(config),
        *_of_the_weights(config),
        *_of_the_parts(config),
        *_of_the_lengths(config),
        *_of_the_images_and_the_model(config),
        *_of_the_mix(config),
        *_of_the_monitor(config),
    ]


def _of_the_attack(config: RunConfig) -> Iterator[Conflict]:
    attack, objective = config.attack, config.objective
    needed = objective.build().needs_attack
    if needed and attack.name == "none":
        yield _told(
            "attack",
            f"objective {objective.name} trains on adversarial images but attack is none. "
            "Configure an attack, or use objective standard",
        )
    faster = {"compile": config.train.compile is not None, "cuda_graphs": config.train.cuda_graphs}
    for key in [key for key, said in faster.items() if said]:
        if not needed:
            yield _told(
                f"train.{key}",
                f"train.{key} makes the passes of an attack faster, but objective {objective.name} "
                f"trains on the images as they are. Leave train.{key} out",
            )
        elif config.train.sync_batchnorm:
            yield _told(
                f"train.{key}",
                f"train.{key} takes passes as a whole, and train.sync_batchnorm lets processes "
                "talk within one. Leave one of them out",
            )
    if all(faster.values()):
        yield _told(
            "train.cuda_graphs",
            "train.compile and train.cuda_graphs are two ways to make the same passes faster. "
            "Leave one of them out",
        )
    if config.threat is not None:
        try:
            pgd(*config.threat)  # what monitors and evaluates the run
        except ValueError as error:
            yield _told("attack", f"attack: {error}".rstrip("."))


def _of_the_curriculum(config: RunConfig) -> Iterator[Conflict]:
    grow, attack, epochs = config.attack.curriculum, config.attack, config.train.epochs
    if grow.warmup_epochs and not hasattr(attack.build(), "scaled"):
        yield _told(
            "attack.curriculum.warmup_epochs",
            f"attack {attack.name} has no eps that could grow. Leave warmup_epochs out",
        )
    at, before = ("attack", "curriculum", "stages"), 1
    for stage in grow.stages:
        given = stage.model_dump(exclude_none=True)
        strange = [key for key in given if key not in (*attack.own, "from_epoch")]
        if strange or len(given) == 1:
            what = f"attack {attack.name} has no {strange[0]}" if strange else "it changes nothing"
            text = (
                f"attack.curriculum.stages from epoch {stage.from_epoch}: {what}. A stage gives "
                "one or more of the attack's eps, steps and step_size"
            )
            yield at, text
        if not before < stage.from_epoch <= epochs:
            text = (
                "attack.curriculum.stages must begin one after the other, in epochs 2 to "
                f"{epochs}, got from_epoch {stage.from_epoch}. Put them in order"
            )
            yield at, text
        before = stage.from_epoch


def _of_the_alarm(config: RunConfig) -> Iterator[Conflict]:
    if config.train.alarm is None:
        return
    if config.threat is None:
        text = (
            f"train.alarm watches robust accuracy, and attack {config.attack.name} has no norm "
            "and eps to measure it with. Leave the alarm out"
        )
        yield ("train", "alarm"), text
    if not config.monitor.every or not config.data.validation_samples:
        text = (
            "train.alarm watches the validation split, which is not measured. Set monitor.every "
            "and data.validation_samples, or leave the alarm out"
        )
        yield ("train", "alarm"), text


def _of_the_weights(config: RunConfig) -> Iterator[Conflict]:
    weights, when, step = config.weights, config.weights.when, config.weights.step
    built, objective = weights.build(), config.objective.build()
    if when.until_epoch is not None and when.until_epoch < when.from_epoch:
        yield _told(
            "weights.when.until_epoch",
            f"weights.when.until_epoch is {when.until_epoch} and from_epoch {when.from_epoch}, so "
            "the weights would never be perturbed. Set until_epoch later, or weights: none",
        )
    if built.least_rows > config.train.batch_size:
        yield _told(
            "weights.chunk",
            f"weights.chunk is {built.least_rows} but train.batch_size only "
            f"{config.train.batch_size}: a chunk is a part of the batch. Choose at most "
            f"{config.train.batch_size}",
        )
    one_batch = not built.splits and built.batches == 1
    if step.at == "perturbed" and built.splits:
        yield _told(
            "weights.step.at",
            f"weights.step.at is perturbed, but {weights.name} gives every part of the batch its "
            "own perturbed weights. Use at: centre",
        )
    if built.wants_rows and not objective.has_rows:
        yield _told(
            "objective",
            f"weights {weights.name} chooses examples by their losses, and objective "
            f"{config.objective.name} is no mean of one loss a row. "
            "Use another objective, or another weight perturbation",
        )
    if step.reattack == "never":
        return
    if config.attack.name == "none" or not objective.needs_attack:
        yield _told(
            "weights.step.reattack",
            f"weights.step.reattack is {step.reattack} but there is nothing to attack again: "
            f"objective is {config.objective.name}, attack is {config.attack.name}. Use reattack: "
            "never",
        )
    if not one_batch:
        yield _told(
            "weights.step.reattack",
            "weights.step.reattack works with one perturbation of the whole batch, not with "
            f"{weights.name}. Use reattack: never",
        )


def _of_the_parts(config: RunConfig) -> Iterator[Conflict]:
    parts, objective = config.train.accumulate, config.objective.build()
    if parts == 1:
        return
    why = ""
    if not objective.has_rows:
        why = (
            f"objective {config.objective.name} is no mean of one loss a row, so its parts do not "
            "add up to it"
        )
    elif config.weights.build().wants_rows:
        why = (
            f"weights {config.weights.name} chooses examples by their losses, which it must see "
            "together"
        )
    elif config.train.sync_batchnorm:
        why = "train.sync_batchnorm needs equally many parts in all processes, also of a last batch"
    elif 2 * parts > config.train.batch_size:
        why = f"a part needs two images or more, and train.batch_size is {config.train.batch_size}"
    if why:
        yield _told("train.accumulate", f"train.accumulate is {parts}, but {why}. Use another")


def _of_the_lengths(config: RunConfig) -> Iterator[Conflict]:
    epochs = config.train.epochs
    # What would be the matter, and whether the last epoch itself is not too late for it.
    late = (
        ("weights.when.from_epoch", True, "the weights would never be perturbed"),
        ("train.average.start_epoch", False, "nothing would be averaged"),
        ("objective.start_epoch", False, f"{config.objective.name} would never begin"),
        ("schedule.warmup_epochs", False, "the base learning rate would never be reached"),
        ("attack.curriculum.warmup_epochs", True, "attack.eps would never be reached"),
    )
    for key, may_be_last, what in late:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        if isinstance(value, (int, float)) and (
            value > epochs or (value == epochs and not may_be_last)
        ):
            yield _told(key, f"{key} is {value:g} of train.epochs {epochs}, so {what}. Lower it")


def _of_the_images_and_the_model(config: RunConfig) -> Iterator[Conflict]:
    data = config.data
    if config.model.head == "new" and config.model.weights is None:
        yield _told(
            "model.head",
            "model.head is new, but there are no model.weights, so that all layers are. Leave it "
            "out, or name a file of weights",
        )
    if data.name == "image_folder" and data.augment.name == "torchvision" and data.cache:
        yield _told(
            "data.cache",
            "data.cache: true keeps images of data.image_size, but data.augment torchvision takes "
            "the files at their full size. Set data.cache: false",
        )


def _of_the_mix(config: RunConfig) -> Iterator[Conflict]:
    if config.data.mix is None:
        return
    mix, loss = config.data.mix.name, getattr(config.attack, "loss", "ce")
    if loss in ("margin", "probability_margin", "dlr"):
        yield _told(
            "attack.loss",
            f"attack.loss {loss} is not defined for the mixed labels of data.mix {mix}. Leave "
            "data.mix out, or use attack.loss ce or kl",
        )
    if not config.objective.build().takes_soft_labels:
        yield _told(
            "objective",
            f"objective {config.objective.name} is not defined for the mixed labels of data.mix "
            f"{mix}. Leave data.mix out, or use objective adversarial or trades",
        )


def _of_the_monitor(config: RunConfig) -> Iterator[Conflict]:
    if config.train.stop_at_loss is not None and not config.monitor.every:
        yield _told(
            "train.stop_at_loss",
            "train.stop_at_loss is looked for by the monitor, and monitor.every is 0. Set "
            "monitor.every: 1",
        )
    if config.train.patience is not None and not (
        config.monitor.every and config.data.validation_samples
    ):
        yield _told(
            "train.patience",
            "train.patience waits for a better validation accuracy, which is not measured: "
            f"monitor.every is {config.monitor.every}, data.validation_samples "
            f"{config.data.validation_samples}. Set both, or leave train.patience out",
        )
    if config.data.validation_samples == 0 and config.monitor.every:
        yield _told(
            "monitor.every",
            "monitor.every asks for validation but data.validation_samples is 0, so there would be "
            "no best checkpoint. Set data.validation_samples, or monitor.every: 0 to keep the last "
            "checkpoint only",
        )


def _told(key: str, text: str) -> Conflict:
    return tuple(key.split(".")), text
