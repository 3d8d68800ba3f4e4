"""Owns the registry of flatness measures, the literature's presets among them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from robustflat.errors import UserError
from robustflat.flatness import curvature, inputs, mechanism, sharpness
from robustflat.flatness.closure import attack_cost
from robustflat.flatness.complexity import COMPLEXITY, Complexity
from robustflat.flatness.figure import Figure, Passes
from robustflat.flatness.options import Options
from robustflat.flatness.presets import PRESETS, AttackOf, Preset
from robustflat.flatness.subject import LossKind, Subject
from robustflat.plugins import imported, is_plugin

Compute = Callable[[Subject, Options, LossKind, str], Figure]
# Jobs by a key that two measures share if they share the work.
Jobs = Callable[[Options, int], dict[str, Passes]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A measure by name.

    Attributes:
        name: as users call it.
        summary: one line.
        loss: which loss is measured.
        compute: measures it.
        jobs: what it costs.
        curvature: whether it is defined in eval mode alone, so that a model in train mode is
            refused rather than measured in eval mode.
        changes: a preset's options; options that the user gives override them.
        weights: a preset's choice of parameters that depends on the model.
        attack: a preset's attack; one that the user gives overrides it.
        split: the images that a preset is published for, "train" or "test".
        preset: whether its settings are somebody's; changed, it has another name.
    """

    name: str
    summary: str
    loss: LossKind
    compute: Compute
    jobs: Jobs
    curvature: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[nn.Module], str] | None = None
    attack: AttackOf | None = None
    split: str | None = None
    preset: bool = False

    def run(self, subject: Subject, options: Options) -> Figure:
        """Measure ``subject``."""
        # Not with its settings in the name: all points of a sweep draw the same directions.
        return self.compute(subject, options, self.loss, self.name.partition(" with ")[0])


def measure(
    *, loss: LossKind = "clean", cost: Passes | None = None, curvature: bool = False
) -> Callable[[Compute], Compute]:
    """Make a function a measure that is called ``package.module:function``.

    The function takes a :class:`~robustflat.flatness.subject.Subject`, :class:`Options`, the kind
    of loss and its own name, and returns a :class:`Figure`. Its docstring's first line is what is
    said of it.

    Args:
        loss: which loss it measures: "clean", "robust" or "robust_fixed".
        cost: its passes over the examples; none if None.
        curvature: whether a model in train mode is to be refused.
    """

    def decorate(compute: Compute) -> Compute:
        passes = cost or Passes()
        compute.measure = Measure(  # type: ignore[attr-defined]
            name=f"{compute.__module__}:{getattr(compute, '__qualname__', '')}",
            summary=(compute.__doc__ or "").strip().partition("\n")[0],
            loss=loss,
            compute=compute,
            jobs=lambda options, examples: {f"own/{compute!r}": passes},
            curvature=curvature,
        )
        return compute

    return decorate


def find(name: str) -> Measure:
    """The measure of that name, or of the decorated function ``package.module:function``.

    Raises:
        UserError: if there is none.
    """
    if is_plugin(name):
        own = getattr(imported(name, "flatness measure"), "measure", None)
        if not isinstance(own, Measure):
            raise UserError(
                f"{name} is no flatness measure. Put @robustflat.flatness.measure(...) above it."
            )
        return replace(own, name=name)
    if name not in MEASURES:
        near = difflib.get_close_matches(str(name), MEASURES, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"There is no flatness measure {name!r}.{hint} Measures: {', '.join(MEASURES)}."
        )
    return MEASURES[name]


def without_normalisation(model: nn.Module) -> str:
    """A selection of all parameters but those of normalisation layers (Stutz et al. 2021)."""
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, _NORMALISATIONS)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    pattern = "|".join(name.replace(".", r"\.") for name in names)
    return f"re:^({pattern})$"


_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_SUFFIXES: dict[str, LossKind] = {
    "clean": "clean",
    "robust": "robust",
    "robust_fixed": "robust_fixed",
}
_OF = {
    "clean": "the clean loss",
    "robust": "the robust loss, examples remade at every weight",
    "robust_fixed": "the robust loss, examples held fixed",
}


def _with_examples(
    loss: LossKind, own: Mapping[str, Passes], options: Options
) -> dict[str, Passes]:
    """Jobs, and the making of the fixed adversarial examples where they are needed."""
    jobs = dict(own)
    if loss != "clean":
        jobs[f"examples/{options.attack!r}"] = Passes(**attack_cost(options.attack))
    return jobs


def _sharpness(kind: str, suffix: str) -> Measure:
    loss = _SUFFIXES[suffix]
    name = f"{kind}_{suffix}"
    compute, passes, summary = {
        "worst": (sharpness.worst, sharpness.worst_passes, "worst-direction sharpness"),
        "ascent": (sharpness.ascent, sharpness.ascent_passes, "ascent-direction sharpness"),
        "average": (sharpness.average, sharpness.average_passes, "average-direction sharpness"),
    }[kind]

    def jobs(options: Options, examples: int) -> dict[str, Passes]:
        own = {name: passes(options, loss, examples)}
        return _with_examples(loss, own, options) if loss == "robust_fixed" else own

    return Measure(
        name=name,
        summary=f"{summary} of {_OF[suffix]}",
        loss=loss,
        compute=compute,
        jobs=jobs,
    )


def _preset(name: str, row: Preset) -> Measure:
    loss = row.loss
    return replace(
        _sharpness(row.kind, loss),
        name=name,
        summary=row.summary,
        jobs=lambda options, n: {
            (name if key == f"{row.kind}_{loss}" else key): passes
            for key, passes in _sharpness(row.kind, loss).jobs(options, n).items()
        },
        changes=row.options,
        weights=without_normalisation if row.no_normalisation else None,
        attack=row.attack,
        split=row.split,
        preset=True,
    )


def _curvature(
    name: str,
    summary: str,
    compute: Compute,
    own: Callable[[Options, LossKind], dict[str, Passes]],
    loss: LossKind,
) -> Measure:
    robust = loss != "clean"

    def jobs(options: Options, examples: int) -> dict[str, Passes]:
        shared = {f"{key}/{loss}": passes for key, passes in own(options, loss).items()}
        return _with_examples(loss, shared, options)

    return Measure(
        name=name + ("_robust" if robust else ""),
        summary=f"{summary} of the {'robust' if robust else 'clean'} loss",
        loss=loss,
        compute=compute,
        jobs=jobs,
        curvature=True,
    )


def _top(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"top": curvature.top_passes(options, loss)}


def _ends(options: Options, loss: LossKind) -> dict[str, Passes]:
    passes = curvature.top_passes(options, loss)
    return {"top": passes, "bottom": passes}


def _bottom(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"bottom": curvature.top_passes(options, loss)}


def _probes(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {f"probes {options.estimator}": curvature.probe_passes(options, loss)}


def _hutchinson(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"probes hutchinson": curvature.hutchinson_passes(options)}


def _density(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {**_ends(options, loss), "density": curvature.density_passes(options, loss)}


def _gradient(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"gradient": mechanism.gradient_passes(options, loss)}


def _aligned(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {**_top(options, loss), **_gradient(options, loss)}


def _fisher(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"fisher": mechanism.fisher_passes(options, loss)}


def _once(name: str, passes: Callable[[Options, LossKind], Passes]) -> Jobs:
    return lambda options, examples: {name: passes(options, "clean")}


def _complexity(row: Complexity) -> Measure:
    # Measures that take the Hessian share its probes with the trace.
    loss: LossKind = "robust" if row.curvature and row.loss != "clean" else row.loss
    key = f"probes hutchinson/{loss}" if row.curvature else row.name

    def jobs(options: Options, examples: int) -> dict[str, Passes]:
        return _with_examples(row.loss, {key: row.passes(options)}, options)

    return Measure(
        name=row.name,
        summary=(row.compute.__doc__ or "").splitlines()[0],
        loss=loss,
        compute=row.compute,
        jobs=jobs,
        curvature=row.curvature,
    )


_CURVATURE: tuple[tuple[str, str, Compute, Callable[..., dict[str, Passes]]], ...] = (
    ("hessian_max", "largest Hessian eigenvalue", curvature.maximum, _top),
    ("hessian_min", "smallest Hessian eigenvalue", curvature.minimum, _bottom),
    ("hessian_trace", "Hessian trace", curvature.trace, _probes),
    ("hessian_frobenius", "Hessian Frobenius norm", curvature.frobenius, _hutchinson),
    ("hessian_density", "Hessian spectral density", curvature.density, _density),
    ("gradient_norm", "gradient norm", mechanism.gradient_norm, _gradient),
    ("alignment", "gradient's |cos| to the top eigenvector", mechanism.alignment, _aligned),
    ("fisher_trace", "Fisher information's trace", mechanism.fisher_trace, _fisher),
)


def _all() -> dict[str, Measure]:
    sharp: Sequence[Measure] = [
        _sharpness(kind, suffix) for kind in ("worst", "ascent", "average") for suffix in _SUFFIXES
    ]
    curved = [
        _curvature(name, summary, compute, own, loss)
        for loss in ("clean", "robust")
        for name, summary, compute, own in _CURVATURE
    ]
    others = [
        Measure(
            name="pac_bayes",
            summary="complexity term of SAM's PAC-Bayes bound",
            loss="clean",
            compute=mechanism.pac_bayes,
            jobs=_once("pac_bayes", lambda o, loss: sharpness.worst_passes(o, loss, 0)),
        ),
        Measure(
            name="input_gradient_norm",
            summary="norm of the loss's gradient by the image",
            loss="clean",
            compute=inputs.input_gradient_norm,
            jobs=_once("input_gradient_norm", inputs.slope_passes),
        ),
        Measure(
            name="local_linearity",
            summary="local linearity error of the loss around the image",
            loss="clean",
            compute=inputs.local_linearity,
            jobs=_once("local_linearity", inputs.linearity_passes),
        ),
    ]
    complex_ = [_complexity(row) for row in COMPLEXITY]
    presets = [_preset(name, row) for name, row in PRESETS.items()]
    return {m.name: m for m in (*sharp, *curved, *others, *complex_, *presets)}


MEASURES: dict[str, Measure] = _all()
