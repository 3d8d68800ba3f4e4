"""Owns the measures of the weights alone: norms, products, paths, distance from the start.

A layer is a parameter of more than one dimension, as the matrix of its rows (filters) ``[out,
rest]``. The spectral norm of a convolution is that of this matrix (Yoshida & Miyato 2017), which
orders as the operator's own norm does where kernels have one size, and is not equal to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.flatness.decorator import measure
from robustflat.flatness.figure import Figure
from robustflat.flatness.options import MOVED, Options
from robustflat.flatness.subject import LossKind, Subject
from robustflat.models.normalized import Normalize


@measure("parameter_norm", uses=("parameters",))
def parameter_norm(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """||w||_2 of all parameters (Jiang et al. 2020, "parameter norm")."""
    squares = [p.detach().double().square().sum() for p in _all(subject, options, "all").values()]
    return Figure(value=math.sqrt(float(sum(squares))))


@measure("spectral_product", uses=("parameters",))
def spectral_product(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Log of prod_l ||W_l||_2^2 (Jiang et al. 2020). Details: ``layers``."""
    return _log_product(subject, options, _spectral)


@measure("spectral_sum", uses=("parameters",))
def spectral_sum(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """D (prod_l ||W_l||_2^2)^(1/d) with d layers (Jiang et al. 2020, "sum of spectral")."""
    return _sum(_log_product(subject, options, _spectral))


@measure("frobenius_product", uses=("parameters",))
def frobenius_product(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Log of prod_l ||W_l||_F^2 (Jiang et al. 2020). Details: ``layers``."""
    return _log_product(subject, options, _frobenius)


@measure("frobenius_sum", uses=("parameters",))
def frobenius_sum(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """D (prod_l ||W_l||_F^2)^(1/d) with d layers (Jiang 2020, "sum of Frobenius")."""
    return _sum(_log_product(subject, options, _frobenius))


@measure("distance_spectral", uses=("parameters",))
def distance_spectral(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Sqrt(sum_l ||W_l - W_l(0)||_2^2), W(0) those before training (Jiang et al. 2020)."""
    return _distance(subject, options, _spectral, name)


@measure("distance_frobenius", uses=("parameters",))
def distance_frobenius(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Sqrt(sum_l ||W_l - W_l(0)||_F^2), W(0) those before training (Jiang et al. 2020)."""
    return _distance(subject, options, _frobenius, name)


@measure("path_norm", uses=())
def path_norm(subject: Subject, options: Options, loss: LossKind, name: str) -> Figure:
    """Sqrt(sum_k f(1; w^2)_k): the L2 norm over all paths of the product of their weights.

    Neyshabur et al. 2015; Jiang et al. 2020. Every weight and bias is squared and an image
    of ones passed through. BatchNorm and the normalisation of images count as the linear maps that
    they are in eval mode. Exact for piecewise linear nets of ReLU; of an average over k places a
    path counts 1/k, not 1/k^2.
    """

    def compute() -> float:
        model = copy.deepcopy(subject.model)
        for module in model.modules():
            _square(module)
        ones = torch.ones_like(subject.x[:1]).to(next(model.parameters()))
        with torch.no_grad():
            return float(model(ones).double().sum())

    return Figure(value=math.sqrt(max(subject.part(name, compute), 0.0)))


@torch.no_grad()
def _square(module: nn.Module) -> None:
    """Put the squares of the linear map that a module is in the place of its weights."""
    if isinstance(module, Normalize):
        module.std.square_()
        module.mean.zero_()
        return
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None or module.running_var is None:
            raise UserError("The path norm needs BatchNorm's running statistics, and has none.")
        slope = torch.rsqrt(module.running_var + module.eps)
        affine = module.weight is not None
        slope = slope * module.weight if affine else slope
        shift = (module.bias if affine else 0) - slope * module.running_mean
        module.weight, module.bias = nn.Parameter(slope.square()), nn.Parameter(shift.square())
        module.running_mean.zero_()
        module.running_var.fill_(1 - module.eps)
        return
    own = dict(module.named_parameters(recurse=False))
    if own and not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        raise UserError(
            f"The path norm is not defined for the layer {type(module).__name__}: it knows linear, "
            "convolutional and BatchNorm layers. Leave path_norm out."
        )
    for parameter in own.values():
        parameter.square_()


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _frobenius(matrix: Tensor) -> float:
    return float(matrix.norm())


def _all(subject: Subject, options: Options, default: str) -> dict[str, nn.Parameter]:
    found = subject.parameters(options, default)
    if not found:
        raise UserError("The model has no weights of that kind, so they have no norm.")
    return found


def _matrices(subject: Subject, options: Options) -> dict[str, Tensor]:
    layers = _all(subject, options, MOVED)
    return {n: p.detach().double().flatten(1) for n, p in layers.items() if p.ndim > 1}


def _log_product(subject: Subject, options: Options, norm: Callable[[Tensor], float]) -> Figure:
    layers = {name: norm(matrix) for name, matrix in _matrices(subject, options).items()}
    logs = [2 * math.log(n) if n > 0 else -math.inf for n in layers.values()]
    return Figure(value=sum(logs), details={"layers": layers})


def _sum(product: Figure) -> Figure:
    depth = len(product.details["layers"])
    return Figure(value=depth * math.exp(product.value / depth), details=product.details)


def _distance(
    subject: Subject, options: Options, norm: Callable[[Tensor], float], name: str
) -> Figure:
    if subject.initial is None:
        raise UserError(
            f"{name} is the distance from the weights before training, which are not known. Pass "
            "them as initial=, a state_dict."
        )
    layers = {}
    for key, matrix in _matrices(subject, options).items():
        before = subject.initial.get(key)
        if before is None or before.shape != subject.model.get_parameter(key).shape:
            raise UserError(f"{name}: initial= has no tensor {key} of the model's shape.")
        layers[key] = norm(matrix - before.to(matrix).flatten(1))
    return Figure(value=math.hypot(*layers.values()), details={"layers": layers})
