"""MLflow gets the curves of a run, in a folder of this machine."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from train_support import config, stopped

from robustflat.errors import UserError
from robustflat.report.trackers import MLflow
from robustflat.train import train
from robustflat.train.folder import RunFolder


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_the_curves_of_a_run_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'store'}"
    asked = config(tmp_path, monitor__step_every=1)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(asked, resume=False)
    stopped(asked, folder, 6)
    for resume in (False, True):
        train(
            asked,
            resume=resume,
            overwrite=not resume,
            listeners=lambda f: [MLflow(f.root, uri=uri)],
        )
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("robustflat")
    (run,) = client.search_runs([experiment.experiment_id])  # not two
    assert run.info.status == "FINISHED"
    assert run.data.params["weights.gamma"] == "0.02"
    rows = [json.loads(text) for text in folder.metrics_file.read_text().splitlines()]
    history = client.get_metric_history(run.info.run_id, "validation/robust/accuracy")
    assert [(m.step, m.value) for m in history] == [
        (r["steps"], pytest.approx(r["monitor"]["validation"]["robust_accuracy"])) for r in rows
    ]
    history = client.get_metric_history(run.info.run_id, "robust/rise_under_weights")
    assert [m.step for m in history] == list(range(1, 9))


def test_a_package_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(module: str, *more: Any, **said: Any) -> Any:
        if module == "mlflow":
            raise ImportError("no such module")
        return real(module, *more, **said)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"robustflat\[mlflow\]"):
        MLflow(tmp_path)
