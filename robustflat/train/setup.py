"""What a run is made of, built from its configuration: device, images, network, step."""

from __future__ import annotations

import inspect

import torch
from torch import nn

import robustflat.data as data
from robustflat import models
from robustflat.config import RunConfig
from robustflat.errors import UserError
from robustflat.models.files import read_tensors
from robustflat.perturb import select
from robustflat.perturb.compiled import Compiled, check_compiled, check_compiler
from robustflat.train.graphed import Graphed
from robustflat.train.optim import build_optimizer
from robustflat.train.randomness import derived_seed
from robustflat.train.step import TrainStep

_PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_data(config: RunConfig) -> data.Data:
    """The images that a configuration names, split as it says.

    Raises:
        UserError: if they are missing, damaged or too few.
    """
    c = config.data
    noise = None if c.label_noise is None else data.LabelNoise(**c.label_noise.model_dump())
    return data.load(
        c.name,
        root=c.root,
        download=c.download,
        train_samples=c.train_samples,
        test_samples=c.test_samples,
        validation_samples=c.validation_samples,
        seed=config.seed,
        image_size=c.image_size,
        resize=c.resize,
        cache=c.cache,
        noise=noise,
    )


def build_model(config: RunConfig, dataset: data.Data, device: torch.device) -> nn.Module:
    """The network of a run with its initial weights, which depend on the seed alone.

    Raises:
        UserError: if name, options or the file of initial weights cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "model"))
        model = models.build(
            config.model.name,
            num_classes=len(dataset.classes),
            in_channels=dataset.shape[0],
            mean=dataset.mean,
            std=dataset.std,
            image_size=dataset.shape[1:],
            options=config.model.options,
        )
    if config.model.weights is not None:
        new = config.model.head == "new"
        models.load_state(model, read_tensors(config.model.weights), new_head=new)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout)


def use_threads(config: RunConfig) -> None:
    """Use as many CPU threads as the run asks for, if it does."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def perturbed_parameters(config: RunConfig, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the run's weight perturbation moves.

    Raises:
        UserError: if its selection fits none.
    """
    weights = config.weights.build()
    if weights.is_off:
        return {}
    try:
        return select(model, weights.parameters)
    except ValueError as error:
        raise UserError(f"weights.parameters: {error}") from None


def _attacked(config: RunConfig, model: nn.Module) -> nn.Module | None:
    if config.train.compile == "attack":
        return Compiled(model)
    return Graphed(model) if config.train.cuda_graphs else None


def build_step(
    config: RunConfig, model: nn.Module, device: torch.device, shape: tuple[int, ...]
) -> TrainStep:
    """What every step of a run does to ``model``, which takes images of ``shape``.

    Raises:
        UserError: if the selection of weights, the optimizer or the attack cannot work on it.
    """
    objective, attack = config.objective.build(), config.attack.build()
    perturbed_parameters(config, model)
    if attack is not None and "generator" not in inspect.signature(attack).parameters:
        raise UserError(
            f"The attack {config.attack.name} must take a random generator by name, as in "
            "attack(model, x, y, *, generator) -> x_adv, so that a resumed run repeats it."
        )
    if config.train.compile is not None:
        check_compiler(device)
        check_compiled(model, shape, device, getattr(attack, "mode", "eval"))
    if config.train.cuda_graphs and device.type != "cuda":
        raise UserError(
            f"train.cuda_graphs is true, but device is {device}, and only a GPU of NVIDIA or AMD "
            "has them. Leave train.cuda_graphs out."
        )
    half = config.train.precision == "fp16"
    return TrainStep(
        attack=attack,
        objective=objective,
        optimizer=build_optimizer(config.optimizer, model),
        clip=config.optimizer.clip,
        scaler=torch.amp.GradScaler(device.type) if half else None,
        precision=_PRECISIONS[config.train.precision],
        step_at=config.weights.step.at,
        reattack=config.weights.step.reattack,
        skip_nonfinite=config.train.on_nonfinite == "skip",
        attacked=_attacked(config, model),
        accumulate=config.train.accumulate,
    )
