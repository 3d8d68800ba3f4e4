"""Owns the adapter over attacks of the user's own: any f(model, x, y, *, seed) -> x_adv."""

from __future__ import annotations

import functools
import hashlib
import inspect
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.attacks.base import Attack, as_json, check_options, seeded
from robustflat.evaluate.record import fingerprint_of, fingerprint_of_state
from robustflat.evaluate.threat import Task

# Given to a function that has parameters of these names.
_OFFERED = ("norm", "eps", "classes")
_FORM = "An attack of your own is f(model, x, y, *, seed) -> x_adv."


def own(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    task: Task,
    name: str | None = None,
    description: str | None = None,
) -> Attack:
    """A function of the user's own as an attack.

    It is called once a batch, with gradients enabled and every generator of random numbers seeded:
    `model` (eval mode, frozen, float32 logits), copies of the images `x` [N, C, H, W] and of the
    labels `y` [N], and `seed`; where it has parameters `norm` ("linf", "l2", "l1"), `eps` and
    `classes`, also with these. What it returns is judged like any other attack's.

    Args:
        function: It.
        options: Its further keyword arguments.
        task: The threat and the number of classes.
        name: As it is shown; its own name if None.
        description: What stands for it in the identity; found from its source if None.

    Raises:
        UserError: If it cannot be called like that.
    """
    name = getattr(function, "__name__", type(function).__name__) if name is None else name
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(f"The attack {name} has no signature to be read. {_FORM}") from None
    named = [p.name for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        check_options(name, options, [n for n in named if n not in ("model", "x", "y", "seed")])
    ours = {"norm": task.norm_name, "eps": task.eps, "classes": task.classes}
    settings = {key: ours[key] for key in _OFFERED if key in named} | dict(options)
    try:
        inspect.signature(function).bind(None, None, None, seed=0, **settings)
    except TypeError as error:
        raise UserError(f"The attack {name} cannot be called: {error}. {_FORM}") from None

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        before, labels = _state(model), y.clone()
        with seeded(seed), torch.enable_grad():
            try:
                found = function(model, x.clone(), labels, seed=seed, **settings)
            except Exception as error:  # of any kind: it is anybody's code
                raise UserError(f"The attack {name} raised {_said(error)}.") from error
        changed = int((labels != y).sum())
        if changed:
            raise UserError(
                f"The attack {name} changed {changed} of the {len(y)} labels it was given; they "
                "are its input. Work on a copy."
            )
        if not _same(_state(model), before):
            raise UserError(
                f"The attack {name} changed the model: its weights, buffers or modes, which judge "
                "what it finds. Work on a copy (copy.deepcopy)."
            )
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"The attack {name} must return images of the shape it was given, {list(x.shape)}, "
                f"got {got}."
            )
        return found.detach()

    identity = {
        "attack": name,
        "source": _source(function) if description is None else description,
        "options": {key: as_json(value) for key, value in sorted(settings.items())},
    }
    return Attack(name=name, identity=identity, run=run, tried_first=True)


def _said(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _state(model: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """What must be as before: modes, and the values of parameters and buffers.

    They may be written to and put back, as the package's own attacks do with buffers. A count of
    writes would not do: those through ``.data`` are not counted.
    """
    modes = [module.training for module in model.modules()]
    modes += [parameter.requires_grad for parameter in model.parameters()]
    return modes, [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]


def _same(one: tuple[list[Any], list[Tensor]], other: tuple[list[Any], list[Tensor]]) -> bool:
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


def _source(function: Callable[..., Any]) -> str:
    """What tells a function from one that was edited, or that closes over other values."""
    values: list[Any] = []
    while isinstance(function, functools.partial):
        values += [function.args, function.keywords]
        function = function.func
    if inspect.ismethod(function):
        values.append(vars(function.__self__))
        function = function.__func__
    plain: Any = inspect.unwrap(function)
    place = plain if hasattr(plain, "__code__") else type(plain)
    if place is plain:
        values += [cell.cell_contents for cell in plain.__closure__ or ()]
        values += [plain.__defaults__, plain.__kwdefaults__]
    else:
        values.append(vars(plain))
    try:
        text = Path(inspect.getsourcefile(place) or "").read_text()
    except (TypeError, OSError):
        text = secrets.token_hex()
    said = [place.__module__, place.__qualname__, text, *map(_text, values)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _text(value: object) -> str:
    """A value's own text; what has none is never taken for the same again, and so attacks anew."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return _text([[str(key), one] for key, one in value.items()])
    if isinstance(value, nn.Module):
        return fingerprint_of(value)
    if isinstance(value, Tensor):
        return fingerprint_of_state({"": value})
    if inspect.isfunction(value):
        return _source(value)
    return secrets.token_hex()
