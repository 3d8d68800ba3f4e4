"""Owns the tables of a report: runs compared, flatness, attacks, settings, environments."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from robustflat.flatness import MEASURES
from robustflat.report.charts import Unit, colour, number
from robustflat.report.markup import Html, node
from robustflat.report.record import Record
from robustflat.report.tables import LABELS
from robustflat.runs.comparison import Cell, columns

_GAPS = {
    "robust gap": ("Robust gap, accuracy", "train − test"),
    "loss gap": ("Robust gap, loss", "test − train"),
    "best - last": ("Robust overfitting", "test accuracy, best − last checkpoint"),
}
# Of other measures, such as alignment, it cannot be said which value is better.
_FLATTER_IF_LOWER = (
    "worst_", "ascent_", "average_", "stutz2021_", "andriushchenko2023_", "wu2020", "wen2023_",
)  # fmt: skip
# A standard error times this is half a 95% interval.
_ERRORS = 1.96


def comparison(records: Sequence[Record]) -> Html:
    """The rows of ``robustflat compare``, turned: a column for every run."""
    names = columns([record.row for record in records])
    # A line's name may also say under what circumstances its metric was measured.
    metrics = {n: c.metric for record in records for n, c in record.row.cells.items()}
    measured = {n for n in names if metrics[n] in MEASURES or metrics[n] in _all_measures(records)}
    parts = {
        "Accuracy on test images": [
            n for n in names if metrics[n] not in _GAPS and n not in measured
        ],
        "Robust generalization": [n for n in names if metrics[n] in _GAPS],
        "Sharpness of the training loss": [n for n in names if n in measured],
    }
    body = []
    for heading, group in parts.items():
        if group:
            body.append(
                node("tr", node("th", heading, colspan=str(len(records) + 1)), class_="part")
            )
        for name in group:
            cells = {r.index: r.row.cells[name] for r in records if name in r.row.cells}
            metric, said = metrics[name], name.removeprefix(metrics[name])
            better = _best(cells, metric, error=name in measured)
            label, more = _GAPS.get(metric, (LABELS.get(metric, metric), None))
            label += said
            head = node("th", label, more and node("small", more), scope="row")
            data = [
                _cell(
                    r, cells.get(r.index), _unit(metric, cells), name in measured, r.index == better
                )
                for r in records
            ]
            body.append(node("tr", head, *data))
    return _table(records, body, lambda r: r.method)


def _all_measures(records: Sequence[Record]) -> set[str]:
    return {name for record in records for name in record.measures}


def flatness(records: Sequence[Record]) -> Html:
    """Every measure with its standard errors and its ball."""
    body = []
    for name in dict.fromkeys(name for record in records for name in record.measures):
        found = [record.measures.get(name) for record in records]
        balls = dict.fromkeys(_ball(figure) for figure in found if figure is not None)
        one = len(balls) == 1
        about = [MEASURES[name].summary if name in MEASURES else "", *(balls if one else ())]
        small = [node("small", line) for line in about if line]
        head = node("th", LABELS.get(name, name), *small, scope="row")
        cells = [_flatness_cell(r, f, ball=not one) for r, f in zip(records, found, strict=True)]
        body.append(node("tr", head, *cells))
    return _table(records, body)


def attacks(records: Sequence[Record]) -> Html:
    """What each attack did, run after run."""
    heads = ("run", "checkpoint", "attack", "still correct", "95% interval", "attacked", "broken",
             "outside the ball", "seconds")  # fmt: skip
    rows = []
    for record in records:
        for checkpoint, entry in record.checkpoints.items():
            for name, found in ((entry["test"] or {}).get("attacks") or {}).items():
                low, high = (number(end, "%") for end in found["interval"])
                cells = [
                    node("td", record.name), node("td", f"{checkpoint}, epoch {entry['epoch']}"),
                    node("td", name), node("td", value(found["accuracy"], "%")),
                    node("td", f"{low} to {high}"), node("td", str(found["attacked"])),
                    node("td", str(found["broken"])), node("td", str(found["outside"])),
                    node("td", f"{found['seconds']:.1f}"),
                ]  # fmt: skip
                rows.append(node("tr", *cells, class_=f"run-{record.index}"))
    return _grid(heads, rows)


def gaps(records: Sequence[Record]) -> Html:
    """Clean and robust accuracy and loss of every split, and the gaps."""
    figures: dict[str, tuple[str, Unit]] = {
        "clean_accuracy": ("clean accuracy", "%"), "robust_accuracy": ("robust accuracy", "%"),
        "clean_loss": ("clean loss", ""), "robust_loss": ("robust loss", ""),
    }  # fmt: skip
    rows = []
    for record in records:
        for checkpoint, entry in record.checkpoints.items():
            both = entry["gap"] or {"splits": {}, "gaps": {}}
            for split, found in {**both["splits"], **both["gaps"]}.items():
                gap = split in both["gaps"]
                cells = []
                for key, (_, unit) in figures.items():
                    shown: Unit = "pp" if gap and unit else unit
                    cells.append(node("td", *_with_interval(found[key], shown)))
                text = split.replace("-", " − ") if gap else split
                place = f"{checkpoint}, epoch {entry['epoch']}, {entry['weights']} weights"
                head = (node("td", record.name), node("td", place), node("td", text))
                rows.append(node("tr", *head, *cells, class_=f"run-{record.index}"))
    return _grid(["run", "checkpoint", "split", *(label for label, _ in figures.values())], rows)


def settings(records: Sequence[Record]) -> Html:
    """The keys in which the runs' configurations differ."""
    flat = [dict(_flatten(record.config.model_dump(mode="json"))) for record in records]
    keys = [k for k in dict.fromkeys(k for one in flat for k in one) if k != "name"]
    body = [
        node(
            "tr",
            node("th", node("code", key), scope="row"),
            *(_plain(r, one.get(key, "–")) for r, one in zip(records, flat, strict=True)),
        )
        for key in keys
        # A key that a method does not have says no more than null does.
        if len({one.get(key, "null") for one in flat}) > 1
    ]
    if not body:
        return node("p", "The runs have the same settings.")
    return _table(records, body)


def environments(records: Sequence[Record]) -> Html:
    """What a result may depend on beside the settings; differences stand out."""
    flat = []
    for record in records:
        known = dict(record.environment or {})
        if isinstance(known.get("command"), list):
            known["command"] = shlex.join(map(str, known["command"]))
        if "cuda" in known:
            known["device"] = known.pop("cuda") or "CPU"
        flat.append(dict(_flatten(known)))
    body = []
    for key in dict.fromkeys(k for one in flat for k in one):
        values = [one.get(key, "–") for one in flat]
        cells = (_plain(r, v) for r, v in zip(records, values, strict=True))
        kind = "differs" if len(set(values)) > 1 else None
        head = node("th", key.removeprefix("versions."), scope="row")
        body.append(node("tr", head, *cells, class_=kind))
    return _table(records, body)


def value(figure: float | None, unit: Unit = "") -> Html:
    """A figure as people read it, with all its digits for programs."""
    return node("data", number(figure, unit), value="" if figure is None else repr(figure))


def _unit(name: str, cells: dict[int, Cell]) -> Unit:
    if not next(iter(cells.values())).share:
        return ""
    return "pp" if name in _GAPS else "%"


def _cell(record: Record, cell: Cell | None, unit: Unit, error: bool, better: bool) -> Html:
    kind = f"run-{record.index}" + (" better" if better else "")
    if cell is None:
        return node("td", "–", class_=kind)
    spread = None
    if cell.value is not None and cell.low is not None and cell.high is not None:
        plain = number(cell.low, unit).removesuffix("%").removesuffix(" pp")
        text = (
            f"± {cell.value - cell.low:.2g}" if error else f"{plain} to {number(cell.high, unit)}"
        )
        spread = node("small", text)
    return node("td", value(cell.value, unit), spread, class_=kind)


def _best(cells: dict[int, Cell], name: str, *, error: bool) -> int | None:
    """The run whose interval lies wholly on the better side of every other; None if none does."""
    if error and not name.startswith(_FLATTER_IF_LOWER):
        return None
    sign = -1 if error or name in _GAPS else 1
    ends: dict[int, tuple[float, float]] = {}
    for index, cell in cells.items():
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


def _ball(figure: dict[str, Any]) -> str:
    """The ball of a measure in words; empty if it has none."""
    details = figure.get("details") or {}
    words = [str(details[key]) for key in ("ball", "weight_norm") if details.get(key) is not None]
    if details.get("radius") is not None:
        words.append(f"radius {details['radius']:g}")
    return f"ball: {', '.join(words)}" if words else ""


def _flatness_cell(record: Record, figure: dict[str, Any] | None, *, ball: bool) -> Html:
    if figure is None:
        return node("td", "–", class_=f"run-{record.index}")
    spread, details = figure["standard_error"], figure.get("details") or {}
    lines = []
    if spread is not None:
        lines.append(f"± {spread:.2g} over directions")
    if details.get("example_standard_error") is not None:
        lines.append(f"± {details['example_standard_error']:.2g} over images")
    if ball:
        lines.append(_ball(figure))
    small = [node("small", line) for line in lines if line]
    return node("td", value(figure["value"]), *small, class_=f"run-{record.index}")


def _with_interval(figure: dict[str, Any], unit: Unit) -> Iterator[Html]:
    yield value(figure["value"], unit)
    if figure["low"] is not None and figure["high"] is not None:
        low, high = (number(figure[end], unit) for end in ("low", "high"))
        yield node("small", f"{low.removesuffix('%').removesuffix(' pp')} to {high}")


def _plain(record: Record, text: Any) -> Html:
    return node("td", str(text), class_=f"run-{record.index} text")


def _table(
    records: Sequence[Record],
    body: Sequence[Html],
    under: Callable[[Record], str] | None = None,
) -> Html:
    """A column for every run, whose heads have the runs' colours."""
    heads = [
        node(
            "th",
            name_of(r),
            under and node("small", under(r)),
            class_=f"run-{r.index}",
            scope="col",
        )
        for r in records
    ]
    table = node("table", node("thead", node("tr", node("td"), *heads)), node("tbody", *body))
    return node("div", table, class_="scroll")


def name_of(record: Record) -> Html:
    """A run's name with its colour."""
    swatch = node("span", class_=f"swatch {colour(record.index)}")
    return node("span", swatch, record.name, class_="name")


def _grid(heads: Iterable[str], rows: Sequence[Html]) -> Html:
    head = node("thead", node("tr", *(node("th", text) for text in heads)))
    return node("div", node("table", head, node("tbody", *rows), class_="list"), class_="scroll")


def _flatten(content: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text; null stands as in JSON."""
    if isinstance(content, dict) and content:
        for key, inner in content.items():
            yield from _flatten(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, content if isinstance(content, str) else json.dumps(content)
