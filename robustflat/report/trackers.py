"""MLflow: the curves of TensorBoard under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from robustflat.errors import UserError
from robustflat.report.curves import Curves, of_epoch, of_step
from robustflat.train.folder import RunFolder, flattened
from robustflat.train.listeners import Listener


class MLflow(Listener):
    """MLflow, through its own package (``pip install robustflat[mlflow]``).

    One run of its own for a run of ours, resumed with it: its id is kept in the run's folder.

    Args:
        folder: of the run.
        experiment: of MLflow.
        uri: of its server, or of a folder as ``file:/path``; what MLFLOW_TRACKING_URI says if None.
    """

    def __init__(
        self, folder: Path, experiment: str = "robustflat", uri: str | None = None
    ) -> None:
        self._folder = RunFolder(folder)
        self._steps = 0
        self._mlflow = _package("mlflow")
        self._experiment, self._uri = experiment, uri
        self._client: Any = None
        self._run = ""

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open it; a run that goes on is found by what it left in its folder."""
        self._steps = steps
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        file = self._folder.root / "mlflow.id"
        known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
        if known is None:
            found = self._client.get_experiment_by_name(self._experiment)
            at = found.experiment_id if found else self._client.create_experiment(self._experiment)
            made = self._client.create_run(at, run_name=self._folder.name)
            known = str(made.info.run_id)
            file.write_text(known, encoding="utf-8")
            config = yaml.safe_load(self._folder.config_file.read_text(encoding="utf-8"))
            for path, value in flattened(config):
                self._client.log_param(known, ".".join(path), value)
        self._run = known
        self._client.update_run(known, status="RUNNING")

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Hand on a step that was looked at."""
        if values:
            self._send(of_step(values), epoch * self._steps + step + 1)

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Hand on an epoch."""
        self._send(of_epoch(row), row["steps"])

    def on_end(self) -> None:
        """Close it."""
        if self._client is not None:
            self._client.set_terminated(self._run)
            self._client = None

    def _send(self, curves: Curves, at: int) -> None:
        from mlflow.entities import Metric

        now = self._mlflow.utils.time.get_current_time_millis()
        # The numbers that order TensorBoard's charts say nothing here.
        metrics = [
            Metric("/".join(filter(None, (place, chart.partition("-")[2]))), value, now, at)
            for (place, chart), value in curves.items()
        ]
        for start in range(0, len(metrics), 1000):  # a batch has no more
            self._client.log_batch(self._run, metrics[start : start + 1000])


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(
            f"The listener {name} needs the package {name}, which could not be imported ({error}). "
            f"Install it with: pip install 'robustflat[{name}]'."
        ) from None
