"""Measuring the flatness of a subject's weight landscape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustflat.errors import UserError
from robustflat.evaluate import Team
from robustflat.evaluate.attacks.ascent import title
from robustflat.flatness import Progress, flatness
from robustflat.flatness.asked import called
from robustflat.flatness.closure import attack_of
from robustflat.flatness.measures import find
from robustflat.flatness.options import check_names
from robustflat.perturb import InputPerturbation
from robustflat.runs import records
from robustflat.subject import Subject


def measure_subject(
    subject: Subject,
    measures: Sequence[str] | None = None,
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    split: str | None = None,
    samples: int | None = None,
    attack: InputPerturbation | str | None = None,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    team: Team | None = None,
    compile: bool = False,  # noqa: A002 - torch's word
) -> dict[str, Any]:
    """Measure a subject on fixed, un-augmented images; add it to ``flatness.json``.

    Unless said otherwise they are training images, as the theory of sharpness speaks of their
    loss, at the last checkpoint, which the training went to; of a preset those that its paper
    takes. A measure on another split, or with another attack, is named so.

    Args:
        subject: what is measured.
        measures: names; the configuration's if None.
        checkpoint: "last" (also None, of a run) or "best".
        weights: raw, averaged, or the average if there is one.
        split: "train", "validation" or "test".
        samples: images to use; a preset's own number, or the configuration's, if None.
        attack: of the robust loss, as :func:`robustflat.flatness.flatness` takes it; a preset's
            own, or the configuration's, if None.
        seed: of all that is random, the training's if None.
        options: of :class:`robustflat.flatness.Options`, over the configuration's; a list is a
            sweep of its values.
        on_progress: told how far the measurement has come.
        team: processes that share the work; the first writes.
        compile: let attacks search with the model compiled, where it can be.

    Returns:
        What was measured now, the figures of all images together: keys ``run``, ``checkpoint``,
        ``epoch``, ``weights``, ``norm``, ``eps``, ``data``, ``split``, ``samples``, ``attack``,
        ``seed``, ``options``, ``device``, ``versions`` and ``measures``.
    """
    config, team = subject.flatness, team or Team()
    network = subject.network(checkpoint or ("last" if subject.is_run else None), weights)
    chosen = list(measures or config.measures)
    norm, eps = "linf", 0.0  # for the measures that ask for no threat
    if subject.threat is not None or any(find(name).is_attacked for name in chosen):
        threat = subject.the_threat()
        norm, eps = threat.norm_name, threat.eps
        said = attack if isinstance(attack, str) else None if attack is None else repr(attack)
        attack = None if attack is None else attack_of(attack, threat)
    else:
        attack = said = None
    seed = None if seed == subject.seed else seed
    other = None if said == config.attack else attack
    settings = _acting(chosen, config.options) | _checked(chosen, options or {})
    # On which images each measure is taken, how many of them, and with which attack; None: its own.
    places: dict[tuple[str, int, str | None], list[str]] = {}
    for name in chosen:
        preset = find(name)
        own = preset.changes.get("examples") or config.samples
        usual = config.attack if preset.attack is None else None
        number = own if samples is None else samples
        place = (split or preset.split or "train", number, said or usual)
        places.setdefault(place, []).append(name)
    reports: list[dict[str, Any]] = []
    for (where, count, by), names in places.items():
        x, y = subject.tensors(where, count)
        # A number that was asked for stands above a preset's own.
        own = [find(name).changes.get("examples") for name in names]
        above = samples is not None and any(number and number < len(y) for number in own)
        asked: dict[str, Any] = {"examples": len(y)} if above and "examples" not in settings else {}
        found = flatness(
            network.model,
            (x.to(subject.device), y.to(subject.device)),
            names,
            eps,
            norm,
            subject.seed if seed is None else seed,
            batch_size=subject.evaluation.batch_size,
            attack=attack,
            usual_attack=config.attack,
            store=subject.home.root / "flatness.parts.jsonl",
            on_progress=on_progress,
            team=team,
            compile=compile,
            **asked,
            **{**_acting(chosen, {"train_size": len(subject.images().train)}), **settings},
        )
        measured: dict[int, dict[str, Any]] = {}
        for name, figure in found.items():
            figures = measured.setdefault(figure.details["examples"], {})
            figures[_called(name, where, other, seed)] = figure.to_dict()
        reports += [
            records.measurement(
                subject, "flatness", network.state(), norm=norm, eps=eps, split=where,
                samples=number, attack=by, seed=subject.seed if seed is None else seed,
                options=settings, measures=figures,
            )
            for number, figures in measured.items()
        ]  # fmt: skip
    if team.is_first:
        records.add(subject.home.flatness, "flatness", subject.name, reports)
    together = {name: figure for one in reports for name, figure in one["measures"].items()}
    return {"run": subject.name, **reports[-1], "measures": together}


def _acting(measures: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that act on some of the measures."""
    found = [find(name) for name in measures]
    return {key: value for key, value in options.items() if any(m.heeds(key) for m in found)}


def _checked(measures: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that somebody gave for these measures.

    Raises:
        UserError: if one is none, or acts on no measure.
    """
    if "attack" in options:
        raise UserError("The attack is no option of the measures: it is said by --attack.")
    check_names(options)
    idle = options.keys() - _acting(measures, options).keys()
    if idle:
        raise UserError(
            f"{' and '.join(sorted(idle))} would change nothing: no measure that was asked for "
            f"({', '.join(measures)}) depends on it."
        )
    return dict(options)


def _called(name: str, split: str, attack: InputPerturbation | None, seed: int | None) -> str:
    """As a measure is called that is not taken as usual; None is as usual."""
    measure = find(name)
    other = [] if split == (measure.split or "train") else [f"split={split}"]
    if attack is not None and measure.loss != "clean" and "attack=" not in name:
        other.append(f"attack={title(attack)}")
    other += [] if seed is None else [f"seed={seed}"]
    return called(name, other)
