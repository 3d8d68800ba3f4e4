"""Owns what all landscapes share: images, losses, and the walk over the grid, to be resumed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn

import robustflat
from robustflat.errors import UserError, nearest
from robustflat.evaluate.attacks.ascent import title
from robustflat.evaluate.team import Team
from robustflat.evaluate.threat import Threat
from robustflat.files import locked
from robustflat.flatness.closure import Kind, attack_cost, attack_of
from robustflat.flatness.examples import Data, read_examples
from robustflat.flatness.figure import UNITS, Passes, Progress
from robustflat.flatness.measuring import check_model
from robustflat.flatness.options import Options
from robustflat.flatness.store import Identity, identity
from robustflat.flatness.subject import LossKind, Subject
from robustflat.landscapes.batchnorm import recompute_statistics
from robustflat.landscapes.record import Landscape
from robustflat.perturb import InputPerturbation

# Sets the model to a point: the number of the draw, and the coordinates.
Place = Callable[[int, tuple[float, ...]], None]
# Seconds between two savings of a landscape that is being drawn.
PAUSE = 1.0
_log = logging.getLogger("robustflat.landscapes")


class Common(TypedDict, total=False):
    """The settings of every landscape.

    Attributes:
        losses: any of "clean", "robust" (examples remade at every point) and "robust_fixed"
            (those of the centre, of checkpoints the first); the first two if left out.
        norm: of the attack: "linf", "l2" or "l1".
        eps: its radius in image units; 8/255.
        attack: "pgd-STEPS", "pgd-STEPS-RESTARTS", "fgsm", each also with ":LOSS", or what
            ``rf.pgd`` returns; "pgd-10".
        seed: of random directions and of the attack's starts: with the same seed, models are seen
            along the same directions.
        batch_size: examples in a pass; 128.
        examples: take the first so many.
        batchnorm: where BatchNorm's statistics come from. "keep": the model's own, of checkpoints
            the first one's. "refresh": computed from clean images at every point. "interpolate",
            between checkpoints: combined like the weights.
        refresh_on: images ``[N, ...]`` for "refresh", of training; those measured if left out.
        about: further circumstances for the record, ready for JSON.
        store: a file ending in .json, or a folder in which the landscape names its own: the
            landscape is kept there while it is drawn, and resumed.
        team: processes that share the points, as ``Team.of_torchrun()`` finds them.
        on_progress: told how far it has come.
    """

    losses: Sequence[LossKind]
    norm: str | float
    eps: float
    attack: InputPerturbation | str
    seed: int
    batch_size: int
    examples: int | None
    batchnorm: str
    refresh_on: Tensor
    about: Mapping[str, Any]
    store: str | Path
    team: Team
    on_progress: Callable[[Progress], None]


class Scene:
    """A model on its images, to be placed at the points of a grid.

    Args:
        model: in eval mode.
        data: images and labels, or a loader.
        batchnorm: what ``batchnorm`` may be, the default first.
        common: see :class:`Common`.
        attacked: whether the attack matters even where all losses are clean.

    Raises:
        UserError: for settings that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        batchnorm: Sequence[str],
        common: Common,
        *,
        attacked: bool = False,
    ) -> None:
        known = get_args(LossKind)
        for name in common.keys() - Common.__annotations__.keys():
            hint = nearest(name, Common.__annotations__, 1)
            raise UserError(f"A landscape has no setting {name!r}.{hint}")
        self.losses = list(dict.fromkeys(common.get("losses", ("clean", "robust"))))
        if not self.losses or any(loss not in known for loss in self.losses):
            raise UserError(f"losses must be some of {', '.join(known)}, got {self.losses!r}.")
        size = common.get("batch_size", 128)
        if size < 1:
            raise UserError(f"batch_size must be at least 1, got {size}.")
        self.batchnorm = common.get("batchnorm", batchnorm[0])
        if self.batchnorm not in batchnorm:
            raise UserError(
                f"batchnorm must be one of {', '.join(batchnorm)} here, got {self.batchnorm!r}."
            )
        threat = Threat.said(common.get("norm", "linf"), common.get("eps"))
        attack = attack_of(common.get("attack", "pgd-10"), threat)
        self.options = Options(attack=attack)
        x, y, _ = read_examples(data, common.get("examples"))
        self.model = model
        self.team, self._tell = common.get("team", Team()), common.get("on_progress")
        self._store, self._done, self._total = common.get("store"), 0.0, 1.0
        self.subject = Subject(
            model, x, y, batch_size=size, seed=common.get("seed", 0), count=self._count
        )
        # In a random order, or batches of images sorted by class would be of one class each.
        fresh = common.get("refresh_on", x)
        order = torch.randperm(len(fresh), generator=self.subject.generator("refresh"))
        self._fresh = fresh[order.to(fresh.device)]
        first = next(model.parameters())
        attacked = attacked or set(self.losses) != {"clean"}
        check_model(model, x, y, size, [attack] if attacked else [])
        ball = attack.ball
        self.about = {
            **common.get("about", {}),
            "losses": self.losses,
            "norm": Threat(norm=ball.norm, eps=ball.radius).norm_name if attacked else None,
            "eps": ball.radius if attacked else None,
            "attack": title(attack) if attacked else None,
            "attack_settings": repr(attack) if attacked else None,
            "seed": self.subject.seed,
            "examples": len(x),
            "batch_size": size,
            "batchnorm": self.batchnorm,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "versions": {"robustflat": robustflat.__version__, "torch": torch.__version__},
        }

    def draw(
        self,
        *,
        axes: tuple[list[float], ...],
        names: tuple[str, ...],
        points: Mapping[str, tuple[float, ...]],
        about: Mapping[str, Any],
        prepare: Callable[[], Place],
        draws: int = 1,
        states: Sequence[str] = (),
    ) -> Landscape:
        """Measure every point that the store does not hold.

        Args:
            axes: as in :class:`Landscape`, and so are names and points.
            names: see there.
            points: see there.
            about: circumstances to be added.
            prepare: makes what sets the model to a point; called at the centre, in all processes
                of the team, if there is something to measure.
            draws: of random directions.
            states: digests of the weights that it depends on beside the model's.
        """
        losses, accuracies = (
            {str(loss): np.full((draws, *map(len, axes)), np.nan) for loss in self.losses}
            for _ in range(2)
        )
        found = Landscape(
            axes=axes, names=names, losses=losses, accuracies=accuracies, points=points,
            about={**about, "grid": [len(axis) for axis in axes], "draws": draws, **self.about},
            measured=0,
        )  # fmt: skip
        path = None if self._store is None else Path(self._store)
        if path is not None:
            images = [self.subject.x, self.subject.y]
            images += [self._fresh] if self.batchnorm == "refresh" else []
            mine = identity(self.model, images, {"asked": found.asked, "states": states})
            found = replace(found, fingerprint=mine.mark, logits=mine.logits)
            path = path if path.suffix == ".json" else path / found.filename
        with ExitStack() as stack:

            def begin() -> Landscape:
                if path is None:
                    return found
                stack.enter_context(locked(path))
                old = _begun(path, found, mine)
                if old.complete:
                    path.touch()  # It is now the one asked for last.
                return old

            found = self.team.once(begin)
            if found.complete:
                _log.info("Nothing is left to measure: all of it is in %s.", path)
                return found
            return self._walk(found, prepare, path)

    def _walk(self, found: Landscape, prepare: Callable[[], Place], path: Path | None) -> Landscape:
        # Fixed examples are made here, at the centre.
        closures = {loss: self.subject.closure(self.options, loss) for loss in self.losses}
        place, shape = prepare(), next(iter(found.losses.values())).shape
        size, begun = math.prod(shape), found.measured
        self._done, self._total = 0.0, (size - begun) * self._units()
        _log.info(
            "%d points, %.0f forward-pass equivalents over %d examples.",
            size - begun, self._total, len(self.subject),
        )  # fmt: skip

        def at(number: int) -> dict[str, tuple[float, float]]:
            draw, *index = np.unravel_index(number, shape)
            place(int(draw), tuple(axis[i] for axis, i in zip(found.axes, index, strict=True)))
            if self.batchnorm == "refresh":
                recompute_statistics(self.model, self._fresh, self.subject.batch_size)
                self._count("forward", len(self._fresh))
            measured = {loss: closure.outcomes() for loss, closure in closures.items()}
            return {
                loss: (float(values.mean()), float(right.double().mean()))
                for loss, (values, right) in measured.items()
            }

        keeps = path if self.team.is_first else None
        saved, clock = begun, time.monotonic()
        try:
            for results in self.team.each(at, range(begun, size)):
                for result in results:
                    for loss, (value, accuracy) in result.items():
                        # JSON has no infinity.
                        value = value if math.isfinite(value) else math.nan
                        found.losses[loss].flat[found.measured] = value
                        found.accuracies[loss].flat[found.measured] = accuracy
                    found = replace(found, measured=found.measured + 1)
                if keeps and time.monotonic() - clock > PAUSE:
                    found.save(keeps)
                    saved, clock = found.measured, time.monotonic()
        finally:
            if keeps and found.measured > saved:
                found.save(keeps)
        return found

    def _units(self) -> float:
        """The cost of one point, in forward passes over the examples."""
        each = (
            len(self.losses)
            + ("robust" in self.losses) * Passes(**attack_cost(self.options.attack)).units
        )
        fresh = len(self._fresh) / len(self.subject) if self.batchnorm == "refresh" else 0
        return each + fresh

    def _count(self, kind: Kind, examples: int) -> None:
        self._done += UNITS[kind] * examples / len(self.subject) * self.team.size
        if self._tell is not None:
            total = max(self._total, self._done)
            self._tell(Progress(measure="landscape", done=self._done, total=total))


def _begun(path: Path, wanted: Landscape, mine: Identity) -> Landscape:
    """What is measured already of the landscape that is wanted."""
    if not path.exists():
        return wanted
    old = Landscape.load(path)
    if old.fingerprint == mine.mark and mine.has(old.logits):
        return old
    if old.asked != wanted.asked:
        raise UserError(
            f"{path} holds another landscape: its attack, images or other settings differ. Remove "
            "it to draw this one there, or choose another file."
        )
    return wanted
