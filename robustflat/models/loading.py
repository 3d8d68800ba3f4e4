"""Owns the models that come from elsewhere: weights files, factories, TorchScript, exports."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, reason
from robustflat.models.files import read_tensors
from robustflat.models.likely import likely
from robustflat.models.named import MODELS, build, is_known
from robustflat.models.normalized import Normalize, Normalized
from robustflat.models.robustbench import from_robustbench
from robustflat.models.state import load_state

Kind = Literal["script", "export", "weights"]
_ROBUSTBENCH = "robustbench:"
Statistics = tuple[Sequence[float], Sequence[float]]


class FixedBatch(nn.Module):
    """A program made for batches of one size, used with any: split, the last batch filled up.

    Args:
        net: The program.
        size: Its batch size.
    """

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, C] of images [N, ...]."""
        short = -len(x) % self.size
        filled = torch.cat([x, x[-1:].expand(short, *x.shape[1:])]) if short else x
        return torch.cat([self.net(part) for part in filled.split(self.size)])[: len(x)]


def load_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    normalise: Literal["none"] | Statistics | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> nn.Module:
    """A model that takes images in [0, 1], from a name or a file.

    Args:
        spec: A name that `robustflat.models.build` knows (a built-in model, "timm:NAME",
            "package.module:factory"), "robustbench:NAME", or the file of a TorchScript or exported
            program.
        weights: File of a state dict for a model given by name.
        normalise: "none" if the network takes images in [0, 1] itself, else the mean and std per
            channel, in [0, 1] units, that it is to be put behind. Only where weights or model
            hold their normalisation in a form that this package knows can it be left out.
        num_classes: Number of logits; needed for names.
        in_channels: Channels of the images.
        image_size: Height and width, for the models that depend on them.
        options: The named model's own.
        trust: Whether programs may be loaded. A TorchScript or exported program is code, and
            loading or running one can do anything that a program of yours can.

    Returns:
        The model, in eval mode if it has modes.

    Raises:
        UserError: If there is no such model, a file cannot be used, the model would have random
            weights, or its normalisation is not known.
    """
    kind = recognised(spec, weights, options, trust)
    if spec.startswith(_ROBUSTBENCH):
        if weights is not None or normalise not in (None, "none"):
            raise UserError(
                f"{spec} brings its own weights and normalisation: name neither a file of weights "
                "nor --normalise."
            )
        net, normalise = from_robustbench(spec.removeprefix(_ROBUSTBENCH), options or {}), "none"
    elif kind is None:
        net = _named(spec, weights, num_classes, in_channels, image_size, dict(options or {}))
    else:
        net = _program(Path(spec), kind, trust)
    if any(isinstance(module, Normalize) for module in net.modules()):
        if normalise is not None:
            raise UserError(
                f"{weights or spec} holds its own normalisation: leave normalise (--normalise) out."
            )
    elif normalise is None:
        raise UserError(
            f"It cannot be read off {weights or spec} whether the network takes images in [0, 1]: "
            "say --normalise none if it does (a normalisation of its own is inside), --normalise "
            "data for the data set's mean and std in front of it, or MEAN/STD, such as "
            "0.485,0.456,0.406/0.229,0.224,0.225."
        )
    elif normalise != "none":
        net = Normalized(net, *normalise)
    for module in net.modules():
        # Not net.eval(), which exported programs refuse.
        module.training = False
    return net


def recognised(
    spec: str,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Literal["script", "export"] | None:
    """What a model is, of what `load_model` takes; nothing is loaded.

    Returns:
        The kind of a program; None of a model by name.

    Raises:
        UserError: If there is no such model, or something was said that does not fit it.
    """
    path = Path(spec)
    kind = file_kind(path) if path.is_file() else None
    if weights is not None and not (
        Path(weights).is_file() and file_kind(Path(weights)) == "weights"
    ):
        what = "a program" if Path(weights).is_file() else "no file"
        raise UserError(
            f"The model {spec} (--model) is that of a file of weights, and {weights} is {what}: "
            "mend the path, or leave it out."
        )
    if weights is not None and kind is not None:
        raise UserError(
            f"{spec} is a file; to load the weights {weights}, name a model instead of it."
        )
    if kind == "weights" and path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{spec} is a configuration, not a model: train it, and name the folder of its run."
        )
    if kind == "weights":
        raise UserError(
            f"{spec} is no program. If it holds weights, they need their model: name it with "
            "--model, such as --model preact_resnet18 or --model package.module:factory (in "
            "Python load_model(MODEL, FILE))."
        )
    if kind is None and weights is None and ":" not in spec and not is_known(spec):
        raise UserError(
            f"{spec} does not exist: there is no file or run {spec}, and no model of that name. "
            f"Models are {', '.join(MODELS)}, timm:NAME, robustbench:NAME and "
            "package.module:factory."
        )
    if kind is not None and options:
        raise UserError(f"{spec} is a program, which has no options: leave --model-option out.")
    if kind is None and trust:
        raise UserError(f"--trust is for programs, and {spec} is none: leave it out.")
    return kind


def _named(
    name: str,
    weights: str | Path | None,
    num_classes: int | None,
    in_channels: int,
    image_size: tuple[int, int] | None,
    options: dict[str, Any],
) -> nn.Module:
    """A model by name with its weights; behind a normalisation only if it came with one."""
    if num_classes is None:
        raise UserError(f"The model {name} needs num_classes, the number of its classes.")
    pretrained = name.startswith("timm:") and bool(options.get("pretrained"))
    is_factory = ":" in name and not name.startswith("timm:")
    # A factory may load weights itself; what the others make without a file is random.
    if weights is None and not pretrained and not is_factory:
        raise UserError(
            f"The model {name} has no weights, and random ones are not worth measuring: name a "
            "file of them (on the command line the file, with --model), or for timm say "
            "pretrained=true."
        )

    def made(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            # The same model each time, whatever of it is not in the file.
            torch.manual_seed(seed)
            return build(
                name,
                num_classes=num_classes,
                in_channels=in_channels,
                image_size=image_size,
                options=options | ({"pretrained": False} if pretrained and weights else {}),
            )

    model = made(0)
    if weights is None and is_factory:
        other = dict(made(1).named_parameters())
        drawn = [n for n, p in model.named_parameters() if not torch.equal(p, other[n])]
        if drawn:
            raise UserError(
                f"{name} draws weights at random ({drawn[0]} is another with every seed), which "
                "are not worth measuring: let it load them, or name a file of them (on the "
                "command line the file, with --model)."
            )
    if weights is None:
        known = pretrained and _is_whole(name, model, num_classes, in_channels)
    else:
        state = read_tensors(weights)
        if not isinstance(state, Mapping):
            raise UserError(
                f"{weights} holds {type(state).__name__}, not a state dict. Save "
                "model.state_dict()."
            )
        try:
            known = load_state(model, state) == "whole"
        except UserError as error:
            guess = likely(state)
            if guess in (None, name):
                raise
            raise UserError(f"{error} They look like the weights of {guess}.") from None
    # What `build` put in front is a stand-in unless it came with the weights; what a factory put
    # there is its own.
    own = is_factory and not options.get("normalize")
    return model.net if isinstance(model, Normalized) and not (known or own) else model


def _is_whole(name: str, model: nn.Module, classes: int, channels: int) -> bool:
    """Whether timm's pretrained model brings its normalisation; its head must be pretrained."""
    config = getattr(model.net, "pretrained_cfg", {})
    if config.get("num_classes", classes) != classes:
        raise UserError(
            f"The pretrained model {name} has {config['num_classes']} classes and the data "
            f"{classes}, so its last layer would be random. Name a file of weights for these data."
        )
    return len(config.get("mean", ())) == channels


def file_kind(path: Path) -> Kind:
    """What a file holds, by the names in its archive; nothing of it is loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "weights"
    if any(name.startswith("code/") for name in names):
        return "script"
    if any(
        name in ("archive_format", "serialized_exported_program.json") or name.startswith("models/")
        for name in names
    ):
        return "export"
    return "weights"


def _program(path: Path, kind: Kind, trust: bool) -> nn.Module:
    if not trust:
        raise UserError(
            f"{path} is a program ({'TorchScript' if kind == 'script' else 'torch.export'}), and "
            "loading or running one can run any code. If you trust where it comes from, say so: "
            "trust=True, or --trust on the command line."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "script":
                script: nn.Module = torch.jit.load(str(path), map_location="cpu")
                return script
            return _exported(torch.export.load(path))
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded: {reason(error)[:200]}. It is damaged, or was made by "
            "another version of torch."
        ) from error


def _exported(program: torch.export.ExportedProgram) -> nn.Module:
    """The module of an exported program, for any number of images."""
    inputs = program.graph_signature.user_inputs
    sizes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs
    ]
    if len(sizes) != 1:
        raise UserError(f"An exported classifier must take one input, this one takes {len(sizes)}.")
    module: nn.Module = program.module()
    batch = sizes[0][0]
    return FixedBatch(module, batch) if isinstance(batch, int) else module
