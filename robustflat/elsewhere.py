"""Owns what has to be said of a model that no run made, and makes the model of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robustflat import models
from robustflat.config.values import read_number
from robustflat.data import PACKAGED, Data
from robustflat.errors import UserError
from robustflat.models.loading import Statistics, file_kind


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What has to be said of a model that no run made; a run knows all of it itself.

    Attributes:
        model: The name of the model, where the subject is a file of weights.
        model_option: Of the model, by name.
        data: The data set whose images it is measured on.
        root: Where that data set is; "data" if None.
        image_size: Of image folders: the shorter side is brought to it and the centre cut out.
        normalise: "none", "data" or "MEAN/STD" with one number a channel, separated by commas;
            see `robustflat.models.load_model`.
        trust: Whether a program may be loaded, which can run any code.
    """

    model: str | None = None
    model_option: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    root: Path | None = None
    image_size: int | None = None
    normalise: str | None = None
    trust: bool = False

    def told(self) -> dict[str, Any]:
        """What was said that a figure depends on, for its record."""
        names = ("model", "model_option", "image_size", "normalise")
        said = {name: getattr(self, name) for name in names}
        return {name: value for name, value in said.items() if value}


def check(target: str, elsewhere: Elsewhere, threat: bool) -> None:
    """Refuse a target that is no model, or of which not enough was said; nothing is loaded.

    Args:
        target: A model's name or a file.
        elsewhere: What was said of it.
        threat: Whether a threat was.

    Raises:
        UserError: Naming what is wrong or missing.
    """
    weights = _is_weights(target)
    if Path(target).suffix in (".yaml", ".yml") and weights:
        raise UserError(
            f"{target} is a configuration, not a model: train it, and name the folder of its run."
        )
    if weights and elsewhere.model is None:
        raise UserError(
            f"{target} holds weights, which need their model: name it with --model, such as "
            "--model preact_resnet18 or --model package.module:factory."
        )
    if not Path(target).is_file() and ":" not in target and target not in models.MODELS:
        raise UserError(
            f"{target} does not exist: there is no such run or file, and no model of that name. "
            f"Models are {', '.join(models.MODELS)}, timm:NAME, robustbench:NAME and "
            "package.module:factory."
        )
    if not weights and elsewhere.model is not None:
        raise UserError(
            f"--model names the model of a file of weights, and {target} is none: leave it out."
        )
    program = Path(target).is_file() and not weights
    if program and elsewhere.model_option:
        raise UserError(f"{target} is a program, which has no options: leave --model-option out.")
    if elsewhere.trust and not program:
        raise UserError(f"--trust is for programs, and {target} is none: leave it out.")
    if elsewhere.root is not None and elsewhere.data in PACKAGED:
        raise UserError(
            f"The data set {elsewhere.data} comes with a package, not from a folder: leave --root "
            "out."
        )
    missing = ["--data"] if elsewhere.data is None else []
    missing += [] if threat else ["--norm", "--eps"]
    if missing:
        raise UserError(
            f"To measure the model {target}, say also {', '.join(missing)}: a model alone names "
            "no images and no threat. For example: --data cifar10 --norm linf --eps 8/255."
        )


def make(target: str, elsewhere: Elsewhere, data: Data, device: torch.device) -> nn.Module:
    """The model, with as many classes as `data` has.

    Raises:
        UserError: If it cannot be made.
    """
    weights = _is_weights(target)
    return models.load_model(
        str(elsewhere.model) if weights else target,
        target if weights else None,
        normalise=_normalisation(elsewhere.normalise, data),
        num_classes=len(data.classes),
        in_channels=data.shape[0],
        image_size=data.shape[1:],
        options=elsewhere.model_option,
        trust=elsewhere.trust,
        device=device,
    )


def _is_weights(target: str) -> bool:
    return Path(target).is_file() and file_kind(Path(target)) == "weights"


def _normalisation(said: str | None, data: Data) -> Literal["none"] | Statistics | None:
    """What `--normalise` says."""
    if said is None or said == "none":
        return said  # type: ignore[return-value]
    if said == "data":
        return data.mean, data.std
    try:
        mean, std = (tuple(float(read_number(n)) for n in p.split(",")) for p in said.split("/"))
    except ValueError:
        mean, std = (), ()
    channels = data.shape[0]
    if not len(mean) == len(std) == channels:
        raise UserError(
            f"--normalise must be none, data, or MEAN/STD with {channels} numbers each, separated "
            f"by commas, for images of {channels} channels; got {said!r}."
        )
    return mean, std
