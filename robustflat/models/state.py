"""Owns the loading of weights that come from elsewhere: bare state dicts, wrapped or prefixed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.normalized import Normalized

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")
_COUNTER = "num_batches_tracked"


def load_state(
    model: nn.Module, state_dict: Mapping[str, Any], *, new_head: bool = False
) -> Literal["whole", "net"]:
    """Load a state dict saved by this package or by other code, all of it or nothing.

    Understood: `{"state_dict": ...}`, `{"model_state_dict": ...}`, `{"model": ...}` and
    `{"net": ...}` around it; the prefixes of DataParallel and torch.compile; the keys of the whole
    model or of the network behind its normalisation; BatchNorm counters that are absent, as in
    files of old versions of torch (the model's own are kept); parameters that released code
    registers but never uses (`unused_keys` of the network), and other public names of the same
    parameters (its `public_keys`).

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
    state = _strip(_unwrap(state_dict))
    owner = model.net if isinstance(model, Normalized) else model
    for public, ours in getattr(owner, "public_keys", ()):
        state = {k.replace(public, ours): v for k, v in state.items()}
    target, kind = model, "whole"
    if isinstance(model, Normalized):
        inner = model.net.state_dict().keys()
        whole = model.state_dict().keys()
        if len(inner & state.keys()) > len(whole & state.keys()):
            target, kind = model.net, "net"
    unused = tuple(getattr(owner, "unused_keys", ()))
    if unused:
        inside = tuple(f"net.{key}" for key in unused)
        state = {k: v for k, v in state.items() if not k.startswith(unused + inside)}

    own = target.state_dict()
    if new_head:
        head = {id(p) for p in _head(owner).parameters()}
        drawn = {name for name, p in target.named_parameters() if id(p) in head}
        own = {k: v for k, v in own.items() if k not in drawn}
        state = {k: v for k, v in state.items() if k not in drawn}
    missing = [k for k in own if k not in state and not k.endswith(_COUNTER)]
    unexpected = [k for k in state if k not in own]
    shaped = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    if missing or unexpected or shaped:
        raise UserError(_complaint(own, state, missing, unexpected, shaped))
    target.load_state_dict(state, strict=False)
    return "whole" if kind == "whole" else "net"


def _head(net: nn.Module) -> nn.Module:
    """The last layer: as timm's networks say, or the last with parameters of its own."""
    named = getattr(net, "get_classifier", None)
    found = named() if callable(named) else None
    if isinstance(found, nn.Module):
        return found
    return [m for m in net.modules() if any(True for _ in m.parameters(recurse=False))][-1]


def _unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict inside the usual wrappers."""
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


def _strip(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict without the prefixes that wrappers put before every name."""
    found = dict(state)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in found):
                found = {key.removeprefix(prefix): value for key, value in found.items()}
                stripped = True
    return found


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
