"""Owns the workers of a study: which run is started when, and what became of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from robustflat.files import write_json
from robustflat.study.claims import clear, holder, void
from robustflat.study.ending import CLAIMED, DONE, explain
from robustflat.study.folder import RunFiles, StudyFolder
from robustflat.study.grid import Point
from robustflat.study.schema import StudyConfig

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0
State = Literal["kept", "started", "finished", "failed", "waiting", "taken over"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run.

    Attributes:
        run: its name.
        state: "kept" (finished before), "started", "finished", "failed", "waiting" (another
            process is at it) or "taken over" (from a process that is gone).
        text: more about it, such as why it failed; may be empty.
        done: how many runs are over, finished or failed.
        total: how many there are.
    """

    run: str
    state: State
    text: str
    done: int
    total: int


@dataclass
class _Worker:
    point: Point
    process: subprocess.Popen[bytes]
    began: float
    slot: int


class Schedule:
    """The runs of a study, worked at by up to ``jobs`` processes of this command.

    Other commands, on this machine or others, may work at the same study: what they have claimed is
    left to them, and waited for in the end.

    Args:
        study: what is asked of each run.
        points: the runs.
        folder: the study's.
        jobs: most processes at once.
        on_progress: told of every event.
    """

    def __init__(
        self,
        study: StudyConfig,
        points: Sequence[Point],
        folder: StudyFolder,
        jobs: int,
        on_progress: Callable[[Event], None] | None = None,
    ) -> None:
        self._study, self._folder, self._jobs = study, folder, jobs
        self._on_progress = on_progress
        self._total, self._over = len(points), 0
        self._open = list(points)
        self._workers: list[_Worker] = []
        # A run that failed before this command began is tried again.
        self._retry = {p.name for p in points if self._files(p).failed() is not None}
        self._waiting: set[str] = set()

    def run(self) -> None:
        """Work until every run is finished or failed."""
        for point in list(self._open):
            if self._is_done(point):
                self._settle(point, "kept")
        try:
            while self._open or self._workers:
                self._reap()
                self._fill()
                if self._open or self._workers:
                    time.sleep(POLL_SECONDS)
        finally:
            self._stop()

    def _fill(self) -> None:
        for point in list(self._open):
            files = self._files(point)
            if self._is_done(point):
                self._settle(point, "finished", "by another process")
            elif (error := files.failed()) is not None and point.name not in self._retry:
                self._settle(point, "failed", error)
            elif len(self._workers) < self._jobs and self._is_free(point, files):
                self._start(point, files)

    def _is_free(self, point: Point, files: RunFiles) -> bool:
        if not files.lock.exists():
            return True
        found = void(files.lock)
        if found is None:
            if point.name not in self._waiting:
                self._waiting.add(point.name)
                self._tell(point, "waiting", f"for {holder(files.lock) or 'another process'}")
            return False
        if clear(files.lock, found):
            self._tell(point, "taken over", found.why)
        return True

    def _start(self, point: Point, files: RunFiles) -> None:
        self._open.remove(point)
        self._retry.discard(point.name)
        files.failure.unlink(missing_ok=True)
        job: dict[str, Any] = {
            "config": point.config.model_dump(mode="json"),
            "attacks": list(self._study.attacks),
            "measures": list(self._study.measures),
        }
        write_json(files.job, job)
        slot = min(set(range(self._jobs)) - {worker.slot for worker in self._workers})
        environment = {**os.environ, **_visible_device(slot, torch.cuda.device_count())}
        if point.config.threads is not None:
            environment["OMP_NUM_THREADS"] = str(point.config.threads)
        with files.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which stops the others.
            process = subprocess.Popen(
                [sys.executable, "-m", "robustflat.study.worker", str(files.job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._workers.append(_Worker(point, process, time.monotonic(), slot))
        self._tell(point, "started")

    def _reap(self) -> None:
        for worker in list(self._workers):
            code = worker.process.poll()
            if code is None:
                continue
            self._workers.remove(worker)
            point, files = worker.point, self._files(worker.point)
            self._open.append(point)
            if code == CLAIMED:
                continue
            if code == DONE and self._is_done(point):
                self._settle(point, "finished", f"in {time.monotonic() - worker.began:.0f} s")
                continue
            if files.failed() is None:
                files.fail(explain(code, files.log))
            self._settle(point, "failed", files.failed() or "")

    def _stop(self) -> None:
        """End the workers that still run; they save first."""
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + PATIENCE_SECONDS
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _is_done(self, point: Point) -> bool:
        found = self._files(point).result(
            self._study.attacks, self._study.measures, point.config.train.epochs
        )
        return found is not None

    def _settle(self, point: Point, state: State, text: str = "") -> None:
        self._open.remove(point)
        self._over += 1
        self._tell(point, state, text)

    def _tell(self, point: Point, state: State, text: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(
                Event(run=point.name, state=state, text=text, done=self._over, total=self._total)
            )

    def _files(self, point: Point) -> RunFiles:
        return self._folder.files(point.name)


def _visible_device(slot: int, devices: int) -> dict[str, str]:
    """Spread workers over the GPUs of a machine: each sees one."""
    if devices < 2:
        return {}
    said = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    visible = said or [str(i) for i in range(devices)]
    return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]}
