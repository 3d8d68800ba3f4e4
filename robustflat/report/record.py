"""Owns what a report knows of a run: everything in its folder, read once, or a clear refusal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from robustflat.config import RunConfig
from robustflat.errors import UserError
from robustflat.files import read_json
from robustflat.landscapes import Landscape, drawn_in
from robustflat.runs import records
from robustflat.runs.comparison import Row, compare, whole
from robustflat.runs.description import method_of
from robustflat.subject import distinct_names
from robustflat.train.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of a report; what was not measured is None or empty.

    Attributes:
        index: its place among the runs.
        name: the shortest end of its path that no other run shares.
        folder: its files, and ``root``, the folder's name quoted for a shell.
        config: its resolved configuration, and ``text``, the file; of the home of a model None, and
            what was said of it.
        data: the name of its data set.
        row: its figures in the comparison.
        evaluation: the newest in evaluation.json.
        flatness: the newest in flatness.json.
        metrics: one row for every epoch.
        environment: as in environment.json.
        landscapes: around its weights, the one drawn last of each kind ("line", "plane").
    """

    index: int
    name: str
    folder: RunFolder
    root: str
    config: RunConfig | None
    data: str
    text: str
    row: Row
    evaluation: dict[str, Any] | None
    flatness: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    landscapes: dict[str, Landscape]

    @property
    def method(self) -> str:
        """How it was trained, in words."""
        return self.row.method

    @property
    def checkpoints(self) -> dict[str, Any]:
        """Of the evaluation, by name; empty without one."""
        found: dict[str, Any] = (self.evaluation or {}).get("checkpoints") or {}
        return found

    @property
    def measures(self) -> dict[str, Any]:
        """Flatness figures by name; empty without any."""
        found: dict[str, Any] = (self.flatness or {}).get("measures") or {}
        return found


def read_records(folders: Sequence[RunFolder]) -> list[Record]:
    """Everything that the folders of runs hold; a folder named twice is read once.

    Raises:
        UserError: if there is no folder, one is no run, or a file in it is damaged.
    """
    different = list({folder.root.resolve(): folder for folder in folders}.values())
    if not different:
        raise UserError("There is no run to report on. Name folders that `robustflat train` wrote.")
    names = distinct_names([folder.root for folder in different])
    measured = [folder for folder in different if folder.records]
    rows = dict(zip(measured, compare(measured), strict=True))
    return [
        _record(i, name, folder, rows.get(folder))
        for i, (name, folder) in enumerate(zip(names, different, strict=True))
    ]


def _record(index: int, name: str, folder: RunFolder, row: Row | None) -> Record:
    measured = records.all_of(folder)
    # The home of a model has measurements, and no configuration.
    config = folder.read_config() if folder.config_file.is_file() or not measured else None
    evaluation, flatness = whole(
        folder.root,
        lambda: (
            records.evaluation_of(records.read(folder.evaluation, "evaluate")),
            records.flatness_of(records.read(folder.flatness, "flatness")),
        ),
    )
    environment = whole(folder.root, lambda: dict(read_json(folder.environment_file) or {}))
    if config is None:
        data, environment = measured[-1]["data"], {"versions": measured[-1].get("versions", {})}
        said = {"data": data, **measured[-1].get("said", {})}
        text = "".join(f"{key}: {value}\n" for key, value in said.items())
    else:
        data = config.data.name
        text = folder.config_file.read_text(encoding="utf-8")
    return Record(
        index=index,
        name=name,
        folder=folder,
        root=shlex.quote(str(folder.root)),
        config=config,
        data=data,
        text=text,
        row=row
        or Row(name, method_of(config) if config else "-", (config.seed,) if config else (), {}),
        evaluation=evaluation,
        flatness=flatness,
        metrics=folder.metrics(),
        environment=environment,
        landscapes={
            found.kind: found
            for found in drawn_in(folder.landscapes)
            if found.kind in ("line", "plane")
        },
    )


def tests(records: Iterable[Record]) -> list[tuple[Record, str, dict[str, Any]]]:
    """Runs, checkpoints and what the attacks did there."""
    return [
        (record, name, entry["test"])
        for record in records
        for name, entry in record.checkpoints.items()
        if entry["test"] is not None
    ]


def state_of(checkpoint: str, epoch: int | None) -> str:
    """The state of a network in words, such as "best, epoch 3"."""
    return checkpoint if epoch is None else f"{checkpoint}, epoch {epoch}"
