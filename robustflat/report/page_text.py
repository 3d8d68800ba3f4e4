"""Owns the words of a report: what is compared, reasons to doubt it, how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from robustflat.evaluate.threat import radius
from robustflat.report.landscape_picture import circumstances
from robustflat.report.record import Record, state_of, tests

_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


def compared(records: Sequence[Record]) -> str:
    """Data, model, threat, seeds and test images, in a few sentences."""
    threats = agreed(_threat(r) for r in records)
    seeds = sorted({r.config.seed for r in records if r.config})
    networks = agreed(r.config.model.name for r in records if r.config)
    counts = {test["count"] for _, _, test in tests(records)}
    words = (
        f"{' and '.join(f'{r.name} ({r.method})' if r.config else r.name for r in records)}. "
        if len(records) < 4
        else f"{len(records)} runs. "
    )
    words += f"Data: {agreed(_data(r) for r in records)}. Threat: {threats}."
    if networks:
        words += f" Model: {networks}."
        words += f" {'Seed' if len(seeds) == 1 else 'Seeds'}: {', '.join(map(str, seeds))}."
    if counts:
        words += f" Attacked: {' or '.join(map(str, sorted(counts)))} test images."
    return words


def doubts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The evaluations' warnings: whose, and the sentence, each sentence once."""
    whose: dict[str, list[str]] = {}
    for record, checkpoint, test in tests(records):
        for sentence in test["warnings"]:
            whose.setdefault(str(sentence), []).append(f"{record.name}, {checkpoint} checkpoint")
    return [("; ".join(names), sentence) for sentence, names in whose.items()]


def about_attacks(records: Sequence[Record]) -> str:
    """How robust accuracy was measured."""
    return (
        f"The share of test images that are still classified correctly, under {_threats(records)}. "
        'Each attack runs on all images that the model classifies, but "then" one after the '
        "attack above it, on what that left. "
        "An image counts as broken only if its adversarial example lies inside the ball and the "
        "image box and is misclassified in single precision. Whiskers: Wilson's 95% intervals, "
        "which tell of the finite number of test images, not of other seeds of training. "
        f"{_places(tests(records))}"
    )


def about_gaps(records: Sequence[Record]) -> str:
    """How the gap was measured."""
    found = (r.evaluation["gap_attack"] for r in records if r.evaluation)
    attacks = agreed(str(attack) for attack in found if attack)
    counts = agreed(
        ", ".join(f"{count} {split}" for split, count in entry["gap"]["counts"].items())
        for r in records
        for entry in r.checkpoints.values()
        if entry["gap"] is not None
    )
    return (
        "How much of the robustness on training images is lost on new ones; the longer the line, "
        f"the larger the robust-generalization gap. Measured with {attacks} under "
        f"{_threats(records)}, in eval mode at the unperturbed weights, with the same attack on "
        f"un-augmented images ({counts}), at the best checkpoint (by robust accuracy on "
        "validation) and the last. Under a run's name is its gap: train − test, of the "
        "loss test − train. Whiskers: 95% bootstrap intervals over the images."
    )


def about_curves(records: Sequence[Record]) -> str:
    """What was monitored."""
    attacks = agreed(f"PGD-{r.config.monitor.steps}" for r in records if r.config)
    averaged = [r.name for r in records if any(row.get("monitor_average") for row in r.metrics)]
    note = f" Of {', '.join(averaged)}: of the averaged weights." if averaged else ""
    return (
        f"Accuracy and cross-entropy loss during training, clean and under {attacks}, in eval mode "
        "on a fixed part of the training images and on the validation images, which are never "
        "trained on. A gap that grows while the training loss falls is robust overfitting." + note
    )


def about_flatness(records: Sequence[Record]) -> str:
    """What the flatness measures mean."""
    measured = [r for r in records if r.flatness]
    places = agreed(
        f"checkpoint: {state_of(r.flatness['checkpoint'], r.flatness['epoch'])}, "
        f"{r.flatness['weights']} weights"
        for r in measured
        if r.flatness
    )
    return (
        "How much the loss rises when the weights move a given distance away: in the worst "
        "direction of a ball, in the direction of the gradient (ascent), or in random directions "
        "(average). Lower is flatter. The radius is in units of the weights' own norm in balls "
        "named tensor or row, so it does not depend on their scale. Worst and average directions "
        f"may have different radii and are not to be compared. Measured on un-augmented images "
        f"({places})."
    )


def about_landscapes(records: Sequence[Record]) -> str:
    """How the landscapes were drawn."""
    found = [one for record in records for one in record.landscapes.values()]
    directions = agreed(str(one.about.get("directions", "unknown")) for one in found)
    seeds = agreed(str(one.about.get("seed", "unknown")) for one in found)
    return (
        "Loss and accuracy when the weights move away from where training ended (0) along fixed "
        f"directions ({directions}, seed {seeds}; filter directions have, filter by filter, the "
        f"norm of the weights). {as_sentence(circumstances(found))} For the robust loss the "
        "adversarial examples are made anew at every point. Few directions out of very many: the "
        "table of flatness says more than the shape of a curve."
    )


def as_sentence(text: str) -> str:
    """Words with a capital in front and a full stop behind."""
    return text and f"{text[0].upper()}{text[1:]}."


def agreed(texts: Iterable[str]) -> str:
    """What all say, or everything that some say."""
    return " or ".join(dict.fromkeys(texts))


def _threats(records: Sequence[Record]) -> str:
    return agreed(_threat(r) for r in records if r.evaluation)


def _threat(record: Record) -> str:
    """Norm and radius of the evaluation, or of the training if there was none."""
    if record.evaluation is not None:
        norm, eps = record.evaluation["norm"], record.evaluation["eps"]
    elif record.config is None or record.config.attack.name == "none":
        return "none"
    else:
        norm, eps = record.config.attack.norm, record.config.attack.eps
    return f"{_NORMS.get(str(norm)) or f'L{norm:g}'}, ε = {radius(eps)}"


def _data(record: Record) -> str:
    if record.config is None:
        return record.data
    data = record.config.data
    count = "all" if data.train_samples is None else str(data.train_samples)
    return f"{data.name} ({count} training, {data.validation_samples} validation images)"


def _places(tested: Sequence[tuple[Record, str, dict[str, Any]]]) -> str:
    places = dict.fromkeys(name for _, name, _ in tested)
    said = []
    for place in places:
        epochs = {r.checkpoints[name]["epoch"] for r, name, _ in tested if name == place}
        if epochs == {None}:
            said.append("the models as they were given")
        else:
            said.append(f"{place} checkpoint, epoch {' or '.join(map(str, sorted(epochs)))}")
    return f"At: {'; '.join(said)}."
