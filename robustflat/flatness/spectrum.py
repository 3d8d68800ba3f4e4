"""Owns Lanczos above Hessian-vector products: the spectrum's ends, and its quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness.closure import Closure

# Up to so many weights the whole Hessian is formed, which costs no more than Lanczos.
DENSE = 64
# Vectors of the Lanczos basis beyond the 2 k + 1 that k eigenvalues need. The largest stand apart
# and are found at once by few; the smallest are crowded, and more vectors save products.
_SPARE = {"top": 5, "bottom": 17}


class Hessian:
    """The Hessian of a closure's mean loss with respect to some weights, by products only."""

    def __init__(self, closure: Closure, parameters: dict[str, Any]) -> None:
        self.names = list(parameters)
        self.parameters: list[Tensor] = list(parameters.values())
        self.size = sum(p.numel() for p in self.parameters)
        self._closure = closure

    @property
    def dtype(self) -> torch.dtype:
        """Of its vectors."""
        return self.parameters[0].dtype

    def times(self, vector: list[Tensor]) -> list[Tensor]:
        """The product with a vector in the parameters' shapes."""
        return self._closure.hvps(self.parameters, [vector])[0]

    def times_all(self, vectors: list[list[Tensor]]) -> list[list[Tensor]]:
        """The products with several vectors, of which all are held at once."""
        return self._closure.hvps(self.parameters, vectors)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector in the parameters' shapes, dtype and place."""
        flat = flat.to(self.parameters[0].device, self.dtype)
        parts = torch.split(flat, [p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def flat_times(self, flat: Tensor) -> Tensor:
        """The product with a flat vector ``[D]``, where the parameters are."""
        return torch.cat([p.flatten() for p in self.times(self.split(flat))])

    def dense(self) -> np.ndarray[Any, Any]:
        """The whole matrix, symmetric to the last bit; for few weights."""
        columns = [self.flat_times(row) for row in torch.eye(self.size)]
        matrix = torch.stack(columns).cpu().double().numpy()
        result: np.ndarray[Any, Any] = (matrix + matrix.T) / 2
        return result


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Some eigenvalues at one end of a spectrum, the most extreme first.

    Attributes:
        values: ``[k]``, float64.
        vectors: ``[k, D]``, of unit length, where the parameters are.
        residuals: ``||H v - lambda v||``; an eigenvalue of H lies within this of each value.
        converged: whether all were found to the tolerance.
        products: Hessian-vector products spent.
    """

    values: np.ndarray[Any, Any]
    vectors: Tensor
    residuals: np.ndarray[Any, Any]
    converged: bool
    products: int


class Krylov:
    """An orthonormal basis in which a Hessian is projected, grown by one product at a time.

    Every product is orthogonalised twice against the whole basis, so that it stays orthonormal to
    rounding and no eigenvalue appears twice. The vectors stay where the parameters are.

    Args:
        hessian: products with it.
        start: ``[D]``, not zero.
        size: most vectors that are held.
    """

    def __init__(self, hessian: Hessian, start: Tensor, size: int) -> None:
        start = start.to(hessian.parameters[0].device, hessian.dtype)
        self._hessian = hessian
        self._vectors = start.new_empty(size + 1, len(start))
        self._vectors[0] = start / start.norm()
        self._projected = np.zeros((size, size))
        self.count = 0
        self.rest = math.inf  # what the last product has outside of the basis

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: all that a start holds was found."""
        scale = np.abs(self._projected[: self.count, : self.count]).max(initial=0.0)
        tiny = torch.finfo(self._hessian.dtype).eps * math.sqrt(len(self._vectors[0]))
        return self.count == len(self._vectors[0]) or self.rest <= tiny * scale

    def grow(self) -> None:
        """Take one product and add what it has outside of the basis."""
        at = self.count
        basis = self._vectors[: at + 1]
        product = self._hessian.flat_times(basis[at])
        along = torch.mv(basis, product)
        product = torch.addmv(product, basis.T, along, alpha=-1)
        again = torch.mv(basis, product)
        product = torch.addmv(product, basis.T, again, alpha=-1)
        column = (along + again).cpu().double().numpy()
        self._projected[at, : at + 1] = self._projected[: at + 1, at] = column
        self.rest = float(product.norm())
        self.count += 1
        self._vectors[at + 1] = product / max(self.rest, torch.finfo(product.dtype).tiny)

    def eigen(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ritz values, ascending, and their vectors in the basis, one a column."""
        values, vectors = np.linalg.eigh(self._projected[: self.count, : self.count])
        return values, vectors

    def vectors(self, columns: np.ndarray[Any, Any]) -> Tensor:
        """Vectors ``[n, D]`` from coordinates ``[count, n]`` in the basis."""
        turn = torch.from_numpy(np.ascontiguousarray(columns.T)).to(self._vectors)
        return turn @ self._vectors[: self.count]

    def shrink(self, values: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> None:
        """Keep some Ritz vectors and what is outside (thick restart, Wu and Simon 2000)."""
        kept, rest = self.vectors(columns), self._vectors[self.count].clone()
        self.count = len(values)
        self._vectors[: self.count], self._vectors[self.count] = kept, rest
        self._projected[:] = 0
        np.fill_diagonal(self._projected[: self.count, : self.count], values)


def basis_of(k: int, end: str) -> int:
    """How many vectors :func:`extreme` holds."""
    return 2 * k + 1 + _SPARE[end]


def extreme(
    hessian: Hessian,
    k: int,
    *,
    end: str = "top",
    tolerance: float,
    max_hvps: int,
    generator: torch.Generator,
    near: Tensor | None = None,
) -> Eigenpairs:
    """The k algebraically largest ("top") or smallest ("bottom") eigenvalues of ``H``.

    Lanczos with thick restarts, until every residual is below ``tolerance`` times the largest
    absolute eigenvalue. That is the scale at the lower end, too: asked for eigenvalues near zero
    relative to themselves, a solver takes many times longer.

    Args:
        hessian: products with it.
        k: how many, at most its size.
        end: of the spectrum.
        tolerance: see above.
        max_hvps: most products spent, but at least k + 1; what was found by then is marked.
        generator: of the starting vector, on the CPU, so that it is the same everywhere.
        near: ``[D]``, a vector to start from, such as an eigenvector of a while ago; a little of
            the random one is added, or an eigenvector could never be left.
    """
    size = hessian.size
    k = min(k, size)
    sign = 1.0 if end == "top" else -1.0
    if size <= DENSE:
        exact, columns = np.linalg.eigh(hessian.dense())
        order = np.argsort(-sign * exact)[:k]
        vectors = torch.from_numpy(columns[:, order].T.copy()).to(hessian.parameters[0])
        return Eigenpairs(
            values=exact[order], vectors=vectors, residuals=np.zeros(k), converged=True,
            products=size,
        )  # fmt: skip
    basis = min(basis_of(k, end), size)
    start = torch.randn(size, generator=generator, dtype=hessian.dtype)
    if near is not None:
        start = near.cpu() / near.norm().cpu() + 0.1 * start / start.norm()
    krylov = Krylov(hessian, start, basis)
    products = 0
    while True:
        krylov.grow()
        products += 1
        if not math.isfinite(krylov.rest):
            raise UserError(
                "A Hessian-vector product is not finite at the model's weights, so there are no "
                "eigenvalues. Check the checkpoint."
            )
        values, columns = krylov.eigen()
        order = np.argsort(-sign * values)
        found = order[:k]
        residuals = krylov.rest * np.abs(columns[-1, found])
        enough = len(found) == k and residuals.max() <= tolerance * np.abs(values).max()
        if enough or krylov.exhausted or products >= max(max_hvps, k + 1):
            return Eigenpairs(
                values=values[found],
                vectors=krylov.vectors(columns[:, found]),
                residuals=residuals,
                converged=bool(enough or (krylov.exhausted and len(found) == k)),
                products=products,
            )
        if krylov.count == basis:
            kept = order[: min((basis + k) // 2, basis - 1)]
            krylov.shrink(values[kept], columns[:, kept])


def quadrature(
    hessian: Hessian, start: Tensor, steps: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Nodes and weights of ``s' f(H) s / s's``: Gauss quadrature by ``steps`` products."""
    krylov = Krylov(hessian, start, min(steps, hessian.size))
    while krylov.count < min(steps, hessian.size) and not krylov.exhausted:
        krylov.grow()
    values, columns = krylov.eigen()
    return values, columns[0] ** 2
