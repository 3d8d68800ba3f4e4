"""Which parameters a weight perturbation moves, and the fixed scale T in delta = T * u."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from robustflat.perturb.ball import Ball, tensor_norms

# From the parameters' names and centre values to T: one tensor each, broadcastable; None is T = 1.
Scale = Callable[[list[str], list[Tensor]], list[Tensor] | None]

PATTERN_PREFIX = "re:"


def select(model: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The trainable parameters that ``which`` names; tied ones appear once.

    Args:
        model: any module.
        which: "all"; "matrices", those of more than one dimension (convolution and linear weights,
            as AWP takes them); "norm", those of normalisation layers (SAM-ON), by the type of the
            module; "no_norm", all others; or "re:PATTERN", those whose name the regular expression
            finds.

    Raises:
        ValueError: if ``which`` is none of these or selects nothing.
    """
    keep = _selector(which, model)
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad and keep(n, p)}
    if not chosen:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        raise ValueError(
            f"The weight perturbation's selection {which!r} fits none of the model's "
            f"{len(names)} trainable parameters (such as {', '.join(names[:3]) or 'none'}), so it "
            "would do nothing. Choose 'all', 'matrices', 'no_norm' or another 're:PATTERN'."
        )
    return chosen


def check_selection(which: str) -> str:
    """``which`` itself, if :func:`select` can read it.

    Raises:
        ValueError: if it cannot.
    """
    _selector(which, nn.Module())
    return which


def _selector(which: str, model: nn.Module) -> Callable[[str, Tensor], bool]:
    if which == "all":
        return lambda name, p: True
    if which == "matrices":
        return lambda name, p: p.ndim > 1
    if which in ("norm", "no_norm"):
        normalising = _normalising(model)
        return lambda name, p: (id(p) in normalising) == (which == "norm")
    if not which.startswith(PATTERN_PREFIX):
        raise ValueError(
            "A selection must be 'all', 'matrices', 'norm', 'no_norm' or 're:PATTERN', got "
            f"{which!r}. For parameters by name, write a regular expression after 're:', such as "
            f"'re:{which}'."
        )
    try:
        pattern = re.compile(which.removeprefix(PATTERN_PREFIX))
    except re.error as error:
        raise ValueError(f"The selection {which!r} is no regular expression: {error}.") from None
    return lambda name, p: pattern.search(name) is not None


def _normalising(model: nn.Module) -> set[int]:
    """The parameters of normalisation layers: torch's, and others whose class says Norm."""
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return {
        id(p)
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if isinstance(module, known) or ("Norm" in type(module).__name__ and p.ndim <= 1)
    }


def one(names: list[str], weights: list[Tensor]) -> None:
    """T = 1: radii are in the units of the weights (SAM, AMP)."""
    return


def tensor_norm(names: list[str], weights: list[Tensor]) -> list[Tensor]:
    """T = the L2 norm of each tensor: radii are relative to it (AWP, Wu et al. 2020, eq. 8)."""
    return tensor_norms(weights)


def row_norm(names: list[str], weights: list[Tensor]) -> list[Tensor]:
    """T = the L2 norm of each filter (Li et al. 2018, filter normalisation)."""
    return Ball(2, 1.0, "row").size(weights)


def global_norm(names: list[str], weights: list[Tensor]) -> list[Tensor]:
    """T = the L2 norm of all selected weights together."""
    total = torch.linalg.vector_norm(torch.stack(tensor_norms(weights)))
    return [total] * len(weights)


def magnitude(names: list[str], weights: list[Tensor]) -> list[Tensor]:
    """T = |w| for every entry (elementwise adaptive sharpness, Kwon et al. 2021)."""
    return list(torch._foreach_abs(weights))


def asam(eta: float) -> Scale:
    """T = |w| + eta on parameters named "weight", 1 on others (Kwon et al. 2021, released code)."""

    def scale(names: list[str], weights: list[Tensor]) -> list[Tensor]:
        """T = |w| + eta on parameters named "weight", 1 on others (Kwon et al. 2021)."""
        return [
            w.abs() + eta if "weight" in name else w.new_ones(())
            for name, w in zip(names, weights, strict=True)
        ]

    return scale


SCALES: dict[str, Scale] = {
    "one": one,
    "tensor_norm": tensor_norm,
    "row_norm": row_norm,
    "global_norm": global_norm,
    "magnitude": magnitude,
    "asam": asam(0.01),
}
