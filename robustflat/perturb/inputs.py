"""Adversarial inputs: PGD and FGSM as the ascent over a ball around each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.bounds import Count, NonNegative
from robustflat.perturb.ascent import Ascent, Keep, Start, check_projection, maximise
from robustflat.perturb.ball import Ball, Norm, parse_norm
from robustflat.perturb.displace import buffers_kept
from robustflat.perturb.modes import MODES, Mode, attack_mode
from robustflat.perturb.parts import slices
from robustflat.perturb.watch import watching

LossName = Literal["ce", "kl", "margin", "probability_margin", "dlr"]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every row; ``y`` int64 ``[N]`` or soft labels ``[N, C]``."""
    return F.cross_entropy(logits, y, reduction="none")


def kl_divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(clean || adversarial) of every row, from logits (TRADES' inner loss)."""
    return F.kl_div(
        logits.log_softmax(1), clean_logits.log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit minus the right one (Carlini & Wagner 2017); positive: misclassified."""
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return wrong - right


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong probability minus the right one, the loss of PMA (Xie et al. 2024)."""
    return margin(logits.softmax(1), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6): the margin over z1 - z3.

    Raises:
        ValueError: for fewer than three classes, for which it is not defined.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"The DLR loss needs at least 3 classes, got {logits.shape[1]}: it divides by the "
            "difference of the first and third largest logit. Use loss='margin' or 'ce'."
        )
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


# From logits [N, C] and labels (for "kl", the clean logits) to one loss a row, larger is worse.
attack_losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "kl": kl_divergence,
    "margin": margin,
    "probability_margin": probability_margin,
    "dlr": dlr,
}


def _ahead(values: Tensor, pairs: Tensor) -> Tensor:
    """By how much the second class of each pair is ahead of the first."""
    right, target = values.gather(1, pairs).unbind(1)
    return target - right


def _dlr_towards(logits: Tensor, pairs: Tensor) -> Tensor:
    """The targeted DLR (Croce & Hein 2020, eq. 7), over z1 - (z3 + z4) / 2."""
    if logits.shape[1] < 4:
        raise ValueError(
            f"The targeted DLR loss needs at least 4 classes, got {logits.shape[1]}: use 'margin'."
        )
    ordered = logits.sort(dim=1, descending=True).values
    return _ahead(logits, pairs) / (ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3]) + 1e-12)


# From logits [N, C] and pairs of the label and a target [N, 2] to one loss a row.
targeted_losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda logits, pairs: -cross_entropy(logits, pairs[:, 1]),
    "margin": _ahead,
    "probability_margin": lambda logits, pairs: _ahead(logits.softmax(1), pairs),
    "dlr": _dlr_towards,
}


@dataclass(frozen=True, kw_only=True)
class InputPerturbation:
    """The worst input near each image: an ascent over a ball around it, cut with the image box.

    Made by :func:`pgd` and :func:`fgsm`. Each iterate is projected onto the ball, then clipped to
    the box. For linf that is the projection onto both; for l2 and l1 it is feasible, though not
    the nearest feasible point.

    Args:
        ball: with group "row", in image units.
        ascent: steps and start.
        loss: what is climbed, a key of ``attack_losses``; "kl" climbs away from the clean output.
        restarts: independent starts; the one with the highest final loss is kept for each image.
        mode: how BatchNorm stands meanwhile, see :func:`robustflat.perturb.modes.attack_mode`.
        box: lowest and highest pixel value, or None.
    """

    ball: Ball
    ascent: Ascent
    loss: LossName = "ce"
    restarts: int = 1
    mode: Mode = "eval"
    box: tuple[float, float] | None = (0.0, 1.0)
    name: str = field(default="pgd", compare=False)

    def __post_init__(self) -> None:
        if self.loss not in attack_losses:
            raise ValueError(
                f"An attack's loss must be one of {tuple(attack_losses)}, got {self.loss!r}."
            )
        if self.mode not in MODES:
            raise ValueError(f"An attack's mode must be one of {MODES}, got {self.mode!r}.")
        if self.restarts < 1:
            raise ValueError(f"An attack needs restarts >= 1, got {self.restarts}.")
        if self.loss == "kl" and self.ascent.start == "zero" and self.ball.radius > 0:
            raise ValueError(
                "An attack cannot climb loss='kl' from start='zero': the divergence from the clean "
                "output has no gradient at the image itself. Use start='normal' or 'uniform'."
            )
        check_projection(self.ball, self.ascent)
        if self.restarts > 1 and self.ascent.start == "zero":
            raise ValueError(
                f"{self.restarts} restarts from start='zero' would all be the same attack. Use "
                "start='uniform', or one restart."
            )

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        starts: Sequence[Tensor] = (),
        parts: int = 1,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: maps images in the box to logits ``[N, C]``. Its modes, buffers and parameter
                gradients are as before afterwards.
            x: images ``[N, ...]``.
            y: labels ``[N]`` (soft ``[N, C]`` for "ce"); not used by "kl". Whole numbers
                ``[N, 2]`` are the label and a target, which is then climbed towards.
            generator: source of randomness, on the device of ``x``.
            starts: a first perturbation of the shape of ``x`` for every restart in place of drawn
                ones; brought into ball and box first, unless the configured start is "normal".
            parts: how many parts of the batch pass through the model one after the other, which
                takes less memory. Only BatchNorm in mode "batch" sees a difference.

        Returns:
            Adversarial images, detached, of the shape of ``x``.
        """
        x = x.detach()
        if self.ball.radius == 0:
            return x.clone()
        begin: list[Tensor | None] = [*starts] if starts else [None] * self.restarts
        if len(begin) != self.restarts:
            raise ValueError(
                f"An attack of {self.restarts} restarts begins at as many starts, got {len(begin)}."
            )
        with attack_mode(model, self.mode), buffers_kept(model):
            target = y
            if self.loss == "kl":
                target = _without_graph(lambda rows: model(x[rows]), slices(len(x), parts))
            best = self._search(model, x, target, generator, begin[0], parts)
            if self.restarts > 1:
                best_loss = self._losses(model, best, target, parts)
                for start in begin[1:]:
                    candidate = self._search(model, x, target, generator, start, parts)
                    loss = self._losses(model, candidate, target, parts)
                    better = (loss > best_loss).view(-1, *[1] * (x.ndim - 1))
                    best = torch.where(better, candidate, best)
                    best_loss = torch.maximum(loss, best_loss)
        return best

    def scaled(self, factor: float) -> InputPerturbation:
        """The same attack in a ball ``factor`` times as large; its steps keep their share of it."""
        return replace(self, ball=replace(self.ball, radius=self.ball.radius * factor))

    def _search(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        generator: torch.Generator | None,
        start: Tensor | None,
        parts: int,
    ) -> Tensor:
        climb, watch, steps = self._climbed(target), watching(), count(1)

        def of_rows(u: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                moved = (x[rows] + u[rows]).requires_grad_()
                losses = climb(model(moved), target[rows])
                # The sum, so that a row's gradient does not depend on the batch around it; with
                # respect to the input alone, so that no weight gradient is computed.
                (gradient,) = torch.autograd.grad(losses.sum(), moved)
            if self.ball.norm == 1 and self.box is not None:
                # An l1 step is spent on the largest entry: not on a pixel that cannot follow it.
                low, high = self.box
                stuck = (moved <= low) & (gradient < 0) | (moved >= high) & (gradient > 0)
                gradient = gradient.masked_fill(stuck, 0)
            return losses.detach(), gradient

        def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            found = [of_rows(u[0], rows) for rows in slices(len(x), parts)]
            losses, gradient = (_joined(list(part)) for part in zip(*found, strict=True))
            if watch is not None:
                watch.note(f"attack/loss/{next(steps)}", losses.mean())
            return losses, [gradient]

        def into_box(u: list[Tensor]) -> list[Tensor]:
            assert self.box is not None
            return [(x + u[0]).clamp_(*self.box).sub_(x)]

        (u,) = maximise(
            value_and_grad,
            self.ball,
            self.ascent,
            [x],
            generator,
            initial=None if start is None else [start],
            constrain=into_box if self.box is not None else None,
        )
        return x + u if self.box is None else (x + u).clamp_(*self.box)

    def _climbed(self, target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        is_pair = target.ndim == 2 and not target.is_floating_point()
        return (targeted_losses if is_pair else attack_losses)[self.loss]

    def _losses(self, model: nn.Module, x: Tensor, target: Tensor, parts: int) -> Tensor:
        climb = self._climbed(target)
        return _without_graph(lambda r: climb(model(x[r]), target[r]), slices(len(x), parts))


def _without_graph(function: Callable[[slice], Tensor], parts: list[slice]) -> Tensor:
    """What a function makes of all rows."""
    with torch.no_grad():
        found = _joined([function(rows) for rows in parts])
    # Older versions of torch would go on with the copies that this pass cached.
    torch.clear_autocast_cache()
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def no_attack() -> None:
    """Train on the images as they are."""


def pgd(
    norm: Norm = "linf",
    eps: NonNegative = 8 / 255,
    steps: Count = 10,
    step_size: NonNegative | None = None,
    start: Start = "uniform",
    *,
    loss: LossName = "ce",
    restarts: Count = 1,
    mode: Mode = "eval",
    keep: Keep = "last",
    box: tuple[float, float] | None = (0.0, 1.0),
) -> InputPerturbation:
    """Projected gradient descent on the input (Madry et al. 2018, section 2.1).

    x <- clip(project(x + step_size * s)), s the steepest step of the norm (for linf the sign of
    the gradient). Agrees with the released code of AWP and of Rice et al. 2020 for linf.

    Args:
        norm: "linf", "l2", "l1" or p (p other than these only where nothing need be projected).
        eps: radius of the ball, in image units.
        steps: gradient steps.
        step_size: in image units; 2.5 * eps / steps if None.
        start: "uniform" in the ball, "sphere", "zero", "normal" (0.001 times a standard normal, as
            in TRADES and MART) or "gaussian" (eps times one, not projected before the first step).
        loss: "ce", "kl", "margin", "probability_margin" (of PMA) or "dlr".
        restarts: independent starts, the best kept for each image.
        mode: "eval" or "batch".
        keep: the "last" iterate or the "best".
        box: lowest and highest pixel value, or None.

    Raises:
        ValueError: if a value cannot work.
    """
    ball = Ball(parse_norm(norm), eps, "row")
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)
    ascent = Ascent(steps, step_size / eps if eps else 0.0, start, keep=keep)
    return InputPerturbation(
        ball=ball, ascent=ascent, loss=loss, restarts=restarts, mode=mode, box=box
    )


def fgsm(
    norm: Norm = "linf",
    eps: NonNegative = 8 / 255,
    *,
    loss: LossName = "ce",
    mode: Mode = "eval",
    box: tuple[float, float] | None = (0.0, 1.0),
) -> InputPerturbation:
    """One step of one radius from the image itself (Goodfellow et al. 2015).

    Args:
        norm: "linf", "l2", "l1" or p.
        eps: radius of the ball and length of the step, in image units.
        loss: "ce", "margin" or "dlr".
        mode: "eval" or "batch".
        box: lowest and highest pixel value, or None.

    Raises:
        ValueError: if a value cannot work.
    """
    if loss == "kl":
        raise ValueError(
            "fgsm cannot climb loss='kl': the divergence from the clean output has no gradient at "
            "the image itself. Use pgd with start='normal'."
        )
    attack = pgd(norm, eps, 1, eps, "zero", loss=loss, mode=mode, box=box)
    return replace(attack, name="fgsm")


def nfgsm(
    norm: Norm = "linf",
    eps: NonNegative = 8 / 255,
    noise: NonNegative = 2.0,
    step_size: NonNegative | None = None,
    *,
    loss: LossName = "ce",
    mode: Mode = "eval",
    box: tuple[float, float] | None = (0.0, 1.0),
) -> InputPerturbation:
    """N-FGSM: one step from strong noise, not brought back into the ball (de Jorge et al. 2022).

    x + eta + step_size * s, with eta uniform in the ball of radius ``noise * eps`` and s the
    steepest step at x + eta (for linf the sign of the gradient), both times clipped to the box. So
    it is an attack to train with: its images lie up to noise * eps + step_size away. The released
    code takes noise 2 and step_size eps nearly everywhere (SVHN at 12/255: noise 3), sees batch
    statistics and lets BatchNorm's running ones follow the attack.

    Source: train.py of pdejorge/N-FGSM.

    Args:
        norm: "linf" as in the paper; "l2" or "l1".
        eps: radius of the ball that the training is for, in image units.
        noise: size of the noise, in eps; 0 is :func:`fgsm`.
        step_size: length of the step, in image units; eps if None.
        loss: "ce", "kl", "margin" or "dlr".
        mode: "eval" or "batch".
        box: lowest and highest pixel value, or None.

    Raises:
        ValueError: if a value cannot work.
    """
    length = eps if step_size is None else step_size
    if not 0 <= noise < math.inf:
        raise ValueError(f"nfgsm's noise must be finite and >= 0, got {noise}.")
    reach = noise * eps + length
    ascent = Ascent(
        1,
        length / reach if reach else 0.0,
        "uniform" if noise else "zero",
        spread=noise * eps / reach if reach else 0.0,
    )
    ball = Ball(parse_norm(norm), reach, "row")
    return InputPerturbation(ball=ball, ascent=ascent, loss=loss, mode=mode, box=box, name="nfgsm")
