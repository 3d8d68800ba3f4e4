"""What a configuration says, in words."""

from __future__ import annotations

from robustflat.config import RunConfig
from robustflat.runs.comparison import method_of
from robustflat.train.feed import Feed
from robustflat.train.parallel import Processes, resolve_device
from robustflat.train.setup import build_model, build_step, load_data, perturbed_parameters


def describe(config: RunConfig) -> list[str]:
    """Build everything that a run needs and say what it is.

    Raises:
        UserError: if the data or the model cannot be had.
    """
    dataset = load_data(config)
    device = resolve_device(config.device)
    model = build_model(config, dataset, device)
    build_step(config, model, device, dataset.shape)  # refuses what cannot fit
    weights = config.weights.build()
    feed = Feed(config, dataset, device, Processes(), weights)
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
    if not weights.is_off:
        chosen = perturbed_parameters(config, model)
        moved = sum(p.numel() for p in chosen.values())
        lines.append(f"perturbed  {len(chosen)} tensors, {moved:,} of the parameters")
    return lines
