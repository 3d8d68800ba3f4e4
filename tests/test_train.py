"""Whole small runs: what they write, that they repeat, and that watching changes nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_support import (
    SMALL_CNN,
    config,
    contents,
    differences,
    rows,
    same_run,
    saved,
    trained,
)

import robustflat as rf
from robustflat import registry
from robustflat.data import Data
from robustflat.errors import UserError
from robustflat.evaluate import measure
from robustflat.report.tensorboard import TensorBoard
from robustflat.train import Trainer, TrainingDivergedError, train
from robustflat.train.averaging import Average, ema
from robustflat.train.checkpoint import load_checkpoint, save_checkpoint
from robustflat.train.feed import Feed
from robustflat.train.folder import RunFolder, json_safe
from robustflat.train.monitor import Monitor
from robustflat.train.parallel import Processes
from robustflat.train.setup import build_model, build_step, load_data
from robustflat.train.step import Batch, TrainStep

CPU = torch.device("cpu")


class Watcher:
    """A listener that does nothing."""

    def on_start(self, epochs: int, steps: int, done: int) -> None: ...
    def on_step(self, epoch: int, step: int, values: Any) -> None: ...
    def on_epoch(self, row: dict[str, Any]) -> None: ...
    def on_end(self) -> None: ...


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with BatchNorm, augmentation and a validation split."""
    return trained(
        tmp_path_factory.mktemp("plain"),
        model=SMALL_CNN,
        data__augment={"crop": 1},
        train__epochs=3,
    )


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(config())


# --- what a run leaves behind


def test_metrics_are_complete(plain: RunFolder) -> None:
    found = rows(plain)
    assert [row["epoch"] for row in found] == [1, 2, 3]
    assert [row["steps"] for row in found] == [4, 8, 12]  # 60 images by 16
    for row in found:
        assert row["skipped_steps"] == 0
        assert row["train_loss"] > 0
        assert row["gradient_norm"] > 0
        assert row["lr"] == pytest.approx({1: 0.1, 2: 0.01, 3: 0.001}[row["epoch"]])
        assert row["monitor_average"] is None
        assert set(row["monitor"]) == {"train", "validation"}
        for figures in row["monitor"].values():
            assert set(figures) == {
                "clean_accuracy",
                "clean_loss",
                "robust_accuracy",
                "robust_loss",
            }
            assert 0 <= figures["clean_accuracy"] <= 1
            assert figures["robust_loss"] >= figures["clean_loss"]


def test_a_run_leaves_what_the_design_says(plain: RunFolder) -> None:
    assert set(contents(plain.root)) == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
    }
    environment = json.loads(plain.environment_file.read_text())
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert environment["threads"] == 1
    assert plain.read_config() == config(
        plain.root.parent, model=SMALL_CNN, data__augment={"crop": 1}, train__epochs=3
    )


def test_the_monitored_figures_are_those_of_the_checkpoint(plain: RunFolder, digits: Data) -> None:
    # Measured again from the files alone.
    model = build_model(plain.read_config(), digits, CPU)
    state = saved(plain.last)
    assert state["epoch"] == 3
    model.load_state_dict(state["model"])
    figures = rows(plain)[-1]["monitor"]
    assert digits.validation is not None
    x, y = digits.validation.tensors()
    model.eval()
    with torch.no_grad():
        logits = model(x)
    assert figures["validation"]["clean_accuracy"] == int((logits.argmax(1) == y).sum()) / 40
    assert figures["validation"]["clean_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, y)), rel=1e-5
    )
    # No start of PGD-2 explains more than its radius allows: FGSM is near it.
    fgsm = measure(model, [(x, y)], rf.fgsm("linf", 0.1))
    assert figures["validation"]["robust_loss"] == pytest.approx(fgsm.loss, rel=0.15)


def test_best_is_the_first_of_the_highest_robust_validation_accuracy(tmp_path: Path) -> None:
    folder = trained(tmp_path, train__epochs=6, optimizer={"name": "sgd", "lr": 0.2})
    scores = [row["monitor"]["validation"]["robust_accuracy"] for row in rows(folder)]
    best = max(range(6), key=lambda i: (scores[i], -i))
    assert len(set(scores)) > 2
    running = -1.0
    for row, value in zip(rows(folder), scores, strict=True):
        assert row["is_best"] == (value > running)
        running = max(running, value)
    assert saved(folder.best)["epoch"] == best + 1
    assert saved(folder.last)["best"] == {"epoch": best + 1, "score": scores[best]}


def test_without_an_attack_best_is_the_highest_clean_accuracy(tmp_path: Path) -> None:
    folder = trained(
        tmp_path, train__epochs=3, attack={"name": "none"}, objective={"name": "standard"}
    )
    scores = [row["monitor"]["validation"]["clean_accuracy"] for row in rows(folder)]
    assert "robust_accuracy" not in rows(folder)[0]["monitor"]["train"]
    assert saved(folder.best)["epoch"] == scores.index(max(scores)) + 1


def test_monitoring_less_often(tmp_path: Path) -> None:
    folder = trained(tmp_path, train__epochs=5, monitor__every=2)
    assert [row["monitor"] is not None for row in rows(folder)] == [False, True, False, True, True]
    folder = trained(tmp_path, name="never", monitor__every=0, data__validation_samples=0)
    assert [row["monitor"] for row in rows(folder)] == [None, None]
    assert not folder.best.exists()


def test_train_loss_and_lr_are_those_of_the_steps(tmp_path: Path) -> None:
    # One step an epoch at a learning rate of (almost) zero: the loss of the whole set, by hand.
    changes: dict[str, Any] = {
        "optimizer": {"name": "sgd", "lr": 1e-12},
        "weights": {"name": "none"},
        "objective": {"name": "standard"},
        "train__batch_size": 60,
    }
    folder = trained(tmp_path, **changes)
    settings = folder.read_config()
    dataset = load_data(settings)
    model = build_model(settings, dataset, CPU)
    x, y = dataset.train.tensors()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))  # type: ignore[union-attr]
    for row in rows(folder):
        assert row["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_rate_falls_within_an_epoch_and_the_radius_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    radii: list[float] = []
    take = TrainStep.__call__

    def watched(self: TrainStep, model: Any, batches: Any, weights: Any, *rest: Any) -> Any:
        radii.append(weights.ball.radius)
        return take(self, model, batches, weights, *rest)

    monkeypatch.setattr(TrainStep, "__call__", watched)
    folder = trained(
        tmp_path,
        optimizer={"name": "sgd", "lr": 0.1},
        schedule={"name": "linear"},
        weights={"name": "sam", "rho": 0.1, "when": {"radius": "lr"}},
        model=SMALL_CNN,
        monitor__every=0,
        train__average={"name": "swa", "start_epoch": 0},
        train__batch_size=20,
    )
    # Two epochs of three steps.
    assert radii == pytest.approx([0.1 * (1 - step / 6) for step in range(6)])
    assert [row["lr"] for row in rows(folder)] == pytest.approx([0.1 * 4 / 6, 0.1 / 6])
    # Unmonitored, the average is yet made whole at the end.
    assert saved(folder.last)["average_model"] is not None


def test_what_is_built_is_what_the_configuration_says(digits: Data) -> None:
    def built(seed: int) -> nn.Module:
        return build_model(config(seed=seed), digits, CPU)

    one, two, other = built(0), built(0), built(1)
    assert differences(one.state_dict(), two.state_dict()) == []
    assert differences(one.state_dict(), other.state_dict())
    for where in ("never", "ascent", "descent"):
        around = config(weights={"name": "awp", "steps": 2, "step": {"reattack": where}})
        assert build_step(around, one, CPU, digits.shape).reattack == where


def test_every_epoch_has_an_order_of_its_own(digits: Data) -> None:
    feed = Trainer(config(), digits, CPU)._feed
    one, two, again = (torch.cat([b[0][0] for b in feed.batches(e, 0)]) for e in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_an_average_warms_up_unless_told_not_to() -> None:
    # The first update takes the weights as they are; the second decays by 2 / 11, or by 0.9.
    for warmup, expected in ((True, 9 / 11), (False, 1 / 10)):
        model = nn.Linear(1, 1, bias=False)
        average = Average(ema(0.9, warmup=warmup), model)
        for value in (0.0, 1.0):
            nn.init.constant_(model.weight, value)
            average.after_step(model, 0)
        assert float(average.model.weight) == pytest.approx(expected)


# --- the same again


def test_equal_seeds_give_equal_bits_and_others_do_not(plain: RunFolder, tmp_path: Path) -> None:
    said: dict[str, Any] = {"model": SMALL_CNN, "data__augment": {"crop": 1}, "train__epochs": 3}
    torch.manual_seed(1234)  # what the caller's generator holds does not matter
    again = trained(tmp_path, **said)
    same_run(plain, again)
    other = trained(tmp_path, name="other", seed=1, **said)
    assert differences(saved(plain.last)["model"], saved(other.last)["model"])


@pytest.mark.parametrize("average", [{"name": "ema"}, {"name": "swa", "start_epoch": 0}])
def test_watching_changes_no_bit(tmp_path: Path, average: Any) -> None:
    said: dict[str, Any] = {"model": SMALL_CNN, "train__average": average}
    quiet = trained(tmp_path, name="quiet", monitor__every=0, monitor__step_every=0, **said)
    often = {"monitor__flatness_every": 1, "monitor__flatness": ["ascent_robust", "average_clean"]}
    often |= {"monitor__step_every": 1, "monitor__pictures_every": 1}
    watched = config(tmp_path, name="watched", listeners=["tensorboard"], **often, **said)
    folder, _ = train(watched, listeners=lambda f: [TensorBoard(f.root)])
    one, two = saved(quiet.last), saved(folder.last)
    for key in ("model", "optimizer", "average", "average_model", "epoch", "step"):
        assert differences(one[key], two[key]) == [], key
    assert [r["train_loss"] for r in rows(quiet)] == [r["train_loss"] for r in rows(folder)]
    for row in rows(folder):
        assert set(row["flatness"]) == {"ascent_robust", "average_clean"}
        assert all(math.isfinite(value) for value in row["flatness"].values())


def test_flatness_is_watched_on_images_of_every_class() -> None:
    # As a folder of images has them: sorted by class, which each image's value says here.
    y = torch.arange(60) // 6
    x = (y / 10).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 0, 0, 0].detach()))
    said = {"monitor__flatness_samples": 20, "monitor__flatness": ["average_clean"]}
    monitor = Monitor(config(**said), {"train": (x, y)}, CPU, Processes())
    monitor.flatness(model)
    assert seen
    for images in seen:
        assert torch.bincount((images * 10).round().long(), minlength=10).tolist() == [2] * 10


# --- every method and every kind of data


WEIGHTS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "awp": {"name": "awp", "gamma": "1/100", "steps": 2, "when": {"from_epoch": 2}},
    "awp_global": {"name": "awp_global", "gamma": 0.01, "parameters": "matrices"},
    "amp": {"name": "amp", "epsilon": 0.1, "steps": 2, "group": "global"},
    "sam": {"name": "sam", "rho": 0.05, "norm": "linf", "when": {"radius": "lr"}},
    "asam": {"name": "asam", "rho": 0.5, "statistics": "centre"},
    "gsam": {"name": "gsam", "rho": 0.05, "alpha": 0.2, "when": {"every": 2}},
    "random": {"name": "random", "gamma": 0.1, "group": "row", "step": {"reattack": "descent"}},
    "rwp": {"name": "rwp", "gamma": 0.01, "threshold": 2.2, "steps": 2},
    "gnp": {"name": "gnp", "rho": 0.05},
    "gam": {"name": "gam", "norm_rho": 0.05},
    "fsam": {"name": "fsam", "rho": 0.05},
    "vasso": {"name": "vasso", "rho": 0.06, "theta": 0.5},
    "momentum_sam": {"name": "momentum_sam", "rho": 0.05},
    "looksam": {"name": "looksam", "rho": 0.05, "every": 2},
    "lesam": {"name": "lesam", "rho": 0.05, "sigma": 0.01},
    "esam": {"name": "esam", "rho": 0.05},
    "zsharp": {"name": "zsharp", "rho": 0.05, "quantile": 0.5},
    "rwp_mix": {"name": "rwp_mix", "gamma": 0.05},
    "custom": {
        "name": "custom",
        "radius": 0.1,
        "group": "tensor",
        "scale": "tensor_norm",
        "start": "uniform",
        "keep": "best",
        "step_size": 0.5,
        "steps": 2,
        "parameters": r"re:weight$",
    },
    "msam": {"name": "msam", "chunk": 4, "inner": {"name": "sam", "rho": 0.05}},
    "nsam": {
        "name": "nsam",
        "batches": 3,
        "inner": {"name": "sam", "rho": 0.05},
        "when": {"until_epoch": 1},
    },
    "alternating": {"name": "awp", "gamma": 0.01, "steps": 2, "step": {"reattack": "ascent"}},
    "released": {"name": "awp", "gamma": 0.01, "step": {"at": "perturbed"}},
}


def test_the_table_of_methods_is_complete() -> None:
    assert set(registry.weights) == {w["name"] for w in WEIGHTS.values()}


@pytest.fixture(scope="module")
def by_method(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("methods")
    return {
        name: saved(trained(folder, name=name, weights=said, model=SMALL_CNN).last)["model"]
        for name, said in WEIGHTS.items()
    }


@pytest.mark.parametrize("method", WEIGHTS)
def test_every_method_trains_and_is_not_another(method: str, by_method: dict[str, Any]) -> None:
    model = by_method[method]
    assert all(t.isfinite().all() for t in model.values())
    for other in WEIGHTS:
        if other != method:
            assert differences(model, by_method[other]), other


@pytest.mark.parametrize(
    "said",
    [
        {"objective": {"name": "trades", "beta": 3}, "train__precision": "bf16"},
        {"objective": {"name": "mart"}, "optimizer": {"name": "adamw", "clip": 0.5}},
        {"objective": {"name": "standard", "label_smoothing": 0.1}, "attack": {"name": "none"}},
        {"attack": {"name": "fgsm", "eps": "8/255", "norm": "l2"}, "train__channels_last": True},
        {"attack": {"name": "pgd", "eps": 0.5, "norm": "l1", "loss": "margin", "restarts": 2}},
        {"attack": {"name": "pgd", "eps": 0.1, "loss": "dlr", "mode": "batch", "keep": "best"}},
        {"data__label_noise": {"rate": 0.4}},
        {"data__mix": {"name": "mixup"}, "weights": {"name": "msam", "chunk": 4, "inner": "sam"}},
        {"data__mix": {"name": "cutmix", "alpha": 0.5}, "objective": {"name": "trades"}},
        {"train__precision": "fp16", "objective": {"name": "trades"}},
        {"schedule": {"name": "one_cycle"}, "train__on_nonfinite": "skip"},
        {"schedule": {"name": "cosine", "warmup_epochs": 0.5}, "train__deterministic": True},
    ],
    ids=lambda said: "-".join(str(k) for k in said),
)
def test_combinations_train(tmp_path: Path, said: dict[str, Any]) -> None:
    try:
        folder = trained(tmp_path, **({"model": SMALL_CNN} | said))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in saved(folder.last)["model"].values())
    found = rows(folder)
    assert [row["skipped_steps"] for row in found] == [0, 0] or said.get(
        "train__precision"
    ) == "fp16"
    plain_weights = saved(folder.last)["model"]["net.linear.weight"]
    assert plain_weights.dtype == torch.float32


def test_label_noise_is_in_the_labels_trained_on_alone(tmp_path: Path) -> None:
    clean, noisy = load_data(config()), load_data(config(data__label_noise={"rate": 0.5}))
    assert int((clean.train.labels != noisy.train.labels).sum()) == 30
    assert clean.validation is not None
    assert noisy.validation is not None
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    folder = trained(tmp_path, data__label_noise={"rate": 0.5})
    assert rows(folder)[-1]["monitor"]["train"]["clean_accuracy"] < 0.9


def test_extra_images_are_trained_on(tmp_path: Path, digits: Data) -> None:
    # Black images that are all called 7: after training on them, so they are.
    path = tmp_path / "extra.npz"
    np.savez(path, image=np.zeros((50, 8, 8, 1), np.uint8), label=np.full(50, 7, np.int64))
    said: dict[str, Any] = {"train__epochs": 4, "weights": {"name": "none"}}
    outputs = []
    for name, extra in (("without", None), ("with", {"path": str(path), "fraction": 0.5})):
        folder = trained(tmp_path, name=name, data__extra=extra, **said)
        model = build_model(folder.read_config(), digits, CPU).eval()
        model.load_state_dict(saved(folder.last)["model"])
        outputs.append(float(model(torch.zeros(1, 1, 8, 8)).softmax(1)[0, 7].detach()))
    assert outputs[1] > 0.9
    assert outputs[0] < 0.5
    broken = config(tmp_path, name="none", data__extra={"path": str(tmp_path / "no.npz")})
    with pytest.raises(UserError, match=r"no extra data file"):
        train(broken)
    assert not (tmp_path / "none").exists()


# --- averages


def test_ema_follows_every_step(tmp_path: Path, digits: Data) -> None:
    settings = config(
        tmp_path,
        model=SMALL_CNN,
        train__average={"name": "ema", "decay": 0.8, "warmup": False},
        monitor__every=0,
    )
    trainer = Trainer(settings, digits, CPU)
    history: list[dict[str, Tensor]] = []

    class Watch(Watcher):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            history.append({k: v.clone() for k, v in trainer.model.state_dict().items()})

    trainer.teller.listeners = [Watch()]
    assert trainer.run()
    assert len(history) == 8
    assert trainer.average is not None
    for key, got in trainer.average.model.state_dict().items():
        if not got.is_floating_point():
            continue
        expected = history[0][key].double()
        for state in history[1:]:
            expected = 0.8 * expected + 0.2 * state[key].double()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_swa_is_the_mean_of_the_epochs_and_has_statistics_of_its_own(
    tmp_path: Path, digits: Data
) -> None:
    settings = config(
        tmp_path,
        model=SMALL_CNN,
        train__epochs=4,
        train__average={"name": "swa", "start_epoch": 1},
        objective={"name": "standard"},
        data__augment={"crop": 2},
        data__mix={"name": "mixup"},
    )
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings, resume=False)
    trainer = Trainer(settings, digits, CPU, folder=folder)
    ends: list[dict[str, Tensor]] = []

    class Watch(Watcher):
        def on_epoch(self, row: dict[str, Any]) -> None:
            ends.append({k: v.clone() for k, v in trainer.model.named_parameters()})

    trainer.teller.listeners = [Watch()]
    trainer.run()
    state = saved(folder.last)["average_model"]
    for key in ends[0]:
        mean = torch.stack([e[key].detach().double() for e in ends[1:]]).mean(0)
        torch.testing.assert_close(state[key].double(), mean, rtol=1e-5, atol=1e-7)
    # The mean of the batches' statistics, by hand, through the averaged first layer.
    net = build_model(settings, digits, CPU)
    net.load_state_dict(state)
    first = net.net.features[0]  # type: ignore[union-attr,index]
    seen = [
        first(net.normalize(x)).detach().transpose(0, 1).flatten(1)  # type: ignore[operator]
        for ((x, _),) in trainer._feed.batches(4, 0)
    ]
    assert len(seen) == 4
    mean = torch.stack([h.mean(1) for h in seen]).mean(0)
    variance = torch.stack([h.var(1) for h in seen]).mean(0)
    torch.testing.assert_close(state["net.features.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["net.features.1.running_var"], variance, rtol=1e-4, atol=1e-5)
    assert [row["monitor_average"] is not None for row in rows(folder)] == [False, True, True, True]
    scores = [
        (row["monitor_average"] or row["monitor"])["validation"]["robust_accuracy"]
        for row in rows(folder)
    ]
    assert saved(folder.best)["epoch"] == scores.index(max(scores)) + 1


def test_what_swa_is_refreshed_with_does_not_depend_on_its_stale_statistics(digits: Data) -> None:
    # While BatchNorm's statistics are computed anew, the ones it holds mean nothing, and an attack
    # that looked at them would be one on another network.
    settings = config(model=SMALL_CNN, train__average={"name": "swa", "start_epoch": 0})
    trainer = Trainer(settings, digits, CPU)
    assert trainer.average is not None
    trainer.average.after_epoch(trainer.model, 0)
    model, found = trainer.average.model, []
    both = model, trainer.model
    model.train()  # as it is while statistics are computed
    for mean, variance in ((0.0, 1.0), (5.0, 9.0)):
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.fill_(mean if "mean" in name else variance)
        found.append(torch.cat(list(trainer._feed.refresh_inputs(trainer._step, *both, 0))))
    with torch.no_grad():  # the average alone is attacked, wherever training has got to
        for p in trainer.model.parameters():
            p.mul_(-1)
    found.append(torch.cat(list(trainer._feed.refresh_inputs(trainer._step, *both, 0))))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    x, _ = digits.train.tensors()
    assert not torch.equal(found[0].sum(0), x.sum(0))  # they are attacked


def test_swa_is_refreshed_with_what_an_attack_of_one_s_own_makes_in_training(digits: Data) -> None:
    # It may look at running statistics, so it meets the trained network, whose own are whole; and
    # it may run in train mode, which moves them.
    settings = config(
        model=SMALL_CNN,
        attack={"name": f"{__name__}:an_attack_of_ones_own"},
        train__average={"name": "swa", "start_epoch": 0},
    )
    trainer = Trainer(settings, digits, CPU)
    assert trainer.average is not None
    trainer.model.train()
    trainer.teller.start(0, 0)
    trainer._train_epoch()
    trainer.average.after_epoch(trainer.model, 0)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    modes = [module.training for module in trainer.model.modules()]
    trainer._refresh_average()
    assert differences(dict(trainer.model.state_dict()), before) == []
    assert [module.training for module in trainer.model.modules()] == modes
    # By hand: the mean of the first layer's statistics over the batches it is trained on.
    first = trainer.average.model.net.features[0]  # type: ignore[union-attr,index]
    normalize = trainer.average.model.normalize
    means = []
    for ((x, y),) in trainer._feed.batches(0, 0):
        shown = looks_at_the_statistics(copy.deepcopy(trainer.model), x, y, generator=None)
        means.append(first(normalize(shown)).detach().mean((0, 2, 3)))  # type: ignore[operator]
    found = trainer.average.model.net.features[1].running_mean  # type: ignore[union-attr,index]
    torch.testing.assert_close(found, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


def an_attack_of_ones_own() -> Any:
    return looks_at_the_statistics


def looks_at_the_statistics(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None
) -> Tensor:
    """One step from where the model stands in eval mode, after a pass in the mode it came in."""
    training = model.training
    model(x)  # in train mode this moves the running statistics
    model.eval()
    moved = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
    model.train(training)
    return (x + 0.2 * g.sign()).clamp(0, 1)


def test_a_run_goes_on_from_the_weights_of_other_classes_with_a_new_head(
    tmp_path: Path, plain: RunFolder, digits: Data
) -> None:
    # A run's own checkpoint, as the file; the new layer is the seed's, as without a file.
    said = {"model__weights": str(plain.best), "model__head": "new"}
    made = build_model(config(tmp_path, model=dict(SMALL_CNN), seed=5, **said), digits, CPU)
    fresh = build_model(config(tmp_path, model=dict(SMALL_CNN), seed=5), digits, CPU)
    source = saved(plain.best)["model"]
    for name, value in made.state_dict().items():
        expected = fresh.state_dict() if name.startswith("net.linear.") else source
        assert torch.equal(value, expected[name]), name
    assert any(name.startswith("net.linear.") for name in source)
    said.pop("model__head")
    whole = build_model(config(tmp_path, model=dict(SMALL_CNN), seed=5, **said), digits, CPU)
    assert differences(dict(whole.state_dict()), source) == []


# --- early stopping


def scripted(trainer: Trainer, scores: list[float]) -> list[dict[str, Any]]:
    """Let the monitor find these robust accuracies, epoch by epoch; the rows told."""
    told: list[dict[str, Any]] = []
    real = trainer._monitor

    class Scripted:
        def __call__(self, model: nn.Module) -> dict[str, Any]:
            found = real(model)
            found["validation"]["robust_accuracy"] = scores[trainer.epoch - 1]
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    class Tell(Watcher):
        def on_epoch(self, row: dict[str, Any]) -> None:
            told.append(row)

    trainer._monitor = Scripted()  # type: ignore[assignment]
    trainer.teller.listeners = [Tell()]
    return told


@pytest.mark.parametrize(
    ("every", "changes", "seen"),
    [
        (0, {}, []),
        (1, {}, [4, 8, 12, 16, 20]),
        (2, {}, [8, 16, 20]),
        (100, {}, [20]),  # at the end
        (100, {"train__stop_at_loss": 50.0}, [4]),  # wherever that is
        (0, {"train__stop_at_loss": 50.0}, []),
        (None, {}, [8, 12, 20]),  # 6, 12 and 18 lie in the second, third and fifth epoch
    ],
)
def test_pictures_come_in_their_turn_and_at_the_end(
    digits: Data, monkeypatch: pytest.MonkeyPatch, every: int | None, changes: Any, seen: list[int]
) -> None:
    settings = config(
        train__epochs=5, monitor__pictures_every=every, objective={"name": "standard"},
        weights={"name": "none"}, **changes,
    )  # fmt: skip
    told: list[int] = []

    class Tell(Watcher):
        def on_pictures(self, row: dict[str, Any], pictures: Any) -> None:
            told.append(row["steps"])

    monkeypatch.setattr("robustflat.train.monitor.take", lambda *_, **__: None)
    monkeypatch.setattr("robustflat.train.teller._PICTURE_STEPS", 6)
    Trainer(settings, digits, CPU, listeners=[Tell()]).run()
    assert told == seen


def test_steps_are_told_the_rate_they_have_and_looking_is_no_training(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(
        schedule={"name": "linear"}, monitor__step_every=1, monitor__edge={"every": 1},
        objective={"name": "standard"}, weights={"name": "none"},
    )  # fmt: skip
    rates, seconds = [], []

    class Tell(Watcher):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            rates.append(values["lr"])

        def on_epoch(self, row: dict[str, Any]) -> None:
            seconds.append(row["seconds"])

    monkeypatch.setattr(Monitor, "at_edge", lambda *_: {"edge/seconds": 1000.0})
    trainer = Trainer(settings, digits, CPU, listeners=[Tell()])
    assert trainer.run()
    first = settings.optimizer.lr
    steps = 2 * trainer.steps_per_epoch
    factor = settings.schedule.build()
    expected = [first * factor(k / 4, 2, 1 / 4) for k in range(steps)]
    assert rates == pytest.approx(expected)
    assert rates[0] > 2 * rates[-1]
    # A thousand seconds of looking are taken off what the epoch took.
    assert all(-1000 < taken < -900 for taken in seconds)


def test_a_checkpoint_of_another_version_is_refused_by_what_it_lacks(
    tmp_path: Path, digits: Data
) -> None:
    settings = config(tmp_path, train__epochs=1)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings, resume=False)
    Trainer(settings, digits, CPU, folder=folder).run()
    old = load_checkpoint(folder.last)
    del old["drift"], old["ended"]
    save_checkpoint(folder.last, old)
    with pytest.raises(UserError, match=r"has no drift and no ended: another version of robustf"):
        Trainer(settings, digits, CPU, folder=folder).resume()


SCORES = [0.2, 0.5, 0.4, 0.5, 0.6, 0.3, 0.6, 0.5, 0.9, 0.9]


@pytest.mark.parametrize(
    ("patience", "every", "ends"),
    [(1, 1, 3), (2, 1, 4), (3, 1, 8), (4, 1, 10), (1, 2, 4), (2, 2, 4), (3, 3, 6)],
)
def test_training_stops_when_no_epoch_was_better_for_so_long(
    tmp_path: Path, digits: Data, patience: int, every: int, ends: int
) -> None:
    settings = config(
        tmp_path, train__epochs=10, train__patience=patience, monitor__every=every,
        objective={"name": "standard"},
    )  # fmt: skip
    trainer = Trainer(settings, digits, CPU)
    told = scripted(trainer, SCORES)
    assert trainer.run()
    assert trainer.epoch == told[-1]["epoch"] == ends
    assert [row["ended"] for row in told] == [None] * (ends - 1) + [
        "patience" if ends < 10 else None
    ]


def test_a_stopped_run_counts_on_and_an_ended_one_stays_ended(tmp_path: Path, digits: Data) -> None:
    said = {"train__epochs": 10, "train__patience": 3, "objective": {"name": "standard"}}
    settings = config(tmp_path, **said)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings, resume=False)
    trainer = Trainer(settings, digits, CPU, folder=folder)
    scripted(trainer, SCORES)
    inner = trainer._end_epoch

    def stops_after_seven() -> None:
        inner()
        trainer.stop_requested = trainer.epoch == 7

    trainer._end_epoch = stops_after_seven  # type: ignore[method-assign]
    assert not trainer.run()
    for _ in range(2):  # goes on, two epochs into its patience; then has nothing to do
        again = Trainer(settings, digits, CPU, folder=folder)
        scripted(again, SCORES)
        assert again.resume()
        assert again.run()
        assert (again.epoch, again.ended) == (8, "patience")
        last = folder.last.read_bytes()
    assert folder.last.read_bytes() == last
    assert again.best == {"epoch": 5, "score": 0.6}


# --- what is not finite


class Poison(Watcher):
    """Makes the weights nan after a chosen step."""

    def __init__(self, trainer: Trainer, epoch: int, step: int) -> None:
        self.trainer, self.at = trainer, (epoch, step)

    def on_step(self, epoch: int, step: int, values: Any) -> None:
        if (epoch, step) == self.at:
            with torch.no_grad():
                next(self.trainer.model.parameters()).fill_(math.nan)


def poisoned(tmp_path: Path, digits: Data, epoch: int, step: int, **said: Any) -> Trainer:
    settings = config(tmp_path, **said)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings, resume=False)
    trainer = Trainer(settings, digits, CPU, folder=folder)
    trainer.teller.listeners = [Poison(trainer, epoch, step)]
    return trainer


def test_a_run_stops_where_the_loss_is_not_finite(tmp_path: Path, digits: Data) -> None:
    trainer = poisoned(tmp_path, digits, 1, 1, train__epochs=3)
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.run()
    message = str(caught.value)
    assert "epoch 2, step 3 (batch 3 of 4)" in message
    assert f"The last good checkpoint is {trainer.folder.last}." in message  # type: ignore[union-attr]
    state = saved(trainer.folder.last)  # type: ignore[union-attr]
    assert state["epoch"] == 1
    assert all(t.isfinite().all() for t in state["model"].values())
    # From there the run goes on.
    folder = trained(tmp_path, resume=True, train__epochs=3)
    assert [row["epoch"] for row in rows(folder)] == [1, 2, 3]


def test_the_best_of_averaged_weights_is_chosen_by_the_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    # The raw weights get better where the averaged ones get worse.
    settings = config(tmp_path, train__epochs=3, train__average={"name": "ema"})
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings, resume=False)
    trainer = Trainer(settings, digits, CPU, folder=folder)
    raw, averaged = iter([0.1, 0.2, 0.3]), iter([0.6, 0.5, 0.4])

    def measured(self: Monitor, model: nn.Module) -> Any:
        value = next(raw if model is trainer.model else averaged)
        return {"validation": {"clean_accuracy": 1.0, "robust_accuracy": value}}

    monkeypatch.setattr(Monitor, "__call__", measured)
    trainer.run()
    assert saved(folder.best)["epoch"] == 1
    assert saved(folder.last)["best"] == {"epoch": 1, "score": 0.6}


def test_nsam_climbs_other_batches_and_only_where_it_acts(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    nsam = {"name": "nsam", "batches": 3, "inner": {"name": "sam", "rho": 0.05}}
    settings = config(weights=nsam | {"when": {"until_epoch": 1}}, monitor__every=0)
    trainer = Trainer(settings, digits, CPU)
    ((a, _), (b, _), (c, _)) = next(trainer._feed.batches(0, 0))
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)
    attacked: list[int] = []
    whole = rf.perturb.InputPerturbation.__call__

    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        attacked.append(trainer.epoch)
        return whole(self, *arguments, **more)

    monkeypatch.setattr(rf.perturb.InputPerturbation, "__call__", counted)
    trainer.run()
    assert attacked.count(0) == 12
    assert attacked.count(1) == 4


@pytest.fixture
def bad_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel in the second batch of every epoch is nan."""
    whole = Feed.batches

    def with_one_bad(self: Feed, epoch: int, step: int) -> Iterator[list[Batch]]:
        for at, together in enumerate(whole(self, epoch, step), start=step):
            ((x, y),) = together
            if at == 1:
                x = x.clone()
                x[0, 0, 3, 3] = math.nan
            yield [(x, y)]

    monkeypatch.setattr(Feed, "batches", with_one_bad)


@pytest.mark.usefixtures("bad_batch")
def test_the_last_good_checkpoint_is_good_however_often_one_is_written(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"step 2 .*last good checkpoint is"):
        train(config(tmp_path, train__checkpoint_minutes=1e-9))
    state = saved(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 1)
    assert all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.usefixtures("bad_batch")
def test_stopping_on_sigterm_does_not_save_what_diverged(tmp_path: Path, digits: Data) -> None:
    settings = config(tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings, resume=False)
    trainer = Trainer(settings, digits, CPU, folder=folder)

    class Stop(Watcher):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            trainer.stop_requested = step == 1

    trainer.teller.listeners = [Stop()]
    with pytest.raises(TrainingDivergedError, match="step 2"):
        trainer.run()
    assert not folder.last.exists()


def test_no_checkpoint_yet(tmp_path: Path, digits: Data) -> None:
    trainer = poisoned(tmp_path, digits, 0, 0)
    with pytest.raises(TrainingDivergedError, match="No checkpoint was written yet"):
        trainer.run()


@pytest.mark.usefixtures("bad_batch")
@pytest.mark.parametrize("model", [SMALL_CNN, {"name": "mlp", "options": {"hidden": [16]}}])
def test_skipping_goes_on_after_a_bad_batch(tmp_path: Path, model: Any) -> None:
    folder = trained(tmp_path, train__on_nonfinite="skip", model=model)
    assert [row["skipped_steps"] for row in rows(folder)] == [1, 1]
    assert all(t.isfinite().all() for t in saved(folder.last)["model"].values())
    for row in rows(folder):
        assert row["train_loss"] is not None
        assert row["monitor"]["validation"]["clean_loss"] is not None


def test_json_has_no_name_for_infinity() -> None:
    odd = {"a": [math.nan, (math.inf, 1.5)], 3: {"b": -math.inf}, "c": True, "d": None}
    assert json_safe(odd) == {"a": [None, [None, 1.5]], "3": {"b": None}, "c": True, "d": None}


# --- mistakes that only data and model show: one sentence, and no folder is left or lost

LATE: dict[str, tuple[dict[str, Any], str]] = {
    "more images than there are": ({"data__train_samples": 5000}, "data.train_samples"),
    "validation of all": ({"data__validation_samples": 5000}, "data.validation_samples"),
    "unknown data": ({"data__name": "digitz"}, "digits"),
    "data that is not there": ({"data__name": "mnist", "data__root": "/nowhere"}, "data.download"),
    "unknown model": ({"model": {"name": "smal_cnn"}}, "small_cnn"),
    "unknown option": ({"model": {"name": "mlp", "options": {"hiden": 3}}}, "hiden"),
    "bad option": ({"model": {"name": "small_cnn", "options": {"width": -1}}}, "width"),
    "no such weights": ({"model__weights": "none.pt"}, "none.pt"),
    "nothing is perturbed": (
        {"weights": {"name": "sam", "rho": 0.1, "parameters": "re:nothing"}},
        "re:nothing",
    ),
    "chunk beyond the images": (
        {"train__batch_size": 128, "weights": {"name": "msam", "chunk": 100, "inner": "sam"}},
        "chunk",
    ),
    "no such device": ({"device": "cuda:77"}, "device"),
    "no device at all": ({"device": "toaster"}, "device"),
}


@pytest.mark.parametrize("case", LATE)
def test_mistakes_that_the_data_or_the_model_shows(tmp_path: Path, case: str) -> None:
    said, part = LATE[case]
    with pytest.raises(UserError) as caught:
        train(config(tmp_path, **said))
    assert part in str(caught.value)
    assert not (tmp_path / "run").exists()
    # Nor does --overwrite lose the earlier run to a mistake in the new one.
    earlier = tmp_path / "run"
    earlier.mkdir()
    (earlier / "config.yaml").write_text("name: run\n")
    (earlier / "metrics.jsonl").write_text("{}\n")
    before = contents(earlier)
    with pytest.raises(UserError):
        train(config(tmp_path, **said), overwrite=True)
    assert contents(earlier) == before


@pytest.mark.parametrize("output", ["a\0b", "x" * 300])
def test_a_folder_that_cannot_be(tmp_path: Path, output: str) -> None:
    with pytest.raises(UserError, match="folder"):
        train(config(tmp_path / output))


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="could not be written"):
        train(config(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
