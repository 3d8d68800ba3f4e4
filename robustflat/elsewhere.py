"""Owns what has to be said of a model that no run made, and makes the model of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from robustflat import models
from robustflat.config.values import read_number
from robustflat.data import PACKAGED, Data, load
from robustflat.errors import UserError
from robustflat.models.loading import Statistics, recognised


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What has to be said of a model that no run made; a run knows all of it itself.

    Attributes:
        model: The name of the model, where the subject is a file of weights.
        model_option: Of the model, by name.
        data: The data set whose images it is measured on.
        root: Where that data set is; "data" if None.
        image_size: Of image folders: the shorter side is brought to it and the centre cut out.
        normalise: "none", "data" or "MEAN/STD" with one number a channel, separated by commas;
            see `robustflat.models.load_model`.
        trust: Whether a program may be loaded, which can run any code.
        download: Whether a missing data set is fetched, where torchvision can.
    """

    model: str | None = None
    model_option: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    root: Path | None = None
    image_size: int | None = None
    normalise: str | None = None
    trust: bool = False
    download: bool = False

    def told(self) -> dict[str, Any]:
        """What was said that a figure depends on, for its record."""
        names = ("model", "model_option", "image_size", "normalise")
        said = {name: getattr(self, name) for name in names}
        return {name: value for name, value in said.items() if value}

    def checked(self, target: str) -> tuple[str, str | None]:
        """A target, which is a model, as `load_model` takes it: what it is, and its weights.

        Nothing is loaded.

        Raises:
            UserError: If it is none, or not enough was said of it, or too much.
        """
        spec, weights = (target, None) if self.model is None else (self.model, target)
        recognised(spec, weights, self.model_option, self.trust)
        if self.data is None:
            raise UserError(
                f"To measure the model {target}, say also --data: a model alone names no images. "
                "For example: --data cifar10 --norm linf --eps 8/255."
            )
        self.checked_data()
        return spec, weights

    def checked_data(self) -> None:
        """Refuse what does not concern the data set.

        Raises:
            UserError: If it comes with a package, and a folder or a download was named.
        """
        for option, said in (("root", self.root), ("download", self.download)):
            if said and self.data in PACKAGED:
                raise UserError(
                    f"The data set {self.data} comes with a package, not from a folder: leave "
                    f"--{option} out."
                )

    def images(self) -> Data:
        """The data set; of image files nothing is decoded before it is needed.

        Raises:
            UserError: If it is not there, or damaged.
        """
        return load(
            str(self.data), root=self.root or Path("data"), download=self.download, cache=False,
            image_size=self.image_size,
        )  # fmt: skip

    def load(self, target: str, data: Data) -> nn.Module:
        """The model, with as many classes as `data` has.

        Raises:
            UserError: If it cannot be made.
        """
        return models.load_model(
            *self.checked(target),
            normalise=_normalisation(self.normalise, data),
            num_classes=len(data.classes),
            in_channels=data.shape[0],
            image_size=data.shape[1:],
            options=self.model_option,
            trust=self.trust,
        )


def _normalisation(said: str | None, data: Data) -> Literal["none"] | Statistics | None:
    """What `--normalise` says."""
    if said is None or said == "none":
        return said  # type: ignore[return-value]
    if said == "data":
        return data.mean, data.std
    try:
        mean, std = (tuple(float(read_number(n)) for n in p.split(",")) for p in said.split("/"))
    except ValueError:
        mean, std = (), ()
    channels = data.shape[0]
    if not len(mean) == len(std) == channels:
        raise UserError(
            f"--normalise must be none, data, or MEAN/STD with {channels} numbers each, separated "
            f"by commas, for images of {channels} channels; got {said!r}."
        )
    return mean, std
