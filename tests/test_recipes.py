"""The recipe of generated images end to end at small scale, and runs whose objectives remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_support import config, rows, same_run, saved, stopped, trained

from robustflat.errors import UserError
from robustflat.objectives import Objective
from robustflat.train import train
from robustflat.train.folder import RunFolder
from robustflat.train.optim import one_cycle
from robustflat.train.setup import load_data

CPU = torch.device("cpu")


def stopped_and_resumed(output: Path, after: int, **changes: Any) -> RunFolder:
    """A run that is asked to stop after so many steps, and then goes on."""
    asked = config(output, **changes)
    folder = RunFolder(output / "run")
    folder.prepare(asked, resume=False)
    stopped(asked, folder, after)
    folder, finished = train(asked, resume=True)
    assert finished
    return folder


# --- objectives with a memory, in runs ------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"name": "ikl"}},
        {"objective": {"name": "gkl"}, "weights": {"name": "msam", "chunk": 8, "inner": "sam"}},
        {"objective": {"name": "rebat", "decay": 0.8, "start_epoch": 1}},
        {
            "objective": {"name": "rebat", "decay": 0.8},
            "weights": "none",
            "train__average": {"name": "ema", "decay": 0.8},
        },
    ],
    ids=["ikl-awp", "gkl-msam", "rebat-awp", "rebat-ema"],
)
@pytest.mark.parametrize("after", [3, 4, 6])
def test_an_objective_with_a_memory_resumes_exactly(
    tmp_path: Path, changes: dict[str, Any], after: int
) -> None:
    common: dict[str, Any] = {"train__epochs": 3, "monitor__train_samples": 20, **changes}
    whole = trained(tmp_path / "whole", **common)
    part = stopped_and_resumed(tmp_path / "part", after, **common)
    same_run(whole, part)
    state = saved(whole.last)["objective"]
    assert any(v is not None for v in state.values())


def test_an_average_that_would_never_begin_is_refused() -> None:
    config(objective={"name": "rebat", "start_epoch": 1})
    with pytest.raises(UserError, match=r"objective.start_epoch is 2 of train.epochs 2, so rebat"):
        config(objective={"name": "rebat", "start_epoch": 2})


class Told(Objective):
    """An objective of one's own that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x_adv), y, reduction="none")

    def start(self, model: nn.Module) -> None:
        self.calls.append("start")

    def after_step(self, model: nn.Module, epoch: int = 0, mean: Any = None) -> None:
        self.calls.append(("step", epoch, mean(torch.tensor(2.0)).item()))

    def after_epoch(self, model: nn.Module, epoch: int = 0) -> None:
        self.calls.append(("epoch", epoch))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}


def test_a_run_tells_its_objective_everything_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    asked = config(tmp_path)
    monkeypatch.setattr(type(asked.objective), "build", lambda self: told)
    folder, _ = train(asked)
    steps = [("step", e, 2.0) for e in range(2) for _ in range(4)]
    assert told.calls == ["start", *steps[:4], ("epoch", 0), *steps[4:], ("epoch", 1)]
    assert saved(folder.last)["objective"] == {"calls": 11}


def test_rebat_and_the_runs_own_average_are_one_model(tmp_path: Path) -> None:
    folder = trained(
        tmp_path,
        objective={"name": "rebat", "decay": 0.8, "start_epoch": 1},
        train__average={"name": "ema", "decay": 0.8, "start_epoch": 1},
        train__epochs=3,
        weights="none",
    )
    state = saved(folder.last)
    inside = state["objective"]["average"]
    own = state["average_model"]
    assert own
    # The run's average begins with the weights after the first step of the epoch, ReBAT's with
    # those before it: they differ by 0.8^8 of that step.
    for name, value in own.items():
        if value.is_floating_point():
            torch.testing.assert_close(inside[f"module.model.{name}"], value, rtol=0.05, atol=0.02)


# --- generated images -----------------------------------------------------------------------


def shards(root: Path, labels_of: int = 10) -> Path:
    """Two shards of noisy digits under right labels, so that they help."""
    digits = load_data(config()).train
    pixels = digits.fetch(torch.arange(len(digits))).permute(0, 2, 3, 1).numpy()
    rng = np.random.default_rng(0)
    noisy = np.clip(pixels.astype(int) + rng.integers(-20, 21, pixels.shape), 0, 255)
    root.mkdir()
    for k, part in enumerate((slice(0, 25), slice(25, None))):
        np.save(root / f"image-{k}.npy", noisy[part].astype(np.uint8))
        np.save(root / f"label-{k}.npy", digits.labels.numpy()[part] % labels_of)
    return root


RECIPE: dict[str, Any] = {
    "attack": {"name": "pgd", "eps": 0.1, "steps": 2, "start": "uniform", "mode": "batch"},
    "model": {"name": "wrn-10-1-silu"},
    "objective": {"name": "trades", "beta": 5.0, "label_smoothing": 0.1},
    "optimizer": {"name": "sgd", "lr": 0.2, "nesterov": True, "decay_all": False},
    "schedule": {"name": "one_cycle", "peak": 0.25, "initial": 1 / 25, "shape": "cosine"},
    "train__average": {"name": "ema", "decay": 0.9},
    "train__epochs": 3,
    "train__batch_size": 20,
    "monitor__train_samples": 20,
}


@pytest.mark.parametrize("weights", ["none", {"name": "awp", "gamma": 0.005}])
def test_the_recipe_runs_and_resumes_on_shards(tmp_path: Path, weights: Any) -> None:
    extra = {"path": str(shards(tmp_path / "shards")), "fraction": 0.7}
    recipe = {**RECIPE, "weights": weights, "data__extra": extra}
    whole = trained(tmp_path / "whole", **recipe)
    found = rows(whole)
    assert len(found) == 3
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert found[-1]["monitor_average"]["validation"]["clean_accuracy"] > 0
    same_run(whole, stopped_and_resumed(tmp_path / "part", 4, **recipe))


def test_extra_images_their_labels_and_their_number_matter(tmp_path: Path) -> None:
    extra = {"path": str(shards(tmp_path / "shards")), "fraction": 0.7}
    changed = [
        extra,
        {**extra, "path": str(shards(tmp_path / "other", 5))},
        {**extra, "samples": 10},
        {**extra, "fraction": 0.5},
    ]
    losses = set()
    for k, one in enumerate(changed):
        folder = trained(tmp_path / str(k), data__extra=one, train__epochs=1, weights="none")
        losses.add(rows(folder)[0]["train_loss"])
    assert len(losses) == 4


def test_one_cycle_is_torchs_up_to_a_step() -> None:
    epochs, steps = 10, 40
    parameter = [nn.Parameter(torch.zeros(1))]
    for shape, anneal in (("cosine", "cos"), ("linear", "linear")):
        ours = one_cycle(0.25, 1 / 25, 1 / (25 * 1e4), shape)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(parameter, lr=1.0, momentum=0.9)
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1.0, epochs * steps, pct_start=0.25, anneal_strategy=anneal
        )
        for k in range(epochs * steps):
            rate = optimizer.param_groups[0]["lr"]
            assert ours(k / steps, epochs, 1 / steps) == pytest.approx(rate, abs=0.025)
            optimizer.step()
            theirs.step()
        assert ours(epochs / 4 - 1 / steps, epochs, 1 / steps) == 1.0
        assert ours(epochs - 1 / steps, epochs, 1 / steps) == pytest.approx(1 / 25e4)
        assert ours(epochs / 8 - 1 / steps, epochs, 1 / steps) == pytest.approx(13 / 25)
