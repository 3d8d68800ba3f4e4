"""Owns the loading of weights that come from elsewhere: bare state dicts, wrapped or prefixed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.normalized import Normalized

_WRAPPERS = ("state_dict", "model_state_dict", "rmodel", "model", "net")
# Of DataParallel and torch.compile; of those that put a normalisation in front of a network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "1.", "0.")
# What each calls its normalisation: this package and RobustBench; torch.nn.Sequential; MAIR and
# others; RobustBench's wrapped networks; Madry et al.
_STATISTICS = (
    ("normalize.mean", "normalize.std"),
    ("0.mean", "0.std"),
    ("mean", "std"),
    ("mu", "sigma"),
    ("normalizer.new_mean", "normalizer.new_std"),
)
# Beside the network: a second name of the same tensors (Madry et al.), a number (MAIR).
_BESIDE = ("attacker.", "n_classes")
_COUNTER = "num_batches_tracked"


def load_state(
    model: nn.Module, state_dict: Mapping[str, Any], *, new_head: bool = False
) -> Literal["whole", "net"]:
    """Load a state dict saved by this package or by other code, all of it or nothing.

    Understood: `{"state_dict": ...}`, `{"model_state_dict": ...}`, `{"rmodel": ...}`,
    `{"model": ...}` and `{"net": ...}` around it; the prefixes of DataParallel, torch.compile and
    of models that are a normalisation and a network (`module.`, `model.`, `1.`, ...), with mean
    and std as this package, RobustBench, MAIR and Madry et al. name them; BatchNorm counters that
    are absent, as in files of old versions of torch (the model's own are kept); parameters that
    released code registers but never uses (`unused_keys` of the network), and other public names
    of the same parameters (its `public_keys`).

    Args:
        model: The model to fill.
        state_dict: The state.
        new_head: Leave the last layer, which makes the logits, as it is, whatever the state has
            there.

    Returns:
        "whole" if the state covers the model, normalisation included; "net" if it covers the
        network behind the normalisation, whose mean and std are then left as they are.

    Raises:
        UserError: If the keys or shapes do not match. The model is then unchanged.
    """
    net = model.net if isinstance(model, Normalized) else model
    own = net.state_dict()
    state, statistics = bare(unwrapped(state_dict), net, isinstance(model, Normalized))
    if new_head:
        head = {id(p) for p in _head(net).parameters()}
        drawn = {name for name, p in net.named_parameters() if id(p) in head}
        own = {k: v for k, v in own.items() if k not in drawn}
        state = {k: v for k, v in state.items() if k not in drawn}
    missing = [k for k in own if k not in state and not k.endswith(_COUNTER)]
    unexpected = [k for k in state if k not in own]
    shaped = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    if isinstance(model, Normalized) and statistics is not None:
        channels = len(model.normalize.mean)
        if not all(value.numel() == channels for value in statistics):
            raise UserError(
                f"The weights come with a normalisation of {statistics[0].numel()} channels, and "
                f"the images have {channels}."
            )
    if missing or unexpected or shaped:
        raise UserError(_complaint(own, state, missing, unexpected, shaped))
    net.load_state_dict(state, strict=False)
    if not isinstance(model, Normalized):
        return "whole"
    if statistics is None:
        return "net"
    for value, buffer in zip(statistics, (model.normalize.mean, model.normalize.std), strict=True):
        buffer.copy_(value.view_as(buffer))
    return "whole"


def bare(
    state: Mapping[str, Any], net: nn.Module, normalised: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """A state in the network's own names, and the mean and std that stand before it, if any.

    Args:
        state: With prefixes, other public names, parameters that are never used.
        net: The network.
        normalised: Whether a mean and a std are looked for.

    Returns:
        The state, and what was found of mean and std.
    """
    own = net.state_dict()
    unused = tuple(getattr(net, "unused_keys", ()))
    found, statistics = dict(state), None
    while True:
        for mean, std in _STATISTICS if normalised else ():
            if mean in found and std in found and mean not in own:
                statistics = found.pop(mean), found.pop(std)
        named = {k: v for k, v in found.items() if not k.startswith(unused)} if unused else found
        for public, ours in getattr(net, "public_keys", ()):
            named = {k.replace(public, ours): v for k, v in named.items()}
        if own.keys() & named.keys():
            return named, statistics
        found = {k: v for k, v in found.items() if not k.startswith(_BESIDE)}
        for prefix in _PREFIXES:
            if found and all(k.startswith(prefix) for k in found):
                found = {k.removeprefix(prefix): v for k, v in found.items()}
                break
        else:
            return named, statistics


def _head(net: nn.Module) -> nn.Module:
    """The last layer: as timm's networks say, or the last with parameters of its own."""
    named = getattr(net, "get_classifier", None)
    found = named() if callable(named) else None
    if isinstance(found, nn.Module):
        return found
    return [m for m in net.modules() if any(True for _ in m.parameters(recurse=False))][-1]


def unwrapped(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict inside the usual wrappers.

    Args:
        state_dict: What a file holds.

    Returns:
        Names and tensors.

    Raises:
        UserError: If there are none.
    """
    state: Any = state_dict
    for _ in range(3):
        inner = [
            state[key]
            for key in _WRAPPERS
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)
        ]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, Mapping):
        raise UserError(
            f"Expected a state dict (names to tensors), got {type(state).__name__}. Save "
            "model.state_dict(), not the model itself."
        )
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        what = f"it also holds {wrong[0]!r}" if wrong else "it is empty"
        raise UserError(
            f"Expected a state dict (names to tensors), but {what}. If the weights lie deeper in "
            f"the file, put them under one of: {', '.join(_WRAPPERS)}."
        )
    return state


def _complaint(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shaped: list[str],
) -> str:
    """One sentence on what does not fit, naming the first of each kind."""
    parts = []
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f", nearest there {near[0]}" if near else ""
        parts.append(f"{len(missing)} missing (first {missing[0]}{hint})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (first {unexpected[0]})")
    if shaped:
        key = shaped[0]
        parts.append(
            f"{len(shaped)} of another shape (first {key}: the file has "
            f"{list(state[key].shape)}, the model {list(own[key].shape)})"
        )
    return (
        f"The weights do not fit the model: {'; '.join(parts)}. Check the model's name and options "
        "and its number of classes."
    )
