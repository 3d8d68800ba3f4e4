"""MLflow: the curves of TensorBoard under the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from robustflat.errors import UserError
from robustflat.report.curves import Curves, of_epoch, of_step
from robustflat.train.folder import RunFolder
from robustflat.train.listeners import Listener


class _Tracker(Listener):
    """What trackers have in common: one run of theirs for a run of ours, resumed with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self._steps = 0

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open it; a run that goes on is found by what it left in its folder."""
        self._steps = steps

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Hand on a step that was looked at."""
        if values:
            self._log(of_step(values), epoch * self._steps + step + 1)

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Hand on an epoch."""
        self._log(of_epoch(row), row["steps"])

    def _log(self, curves: Curves, at: int) -> None:
        # The numbers that order TensorBoard's charts say nothing here.
        named = {
            "/".join(filter(None, (place, chart.partition("-")[2]))): value
            for (place, chart), value in curves.items()
        }
        self._send(named, at)

    def _send(self, values: dict[str, float], at: int) -> None:
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        text = self._folder.config_file.read_text(encoding="utf-8")
        config: dict[str, Any] = yaml.safe_load(text)
        return config

    def _id(self, name: str, new: str | None = None) -> str | None:
        """What the tracker calls this run, kept in the run's folder."""
        file = self._folder.root / f"{name}.id"
        if new is not None:
            file.write_text(new, encoding="utf-8")
        return file.read_text(encoding="utf-8").strip() if file.is_file() else None


class MLflow(_Tracker):
    """MLflow, through its own package (``pip install robustflat[mlflow]``).

    Args:
        folder: of the run.
        experiment: of MLflow.
        uri: of its server, or of a folder as ``file:/path``; what MLFLOW_TRACKING_URI says if None.
    """

    def __init__(
        self, folder: Path, experiment: str = "robustflat", uri: str | None = None
    ) -> None:
        super().__init__(folder)
        self._mlflow = _package("mlflow")
        self._experiment, self._uri = experiment, uri
        self._client: Any = None
        self._run = ""

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open it."""
        super().on_start(epochs, steps, done)
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        known = self._id("mlflow")
        if known is None:
            found = self._client.get_experiment_by_name(self._experiment)
            at = found.experiment_id if found else self._client.create_experiment(self._experiment)
            made = self._client.create_run(at, run_name=self._folder.name)
            known = str(made.info.run_id)
            self._id("mlflow", known)
            for name, value in _flat(self._config()):
                self._client.log_param(known, name, value)
        self._run = known
        self._client.update_run(known, status="RUNNING")

    def on_end(self) -> None:
        """Close it."""
        if self._client is not None:
            self._client.set_terminated(self._run)
            self._client = None

    def _send(self, values: dict[str, float], at: int) -> None:
        from mlflow.entities import Metric

        now = self._mlflow.utils.time.get_current_time_millis()
        metrics = [Metric(name, value, now, at) for name, value in values.items()]
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


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{at}.{key}" if at else key)
    else:
        yield at, value
