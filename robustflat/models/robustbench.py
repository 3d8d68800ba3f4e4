"""Owns the models of RobustBench's zoo, where that package and their weights are installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from robustflat.errors import UserError

_DEFAULTS = {"dataset": "cifar10", "threat_model": "Linf", "model_dir": "models"}


def from_robustbench(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A model of RobustBench by its name there, with the weights that lie in a folder.

    Args:
        name: Such as "Wang2023Better_WRN-28-10".
        options: `dataset` ("cifar10", ...), `threat_model` ("Linf", "L2", ...) and `model_dir`, in
            which the weights are DATASET/THREAT_MODEL/NAME.pt, as RobustBench puts them.

    Returns:
        The model in eval mode; takes images in [0, 1].

    Raises:
        UserError: If the package or the weights are missing, or there is no such model.
    """
    unknown = [key for key in options if key not in _DEFAULTS]
    if unknown:
        raise UserError(
            f"The model robustbench:{name} has no option {unknown[0]!r}. Its options: "
            f"{', '.join(_DEFAULTS)}."
        )
    said = {key: str(value) for key, value in (_DEFAULTS | dict(options)).items()}
    try:
        from robustbench.utils import load_model
    except Exception as error:  # some releases fail in the packages that they import
        advice = "Install it as its repository says"
        if getattr(error, "name", None) == "pkg_resources":
            advice = "It needs a package that new setuptools lack: pip install 'setuptools<81'"
        raise UserError(
            f"The model robustbench:{name} needs the package robustbench, which could not be "
            f"imported ({type(error).__name__}: {error}). {advice}; or name the file of the "
            "weights, with their architecture as --model."
        ) from None
    folder = Path(said["model_dir"], said["dataset"], said["threat_model"])
    # Of an ensemble the first.
    if not any((folder / f"{name}{part}.pt").is_file() for part in ("", "_m0")):
        raise UserError(
            f"The weights of robustbench:{name} are not at {folder / f'{name}.pt'}, and nothing is "
            "downloaded unasked: fetch them with robustbench.utils.load_model in Python, or say "
            "where they are and what they are of: --model-option model_dir=..., dataset=..., "
            "threat_model=..."
        )
    try:
        model: nn.Module = load_model(model_name=name, **said)
    except Exception as error:
        raise UserError(
            f"robustbench:{name} could not be loaded ({type(error).__name__}: {error}). Is it a "
            f"model of {said['dataset']} and {said['threat_model']}?"
        ) from error
    return model
