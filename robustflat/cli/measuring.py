"""Commands that measure runs or any models: evaluate, flatness, landscape, corruptions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustflat.cli import output as out
from robustflat.cli.options import (
    Checkpoint,
    Opener,
    Output,
    Weights,
    named,
    number,
    of_subjects,
    one_of,
)
from robustflat.errors import UserError

if TYPE_CHECKING:
    from robustflat.runs.evaluation import Wanted
    from robustflat.subject import Subject


@of_subjects
def evaluate(
    subjects: Opener,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="autoattack, autoattack:fast, pgd-20, pgd-50-10, torchattacks:CW, your own "
            "package.module:function, which is f(model, x, y, *, seed) -> x_adv; or examples of "
            "another model, transfer:FILE.npz or transfer:RUN."
        ),
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
    shard: Annotated[str | None, typer.Option(help="i/n: attack every n-th image only.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join what all shards found.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 to search faster.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    radii: Annotated[
        str | None,
        typer.Option(
            help="Several radii in the norm, such as 2/255,4/255,8/255: robust accuracy over them, "
            "and nothing else."
        ),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(help="With --radii: a .png, .pdf, .svg or .html file.")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Search with the model compiled; the eager one judges."),
    ] = False,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Show the classes, and what is taken for what.")
    ] = False,
    save_adversarial: Annotated[
        Path | None, typer.Option(help="A new .npz file for the adversarial examples.")
    ] = None,
    output: Output = None,
) -> None:
    """Attack runs or any models on test images; of runs also measure the robust gap.

    With several processes: torchrun -m robustflat evaluate ...
    """
    from robustflat.report.progress import Counter
    from robustflat.report.tables import class_tables, evaluation_table, gap_table, weakest
    from robustflat.runs.evaluation import Job, Wanted

    states = ("best", "last") if checkpoint == "both" else (checkpoint,) if checkpoint else None
    wanted = Wanted(
        attacks=attack,
        checkpoints=states,
        weights=weights,
        samples=samples,
        gap_samples=gap_samples,
        seed=seed,
        shard=shard,
        merge=merge,
        precision=one_of("--precision", precision, ("fp32", "bf16")),
        compile=compiled,
        save_adversarial=save_adversarial,
    )
    opened = subjects(output=output)
    if save_adversarial is not None and len(opened) > 1:
        raise UserError("--save-adversarial is one file: name one subject.")
    if radii is not None or curve is not None:
        _over_radii(opened, wanted, radii, curve)
        return
    jobs = [Job(subject, wanted) for subject in opened]  # all are looked at before one is paid for
    team, console = out.begin()
    for subject, job in zip(opened, jobs, strict=True):
        with Counter(console, subject.name) as counter:
            report = job.run(counter.on_attack, team)
        if not team.is_first:
            continue
        for text in report["notes"]:
            out.note(console, text)
        for name, entry in report["checkpoints"].items():
            if entry["test"] is None:
                continue
            state = f"{name} checkpoint (epoch {entry['epoch']}, {entry['weights']})"
            title = f"{subject.name}: {state}" if subject.is_run else subject.name
            console.print(evaluation_table(title, entry["test"]))
            classes = entry["test"]["classes"]
            for table in class_tables(classes) if by_class else ():
                console.print(table)
            typer.echo(weakest(classes))
            for warning in entry["test"]["warnings"]:
                out.note(console, warning)
        if any(entry["gap"] for entry in report["checkpoints"].values()):
            console.print(gap_table(report))
        if shard is None:
            typer.echo(f"written: {subject.home.evaluation}")
        else:
            typer.echo(f"shard {shard} is done; when all are, join them with --merge.")


def _over_radii(
    opened: list[Subject], wanted: Wanted, radii: str | None, picture: Path | None
) -> None:
    """Measure, show and draw robust accuracy over several radii."""
    from robustflat.report.drawing import Drawing
    from robustflat.report.paper import check_ending
    from robustflat.report.progress import Counter
    from robustflat.report.radii import chart, radius_table
    from robustflat.runs.radii import measure_radii
    from robustflat.subject import distinct_names

    if radii is None:
        raise UserError(
            "--curve draws robust accuracy over --radii: say them, such as 2/255,4/255."
        )
    wanted_radii = [number("--radii", text) or 0.0 for text in radii.split(",")]
    if picture is not None:
        check_ending(picture)
    team, console = out.begin()
    found = {}
    names = distinct_names([subject.home.root for subject in opened])
    for name, subject in zip(names, opened, strict=True):
        with Counter(console, subject.name) as counter:
            found[name] = measure_radii(subject, wanted, wanted_radii, counter.on_attack, team)
        if team.is_first:
            console.print(radius_table(name, found[name]))
            for warning in found[name].warnings:
                out.note(console, warning)
            typer.echo(f"written: {subject.home.curves}")
    if team.is_first and picture is not None:
        Drawing("robust accuracy over the radius", [chart(found)]).save(picture)
        typer.echo(f"written: {picture}")


@of_subjects
def flatness(
    subjects: Opener,
    measure: Annotated[
        list[str] | None, typer.Option(help="See `robustflat list measures`.")
    ] = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    split: Annotated[
        str | None,
        typer.Option(help="Whose images: train, validation or test; else train, or a preset's."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Images to measure on.")] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="Of the robust loss: pgd-STEPS, pgd-STEPS-RESTARTS, fgsm; else pgd-10-5, or a "
            "preset's."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of directions, probes and attacks; the training's.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value, such as ball=adaptive; of several values a sweep, such as "
            "radius=[0.01,0.02]."
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Let attacks search with the model compiled."),
    ] = False,
) -> None:
    """Measure how flat the loss is around the weights of runs or models.

    With several processes: torchrun -m robustflat flatness ...
    """
    from robustflat.report.progress import Counter
    from robustflat.runs.flatness import measure_subject

    opened = subjects()
    team, console = out.begin()
    for subject in opened:
        with Counter(console, subject.name) as counter:
            report = measure_subject(
                subject,
                measure,
                checkpoint=checkpoint,
                weights=weights,
                split=split,
                samples=samples,
                attack=attack,
                seed=seed,
                options=named("--option", option),
                on_progress=counter.on_measure,
                team=team,
                compile=compiled,
            )
        if not team.is_first:
            continue
        for key, figure in report["measures"].items():
            error = figure["standard_error"]
            spread = "" if error is None else f" +- {error:.2g}"
            value = "not finite" if figure["value"] is None else f"{figure['value']:.4g}"
            if figure["details"].get("converged") is False:
                spread += f", not converged: residual {max(figure['details']['residuals']):.2g}"
            typer.echo(f"{subject.name}  {key:<24} {value}{spread}")
        typer.echo(f"written: {subject.home.flatness}")


@of_subjects
def landscape(
    subjects: Opener,
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
    parameters: Annotated[
        str, typer.Option(help="Weights that move: matrices, all, or re:PATTERN of their names.")
    ] = "matrices",
    loss: Annotated[list[str] | None, typer.Option(help="clean, robust, robust_fixed.")] = None,
    attack: Annotated[str, typer.Option(help="pgd-STEPS, pgd-STEPS-RESTARTS, fgsm.")] = "pgd-10",
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    split: Annotated[str, typer.Option(help="Whose images: train, validation or test.")] = "train",
    samples: Annotated[int | None, typer.Option(help="Images to measure on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
) -> None:
    """Draw the loss around the weights of runs or models, all on one axis, or between them.

    What is measured is kept beside the subject's other results, and resumed. With several
    processes: torchrun -m robustflat landscape ...
    """
    from robustflat.landscapes.subjects import Sight, draw_between, draw_subject
    from robustflat.report.landscape_picture import landscape_figure
    from robustflat.report.paper import check_ending, save
    from robustflat.report.progress import Counter
    from robustflat.subject import distinct_names

    around = {
        "dimensions": dimensions, "directions": directions, "direction_loss": direction_loss,
        "draws": draws, "span": span, "parameters": parameters,
    }  # fmt: skip
    if between and tuple(around.values()) != (1, "filter", "clean", 1, None, "matrices"):
        raise UserError(
            "--between draws the line through two, or the plane through three: leave --dimensions, "
            "--directions, --direction-loss, --draws, --span and --parameters out."
        )
    check_ending(output)
    opened = subjects()
    team, console = out.begin()
    with Counter(console, "landscape") as counter:
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
        if output.suffix == ".html":
            from robustflat.report.page import write_landscapes

            write_landscapes(found, output)
        else:
            save(landscape_figure(found), output)
        for name, drawn in found.items():
            if lost := drawn.lost:
                typer.echo(
                    f"{name + ': ' if name else ''}{lost} losses are not finite there and are not "
                    "drawn. Take a smaller --span."
                )
        typer.echo(f"written: {output}")


@of_subjects
def corruptions(
    subjects: Opener,
    folder: Annotated[
        Path, typer.Option(help="CIFAR-10-C's arrays or ImageNet-C's folders, or the like.")
    ],
    corruption: Annotated[
        list[str] | None, typer.Option(help="Only these; else the 15 of the mean.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: best (if left out) or last.")
    ] = None,
    weights: Weights = None,
    samples: Annotated[
        int | None, typer.Option(help="A fixed class-balanced subset of every set.")
    ] = None,
    output: Output = None,
) -> None:
    """Classify corrupted test images: the error by corruption and severity, and the mean.

    With several processes: torchrun -m robustflat corruptions ...
    """
    from robustflat.report.progress import Counter
    from robustflat.report.tables import corruptions_table
    from robustflat.runs.corruptions import measure_corruptions

    opened = subjects(output=output)
    team, console = out.begin()
    for subject in opened:
        with Counter(console, subject.name) as counter:
            found = measure_corruptions(
                subject, folder, corruptions=corruption, checkpoint=checkpoint, weights=weights,
                samples=samples, on_progress=counter.on_set, team=team,
            )  # fmt: skip
        if not team.is_first:
            continue
        result = found["result"]
        count = f"{result['count']:,} images of each"
        console.print(corruptions_table(f"{subject.name}: {count}", result))
        if result["mce"] is None:
            out.note(
                console,
                "The mean is that of the errors themselves. The mCE, in units of AlexNet's errors, "
                "is defined for all 15 corruptions of ImageNet-C.",
            )
        typer.echo(f"written: {subject.home.corruptions}")
