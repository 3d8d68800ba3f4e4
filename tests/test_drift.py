"""BatchNorm's drift is what its formula says, and goes on where a run was interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from train_support import SMALL_CNN, config, stopped

from robustflat.report.curves import of_epoch
from robustflat.train import Trainer, train
from robustflat.train.drift import Drift
from robustflat.train.folder import RunFolder
from robustflat.train.setup import load_data


def test_the_drift_of_two_layers_is_what_one_computes_by_hand() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(2, eps=0.5), nn.Conv2d(2, 1, 1), nn.BatchNorm1d(1, eps=0.0),
        nn.BatchNorm2d(3, track_running_stats=False),
    )  # fmt: skip
    drift = Drift(model)
    first, last = model[0], model[2]
    first.running_mean.copy_(torch.tensor([3.0, 0.0]))  # variances are 1 + 0.5
    last.running_mean.fill_(-2.0)
    last.running_var.fill_(math.e**2)
    # Means move by 3 / sqrt(1.5), 0 and 2 / 1; logarithms of variances by 0, 0 and 2.
    assert drift() == pytest.approx(
        {"mean": math.sqrt((9 / 1.5 + 0 + 4) / 3), "variance": math.sqrt(4 / 3)}
    )
    assert drift() == {"mean": 0.0, "variance": 0.0}
    last.running_mean.fill_(-2.0 + math.e)  # in units of the deviation that it has now
    first.running_var.copy_(torch.tensor([1.0, 0.25]))  # with eps 1.5 -> 0.75
    assert drift() == pytest.approx({"mean": math.sqrt(1 / 3), "variance": math.log(2) / 3**0.5})


def test_a_model_without_running_statistics_has_none() -> None:
    assert Drift(nn.Linear(2, 2))() is None
    assert Drift(nn.BatchNorm1d(2, track_running_stats=False))() is None


def test_a_state_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="other BatchNorm"):
        Drift(nn.BatchNorm1d(2)).load_state_dict(Drift(nn.BatchNorm1d(3)).state_dict())


def test_a_run_records_its_drift_also_over_an_interruption(tmp_path: Path) -> None:
    def drifts(folder: RunFolder) -> list[dict[str, float]]:
        lines = folder.metrics_file.read_text().splitlines()
        return [json.loads(line)["batchnorm_drift"] for line in lines]

    whole, _ = train(config(tmp_path / "whole", model=SMALL_CNN))
    asked = config(tmp_path, model=SMALL_CNN)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(asked, resume=False)
    stopped(asked, folder, 6)  # within the second epoch
    train(asked, resume=True)
    assert drifts(folder) == drifts(whole)

    # By itself: the statistics of a run of one epoch, and of the same after two.
    found = []
    for epochs in (1, 2):
        shorter = config(model=SMALL_CNN, train__epochs=epochs, schedule={"name": "constant"})
        trainer = Trainer(shorter, load_data(shorter), torch.device("cpu"))
        trainer.run()
        layers = [m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert layers
        found.append([(m.running_mean.double(), m.running_var.double() + m.eps) for m in layers])
    constant, _ = train(config(tmp_path / "c", model=SMALL_CNN, schedule={"name": "constant"}))
    moved = torch.cat([(b[0] - a[0]) / a[1].sqrt() for a, b in zip(*found, strict=True)])
    grown = torch.cat([(b[1] / a[1]).log() for a, b in zip(*found, strict=True)])
    assert drifts(constant)[1] == pytest.approx(
        {"mean": float(moved.pow(2).mean().sqrt()), "variance": float(grown.pow(2).mean().sqrt())}
    )


def test_drifts_are_curves() -> None:
    row = {"epoch": 1, "batchnorm_drift": {"mean": 0.5, "variance": 0.25}}
    assert of_epoch(row) == {
        ("", "5-optimisation/batchnorm_drift_of_mean"): 0.5,
        ("", "5-optimisation/batchnorm_drift_of_variance"): 0.25,
    }
    assert of_epoch({"epoch": 1, "batchnorm_drift": None}) == {}
