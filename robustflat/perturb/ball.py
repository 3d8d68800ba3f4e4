"""The geometry of a perturbation: lp balls over rows, tensors or all tensors at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Group = Literal["row", "tensor", "global"]
Norm = str | float
GROUPS: tuple[Group, ...] = ("row", "tensor", "global")
_NORM_NAMES = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


def parse_norm(norm: Norm) -> float:
    """The exponent p of a norm named ``"linf"``, ``"l2"``, ``"l1"`` or given as a number.

    Raises:
        ValueError: if ``norm`` is neither such a name nor a number in [1, inf].
    """
    p = _NORM_NAMES.get(norm.lower()) if isinstance(norm, str) else float(norm)
    if p is None or not p >= 1:
        raise ValueError(
            f"A norm must be 'linf', 'l2', 'l1' or a number p in [1, inf], got {norm!r}: below "
            "p = 1 the ball is not convex and has no steepest step. Choose one of these."
        )
    return p


@dataclass(frozen=True)
class Ball:
    """The set of ``u`` (a list of tensors) whose every group has p-norm at most ``radius``.

    A group is one *row* (the slice of a tensor at one index of its first dimension: a sample of a
    batch, a filter of a weight; a tensor of at most one dimension is one row), one *tensor*, or
    all tensors together (*global*). Every method takes and returns lists of tensors, never waits
    for the device, and treats groups independently of each other.

    Args:
        norm: p in [1, inf].
        radius: at least 0, in the units of ``u``.
        group: "row", "tensor" or "global".
    """

    norm: float
    radius: float
    group: Group = "row"

    def __post_init__(self) -> None:
        parse_norm(self.norm)
        if not (0 <= self.radius < math.inf):
            raise ValueError(
                f"A ball's radius must be a finite number >= 0, got {self.radius!r}. "
                "Use 0 to switch a perturbation off."
            )
        if self.group not in GROUPS:
            raise ValueError(f"A ball's group must be one of {GROUPS}, got {self.group!r}.")

    def size(self, u: list[Tensor]) -> list[Tensor]:
        """The p-norm of every group, one tensor for each of ``u`` that broadcasts against it."""
        return self._sizes(u, self.norm)

    def steepest(self, g: list[Tensor]) -> list[Tensor]:
        """The ``s`` with ``size(s) == 1`` that maximises ``<g, s>`` in every group; 0 where g is 0.

        With q the dual exponent, s = sign(g) |g|^(q-1) / || |g|^(q-1) ||_p (Foret et al. 2021,
        eq. 2): the sign for p = inf, g / ||g|| for p = 2, the largest entry alone for p = 1
        (shared evenly where several tie). The maximum ``<g, s>`` is the dual norm ||g||_q.
        """
        if self.norm == math.inf:
            return list(torch._foreach_sign(g))
        # Dividing by the largest entry first keeps the powers from under- or overflowing.
        s = _divide(g, self._sizes(g, math.inf))
        if self.norm == 1:
            s = [t.sign() * (t.abs() == 1) for t in s]
        elif self.norm != 2:
            powers = torch._foreach_pow(torch._foreach_abs(s), 1 / (self.norm - 1))
            s = list(torch._foreach_mul(torch._foreach_sign(s), powers))
        return _divide(s, self._sizes(s, self.norm))

    def project(self, u: list[Tensor]) -> list[Tensor]:
        """The nearest point of the ball in Euclidean distance; the identity, bit for bit, inside.

        Raises:
            ValueError: for p other than 1, 2 and inf, where no closed form exists.
        """
        if self.radius == 0:
            return [torch.zeros_like(t) for t in u]
        if self.norm == math.inf:
            return list(
                torch._foreach_clamp_min(torch._foreach_clamp_max(u, self.radius), -self.radius)
            )
        if self.norm == 2:
            excess = torch._foreach_div(self.size(u), self.radius)
            return list(torch._foreach_div(u, torch._foreach_clamp_min(excess, 1)))
        if self.norm == 1:
            return self._map_rows(u, self._shrink)
        raise ValueError(
            f"Projection onto an lp ball has no closed form for p = {self.norm}. Use p = 1, 2 or "
            "inf, or steps from zero whose sizes add up to at most one radius (then nothing "
            "leaves the ball and nothing is projected)."
        )

    def sample(
        self, like: list[Tensor], generator: torch.Generator | None = None, surface: bool = False
    ) -> list[Tensor]:
        """Points drawn uniformly from the ball, independently for every group.

        Coordinates are drawn with density proportional to exp(-|x|^p), scaled to the sphere and,
        for the ball's inside, by U^(1/dimension) (Barthe et al. 2005).

        Args:
            like: gives shapes, dtypes and devices.
            generator: source of randomness, on the device of ``like``.
            surface: draw from the sphere instead (for p other than 2 and inf: the cone measure).
        """
        u = [_generalised_normal(t, self.norm, generator) for t in like]
        if not (surface or self.norm == math.inf):
            shares = self._uniform_shares(u, generator)
            u = list(torch._foreach_mul(_divide(u, self.size(u)), shares))
        elif surface:
            u = _divide(u, self.size(u))
        return list(torch._foreach_mul(u, self.radius))

    def _sizes(self, u: list[Tensor], p: float) -> list[Tensor]:
        if self.group == "row":
            return [_row_norm(t, p) for t in u]
        norms = tensor_norms(u, p)
        if self.group == "tensor":
            return norms
        total = torch.linalg.vector_norm(torch.stack(norms), p)
        return [total] * len(u)

    def _uniform_shares(self, u: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
        """U^(1/d) for every group of d coordinates, broadcastable like ``size``."""
        sizes = self.size(u)
        if self.group == "global":
            total = sum(t.numel() for t in u)
            return [_uniform(sizes[0], generator) ** (1 / total)] * len(u)
        counts = [t.numel() / max(size.numel(), 1) for t, size in zip(u, sizes, strict=True)]
        return [
            _uniform(s, generator) ** (1 / max(n, 1)) for s, n in zip(sizes, counts, strict=True)
        ]

    def _map_rows(self, u: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Apply ``function`` to every group laid out as one row of a matrix."""
        if self.group == "global":
            flat = function(torch.cat([t.flatten() for t in u]).unsqueeze(0)).squeeze(0)
            parts = flat.split([t.numel() for t in u])
            return [part.view(t.shape) for part, t in zip(parts, u, strict=True)]
        whole = self.group == "tensor"
        return [
            function(t.reshape(1 if whole or t.ndim < 2 else t.shape[0], -1)).view(t.shape)
            for t in u
        ]

    def _shrink(self, rows: Tensor) -> Tensor:
        """Project rows ``[G, D]`` onto the l1 ball by soft thresholding (Duchi et al. 2008)."""
        ordered = rows.abs().sort(dim=1, descending=True).values
        counts = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)
        # The threshold is the largest of these ratios, here relative to the largest entry: a
        # radius far below that entry would be lost to rounding.
        top = ordered[:, :1]
        thresholds = ((ordered - top).cumsum(1) - self.radius) / counts
        threshold = thresholds.amax(dim=1, keepdim=True)
        shrunk = torch.copysign((rows.abs() - top - threshold).clamp_min(0), rows)
        return torch.where(top + threshold > 0, shrunk, rows)


def tensor_norms(u: list[Any], p: float = 2) -> list[Tensor]:
    """The p-norm of every tensor; of a DTensor, parts of which may be empty, that of the whole."""
    if not hasattr(u[0], "device_mesh"):
        return list(torch._foreach_norm(u, p))
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = u[0].device_mesh
    # What was computed may be cut otherwise than the rest, or whole in every process.
    cut = next((t.placements for t in u if any(p.is_shard() for p in t.placements)), None)
    cut = cut or u[0].placements
    held = [(t if t.placements == cut else t.redistribute(mesh, cut)).to_local() for t in u]
    placements = [Shard(0) if p.is_shard() else Replicate() for p in cut]
    own = torch.stack([torch.linalg.vector_norm(t, p) if t.numel() else t.sum() for t in held])
    # One row a process: all norms in one exchange.
    table = DTensor.from_local(own.unsqueeze(0), mesh, placements, run_check=False)
    together = torch.linalg.vector_norm(table, p, dim=0)
    return list(together.redistribute(mesh, [Replicate()] * mesh.ndim).unbind())


def _row_norm(t: Tensor, p: float) -> Tensor:
    if t.ndim < 2:
        return tensor_norms([t], p)[0]
    return torch.linalg.vector_norm(t, p, dim=tuple(range(1, t.ndim)), keepdim=True)


def _divide(u: list[Tensor], sizes: list[Tensor]) -> list[Tensor]:
    """``u / sizes``, and exactly 0 for a group of size 0."""
    tiny = min(torch.finfo(t.dtype).tiny for t in u)
    return list(torch._foreach_div(u, torch._foreach_clamp_min(sizes, tiny)))


def drawn(like: Any, fill: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``fill`` makes of an empty tensor like ``like``.

    Where processes hold parts of it (a DTensor), the first one draws the whole, as one alone would.
    """
    if not hasattr(like, "device_mesh"):
        return fill(torch.empty_like(like))
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = fill(torch.empty(like.shape, dtype=like.dtype, device=like.device))
    placements = [Replicate() if p.is_partial() else p for p in like.placements]
    return distribute_tensor(whole, like.device_mesh, placements)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return drawn(like, lambda t: t.uniform_(generator=generator))


def _generalised_normal(like: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Independent coordinates with density proportional to exp(-|x|^p) (p = inf: uniform)."""
    if p == 2:
        return drawn(like, lambda t: t.normal_(generator=generator))
    if p == math.inf:
        return drawn(like, lambda t: t.uniform_(-1, 1, generator=generator))

    def fill(t: Tensor) -> Tensor:
        # Gamma variates are not drawn in half precision.
        shape = torch.full_like(t, 1 / p, dtype=torch.promote_types(t.dtype, torch.float32))
        magnitude = torch._standard_gamma(shape, generator=generator) ** (1 / p)
        return torch.copysign(magnitude, _uniform(t, generator) - 0.5).to(t.dtype)

    return drawn(like, fill)
