"""Owns the guess of which network a file of weights belongs to, for those who named another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from robustflat.models.named import build
from robustflat.models.state import bare, unwrapped

_NAMES = ("preact_resnet18", "preact_resnet18_silu", "resnet18", "resnet50")
# A block of the first stage, in the names of Zagoruyko's followers and of Gowal et al. 2020.
_WIDE = re.compile(r"(block1\.layer|layer\.0\.block)\.(\d+)\.conv_?[01]\.weight")
# The logits' weights and biases, and the channels of the images, may be others.
_OTHERS = 3


def likely(weights: Mapping[str, Any]) -> str | None:
    """The name of the network that has parameters of these names and shapes.

    Args:
        weights: A state dict, wrapped or prefixed as `load_state` understands it.

    Returns:
        A name that `build` knows, or None.
    """
    state = unwrapped(weights)
    names = list(_NAMES)
    found = [(m[1], int(m[2]), state[key]) for key in state if (m := _WIDE.search(key))]
    if found:
        kind, last, weight = max(found, key=lambda one: one[1])
        silu = "-silu" if kind.startswith("layer") else ""
        names.insert(0, f"wrn-{6 * (last + 1) + 4}-{max(1, len(weight) // 16)}{silu}")
    for name in names:
        with torch.device("meta"):
            model = build(name, num_classes=10, in_channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
        net: Any = model.net
        own = net.state_dict()
        theirs, _ = bare(state, net, True)
        lacking = [key for key in own if key not in theirs and "num_batches" not in key]
        shapes = [key for key in own if key in theirs and theirs[key].shape != own[key].shape]
        if not lacking and len(theirs) <= len(own) and len(shapes) <= _OTHERS:
            return name
    return None
