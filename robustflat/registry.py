"""One list of names: whatever YAML, the command line or a user's program can name, by kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from robustflat.errors import UserError, nearest
from robustflat.plugins import imported, is_plugin


@dataclass(frozen=True, eq=False)
class Kind:
    """The names of one kind, each of a callable that makes such a thing.

    Args:
        name: as ``robustflat list`` calls it, the plural or the YAML section.
        one: a single one of them, for messages.
        table: where each is, as "module:attribute", so that nothing is imported before it is used;
            or the same of a mapping from names to callables.
        also: further names that are understood, and what they mean.
        offered: arguments that the caller gives, which are no keys of YAML.
        needs: attributes that whatever is made must have.
    """

    name: str
    one: str
    table: Mapping[str, str] | str
    also: tuple[tuple[str, str], ...] = (("package.module:function", "Your own."),)
    offered: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @cached_property
    def _mapping(self) -> Mapping[str, Any]:
        if isinstance(self.table, str):
            module, _, attribute = self.table.partition(":")
            found: Mapping[str, Any] = getattr(__import__(module, fromlist=[attribute]), attribute)
            return found
        return self.table

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def find(self, name: str) -> Callable[..., Any]:
        """The callable of that name, which may be ``package.module:function``.

        Raises:
            UserError: if there is none.
        """
        if name in self._mapping:
            entry = self._mapping[name]
            found: Callable[..., Any] = imported(entry) if isinstance(entry, str) else entry
            return found
        if is_plugin(name) and any(known.startswith("package") for known, _ in self.also):
            return imported(name, self.one)
        valid = ", ".join([*self._mapping, *(n for n, _ in self.also)])
        hint = nearest(name, self._mapping, 1) or f" Valid: {valid}."
        raise UserError(f"is unknown (got {name!r}).{hint}")

    def describe(self, name: str) -> list[str]:
        """What is to be said of an entry: a sentence, its call with all defaults, its source."""
        if self is data:
            return [self._mapping[name]]
        found = self.find(name)
        text = getattr(found, "summary", None) or inspect.getdoc(found) or ""
        lines = [text.strip().partition("\n")[0]]
        if callable(found):
            lines.append(_call(name, found, self.offered))
        source = next((p for p in text.split("\n\n") if "Source: " in p), None)
        if source is not None:
            start = source.index("Source: ")
            lines.append(" ".join(source[start:].split()))
        return lines


def _call(name: str, found: Callable[..., Any], offered: tuple[str, ...]) -> str:
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in offered]
    spelled = (
        p.name if p.default is p.empty else f"{p.name}={_short(p.default)}" for p in parameters
    )
    return f"{name}({', '.join(spelled)})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


_PERTURB = "robustflat.perturb:"
_WEIGHTS = (
    "none", "awp", "awp_global", "amp", "rwp", "sam", "asam", "gsam", "gnp", "gam", "fsam", "vasso",
    "momentum_sam", "looksam", "lesam", "esam", "zsharp", "random", "rwp_mix", "custom", "msam",
    "nsam",
)  # fmt: skip
_OTHERWISE = {"none": "no_perturbation", "random": "random_weights"}

_OBJECTIVES = ("standard", "adversarial", "trades", "mart", "mlcat", "ikl", "gkl", "rebat")

weights = Kind(
    "weights",
    "weight perturbation",
    {n: _PERTURB + _OTHERWISE.get(n, n) for n in _WEIGHTS},
    needs=(
        "backward", "is_off", "passes", "wants_rows", "splits", "least_rows", "remembers",
        "parameters", "batches", "scaled", "synchronised", "state_dict", "load_state_dict",
    ),
)  # fmt: skip
attacks = Kind(
    "attack",
    "attack",
    {
        "none": _PERTURB + "no_attack",
        "pgd": _PERTURB + "pgd",
        "fgsm": _PERTURB + "fgsm",
        "nfgsm": _PERTURB + "nfgsm",
    },
    offered=("box",),
    needs=("__call__",),
)
objectives = Kind(
    "objective",
    "objective",
    {n: f"robustflat.objectives:{n}" for n in _OBJECTIVES},
    needs=("__call__",),
)
optimizers = Kind(
    "optimizer",
    "optimizer",
    "robustflat.train.optim:OPTIMIZERS",
    offered=("params", "foreach", "fused", "capturable", "differentiable", "maximize"),
    needs=("param_groups", "step", "zero_grad", "state_dict", "load_state_dict"),
)
schedules = Kind("schedule", "schedule", "robustflat.train.optim:SCHEDULES", needs=("__call__",))
averages = Kind("average", "average", "robustflat.train.averaging:AVERAGES", also=())
augmentations = Kind(
    "augment",
    "augmentation",
    {
        "standard": "robustflat.data:Augment",
        "torchvision": "robustflat.data.transforms:torchvision",
    },
    needs=("__call__",),
)
models = Kind(
    "model",
    "model",
    "robustflat.models:MODELS",
    also=(
        ("wrn-DEPTH-WIDEN", "wide_resnet of that depth and width; with -silu wide_resnet_silu."),
        ("timm:NAME", "A model of the timm package."),
        ("package.module:factory", "Your own."),
    ),
    offered=("num_classes", "in_channels", "image_size"),
)
listeners = Kind(
    "listeners",
    "listener",
    {
        "tensorboard": "robustflat.report.tensorboard:TensorBoard",
        "mlflow": "robustflat.report.trackers:MLflow",
        "wandb": "robustflat.report.trackers:WandB",
    },
    offered=("folder",),
    needs=("on_start", "on_step", "on_epoch", "on_pictures", "on_end"),
)
data = Kind("data", "data set", "robustflat.data:DESCRIPTIONS", also=())
scales = Kind("scales", "scale", "robustflat.perturb:SCALES", also=())
measures = Kind("measures", "flatness measure", "robustflat.flatness:MEASURES")

KINDS = {
    kind.name: kind
    for kind in (
        weights, attacks, objectives, optimizers, schedules, averages, augmentations, models,
        listeners, data, scales, measures,
    )
}  # fmt: skip
