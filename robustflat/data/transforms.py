"""Owns augmentation of one image at a time by torchvision's transforms, before they are batched."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from robustflat.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class torchvision:  # noqa: N801 - named as in YAML
    """Transforms of torchvision, one after the other, each image by itself and at its full size.

    Image files are decoded and transformed in ``data.workers`` processes. What an image becomes is
    a function of seed, epoch and its place in the epoch's order: not of the number of workers, of
    the processes that train, or of where a run was interrupted.

    Source: torchvision.transforms.v2, whose names and arguments are taken.

    Attributes:
        transforms: As ``{name: RandomResizedCrop, size: 224, scale: [0.08, 1]}``. They take uint8
            images and must leave them so, of ``data.image_size``: normalisation is the model's.
            ``RandomApply``, ``RandomChoice`` and ``RandomOrder`` have ``transforms`` of their own.
    """

    transforms: tuple[dict[str, Any], ...]
    _chain: v2.Transform = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_chain", v2.Compose([_made(one) for one in self.transforms]))

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch, image by image.

        Args:
            x: uint8 images [N, C, H, W]. Not changed.
            generator: Where the choices come from.

        Returns:
            The images, all of the same size.
        """
        seeds = torch.randint(2**62, (len(x),), generator=generator)
        shape = (x.shape[1], x.shape[2], x.shape[3])
        return torch.stack(
            [self.of_image(i, s, shape) for i, s in zip(x, seeds.tolist(), strict=True)]
        )

    def of_image(self, image: Tensor, seed: int, shape: tuple[int, int, int]) -> Tensor:
        """Augment an image of any size.

        Args:
            image: uint8 [C, H, W].
            seed: Decides all choices; torch's global generator is as before afterwards.
            shape: What must come out.

        Returns:
            uint8, of ``shape``.

        Raises:
            UserError: If anything else comes out, or a transform fails.
        """
        # The transforms know no other generator.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            found = self._chain(image)
        except Exception as error:
            raise UserError(
                f"data.augment.transforms cannot be applied to an image of {list(image.shape)} "
                f"({type(error).__name__}: {error})."
            ) from error
        finally:
            torch.set_rng_state(state)
        if not isinstance(found, Tensor) or found.dtype != torch.uint8 or found.shape != shape:
            what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else found
            raise UserError(
                f"data.augment.transforms made {what} of an image of {list(image.shape)}, and the "
                f"network takes uint8 {list(shape)}. End with a crop of data.image_size, and leave "
                "normalisation to the model."
            )
        return found


def _made(said: dict[str, Any]) -> v2.Transform:
    """The transform that a mapping names.

    Raises:
        ValueError: If there is none, or its arguments do not fit.
    """
    known = {
        name: found
        for name, found in vars(v2).items()
        if inspect.isclass(found) and issubclass(found, v2.Transform) and found is not v2.Transform
    }
    given = dict(said)
    name = str(given.pop("name", None))
    if name not in known:
        hint = nearest(name, known) or " See torchvision.transforms.v2."
        raise ValueError(
            f"transforms: each needs the name of one of torchvision, got {name}.{hint}"
        )
    if isinstance(given.get("transforms"), list | tuple):
        given["transforms"] = [_made(one) for one in given["transforms"]]
    if "interpolation" in given:
        given["interpolation"] = _interpolation(given["interpolation"])
    try:
        found: v2.Transform = known[name](**given)
    except (TypeError, ValueError) as error:
        arguments = list(inspect.signature(known[name]).parameters)
        raise ValueError(
            f"transforms: {name} cannot be made ({error}). Its arguments: {', '.join(arguments)}"
        ) from None
    return found


def _interpolation(name: Any) -> InterpolationMode:
    modes = [mode.value for mode in InterpolationMode]
    if name not in modes:
        raise ValueError(f"transforms: interpolation must be one of {', '.join(modes)}, got {name}")
    return InterpolationMode(name)
