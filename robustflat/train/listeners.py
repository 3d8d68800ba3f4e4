"""Who is told what happens in a run, and the outbox that tells them without delaying it."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from robustflat.train.pictures import Pictures


class Listener:
    """Is told what happens; cannot change it. The base of one's own: override what is of use.

    Written in YAML as ``listeners: [{name: package.module:Class, key: value}]``; it is called with
    the keys and, if it takes ``folder``, the folder of the run.
    """

    def on_start(self, epochs: int, steps: int, done: int) -> None:
        """The run has ``epochs`` epochs of ``steps`` steps, ``done`` steps of it behind it.

        The last step of an epoch counts once the epoch was told and saved.
        """

    def on_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Step ``step`` of ``epoch`` (both from 0) was taken.

        ``values`` is empty except at every ``monitor.step_every``-th step: those of
        :class:`robustflat.Watch`, and lr, radius, eps, images_per_second, memory (bytes); where
        ``monitor.edge`` looks also those of :class:`robustflat.train.edge.Edge`. A GPU goes on
        meanwhile, so they may come some steps late, but always in order.
        """

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended; ``row`` is its line of metrics.jsonl."""

    def on_pictures(self, row: dict[str, Any], pictures: Pictures) -> None:
        """Told every ``monitor.pictures_every`` epochs, before :meth:`on_epoch` of ``row``."""

    def on_end(self) -> None:
        """The run ended or was stopped."""


@dataclass(frozen=True)
class _Letter:
    epoch: int
    step: int
    told: dict[str, float]
    names: tuple[str, ...] = ()
    tensor: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def values(self) -> dict[str, float]:
        if self.tensor is None:
            return self.told
        return dict(zip(self.names, self.tensor.tolist(), strict=True)) | self.told


class Outbox:
    """Brings the values of steps from the device to the listeners, in order.

    On a CPU at once; from a CUDA device when a copy that nothing waits for has arrived; from
    others when :meth:`deliver` is told to wait.

    Args:
        listeners: who is told.
        device: where the values are.
        images: in a step, for the throughput.
    """

    def __init__(self, listeners: Sequence[Listener], device: torch.device, images: int) -> None:
        self._listeners, self._device, self._images = listeners, device, images
        self._letters: deque[_Letter] = deque()
        self._since, self._steps = time.monotonic(), 0

    def post(
        self,
        epoch: int,
        step: int,
        values: tuple[tuple[str, ...], Tensor] | None = None,
        told: Mapping[str, float] | None = None,
    ) -> None:
        """A step was taken.

        Args:
            epoch: from 0.
            step: from 0.
            values: names and a tensor ``[N]`` of the values on the device, if it was looked at.
            told: further values, which are known here.
        """
        self._steps += 1
        if not self._listeners:
            return
        letter = _Letter(epoch, step, {})
        if values is not None:
            now = time.monotonic()
            speed = self._steps * self._images / max(now - self._since, 1e-9)
            self._since, self._steps = now, 0
            known = {**(told or {}), "images_per_second": speed, "memory": self._memory()}
            names, tensor = values
            arrived = None
            if self._device.type == "cuda":
                place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                tensor = place.copy_(tensor, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
            letter = _Letter(epoch, step, known, names, tensor, arrived)
        self._letters.append(letter)
        self.deliver()

    def deliver(self, *, wait: bool = False) -> None:
        """Tell what has arrived; if asked to ``wait``, all that was posted."""
        while self._letters and (wait or self._is_here(self._letters[0])):
            letter = self._letters.popleft()
            if wait and letter.arrived is not None:
                letter.arrived.synchronize()
            values = letter.values()
            for listener in self._listeners:
                listener.on_step(letter.epoch, letter.step, values)

    def restart_clock(self) -> None:
        """What was done since the last step is not training."""
        self._since, self._steps = time.monotonic(), 0

    @staticmethod
    def _is_here(letter: _Letter) -> bool:
        if letter.arrived is not None:
            return letter.arrived.query()
        return letter.tensor is None or letter.tensor.device.type == "cpu"

    def _memory(self) -> float:
        """Bytes: the most that tensors took on a GPU, or this process's resident set."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        # Linux counts in KiB, macOS in bytes.
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(most if sys.platform == "darwin" else 1024 * most)
