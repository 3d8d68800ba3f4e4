"""Owns what is seen of a model's operations: steps, noise, and gradients that mislead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Images that are looked at, and points of a line between two of them.
_IMAGES, _POINTS = 8, 32
# Half the length, in image units, over which a slope is taken: small, but above float32's noise.
_REACH = 1e-3
# Of the change of a margin, what its gradient may leave unexplained; what sound networks leave is
# below a tenth, steps leave nearly all.
_UNEXPLAINED = 0.3
_NOISE = 1e-4
# Floating-point results that are constant almost everywhere, or jump. What gives whole numbers or
# truth values (comparisons, argmax, casts) needs no list.
_STEPS = {
    "sign", "sgn", "round", "floor", "ceil", "trunc", "fix", "heaviside", "floor_divide",
    "threshold", "hardshrink", "quantize_per_tensor", "quantize_per_channel",
    "fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask",
}  # fmt: skip
# What a tensor carries: that the image is in it, or the name of an operation that it came through.
_IMAGE = "image"
_RANDOM = "random:"


class _Watch(TorchDispatchMode):
    """Follows the images through all operations below autograd.

    Args:
        x: The images.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        # Storages are held as long as they are watched, lest another tensor takes their address.
        self.carried: dict[int, tuple[Any, frozenset[str]]] = {}
        self._mark(x, frozenset({_IMAGE}))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation; its results carry what its arguments did, and its own name."""
        given = dict(kwargs or {})
        out = func(*args, **given)
        carried = frozenset[str]().union(*map(self.of, tree_leaves((args, given))))
        name = func._schema.name.partition("::")[2].rstrip("_")
        if _draws(func, args, given):
            carried |= {_RANDOM + name}
        for result in tree_leaves(out):
            if isinstance(result, Tensor):
                stepped = name in _STEPS or not result.is_floating_point()
                own = {name} if _IMAGE in carried and stepped else ()
                self._mark(result, carried.union(own))
        return out

    def of(self, tensor: object) -> frozenset[str]:
        """What a tensor, or any view of its memory, carries."""
        return self.carried.get(_address(tensor), (None, frozenset()))[1]

    def _mark(self, tensor: Tensor, carried: frozenset[str]) -> None:
        if carried:
            self.carried[_address(tensor)] = (tensor.detach(), carried)


def _address(tensor: object) -> int:
    try:
        return tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) else 0
    except NotImplementedError:  # sparse tensors have none
        return id(tensor)


def _draws(func: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention may, and does not in eval mode."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    asked = func._schema.arguments
    said = {one.name: one.default_value for one in asked}
    said |= dict(zip(said, args, strict=False)) | dict(given)
    if "attention" in func._schema.name:
        return bool(said["dropout_p"])
    return said.get("training", True) is not False


def of_operations(model: nn.Module, x: Tensor, random: bool = False) -> list[str]:
    """What of a model AutoAttack is not made for: noise, and gradients that mislead.

    One forward and backward pass is watched. Between image and logits it finds functions of the
    user's own (`torch.autograd.Function`), random numbers, and whatever gives steps: rounding,
    signs, comparisons, choices. Those are ordinary where the gradient is right all the same, as
    that of a ReLU written with a comparison; so the gradient of the margin is held against the
    margin itself, on short ways about images, where a straight-through gradient is found out,
    and along lines from image to image, where steps are crossed that no gradient tells of.

    Costs 16 forward passes, and 36 forward and backward passes, on at most 8 images.

    Args:
        model: Takes images in [0, 1], in eval mode.
        x: Images, float32 [N, C, H, W].
        random: Whether two passes over the same images have been seen to differ.

    Returns:
        Sentences; none of a network whose operations are ordinary.
    """
    # Inside the box: at its edge a model that clamps has two slopes.
    x = x[:_IMAGES].clamp(2 * _REACH, 1 - 2 * _REACH)
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        with _Watch(inputs) as watch:
            logits = model(inputs)
    carried = watch.of(logits)
    del watch
    drawn = sorted(name.removeprefix(_RANDOM) for name in carried if name.startswith(_RANDOM))
    if random or drawn:
        what = (
            "Two passes over the same images gave different outputs"
            if random
            else "The model draws random numbers while it classifies"
        )
        names = f" ({', '.join(drawn)})" if drawn else ""
        what += f"{names}: for a randomised model the figures hold for one draw only."
        return [f"{what} Use autoattack:rand, and repeat it."]
    own = sorted({_name(node) for node in _nodes(logits.grad_fn) if _is_own(node)})
    steps = sorted(carried - {_IMAGE})
    unexplained = max(_short(model, x), _long(model, x))
    found = []
    if own:
        found.append(f"functions whose gradient is written by hand ({', '.join(own)})")
    if steps:
        found.append(f"operations that move in steps or choose ({', '.join(steps)})")
    if unexplained < _UNEXPLAINED:
        return []
    has = f" has {' and '.join(found)}, and" if found else ":"
    what = f"The model{has} its gradient leaves {100 * unexplained:.0f} % of the change of its "
    what += "margins unexplained: attacks that follow gradients may find too little."
    return [f"{what} Use an attack adapted to this model."]


def _nodes(root: Any) -> Iterator[Any]:
    """All nodes of a graph of gradients."""
    todo, seen = [root], {root}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        yield node
        for after, _ in node.next_functions:
            if after not in seen:
                seen.add(after)
                todo.append(after)


def _is_own(node: Any) -> bool:
    """Whether its backward is somebody's, not torch's own (such as checkpointing)."""
    made = getattr(node, "_forward_cls", None)
    return isinstance(node, BackwardCFunction) and not made.__module__.startswith("torch.")


def _name(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


def _margins(model: nn.Module, x: Tensor, pair: Tensor) -> Tensor:
    """The difference of two logits [N], fixed for each image."""
    logits = model(x)
    first, second = logits.gather(1, pair).unbind(1)
    return first - second


def _slopes(model: nn.Module, x: Tensor, pair: Tensor) -> Tensor:
    """The gradient of the margins."""
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        value = _margins(model, inputs, pair).sum()
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, inputs, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _short(model: nn.Module, x: Tensor) -> float:
    """The share that the gradient leaves unexplained of changes on ways of 2e-3 and 2e-4.

    Central differences along the gradient's signs at half of the pixels, other ones each time: of
    single pixels the effect would be lost in float32's noise. The median of the images, and the
    better of the two lengths, since networks have kinks.
    """
    pair = model(x).topk(2, dim=1).indices
    slope = _slopes(model, x, pair)
    generator = torch.Generator().manual_seed(0)
    left = []
    for reach in (_REACH, _REACH / 10):
        error, change = torch.zeros(len(x)), torch.zeros(len(x))
        for _ in range(3):
            coins = torch.randint(0, 2, (2, *x.shape), generator=generator).to(x)
            way = reach * coins[0] * torch.where(slope == 0, 2 * coins[1] - 1, slope.sign())
            there, back = _margins(model, x + way, pair), _margins(model, x - way, pair)
            noise = _NOISE * torch.maximum(there.abs(), back.abs())
            told, seen = 2 * (slope * way).flatten(1).sum(1), there - back
            error += ((told - seen).abs() - noise).clamp_min(0).cpu()
            change += torch.maximum(told.abs(), seen.abs()).cpu()
        left.append(float((error / change.clamp_min(1e-30)).median()))
    return min(left)


def _long(model: nn.Module, x: Tensor) -> float:
    """Likewise on lines from each image to the next: a function is the integral of its gradient."""
    pair = model(x).topk(2, dim=1).indices
    way = x.roll(1, 0) - x
    told, most = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
    for point in range(_POINTS):
        slope = _slopes(model, x + way * (point + 0.5) / _POINTS, pair)
        step = (slope * way).flatten(1).sum(1) / _POINTS
        told, most = told + step, most + step.abs()
    seen = _margins(model, x + way, pair) - _margins(model, x, pair)
    most = torch.maximum(most, seen.abs()).clamp_min(1e-30)
    return float(((seen - told).abs() / most).median())
