"""Weight perturbations: gradient estimators that climb the training loss over a ball of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustflat.perturb import gradients
from robustflat.perturb.ascent import Ascent, check_projection, maximise
from robustflat.perturb.ball import Ball
from robustflat.perturb.displace import Move, buffers_kept, displaced
from robustflat.perturb.memory import Choice, Memory, Rule, Trail
from robustflat.perturb.perturbation import Loss, Perturbation, Sync
from robustflat.perturb.scales import Scale, check_selection, one, select
from robustflat.perturb.sharded import check_sharded, parts_only, placed
from robustflat.perturb.watch import gradients_of, watching

Statistics = Literal["perturbed", "centre", "both"]
STATISTICS: tuple[Statistics, ...] = ("perturbed", "centre", "both")


@dataclass(frozen=True, kw_only=True)
class WeightPerturbation(Perturbation):
    """The worst weights near the present ones, and the gradient there.

    The perturbation is delta = T * u with u in ``ball``; the ascent climbs the very closure whose
    gradient is then taken. It is a gradient estimator, not an optimizer: after :meth:`backward`
    take the step of any optimizer. An object that remembers (``remember``, ``counts``, ``every``)
    serves one model; with another it begins anew.

    Args:
        name: as YAML and reports call it.
        ball: the set that u is taken from.
        ascent: how it is searched.
        scale: T, fixed at the centre weights (:mod:`robustflat.perturb.scales`).
        parameters: which are moved: "all", "matrices", "norm", "no_norm" or "re:PATTERN".
        statistics: which outer forward passes update BatchNorm's running statistics and every
            other buffer: the one at the "perturbed" weights (AWP's released code), the one at the
            "centre" (SAM's), or "both" (ASAM's, AMP's). Further ascent passes never do.
        direction: what to climb along in place of the last gradient; nothing stays put.
        blind: whether ``direction`` looks at the memory alone, so that no ascent gradient is taken.
        combine: makes the descent gradient from all that were taken; None descends the last.
        remember: makes what the next step remembers, after the descent gradient is known.
        counts: whether a rule looks at the number of the step.
        climbed: the loss of the ascent, from the losses of the rows; their mean if None.
        descended: likewise of the descent.
        every: the ascent is made in every so many steps only, the first included.
        batches: number of batches whose mean loss is climbed; above 1 the closure takes the index
            of a batch, and batch 0 is descended (n-SAM).
        sync: with DistributedDataParallel, whether each process climbs the loss of its own rows
            ("local", m-sharpness) or all climb that of the whole batch ("global": N processes
            equal one; random starts need generators of the same seed).
    """

    name: str
    ball: Ball
    ascent: Ascent
    scale: Scale = one
    parameters: str = "all"
    statistics: Statistics = "perturbed"
    direction: Rule | None = None
    blind: bool = False
    combine: Rule | None = None
    remember: Rule | None = None
    counts: bool = False
    climbed: Choice | None = None
    descended: Choice | None = None
    every: int = 1
    batches: int = 1
    sync: Sync = "local"
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_selection(self.parameters)
        for option, allowed, meaning in (
            ("statistics", STATISTICS, "it names the outer forward passes that update BatchNorm"),
            ("sync", ("local", "global"), "it says whose loss each process climbs"),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(
                    f"{option} must be one of {allowed}, got {getattr(self, option)!r}: {meaning}."
                )
        if self.batches < 1:
            raise ValueError(
                f"{self.name} climbs the mean loss of `batches` batches and needs at least 1, "
                f"got {self.batches}."
            )
        if self.batches > 1 and (self.wants_rows or self.remembers):
            raise ValueError(
                f"{self.name} chooses examples, or remembers, by the one batch of its step, so it "
                f"cannot climb {self.batches} batches together. Use batches=1, or sam."
            )
        if self.sync == "global" and self.descended is not None:
            raise ValueError(
                f"{self.name} chooses examples by comparing those of one process, so its processes "
                "cannot equal one. Use sync='local'."
            )
        if self.every < 1:
            raise ValueError(f"{self.name} ascends `every` so many steps, got {self.every}.")
        check_projection(self.ball, self.ascent)
        if self.ball.radius > 0 and self.statistics != "perturbed" and not self._sees_centre:
            raise ValueError(
                f"{self.name} never evaluates the loss at the centre weights, so statistics="
                f"{self.statistics!r} cannot be had. Use statistics='perturbed', or an ascent "
                "of at least one step from start='zero'."
            )

    @property
    def is_off(self) -> bool:
        """Whether the radius is zero, so that nothing is perturbed and nothing extra computed."""
        return self.ball.radius == 0

    @property
    def wants_rows(self) -> bool:
        """Whether the closure must return one loss a row, ``[N]``."""
        return self.climbed is not None or self.descended is not None

    @property
    def passes(self) -> int:
        """Forward and backward passes of the next :meth:`backward`; the last is the descent."""
        if self.is_off or not self._ascends:
            return 1
        climbs = 0 if self.blind else self.ascent.steps + (self.ascent.keep == "best")
        apart = self.combine is not None and not self._begins_at_centre
        return (climbs + apart) * self.batches + 1

    @property
    def remembers(self) -> bool:
        """Whether a step depends on the steps before it, so that this object serves one model."""
        return self.remember is not None or self.counts or self.every > 1

    def scaled(self, factor: float) -> WeightPerturbation:
        """The same method, its memory included, with ``factor`` times the radius."""
        return replace(self, ball=replace(self.ball, radius=self.ball.radius * factor))

    def synchronised(self, sync: Sync) -> WeightPerturbation:
        """The same method, its memory included, with another ``sync``."""
        return replace(self, sync=sync)

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers from step to step; empty for one that does not."""
        return self.memory.state_dict() if self.remembers else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: if it is the state of another kind of method.
        """
        if bool(state) != self.remembers:
            has, needs = ("none", "one") if self.remembers else ("one", "none")
            raise ValueError(f"{self.name} has {needs} memory, and the state given holds {has}.")
        if state:
            self.memory.load_state_dict(state)

    def to(self, device: torch.device | str) -> WeightPerturbation:
        """Move what is remembered; returns this object."""
        self.memory.to(device)
        return self

    def backward(
        self,
        loss: Loss,
        model: nn.Module,
        *,
        rows: int | None = None,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
        step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Add the gradient of ``loss`` at the perturbed weights to ``.grad``.

        As after ``loss.backward()``, whatever ``.grad`` held stays part of it: call
        ``optimizer.zero_grad()`` between steps. The weights are bit for bit what they were;
        buffers change only as ``statistics`` says.

        Args:
            loss: computes the loss from ``model``'s present weights, with gradient; no arguments
                (with ``batches > 1``, the index of a batch). A scalar, or one loss a row ``[N]``,
                whose mean is meant. It is called ``passes`` times.
            model: holds the parameters. With DistributedDataParallel see ``sync``; the descent
                gradient is averaged, unless under ``no_sync()``.
            rows: not needed here; see :class:`robustflat.msam`.
            generator: source of randomness, on the model's device.
            scaler: a gradient scaler for float16; ``.grad`` is then scaled. An overflow in either
                pass reaches ``.grad``, so the scaler skips the step, and nothing is remembered.
            step: called while the weights stand perturbed, with ``.grad`` ready; its change is
                carried over to the centre. ``optimizer.step`` here gives the order of AWP's
                released code, in which weight decay acts on the perturbed weights.

        Returns:
            The loss at the perturbed weights, a detached scalar.

        Raises:
            ValueError: if the selection fits no trainable parameter, the closure returns no rows
                where they are needed, or the model's wrapper makes several passes go wrong.
        """
        with self._ascended(loss, model, generator, scaler, carry=step is not None) as trail:
            if trail is None or not self._rewrites:
                value = self._value(self._closures(loss)[0](), self.descended, trail)
                (value if scaler is None else scaler.scale(value)).backward()
            else:
                value = self._rewritten(loss, model, trail, scaler)
            self._show(value, model, trail, scaler)
            if step is not None:
                step()
            found = value.detach()
        if trail is not None and self.remembers:
            self._keep(trail, model, careful=scaler is not None)
        return found

    @contextmanager
    def perturbed(
        self, loss: Loss, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """Hold the weights at their worst while the context lasts; see :meth:`backward`.

        Run forward *and* backward inside. On exit, whatever happened, every weight is restored bit
        for bit.

        This is the perturbation alone: what a method does to the gradient afterwards (GSAM, GNP),
        or remembers of the step, is :meth:`backward`'s.
        """
        with self._ascended(loss, model, generator, None, carry=False):
            yield

    @property
    def _rewrites(self) -> bool:
        """Whether the descended gradient must be known by itself."""
        return self.combine is not None or self.remember is not None

    @property
    def _begins_at_centre(self) -> bool:
        return self.ascent.start == "zero" and self.ascent.steps > 0 and not self.blind

    @property
    def _sees_centre(self) -> bool:
        return self._begins_at_centre or self.combine is not None

    @property
    def _ascends(self) -> bool:
        return self.memory.steps % self.every == 0

    @contextmanager
    def _ascended(
        self,
        loss: Loss,
        model: nn.Module,
        generator: torch.Generator | None,
        scaler: torch.amp.GradScaler | None,
        *,
        carry: bool,
    ) -> Iterator[Trail | None]:
        """Yield, at the perturbed weights, what was found on the way there."""
        if self.is_off:
            with buffers_kept(model, on_error_only=True):
                yield None
            return
        gradients.check_wrapper(model)
        with parts_only(model), buffers_kept(model, on_error_only=True):
            check_sharded(self, model, scaled=scaler is not None)
            chosen = select(gradients.bare(model), self.parameters)
            trail = Trail(generator=generator)
            if self.remembers:
                trail.memory = self.memory.recall(list(chosen.values()))
                trail.step = self.memory.steps
            if not self._ascends:
                yield trail
                return
            with displaced(chosen.values(), carry=carry) as move:
                self._climb(loss, model, chosen, move, trail, scaler)
                with buffers_kept(model) if self.statistics == "centre" else nullcontext():
                    yield trail

    def _climb(
        self,
        loss: Loss,
        model: nn.Module,
        chosen: dict[str, nn.Parameter],
        move: Move,
        trail: Trail,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Move the weights to where the ascent ends.

        Nothing of the size of the weights outlives this call but the gradients that a rule needs.
        """
        parameters = list(chosen.values())
        weights = [gradients.precise(p.detach()) for p in parameters]
        scale = self.scale(list(chosen), weights)
        # Zeros, or nan where a gradient overflowed: the sign of an infinite number hides it.
        overflow: list[Tensor] = []
        at_centre = True

        def gradient_here() -> tuple[Tensor, list[Tensor]]:
            nonlocal at_centre
            centre, at_centre = at_centre, False
            value, gradient = self._gradient(loss, model, parameters, trail, scaler, centre)
            if scaler is not None:
                overflow.extend(g.sum() * 0 for g in gradient)
            if self.direction or self._rewrites:
                trail.gradients.append(gradient)
            return value, gradient

        def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            if not at_centre and not self.blind:
                move(_times(u, scale))
            value, gradient = (u[0].new_zeros(()), u) if self.blind else gradient_here()
            if self.direction is not None:
                gradient = self.direction(trail) or [torch.zeros_like(t) for t in u]
            return value, _times(gradient, scale)

        if not self._begins_at_centre:
            if self.combine is not None:
                gradient_here()
            at_centre = False
        u = maximise(value_and_grad, self.ball, self.ascent, weights, trail.generator)
        if overflow:
            u = list(torch._foreach_add(u, [torch.stack(overflow).sum()] * len(u)))
        delta = _times(u, scale)
        watch = watching()
        if watch is not None:  # before the move: `weights` are the parameters themselves
            watch.perturbed(list(chosen), weights, delta)
        move(delta)
        if not self._rewrites:
            trail.gradients.clear()  # a copy of the weights' size that the descent needs not

    def _closures(self, loss: Loss) -> list[Callable[[], Tensor]]:
        if self.batches == 1:
            return [loss]
        return [partial(loss, i) for i in range(self.batches)]

    def _value(self, found: Tensor, choice: Choice | None, trail: Trail | None) -> Tensor:
        """The scalar that a closure's result stands for."""
        if trail is None or not self.wants_rows:
            return found.mean() if found.ndim else found
        if found.ndim != 1:
            raise ValueError(
                f"{self.name} chooses examples by their losses and needs a closure that returns "
                f"one loss a row, [N], got a tensor of shape {tuple(found.shape)}. Use "
                "reduction='none' in the loss."
            )
        trail.losses.append(found.detach())
        return found.mean() if choice is None else choice(found, trail)

    def _climbed_value(self, closure: Callable[[], Tensor], trail: Trail) -> Tensor:
        return self._value(closure(), self.climbed, trail)

    def _gradient(
        self,
        loss: Loss,
        model: nn.Module,
        parameters: list[nn.Parameter],
        trail: Trail,
        scaler: torch.amp.GradScaler | None,
        centre: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss of all batches and its gradient; over all processes if so asked.

        At the ``centre`` the forward pass of the first batch, the descended one, may be one that
        updates buffers.
        """
        updates = centre and self.statistics != "perturbed"
        values: list[Tensor] = []
        total: list[Tensor] = []
        for i, closure in enumerate(self._closures(loss)):
            value, gradient = gradients.take(
                partial(self._climbed_value, closure, trail),
                model,
                parameters,
                scaler,
                updates=updates and i == 0,
            )
            values.append(value)
            # Not in place: autograd may return one tensor for two parameters.
            total = list(torch._foreach_add(total, gradient)) if total else gradient
        if len(values) > 1:
            total = list(torch._foreach_div(total, len(values)))
        mean = torch.stack(values).mean()
        if self.sync == "global":
            total = gradients.average_climbed(model, mean, total)
        watch = watching()
        if watch is not None:  # of the first batch, the one that is descended
            of_all = trail.losses[-1].mean() if self.wants_rows else values[0]
            watch.ascended(of_all, total, at_centre=centre)
        return mean, total

    def _rewritten(
        self,
        loss: Loss,
        model: nn.Module,
        trail: Trail,
        scaler: torch.amp.GradScaler | None,
    ) -> Tensor:
        """Descend what ``combine`` makes of the gradients, each process of its own, then averaged.

        With ``sync="global"`` those at the perturbed weights are averaged first, as the others
        were, so that every process combines the same.
        """
        chosen = list(select(gradients.bare(model), self.parameters).values())
        with gradients.set_aside(model):
            with gradients.unsynchronised(model):
                value = self._value(self._closures(loss)[0](), self.descended, trail)
                (value if scaler is None else scaler.scale(value)).backward()
            if self.sync == "global" and isinstance(model, DistributedDataParallel):
                gradients.average_grads(model)
            found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in chosen]
            found = [gradients.precise(g) for g in found]
            trail.gradients.append(gradients.unscaled(found, scaler))
            if self.combine is not None:
                self._write(chosen, self.combine(trail), scaler)
        if gradients.synchronises(model):
            gradients.average_grads(model)
        return value

    def _show(
        self,
        value: Tensor,
        model: nn.Module,
        trail: Trail | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Show the descent to whoever watches."""
        watch = watching()
        if watch is None:
            return
        moved = trail is not None and self._ascends
        if moved and trail is not None and self._rewrites:
            gradient = trail.gradients[-1]
        else:
            chosen = list(select(gradients.bare(model), self.parameters).values())
            gradient = gradients.unscaled(gradients_of(chosen), scaler)
        if trail is not None and self.wants_rows:
            value = trail.losses[-1].mean()
        watch.descended(value, gradient, perturbed=moved)

    @staticmethod
    @torch.no_grad()
    def _write(
        chosen: list[nn.Parameter], gradient: list[Tensor], scaler: torch.amp.GradScaler | None
    ) -> None:
        if scaler is not None:
            unit = scaler.scale(torch.ones((), device=gradient[0].device))
            gradient = list(torch._foreach_mul(gradient, unit))
        for parameter, g in zip(chosen, gradient, strict=True):
            if parameter.grad is not None:  # a zero gradient would let weight decay move it
                # A copy: `.grad` is averaged and clipped, and a rule may yet look at the trail.
                parameter.grad = placed(g, parameter).to(parameter.dtype, copy=True)

    @torch.no_grad()
    def _keep(self, trail: Trail, model: nn.Module, *, careful: bool) -> None:
        """Remember the step; ``careful``: not if it overflowed, which waits for the device.

        All processes remember the same, and agree on whether they do.
        """
        new = [] if self.remember is None else self.remember(trail)
        finite = []
        if careful:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms = torch.stack(torch._foreach_norm(grads))
            finite = [norms.sum().isfinite().to(norms.dtype)]
        if isinstance(model, DistributedDataParallel):
            new = [t.clone() for t in new]
            gradients.average([*new, *finite])
        if careful and finite[0] < 1:
            return
        self.memory.tensors = new if self.remember is not None else None
        self.memory.steps += 1


def _times(u: list[Tensor], scale: list[Tensor] | None) -> list[Tensor]:
    return u if scale is None else list(torch._foreach_mul(u, scale))
