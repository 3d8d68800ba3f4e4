"""Owns the adapter over torchattacks: any of its attacks by name, the model left as it is."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, missing, nearest
from robustflat.evaluate.attacks.base import Attack, as_json, check_options, seeded
from robustflat.evaluate.threat import Task

_REFUSED = {
    "AutoAttack": (
        "torchattacks:AutoAttack is not AutoAttack (10 steps instead of 100) and finds less: use "
        "'autoattack'."
    ),
    "MultiAttack": "List the attacks one by one instead of torchattacks:MultiAttack.",
    "LGV": "torchattacks:LGV attacks a surrogate, which evaluate does not train.",
}
_BLACK_BOX = {"Square", "OnePixel", "Pixle", "SPSA"}


def torchattack(name: str, options: Mapping[str, Any], task: Task) -> Attack:
    """An attack of torchattacks.

    It is given the evaluation's eps, norm, number of classes and seed where it has such
    parameters; all others keep that library's defaults (alpha too: give it with another eps than
    8/255). Attacks that look for the nearest adversarial example (CW, DeepFool, ...) know no eps:
    those of their examples that are in the ball count. The model is in eval mode throughout.

    Args:
        name: Its class in torchattacks.
        options: Keyword arguments of that class.
        task: The threat and the number of classes.

    Returns:
        The attack.

    Raises:
        UserError: If torchattacks is not installed, or has no such attack or option.
    """
    if name in _REFUSED:
        raise UserError(_REFUSED[name])
    try:
        import torchattacks
    except ImportError as error:
        raise missing(f"The attack torchattacks:{name}", "torchattacks", "torchattacks") from error
    known = [found for found in torchattacks.__all__ if found not in _REFUSED]
    if name not in known:
        hint = nearest(name, known, 3) or f" It has {', '.join(sorted(known))}."
        raise UserError(f"torchattacks has no attack {name!r}.{hint}")
    cls = getattr(torchattacks, name)
    accepted = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "model")]
    check_options(f"torchattacks:{name}", options, accepted)
    ours = {
        "eps": task.eps,
        "norm": task.norm_name.capitalize(),
        "n_classes": task.classes,
    }
    settings = {key: value for key, value in ours.items() if key in accepted} | dict(options)

    def run(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        said = {"seed": seed} if "seed" in accepted and "seed" not in options else {}
        # It prints where it finds no device, and needs gradients enabled.
        with seeded(seed), redirect_stdout(io.StringIO()), torch.enable_grad():
            try:
                attack = cls(model, **settings, **said)
                attack.set_device(x.device)
                found: Tensor = attack(x.clone(), y.clone())
            except Exception as error:
                raise UserError(
                    f"torchattacks:{name} failed on images of the shape {list(x.shape)} "
                    f"({type(error).__name__}: {error}). Leave it out, or see its options: "
                    f"{', '.join(accepted)}."
                ) from error
        return found.detach()

    identity = {
        "attack": f"torchattacks:{name}",
        "options": {key: as_json(value) for key, value in sorted(settings.items())},
    }
    return Attack(
        name=f"torchattacks:{name}",
        identity=identity,
        run=run,
        black_box=name in _BLACK_BOX,
        bounded="eps" in accepted,
    )
