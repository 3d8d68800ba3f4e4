"""Owns the models that come from elsewhere: weights files, factories, TorchScript, exports."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models import Normalized, build, load_state
from robustflat.models.files import read_tensors

Kind = Literal["script", "export", "weights"]


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
    num_classes: int | None = None,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    trust: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> nn.Module:
    """A model that takes images in [0, 1], from a name or a file.

    Args:
        spec: A name that `robustflat.models.build` knows (a built-in model, "timm:NAME",
            "package.module:factory"), or the file of a TorchScript or exported program.
        weights: File of a state dict for a model given by name.
        num_classes: Number of logits; needed for names.
        in_channels: Channels of the images.
        mean: The normalisation's mean per channel, in [0, 1] units. Not needed where the weights
            hold it, nor for a factory, which normalises by itself.
        std: Standard deviation likewise.
        image_size: Height and width, for the models that depend on them.
        trust: Whether programs may be loaded. A TorchScript or exported program is code, and
            loading or running one can do anything that a program of yours can.
        device: Where to put it.
        **options: The named model's own.

    Returns:
        The model, in eval mode if it has modes.

    Raises:
        UserError: If there is no such model, or a file cannot be used.
    """
    path = Path(spec)
    if path.is_file():
        if weights is not None:
            raise UserError(
                f"{spec} is a file; to load the weights {weights}, name a model instead of it."
            )
        return _program(path, trust).to(device)
    if path.suffix in (".pt", ".pth", ".pt2", ".ts", ".ckpt"):
        raise UserError(f"There is no file {spec}.")
    if num_classes is None:
        raise UserError(f"The model {spec} needs num_classes, the number of its classes.")
    given = mean is not None and std is not None
    model = build(
        spec,
        num_classes=num_classes,
        in_channels=in_channels,
        mean=mean or (0.0,) * in_channels,
        std=std or (1.0,) * in_channels,
        image_size=image_size,
        **options,
    )
    if weights is not None:
        part = load_state(model, read_weights(weights))
        if part == "net" and isinstance(model, Normalized) and not given:
            raise UserError(
                f"{weights} holds a network without its normalisation. Give mean and std, per "
                "channel in [0, 1] units; 0 and 1 if the network takes images in [0, 1] itself."
            )
    elif not given and isinstance(model, Normalized) and not options.get("pretrained"):
        raise UserError(
            f"The model {spec} has no weights to evaluate: name a weights file (or pretrained=True "
            "for timm)."
        )
    return model.to(device).eval()


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """Read a file saved by torch.save, tensors and plain containers only: it cannot run code.

    Raises:
        UserError: If there is no such file, or it is damaged, foreign or holds anything else.
    """
    path = Path(path)
    if path.is_file() and _kind(path) != "weights":
        raise UserError(f"{path} is a program, not weights: give it as the model itself.")
    content = read_tensors(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds {type(content).__name__}, not a state dict. Save model.state_dict()."
        )
    return content


def _kind(path: Path) -> Kind:
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


def _program(path: Path, trust: bool) -> nn.Module:
    kind = _kind(path)
    if kind == "weights":
        raise UserError(
            f"{path} is no TorchScript or exported program. If it holds weights, name their model "
            "and give the file as its weights."
        )
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
        first = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{path} cannot be loaded ({type(error).__name__}: {first[0][:200]}). It is damaged, "
            "or was made by another version of torch."
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
