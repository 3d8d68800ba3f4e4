"""Weight perturbations: gradient estimators that climb the training loss over a ball of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustflat.perturb.ascent import Ascent, check_projection, maximise
from robustflat.perturb.ball import Ball
from robustflat.perturb.displace import Move, buffers_kept, displaced
from robustflat.perturb.scales import Scale, check_selection, one, select

Statistics = Literal["perturbed", "centre", "both"]
STATISTICS: tuple[Statistics, ...] = ("perturbed", "centre", "both")
Loss = Callable[..., Tensor]
# From the gradients at the centre and at the perturbed weights to the one to descend.
Combine = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class WeightPerturbation:
    """The worst weights near the present ones, and the gradient there.

    The perturbation is delta = T * u with u in ``ball``; the ascent climbs the very closure whose
    gradient is then taken. It is a gradient estimator, not an optimizer: after :meth:`backward`
    take the step of any optimizer.

    Args:
        name: as YAML and reports call it.
        ball: the set that u is taken from.
        ascent: how it is searched.
        scale: T, fixed at the centre weights (:mod:`robustflat.perturb.scales`).
        parameters: which are moved: "all", "matrices" or "re:PATTERN".
        statistics: which outer forward passes update BatchNorm's running statistics and every
            other buffer: the one at the "perturbed" weights (AWP's released code), the one at the
            "centre" (SAM's), or "both" (ASAM's, AMP's). Further ascent passes never do.
        combine: makes the descent gradient from the gradients at the centre and at the perturbed
            weights (GSAM); None descends the latter.
        batches: number of batches whose mean loss is climbed; above 1 the closure takes the index
            of a batch, and batch 0 is descended (n-SAM).
    """

    name: str
    ball: Ball
    ascent: Ascent
    scale: Scale = one
    parameters: str = "all"
    statistics: Statistics = "perturbed"
    combine: Combine | None = None
    batches: int = 1

    def __post_init__(self) -> None:
        check_selection(self.parameters)
        if self.statistics not in STATISTICS:
            raise ValueError(
                f"statistics must be one of {STATISTICS}, got {self.statistics!r}: it names the "
                "outer forward passes that update BatchNorm."
            )
        if self.batches < 1:
            raise ValueError(
                f"{self.name} climbs the mean loss of `batches` batches and needs at least 1, "
                f"got {self.batches}."
            )
        check_projection(self.ball, self.ascent)
        visits_centre = self.ascent.steps > 0 and self.ascent.start == "zero"
        if self.ball.radius > 0 and not visits_centre:
            if self.statistics != "perturbed":
                raise ValueError(
                    f"{self.name} never evaluates the loss at the centre weights, so statistics="
                    f"{self.statistics!r} cannot be had. Use statistics='perturbed', or an ascent "
                    "of at least one step from start='zero'."
                )
            if self.combine is not None:
                raise ValueError(
                    f"{self.name} combines the gradient at the perturbed weights with the one at "
                    "the centre, so its ascent needs at least one step from start='zero'."
                )

    @property
    def is_off(self) -> bool:
        """Whether the radius is zero, so that nothing is perturbed and nothing extra computed."""
        return self.ball.radius == 0

    def backward(
        self,
        loss: Loss,
        model: nn.Module,
        *,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
        step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Leave the gradient of ``loss`` at the perturbed weights in ``.grad``.

        Whatever ``.grad`` held is replaced, not added to. The weights are bit for bit what they
        were; buffers change only as ``statistics`` says.

        Args:
            loss: computes the scalar loss from ``model``'s present weights, with gradient; no
                arguments (with ``batches > 1``, the index of a batch). It is called once for every
                ascent step and once for the descent.
            model: holds the parameters. With DistributedDataParallel each process finds its own
                perturbation from its own rows (m-sharpness) and the descent gradient is averaged.
            generator: source of randomness for a random start, on the model's device.
            scaler: a gradient scaler for float16; ``.grad`` is then scaled. An overflow in either
                pass reaches ``.grad``, so the scaler skips the step.
            step: called while the weights stand perturbed, with ``.grad`` ready; its change is
                carried over to the centre. ``optimizer.step`` here gives the order of AWP's
                released code, in which weight decay acts on the perturbed weights.

        Returns:
            The loss at the perturbed weights, a detached scalar.

        Raises:
            ValueError: if the selection fits no trainable parameter.
        """
        with self._ascended(loss, model, generator, scaler, carry=step is not None) as centre:
            for parameter in model.parameters():
                parameter.grad = None
            # A combined gradient is made from each process's own, then averaged.
            local = self.combine is not None and isinstance(model, DistributedDataParallel)
            with _unsynchronised(model) if local else nullcontext():
                value = self._closures(loss)[0]()
                (value if scaler is None else scaler.scale(value)).backward()
            if self.combine is not None and centre:
                self._combine_into_grad(model, centre, scaler)
                if local:
                    _average_gradients(model)
            if step is not None:
                step()
        return value.detach()

    @contextmanager
    def perturbed(
        self, loss: Loss, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """Hold the weights at their worst while the context lasts; see :meth:`backward`.

        Run forward *and* backward inside. On exit, whatever happened, every weight is restored bit
        for bit.
        """
        with self._ascended(loss, model, generator, None, carry=False):
            yield

    @contextmanager
    def _ascended(
        self,
        loss: Loss,
        model: nn.Module,
        generator: torch.Generator | None,
        scaler: torch.amp.GradScaler | None,
        *,
        carry: bool,
    ) -> Iterator[list[Tensor]]:
        """Yield, at the perturbed weights, the gradients at the centre (if they are needed)."""
        if self.is_off:
            yield []
            return
        chosen = select(_bare(model), self.parameters)
        with (
            buffers_kept(model, on_error_only=True),
            displaced(chosen.values(), carry=carry) as move,
        ):
            centre = self._climb(loss, model, chosen, move, generator, scaler)
            with buffers_kept(model) if self.statistics == "centre" else nullcontext():
                yield centre

    def _climb(
        self,
        loss: Loss,
        model: nn.Module,
        chosen: dict[str, nn.Parameter],
        move: Move,
        generator: torch.Generator | None,
        scaler: torch.amp.GradScaler | None,
    ) -> list[Tensor]:
        """Move the weights to where the ascent ends; return the gradients at the centre if needed.

        Nothing of the size of the weights outlives this call but what it returns.
        """
        parameters = list(chosen.values())
        weights = [_precise(p.detach()) for p in parameters]
        scale = self.scale(list(chosen), weights)
        centre: list[Tensor] = []
        # Zeros, or nan where a gradient overflowed: the sign of an infinite number hides it.
        overflow: list[Tensor] = []
        fresh = self.ascent.start == "zero"

        def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            nonlocal fresh
            at_centre, fresh = fresh, False
            if not at_centre:
                move(_times(u, scale))
            updates = at_centre and self.statistics != "perturbed"
            value, gradient = self._gradient(loss, model, parameters, scaler, updates)
            if scaler is not None:
                overflow.extend(g.sum() * 0 for g in gradient)
            if at_centre and self.combine is not None:
                centre.extend(gradient)
            return value, _times(gradient, scale)

        u = maximise(value_and_grad, self.ball, self.ascent, weights, generator)
        if overflow:
            u = list(torch._foreach_add(u, [torch.stack(overflow).sum()] * len(u)))
        move(_times(u, scale))
        return centre

    def _closures(self, loss: Loss) -> list[Callable[[], Tensor]]:
        if self.batches == 1:
            return [loss]
        return [partial(loss, i) for i in range(self.batches)]

    def _gradient(
        self,
        loss: Loss,
        model: nn.Module,
        parameters: list[nn.Parameter],
        scaler: torch.amp.GradScaler | None,
        updates: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss of all batches and its gradient: the only place that takes one to climb.

        ``updates`` lets the forward pass of the first batch, the descended one, update buffers.
        """
        values: list[Tensor] = []
        total: list[Tensor] = []
        for i, closure in enumerate(self._closures(loss)):
            keep = nullcontext() if updates and i == 0 else buffers_kept(model)
            with torch.enable_grad(), _unsynchronised(model), keep:
                value = closure()
                scaled = value if scaler is None else scaler.scale(value)
                found = torch.autograd.grad(scaled, parameters, allow_unused=True)
            gradient = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, found, strict=True)
            ]
            values.append(value.detach())
            if total:
                # Not in place: autograd may return one tensor for two parameters.
                total = list(torch._foreach_add(total, gradient))
            else:
                total = [_precise(g) for g in gradient]
        factor = values[0].new_tensor(float(len(values))) if len(values) > 1 else None
        if scaler is not None:
            unit = scaler.scale(torch.ones_like(values[0]))
            factor = unit if factor is None else unit * factor
        if factor is not None:
            total = list(torch._foreach_div(total, factor))
        return torch.stack(values).mean(), total

    def _combine_into_grad(
        self, model: nn.Module, centre: list[Tensor], scaler: torch.amp.GradScaler | None
    ) -> None:
        assert self.combine is not None
        pairs = [
            (p, g)
            for p, g in zip(select(_bare(model), self.parameters).values(), centre, strict=True)
            if p.grad is not None  # a zero gradient would let weight decay move it
        ]
        chosen, centre = [p for p, _ in pairs], [g for _, g in pairs]
        if scaler is not None:
            unit = scaler.scale(torch.ones((), device=centre[0].device))
            centre = list(torch._foreach_mul(centre, unit))
        perturbed = [_precise(p.grad) for p in chosen if p.grad is not None]
        for parameter, gradient in zip(chosen, self.combine(centre, perturbed), strict=True):
            parameter.grad = gradient.to(parameter.dtype)


def _bare(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters' names have no wrapper's prefix."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _precise(t: Tensor) -> Tensor:
    """``t``, in float32 where it is of lower precision: the ball's arithmetic needs it."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _times(u: list[Tensor], scale: list[Tensor] | None) -> list[Tensor]:
    return u if scale is None else list(torch._foreach_mul(u, scale))


def _unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    if not isinstance(model, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = model.no_sync()
    return context


def _average_gradients(model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient)
    torch._foreach_div_(gradients, dist.get_world_size())
