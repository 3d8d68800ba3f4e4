"""The command line: reads arguments, calls the library, prints; every mistake is one sentence."""

from __future__ import annotations

import sys

import typer

from robustflat.allocator import keep_freed_memory
from robustflat.cli import measuring, showing, studying, training
from robustflat.errors import ProcessLostError, TrainingDivergedError, UserError

# What a command needs is imported inside it: torch, matplotlib and YAML are not for all.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train image classifiers that withstand adversarial inputs, and show why they do.",
)
app.command()(training.train)
app.command()(training.watch)
app.command()(training.check)
app.command("list")(training.list_)
app.command()(measuring.evaluate)
app.command()(measuring.flatness)
app.command()(measuring.landscape)
app.command()(measuring.corruptions)
app.command()(showing.report)
app.command()(showing.compare)
app.command()(studying.study)


def main() -> None:
    """Run the command line; a user's mistake is printed without a traceback and exits with 2."""
    keep_freed_memory()
    try:
        app()
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except (TrainingDivergedError, ProcessLostError) as error:
        typer.echo(f"Stopped: {error}", err=True)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of an interrupt
            advice = "What was saved is whole: repeat the command to go on, train with --resume."
            typer.echo(f"Interrupted. {advice}", err=True)
        raise
