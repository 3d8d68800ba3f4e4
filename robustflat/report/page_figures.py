"""Owns the figures of a report: attacks, the gap, learning curves and landscapes of runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from robustflat.landscapes.record import Quantity
from robustflat.report.charts import (
    DASHES,
    KINDS,
    Entry,
    Group,
    Line,
    Mark,
    Shape,
    Unit,
    interval_chart,
    line_chart,
    number,
    plane,
)
from robustflat.report.markup import Html, join, node
from robustflat.report.record import Record

_SHAPES: dict[str, Shape] = {"train": "square", "validation": "ring", "test": "dot"}
_CURVES: tuple[tuple[str, str, Unit], ...] = (
    ("robust_accuracy", "Robust accuracy", "%"),
    ("robust_loss", "Robust loss", ""),
    ("clean_accuracy", "Clean accuracy", "%"),
    ("clean_loss", "Clean loss", ""),
)


def attacks(records: Sequence[Record]) -> Html:
    """Test accuracy before and after every attack, with Wilson's intervals."""
    tested = [
        (record, name, entry["test"])
        for record in records
        for name, entry in record.checkpoints.items()
        if entry["test"] is not None
    ]
    several = len({name for _, name, _ in tested}) > 1
    names = list(dict.fromkeys(name for _, _, test in tested for name in test["attacks"]))
    groups = []
    for attack in [None, *names]:
        entries = []
        for record, checkpoint, test in tested:
            if attack is None:
                value, interval = test["clean_accuracy"], test["clean_interval"]
            elif attack in test["attacks"]:
                found = test["attacks"][attack]
                value, interval = found["accuracy"], found["interval"]
            else:
                continue
            note = f"{100 * value:.1f}  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
            tip = f"{record.name}, {checkpoint}, {attack or 'clean'}: {note} %"
            mark = Mark(
                value=value, low=interval[0], high=interval[1], run=record.index, tip=tip,
                shape="ring" if several and checkpoint == "last" else "dot",
            )  # fmt: skip
            entries.append(Entry(marks=[mark], note=note, label=checkpoint if several else ""))
        before = "no attack" if attack is None else f"after {attack}"
        groups.append(Group(label=before, entries=entries))
    return interval_chart("Still classified correctly (%), with 95% intervals", groups, unit="%")


def gaps(records: Sequence[Record]) -> Html:
    """Train, validation and test beside each other, accuracy and loss, at every checkpoint."""
    shown: tuple[tuple[str, str, Unit], ...] = _CURVES[:2]
    charts = []
    for figure, title, unit in shown:
        groups = []
        for record in records:
            entries = [
                _gap_entry(record, name, entry["gap"], figure, unit)
                for name, entry in record.checkpoints.items()
                if entry["gap"] is not None
            ]
            drawn = [entry for entry in entries if entry.marks]
            if drawn:
                groups.append(Group(label=record.name, entries=drawn))
        charts.append(interval_chart(title, groups, unit=unit))
    return node("div", *charts, class_="grid-2")


def _gap_entry(
    record: Record, checkpoint: str, gap: dict[str, Any], figure: str, unit: Unit
) -> Entry:
    marks = []
    for split, figures in gap["splits"].items():
        found = figures[figure]
        if found["value"] is None:
            continue
        shown, low, high = (number(found[key], unit) for key in ("value", "low", "high"))
        mark = Mark(
            value=found["value"], low=found["low"], high=found["high"], run=record.index,
            tip=f"{record.name}, {checkpoint}, {split}: {shown} [{low}, {high}]",
            shape=_SHAPES[split],
        )  # fmt: skip
        marks.append(mark)
    found = gap["gaps"]["train-test"][figure]
    note = f"gap {number(found['value'], 'pp' if unit else '')}"
    return Entry(marks=marks, label=checkpoint, note=note)


def curves(records: Sequence[Record]) -> Html:
    """What was monitored during training, and the gap between train and validation."""
    monitored = {record.index: list(_monitored(record)) for record in records}
    charts = []
    for figure, title, unit in _CURVES:
        lines = []
        for record in records:
            rows = monitored[record.index]
            for split, dash in (("train", DASHES["clean"]), ("validation", None)):
                known = [(e, m[split].get(figure)) for e, m in rows if split in m]
                if any(value is not None for _, value in known):
                    name = f"{record.name}, {split}"
                    dot = _best(record) if split == "validation" else None
                    lines.append(_line(record, name, known, dash, dot))
        if lines:
            charts.append(line_chart(title, lines, x_label="epoch", unit=unit))
    for figure, title, unit in _CURVES[:2]:
        sign = 1 if unit else -1
        lines = []
        for record in records:
            known = [
                (epoch, _difference(m["train"].get(figure), m["validation"].get(figure), sign))
                for epoch, m in monitored[record.index]
                if "validation" in m
            ]
            if any(value is not None for _, value in known):
                lines.append(_line(record, record.name, known, None, _best(record)))
        way = "train − validation" if unit else "validation − train"
        if lines:
            title = f"Gap of the {title.lower()} ({way})"
            gap_unit: Unit = "pp" if unit else ""
            charts.append(line_chart(title, lines, x_label="epoch", unit=gap_unit, zero=True))
    return node("div", *charts, *_flatness_curves(records), class_="grid-2")


def _flatness_curves(records: Sequence[Record]) -> Iterable[Html]:
    names = dict.fromkeys(
        name for record in records for row in record.metrics for name in row.get("flatness") or {}
    )
    for name in names:
        lines = [
            _line(record, record.name, known, None, None)
            for record in records
            if (
                known := [
                    (row["epoch"], row["flatness"].get(name))
                    for row in record.metrics
                    if row.get("flatness")
                ]
            )
        ]
        yield line_chart(f"Flatness during training: {name}", lines, x_label="epoch")


def landscapes(records: Sequence[Record]) -> Html:
    """The loss and the accuracy around the runs' weights: lines on one axis, planes in panels."""
    lines = [r for r in records if "line" in r.landscapes]
    planes = [r for r in records if "plane" in r.landscapes]
    parts = []
    if lines:
        losses = [line for record in lines for line in _profiles(record, "losses")]
        accuracies = [line for record in lines for line in _profiles(record, "accuracies")]
        label = lines[0].landscapes["line"].names[0]
        shown = {
            scale: line_chart("Loss around the weights", losses, x_label=label, log=scale == "log")
            for scale in ("linear", "log")
        }
        parts.append(
            node(
                "div",
                _switch("scale", shown),
                line_chart("Accuracy around the weights", accuracies, x_label=label, unit="%"),
                class_="grid-2",
            )
        )
    if planes:
        parts.append(node("div", *_planes(planes), class_="grid-2"))
    return join(parts)


def _profiles(record: Record, quantity: Quantity) -> Iterable[Line]:
    found = record.landscapes["line"]
    for kind, values in found.mean(quantity).items():
        yield Line(
            name=f"{record.name}, {KINDS.get(kind, kind)}", run=record.index, x=found.axes[0],
            y=values.tolist(), dash=DASHES.get(kind, "1 3"),
        )  # fmt: skip


def _planes(records: Sequence[Record]) -> Iterable[Html]:
    """One panel for each run and loss, of one loss all on one scale."""
    means = [(r, r.landscapes["plane"], r.landscapes["plane"].mean()) for r in records]
    for kind in dict.fromkeys(kind for *_, mean in means for kind in mean):
        shown = [(r, found, mean[kind]) for r, found, mean in means if kind in mean]
        known = np.concatenate([grid.ravel() for *_, grid in shown])
        known = known[np.isfinite(known)]
        limits = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        for record, found, grid in shown:
            chart = plane(
                f"{record.name}: loss, {KINDS.get(kind, kind)}", found.axes, found.names,
                grid.tolist(), limits,
                [(label, at[0], at[1]) for label, at in found.points.items()],
            )  # fmt: skip
            yield node("div", chart, class_=f"run-{record.index}")


def _switch(name: str, shown: dict[str, Html]) -> Html:
    """One of several figures at a time, chosen by radio buttons; needs no script."""
    parts = []
    for i, label in enumerate(shown):
        box = node("input", type="radio", name=name, id=f"{name}-{label}", checked=i == 0)
        parts += [box, node("label", label, for_=f"{name}-{label}")]
    return node("div", *parts, *(node("div", f) for f in shown.values()), class_="switch")


def _monitored(record: Record) -> Iterable[tuple[float, dict[str, Any]]]:
    """Epochs and what was measured in them, of the averaged weights where there are any."""
    for row in record.metrics:
        measured = row.get("monitor_average") or row.get("monitor")
        if measured:
            yield row["epoch"], measured


def _best(record: Record) -> float | None:
    """The epoch of the best checkpoint."""
    return max((row["epoch"] for row in record.metrics if row.get("is_best")), default=None)


def _difference(a: float | None, b: float | None, sign: int) -> float | None:
    return None if a is None or b is None else sign * (a - b)


def _line(
    record: Record,
    name: str,
    known: Sequence[tuple[float, float | None]],
    dash: str | None,
    dot: float | None,
) -> Line:
    xs, ys = [x for x, _ in known], [y for _, y in known]
    return Line(name=name, run=record.index, x=xs, y=ys, dash=dash, dot=dot)
