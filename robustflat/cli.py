"""The command line: reads arguments, calls the library, prints; every mistake is one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robustflat.errors import ProcessLostError, TrainingDivergedError, UserError

# What a command needs is imported inside it: TensorBoard, matplotlib and YAML are not for all.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train image classifiers that withstand adversarial inputs, and show why they do.",
)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML configuration, as in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, such as train.epochs=10 or attack.eps=4/255."),
]
Runs = Annotated[list[Path], typer.Argument(help="Folders that `robustflat train` wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Weights = Annotated[
    str | None,
    typer.Option(help="Of a run: raw, average, or auto: the average if there is one."),
]
Norm = Annotated[str | None, typer.Option(help="linf, l2 or l1, with --eps; else the run's.")]
Eps = Annotated[str | None, typer.Option(help="Radius in that norm, such as 8/255.")]
Targets = Annotated[
    list[str],
    typer.Argument(
        help="Run folders; or one model: timm:NAME, package.module:factory, a TorchScript or "
        "exported program, or a state_dict with --model."
    ),
]
Model = Annotated[str | None, typer.Option(help="Model of a file of weights.")]
ModelOption = Annotated[list[str] | None, typer.Option(help="name=value of the model.")]
Normalise = Annotated[
    str | None, typer.Option(help="Of a model, what is in front of it: none, data or MEAN/STD.")
]
DataName = Annotated[str | None, typer.Option(help="Of a model: the set of its images.")]
Root = Annotated[Path | None, typer.Option(help="Of a model: where the data are.")]
Trust = Annotated[bool, typer.Option(help="Load a program, which can run any code.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run of this name.")] = False,
) -> None:
    """Train a run. With several GPUs or hosts: torchrun -m robustflat train ..."""
    from rich.console import Console

    from robustflat.config import read_config
    from robustflat.config.choice import plugins
    from robustflat.plugins import origin
    from robustflat.report.progress import ProgressBar
    from robustflat.train import train as train_run
    from robustflat.train.around import Listener
    from robustflat.train.folder import RunFolder
    from robustflat.train.parallel import speaks

    settings = read_config(config, overrides or [])

    def listeners(folder: RunFolder) -> list[Listener]:
        for where, name in plugins(settings).items():
            typer.echo(f"{where}: {name} ({origin(name)})")
        chosen = (section.build(folder=folder.root) for section in settings.listeners)
        return [ProgressBar(Console(), settings.name), *chosen]

    folder, finished = train_run(settings, resume=resume, overwrite=overwrite, listeners=listeners)
    if not speaks():
        return
    if finished:
        typer.echo(f"{folder.root}: trained. Next: robustflat evaluate {folder.root}")
    else:
        typer.echo(f"{folder.root}: stopped and saved. Go on with --resume.")


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a configuration, its data and its model, without training."""
    from robustflat.config import read_config
    from robustflat.runs.description import describe

    for line in describe(read_config(config, overrides or [])):
        typer.echo(line)


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="A kind, such as weights or data.")] = None,
) -> None:
    """List what a configuration can name; of one kind also defaults and sources."""
    from robustflat.registry import KINDS

    if what is not None and what not in KINDS:
        raise UserError(f"There is no kind {what!r} to list. Kinds: {', '.join(KINDS)}.")
    for kind in [KINDS[what]] if what else list(KINDS.values()):
        typer.echo(f"{kind.name}:")
        for name in kind:
            summary, *more = kind.describe(name)
            typer.echo(f"  {name:<24} {summary}".rstrip())
            for line in more if what else ():
                typer.echo(f"    {line}")
        for name, meaning in kind.also:
            typer.echo(f"  {name:<24} {meaning}")


@app.command()
def evaluate(
    targets: Targets,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="autoattack, autoattack:fast, pgd-20, pgd-50-10, torchattacks:CW, ..."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: best (if left out), last or both.")
    ] = None,
    weights: Weights = None,
    samples: Annotated[
        int | None, typer.Option(help="A fixed class-balanced subset of the test images.")
    ] = None,
    gap_samples: Annotated[
        int | None,
        typer.Option(help="Images of each split for the gap; 0: none, as for models."),
    ] = None,
    no_gap: Annotated[bool, typer.Option("--no-gap", help="Measure no gap.")] = False,
    shard: Annotated[str | None, typer.Option(help="i/n: attack every n-th image only.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join what all shards found.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 to search faster.")] = "fp32",
    norm: Norm = None,
    eps: Eps = None,
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; the run's own, or evaluations/NAME."),
    ] = None,
    model: Model = None,
    option: ModelOption = None,
    normalise: Normalise = None,
    data: DataName = None,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Attack runs or any models on test images; of runs also measure the robust gap.

    With several processes: torchrun -m robustflat evaluate ...
    """
    from robustflat.evaluate import Team
    from robustflat.report.progress import Counter
    from robustflat.report.tables import evaluation_table
    from robustflat.runs.evaluation import Wanted, check, evaluate_subject
    from robustflat.subject import open_subject

    if no_gap and gap_samples:
        raise UserError("--no-gap and --gap-samples contradict each other: give one of them.")
    if output is not None and len(targets) > 1:
        raise UserError(f"--output is the home of one subject, and {len(targets)} are named.")
    wanted = Wanted(
        attacks=attack,
        checkpoints=_checkpoints(checkpoint),
        weights=weights,
        samples=samples,
        gap_samples=0 if no_gap else gap_samples,
        seed=seed,
        shard=shard,
        merge=merge,
        precision=_one_of("--precision", precision, ("fp32", "bf16")),
    )
    elsewhere = _elsewhere(model, option, data, root, normalise, trust)
    # All of them first: no attack is paid before every target is known to be there.
    subjects = [
        open_subject(
            target,
            norm=norm,
            eps=_number("--eps", eps),
            device=device,
            output=output,
            elsewhere=elsewhere,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )
        for target in targets
    ]
    for subject in subjects:
        check(subject, wanted)
    team = Team.of_torchrun()
    console = _console(quiet=not team.is_first)
    if team.is_first:
        _speak()
    for subject in subjects:
        with Counter(console, subject.name) as counter:
            report = evaluate_subject(subject, wanted, counter.on_attack, team)
        if not team.is_first:
            continue
        for note in report["notes"]:
            console.print(f"note: {note}", style="yellow", markup=False)
        for name, entry in report["checkpoints"].items():
            if entry["test"] is None:
                continue
            state = f"{name} checkpoint (epoch {entry['epoch']}, {entry['weights']})"
            title = f"{subject.name}: {state}" if subject.is_run else subject.name
            console.print(evaluation_table({"title": title, "result": entry["test"]}))
            for warning in entry["test"]["warnings"]:
                console.print(f"note: {warning}", style="yellow", markup=False)
        if shard is None:
            typer.echo(f"written: {subject.home.evaluation}")
        else:
            typer.echo(f"shard {shard} is done; when all are, join them with --merge.")


@app.command()
def flatness(
    runs: Runs,
    measure: Annotated[
        list[str] | None, typer.Option(help="See `robustflat list measures`.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="last (if left out) or best.")] = None,
    weights: Weights = None,
    samples: Annotated[int | None, typer.Option(help="Training images to measure on.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="name=value, such as radius=0.01 or ball=adaptive.")
    ] = None,
    norm: Norm = None,
    eps: Eps = None,
    device: Device = "auto",
) -> None:
    """Measure how flat the loss is around the weights of runs."""
    from rich.console import Console

    from robustflat.report.progress import Counter
    from robustflat.runs.flatness import measure_subject

    _speak()
    console = Console()
    for subject in _runs(runs, norm, eps, device):
        with Counter(console, subject.name) as counter:
            report = measure_subject(
                subject,
                measure,
                checkpoint=checkpoint,
                weights=weights,
                samples=samples,
                options=_options(option),
                on_progress=counter.on_measure,
            )
        for key, figure in report["measures"].items():
            error = figure["standard_error"]
            spread = "" if error is None else f" +- {error:.2g}"
            value = "not finite" if figure["value"] is None else f"{figure['value']:.4g}"
            typer.echo(f"{subject.name}  {key:<24} {value}{spread}")
        typer.echo(f"written: {subject.home.flatness}")


@app.command()
def landscape(
    targets: Targets,
    output: Annotated[Path, typer.Option(help="A .png, .pdf, .svg or .html file.")] = Path(
        "landscape.png"
    ),
    dimensions: Annotated[int, typer.Option(help="1 or 2.")] = 1,
    directions: Annotated[
        str, typer.Option(help="filter, layer or global (random), eigenvectors, gradient.")
    ] = "filter",
    direction_loss: Annotated[
        str, typer.Option(help="Whose eigenvectors or gradient: clean or robust.")
    ] = "clean",
    draws: Annotated[int, typer.Option(help="Random directions, for a mean and its spread.")] = 1,
    parameters: Annotated[
        str, typer.Option(help="Which weights move: matrices, all, re:PATTERN.")
    ] = "matrices",
    between: Annotated[
        bool,
        typer.Option(
            "--between",
            help="The line or plane through two or three runs, or best and last of one.",
        ),
    ] = False,
    batchnorm: Annotated[
        str | None,
        typer.Option(help="Statistics: keep, refresh (on training images), or interpolate."),
    ] = None,
    points: Annotated[int | None, typer.Option(help="Along each axis, odd.")] = None,
    span: Annotated[float | None, typer.Option(help="Reach, in norms of the weights.")] = None,
    loss: Annotated[list[str] | None, typer.Option(help="clean, robust, robust_fixed.")] = None,
    attack: Annotated[str, typer.Option(help="pgd-STEPS, pgd-STEPS-RESTARTS, fgsm.")] = "pgd-10",
    checkpoint: Annotated[str | None, typer.Option(help="last (if left out) or best.")] = None,
    weights: Weights = None,
    split: Annotated[str, typer.Option(help="Whose images: train, validation or test.")] = "train",
    samples: Annotated[int | None, typer.Option(help="Images to measure on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
    norm: Norm = None,
    eps: Eps = None,
    device: Device = "auto",
    model: Model = None,
    option: ModelOption = None,
    normalise: Normalise = None,
    data: DataName = None,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Draw the loss around the weights of runs or models, all on one axis, or between them.

    What is measured is kept beside the subject's other results, and resumed. With several
    processes: torchrun -m robustflat landscape ...
    """
    from robustflat.evaluate import Team
    from robustflat.landscapes.subjects import Sight, draw_between, draw_subject
    from robustflat.report.landscape_figures import save_html
    from robustflat.report.landscape_picture import save_picture
    from robustflat.report.progress import Counter
    from robustflat.subject import distinct_names, open_subject

    around = {
        "dimensions": dimensions, "directions": directions, "direction_loss": direction_loss,
        "draws": draws, "span": span, "parameters": parameters,
    }  # fmt: skip
    if between and tuple(around.values()) != (1, "filter", "clean", 1, None, "matrices"):
        raise UserError(
            "--between draws the line through two, or the plane through three: leave --dimensions, "
            "--directions, --direction-loss, --draws, --span and --parameters out."
        )
    elsewhere = _elsewhere(model, option, data, root, normalise, trust)
    opened = [
        open_subject(
            target, norm=norm, eps=_number("--eps", eps), device=device, elsewhere=elsewhere,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )
        for target in targets
    ]  # fmt: skip
    team = Team.of_torchrun()
    if team.is_first:
        _speak()
    with Counter(_console(quiet=not team.is_first), "landscape") as counter:
        settings = {
            "points": points, "seed": seed, "losses": loss or ["clean", "robust"],
            "attack": attack, "team": team, "on_progress": counter.on_measure,
            **({} if between else around), **({"batchnorm": batchnorm} if batchnorm else {}),
        }  # fmt: skip
        sight = Sight(
            checkpoint=checkpoint, weights=weights, split=split, samples=samples, settings=settings
        )
        if between:
            found = {"": draw_between(opened, sight)}
        else:
            names = distinct_names([subject.home.root for subject in opened])
            found = {
                name: draw_subject(subject, sight)
                for name, subject in zip(names, opened, strict=True)
            }
    if team.is_first:
        (save_html if output.suffix == ".html" else save_picture)(found, output)
        typer.echo(f"written: {output}")


@app.command()
def report(
    runs: Runs,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write a page about runs: figures, learning curves, landscapes; it needs no server."""
    from robustflat.report.page import write_page
    from robustflat.train.folder import RunFolder

    write_page([RunFolder(root) for root in runs], output)
    typer.echo(f"written: {output}")


@app.command()
def compare(
    runs: Runs,
    json: Annotated[Path | None, typer.Option(help="Also write the rows as JSON.")] = None,
) -> None:
    """Print evaluated runs side by side."""
    from dataclasses import asdict

    from robustflat.files import write_json
    from robustflat.report.page_text import comparability
    from robustflat.report.record import read_records
    from robustflat.report.tables import Comparison
    from robustflat.runs.comparison import compare as compare_runs
    from robustflat.train.folder import RunFolder

    folders = [RunFolder(root) for root in runs]
    rows = compare_runs(folders)
    console = _console()
    console.print(Comparison(rows))
    trained = [folder for folder in folders if folder.config_file.is_file()]
    for note in comparability(read_records(trained)) if trained else []:
        console.print(f"note: {note}", style="yellow", markup=False)
    if json is not None:
        write_json(json, [asdict(row) for row in rows])


@app.command()
def study(
    config: ConfigPath,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, each a process of its own.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A Dask scheduler for many machines, as tcp://HOST:8786.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
    row: Annotated[list[str] | None, typer.Option(help="Run (or remake) this run only.")] = None,
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
    result = run_study(settings, jobs, tell, scheduler=scheduler, rows=row or (), yes=yes)
    _show_study(result)
    if result.failed:
        typer.echo(f"{len(result.failed)} runs are missing. Repeat the command.", err=True)
        raise typer.Exit(1)


def _show_study(result: Any) -> None:
    from robustflat.report.study_figures import save_plots, save_tables, tables
    from robustflat.study.folder import StudyFolder

    console = _console()
    for table in tables(result):
        console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    folder = StudyFolder(result.study)
    save_tables(result, folder.table)
    save_plots(result, folder.plots)
    typer.echo(f"written: {folder.result}, {folder.ledger}, {folder.table}, {folder.plots}")


def main() -> None:
    """Run the command line; a user's mistake is printed without a traceback and exits with 2."""
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


class _Lines(logging.Handler):
    """Says on stderr, a line each, what the measurements tell: their cost before they start."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def _speak() -> None:
    logger = logging.getLogger("robustflat")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


def _console(quiet: bool = False) -> Any:
    """As wide as COLUMNS says, or the terminal is; where there is none, wide enough for most."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(quiet=quiet) if known else Console(width=200, quiet=quiet)


def _runs(roots: list[Path], norm: str | None, eps: str | None, device: str) -> list[Any]:
    """The subjects of runs; all are looked at before any is measured."""
    from robustflat.subject import open_subject
    from robustflat.train.folder import RunFolder

    for root in roots:
        RunFolder(root).read_config()
    number = _number("--eps", eps)
    return [open_subject(root, norm=norm, eps=number, device=device) for root in roots]


def _elsewhere(
    model: str | None,
    option: list[str] | None,
    data: str | None,
    root: Path | None,
    normalise: str | None,
    trust: bool,
) -> Any:
    """What was said of a model that no run made."""
    from robustflat.elsewhere import Elsewhere

    return Elsewhere(
        model=model, option=_options(option), data=data, root=root, normalise=normalise,
        trust=trust,
    )  # fmt: skip


def _checkpoints(name: str | None) -> tuple[str, ...] | None:
    both = ("best", "last")
    return None if name is None else both if name == "both" else (name,)


def _one_of(option: str, name: str, valid: tuple[str, ...]) -> Any:
    if name not in valid:
        raise UserError(f"{option} must be one of {', '.join(valid)}, got {name!r}.")
    return name


def _number(option: str, text: str | None) -> float | None:
    from robustflat.config.values import read_number

    try:
        return None if text is None else float(read_number(text))
    except ValueError as error:
        raise UserError(f"{option} {error}, got {text!r}.") from None


def _options(pairs: list[str] | None) -> dict[str, Any]:
    from robustflat.config.values import read_number

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--option must be name=value, got {pair!r}.")
        try:
            value: Any = int(text)
        except ValueError:
            try:
                value = read_number(text)
            except ValueError:
                # Lists and mappings are written as in YAML.
                plain = {"true": True, "false": False}.get(text.lower(), text)
                value = _yaml(text) if text[:1] in ("[", "{") else plain
        found[name] = value
    return found


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--option: {text!r} is not valid YAML. Quote it for the shell.") from None


if __name__ == "__main__":
    main()
