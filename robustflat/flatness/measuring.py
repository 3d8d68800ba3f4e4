"""Owns the measuring itself: what it costs beforehand, then every measure, leaving no trace."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.config.schema import ATTACK
from robustflat.errors import UserError
from robustflat.evaluate.fast import compiled
from robustflat.evaluate.team import Team
from robustflat.flatness.asked import called, settle
from robustflat.flatness.closure import Kind
from robustflat.flatness.curvature import curvlinops
from robustflat.flatness.decorator import Measure
from robustflat.flatness.examples import Data, read_examples
from robustflat.flatness.figure import UNITS, Cost, Figure, Passes, Progress
from robustflat.flatness.options import Options
from robustflat.flatness.store import Store, identity
from robustflat.flatness.subject import Subject
from robustflat.flatness.undisturbed import undisturbed
from robustflat.perturb import InputPerturbation
from robustflat.plugins import is_plugin

DEFAULT_MEASURES = ("hessian_max", "hessian_trace", "worst_robust")
# Numbers of independent parts: a store may be continued with more of them.
_CONTINUABLE = ("samples", "probes", "restarts", "lanczos_runs")
_log = logging.getLogger("robustflat.flatness")


def flatness(
    model: nn.Module,
    data: Data,
    measures: Sequence[str] = DEFAULT_MEASURES,
    eps: float | None = None,
    norm: str | float = "linf",
    seed: int = 0,
    *,
    batch_size: int = 128,
    attack: InputPerturbation | str | None = None,
    usual_attack: str = ATTACK,
    initial: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    store: str | os.PathLike[str] | None = None,
    team: Team | None = None,
    compile: bool = False,  # noqa: A002 - torch's word
    **options: Any,
) -> dict[str, Figure]:
    """How flat the loss is around the model's weights, clean and robust.

    The weights, buffers, gradients and modes of the model, and all global random states, are bit
    for bit what they were, also after an interrupt. The loss is cross-entropy in eval mode,
    averaged over the examples, and no value depends on ``batch_size`` beyond rounding.

    Args:
        model: maps images in [0, 1] to logits.
        data: images and labels ``(x, y)``, or a loader that neither shuffles nor augments.
        measures: names from ``robustflat.flatness.MEASURES``.
        eps: radius of the robust loss's attack, in image units; at 0 it is the clean loss. 8/255
            for linf if None, and to be said for other norms.
        norm: of that attack, "linf", "l2" or "l1".
        seed: of all random directions, probes and attack starts.
        batch_size: examples in a pass; only memory and speed depend on it.
        attack: of the robust loss, "pgd-STEPS", "pgd-STEPS-RESTARTS", "fgsm", each also with
            ":LOSS", or what ``rf.pgd`` returns; that of the measures if None.
        usual_attack: then, of the measures that are not published with one.
        initial: the state_dict before training, for the measures of the distance from it.
        on_progress: told how far the measurement has come; may raise to stop it.
        store: a file that keeps finished parts (restarts, directions, probes, eigenvalues);
            called again with it, an interrupted measurement goes on and ends with the same values.
            It may serve any number of measurements.
        team: processes that share the work, as ``robustflat.evaluate.Team.of_torchrun()`` finds
            them; every one returns what one process alone would, to the last bit.
        compile: let the robust loss's attack search with the model compiled by torch.compile; the
            eager model's loss is taken. Where it cannot be compiled, the log says so.
        **options: fields of :class:`robustflat.flatness.Options`; a list of values is a sweep. An
            option of one measure alone is said in its name: "worst_clean with radius=0.1".

    Returns:
        A figure for every measure, in their order. Its details tell all settings. A preset that
        was changed, and every point of a sweep, is named so: "wu2020 with radius=0.1".

    Raises:
        UserError: for unknown measures or options, impossible values, data that shuffles,
            curvature of a model in train mode, or a model whose loss is random or not finite.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    settings = settle(measures, eps, norm, attack, options, usual_attack)
    chosen = list(settings)
    if any(s.estimator != "hutchinson" for s in settings.values()):
        curvlinops()
    _refuse_training(model, chosen)
    with undisturbed(model):
        limits = [s.examples for s in settings.values()]
        x, y, images = read_examples(
            data,
            max(limits) if all(limits) else None,  # type: ignore[type-var]
        )
        attacks = [o.attack for measure, o in settings.items() if measure.is_attacked]
        check_model(model, x, y, batch_size, attacks)
        searching: AbstractContextManager[nn.Module | None] = nullcontext()
        if compile and attacks:
            place = next(model.parameters()).device
            searching = compiled(model, x.shape[1:], place)
        with searching as searched:
            subjects = _Subjects(
                model, x, y, batch_size, seed, settings, on_progress, store, initial,
                team or Team(), images, searched,
            )  # fmt: skip
            _log.info("%s", subjects.cost)
            return {
                _name(measure, settings[measure], len(x)): subjects.measure(measure)
                for measure in chosen
            }


def cost(
    measures: Sequence[str],
    examples: int,
    *,
    eps: float | None = None,
    norm: str | float = "linf",
    attack: InputPerturbation | str | None = None,
    **options: Any,
) -> Cost:
    """What :func:`flatness` would cost, before it starts.

    Args:
        measures: names.
        examples: how many there are.
        eps: as there.
        norm: as there.
        attack: as there.
        **options: as there.

    Returns:
        Passes over the examples by kind, and in all; eigenvalues count their upper bound.
    """
    return _cost(settle(measures, eps, norm, attack, options), examples)


def _cost(settings: Mapping[Measure, Options], examples: int) -> Cost:
    each = {measure.name: _jobs(measure, settings, examples) for measure in settings}
    together = {key: passes for jobs in each.values() for key, passes in jobs.items()}
    return Cost(
        examples=examples,
        measures={name: sum(jobs.values(), Passes()) for name, jobs in each.items()},
        total=sum(together.values(), Passes()),
    )


def _jobs(
    measure: Measure, settings: Mapping[Measure, Options], examples: int
) -> dict[str, Passes]:
    """A measure's jobs, in passes over all examples."""
    options = settings[measure]
    share = min(options.examples or examples, examples) / examples
    # Adversarial examples are shared by all measures of the same images, else equal settings share.
    return {
        (key if key.startswith("examples/") else f"{key}/{options!r}"): passes.times(share)
        for key, passes in measure.jobs(options).items()
    }


def _name(measure: Measure, options: Options, examples: int) -> str:
    """As it is called where there are fewer examples than a preset is published with."""
    if not measure.preset or options.examples is None or options.examples <= examples:
        return measure.name
    return called(measure.name, [f"examples={examples}"])


def _refuse_training(model: nn.Module, chosen: Sequence[Measure]) -> None:
    names = [measure.name for measure in chosen if measure.curvature]
    if names and any(module.training for module in model.modules()):
        raise UserError(
            f"The model is in train mode, in which {', '.join(names)} would depend on the batches "
            "(BatchNorm) or be random (dropout). Call model.eval() first."
        )


@torch.no_grad()
def check_model(
    model: nn.Module,
    images: Tensor,
    y: Tensor,
    batch_size: int,
    attacks: Iterable[InputPerturbation],
) -> None:
    """Refuse a model of random or infinite outputs, and images, labels or attacks that do not fit.

    Looks at the outputs of the first batch.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        raise UserError("The model has no weights, so it has no weight landscape.")
    low = {p.dtype for p in model.parameters() if p.dtype.itemsize < 4}
    if low:
        raise UserError(
            f"The model's weights are {', '.join(map(str, low))}, whose rounding is as large as "
            "the displacements that flatness is measured with. Measure model.float()."
        )
    x = images[:batch_size].to(first.device, first.dtype)
    logits, again = model(x), model(x)
    if logits.ndim != 2 or len(logits) != len(x):
        raise UserError(
            f"The model must return logits [N, classes], got the shape {tuple(logits.shape)} for "
            f"{len(x)} images."
        )
    if not torch.isfinite(images).all():
        raise UserError("Some pixels of the images are not finite. Check the data.")
    if not torch.isfinite(logits).all():
        raise UserError(
            "The model's logits are not finite at its own weights, so no flatness can be measured. "
            "Check the checkpoint and that the images are in [0, 1]."
        )
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5):
        raise UserError(
            "The model gave two different outputs for the same images in eval mode, so its loss "
            "is random and differences of it would be noise. Remove what draws random numbers."
        )
    classes = logits.shape[1]
    if classes < 3 and any(attack.loss == "dlr" for attack in attacks):
        raise UserError(
            f"The DLR loss divides by the third largest logit, and the model has {classes} "
            "classes. Attack by another loss, such as pgd-10-5:margin."
        )
    if y.is_floating_point():
        if y.ndim != 2 or y.shape[1] != classes:
            raise UserError(
                f"Soft labels must be [N, {classes}] for this model, got {tuple(y.shape)}."
            )
    elif y.ndim != 1 or int(y.min()) < 0 or int(y.max()) >= classes:
        raise UserError(
            f"Labels must be one whole number in 0..{classes - 1} an image for this model, got the "
            f"shape {tuple(y.shape)} with values {int(y.min())}..{int(y.max())}."
        )


class _Subjects:
    """A subject for every set of options, and the progress of all."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int,
        settings: Mapping[Measure, Options],
        on_progress: Callable[[Progress], None] | None,
        store: str | os.PathLike[str] | None,
        initial: Mapping[str, Tensor] | None,
        team: Team,
        images: int,
        searched: nn.Module | None,
    ) -> None:
        self._examples = len(x)
        self._settings = settings
        self._on_progress = on_progress
        self._done, self._spent, self._current = 0.0, Passes(), ""
        self.cost = _cost(settings, len(x))
        self._jobs = {m.name: _jobs(m, settings, len(x)) for m in settings}
        self._total = self.cost.total.units
        self._searched = {} if searched is None else {"compiled": True}
        about = {"seed": seed, **self._searched}
        mine = None if store is None else identity(model, [x, y], about)
        shared = team.once(lambda: Store(store, mine))
        shared = shared if team.is_first else shared.in_memory()
        caches: dict[int | None, dict[Any, Any]] = {o.examples: {} for o in settings.values()}
        self._subjects = {
            measure: Subject(
                model,
                x[: options.examples],
                y[: options.examples],
                batch_size=batch_size,
                seed=seed,
                store=shared,
                prefix=_digest(options, known=not is_plugin(measure.name)),
                cache=caches[options.examples],
                count=self._count,
                initial=initial,
                team=team,
                images=images,
                searched=searched,
            )
            for measure, options in settings.items()
        }

    def measure(self, measure: Measure) -> Figure:
        """Run one measure; its details tell the examples and the passes it took."""
        options = self._settings[measure]
        self._current, self._spent = measure.name, Passes()
        self._tell()
        subject = self._subjects[measure]
        figure = measure.run(subject, options)
        self._finish(measure.name)
        settings = {**measure.settings(options), "seed": subject.seed}
        settings |= self._searched if measure.is_attacked else {}
        return replace(
            figure,
            details={
                **figure.details,
                "examples": len(subject),
                "passes": self._spent.to_dict(),
                "settings": settings,
            },
        )

    def _finish(self, name: str) -> None:
        """Correct the total: a bound was not reached, or parts were in the store."""
        finished = self._jobs.pop(name)
        left = {
            key: passes
            for jobs in self._jobs.values()
            for key, passes in jobs.items()
            if key not in finished
        }
        for jobs in self._jobs.values():
            for key in finished:
                jobs.pop(key, None)
        self._total = self._done + sum(passes.units for passes in left.values())
        self._tell()

    def _count(self, kind: Kind, examples: int) -> None:
        passes = examples / self._examples
        self._spent = self._spent + Passes(**{kind: passes})
        self._done += UNITS[kind] * passes
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            total = max(self._total, self._done)
            self._on_progress(Progress(measure=self._current, done=self._done, total=total))


def _digest(options: Options, known: bool) -> str:
    """Tells options apart in a store, of known measures but for the numbers of parts: these grow.

    A user's own measure may keep under one key what all its parts together are.
    """
    kept = [f.name for f in fields(Options) if not known or f.name not in _CONTINUABLE]
    text = repr([(name, getattr(options, name)) for name in kept])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
