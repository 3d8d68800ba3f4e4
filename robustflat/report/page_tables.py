"""Owns the tables of a page: runs compared, seeds together, flatness, attacks, settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from robustflat.flatness import MEASURES
from robustflat.report.chart import UNITS, number, significant
from robustflat.report.figures import FIGURES_OF_SPLITS
from robustflat.report.record import Record, state_of
from robustflat.report.tables import label_of, seeds_of, shown
from robustflat.runs.comparison import Cell, Row, Unit, columns, label
from robustflat.runs.description import effect_of, is_usual
from robustflat.runs.grouping import by_seed
from robustflat.train.folder import flattened

_GAPS = {
    "robust gap": ("Robust gap, accuracy", "train − test"),
    "loss gap": ("Robust gap, loss", "test − train"),
    "best - last": ("Robust overfitting", "test accuracy, best − last checkpoint"),
}
# Figures that are no single attack's.
_NO_ATTACKS = ("clean", "worst case", "AutoAttack", "over radii", "corrupted", "mCE")
# Of other measures, such as alignment, it cannot be said which value is better.
_FLATTER_IF_LOWER = (
    "worst_", "ascent_", "average_", "stutz2021_", "andriushchenko2023_", "wu2020", "wen2023_",
)  # fmt: skip
# A standard error times this is half a 95% interval.
_ERRORS = 1.96


@dataclass(frozen=True, kw_only=True)
class Item:
    """One cell: texts, each with the number behind it, and small lines beneath.

    ``run`` is that of its column or row; ``kind`` a class of the page's style.
    """

    text: str
    value: float | None = None
    small: Sequence[str] = ()
    run: int | None = None
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row: its head, cells, and class of the page's style; without cells, a heading."""

    head: Item
    cells: Sequence[Item] = ()
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Heads of columns, and rows; sorted by the reader where ``sorts``."""

    caption: str
    heads: Sequence[Item]
    lines: Sequence[Line] = field(default_factory=tuple)
    sorts: bool = False


def comparison(records: Sequence[Record]) -> Table:
    """A column for every run, a line for every metric; of single attacks, one line for all.

    A figure measured under circumstances that are not those of the other runs says so in its cell.
    """
    metrics: dict[str, dict[int, list[tuple[str, Cell]]]] = {}
    for name in columns([record.row for record in records]):
        for r in records:
            if name in r.row.cells:
                cell = r.row.cells[name]
                said = name.removeprefix(cell.metric).strip(" []")
                found = metrics.setdefault(cell.metric, {})
                found.setdefault(r.index, []).append((said, cell))
    measures = {name for record in records for name in record.measures} | set(MEASURES)
    accuracies = [m for m in metrics if m not in _GAPS and m not in measures]
    # What only some were attacked with would be lines of dashes.
    lonely = [m for m in accuracies if len(metrics[m]) < sum(bool(r.row.cells) for r in records)]
    lonely = [m for m in lonely if m not in _NO_ATTACKS]
    parts = {
        "Accuracy on test images": [m for m in accuracies if m not in lonely],
        "Robust generalization": [m for m in metrics if m in _GAPS],
        "Sharpness of the training loss": [m for m in metrics if m in measures],
    }
    lines = []
    for heading, group in parts.items():
        extra = lonely if heading.startswith("Accuracy") else []
        if group or extra:
            lines.append(Line(head=Item(text=heading), kind="part"))
        for metric in group:
            better = _best(metrics[metric], metric, error=metric in measures)
            title, more = _GAPS.get(metric, (label(metric), None))
            cells = [
                _merged(metric, metrics[metric].get(r.index, []), r, metric in measures, better)
                for r in records
            ]
            lines.append(Line(head=Item(text=title, small=[more] if more else []), cells=cells))
        if extra:
            head = Item(text="other attacks", small=["not run on all"])
            lines.append(Line(head=head, cells=[_others(extra, metrics, r) for r in records]))
    return Table(caption="Runs compared", heads=_heads(records), lines=lines)


def _merged(
    metric: str, found: Sequence[tuple[str, Cell]], r: Record, error: bool, better: int | None
) -> Item:
    if not found:
        return Item(text="–", run=r.index)
    said, cell = found[0]
    unit = cell.unit
    small = [*_spread(cell, unit, error), *([said] if said else [])]
    for said, other in found[1:]:
        small.append(f"{said}: {number(other.value, unit)}")
    kind = "better" if r.index == better else ""
    text = number(cell.value, unit)
    return Item(text=text, value=cell.value, small=small, run=r.index, kind=kind)


def _others(
    extra: Sequence[str], metrics: dict[str, dict[int, list[tuple[str, Cell]]]], r: Record
) -> Item:
    said = [
        f"{metric}: {number(cell.value, '%')}"
        for metric in extra
        for _, cell in metrics[metric].get(r.index, [])
    ]
    return Item(text="" if said else "–", small=said, run=r.index)


def _spread(cell: Cell, unit: Unit, error: bool) -> list[str]:
    if cell.value is None or cell.low is None or cell.high is None:
        return []
    if error:
        return [f"± {significant(cell.value - cell.low, 2)}"]
    return [f"{_bare(cell.low, unit)} to {number(cell.high, unit)}"]


def _bare(value: float | None, unit: Unit) -> str:
    return number(value, unit).removesuffix("%").removesuffix(" pp")


def _best(found: dict[int, list[tuple[str, Cell]]], name: str, *, error: bool) -> int | None:
    """The run whose interval lies wholly on the better side of every other; None if none does.

    Nor is one named among figures of different circumstances.
    """
    if error and not name.startswith(_FLATTER_IF_LOWER):
        return None
    if any(said for cells in found.values() for said, _ in cells):
        return None
    sign = -1 if error or name in _GAPS else 1
    ends: dict[int, tuple[float, float]] = {}
    for index, ((_, cell), *_) in found.items():
        if cell.value is None or cell.low is None or cell.high is None:
            return None
        stretch = _ERRORS if error else 1.0
        reach = [cell.value + stretch * (end - cell.value) for end in (cell.low, cell.high)]
        ends[index] = (min(sign * end for end in reach), max(sign * end for end in reach))
    for index, (low, _) in ends.items():
        others = [high for other, (_, high) in ends.items() if other != index]
        if others and low > max(others):
            return index
    return None


def seeds(records: Sequence[Record]) -> Table | None:
    """Means, deviations and numbers of runs that differ in their seed alone; None if none do."""
    groups = by_seed([record.row for record in records])
    if all(len(group.seeds) < 2 for group in groups):
        return None
    names = columns(groups)
    heads = [Item(text=label_of(name, groups)) for name in names]
    lines = [
        Line(
            head=Item(
                text=group.run,
                small=[group.method, f"n = {len(group.seeds)}: seeds {seeds_of(group)}"],
            ),
            cells=[_mean(group.cells.get(name), group) for name in names],
        )
        for group in groups
    ]  # fmt: skip
    heads = [Item(text="setting"), *heads]
    return Table(
        caption="Mean ± standard deviation over seeds", heads=heads, lines=lines, sorts=True
    )


def _mean(cell: Cell | None, group: Row) -> Item:
    mean, _, spread = shown(cell, row=group).partition(" ± ")
    small = [f"± {spread}"] if spread else []
    mean += UNITS[cell.unit] if cell and spread else ""
    return Item(text=mean, value=cell.value if cell else None, small=small)


def flatness(records: Sequence[Record]) -> Table:
    """Every measure with its standard errors and its ball."""
    lines = []
    for name in dict.fromkeys(name for record in records for name in record.measures):
        found = [record.measures.get(name) for record in records]
        balls = dict.fromkeys(_ball(figure) for figure in found if figure is not None)
        one = len(balls) == 1
        about = [MEASURES[name].summary if name in MEASURES else "", *(balls if one else ())]
        small = [line for line in about if line]
        head = Item(text=label(name), small=small, kind="long")
        cells = [_flatness(r, f, ball=not one) for r, f in zip(records, found, strict=True)]
        lines.append(Line(head=head, cells=cells))
    return Table(caption="Measures of flatness", heads=_heads(records), lines=lines)


def attacks(records: Sequence[Record]) -> Table:
    """What each attack did, run after run."""
    heads = ("run", "checkpoint", "weights", "attack", "still correct", "95% interval", "attacked",
             "broken", "outside the ball", "seconds")  # fmt: skip
    counts = ("attacked", "broken", "outside")
    lines = []
    for record in records:
        for checkpoint, entry in record.checkpoints.items():
            for name, found in ((entry["test"] or {}).get("attacks") or {}).items():
                low, high = found["interval"]
                after = f"{name} after {found['after']}" if found.get("after") else name
                cells = [
                    Item(text=state_of(checkpoint, entry["epoch"])), Item(text=entry["weights"]),
                    Item(text=after), value(found["accuracy"], "%"),
                    Item(text=f"{_bare(low, '%')} to {number(high, '%')}", value=low),
                    *(Item(text=str(found[k]), value=found[k]) for k in counts),
                    Item(text=f"{found['seconds']:.1f}", value=found["seconds"]),
                ]  # fmt: skip
                lines.append(Line(head=Item(text=record.name, run=record.index), cells=cells))
    return grid("Each attack in numbers", heads, lines)


def gaps(records: Sequence[Record]) -> Table:
    """Clean and robust accuracy and loss of every split, and the gaps."""
    lines = []
    for record in records:
        for checkpoint, entry in record.checkpoints.items():
            both = entry["gap"] or {"splits": {}, "gaps": {}}
            for split, found in {**both["splits"], **both["gaps"]}.items():
                gap = split in both["gaps"]
                cells = [
                    _with_interval(found[key], "pp" if gap and unit else unit)
                    for key, _, unit in FIGURES_OF_SPLITS
                ]
                place = f"{state_of(checkpoint, entry['epoch'])}, {entry['weights']} weights"
                text = split.replace("-", " − ") if gap else split
                head = Item(text=record.name, run=record.index)
                lines.append(Line(head=head, cells=[Item(text=place), Item(text=text), *cells]))
    heads = ["run", "checkpoint", "split", *(title.lower() for _, title, _ in FIGURES_OF_SPLITS)]
    return grid("Clean and robust figures of every split", heads, lines)


def settings(records: Sequence[Record]) -> Table | None:
    """The settings in which the runs differ, of those that can change their weights.

    What only some methods have is left out where these have it as usual.
    """
    flat = {r.index: effect_of(r.config) for r in records if r.config}
    lines = []
    for key in dict.fromkeys(k for one in flat.values() for k in one):
        # A key that a method does not have says no more than null does.
        if len({json.dumps(one.get(key)) for one in flat.values()}) < 2:
            continue
        having = [r.config for r in records if r.config and key in flat[r.index]]
        if not all(is_usual(config, key) for config in having):
            cells = [_plain(r, flat.get(r.index, {}).get(key, "–")) for r in records]
            lines.append(Line(head=Item(text=key, kind="code"), cells=cells))
    if not lines:
        return None
    return Table(caption="Settings that differ", heads=_heads(records), lines=lines)


def environments(records: Sequence[Record]) -> Table:
    """What a result may depend on beside the settings; differences stand out."""
    flat = []
    for record in records:
        known = dict(record.environment)
        if isinstance(known.get("command"), list):
            known["command"] = shlex.join(map(str, known["command"]))
        if "cuda" in known:
            known["device"] = known.pop("cuda") or "CPU"
        flat.append({".".join(key): value for key, value in flattened(known)})
    lines = []
    for key in dict.fromkeys(k for one in flat for k in one):
        values = [one.get(key, "–") for one in flat]
        cells = [_plain(r, v) for r, v in zip(records, values, strict=True)]
        kind = "differs" if len({json.dumps(v) for v in values}) > 1 else ""
        lines.append(Line(head=Item(text=key.removeprefix("versions.")), cells=cells, kind=kind))
    return Table(caption="Environments", heads=_heads(records), lines=lines)


def value(figure: float | None, unit: Unit = "") -> Item:
    """A figure as people read it, with all its digits for programs."""
    return Item(text=number(figure, unit), value=figure)


def _ball(figure: dict[str, Any]) -> str:
    """The ball of a measure, if it has one, its threat and its images, in words."""
    details = figure.get("details") or {}
    words = [str(details[key]) for key in ("ball", "weight_norm") if details.get(key) is not None]
    if details.get("radius") is not None:
        words.append(f"radius {details['radius']:g}")
    ball = [f"ball: {', '.join(words)}"] if words else []
    return "; ".join([*ball, *filter(None, (figure["threat"], figure["images"]))])


def _flatness(record: Record, figure: dict[str, Any] | None, *, ball: bool) -> Item:
    if figure is None:
        return Item(text="–", run=record.index)
    spread, details = figure["standard_error"], figure.get("details") or {}
    small = []
    if spread is not None:
        small.append(f"± {significant(spread, 2)} over directions")
    if (images := details.get("example_standard_error")) is not None:
        small.append(f"± {significant(images, 2)} over images")
    if ball and _ball(figure):
        small.append(_ball(figure))
    at = figure["value"]
    return Item(text=number(at), value=at, small=small, run=record.index)


def _with_interval(figure: dict[str, Any], unit: Unit) -> Item:
    small = []
    if figure["low"] is not None and figure["high"] is not None:
        small.append(f"{_bare(figure['low'], unit)} to {number(figure['high'], unit)}")
    return Item(text=number(figure["value"], unit), value=figure["value"], small=small)


def _plain(record: Record, content: Any) -> Item:
    text = content if isinstance(content, str) else json.dumps(content)
    return Item(text=text, run=record.index, kind="text")


def _heads(records: Sequence[Record]) -> list[Item]:
    """An empty head over those of the rows, then the runs, under them how they were trained."""
    runs = [
        Item(
            text=r.name, run=r.index, kind="name",
            small=[r.method, *([f"{r.row.weights} weights"] if "average" in r.row.weights else [])],
        )
        for r in records
    ]  # fmt: skip
    return [Item(text=""), *runs]


def grid(caption: str, heads: Iterable[str], lines: Sequence[Line]) -> Table:
    """A table to be sorted."""
    return Table(caption=caption, heads=[Item(text=h) for h in heads], lines=lines, sorts=True)
