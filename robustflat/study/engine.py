"""Owns the running of a study's runs on an executor: a process each, on one machine or on many.

The seam is ``concurrent.futures.Executor``. On one machine it is the standard library's pool of
threads, each of which waits for a process; on many it is Dask's, whose workers do the same and
share the study's folder. What a dead worker held Dask gives to another, where it is resumed.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from robustflat.errors import UserError, missing
from robustflat.files import write_json
from robustflat.study.folder import RunFiles

PATIENCE_SECONDS = 60.0
State = Literal["kept", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run.

    Attributes:
        run: its name.
        state: "kept" (finished before), "finished" or "failed".
        text: how long it took, or why it failed and its last lines.
        done: how many runs are over, finished or failed.
        total: how many there are.
    """

    run: str
    state: State
    text: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker needs to know of a run: its job file, on a disk that all share."""

    job: Path
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run's process ended: its exit code (negative: by that signal), and after how long."""

    code: int
    seconds: float


class Processes:
    """The processes that this process has started and waits for."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), set[subprocess.Popen[bytes]]()
        self._stopped = False

    def run(self, order: Order, environment: dict[str, str]) -> Outcome:
        """Start the process of a run and wait for its end."""
        log = RunFiles.of_job(order.job).log
        began = time.monotonic()
        with log.open("ab") as file, self._lock:
            if self._stopped:
                raise CancelledError
            # A session of its own: Ctrl-C reaches this process alone, which stops the others. The
            # pipe closes when this process is gone, however that came, and then it stops by itself.
            process = subprocess.Popen(
                [sys.executable, "-m", "robustflat.study.row", str(order.job)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self._open.add(process)
        try:
            code = process.wait()
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with self._lock:
                self._open.discard(process)
        return Outcome(code=code, seconds=time.monotonic() - began)

    def stop(self) -> None:
        """End the processes that still run; they save first."""
        with self._lock:
            self._stopped, left = True, list(self._open)
        for process in left:
            process.terminate()
        until = time.monotonic() + PATIENCE_SECONDS
        for process in left:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def perform(order: Order) -> Outcome:
    """Run one run; on a worker of Dask's, which sees the GPU that it was given."""
    return Processes().run(order, _environment(order))


class Local(ThreadPoolExecutor):
    """So many processes at once on this machine, each with a GPU of its own where there are some.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs, thread_name_prefix="study")
        self._processes = Processes()
        self._devices: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in range(jobs):
            self._devices.put(_visible_device(slot, torch.cuda.device_count()))

    def perform(self, order: Order) -> Outcome:
        """Run one run on the next free device."""
        device = self._devices.get()
        try:
            return self._processes.run(order, {**_environment(order), **device})
        finally:
            self._devices.put(device)

    def stop(self) -> None:
        """Start nothing more, and end what runs; it saves first."""
        self.shutdown(wait=False, cancel_futures=True)
        self._processes.stop()


@contextmanager
def executor(
    jobs: int, scheduler: str | None
) -> Iterator[tuple[Executor, Callable[[Order], Outcome]]]:
    """The executor, and the function that it shall call.

    Args:
        jobs: processes at once on this machine, where there is no scheduler.
        scheduler: the address of a Dask scheduler, such as tcp://10.0.0.1:8786.

    Raises:
        UserError: if there is no such scheduler, or Dask is not installed.
    """
    if scheduler is None:
        local = Local(jobs)
        try:
            yield local, local.perform
        finally:
            local.stop()
        return
    try:
        from distributed import Client
    except ImportError:
        raise missing("--scheduler", "distributed (Dask)", "cluster") from None
    try:
        client = Client(scheduler, timeout=20)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(
            f"There is no Dask scheduler at {scheduler}: {error}. Start one with `dask scheduler` "
            "and workers with `dask worker ADDRESS --nthreads 1`, or by dask-jobqueue or dask ssh."
        ) from None
    try:
        # pure=False: the same order twice is two runs of a process, not one remembered result.
        yield client.get_executor(pure=False), perform
    finally:
        client.close()


def run_all(
    orders: Sequence[Order],
    on: Executor,
    function: Callable[[Order], Outcome],
    is_done: Callable[[RunFiles], bool],
    on_event: Callable[[Event], None],
    kept: Sequence[str] = (),
) -> None:
    """Run everything; a run that fails is told with its last lines and does not stop the others.

    Args:
        orders: what is still to be done.
        on: the executor.
        function: what it calls with each order.
        is_done: whether a run has left all that was asked for.
        on_event: told what becomes of each run.
        kept: runs that were finished before.
    """
    done, total = 0, len(orders) + len(kept)

    def tell(run: str, state: State, text: str) -> None:
        nonlocal done
        done += 1
        on_event(Event(run=run, state=state, text=text, done=done, total=total))

    for name in kept:
        tell(name, "kept", "")
    futures: dict[Future[Outcome], Order] = {on.submit(function, o): o for o in orders}
    for future in as_completed(futures):
        files = RunFiles.of_job(futures[future].job)
        try:
            outcome = future.result()
            why, text = _how(outcome.code), f"in {outcome.seconds:.0f} s"
        except Exception as error:  # the engine's own, such as KilledWorker
            why, text = f"The engine gave it up: {type(error).__name__}: {error}.", ""
        if is_done(files):
            files.failure.unlink(missing_ok=True)
            tell(files.name, "finished", text)
            continue
        error_text = f"{why} The last lines of {files.log}:\n{files.last_lines()}"
        with suppress(OSError):
            write_json(files.failure, {"run": files.name, "error": error_text})
        tell(files.name, "failed", error_text)


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        known = {s.value: s.name for s in signal.Signals}
        text = f"It was killed by {known.get(-code, f'signal {-code}')}"
        return text + (", perhaps for want of memory." if code == -signal.SIGKILL else ".")
    return "It was stopped from outside and saved." if code == 3 else f"It ended with code {code}."


def _environment(order: Order) -> dict[str, str]:
    threads = {} if order.threads is None else {"OMP_NUM_THREADS": str(order.threads)}
    return {**os.environ, **threads}


def _visible_device(slot: int, devices: int) -> dict[str, str]:
    """Spread processes over the GPUs of a machine: each sees one."""
    if devices < 2:
        return {}
    said = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    visible = said or [str(i) for i in range(devices)]
    return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]}
