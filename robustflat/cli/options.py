"""Options that commands share, and what their texts mean."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustflat.errors import UserError

if TYPE_CHECKING:
    from robustflat.subject import Subject

ConfigPath = Annotated[Path, typer.Argument(help="A YAML configuration, as in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, such as train.epochs=10 or attack.eps=4/255."),
]
Plain = Annotated[bool, typer.Option("--plain", help="Lines with times in place of a bar.")]
Runs = Annotated[
    list[Path], typer.Argument(help="Folders of runs, or in which models' results are kept.")
]
Weights = Annotated[
    str | None,
    typer.Option(help="Of a run: raw, average, or auto: the average if there is one."),
]
Output = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; the run's own, or evaluations/NAME."),
]
Checkpoint = Annotated[str | None, typer.Option(help="Of a run: last (if left out) or best.")]
# Opens the subjects of a command; takes the folder for the results, if it is not their own.
Opener = Callable[..., "list[Subject]"]


def _open(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Run folders; or models: timm:NAME, robustbench:NAME, package.module:factory, a "
            "TorchScript or exported program, or a state_dict with --model."
        ),
    ],
    norm: Annotated[
        str | None, typer.Option(help="linf, l2 or l1, with --eps; else the run's.")
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Radius in that norm, such as 8/255.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    model: Annotated[str | None, typer.Option(help="Model of a file of weights.")] = None,
    model_option: Annotated[list[str] | None, typer.Option(help="name=value of the model.")] = None,
    normalise: Annotated[
        str | None,
        typer.Option(help="Of a model, what is in front of it: none, data or MEAN/STD."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Of --data image_folder: shorter side, of which the centre is cut out."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The set of the images: of a model; of a run another than its own."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where those data are; data if left out.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a data set of torchvision that is missing.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Images at a time; the run's, or 200 of a model.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode image files; at most 8 if left out.")
    ] = None,
    trust: Annotated[bool, typer.Option(help="Load a program, which can run any code.")] = False,
    *,
    output: Path | None = None,
) -> list[Subject]:
    """The subjects; all are looked at before any is measured, so that nothing is paid in vain."""
    from robustflat.elsewhere import Elsewhere
    from robustflat.subject import open_subject

    elsewhere = Elsewhere(
        model=model, model_option=named("--model-option", model_option), data=data, root=root,
        normalise=normalise, image_size=image_size, trust=trust, download=download,
    )  # fmt: skip
    radius = number("--eps", eps)
    if output is not None and len(targets) > 1:
        raise UserError(f"--output is the home of one subject, and {len(targets)} are named.")
    return [
        open_subject(
            target, norm=norm, eps=radius, device=device, output=output, elsewhere=elsewhere,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")), batch_size=batch_size,
            workers=workers,
        )
        for target in targets
    ]  # fmt: skip


def of_subjects(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say what is measured, the same for all such commands.

    Args:
        command: Its first parameter is an `Opener`, all others are its own options.

    Returns:
        The command for typer, with the targets first and the shared options last.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = [
        p
        for p in inspect.signature(_open, eval_str=True, locals={"Subject": object})
        .parameters.values()
        if p.kind is not p.KEYWORD_ONLY
    ]  # fmt: skip
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (shared[0], *own, *shared[1:])
    ]

    def called(**said: Any) -> None:
        what = {p.name: said.pop(p.name) for p in shared}
        command(lambda **home: _open(**what, **home), **said)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def one_of(option: str, name: str, valid: tuple[str, ...]) -> Any:
    """The name, if it is a valid one."""
    if name not in valid:
        raise UserError(f"{option} must be one of {', '.join(valid)}, got {name!r}.")
    return name


def number(option: str, text: str | None) -> float | None:
    """The number that a text says, such as 8/255."""
    from robustflat.config.values import read_number

    try:
        return None if text is None else float(read_number(text))
    except ValueError as error:
        raise UserError(f"{option} {error}, got {text!r}.") from None


def named(option: str, pairs: list[str] | None) -> dict[str, Any]:
    """The values of name=value; lists and mappings are written as in YAML."""
    from robustflat.config.values import read_word

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"{option} must be name=value, got {pair!r}.")
        value = _yaml(option, text) if text[:1] in ("[", "{") else read_word(text)
        found[name] = [read_word(one) for one in value] if isinstance(value, list) else value
    return found


def _yaml(option: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{option}: {text!r} is not valid YAML. Quote it for the shell.") from None
