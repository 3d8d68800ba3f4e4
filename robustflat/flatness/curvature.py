"""Owns the Hessian's measures: extreme eigenvalues, trace, Frobenius norm, spectral density.

All are of the mean loss over the whole set, each example with the same weight whatever its batch;
the robust ones at the adversarial examples of the present weights, held fixed.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness.figure import Figure, Passes
from robustflat.flatness.options import Options
from robustflat.flatness.spectrum import DENSE, Eigenpairs, Hessian, basis_size, largest
from robustflat.flatness.subject import LossKind, Subject, signs

PARAMETERS = "all"
# Runs of an estimator that does not tell its own error.
RUNS = 3
_GRID = 512


def hessian_of(subject: Subject, options: Options, loss: LossKind) -> Hessian:
    """The Hessian of that loss at the present weights."""
    kind: LossKind = "clean" if loss == "clean" else "robust_fixed"
    return Hessian(subject.closure(options, kind), dict(subject.parameters(options, PARAMETERS)))


def top(subject: Subject, options: Options, loss: LossKind) -> Eigenpairs:
    """The k largest eigenvalues, computed once for all measures that need them."""
    return subject.once(
        ("top", loss, options),
        lambda: largest(
            hessian_of(subject, options, loss),
            options.k,
            tolerance=options.tolerance,
            max_hvps=options.max_hvps,
            seed=subject.generator("lanczos", loss, "top").initial_seed() % 2**32,
        ),
    )


def maximum(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The largest eigenvalue. Details: ``eigenvalues``, the k largest, and their ``residuals``."""
    return _eigenvalues(subject, name, loss, lambda: (1.0, 0.0, top(subject, options, loss)))


def minimum(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The smallest eigenvalue, negative off a minimum. Details as :func:`maximum`."""

    def compute() -> tuple[float, float, Eigenpairs]:
        shift = float(top(subject, options, loss).values[0])
        flipped = largest(
            hessian_of(subject, options, loss),
            options.k,
            tolerance=options.tolerance,
            max_hvps=options.max_hvps,
            seed=subject.generator("lanczos", loss, "bottom").initial_seed() % 2**32,
            shift=shift,
        )
        return -1.0, shift, flipped

    return _eigenvalues(subject, name, loss, compute)


def trace(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The trace. Details: ``layers``, each parameter tensor's trace and its standard error.

    Hutchinson's estimator with Rademacher probes; exact for very few weights. With another
    estimator (no layers), the error is that over independent runs of it.
    """
    hessian = hessian_of(subject, options, loss)
    if hessian.size > DENSE and options.estimator != "hutchinson":
        runs = [
            subject.part(
                f"{name}/{options.estimator}/{options.probes}/{i}",
                partial(_by_curvlinops, hessian, options, subject, (loss, i)),
            )
            for i in range(RUNS)
        ]
        value, error = mean_and_error(runs)
        return Figure(value=value, standard_error=error, details=_about(hessian, options, loss))
    probes = hessian_probes(subject, options, loss)
    layers = {
        layer: dict(zip(("value", "standard_error"), column, strict=True))
        for layer, column in (
            (layer, mean_and_error([probe["layers"][layer] for probe in probes]))
            for layer in hessian.names
        )
    }
    value, error = mean_and_error([sum(probe["layers"].values()) for probe in probes])
    return Figure(
        value=value,
        standard_error=error,
        details={**_about(hessian, options, loss), "layers": layers},
    )


def frobenius(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The Frobenius norm, the root of the mean of ||H z||^2 over the trace's own probes."""
    square, error = mean_and_error([p["square"] for p in hessian_probes(subject, options, loss)])
    value = math.sqrt(square)
    # The root's error to first order.
    root_error = None if error is None else error / (2 * value) if value > 0 else 0.0
    about = _about(hessian_of(subject, options, loss), options, loss)
    return Figure(value=value, standard_error=root_error, details=about)


def density(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The spectral density by stochastic Lanczos quadrature; its value, the mean eigenvalue.

    Details: ``grid`` and ``density`` (of area 1, smoothed by Gaussians; curvlinops), and
    ``negative_mass``, the share of eigenvalues below zero by the quadrature's nodes. The value
    times ``weights`` estimates the trace.
    """
    hessian = hessian_of(subject, options, loss)
    low = minimum(subject, options, loss, f"hessian_min{_suffix(loss)}").value
    high = maximum(subject, options, loss, f"hessian_max{_suffix(loss)}").value
    runs = [
        subject.part(
            f"{name}/{options.lanczos_steps}/{i}",
            partial(_quadrature, hessian, options, subject, (loss, i)),
        )
        for i in range(options.lanczos_runs)
    ]
    grid, heights = _smoothed(runs, low, high, min(options.lanczos_steps, hessian.size))
    means = [float(np.dot(run["nodes"], run["weights"])) for run in runs]
    negative = [
        sum(w for n, w in zip(run["nodes"], run["weights"], strict=True) if n < 0) for run in runs
    ]
    value, error = mean_and_error(means)
    return Figure(
        value=value,
        standard_error=error,
        details={
            **_about(hessian, options, loss),
            "negative_mass": math.fsum(negative) / len(negative),
            "grid": grid,
            "density": heights,
        },
    )


def top_passes(options: Options, loss: LossKind) -> Passes:
    """At most what the largest eigenvalues cost."""
    least = basis_size(options.k, DENSE + 1, bottom=True)
    return Passes(hvp=max(options.max_hvps, least) + options.k)


def probe_passes(options: Options, loss: LossKind) -> Passes:
    """What a trace costs by the chosen estimator."""
    step = {"hutchinson": 1, "hutchpp": 3, "xtrace": 2}[options.estimator]
    runs = 1 if options.estimator == "hutchinson" else RUNS
    return Passes(hvp=runs * (options.probes // step * step))


def hutchinson_passes(options: Options, loss: LossKind) -> Passes:
    """What Hutchinson's probes cost."""
    return Passes(hvp=options.probes)


def density_passes(options: Options, loss: LossKind) -> Passes:
    """What a spectral density costs beside its ends."""
    return Passes(hvp=options.lanczos_steps * options.lanczos_runs)


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for one value alone."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _suffix(loss: LossKind) -> str:
    return "" if loss == "clean" else "_robust"


def _about(hessian: Hessian, options: Options, loss: LossKind) -> dict[str, Any]:
    return {
        "loss": loss,
        "parameters": options.parameters or PARAMETERS,
        "weights": hessian.size,
    }


def _eigenvalues(subject: Subject, name: str, loss: LossKind, compute: Any) -> Figure:
    def part() -> dict[str, Any]:
        sign, shift, pairs = compute()
        return {
            "eigenvalues": [shift + sign * float(v) for v in pairs.values],
            "residuals": [float(r) for r in pairs.residuals],
            "converged": pairs.converged,
        }

    found = subject.part(name, part)
    return Figure(value=found["eigenvalues"][0], details={"loss": loss, **found})


def hessian_probes(subject: Subject, options: Options, loss: LossKind) -> list[dict[str, Any]]:
    """z_l . (H z)_l of every layer and ||H z||^2, for each probe z; exact for few weights."""
    hessian = hessian_of(subject, options, loss)
    if hessian.size <= DENSE:
        return [subject.part(f"hessian_dense/{loss}", lambda: _exact(hessian))]

    def probe(index: int) -> dict[str, Any]:
        z = subject.draw(signs, hessian.parameters, "probe", loss, index)
        product = hessian.times(z)
        along = [float((a * b).sum(dtype=hessian.dtype)) for a, b in zip(z, product, strict=True)]
        square = sum(float(t.square().sum()) for t in product)
        return {"layers": dict(zip(hessian.names, along, strict=True)), "square": square}

    return [
        subject.part(f"hessian_probe/{loss}/{i}", partial(probe, i)) for i in range(options.probes)
    ]


def _exact(hessian: Hessian) -> dict[str, Any]:
    matrix = hessian.dense()
    ends = np.cumsum([p.numel() for p in hessian.parameters])
    blocks = np.split(np.diag(matrix), ends[:-1])
    layers = {name: float(b.sum()) for name, b in zip(hessian.names, blocks, strict=True)}
    return {"layers": layers, "square": float((matrix**2).sum())}


def _quadrature(
    hessian: Hessian, options: Options, subject: Subject, purpose: tuple[object, ...]
) -> dict[str, Any]:
    """Nodes and weights of one Lanczos run; all eigenvalues for few weights."""
    if hessian.size <= DENSE:
        nodes = np.linalg.eigvalsh(hessian.dense())
        weights = np.full(hessian.size, 1 / hessian.size)
    else:
        spectra = _curvlinops().papyan2020traces.spectrum
        _seed(subject, "density", *purpose)
        values, vectors = spectra.fast_lanczos(
            _operator(hessian), min(options.lanczos_steps, hessian.size)
        )
        nodes, weights = values.cpu().double().numpy(), vectors[0].cpu().double().numpy() ** 2
    if not np.isfinite(nodes).all():
        raise UserError(
            f"Lanczos broke down within {options.lanczos_steps} steps: the Hessian has fewer "
            "different eigenvalues. Lower lanczos_steps."
        )
    return {"nodes": nodes.tolist(), "weights": weights.tolist()}


def _smoothed(
    runs: list[dict[str, Any]], low: float, high: float, steps: int
) -> tuple[list[float], list[float]]:
    spectra = _curvlinops().papyan2020traces.spectrum
    curves = []
    for run in runs:
        # The function wants eigenvectors, of which it uses the first entries' squares.
        first = torch.tensor(run["weights"], dtype=torch.float64).sqrt()
        nodes = torch.tensor(run["nodes"], dtype=torch.float64)
        grid, curve = spectra.lanczos_approximate_spectrum_from_iter(
            (nodes, first[None]), (low, high), num_points=_GRID, kappa=3.0, margin=0.05
        )
        curves.append(curve)
    return grid.tolist(), torch.stack(curves).mean(0).tolist()


def _by_curvlinops(
    hessian: Hessian, options: Options, subject: Subject, purpose: tuple[object, ...]
) -> float:
    """One run of Hutch++ or XTrace with a share of the probes."""
    library = _curvlinops()
    step = 3 if options.estimator == "hutchpp" else 2
    probes = options.probes // step * step
    estimate = library.hutchpp_trace if options.estimator == "hutchpp" else library.xtrace
    _seed(subject, "trace", options.estimator, *purpose)
    value = float(estimate(_operator(hessian), min(probes, (hessian.size - 1) // step * step)))
    if not math.isfinite(value):
        raise UserError(
            f"{options.estimator} broke down: the Hessian's rank is below its {options.probes} "
            "probes. Lower probes, or use the estimator hutchinson or hutchpp."
        )
    return value


def _seed(subject: Subject, *purpose: object) -> None:
    # curvlinops draws from the global generators, which are restored after the measurement.
    torch.manual_seed(subject.generator(*purpose).initial_seed())


def _curvlinops() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import curvlinops
            import curvlinops.papyan2020traces.spectrum
    except ImportError:
        raise UserError(
            "The spectral density and the trace estimators hutchpp and xtrace need the package "
            "curvlinops, which is not installed. Run: pip install 'robustflat[curvature]'."
        ) from None
    return curvlinops


def _operator(hessian: Hessian) -> Any:
    """``hessian`` as curvlinops' estimators want it."""
    from curvlinops._torch_base import PyTorchLinearOperator

    class Operator(PyTorchLinearOperator):  # type: ignore[misc]
        SELF_ADJOINT = True
        device = hessian.parameters[0].device
        dtype = hessian.dtype

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:  # noqa: N803
            columns = [
                hessian.times([x[..., i].contiguous() for x in X]) for i in range(X[0].shape[-1])
            ]
            return [torch.stack(parts, -1) for parts in zip(*columns, strict=True)]

    shapes = [tuple(p.shape) for p in hessian.parameters]
    return Operator(shapes, shapes)
