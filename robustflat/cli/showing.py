"""Commands on what was measured: report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustflat.cli import output as out
from robustflat.cli.options import Runs


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
    json: Annotated[Path | None, typer.Option(help="Also write the rows as JSON.")] = None,
) -> None:
    """Print evaluated runs side by side."""
    from dataclasses import asdict

    from robustflat.files import write_json
    from robustflat.report.tables import Comparison
    from robustflat.runs.comparison import compare as compare_runs
    from robustflat.runs.comparison import limits
    from robustflat.train.folder import RunFolder

    folders = [RunFolder(root) for root in runs]
    rows = compare_runs(folders)
    console = out.console()
    console.print(Comparison(rows))
    for text in limits(folders):
        out.note(console, text)
    if json is not None:
        write_json(json, [asdict(row) for row in rows])
