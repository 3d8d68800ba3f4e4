"""Owns the measures of weights and loss: PAC-Bayes noise, Fisher-Rao, relative flatness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from robustflat.errors import UserError
from robustflat.flatness import curvature
from robustflat.flatness.closure import Closure
from robustflat.flatness.decorator import CURVED, FIXED, measure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import DIFFERENTIATED, Options
from robustflat.flatness.subject import LossKind, Subject, normal
from robustflat.perturb import displaced

# Error that the noise may add, the least magnitude of a weight, where the noise is sought, and in
# how many halvings (Jiang et al. 2020, appendix C.3: 0.1, 1e-3).
ADDED_ERROR = 0.1
MAGNITUDE = 1e-3
LOWEST, HIGHEST, HALVINGS = 1e-5, 10.0, 14


def _sigma_cost(options: Options, loss: LossKind) -> Passes:
    return Passes(forward=1 + HALVINGS * options.samples)


@measure("pac_bayes_sigma", cost=_sigma_cost, uses=("parameters", "samples"))
def pac_bayes_sigma(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """1 / sigma^2, sigma the largest noise N(0, sigma^2) on every weight that adds 0.1 of error.

    The PAC-Bayesian flatness of Jiang et al. 2020: by bisection, the error averaged over
    ``samples`` directions, the same for every sigma. Sigma is sought between 1e-5 and 10. Details:
    ``sigma``, and ``saturated``: whether it lies at an end, so that the true one is beyond.
    """

    def spread(weight: Tensor, sigma: float) -> Tensor:
        return torch.full_like(weight, sigma)

    return _sigma(subject, options, name, spread)


@measure("pac_bayes_magnitude", cost=_sigma_cost, uses=("parameters", "samples"))
def pac_bayes_magnitude(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """1 / sigma^2 for the noise N(0, sigma^2 w^2 + 1e-6): magnitude-aware (Jiang et al. 2020)."""

    def spread(weight: Tensor, sigma: float) -> Tensor:
        return ((sigma * weight).square() + MAGNITUDE**2).sqrt()

    return _sigma(subject, options, name, spread)


@measure("fisher_rao", loss=FIXED, cost=Passes(gradient=1), uses=("parameters",))
def fisher_rao(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The Fisher-Rao norm sqrt(E <grad_w l(f(x), y), w>^2) (Liang et al. 2019).

    By one forward-mode product: J w is the derivative of the logits along w. For a net of L layers
    without biases J w = L f. Details: ``model``, the same with labels drawn from the model, whose
    expectation is the variance of J w over the predicted classes.
    """
    named = subject.parameters(options, DIFFERENTIATED)
    closure = subject.derived(options, loss)
    weights = {key: p.detach() for key, p in named.items()}

    def squares(rows: slice, x: Tensor, y: Tensor) -> list[Tensor]:
        def logits(w: dict[str, Tensor]) -> Tensor:
            return functional_call(subject.model, w, (x,))

        z, along = jvp(logits, (weights,), (weights,))[:2]
        p = z.softmax(1)
        target = y if y.is_floating_point() else nn.functional.one_hot(y, z.shape[1])
        mean = (p * along).sum(1, keepdim=True)
        return [
            ((p - target) * along).sum(1).square(),
            (p * (along - mean).square()).sum(1),
        ]

    def compute() -> dict[str, list[float]]:
        batches = zip(*closure.each(squares, gradient=1), strict=True)
        data, model = (torch.cat(parts).double().cpu().tolist() for parts in batches)
        return {"data": data, "model": model}

    found = subject.part(name, compute)
    square, error = mean_and_error(found["data"])
    value = math.sqrt(square)
    return Figure(
        value=value,
        standard_error=None if error is None else error / (2 * value) if value > 0 else 0.0,
        details={"loss": loss, "model": math.sqrt(mean_and_error(found["model"])[0])},
    )


@measure("relative_flatness", loss=FIXED, cost=Passes(forward=1), uses=())
def relative_flatness(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Sum_{s,t} <w_s, w_t> Tr H_{st} of the last linear layer (Petzka et al. 2021).

    H_{st} is the Hessian of the mean loss by rows s and t of its weight, phi the features that it
    is given. For cross-entropy Tr H_{st} = E ||phi||^2 (1[s = t] p_s - p_s p_t), so the sum is
    E ||phi||^2 (sum_s p_s ||w_s||^2 - ||sum_s p_s w_s||^2), in one forward pass. It does not change
    when a layer below is scaled up and this one down.
    """
    closure = subject.derived(options, loss)
    linear = [m for m in subject.model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(f"{name} is of the last linear layer, and the model has none.")

    def compute() -> list[float]:
        weight = linear[-1].weight.detach().double()
        features: list[Tensor] = []
        hook = linear[-1].register_forward_pre_hook(lambda m, given: features.append(given[0]))

        def spread(rows: slice, x: Tensor, y: Tensor) -> Tensor:
            features.clear()
            with torch.no_grad():
                p = closure.model(x).double().softmax(1)
            size = features[-1].double().flatten(1).square().sum(1)
            return size * (p @ weight.square().sum(1) - (p @ weight).square().sum(1))

        try:
            return closure.per_example(spread, forward=1)
        finally:
            hook.remove()

    value, error = mean_and_error(subject.part(name, compute))
    return Figure(value=value, standard_error=error, details={"loss": loss})


@measure(
    "weight_curvature",
    loss=CURVED,
    cost=curvature.probe_cost,
    uses=(*curvature.USES, "probes"),
    curvature=True,
)
def weight_curvature(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Sum_l sqrt(||W_l||_F^2 Tr H_l): the layer-wise weight-curvature index, unchanged by scaling.

    H_l is the Hessian by layer l alone, its trace by Hutchinson's probes, 0 where the estimate is
    negative. A layer is a tensor of more than one dimension. Details: ``layers``.
    """
    hessian = curvature.hessian_of(subject, options, loss)
    probes = curvature.hessian_probes(subject, options, loss)
    layers = {}
    for key, parameter in zip(hessian.names, hessian.parameters, strict=True):
        if parameter.ndim > 1:
            trace = math.fsum(probe["layers"][key] for probe in probes) / len(probes)
            square = float(parameter.detach().double().square().sum())
            layers[key] = math.sqrt(square * max(trace, 0.0))
    return Figure(value=math.fsum(layers.values()), details={"loss": loss, "layers": layers})


def _sigma(
    subject: Subject, options: Options, name: str, spread: Callable[[Tensor, float], Tensor]
) -> Figure:
    closure = subject.closure(options, "clean")
    parameters = list(subject.parameters(options, DIFFERENTIATED).values())
    weights = [p.detach().clone() for p in parameters]

    def noise(index: int, sigma: float) -> list[Tensor]:
        drawn = subject.draw(normal, weights, name, index)
        return [z * spread(w, sigma) for z, w in zip(drawn, weights, strict=True)]

    def compute() -> dict[str, Any]:
        before = _error(closure)
        low, high = math.log(LOWEST), math.log(HIGHEST)
        with displaced(parameters) as move:
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                errors = []
                for index in range(options.samples):
                    move(noise(index, math.exp(middle)))
                    errors.append(_error(closure))
                if math.fsum(errors) / len(errors) - before <= ADDED_ERROR:
                    low = middle
                else:
                    high = middle
        saturated = low == math.log(LOWEST) or high == math.log(HIGHEST)
        return {"sigma": math.exp((low + high) / 2), "error": before, "saturated": saturated}

    # By the number of directions: the bisection's every step is over all of them.
    found = subject.part(f"{name}/{options.samples}", compute)
    return Figure(value=found["sigma"] ** -2, details=found)


def _error(closure: Closure) -> float:
    return 1 - float(closure.outcomes()[1].double().mean())
