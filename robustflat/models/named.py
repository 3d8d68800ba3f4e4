"""Owns the making of a model from its name: the built-in ones, timm's, and any factory's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from robustflat.errors import UserError, missing, nearest
from robustflat.models.normalized import Normalized
from robustflat.models.resnet import preact_resnet18, preact_resnet18_silu, resnet18, resnet50
from robustflat.models.small import SmallCNN, mlp
from robustflat.models.wide import wide_resnet, wide_resnet_silu
from robustflat.plugins import imported

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "mlp": mlp,
    "preact_resnet18": preact_resnet18,
    "preact_resnet18_silu": preact_resnet18_silu,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "wide_resnet": wide_resnet,
    "wide_resnet_silu": wide_resnet_silu,
}
# The names of the field: WRN-28-10 is a WideResNet of 28 layers, 10 times as wide.
_WRN = re.compile(r"wrn-(\d+)-(\d+)(-silu)?")


# What the images decide, where a factory's signature names it.
_OFFERED = ("num_classes", "in_channels", "image_size")


def is_known(name: str) -> bool:
    """Whether a model of this package has that name."""
    return name in MODELS or _WRN.fullmatch(name) is not None


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make a model that takes images in [0, 1].

    Weights are initialised from torch's global generator: seed it first.

    Args:
        name: A key of `MODELS`; `wrn-DEPTH-WIDEN` or `wrn-DEPTH-WIDEN-silu`; `timm:NAME`; or
            `package.module:factory`, looked up with the current directory importable. A factory is
            called with `options`, and with `num_classes`, `in_channels` and `image_size` where its
            signature names them; what it takes through **kwargs it is given only if `options` say
            so.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: Mean per channel in [0, 1] units, for the normalisation; None, with `std`: one that
            changes nothing, for weights that bring their own.
        std: Standard deviation per channel, likewise.
        image_size: Height and width of the images, for the models that depend on them (`mlp`).
        options: The model's own options. A factory's `normalize` (default false) says whether
            its result is put behind a normalisation; everything else is passed on. With timm's
            `pretrained: true` the pretrained network's own mean and std are used.

    Returns:
        The model. Built-in and timm models are `Normalized`.

    Raises:
        UserError: If the name or an option is unknown, or the model cannot be made.
    """
    if num_classes < 2:
        raise UserError(f"A classifier needs at least 2 classes, got {num_classes}.")
    mean = (0.0,) * in_channels if mean is None else mean
    std = (1.0,) * in_channels if std is None else std
    if len(mean) != in_channels:
        raise UserError(
            f"The normalisation has {len(mean)} channels but the images have {in_channels}."
        )
    options = dict(options or {})
    offered: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    if image_size is not None:
        offered["image_size"] = image_size
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), num_classes, in_channels, mean, std, options)
    if ":" in name:
        normalize = options.pop("normalize", False)
        net = _call(name, imported(name, "model"), offered, options)
        return Normalized(net, mean, std) if normalize else net
    if wide := _WRN.fullmatch(name):
        name = "wide_resnet_silu" if wide[3] else "wide_resnet"
        options = {"depth": int(wide[1]), "widen": int(wide[2])} | options
    if name not in MODELS:
        raise UserError(
            f"Unknown model {name!r}.{nearest(name, MODELS, 3)} There are {', '.join(MODELS)}; "
            "models of timm are written timm:NAME, your own package.module:factory."
        )
    return Normalized(_call(name, MODELS[name], offered, options), mean, std)


def _call(
    name: str, factory: Callable[..., object], offered: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    """Call a factory with what it accepts of `offered`, and with all of `options`."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"The model factory {name} cannot be called: {error}.") from error
    accepted = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    catch_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = {p.name for p in parameters if p.default is p.empty and p.name in accepted}
    # Of the built-in ones the images decide these; a factory may be told otherwise.
    free = accepted if ":" in name else accepted - set(_OFFERED)
    _refuse_options(name, [] if catch_all else [k for k in options if k not in free], free)
    given = {k: v for k, v in offered.items() if k in accepted} | options
    lacking = sorted(required - set(given))
    if lacking:
        raise UserError(f"The model {name} needs the option {', '.join(lacking)}.")
    try:
        model = factory(**given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The model {name} could not be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"The model factory {name} must return a torch.nn.Module, got {type(model).__name__}."
        )
    return model


def _refuse_options(name: str, unknown: list[str], valid: Iterable[str]) -> None:
    if unknown:
        raise UserError(
            f"The model {name} has no option {', '.join(map(repr, unknown))}. Its options: "
            f"{', '.join(sorted(valid)) or 'none'}."
        )


def _timm(
    name: str,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    options: dict[str, Any],
) -> nn.Module:
    """Make a timm model behind a normalisation."""
    try:
        import timm
    except ImportError as error:
        raise missing(f"The model timm:{name}", "timm", "timm") from error
    if not timm.is_model(name.split(".")[0]) and not name.startswith(
        ("hf-hub:", "hf_hub:", "local-dir:")
    ):
        raise UserError(f"timm has no model {name!r}.{nearest(name, timm.list_models(), 3)}")
    fixed: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    _refuse_options(f"timm:{name}", [k for k in options if k in fixed], ("pretrained", "..."))
    try:
        net: nn.Module = timm.create_model(name, **fixed, **options)
    except Exception as error:
        raise UserError(
            f"The model timm:{name} could not be made: {type(error).__name__}: {error}"
        ) from error
    if options.get("pretrained"):
        config = getattr(net, "pretrained_cfg", {})
        if len(config.get("mean", ())) == in_channels:
            mean, std = config["mean"], config["std"]
    return Normalized(net, mean, std)
