"""Owns a run in Python: what is in its folder, as frames and figures, and measuring it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustflat.config import RunConfig
from robustflat.errors import UserError
from robustflat.train.folder import RunFolder, flattened

if TYPE_CHECKING:
    from pandas import DataFrame

    from robustflat.perturb import InputPerturbation
    from robustflat.report.drawing import Drawing

# What every measuring command imports is imported where it is needed: a look at a run is quick.


def load_run(path: str | Path) -> Run:
    """Open the folder of a run that ``robustflat train`` wrote.

    Raises:
        UserError: if it is none.
    """
    return Run(RunFolder(path))


class Run:
    """A run: its settings, its metrics as a frame, its figures; evaluated and measured here.

    Args:
        folder: of the run.

    Raises:
        UserError: if it is none.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.config: RunConfig = folder.read_config()

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name

    @property
    def metrics(self) -> DataFrame:
        """One row for every epoch, which is the index; nested names are joined by dots.

        Such as ``train_loss``, ``lr``, ``monitor.validation.robust_accuracy``; NaN where nothing
        was measured.
        """
        from pandas import DataFrame

        rows = [
            {".".join(key): value for key, value in flattened(row) if value is not None}
            for row in self.folder.metrics()
        ]
        frame = DataFrame(rows)
        return frame.set_index("epoch") if len(frame) else frame

    @property
    def results(self) -> DataFrame:
        """What was evaluated and measured, as ``robustflat compare`` shows it.

        A row for each figure: ``value``, and ``low`` and ``high``, the ends of its interval (of a
        sharpness, one standard error away). Empty if nothing was measured.
        """
        from pandas import DataFrame

        from robustflat.runs.comparison import compare

        found = {}
        if self.folder.records:
            (row,) = compare([self.folder])
            found = {name: (c.value, c.low, c.high) for name, c in row.cells.items()}
        return DataFrame.from_dict(found, orient="index", columns=["value", "low", "high"])

    def evaluate(
        self,
        attacks: Sequence[Any] | None = None,
        *,
        norm: str | None = None,
        eps: float | None = None,
        device: str = "auto",
        **wanted: Any,
    ) -> dict[str, Any]:
        """Attack the run and measure its gap, as ``robustflat evaluate`` does, and keep it.

        Args:
            attacks: as :func:`robustflat.evaluate` takes them; the configuration's if None.
            norm: of the threat, with ``eps``; that of the training if None.
            eps: radius in image units.
            device: where.
            **wanted: of :class:`robustflat.runs.evaluation.Wanted`: ``checkpoints``, ``weights``,
                ``samples``, ``gap_samples``, ``seed``, ``precision``, ...

        Returns:
            What was found, as :func:`robustflat.runs.evaluation.Job.run` returns it.

        Raises:
            UserError: if it cannot be evaluated so.
        """
        from dataclasses import fields

        from robustflat.runs.evaluation import Job, Wanted

        known = [field.name for field in fields(Wanted)]
        for name in wanted:
            if name not in known:
                raise UserError(f"An evaluation has no {name!r}. It has {', '.join(known)}.")
        subject = self._subject(norm, eps, device)
        return Job(subject, Wanted(attacks=attacks, **wanted)).run()

    def flatness(
        self,
        measures: Sequence[str] | None = None,
        *,
        checkpoint: str | None = None,
        weights: str | None = None,
        split: str | None = None,
        samples: int | None = None,
        attack: InputPerturbation | str | None = None,
        options: Mapping[str, Any] | None = None,
        norm: str | None = None,
        eps: float | None = None,
        device: str = "auto",
    ) -> dict[str, Any]:
        """Measure how flat the loss is around its weights, as ``robustflat flatness`` does.

        Args:
            measures: their names; the configuration's if None.
            checkpoint: "last" (also None) or "best".
            weights: "raw", "average", or the average if there is one.
            split: whose images, "train", "validation" or "test"; of training if None, or those
                that a preset is published for.
            samples: images to use.
            attack: of the robust loss, such as "pgd-20"; that of the measures if None.
            options: of :class:`robustflat.flatness.Options`; a list is a sweep of its values.
            norm: of the threat, with ``eps``; that of the training if None.
            eps: radius in image units.
            device: where.

        Returns:
            What was found, as :func:`robustflat.runs.flatness.measure_subject` returns it.

        Raises:
            UserError: if it cannot be measured so.
        """
        from robustflat.runs.flatness import measure_subject

        return measure_subject(
            self._subject(norm, eps, device), measures, checkpoint=checkpoint, weights=weights,
            split=split, samples=samples, attack=attack, options=dict(options or {}),
        )  # fmt: skip

    def figure(self, name: str = "curves") -> Drawing:
        """A figure of the report: "attacks", "gaps", "classes", "curves", "spectra", "landscapes".

        Returns:
            The figure: shown by a notebook; ``save("x.pdf")``, also .png, .svg and .html.

        Raises:
            UserError: if there is no such figure, or nothing of it was measured.
        """
        from robustflat.report.drawing import of_folders

        return of_folders([self.folder], name)

    def _subject(self, norm: str | None, eps: float | None, device: str) -> Any:
        from robustflat.subject import open_subject

        return open_subject(self.folder.root, norm=norm, eps=eps, device=device)

    def __repr__(self) -> str:
        return f"Run({str(self.folder.root)!r})"

    def _repr_html_(self) -> str:
        """For notebooks: how it was trained, and what was measured."""
        from robustflat.runs.description import method_of

        epochs = len(self.folder.metrics())
        about = f"{method_of(self.config)}, seed {self.config.seed}, {epochs} epochs"
        measured = self.results
        table = (
            measured.to_html(float_format="{:.4g}".format)
            if len(measured)
            else ("<p>Not measured yet: <code>run.evaluate()</code></p>")
        )
        return f"<p><b>{escape(self.name)}</b>: {escape(about)}</p>{table}"
