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

from robustflat.errors import UserError, missing
from robustflat.flatness.decorator import CURVED, measure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import DIFFERENTIATED, Options
from robustflat.flatness.spectrum import DENSE, Eigenpairs, Hessian, extreme, quadrature
from robustflat.flatness.subject import LossKind, Subject, normal, signs

# Runs of an estimator that does not tell its own error.
RUNS = 3
# Probes that go through one graph of the gradient; so many products are held at a time.
TOGETHER = 10
_GRID = 512
# Nodes nearer to 0, in largest eigenvalues, are taken for those of the null space.
_NULL = 1e-3
# Options that act on all of them, and on the spectrum's ends.
USES = ("parameters", "normalise_logits")
ENDS = ("k", "tolerance", "max_hvps")


def hessian_of(subject: Subject, options: Options, loss: LossKind) -> Hessian:
    """The Hessian of that loss at the present weights."""
    parameters = dict(subject.parameters(options, DIFFERENTIATED))
    return Hessian(subject.derived(options, loss), parameters)


def pairs_of(subject: Subject, options: Options, loss: LossKind, end: str) -> Eigenpairs:
    """The k eigenpairs of one end, computed once for all measures that need them."""
    return subject.once(
        (end, loss, options),
        lambda: extreme(
            hessian_of(subject, options, loss),
            options.k,
            end=end,
            tolerance=options.tolerance,
            max_hvps=options.max_hvps,
            generator=subject.generator("lanczos", loss, end),
        ),
    )


def top_passes(options: Options) -> Passes:
    """At most what the eigenvalues of one end cost."""
    return products(max(options.max_hvps, options.k + 1, DENSE))


def _top(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"top": top_passes(options)}


def _bottom(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"bottom": top_passes(options)}


def _density(options: Options, loss: LossKind) -> dict[str, Passes]:
    runs = products(options.lanczos_steps * options.lanczos_runs)
    return {**_top(options, loss), **_bottom(options, loss), "density": runs}


def probe_cost(options: Options, loss: LossKind) -> dict[str, Passes]:
    """What Hutchinson's probes cost, shared by all that take them."""
    graphs = math.ceil(options.probes / TOGETHER)
    return {"probes hutchinson": Passes(gradient=graphs, hvp=options.probes)}


def _trace(options: Options, loss: LossKind) -> dict[str, Passes]:
    if options.estimator == "hutchinson":
        return probe_cost(options, loss)
    step = {"hutchpp": 3, "xtrace": 2}[options.estimator]
    return {f"probes {options.estimator}": products(RUNS * (options.probes // step * step))}


@measure("hessian_max", loss=CURVED, cost=_top, uses=(*USES, *ENDS), curvature=True)
def maximum(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The largest Hessian eigenvalue.

    Details: ``eigenvalues``, the k largest, their ``residuals`` and whether they ``converged``. A
    value that did not is a lower bound; an eigenvalue lies within the residual of it.
    """
    return _eigenvalues(subject, options, loss, name, "top")


@measure("hessian_min", loss=CURVED, cost=_bottom, uses=(*USES, *ENDS), curvature=True)
def minimum(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The smallest Hessian eigenvalue, negative off a minimum. Details as :func:`maximum`."""
    return _eigenvalues(subject, options, loss, name, "bottom")


@measure(
    "hessian_trace", loss=CURVED, cost=_trace, uses=(*USES, "probes", "estimator"), curvature=True
)
def trace(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The Hessian trace. Details: ``layers``, each parameter tensor's trace and its standard error.

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


@measure("hessian_frobenius", loss=CURVED, cost=probe_cost, uses=(*USES, "probes"), curvature=True)
def frobenius(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The Hessian Frobenius norm, the root of the mean of ||H z||^2 over the trace's own probes."""
    square, error = mean_and_error([p["square"] for p in hessian_probes(subject, options, loss)])
    value = math.sqrt(square)
    # The root's error to first order.
    root_error = None if error is None else error / (2 * value) if value > 0 else 0.0
    about = _about(hessian_of(subject, options, loss), options, loss)
    return Figure(value=value, standard_error=root_error, details=about)


@measure(
    "hessian_density", loss=CURVED, cost=_density,
    uses=(*USES, *ENDS, "lanczos_steps", "lanczos_runs"), curvature=True,
)  # fmt: skip
def density(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The Hessian spectral density by Lanczos quadrature; its value is the mean eigenvalue.

    Details: ``grid`` and ``density`` (of area 1, smoothed by Gaussians), and
    ``negative_mass``, the share of eigenvalues below minus a thousandth of the largest absolute
    one, by the quadrature's nodes: those of eigenvalues that are 0 fall on either side of it. The
    value times ``weights`` estimates the trace.
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
    least = -_NULL * max(abs(low), abs(high))
    negative = [
        sum(w for n, w in zip(run["nodes"], run["weights"], strict=True) if n < least)
        for run in runs
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


def products(number: int) -> Passes:
    """What so many Hessian-vector products cost, one after the other."""
    return Passes(gradient=number, hvp=number)


def _suffix(loss: LossKind) -> str:
    return "" if loss == "clean" else "_robust"


def _about(hessian: Hessian, options: Options, loss: LossKind) -> dict[str, Any]:
    return {
        "loss": loss,
        "parameters": options.parameters or DIFFERENTIATED,
        "weights": hessian.size,
    }


def _eigenvalues(subject: Subject, options: Options, loss: LossKind, name: str, end: str) -> Figure:
    def part() -> dict[str, Any]:
        pairs = pairs_of(subject, options, loss, end)
        return {
            "eigenvalues": pairs.values.tolist(),
            "residuals": pairs.residuals.tolist(),
            "converged": pairs.converged,
            "products": pairs.products,
        }

    found = subject.part(name, part)
    about = _about(hessian_of(subject, options, loss), options, loss)
    return Figure(value=found["eigenvalues"][0], details={**about, **found})


def hessian_probes(subject: Subject, options: Options, loss: LossKind) -> list[dict[str, Any]]:
    """z_l . (H z)_l of every layer and ||H z||^2, for each probe z; exact for few weights.

    Some probes share one graph of the gradient, which is a third of a product's cost.
    """
    hessian = hessian_of(subject, options, loss)
    if hessian.size <= DENSE:
        return [subject.part(f"hessian_dense/{loss}", lambda: _exact(hessian))]

    def group(first: int) -> list[dict[str, Any]]:
        members = range(first, min(first + TOGETHER, options.probes))
        probes = [subject.draw(signs, hessian.parameters, "probe", loss, i) for i in members]
        found = []
        for z, product in zip(probes, hessian.times_all(probes), strict=True):
            along = [float((a * b).sum()) for a, b in zip(z, product, strict=True)]
            square = sum(float(t.square().sum()) for t in product)
            found.append({"layers": dict(zip(hessian.names, along, strict=True)), "square": square})
        return found

    groups = [
        subject.part(
            f"hessian_probes/{loss}/{i}-{min(i + TOGETHER, options.probes)}", partial(group, i)
        )
        for i in range(0, options.probes, TOGETHER)
    ]
    return [probe for found in groups for probe in found]


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
        start = torch.cat(
            [t.flatten() for t in subject.draw(normal, hessian.parameters, "density", *purpose)]
        )
        nodes, weights = quadrature(hessian, start, options.lanczos_steps)
    return {"nodes": nodes.tolist(), "weights": weights.tolist()}


def _smoothed(
    runs: list[dict[str, Any]], low: float, high: float, steps: int
) -> tuple[list[float], list[float]]:
    """A Gaussian for every node, as wide as the nodes stand apart on average (Papyan 2019)."""
    margin = 0.05 * (high - low)
    grid = np.linspace(low - margin, high + margin, _GRID)
    width = (grid[-1] - grid[0]) / max(steps - 1, 1) / math.sqrt(8 * math.log(3))
    curves = [
        np.exp(-(((grid[:, None] - np.array(run["nodes"])) / width) ** 2) / 2) @ run["weights"]
        for run in runs
    ]
    heights = np.mean(curves, axis=0) / (width * math.sqrt(2 * math.pi))
    return grid.tolist(), heights.tolist()


def _by_curvlinops(
    hessian: Hessian, options: Options, subject: Subject, purpose: tuple[object, ...]
) -> float:
    """One run of Hutch++ or XTrace with a share of the probes."""
    library = curvlinops()
    step = 3 if options.estimator == "hutchpp" else 2
    probes = options.probes // step * step
    estimate = library.hutchpp_trace if options.estimator == "hutchpp" else library.xtrace
    # curvlinops draws from the global generators, which are restored after the measurement.
    torch.manual_seed(subject.generator("trace", options.estimator, *purpose).initial_seed())
    value = float(estimate(_operator(hessian), min(probes, (hessian.size - 1) // step * step)))
    if not math.isfinite(value):
        raise UserError(
            f"{options.estimator} broke down: the Hessian's rank is below its {options.probes} "
            "probes. Lower probes, or use the estimator hutchinson or hutchpp."
        )
    return value


def curvlinops() -> Any:
    """The package, asked for before anything is measured.

    Raises:
        UserError: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import curvlinops
    except ImportError:
        raise missing("A trace by hutchpp or xtrace", "curvlinops", "curvature") from None
    return curvlinops


def _operator(hessian: Hessian) -> Any:
    """``hessian`` as curvlinops' estimators want it."""
    from curvlinops._torch_base import PyTorchLinearOperator

    class Operator(PyTorchLinearOperator):  # type: ignore[misc]
        SELF_ADJOINT = True
        # Its random vectors are drawn here, the same for every device.
        device = torch.device("cpu")
        dtype = hessian.dtype

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:  # noqa: N803
            columns = [
                hessian.times(hessian.split(torch.cat([x[..., i].flatten() for x in X])))
                for i in range(X[0].shape[-1])
            ]
            return [torch.stack(parts, -1).cpu() for parts in zip(*columns, strict=True)]

    shapes = [tuple(p.shape) for p in hessian.parameters]
    return Operator(shapes, shapes)
