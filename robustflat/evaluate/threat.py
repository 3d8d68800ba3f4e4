"""Owns the threat: the ball in which an image may be changed, and how it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robustflat.errors import UserError
from robustflat.perturb import parse_norm


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What an attack may do to an image.

    Attributes:
        norm: p of the ball: 1, 2 or inf.
        eps: Its radius in image units.
    """

    norm: float
    eps: float

    @classmethod
    def of(cls, norm: str | float, eps: float) -> Threat:
        """A threat from a norm's name or exponent and a radius.

        Raises:
            UserError: If the norm is none of linf, l2, l1, or eps no finite number >= 0.
        """
        try:
            p = parse_norm(norm)
        except (ValueError, TypeError):
            p = 0.0
        if p not in (1.0, 2.0, math.inf):
            raise UserError(f"The norm must be 'linf', 'l2' or 'l1', got {norm!r}.")
        number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
        if not (number and 0 <= eps < math.inf):
            raise UserError(f"eps must be a finite number >= 0, in image units, got {eps!r}.")
        return cls(norm=p, eps=float(eps))

    @classmethod
    def said(cls, norm: str | float = "linf", eps: float | None = None) -> Threat:
        """The threat that arguments say: linf 8/255 if nothing is; a radius is one in its norm.

        Raises:
            UserError: As `of`; or if the norm is not linf and there is no radius.
        """
        if eps is None and cls.of(norm, 0.0).norm != math.inf:
            raise UserError(f"A radius is one in its norm: with norm={norm!r} say eps too.")
        return cls.of(norm, 8 / 255 if eps is None else eps)

    @property
    def norm_name(self) -> str:
        """The norm as it is written: "linf", "l2" or "l1"."""
        return norm_name(self.norm)

    def __str__(self) -> str:
        return f"{self.norm_name} {radius(self.eps)}"


@dataclass(frozen=True, kw_only=True)
class Task(Threat):
    """A threat, and what the attacks must know of the model and the images.

    Attributes:
        classes: Number of logits.
        shape: Of an image: channels, height, width.
    """

    classes: int
    shape: tuple[int, int, int]


def norm_name(norm: float) -> str:
    """The name of the exponent p: "linf", "l2" or "l1"."""
    return "linf" if math.isinf(norm) else f"l{norm:g}"


def radius(eps: float) -> str:
    """8/255 rather than 0.03137, where it is a whole number of levels."""
    levels = round(255 * eps)
    whole = 0 < levels <= 32 and math.isclose(255 * eps, levels, rel_tol=1e-6)
    return f"{levels}/255" if whole else f"{eps:g}"
