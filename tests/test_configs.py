"""Every configuration that ships: it reads, it trains, and the papers' recipes are faithful."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustflat import models, registry
from robustflat.config import RunConfig, read_config
from robustflat.perturb import Perturbation, no_perturbation
from robustflat.perturb.scales import select
from robustflat.train.curriculum import Curriculum
from robustflat.train.feed import Feed
from robustflat.train.parallel import Processes
from robustflat.train.setup import build_model, build_step, load_data

ROOT = Path(__file__).parents[1]
PAPERS = sorted((ROOT / "configs/papers").glob("*.yaml"))
DIGITS = sorted((ROOT / "configs/digits").glob("*.yaml"))
OTHERS = [
    p for name in ("quickstart", "tutorial") for p in (ROOT / "configs" / name).glob("*.yaml")
]
ALL = [*PAPERS, *DIGITS, *sorted(OTHERS)]
CPU = torch.device("cpu")

# Million parameters: Zagoruyko & Komodakis 2016 give 36.5 for WRN-28-10 and 11.0 for 16-8; 46.16
# and 11.17 are those of the public checkpoints. Another 90 classes add 90 * (512 + 1).
PARAMETERS = {
    "cifar10-prn18": "11.17",
    "svhn-prn18": "11.17",
    "cifar100-prn18": "11.22",
    "cifar10-wrn34": "46.16",
    "cifar10-wrn28": "36.48",
    "cifar10-wrn16": "10.96",
    # Those of torchvision's networks of these names.
    "imagenet-convnextb": "88.59",
    "imagenet-convnextt": "28.59",
    "imagenet-resnet50": "25.56",
}
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "image_folder": 1000}

# The epoch, counted from 1, that is the first at each learning rate, read off the released code:
# Rice et al. and AWP for AT count from 0 and ask t / epochs < 0.5, < 0.75; TRADES, TRADES-AWP and
# MART count from 1 and ask epoch >= 75, 90 or 100, 150; AMP has MultiStepLR at 100 and 150 counted
# from 0; davda54/sam asks epoch < 0.3, 0.6, 0.8 of the epochs, counted from 0.
HALVES = {1: 0.1, 101: 0.01, 151: 0.001}
RATES = {
    "cifar10-prn18-at": HALVES,
    "cifar10-prn18-at-awp": HALVES,
    "cifar10-prn18-l2-at-awp": HALVES,
    "cifar100-prn18-at-awp": HALVES,
    "cifar10-prn18-amp": HALVES,
    "cifar100-prn18-amp": HALVES,
    "cifar10-prn18-mlcat": HALVES,
    "cifar10-prn18-rebat": {1: 0.1, 101: 0.1 / 1.5, 151: 0.1 / 1.5**2},
    "svhn-prn18-at-awp": {1: 0.01, 101: 0.001, 151: 0.0001},
    "cifar10-wrn34-trades": {1: 0.1, 75: 0.01},
    "cifar10-wrn34-trades-awp": {1: 0.1, 100: 0.01, 150: 0.001},
    "cifar10-wrn34-mart": {1: 0.1, 75: 0.01, 90: 0.001},
    "cifar10-wrn34-mart-awp": {1: 0.1, 100: 0.01, 150: 0.001},
    "cifar10-wrn16-sam": {1: 0.1, 61: 0.02, 121: 0.004, 161: 0.0008},
    "cifar10-wrn16-asam": {1: 0.1, 61: 0.02, 121: 0.004, 161: 0.0008},
}
# Rates that change all the time, by epoch counted from 1, as the released code sets them for the
# whole epoch; ours agree at the point of the epoch (0 its start, 1 its end) and to the tolerance
# that stand beside. torch's OneCycleLR of Wang et al. counts its warm-up from 0 to 9.
FLOWING: dict[str, tuple[Callable[[int], float], float, float]] = {
    "cifar10-wrn34-acat-awp": (lambda e: 0.1 * (1 + math.cos((e - 1) / 110 * math.pi)), 0.0, 1e-12),
    "cifar10-wrn34-oaat-awp": (lambda e: 0.1 * (1 + math.cos((e - 1) / 200 * math.pi)), 0.0, 1e-12),
    "cifar10-wrn34-ikl-awp": (lambda e: 0.1 * (1 + math.cos(e / 201 * math.pi)), 1.0, 1e-3),
    "cifar10-prn18-nfgsm": (lambda e: 0.2 * (1 - abs(e - 15) / 15), 1.0, 1e-12),
    "cifar10-wrn28-silu-generated": (
        lambda e: (
            0.008 + 0.096 * (1 - math.cos(math.pi * (e - 1) / 9))
            if e <= 10
            else 0.1 * (1 + math.cos(math.pi * (e - 10) / 390))
        ),
        1.0,
        0.02,
    ),
}
FLOWING["imagenet-convnextb-at"] = FLOWING["imagenet-convnextb-at-awp"] = (
    lambda e: 1e-4 * e if e <= 5 else 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * e / 300)) / 2,
    1.0,
    8e-6,
)
FLOWING["imagenet-convnextt-at"] = (
    lambda e: 5e-5 * e if e <= 20 else 5e-4 * (1 + math.cos(math.pi * (e - 20) / 280)),
    1.0,
    1e-7,
)
FLOWING["imagenet-resnet50-at"] = (
    lambda e: 0.04 * e if e <= 5 else 0.2 * 0.1 ** ((e - 1) // 30),
    1.0,
    1e-12,
)
FLOWING["cifar10-wrn28-silu-generated-awp"] = FLOWING["cifar10-wrn28-silu-generated"]
# The first epoch, counted from 1, in which the weights are perturbed: SVHN's script counts epochs
# from 0 and asks epoch >= 5, TRADES-AWP's counts from 1 and asks epoch >= 10.
FIRST_PERTURBED = {
    "cifar10-prn18-at-awp": 1,
    "svhn-prn18-at-awp": 6,
    "cifar10-wrn34-trades-awp": 10,
    "cifar10-wrn34-ikl-awp": 10,
    "cifar10-wrn34-acat-awp": 10,
    "cifar10-wrn34-oaat-awp": 10,
    "cifar10-wrn28-silu-generated-awp": 10,
    "imagenet-convnextb-at-awp": 6,
}
# Those that normalise although their objective is TRADES.
NORMALISED = {"cifar10-wrn28-silu-generated", "cifar10-wrn28-silu-generated-awp"}


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extra images of the shape of the digits, in the format of the generated data sets."""
    path = tmp_path_factory.mktemp("extra") / "extra.npz"
    labels = np.arange(40) % 10
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(path, image=pixels, label=labels)
    return path


def tiny(path: Path, extra: Path) -> RunConfig:
    """The configuration on a few digits and, if it is a paper's, with a tiny network.

    Attack, objective, weights, optimizer, schedule and the number of epochs are as they are.
    """
    asked = read_config(path)
    changes = [
        "device=cpu",
        "data.name=digits",
        "data.download=false",
        "data.train_samples=40",
        "data.test_samples=20",
        "data.validation_samples=20",
        "train.batch_size=32",
    ]
    if path.parent.name == "papers":
        changes.append("model={name: small_cnn, options: {width: 4}}")
    if asked.data.name == "image_folder":
        changes += ["data.augment={name: standard}", "data.image_size=null", "data.resize=null"]
        changes.append("train.channels_last=false")  # of which `flat` makes no vector
    elif asked.data.augment.cutout:
        changes.append("data.augment.cutout=4")
    if asked.data.extra is not None:
        changes.append(f"data.extra.path={extra}")
    config = read_config(path, changes)
    for kept in ("attack", "objective", "weights", "optimizer", "schedule"):
        assert getattr(config, kept) == getattr(asked, kept)
    return config


def one_step(config: RunConfig, model: nn.Module, weights: Perturbation) -> tuple[Tensor, Tensor]:
    """What a run's first step would do; ``model`` is changed."""
    dataset = load_data(config)
    batches = next(Feed(config, dataset, CPU, Processes(), weights).batches(0, 0))
    model.train()
    step = build_step(config, model, CPU, dataset.shape)
    step.objective.start(model)
    return step(model, batches, weights, torch.Generator().manual_seed(0))


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("path", ALL, ids=named)
def test_takes_a_step_and_its_weight_perturbation_matters(path: Path, extra: Path) -> None:
    config = tiny(path, extra)
    model = build_model(config, load_data(config), CPU)
    start, plain = flat(model).clone(), copy.deepcopy(model)

    value, norm = one_step(config, model, config.weights.build())
    assert torch.isfinite(value)
    assert torch.isfinite(norm)
    assert norm > 0
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), start)

    one_step(config, plain, no_perturbation())
    same = torch.equal(flat(model), flat(plain))
    # Momentum has yet to gather, and no image is below RWP's threshold before anything is learnt.
    assert same == (config.weights.name in ("none", "momentum_sam", "rwp"))


def test_none_is_forgotten() -> None:
    shipped = {p for p in (ROOT / "configs").rglob("*.y*ml") if p.parent.name != "study"}
    assert shipped == set(ALL)
    assert len(PAPERS) >= 22
    assert len(DIGITS) >= 39


def test_names_are_those_of_the_files_and_unique() -> None:
    # The name is the run's folder: two of the same would overwrite each other.
    for path in ALL:
        prefix = "" if path.parent.name == "papers" else f"{path.parent.name}-"
        assert read_config(path).name == prefix + path.stem


# --- the recipes of the papers


@pytest.mark.parametrize("path", PAPERS, ids=named)
def test_a_recipe_says_where_it_comes_from(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    heads = [m[1] for line in header if (m := re.match(r"# ([A-Z][a-z]+(?: time)?): \S", line))]
    assert heads == ["Source", "Command", "Published", "Run time", "Deviations"]
    assert f"robustflat train configs/papers/{path.name}" in "\n".join(header)
    assert all(len(line) <= 100 for line in lines)
    for other in re.findall(r"\bthose of (\S+\.yaml)", " ".join(header)):
        assert (path.parent / other).is_file()


@pytest.mark.parametrize("path", PAPERS, ids=named)
def test_a_recipe_names_the_published_network(path: Path) -> None:
    config = read_config(path)
    with torch.device("meta"):
        model = models.build(
            config.model.name,
            num_classes=CLASSES[config.data.name],
            in_channels=3,
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            image_size=(32, 32),
            options=config.model.options,
        )
    assert all(p.is_meta for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    published = PARAMETERS["-".join(path.stem.split("-")[:2])]
    assert f"{count / 1e6:.2f}" == published
    # TRADES, MART, RST and their kin feed pixels in [0, 1]; the others normalise.
    raw = config.objective.name in ("trades", "mart", "ikl") and path.stem not in NORMALISED
    assert isinstance(model, models.Normalized) != raw


@pytest.mark.parametrize("path", [p for p in PAPERS if p.stem in RATES], ids=named)
def test_a_recipe_has_the_published_learning_rates(path: Path) -> None:
    config, rate = read_config(path), 0.0
    for epoch in range(1, config.train.epochs + 1):
        rate = RATES[path.stem].get(epoch, rate)
        for within in (0.0, 0.999):
            factor = config.schedule.build()(epoch - 1 + within, config.train.epochs, 0.001)
            assert config.optimizer.lr * factor == pytest.approx(rate, rel=1e-12), epoch


@pytest.mark.parametrize("path", [p for p in PAPERS if p.stem in FIRST_PERTURBED], ids=named)
def test_a_recipe_warms_up_as_published(path: Path) -> None:
    weights = read_config(path).weights
    assert weights.when.from_epoch == FIRST_PERTURBED[path.stem]


def test_every_recipe_but_the_cosine_has_its_rates_checked() -> None:
    assert {p.stem for p in PAPERS} - {*RATES, *FLOWING} == {"cifar10-wrn28-rst-awp"}


@pytest.mark.parametrize("path", [p for p in PAPERS if p.stem in FLOWING], ids=named)
def test_a_recipe_has_the_published_flowing_rates(path: Path) -> None:
    config = read_config(path)
    published, point, tolerance = FLOWING[path.stem]
    factor, epochs = config.schedule.build(), config.train.epochs
    for epoch in range(1, epochs + 1):
        at = (epoch - 1, epochs, 0.0) if point == 0 else (epoch - 1e-3, epochs, 1e-3)
        found = config.optimizer.lr * factor(*at)
        assert found == pytest.approx(published(epoch), abs=tolerance), epoch


def test_published_attacks_grow_as_in_the_released_code() -> None:
    # Epochs counted from 1: DKL and DAJAT take eps * epoch / epochs; OA-AT 4/255 for a quarter and
    # 16/255 * epoch / epochs then, with 5 steps of eps / 2 and then 10 of eps / 4.
    for name, epochs in (("ikl", 200), ("acat", 110), ("oaat", 200)):
        path = ROOT / f"configs/papers/cifar10-wrn34-{name}-awp.yaml"
        grow = Curriculum(read_config(path))
        for epoch in (1, 2, 49, 50, 51, 100, epochs):
            attack = grow(epoch - 1, 7, 383)
            assert attack is not None
            if name == "oaat":
                eps = 4 / 255 if epoch <= epochs // 4 else 16 / 255 * epoch / epochs
                steps, share = (5, 1 / 2) if epoch <= epochs // 4 else (10, 1 / 4)
            else:
                eps, steps, share = 8 / 255 * epoch / epochs, 5, 1 / 2
            assert attack.ball.radius == pytest.approx(eps)
            assert (attack.ascent.steps, attack.ascent.step_size) == (steps, pytest.approx(share))
            assert attack.loss == ("ce" if name == "oaat" else "kl")


# --- the small ones


@pytest.mark.parametrize("path", DIGITS, ids=named)
def test_a_small_configuration_is_short_and_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line.startswith("# ") for line in lines[:3]] == [True, True, False]
    assert len(lines) <= 24
    assert all(len(line) <= 100 for line in lines)
    config = read_config(path)
    assert config.threads == 1
    assert config.data.name == "digits"


def test_every_kind_of_weight_perturbation_has_a_small_configuration() -> None:
    shown = {read_config(p).weights.name for p in DIGITS}
    assert shown == set(registry.weights)


def test_half_of_the_parameters_is_half(extra: Path) -> None:
    config = tiny(ROOT / "configs/digits/sam-half.yaml", extra)
    model = build_model(config, load_data(config), CPU)
    moved = sum(p.numel() for p in select(model, config.weights.parameters).values())
    assert 0.4 < moved / flat(model).numel() < 0.6
