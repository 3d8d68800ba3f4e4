"""Owns the pages: a report on runs, or figures alone; each complete in itself, loading nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import robustflat
from robustflat.files import write_text
from robustflat.landscapes import Landscape
from robustflat.report import figures, interactive, palette
from robustflat.report import page_tables as tables
from robustflat.report import page_text as text
from robustflat.report.chart import Chart, Figure, Key, Plane, is_empty
from robustflat.report.landscape_picture import circumstances
from robustflat.report.page_pictures import Pictures, pictures
from robustflat.report.page_tables import Table
from robustflat.report.record import Record, read_records, tests
from robustflat.runs.comparison import limits, whole
from robustflat.train.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as the template shows it; ``spec`` is None where there is nothing to draw.

    ``wide``: it has rows with names, which take the width of the page.
    """

    title: str
    run: int | None
    spec: dict[str, Any] | None
    surface: dict[str, Any] | None = None
    table: Table | None = None
    key: Mapping[Key, str] = field(default_factory=dict)
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        about: what the figures mean.
        tables: in sight, before the figures.
        figures: that are drawn.
        pictures: example images.
        details: tables to unfold, and their summaries.
        missing: runs that are not shown, why, and the command that mends it for all of them.
    """

    title: str
    about: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Drawn] = ()
    pictures: Sequence[Pictures] = ()
    details: Sequence[tuple[str, Table]] = ()
    missing: Sequence[tuple[Sequence[Record], str, str]] = ()

    @property
    def key(self) -> dict[str, str]:
        """What lines and marks of the figures stand for."""
        return {mark: said for figure in self.figures for mark, said in figure.key.items()}


def write_page(folders: Sequence[RunFolder], output: Path) -> None:
    """Write the report on runs; what was not measured is said to be so.

    Args:
        folders: of the runs.
        output: the file; its folder is made if it is not there.

    Raises:
        UserError: if a run's files are missing or damaged, or the page cannot be written.
    """
    records = read_records(folders)
    roots = ", ".join(record.root for record in records)
    write_text(output, whole(roots, lambda: _render(**_report(records))))


def write_figures(found: Sequence[Figure], output: Path, title: str) -> None:
    """Write a page of figures alone.

    Raises:
        UserError: if it cannot be written.
    """
    section = Section(title="", figures=[_drawn(figure) for figure in found])
    write_text(output, _render(title=title, sections=[section]))


def write_landscapes(found: Mapping[str, Landscape], output: Path) -> None:
    """Write a page to explore landscapes in.

    Args:
        found: landscapes by the models' names; all lines or all planes.
        output: the file.

    Raises:
        UserError: if there is none, they are mixed, or the page cannot be written.
    """
    shown = [_drawn(figure) for figure in figures.landscapes(found)]
    if len(next(iter(found.values())).axes) == 1:
        shown += [_drawn(figure) for figure in figures.landscapes(found, quantity="accuracies")]
    about = text.as_sentence(circumstances(list(found.values())))
    section = Section(title="", about=about, figures=shown)
    write_text(output, _render(title="Weight-loss landscape", sections=[section]))


def _render(*, sections: Sequence[Section], title: str, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("robustflat.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    draws = any(figure.spec for section in sections for figure in section.figures)
    nothing: dict[str, Any] = dict.fromkeys(("records", "doubts", "limits", "configurations"), ())
    nothing |= {"lead": "", "tested": False, "settings": None, "environments": None, "alike": False}
    return environment.get_template("page.html").render(
        **{**nothing, **more}, title=title, sections=sections, draws=draws,
        style=Markup(_own("page.css") + _colours()), script=Markup(_own("page.js")),
        library=Markup(interactive.library()) if draws else "", themes=palette.themes(),
        colours=len(palette.LIGHT), version=robustflat.__version__,
    )  # fmt: skip


def _own(name: str) -> str:
    return (resources.files("robustflat.report") / "templates" / name).read_text("utf-8")


def _colours() -> str:
    """CSS of the palette: the runs' colours, and the dark theme."""
    runs = {
        theme: " ".join(f".c{i} {{ --c: {c}; }}" for i, c in enumerate(shades))
        for theme, shades in (("light", palette.LIGHT), ("dark", palette.DARK))
    }
    roles = "".join(f" --{role}: {c};" for role, c in palette.ROLES["dark"].items())
    more = " --panel: #212125; --warn: #f0b45c; --warn-panel: #2d2415; --mark: #4a3f14;"
    more += " --shade: #000c;"
    return (
        f"{runs['light']}\n@media screen and (prefers-color-scheme: dark) "
        f"{{ :root {{{roles}{more} }} {runs['dark']} }}"
    )


def _report(records: Sequence[Record]) -> dict[str, Any]:
    names = [record.name for record in records]
    shown = " and ".join(names) if len(names) < 3 else f"{len(names)} runs"
    lines = [record.text.splitlines() for record in records]
    common = set(lines[0]).intersection(*lines)
    return {
        "title": f"Robustness and flatness: {shown}",
        "lead": text.compared(records),
        "records": records,
        "doubts": text.doubts(records),
        "limits": limits([record.folder for record in records]),
        "tested": bool(tests(records)),
        "sections": _sections(records),
        "settings": tables.settings(records),
        "alike": sum(record.config is not None for record in records) > 1,
        "configurations": [
            (record, [(line, line not in common) for line in own])
            for record, own in zip(records, lines, strict=True)
        ],
        "environments": tables.environments(records),
    }


def _sections(records: Sequence[Record]) -> list[Section]:
    evaluated = [r for r in records if r.evaluation is not None]
    tested = [r for r in evaluated if tests([r])]
    gauged = [r for r in evaluated if any(entry["gap"] for entry in r.checkpoints.values())]
    runs = [r for r in records if r.config]
    monitored = [r for r in runs if any(row.get("monitor") for row in r.metrics)]
    measured = [r for r in records if r.measures]
    drawn = [r for r in records if r.landscapes]
    compared = [r for r in records if r.row.cells]
    part = partial(_section, records)
    together = tables.seeds(records)
    seen = pictures(tested)
    return [
        part(
            "Comparison", compared, "evaluate", lambda _: _COMPARISON,
            # All runs: what was not measured of one hides none of its column.
            tables=[tables.comparison(records)] if compared else [],
        ),
        *([Section(title="Over seeds", about=_SEEDS, tables=[together])] if together else []),
        part(
            "Robust accuracy by attack", tested, "evaluate", text.about_attacks, figures.attacks,
            details={"Each attack in numbers": tables.attacks},
        ),
        *(
            [Section(title="By class", about=_CLASSES, figures=[*map(_drawn, found)])]
            if (found := figures.by_class(tested)) else []
        ),
        Section(
            title="Examples", about=_EXAMPLES if seen else "", pictures=list(seen.values()),
            missing=_missing([r for r in records if r.index not in seen], "evaluate"),
        ),
        part(
            "Robust-generalization gap", gauged, "evaluate", text.about_gaps, figures.gaps,
            details={"Clean and robust figures of every split": tables.gaps},
        ),
        *(
            [_section(
                runs, "Learning curves", monitored, "train", text.about_curves, figures.curves,
            )] if runs else []
        ),
        part(
            "Flatness", measured, "flatness", text.about_flatness, figures.spectra,
            tables=[tables.flatness(measured)] if measured else [],
        ),
        part(
            "Weight-loss landscape", drawn, "landscape", text.about_landscapes,
            figures.of_landscapes,
        ),
    ]  # fmt: skip


_COMPARISON = (
    "Every attack ran on all images that the model classifies; the worst case counts an image as "
    "lost if any of them broke it. A figure that was measured under other circumstances than the "
    "others (threat, images, options, checkpoint) says so beneath it. Beneath a figure: its 95% "
    "interval, or the standard error of a sharpness (over directions and images together). Bold: "
    "better than in every other run by more than those intervals (1.96 standard errors) can "
    "explain. pp: percentage points. Smaller gaps are better, and lower sharpness is flatter."
)
_SEEDS = (
    "Runs that differ in nothing but their seed (and in names and places), taken together: mean ± "
    "sample standard deviation over the seeds, of n runs. Press a heading to sort."
)
_CLASSES = (
    "The share of each class's test images that are classified correctly without an attack, and "
    "that none of the attacks broke. Classes have few images each, so their figures are less sure."
)
_EXAMPLES = (
    "A few test images, the same attacked from one random start, and the difference, magnified so "
    "that the largest change of a pixel is black or white. Beneath each what the model takes it "
    "for. Eight images measure nothing: they show what the threat looks like."
)


def _section(
    records: Sequence[Record],
    title: str,
    having: Sequence[Record],
    command: str,
    about: Callable[[Sequence[Record]], str],
    figures_of: Callable[[Sequence[Record]], Sequence[Figure]] = lambda _: (),
    *,
    tables: Sequence[Table] = (),
    details: Mapping[str, Callable[[Sequence[Record]], Table]] | None = None,
) -> Section:
    """Figures of the runs that have them, what they mean, and how the others get them."""
    missing = _missing([record for record in records if record not in having], command)
    if not having:
        return Section(title=title, missing=missing)
    return Section(
        title=title,
        about=about(having),
        tables=tables,
        figures=[_drawn(figure) for figure in figures_of(having)],
        details=[(summary, make(having)) for summary, make in (details or {}).items()],
        missing=missing,
    )


def _missing(records: Sequence[Record], command: str) -> list[tuple[Sequence[Record], str, str]]:
    """Which runs are not in a figure, why, and the command that mends it."""
    why: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        said, usage = "not measured: run", f"robustflat {command}"
        if r.config is None:
            usage += " MODEL, with what was said of it"
        elif command == "train" and r.metrics:
            said, usage = "not monitored: see the setting", "monitor.every"
        elif command == "train":
            usage += f" {r.root}/config.yaml --resume"
        why.setdefault((said, usage), []).append(r)
    return [
        (
            found,
            said,
            " ".join([usage, *(r.root for r in found)]) if usage.count(" ") == 1 else usage,
        )
        for (said, usage), found in why.items()
    ]


def _drawn(figure: Figure) -> Drawn:
    run = figure.run if isinstance(figure, Plane) else None
    if is_empty(figure):
        return Drawn(title=figure.title, run=run, spec=None)
    spec = interactive.plotly(figure)
    if isinstance(figure, Plane):
        surface = interactive.plotly(figure, surface=True)
        return Drawn(title=figure.title, run=run, spec=spec, surface=surface)
    return Drawn(
        title=figure.title, run=run, spec=spec, table=_numbers(figure), key=figure.key,
        wide=any(series.text for series in figure.series),
    )  # fmt: skip


def _numbers(chart: Chart) -> Table:
    """What a chart shows, in numbers, for those who cannot see it."""
    lines = []
    for series in chart.series:
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            if series.faint or not series.name:
                continue
            value, unit = (x, chart.x.unit) if series.sideways else (y, chart.y.unit)
            place = f"{x:g}"
            if series.sideways:
                at = min(chart.y.ticks, key=lambda tick: abs(tick - (y or 0.0)))
                place = chart.y.ticks[at].partition("<br>")[0]
            ends = [None if e is None else e[i] for e in (series.low, series.high)]
            cells = [tables.Item(text=place), tables.value(value, unit)]
            cells += [tables.Item(text="") if e is None else tables.value(e, unit) for e in ends]
            head = tables.Item(text=series.name, run=series.run)
            lines.append(tables.Line(head=head, cells=cells))
    heads = ("curve", chart.x.label if not chart.y.ticks else "at", "value", "low", "high")
    return tables.grid(chart.title, heads, lines)
