"""MLflow and Weights & Biases: the curves of TensorBoard under the same names."""

from __future__ import annotations

import secrets
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from robustflat.errors import UserError, reason
from robustflat.report.curves import Curves, of_epoch, of_step
from robustflat.train.folder import RunFolder, flattened
from robustflat.train.listeners import Listener


class _Tracker(Listener):
    """One run of the tracker's for a run of ours, gone on with when that is resumed.

    The tracker's name for it is kept in the run's folder.

    Args:
        package: of the tracker, and extra of this one.
        folder: of the run.
    """

    def __init__(self, package: str, folder: Path) -> None:
        self._name, self._folder = package, RunFolder(folder)
        self._steps, self._lost = 0, False
        self._known = self._folder.known_as(package)
        try:
            self._package = import_module(package)
        except ImportError as error:
            raise UserError(
                f"The listener {package} needs the package {package}, which could not be imported "
                f"({error}). Install it with: pip install 'robustflat[{package}]'."
            ) from None

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open it; a run that goes on is found by what it left in its folder.

        Raises:
            UserError: if it cannot be opened.
        """
        self._steps = steps
        known = self._known.read_text(encoding="utf-8").strip() if self._known.is_file() else None
        config = yaml.safe_load(self._folder.config_file.read_text(encoding="utf-8"))
        try:
            known = self._open(known, config)
        except Exception as error:  # of a package, a file or a server: there is no common kind
            raise UserError(
                f"The listener {self._name} could not be opened: {reason(error)}. Change its "
                "keys under `listeners`, or leave it out."
            ) from error
        self._known.write_text(known, encoding="utf-8")

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Hand on a step that was looked at."""
        if values:
            self._hand_on(of_step(values), epoch * self._steps + step + 1)

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Hand on an epoch."""
        self._hand_on(of_epoch(row), row["steps"])

    def _hand_on(self, curves: Curves, at: int) -> None:
        """A server that is gone ends no training: from then on it is told nothing."""
        if self._lost:
            return
        try:
            self._send(_named(curves), at)
        except Exception as error:
            self._lost = True
            warnings.warn(
                f"The listener {self._name} was lost at step {at}: {reason(error)}. The run "
                "goes on without it.",
                stacklevel=2,
            )

    @abstractmethod
    def _open(self, known: str | None, config: dict[str, Any]) -> str:
        """Open the run ``known``, or a new one; return what it is known as."""

    @abstractmethod
    def _send(self, values: dict[str, float], at: int) -> None:
        """Hand on values by name; ``at`` counts steps."""


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
        super().__init__("mlflow", folder)
        self._experiment, self._uri = experiment, uri
        self._client: Any = None
        self._run = ""

    def on_end(self) -> None:
        """Close it."""
        if self._client is not None:
            self._client.set_terminated(self._run)
            self._client = None

    def _open(self, known: str | None, config: dict[str, Any]) -> str:
        self._client = client = self._package.MlflowClient(tracking_uri=self._uri)
        if known is None:
            found = client.get_experiment_by_name(self._experiment)
            at = found.experiment_id if found else client.create_experiment(self._experiment)
            known = str(client.create_run(at, run_name=self._folder.name).info.run_id)
            for path, value in flattened(config):
                client.log_param(known, ".".join(path), value)
        client.update_run(known, status="RUNNING")
        self._run = known
        return known

    def _send(self, values: dict[str, float], at: int) -> None:
        from mlflow.entities import Metric

        now = self._package.utils.time.get_current_time_millis()
        metrics = [Metric(name, value, now, at) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # a batch has no more
            self._client.log_batch(self._run, metrics[start : start + 1000])


class WandB(_Tracker):
    """Weights & Biases, through its own package (``pip install robustflat[wandb]``).

    Offline it writes into ``wandb/`` of the run's folder, which ``wandb sync`` brings to a server.

    Args:
        folder: of the run.
        project: of W&B.
        mode: "online", "offline" or "disabled"; what WANDB_MODE says if None.
    """

    def __init__(self, folder: Path, project: str = "robustflat", mode: str | None = None) -> None:
        super().__init__("wandb", folder)
        self._project, self._mode = project, mode
        self._run: Any = None

    def on_end(self) -> None:
        """Close it."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self, known: str | None, config: dict[str, Any]) -> str:
        known = known or secrets.token_hex(4)
        self._run = self._package.init(
            project=self._project, name=self._folder.name, id=known, resume="allow",
            dir=self._folder.root, config=config, mode=self._mode,
        )  # fmt: skip
        return known

    def _send(self, values: dict[str, float], at: int) -> None:
        self._run.log(values, step=at)


def _named(curves: Curves) -> dict[str, float]:
    """The numbers that order TensorBoard's charts say nothing here."""
    return {
        "/".join(filter(None, (place, chart.partition("-")[2]))): value
        for (place, chart), value in curves.items()
    }
