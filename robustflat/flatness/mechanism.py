"""Owns the measures of why flatness changes: gradients, their alignment, Fisher, PAC-Bayes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from torch import Tensor

from robustflat.flatness import sharpness
from robustflat.flatness.curvature import ENDS, USES, hessian_of, pairs_of, top_passes
from robustflat.flatness.decorator import CURVED, measure
from robustflat.flatness.figure import Figure, Passes, mean_and_error
from robustflat.flatness.options import DIFFERENTIATED, Options
from robustflat.flatness.subject import LossKind, Subject, signs
from robustflat.perturb.watch import cosine


def _gradient_cost(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"gradient": Passes(gradient=1)}


def _alignment_cost(options: Options, loss: LossKind) -> dict[str, Passes]:
    return {"top": top_passes(options), **_gradient_cost(options, loss)}


@measure("gradient_norm", loss=CURVED, cost=_gradient_cost, uses=USES, curvature=True)
def gradient_norm(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The L2 norm of the mean loss's gradient. Details: ``layers``, each parameter tensor's."""
    named = subject.parameters(options, DIFFERENTIATED)

    def compute() -> dict[str, float]:
        gradient = gradient_of(subject, options, loss)
        return {n: float(g.norm()) for n, g in zip(named, gradient, strict=True)}

    layers = subject.part(name, compute)
    return Figure(
        value=math.hypot(*layers.values()),
        details={
            "loss": loss,
            "parameters": options.parameters or DIFFERENTIATED,
            "layers": layers,
        },
    )


@measure("alignment", loss=CURVED, cost=_alignment_cost, uses=(*USES, *ENDS), curvature=True)
def alignment(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """|cos| of the angle between the gradient and the Hessian's top eigenvector.

    By Wen, Ma and Li (2023) full-batch SAM lowers the largest eigenvalue because its perturbation
    comes to lie along that eigenvector. Details: the same for the perturbation of ``awp``, which
    moves every matrix by a share of its norm, and ``chance``, what a random direction has on
    average.
    """

    def compute() -> dict[str, float]:
        hessian = hessian_of(subject, options, loss)
        gradient = gradient_of(subject, options, loss)
        axis = hessian.split(pairs_of(subject, options, loss, "top").vectors[0])
        chance = math.exp(math.lgamma(hessian.size / 2) - math.lgamma((hessian.size + 1) / 2))
        awp = [
            g * (p.detach().norm() / g.norm().clamp_min(1e-30) if p.ndim > 1 else 0.0)
            for p, g in zip(hessian.parameters, gradient, strict=True)
        ]
        return {
            "gradient": abs(float(cosine(gradient, axis))),
            "awp": abs(float(cosine(awp, axis))),
            "chance": chance / math.sqrt(math.pi),
        }

    found = subject.part(name, compute)
    return Figure(value=found["gradient"], details={"loss": loss, **found})


@measure(
    "fisher_trace", loss=CURVED, cost=lambda o, loss: Passes(gradient=o.probes),
    uses=("parameters", "probes"), curvature=True,
)  # fmt: skip
def fisher_trace(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The trace of the Fisher information, E_x E_{y ~ p(.|x)} ||grad log p(y|x)||^2.

    The expectation over labels is the model's own and exact: with random signs e_nc, the squared
    norm of the gradient of sum_nc e_nc sqrt(p_nc) log p_nc (p held fixed in the root) has as its
    mean the sum of all examples' traces. One backward pass a probe, whatever the classes.
    """
    named = subject.parameters(options, DIFFERENTIATED)
    closure = subject.derived(options, loss)

    def probe(index: int) -> float:
        # Drawn once for all examples, so that the value does not depend on the batch size.
        drawn: list[Tensor] = []

        def weigh(rows: slice, logits: Tensor) -> Tensor:
            if not drawn:
                every = logits.new_empty(len(closure), logits.shape[1])
                drawn.extend(subject.draw(signs, [every], "fisher", loss, index))
            log_p = logits.log_softmax(1)
            return (drawn[0][rows] * (log_p / 2).exp().detach() * log_p).sum()

        gradient = closure.weighted_gradient(list(named.values()), weigh)
        return sum(float(g.square().sum()) for g in gradient) / len(closure)

    probes = [subject.part(f"{name}/{i}", partial(probe, i)) for i in range(options.probes)]
    value, error = mean_and_error(probes)
    return Figure(
        value=value,
        standard_error=error,
        details={"loss": loss, "parameters": options.parameters or DIFFERENTIATED},
    )


@measure(
    "pac_bayes",
    cost=sharpness.worst_passes,
    uses=(*USES, "steps", "step_size", "restarts", "rho", "confidence", "train_size"),
)
def pac_bayes(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """The complexity term of SAM's PAC-Bayes bound (Foret et al. 2021, theorem 2, appendix A.1).

    With probability 1 - delta over n training examples, for a loss in [0, 1] and k weights,
    L_D(w) <= max_{||v|| <= rho} L_S(w + v) + sqrt((k log(1 + ||w||^2 / rho^2 (1 + sqrt(log(n) /
    k))^2) + 4 log(n / delta) + 8 log(6 n + 3 k)) / (n - 1)). Details: its terms, and ``bound``, the
    sum. Cross-entropy is not bounded by 1 and the term is usually above 1: the bound is vacuous,
    its terms are for comparison.
    """
    around = replace(
        options, ball="global", weight_norm="l2", radius=options.rho, m=None,
        parameters=options.parameters or DIFFERENTIATED,
    )  # fmt: skip
    worst = sharpness.worst(subject, around, loss, name)
    named = subject.parameters(options, DIFFERENTIATED)
    squared = sum(float(p.detach().double().square().sum()) for p in named.values())
    k = sum(p.numel() for p in named.values())
    n = options.train_size or subject.images or len(subject)
    delta = 1 - options.confidence
    if options.rho == 0 or n < 2:
        norm_term = count_term = math.inf
    else:
        growth = squared / options.rho**2 * (1 + math.sqrt(math.log(n) / k)) ** 2
        norm_term = k * math.log1p(growth)
        count_term = 4 * math.log(n / delta) + 8 * math.log(6 * n + 3 * k)
    complexity = math.sqrt((norm_term + count_term) / max(n - 1, 1))
    return Figure(
        value=complexity,
        details={
            "loss": loss,
            "rho": options.rho,
            "train_size": n,
            "weights": k,
            "delta": delta,
            "squared_norm": squared,
            "norm_term": norm_term,
            "count_term": count_term,
            "worst_loss": worst.details["perturbed_loss"],
            "sharpness": worst.value,
            "bound": worst.details["perturbed_loss"] + complexity,
        },
    )


def gradient_of(subject: Subject, options: Options, loss: LossKind) -> list[Tensor]:
    """The gradient of the mean loss, of the robust one at fixed adversarial examples."""
    weights = list(subject.parameters(options, DIFFERENTIATED).values())
    return subject.once(
        ("gradient", loss, options),
        lambda: subject.derived(options, loss).value_and_grad(weights)[1],
    )
