"""What a configuration says, in words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from robustflat.config import RunConfig
from robustflat.config.choice import Built
from robustflat.config.values import Section
from robustflat.train.feed import Feed
from robustflat.train.folder import flattened, free_to_change
from robustflat.train.parallel import Processes, resolve_device
from robustflat.train.setup import build_model, build_step, load_data, perturbed_parameters

# What names a run, or looks on, changes no weight either; the monitor chooses the best checkpoint.
_IDLE = ("name", "listeners", "threads")


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


def method_of(config: RunConfig) -> str:
    """A run's method in words, such as "adversarial + awp(gamma=0.01)"."""
    objective = config.objective.name
    words = {"adversarial": "AT", "trades": "TRADES", "mart": "MART"}.get(objective, objective)
    weights = config.weights
    if weights.name == "none":
        return words
    return f"{words} + {_call(weights)}"


def setting_of(config: RunConfig) -> str:
    """A mark of all that a training depends on but its seed."""
    about = {key: value for key, value in effect_of(config).items() if key != "seed"}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def effect_of(config: RunConfig) -> dict[str, Any]:
    """The settings that can change the weights, by dotted key; what is off has none but that."""
    content = config.model_dump(mode="json")
    for name in ("weights", "attack"):
        if content[name].get("name") == "none":
            content[name] = {"name": "none"}
    return {
        ".".join(key): value
        for key, value in flattened(content)
        if key[0] not in _IDLE and not free_to_change(key)
    }


def is_usual(config: RunConfig, key: str) -> bool:
    """Whether what is named there has a dotted key by default, and is not known by it."""
    at: Any = config
    named = False
    for part in key.split("."):
        named |= isinstance(at, Built)
        if named and isinstance(at, Section):
            own = at.own[:1] if isinstance(at, Built) else ()
            if part not in ("name", *own, *at.model_dump(exclude_defaults=True)):
                return True
        at = getattr(at, part, None)
    return False


def _call(section: Built) -> str:
    """A section as a call: its first key, which says how strong it is, and what is not usual."""
    unusual = section.model_dump(exclude_defaults=True)
    shown = {k: getattr(section, k) for k in section.own if k == section.own[0] or k in unusual}
    shown |= {k: v for k, v in unusual.items() if k in ("when", "step")}
    said = (f"{k}={_call(v) if isinstance(v, Built) else plain(v)}" for k, v in shown.items())
    return f"{section.name}({', '.join(said)})"


def plain(value: Any) -> str:
    """A value in words: of a number four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
