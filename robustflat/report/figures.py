"""Owns which figures there are of runs: attacks, gaps, learning curves, spectra, landscapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from robustflat.errors import UserError
from robustflat.landscapes import Landscape
from robustflat.landscapes.record import Quantity
from robustflat.report.chart import (
    DASHES,
    KINDS,
    Axis,
    Chart,
    Figure,
    Key,
    Mark,
    Plane,
    Series,
    number,
)
from robustflat.report.record import Record, tests
from robustflat.runs.comparison import Unit

# From such a ratio of the highest to the lowest loss, only a logarithmic scale shows both.
STEEP = 30.0
_MARKS: dict[str, Mark] = {"train": "square", "validation": "circle-open", "test": "circle"}
_BEST: Mapping[Key, str] = {"circle": "best checkpoint"}
# Within a row, so that their whiskers do not lie on one another.
_PLACES = {"train": -0.18, "validation": 0.18, "test": 0.0}
# By figure its title and unit; the first two have a gap that matters.
FIGURES_OF_SPLITS: tuple[tuple[str, str, Unit], ...] = (
    ("robust_accuracy", "Robust accuracy", "%"),
    ("robust_loss", "Robust loss", ""),
    ("clean_accuracy", "Clean accuracy", "%"),
    ("clean_loss", "Clean loss", ""),
)


def attacks(records: Sequence[Record]) -> list[Figure]:
    """Test accuracy before and after every attack, with Wilson's intervals.

    Attacks that were asked for together, such as AutoAttack's, each take what the last one left.
    """
    tested = tests(records)
    several = len({name for _, name, _ in tested}) > 1
    stages = {"no attack": "no attack"}
    for *_, test in tested:
        first = {s["attacks"][0]: n for n, s in test["suites"].items() if len(s["attacks"]) > 1}
        for name, attack in test["attacks"].items():
            suite = first.get(name, "").partition("#")[0].replace("autoattack", "AutoAttack")
            label = f"{suite}:<br>{name}" if suite else f"then {name}" * bool(attack["after"])
            stages.setdefault(name, label or name)
    height = 0.6 * len(tested) + 0.5
    series = []
    for k, (record, checkpoint, test) in enumerate(tested):
        found = {"no attack": (test["clean_accuracy"], test["clean_interval"])}
        found |= {n: (a["accuracy"], a["interval"]) for n, a in test["attacks"].items()}
        place = (k - (len(tested) - 1) / 2) * 0.6
        series.append(
            Series(
                name=f"{record.name}, {checkpoint}" if several else record.name,
                run=record.index,
                line=None,
                mark="circle-open" if several and checkpoint == "last" else "circle",
                x=[value for value, _ in found.values()],
                y=[height * list(stages).index(name) + place for name in found],
                low=[low for _, (low, _) in found.values()],
                high=[high for _, (_, high) in found.values()],
                sideways=True,
                text=[f"{100 * value:.1f}" for value, _ in found.values()],
            )
        )
    title = "Still classified correctly, with 95% intervals"
    x = Axis(label="test images", unit="%")
    y = Axis(ticks={i * height: label for i, label in enumerate(stages.values())})
    return [Chart(title=title, series=series, x=x, y=y)] if series else []


def gaps(records: Sequence[Record]) -> list[Figure]:
    """Train, validation and test beside each other, accuracy and loss, at every checkpoint."""
    places = [
        (record, name, entry["gap"])
        for record in records
        for name, entry in record.checkpoints.items()
        if entry["gap"] is not None
    ]
    marks: Mapping[Key, str] = {mark: split for split, mark in _MARKS.items()}
    charts: list[Figure] = []
    for key, title, unit in FIGURES_OF_SPLITS[:2]:
        ticks, series = {}, []
        for at, (record, checkpoint, gap) in enumerate(places):
            figures = {split: f[key] for split, f in gap["splits"].items()}
            figures = {split: f for split, f in figures.items() if f["value"] is not None}
            difference = number(gap["gaps"]["train-test"][key]["value"], "pp" if unit else "")
            ticks[float(at)] = f"{record.name}, {checkpoint}<br>gap {difference}"
            values = [f["value"] for f in figures.values()]
            ends = [min(values, default=None), max(values, default=None)]
            series.append(Series(name="", run=record.index, x=ends, y=[at, at], faint=True))
            series += [
                Series(
                    name=f"{record.name}, {checkpoint}, {split}", run=record.index,
                    line=None, mark=_MARKS[split], sideways=True, legend="",
                    x=[f["value"]], y=[at + _PLACES[split]], low=[f["low"]], high=[f["high"]],
                )
                for split, f in figures.items()
            ]  # fmt: skip
        y_axis = Axis(ticks=ticks)
        charts.append(Chart(title=title, series=series, x=Axis(unit=unit), y=y_axis, key=marks))
    return charts if places else []


def by_class(records: Sequence[Record]) -> list[Figure]:
    """Worst-case and clean accuracy of every class at the best checkpoint."""
    having = [(r, name, found) for r in records for name, found in _classes(r)]
    labels = list(dict.fromkeys(name for *_, found in having for name in found))
    height = max(0.8, 0.4 * len(having))
    axis = Axis(label="class", ticks={height * i: str(name) for i, name in enumerate(labels)})
    charts: list[Figure] = []
    for key, title in (("robust", "Worst-case accuracy"), ("clean", "Clean accuracy")):
        series = [
            Series(
                name=f"{record.name}, {checkpoint}", legend=record.name, run=record.index,
                line=None, mark="circle", sideways=True,
                x=[one[key] / one["count"] for one in found.values()],
                y=[height * labels.index(name) + (k - (len(having) - 1) / 2) * 0.35
                   for name in found],
            )
            for k, (record, checkpoint, found) in enumerate(having)
        ]  # fmt: skip
        charts.append(Chart(title=f"{title} by class", series=series, x=Axis(unit="%"), y=axis))
    return charts if having else []


def _classes(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """The checkpoints with figures by class: the best if there are several."""
    found = {n: e["test"].get("classes") for n, e in record.checkpoints.items() if e["test"]}
    known = {name: classes for name, classes in found.items() if classes}
    yield from list(known.items())[:1]


def curves(records: Sequence[Record]) -> list[Figure]:
    """What was monitored during training, and the gap between train and validation."""
    charts: list[Figure] = []
    for key, title, unit in FIGURES_OF_SPLITS:
        lines = [_curve(r, key, split) for split in ("validation", "train") for r in records]
        marks: Mapping[Key, str] = {"solid": "validation", "dash": "train", **_BEST}
        charts += _if_any(title, lines, Axis(unit=unit), marks)
    for key, title, unit in FIGURES_OF_SPLITS[:2]:
        way = "train − validation" if unit else "validation − train"
        gap: Unit = "pp" if unit else ""
        name = f"Gap of the {title.lower()} ({way})"
        axis = Axis(unit=gap, zero=True)
        charts += _if_any(name, [_curve(record, key, None) for record in records], axis, _BEST)
    names = dict.fromkeys(
        n for r in records for row in r.metrics for n in row.get("flatness") or {}
    )
    for name in names:
        lines = []
        for record in records:
            rows = [row for row in record.metrics if row.get("flatness")]
            y = [row["flatness"].get(name) for row in rows]
            x = [row["epoch"] for row in rows]
            lines.append(Series(name=record.name, run=record.index, x=x, y=y))
        charts += _if_any(f"Flatness during training: {name}", lines, Axis(), {})
    return charts


def _curve(record: Record, key: str, split: str | None) -> Series:
    """A monitored figure of a split over the epochs; of no split, its gap, larger if worse."""
    xs, ys = [], []
    for row in record.metrics:
        measured = row.get("monitor_average") or row.get("monitor")
        if not measured or (split or "validation") not in measured:
            continue
        xs.append(row["epoch"])
        ends = [measured[s].get(key) for s in ("train", "validation") if s in measured]
        if split is not None:
            ys.append(measured[split].get(key))
        elif None in ends or len(ends) < 2:
            ys.append(None)
        else:
            train, held_out = ends
            ys.append(train - held_out if key.endswith("accuracy") else held_out - train)
    best = max((row["epoch"] for row in record.metrics if row.get("is_best")), default=None)
    return Series(
        name=f"{record.name}, {split}" if split else record.name, legend=record.name,
        run=record.index, x=xs, y=ys, line="dash" if split == "train" else "solid",
        dot=None if split == "train" else best,
    )  # fmt: skip


def _if_any(
    title: str, lines: Sequence[Series], y: Axis, key: Mapping[Key, str]
) -> Iterator[Figure]:
    kept = [line for line in lines if any(value is not None for value in line.y)]
    if kept:
        yield Chart(title=title, series=kept, x=Axis(label="epoch"), y=y, key=key)


def spectra(records: Sequence[Record]) -> list[Figure]:
    """Densities of the Hessian's eigenvalues, of runs that have them."""
    lines = []
    for record in records:
        details = (record.measures.get("hessian_density") or {}).get("details") or {}
        if "density" in details:
            lines.append(
                Series(name=record.name, run=record.index, x=details["grid"], y=details["density"])
            )
    title = "Spectral density of the Hessian"
    x = Axis(label="eigenvalue")
    return [Chart(title=title, series=lines, x=x, y=Axis(label="density", log=True))] * bool(lines)


def landscapes(
    found: Mapping[str, Landscape],
    *,
    quantity: Quantity = "losses",
    log: bool | None = None,
    runs: Mapping[str, int] | None = None,
) -> list[Figure]:
    """Lines on one pair of axes, with bands of one deviation; planes in panels, of one scale.

    Args:
        found: landscapes by the models' names; all lines or all planes.
        quantity: "losses" or "accuracies".
        log: a logarithmic scale; None: where losses of planes differ more than 30 times.
        runs: by the models' names their numbers; as they come if None.

    Raises:
        UserError: if there is none, or lines and planes are mixed.
    """
    dimensions = {len(one.axes) for one in found.values()}
    if len(dimensions) != 1:
        raise UserError("A figure shows landscapes that are all lines or all planes, at least one.")
    if quantity not in ("losses", "accuracies"):
        raise UserError(f"quantity must be losses or accuracies, got {quantity!r}.")
    number_of = runs or {name: i for i, name in enumerate(found)}
    label = {"losses": "loss", "accuracies": "accuracy"}[quantity]
    if dimensions == {2}:
        return list(_planes(found, quantity, label, log, number_of))
    series = [
        line for name, one in found.items() for line in _lines(one, name, quantity, number_of)
    ]
    first = next(iter(found.values()))
    x = Axis(label=first.names[0])
    y = Axis(label=label, unit="%" if quantity == "accuracies" else "", log=bool(log))
    kinds = {kind for one in found.values() for kind in one.mean(quantity)}
    key: Mapping[Key, str] = {DASHES[kind]: KINDS[kind] for kind in DASHES if kind in kinds}
    title = landscape_title(first, label)
    places = {at: p[0] for at, p in first.points.items()} if len(first.points) > 1 else {}
    return [Chart(title=title, series=series, x=x, y=y, key=key, places=places)]


def landscape_title(found: Landscape, label: str) -> str:
    """What a landscape is of: "loss" or "accuracy" around a model, or between several."""
    what = label.capitalize()
    if found.about.get("directions") != "checkpoints":
        return f"{what} around the weights"
    if len(found.axes) == 1:
        return f"{what} on the line through {' and '.join(found.points)}"
    names = ", ".join(f"{name} ({i})" for i, name in enumerate(found.points, 1))
    return f"{what} on the plane through {names}"


def _lines(
    one: Landscape, name: str, quantity: Quantity, number_of: Mapping[str, int]
) -> Iterator[Series]:
    spread = one.spread(quantity)
    means = one.mean(quantity)
    for kind in sorted(means, key=[*DASHES, *means].index):  # the legend shows the first
        mean, wide = means[kind], spread.get(kind)
        yield Series(
            name=", ".join(part for part in (name, KINDS.get(kind, kind)) if part),
            legend=name if kind in DASHES else None,
            run=number_of[name], x=one.axes[0], y=mean.tolist(),
            low=None if wide is None else (mean - wide).tolist(),
            high=None if wide is None else (mean + wide).tolist(),
            line=DASHES.get(kind, "dashdot"),
        )  # fmt: skip


def _planes(
    found: Mapping[str, Landscape],
    quantity: Quantity,
    label: str,
    log: bool | None,
    number_of: Mapping[str, int],
) -> Iterator[Plane]:
    """One panel for each model and loss, all on one scale."""
    means = {name: one.mean(quantity) for name, one in found.items()}
    known = np.concatenate([grid.ravel() for mean in means.values() for grid in mean.values()])
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if log is None:
        log = quantity == "losses" and low > 0 and high > STEEP * low
    for name, mean in means.items():
        one = found[name]
        for kind, grid in mean.items():
            yield Plane(
                title=": ".join(p for p in (name, f"{label}, {KINDS.get(kind, kind)}") if p),
                run=number_of[name], axes=(one.axes[0], one.axes[1]),
                names=(one.names[0], one.names[1]), values=grid.tolist(),
                limits=(max(low, 1e-6) if log else low, high), label=label, log=log,
                points={at: (p[0], p[1]) for at, p in one.points.items()},
            )  # fmt: skip


def of_landscapes(records: Sequence[Record]) -> list[Figure]:
    """Losses and accuracies around the runs' weights."""
    runs = {record.name: record.index for record in records}
    charts: list[Figure] = []
    for kind in ("line", "plane"):
        found = {r.name: r.landscapes[kind] for r in records if kind in r.landscapes}
        if not found:
            continue
        charts += landscapes(found, runs=runs)
        if kind == "line":
            logged = landscapes(found, runs=runs, log=True)[0]
            charts += landscapes(found, runs=runs, quantity="accuracies")
            charts.append(replace(logged, title="Loss around the weights, logarithmic"))
    return charts


FIGURES: dict[str, Callable[[Sequence[Record]], list[Figure]]] = {
    "attacks": attacks,
    "gaps": gaps,
    "classes": by_class,
    "curves": curves,
    "spectra": spectra,
    "landscapes": of_landscapes,
}
