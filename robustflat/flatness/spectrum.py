"""Owns the ends of the Hessian's spectrum: Lanczos above accumulated Hessian-vector products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness.closure import Closure

# Up to so many weights the whole Hessian is formed, which costs no more than Lanczos.
DENSE = 64
# Vectors of the Lanczos basis beyond the 2 k + 1 that k eigenvalues need. The largest stand apart
# and are found at once by few; the smallest are crowded, and more vectors save restarts.
_SPARE_TOP, _SPARE_BOTTOM = 5, 17


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
        return self._closure.hvp(self.parameters, vector)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector in the parameters' shapes, dtype and place."""
        flat = flat.to(self.parameters[0].device, self.dtype)
        parts = torch.split(flat, [p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def numpy_times(self, flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The product with a flat vector of numpy's."""
        product = self.times(self.split(torch.from_numpy(np.array(flat, copy=True).ravel())))
        result: np.ndarray[Any, Any] = torch.cat([p.flatten() for p in product]).cpu().numpy()
        return result

    def dense(self) -> np.ndarray[Any, Any]:
        """The whole matrix, symmetric to the last bit; for few weights."""
        columns = [self.numpy_times(row) for row in np.eye(self.size)]
        matrix = np.stack(columns).astype(np.float64)
        result: np.ndarray[Any, Any] = (matrix + matrix.T) / 2
        return result


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Some eigenvalues at one end of a spectrum, the most extreme first.

    Attributes:
        values: ``[k]``.
        vectors: ``[D, k]``, of unit length.
        residuals: ``||H v - lambda v||``; an eigenvalue of H lies within this of each value.
        converged: whether all k were found to the tolerance; else there are fewer.
    """

    values: np.ndarray[Any, Any]
    vectors: np.ndarray[Any, Any]
    residuals: np.ndarray[Any, Any]
    converged: bool


def largest(
    hessian: Hessian,
    k: int,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    shift: float | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenvalues of ``H``; of ``shift * I - H`` if there is a shift.

    With the largest eigenvalue as the shift that is the lower end of the spectrum, to a tolerance
    relative to its width: asked for the smallest eigenvalues directly, Lanczos tries to resolve
    them relative to themselves and takes many times longer.

    Args:
        hessian: products with it.
        k: how many, at most its size.
        tolerance: relative to the largest.
        max_hvps: about how many products may be spent; at least one Lanczos basis is.
        seed: of the starting vector.
        shift: see above.

    Raises:
        UserError: if not one eigenvalue converges.
    """
    size = hessian.size
    k = min(k, size)

    def times(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        product = hessian.numpy_times(flat)
        return product if shift is None else shift * flat.ravel() - product

    if size <= DENSE:
        matrix = hessian.dense()
        if shift is not None:
            matrix = shift * np.eye(size) - matrix
        values, vectors = np.linalg.eigh(matrix)
        order = np.argsort(values)[::-1][:k]
        return Eigenpairs(
            values=values[order], vectors=vectors[:, order], residuals=np.zeros(k), converged=True
        )
    dtype = np.float64 if hessian.dtype == torch.float64 else np.float32
    basis = basis_size(k, size, bottom=shift is not None)
    start = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    operator = LinearOperator((size, size), matvec=times, dtype=dtype)
    converged = True
    try:
        values, vectors = eigsh(
            operator,
            k=k,
            which="LA",
            v0=start,
            ncv=basis,
            tol=tolerance,
            maxiter=max(1, (max_hvps - basis - k) // (basis - k)),
        )
    except ArpackNoConvergence as error:
        if len(error.eigenvalues) == 0:
            raise UserError(
                f"The Hessian's extreme eigenvalues did not converge to a relative {tolerance:g} "
                f"within {max_hvps} Hessian-vector products. Raise max_hvps, or tolerance."
            ) from None
        # Keep what has converged; the figure says that it is fewer than asked.
        converged = False
        values, vectors = error.eigenvalues, error.eigenvectors
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    residuals = np.array(
        [
            np.linalg.norm(times(vector) - value * vector)
            for value, vector in zip(values, vectors.T, strict=True)
        ]
    )
    return Eigenpairs(values=values, vectors=vectors, residuals=residuals, converged=converged)


def basis_size(k: int, size: int, *, bottom: bool) -> int:
    """Vectors of the Lanczos basis."""
    return min(2 * k + 1 + (_SPARE_BOTTOM if bottom else _SPARE_TOP), size)
