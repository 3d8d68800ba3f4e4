"""What a step shows of itself to whoever watches: values taken in passing, left on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.perturb.ball import tensor_norms

_watching: ContextVar[Watch | None] = ContextVar("watching", default=None)


class Watch:
    """Gathers the values of steps, with no further pass and without waiting for the device.

    While a step is looked at, the gradient of the first ascent step outlives the ascent, one copy
    of the weights; the perturbation outlives the step before one that is looked at, so that the
    two can be compared. Use it in any loop::

        watch = rf.Watch()
        with watch.step():
            value = weights.backward(closure, model)
        watch.values["rise"]

    Where values are noted several times in a step (by the chunks of mSAM), their mean is meant.
    Among processes each sees its own rows and, with ``sync="local"``, its own ascent gradient; the
    descent gradient is that of all, as DistributedDataParallel leaves it. A run tells the mean over
    its processes: of losses and of what the attack shows, the figure of the whole batch.

    ==========================  ==============================================================
    ``loss/centre``             what is climbed, at the centre weights, if these are visited
    ``loss/perturbed``          what is descended, at the perturbed weights
    ``rise``                    the difference of the two
    ``gradient_norm/ascent``    L2 norm of the first ascent gradient
    ``gradient_norm/descent``   L2 norm of the gradient that is descended, over the same weights
    ``cosine/gradients``        of these two
    ``cosine/successive``       of the perturbation and that of the step before
    ``perturbation``            its L2 norm relative to that of the weights that it moves
    ``layers/NAME``             the same of each tensor of two dimensions or more
    ``attack/loss/K``           what the attack climbs, before its step K; mean of the images
    ``attack/broken``           share of the attacked images misclassified by the first pass of
                                the step that sees them, in train mode
    ==========================  ==============================================================
    """

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}
        self._looks = False
        self._keeps = False
        self._before: list[Tensor] = []
        self._now: list[Tensor] = []
        self._ascent: list[Tensor] = []

    @contextmanager
    def step(self, *, looks: bool = True, keeps: bool = True) -> Iterator[None]:
        """Watch one step.

        Args:
            looks: whether to take its values.
            keeps: whether to keep its perturbation for the next one.
        """
        self._found, self._looks, self._keeps = {}, looks, keeps
        token = _watching.set(self if looks or keeps else None)
        try:
            yield
        finally:
            _watching.reset(token)
            self._before, self._now, self._ascent = self._now, [], []

    @property
    def values(self) -> dict[str, Tensor]:
        """What was seen of the last step, by name: scalars on the device."""
        found = {
            name: noted[0] if len(noted) == 1 else torch.stack(noted).mean()
            for name, noted in self._found.items()
        }
        if "loss/centre" in found and "loss/perturbed" in found:
            found["rise"] = found["loss/perturbed"] - found["loss/centre"]
        return found

    def note(self, name: str, value: Any) -> None:
        """Note a scalar, if this step is looked at."""
        if self._looks:
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            self._found.setdefault(name, []).append(value.detach())

    @torch.no_grad()
    def ascended(self, value: Tensor, gradient: list[Tensor], *, at_centre: bool) -> None:
        """An ascent gradient was taken; the first of a step, or of a chunk, is compared."""
        if not self._looks or self._ascent:
            return
        if at_centre:
            self.note("loss/centre", value)
        self._ascent = gradient
        self.note("gradient_norm/ascent", norm(gradient))

    @torch.no_grad()
    def perturbed(self, names: list[str], weights: list[Tensor], delta: list[Tensor]) -> None:
        """The weights stand perturbed by ``delta`` from ``weights``."""
        if self._looks:
            sizes = tensor_norms(delta), tensor_norms(weights)
            tiny = torch.finfo(delta[0].dtype).tiny
            whole = [torch.linalg.vector_norm(torch.stack(part)) for part in sizes]
            self.note("perturbation", whole[0] / whole[1].clamp_min(tiny))
            relative = torch.stack(sizes[0]) / torch.stack(sizes[1]).clamp_min(tiny)
            for name, weight, size in zip(names, weights, relative.unbind(), strict=True):
                if weight.ndim > 1:
                    self.note(f"layers/{name}", size)
            if [t.shape for t in self._before] == [t.shape for t in delta] and not self._now:
                self.note("cosine/successive", cosine(self._before, delta))
        if self._keeps and not self._now:
            self._now = delta

    @torch.no_grad()
    def descended(self, value: Tensor, gradient: list[Tensor], *, perturbed: bool) -> None:
        """The gradient to descend was taken, of the same tensors as the perturbation."""
        if not self._looks:
            return
        self.note("loss/perturbed" if perturbed else "loss/centre", value)
        if self._ascent:
            self.note("cosine/gradients", cosine(self._ascent, gradient))
        self._ascent = []
        self.note("gradient_norm/descent", norm(gradient))

    @torch.no_grad()
    def classified(self, logits: Tensor, y: Tensor) -> None:
        """The attacked images were seen; labels are ``[N]``, or soft ``[N, C]``."""
        if self._looks and "attack/broken" not in self._found:
            right = y.argmax(1) if y.is_floating_point() else y
            self.note("attack/broken", (logits.argmax(1) != right).float().mean())


def watching() -> Watch | None:
    """Who watches the present step."""
    return _watching.get()


def norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of all together."""
    return torch.linalg.vector_norm(torch.stack(tensor_norms(tensors)))


def cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The cosine of the angle between two lists of tensors; 0 where one is zero."""
    inner = torch.stack([t.sum() for t in torch._foreach_mul(a, b)]).sum()
    lengths = norm(a) * norm(b)
    return inner / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


def gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Their ``.grad``, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
