"""The command on many runs: study."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robustflat.cli import output as out
from robustflat.cli.options import ConfigPath, Overrides


def study(
    config: ConfigPath,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, each a process of its own.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A Dask scheduler for many machines, as tcp://HOST:8786.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
    row: Annotated[list[str] | None, typer.Option(help="Run (or remake) this run only.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Take finished runs from this ledger, CSV or Parquet.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also if it is long, or too small to tell anything.")
    ] = False,
) -> None:
    """Train a grid of runs and rank their robustness by flatness. Repeat it to go on."""
    from robustflat.study import Event, read_study, run_study
    from robustflat.study import status as how_far

    settings = read_study(config, overrides or [])
    if status:
        found = how_far(settings)
        for one in found:
            typer.echo(f"{one.run:<40} {one.state:<8} {one.text}".rstrip())
        typer.echo(f"{sum(s.state == 'done' for s in found)} of {len(found)} runs are done")
        return

    def tell(event: Event) -> None:
        text = f"[{event.done}/{event.total}] {event.run} {event.state} {event.text}"
        typer.echo(text.rstrip())

    # A SIGTERM ends the command as Ctrl-C does: its runs are told, and save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = run_study(
        settings, jobs, tell, scheduler=scheduler, rows=row or (), ledger=ledger, yes=yes
    )
    _show_study(result)
    if result.failed:
        typer.echo(f"{len(result.failed)} runs are missing. Repeat the command.", err=True)
        raise typer.Exit(1)


def _show_study(result: Any) -> None:
    from robustflat.report.study_figures import save_plots, save_tables, tables
    from robustflat.study.folder import StudyFolder

    console = out.console()
    for table in tables(result):
        console.print(table)
    for note in result.notes:
        out.note(console, note)
    folder = StudyFolder(result.study)
    save_tables(result, folder.table)
    save_plots(result, folder.plots)
    typer.echo(f"written: {folder.result}, {folder.ledger}, {folder.table}, {folder.plots}")
