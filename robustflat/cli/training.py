"""Commands on configurations and runs under way: train, watch, check, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustflat.cli.options import ConfigPath, Overrides, Plain
from robustflat.errors import UserError


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run of this name.")] = False,
    plain: Plain = False,
) -> None:
    """Train a run. With several GPUs or hosts: torchrun -m robustflat train ..."""
    from rich.console import Console

    from robustflat.config import read_config
    from robustflat.config.choice import plugins
    from robustflat.plugins import origin
    from robustflat.report.following import Trace
    from robustflat.report.progress import ProgressBar
    from robustflat.train import train as train_run
    from robustflat.train.folder import RunFolder
    from robustflat.train.listeners import Listener
    from robustflat.train.parallel import speaks

    settings = read_config(config, overrides or [])

    def listeners(folder: RunFolder) -> list[Listener]:
        for where, name in plugins(settings).items():
            typer.echo(f"{where}: {name} ({origin(name)})")
        chosen = (section.build(folder=folder.root) for section in settings.listeners)
        bar = ProgressBar(Console(), settings.name, plain=plain)
        return [bar, Trace(folder.root), *chosen]

    folder, finished = train_run(settings, resume=resume, overwrite=overwrite, listeners=listeners)
    if not speaks():
        return
    if finished:
        last = folder.metrics()[-1]
        early = last["ended"] and f" for {last['epoch']} epochs, until train.{last['ended']}"
        typer.echo(f"{folder.root}: trained{early or ''}. Next: robustflat evaluate {folder.root}")
    else:
        typer.echo(f"{folder.root}: stopped and saved. Go on with --resume.")


def watch(
    run: Annotated[Path, typer.Argument(help="A folder that `robustflat train` writes to.")],
    plain: Plain = False,
) -> None:
    """Follow a run from another terminal until it ends."""
    from rich.console import Console

    from robustflat.report.following import follow
    from robustflat.train.folder import RunFolder

    state = follow(RunFolder(run), Console(), plain=plain)
    typer.echo(f"{run}: {state}.")


def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a configuration, its data and its model, without training."""
    from robustflat.config import read_config
    from robustflat.runs.description import describe

    for line in describe(read_config(config, overrides or [])):
        typer.echo(line)


def list_(
    what: Annotated[str | None, typer.Argument(help="A kind, such as weights or data.")] = None,
) -> None:
    """List what a configuration can name; of one kind also defaults and sources."""
    from robustflat.cli.listing import listed
    from robustflat.registry import KINDS

    if what is not None and what not in KINDS:
        raise UserError(f"There is no kind {what!r} to list. Kinds: {', '.join(KINDS)}.")
    names = listed()
    for kind in [KINDS[what]] if what else list(KINDS.values()):
        typer.echo(f"{kind.name}:")
        for name, (summary, *more) in names[kind.name].items():
            typer.echo(f"  {name:<24} {summary}".rstrip())
            for line in more if what else ():
                typer.echo(f"    {line}")
        for name, meaning in kind.also:
            typer.echo(f"  {name:<24} {meaning}")
