"""Owns the subject: whatever is measured, a run or any model, with images, threat and home."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustflat.data as datasets
from robustflat import models
from robustflat.config import RunConfig
from robustflat.config.schema import EvaluateConfig, FlatnessConfig
from robustflat.data import Data, FileImages, Images
from robustflat.elsewhere import Elsewhere
from robustflat.errors import UserError
from robustflat.evaluate.record import fingerprint_of
from robustflat.evaluate.threat import Threat
from robustflat.train.checkpoint import load_checkpoint
from robustflat.train.folder import RunFolder
from robustflat.train.parallel import resolve_device
from robustflat.train.setup import load_data, use_threads

WEIGHTS = ("auto", "raw", "average")
# The only state that a model from elsewhere has.
GIVEN = "given"


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A subject's network in one state, in eval mode.

    Attributes:
        model: Takes images in [0, 1], returns logits.
        checkpoint: "best", "last", or "given" of a model from elsewhere.
        epoch: Of the checkpoint, if it has one.
        weights: "raw", or "average" (EMA or SWA).
    """

    model: nn.Module
    checkpoint: str
    epoch: int | None
    weights: str

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its weights."""
        return fingerprint_of(self.model)

    def state(self) -> dict[str, Any]:
        """Which network it is, for records; the model as its digest."""
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            "weights": self.weights,
            "model": self.digest,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """Whatever is measured. Images are read, and networks made, when they are asked for.

    Attributes:
        name: As it is called in messages and records.
        home: The folder in which its results are kept.
        device: Where its networks are.
        threat: What it is attacked with; None if nobody said and it was trained without.
        checkpoints: The states that it has, "best" before "last".
        evaluation: What is done where nothing else is said, and the size of batches.
        flatness: Likewise.
        seed: That of the training.
        data: The name of the data set.
        said: What was said of a model from elsewhere, and that its figures depend on.
        images: The data set, split; nothing is decoded before it is needed.
        restore: From the name of a checkpoint, and of weights in it, to the network, made once.
    """

    name: str
    home: RunFolder
    device: torch.device
    threat: Threat | None
    checkpoints: tuple[str, ...]
    evaluation: EvaluateConfig
    flatness: FlatnessConfig
    seed: int
    data: str
    said: Mapping[str, Any]
    images: Callable[[], Data]
    restore: Callable[[str, str], Network]

    @property
    def is_run(self) -> bool:
        """Whether it is a run."""
        return self.checkpoints != (GIVEN,)

    def network(self, checkpoint: str | None = None, weights: str | None = None) -> Network:
        """The network in one state.

        Args:
            checkpoint: "best" by robust validation accuracy, or "last"; a model from elsewhere
                has one state, which is not named.
            weights: "raw", their "average" (EMA or SWA), or "auto" (also None): the average if
                there is one.

        Raises:
            UserError: If it has no such state, or a file is damaged.
        """
        if not self.is_run:
            if weights is not None or checkpoint not in (None, GIVEN):
                raise UserError(
                    f"{self.name} is a model, not a run: it has one state, so leave --checkpoint "
                    "and --weights out."
                )
            return self.restore(GIVEN, "raw")
        if weights is not None and weights not in WEIGHTS:
            raise UserError(f"--weights must be one of {', '.join(WEIGHTS)}, got {weights!r}.")
        if checkpoint not in ("best", "last"):
            raise UserError(f"--checkpoint must be best or last, got {checkpoint!r}.")
        if checkpoint not in self.checkpoints:
            use = " or ".join(f"--checkpoint {name}" for name in self.checkpoints)
            raise UserError(
                f"The run {self.home.root} has no {checkpoint} checkpoint: it was trained without "
                "validation, or not to the end of an epoch. "
                f"{f'Use {use}' if use else 'Train it'}."
            )
        return self.restore(checkpoint, weights or "auto")

    def the_threat(self) -> Threat:
        """The threat.

        Raises:
            UserError: If it has none.
        """
        if self.threat is None:
            why = "was trained without an attack" if self.is_run else "is a model"
            raise UserError(
                f"{self.name} {why}, so it names no threat to be measured under. Say it: "
                "--norm linf --eps 8/255."
            )
        return self.threat

    def splits(self, limit: int | None) -> dict[str, Images]:
        """Un-augmented train, validation (if any) and test images, a fixed choice of each.

        Args:
            limit: How many of each, every class keeping its share; None for all.
        """
        data = self.images()
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        return {name: _part(split, limit) for name, split in splits.items() if split is not None}

    def tensors(self, split: str, limit: int) -> tuple[Tensor, Tensor]:
        """A fixed choice of un-augmented images, [M, C, H, W] in [0, 1], and labels.

        Args:
            split: "train" (without what is held out for validation), "validation" or "test".
            limit: How many, every class keeping its share; all, if there are fewer.

        Raises:
            UserError: If there is none to choose.
        """
        if limit < 1:
            raise UserError(f"The number of samples must be at least 1, got {limit}.")
        splits = self.splits(None)
        if split not in splits:
            raise UserError(f"The split must be one of {', '.join(splits)}, got {split!r}.")
        return splits[split].tensors(min(limit, len(splits[split])))


def open_subject(
    target: str | Path,
    *,
    norm: str | float | None = None,
    eps: float | None = None,
    device: str = "auto",
    output: Path | None = None,
    elsewhere: Elsewhere | None = None,
    local_rank: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Subject:
    """The subject that a name or a path stands for.

    Args:
        target: The folder of a run; a model's name ("timm:NAME", "package.module:factory", a
            built-in one); or a file: a TorchScript or exported program, or the weights of
            `elsewhere.model`.
        norm: Of the threat, with `eps`; that of the run's training attack if neither is given.
        eps: Radius in image units.
        device: Where to compute; "auto" is a GPU if there is one.
        output: The home of the results: a folder, or a file ending in .json for the evaluation,
            with all else in the folder of that name without the ending. A run's own folder, or
            evaluations/NAME, if None.
        elsewhere: What has to be said of a model.
        local_rank: Which GPU "auto" is, where several processes share a machine.
        batch_size: Images at a time; that of the run, or 200, if None. Attacks have other random
            starts with another one.
        workers: Threads that decode image files; as many as there are processors, at most 8, if
            None.

    Returns:
        The subject; nothing but the configuration of a run has been read.

    Raises:
        UserError: If there is no such thing, something is missing to measure it, or something
            was said that does not concern it.
    """
    if (norm is None) != (eps is None):
        raise UserError(
            "A threat is a norm and a radius in that norm: give --norm and --eps both, or neither."
        )
    threat = None if norm is None or eps is None else Threat.of(norm, eps)
    elsewhere = Elsewhere() if elsewhere is None else elsewhere
    place = resolve_device(device, local_rank)
    for option, number in (("batch-size", batch_size), ("workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"--{option} must be at least 1, got {number}.")
    if Path(target).is_dir():
        subject = _of_run(RunFolder(target), threat, place, output, elsewhere)
    else:
        subject = _of_model(str(target), threat, place, output, elsewhere)
    if batch_size is not None:
        evaluation = subject.evaluation.model_copy(update={"batch_size": batch_size})
        subject = replace(subject, evaluation=evaluation)
    if workers is not None:
        images = cache(lambda read=subject.images: _threaded(read(), workers))
        subject = replace(subject, images=images)
    return subject


def _threaded(data: Data, threads: int) -> Data:
    """The data, with image files decoded by so many threads."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    found: dict[str, Any] = {
        k: v.threaded(threads) for k, v in splits.items() if isinstance(v, FileImages)
    }
    if not found:
        raise UserError("--workers decode image files, and these data are in memory: leave it out.")
    return replace(data, **found)


def _of_run(
    folder: RunFolder,
    threat: Threat | None,
    device: torch.device,
    output: Path | None,
    elsewhere: Elsewhere,
) -> Subject:
    config = folder.read_config()
    other = ("data", "root", "image_size", "download") if elsewhere.data else ("download",)
    said = [f.name for f in fields(Elsewhere) if getattr(elsewhere, f.name)]
    said = [name for name in said if name not in other]
    if said:
        raise UserError(
            f"{folder.root} is a run, which knows its model and images itself: leave "
            f"{', '.join('--' + name.replace('_', '-') for name in said)} out (other images are "
            "named by --data)."
        )
    if elsewhere.download and elsewhere.data is None:
        Elsewhere(data=config.data.name, download=True).checked_data()
    use_threads(config)
    files = {"best": folder.best, "last": folder.last}
    # In the images' own place on the disk: only those that are measured are decoded.
    changes = {"cache": False} | ({"download": True} if elsewhere.download else {})
    lazily = config.data.model_copy(update=changes)
    own = cache(lambda: load_data(config.model_copy(update={"data": lazily})))
    evaluation = config.evaluate
    images = own
    if elsewhere.data is not None:
        elsewhere.checked_data()
        images = cache(lambda: _alike(elsewhere.images(), own(), elsewhere, folder))
        evaluation = evaluation.model_copy(update={"gap_samples": 0})
    return Subject(
        name=folder.name,
        home=folder if output is None else _home(output),
        device=device,
        threat=_trained_threat(config) if threat is None else threat,
        checkpoints=tuple(name for name, path in files.items() if path.is_file()),
        evaluation=evaluation,
        flatness=config.flatness,
        seed=config.seed,
        data=elsewhere.data or config.data.name,
        said=elsewhere.told() | ({"data": elsewhere.data} if elsewhere.data else {}),
        images=images,
        restore=cache(
            lambda checkpoint, weights: _restored(
                files[checkpoint], config, own(), device, checkpoint, weights
            )
        ),
    )


def _alike(data: Data, own: Data, elsewhere: Elsewhere, folder: RunFolder) -> Data:
    """Other data than the run's, if its network can classify them."""
    kinds = [(len(one.classes), one.shape) for one in (data, own)]
    if kinds[0] != kinds[1]:
        (count, shape), (classes, size) = kinds
        raise UserError(
            f"--data {elsewhere.data} has {count} classes of images {list(shape)}, and the run "
            f"{folder.root} was trained on {classes} classes of images {list(size)}."
        )
    return data


def _trained_threat(config: RunConfig) -> Threat | None:
    """The threat of a run's training attack; the one place that reads it."""
    if config.attack.name == "none":
        return None
    return Threat.of(config.attack.norm, config.attack.eps)


def _restored(
    path: Path, config: RunConfig, images: Data, device: torch.device, checkpoint: str, which: str
) -> Network:
    """The network of a run with the weights of a checkpoint."""
    saved = load_checkpoint(path)
    average = saved["average_model"]
    if which == "average" and average is None:
        raise UserError(
            f"The checkpoint {path} holds no averaged weights: the run has no train.average, or "
            "had not begun to average. Use --weights raw."
        )
    averaged = average is not None and which != "raw"
    # Everything is in the checkpoint, the normalisation too: the file of the initial weights is
    # not needed, nor is any image decoded.
    options = dict(config.model.options)
    if config.model.name.startswith("timm:"):
        options.pop("pretrained", None)
    with torch.random.fork_rng(devices=[]):
        model = models.build(
            config.model.name,
            num_classes=len(images.classes),
            in_channels=images.shape[0],
            image_size=images.shape[1:],
            options=options,
        )
    try:
        model.load_state_dict(average if averaged else saved["model"])
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint {path} does not fit the model of the run's config.yaml: "
            f"{str(error).splitlines()[-1].strip()} Was the configuration edited?"
        ) from None
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return Network(
        model=model.to(device).to(memory_format=layout).eval(),
        checkpoint=checkpoint,
        epoch=saved["epoch"],
        weights="average" if averaged else "raw",
    )


def _of_model(
    target: str,
    threat: Threat | None,
    device: torch.device,
    output: Path | None,
    elsewhere: Elsewhere,
) -> Subject:
    elsewhere.checked(target)
    images = cache(elsewhere.images)
    slug = re.sub(r"[^\w.-]+", "-", target).strip("-.")
    return Subject(
        name=target,
        home=_home(Path("evaluations") / slug if output is None else output),
        device=device,
        threat=threat,
        checkpoints=(GIVEN,),
        evaluation=EvaluateConfig(attacks=("autoattack",)),
        flatness=FlatnessConfig(),
        seed=0,
        data=str(elsewhere.data),
        said=elsewhere.told(),
        images=images,
        restore=cache(
            lambda checkpoint, _: Network(
                model=elsewhere.load(target, images()).to(device),
                checkpoint=checkpoint,
                epoch=None,
                weights="raw",
            )
        ),
    )


def _home(output: Path) -> RunFolder:
    if output.is_file() and output.suffix != ".json":
        raise UserError(
            f"--output {output} is a file: name a folder, or a file that ends in .json."
        )
    home = RunFolder(output.with_suffix("") if output.suffix == ".json" else output)
    if output.suffix == ".json":
        home.evaluation = output
    return home


def _part(images: Images, limit: int | None) -> Images:
    if limit is None or limit >= len(images):
        return images
    return images.subset(datasets.proportional(images.labels, limit, seed=0))


def distinct_names(roots: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [root.resolve().parts for root in roots]
    for length in range(1, max(map(len, parts), default=1)):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(root.resolve()) for root in roots]
