"""TensorBoard: the story of a run, one line a run and split, what matters first."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import SummaryWriter

from robustflat.config import RunConfig
from robustflat.perturb.perturbation import radius_of
from robustflat.report.curves import Curves, of_epoch, of_step
from robustflat.report.monitor_figures import confusion, examples, line
from robustflat.runs.description import method_of
from robustflat.train.folder import RunFolder, flattened
from robustflat.train.listeners import Listener
from robustflat.train.pictures import Pictures

# What a sweep varies. TensorBoard sorts the columns by name and shows the first five, so they have
# numbers: the method, what is usually varied, and the rest.
_USUAL = {("attack", "eps"), ("optimizer", "lr"), ("seed",)}
_SETTINGS = ("seed", "data", "model", "attack", "objective", "weights", "optimizer", "train")
_FINAL = {
    "9-outcome/robust_accuracy": "robust accuracy",
    "9-outcome/accuracy_gap": "robust gap",
    "1-robust/overfitting_best_minus_last": "best - last",
    "9-outcome/clean_accuracy": "clean accuracy",
    "9-outcome/robust_loss": "robust loss",
    "1-robust/increase_under_weights": "increase under weights",
}
# The charts of the page "Custom scalars", each with the curves that it shows, by their names.
_CHARTS = {
    "Robust generalisation": {
        "Robust accuracy": ["1-robust/accuracy$"],
        "Robust gap, train - validation": ["1-robust/accuracy_gap"],
        "Rise of the loss under the weights' perturbation": ["1-robust/increase_under_weights"],
        "Robust loss": ["1-robust/loss$"],
        "Loss gap, validation - train": ["1-robust/loss_gap"],
        "Best - last": ["1-robust/overfitting_best_minus_last"],
    },
    "Double perturbation": {
        "Loss at the centre and at the worst weights": [
            "2-weights/loss_at_centre", "2-weights/loss_at_perturbed",
        ],
        "Cosines": ["2-weights/cosine_of_gradients", "2-weights/cosine_of_succ"],
        "Attack's loss by step": ["4-attack/loss_at_step_.*"],
    },
    "Edge of stability": {
        "Largest eigenvalue as a share of the edge (1 is the edge)": ["6-flatness/edge_reached"],
        "Largest eigenvalue, 2/lr, and the edges of optimizer and SAM": [
            "6-flatness/edge_(lambda_1|2_over_lr|optimizer|sam)",
        ],
        "Gradient's alignment to the top eigenvector": ["6-flatness/edge_alignment"],
    },
}  # fmt: skip
_LAYOUT = {
    page: {chart: ["Multiline", curves] for chart, curves in charts.items()}
    for page, charts in _CHARTS.items()
}


class TensorBoard(Listener):
    """TensorBoard: curves, pictures, settings and final metrics; the x axis counts steps.

    The run's own values go into its folder; those of its splits into ``train`` and ``validation``
    below it (with an average also ``train-average`` and so on), under the same names, so that a
    chart has one line for each. ``tensorboard --logdir runs`` then calls runs by their names.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}
        self._steps = 0
        self._purge: int | None = None

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """Open the files; a resumed run replaces the points after ``done``."""
        self._steps = steps
        self._purge = done + 1 if done else None
        self._wait_for_a_later_second()
        writer = self._writer("")
        folder = RunFolder(self._folder)
        if folder.config_file.is_file():
            text = folder.config_file.read_text(encoding="utf-8")
            writer.add_text("configuration", _block("yaml", text))
            self._describe(writer, folder.read_config())
        if folder.environment_file.is_file():
            text = folder.environment_file.read_text(encoding="utf-8")
            writer.add_text("environment", _block("json", json.dumps(json.loads(text), indent=2)))
        writer.add_custom_scalars(_LAYOUT)
        if done:  # so that curves that never come again lose their last points too
            for place in (p.parent.name for p in folder.event_files() if p.parent != folder.root):
                self._writer(place)

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step that was looked at."""
        self._write(of_step(values), epoch * self._steps + step + 1)

    def on_pictures(self, row: dict[str, Any], pictures: Pictures) -> None:
        """Write examples, confusion matrix and the loss along a line."""
        writer = self._writer("")
        for name, figure in (
            ("7-pictures/1-examples", examples(pictures)),
            ("7-pictures/2-confusion", confusion(pictures)),
            ("7-pictures/3-line", line(pictures)),
        ):
            writer.add_figure(name, figure, row["steps"])

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Write one epoch."""
        self._write(of_epoch(row), row["steps"])
        for writer in self._writers.values():
            writer.flush()

    def on_end(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, curves: Curves, at: int) -> None:
        for (place, chart), value in curves.items():
            self._writer(place).add_scalar(chart, value, at)

    def _writer(self, place: str) -> SummaryWriter:
        if place not in self._writers:
            at = self._folder / place
            self._writers[place] = SummaryWriter(str(at), purge_step=self._purge)
        return self._writers[place]

    def _wait_for_a_later_second(self) -> None:
        """TensorBoard reads files in the order of their names, which begin with the second."""
        names = [path.name for path in RunFolder(self._folder).event_files()]
        latest = max((int(name.split(".")[3]) for name in names), default=0)
        while 0 <= latest - int(time.time()) < 2:
            time.sleep(0.05)

    @staticmethod
    def _describe(writer: SummaryWriter, config: RunConfig) -> None:
        """Settings, and where their outcome is: the page "HParams" sorts a sweep by it."""
        metrics = [hparams.Metric(chart, display_name=name) for chart, name in _FINAL.items()]
        said: dict[str, str | float] = {"1-method": method_of(config)}
        # One column for the radii of all methods: the columns are those of the first run.
        said["2-radius"] = radius_of(config.weights.build()) or 0.0
        given = config.model_dump(mode="json")
        for path, value in flattened({key: given[key] for key in _SETTINGS}):
            if isinstance(value, (bool, int, float)) or (isinstance(value, str) and value):
                said[f"{2 if path in _USUAL else 3}-{'.'.join(path)}"] = value
        columns = [hparams.HParam(name) for name in said]
        file = writer._get_file_writer()
        file.add_summary(hparams.hparams_config_pb(columns, metrics))
        file.add_summary(hparams.hparams_pb(said, trial_id=config.name))


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"
