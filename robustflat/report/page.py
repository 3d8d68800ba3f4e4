"""Owns the report on runs: one page, complete in itself, that loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import robustflat
from robustflat.errors import UserError
from robustflat.files import write_whole
from robustflat.report import page_figures as figures
from robustflat.report import page_tables as tables
from robustflat.report import page_text as text
from robustflat.report.charts import palette
from robustflat.report.markup import Html, join, node
from robustflat.report.record import Record, read_records
from robustflat.runs.comparison import limits, whole
from robustflat.train.folder import RunFolder

_Part = Callable[[Sequence[Record]], Html]


def write_page(folders: Sequence[RunFolder], output: Path) -> None:
    """Write the report on runs; what was not measured is said to be so.

    Args:
        folders: of the runs.
        output: the file; its folder is made if it is not there.

    Raises:
        UserError: if a run's files are missing or damaged, or the page cannot be written.
    """
    records = read_records(folders)
    body = whole(", ".join(record.root for record in records), lambda: _body(records))
    title = _title(records)
    page = resources.files("robustflat.report").joinpath("page.html").read_text("utf-8")
    page = page.replace("@COLOURS@", palette()).replace("@TITLE@", node("title", title))
    # The body comes last: nothing that it holds is taken for a place to fill.
    _write(output, page.replace("@BODY@", body))


def _title(records: Sequence[Record]) -> str:
    names = [record.name for record in records]
    shown = " and ".join(names) if len(names) < 3 else f"{len(names)} runs"
    return f"Robustness and flatness: {shown}"


def _body(records: Sequence[Record]) -> Html:
    evaluated = [r for r in records if r.evaluation is not None]
    tested = [r for r in evaluated if text.tests([r])]
    gauged = [r for r in evaluated if any(entry["gap"] for entry in r.checkpoints.values())]
    monitored = [r for r in records if any(row.get("monitor") for row in r.metrics)]
    measured = [r for r in records if r.measures]
    drawn = [r for r in records if r.landscapes]
    sections = [
        _section(
            "Comparison", records, [r for r in records if r.row.cells], "evaluate",
            [tables.comparison], lambda _: _COMPARISON,
        ),
        _section(
            "Robust accuracy by attack", records, tested, "evaluate",
            [figures.attacks, _details("Each attack in numbers", tables.attacks)],
            text.about_attacks,
        ),
        _section(
            "Robust-generalization gap", records, gauged, "evaluate",
            [figures.gaps, _details("Clean and robust figures of every split", tables.gaps)],
            text.about_gaps,
            [("square", "train"), ("hollow", "validation"), ("dot", "test")],
        ),
        _section(
            "Learning curves", records, monitored, "train", [figures.curves],
            text.about_curves,
            [("dashed", "train"), ("solid", "validation"), ("dot", "best checkpoint")],
        ),
        _section(
            "Flatness", records, measured, "flatness", [tables.flatness], text.about_flatness,
        ),
        _section(
            "Weight-loss landscape", records, drawn, "landscape", [figures.landscapes],
            text.about_landscapes,
            [("solid", "robust"), ("dashed", "clean"), ("dotted", "robust, examples fixed")],
        ),
    ]  # fmt: skip
    return join([_head(records), _warnings(records), *sections, _settings(records), _foot()])


_COMPARISON = (
    "Every attack ran on all images that the model classifies; the worst case counts an image as "
    "lost if any of them broke it. What was measured under other circumstances (threat, images, "
    "options, checkpoint) stands in a line of its own, which says what differs. Beneath a figure: "
    "its 95% interval, or the standard error of a sharpness. Bold: better than in every other run "
    "by more than those intervals (1.96 standard errors) can explain. Smaller gaps are better, and "
    "lower sharpness is flatter."
)


def _head(records: Sequence[Record]) -> Html:
    lead = node("p", text.compared(records), class_="lead")
    header = node("header", node("h1", _title(records)), lead)
    if len(records) == 1:
        return header
    boxes = [
        node(
            "label",
            node("input", type="checkbox", checked=True, data_run=str(record.index)),
            tables.name_of(record),
            node("small", record.method),
        )
        for record in records
    ]
    return join([header, node("nav", *boxes, aria_label="Runs shown")])


def _warnings(records: Sequence[Record]) -> Html | None:
    doubts, unlike = text.doubts(records), limits([record.folder for record in records])
    items = [node("li", node("b", f"{whose}: "), said) for whose, said in doubts]
    items += [node("li", said) for said in unlike]
    if items:
        heading = node("h2", "Before trusting these figures")
        return node("section", heading, node("ul", *items), class_="warnings", role="note")
    if not text.tests(records):
        return None
    return node(
        "p",
        "The evaluations' own checks (gradient masking, randomness, images outside the ball, "
        "outputs and inputs of the wrong kind) raised no doubt.",
        class_="fine",
    )


def _section(
    title: str,
    records: Sequence[Record],
    having: Sequence[Record],
    command: str,
    parts: Sequence[_Part],
    about: Callable[[Sequence[Record]], str],
    key: Sequence[tuple[str, str]] = (),
) -> Html:
    """Figures of the runs that have them, what they mean, and how the others get them.

    Args:
        title: of the section.
        records: all runs.
        having: those that have what is shown.
        command: what gets it for the others.
        parts: the figures; the first stands beside the words.
        about: the words.
        key: the marks that are used, by their class in page.html, and what they stand for.
    """
    lacking = [record for record in records if record not in having]
    content: list[Html | None] = []
    if having:
        marks = [node("span", node("i", class_=mark), label) for mark, label in key]
        content.append(node("p", *marks, class_="key") if marks else None)
        words = node("p", about(having), class_="about")
        content.append(node("div", parts[0](having), words, class_="beside"))
        content += [part(having) for part in parts[1:]]
    content += [_missing(record, command) for record in lacking]
    return node("section", node("h2", title), *content)


def _missing(record: Record, command: str) -> Html:
    """Why a run is not in a figure, and the command that mends it."""
    usage, why = f"robustflat {command} {record.root}", " not measured: run "
    if command == "train":
        usage = f"robustflat train {record.root}/config.yaml --resume"
        if record.metrics:
            usage, why = "monitor.every", " not monitored: see its setting "
    return node("p", tables.name_of(record), why, node("code", usage), class_="missing")


def _details(summary: str, part: _Part) -> _Part:
    return lambda records: node("details", node("summary", summary), part(records))


def _settings(records: Sequence[Record]) -> Html:
    parts: list[Html] = []
    if len(records) > 1:
        parts.append(tables.settings(records))
    for record in records:
        summary = node("summary", "All settings of ", tables.name_of(record))
        parts.append(node("details", summary, node("pre", record.text)))
    summary = node("summary", "Environment: versions, commit, device")
    parts.append(node("details", summary, tables.environments(records)))
    title = "Settings that differ" if len(records) > 1 else "Settings"
    return node("section", node("h2", title), *parts)


def _foot() -> Html:
    return node("footer", f"Written by robustflat {robustflat.__version__}.")


def _write(output: Path, page: str) -> None:
    """The whole page or, if that fails, what was there before."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page)
    except OSError as error:
        raise UserError(
            f"The report cannot be written to {output}: {error}. Choose another --output."
        ) from None
