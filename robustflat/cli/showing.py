"""Commands on what was measured: report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustflat.cli import output as out
from robustflat.cli.options import Runs
from robustflat.errors import UserError


def report(
    runs: Runs,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write a page about runs: figures, learning curves, landscapes; it needs no server."""
    from robustflat.report.page import write_page
    from robustflat.train.folder import RunFolder

    write_page([RunFolder(root) for root in runs], output)
    typer.echo(f"written: {output}")


def compare(
    runs: Runs,
    group: Annotated[
        bool, typer.Option("--group", help="Take runs together that differ in their seed alone.")
    ] = False,
    sort: Annotated[
        str | None, typer.Option(help="A figure, largest first; --sort=-NAME: smallest first.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="text, md, csv, latex or json.")] = "text",
    digits: Annotated[
        int, typer.Option(min=1, max=15, help="Significant digits, in text, md and latex.")
    ] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the table to a file.")] = None,
) -> None:
    """Put evaluated runs side by side: on the terminal, or as a table for a paper or a program."""
    from robustflat.files import write_text
    from robustflat.report.formats import table
    from robustflat.report.tables import Comparison
    from robustflat.runs.comparison import compare as compare_runs
    from robustflat.runs.comparison import limits
    from robustflat.runs.grouping import by_seed, ordered
    from robustflat.train.folder import RunFolder

    if form == "text" and output is not None:
        raise UserError("--output needs a --format: md, csv, latex or json.")
    folders = [RunFolder(root) for root in runs]
    rows = compare_runs(folders)
    rows = by_seed(rows) if group else rows
    rows = rows if sort is None else ordered(rows, sort)
    if form != "text":
        text = table(rows, form, digits)
        if output is None:
            typer.echo(text, nl=False)
        else:
            write_text(output, text)
            typer.echo(f"written: {output}")
        return
    console = out.console()
    console.print(Comparison(rows, digits))
    for text in limits(folders):
        out.note(console, text)
