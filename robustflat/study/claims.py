"""Owns claims: which process, on which machine, works at a run, and when that claim is void."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from robustflat.errors import UserError

# A claim is renewed by touching its file.
BEAT_SECONDS = 5.0
STALE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a claim.

    Attributes:
        host: the machine.
        pid: the process on it.
        since: when, in words.
        token: of this very claim.
    """

    host: str
    pid: int
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


@dataclass(frozen=True)
class Void:
    """A claim whose holder is gone, and why that is known."""

    owner: Owner | None
    why: str


def take(lock: Path) -> Owner | None:
    """Claim what ``lock`` stands for, unless another has.

    The file appears with its content in one step (a hard link), so of several that try only one
    gets it, and no reader finds half an owner.

    Args:
        lock: the claim's file, on a file system that all who may claim share.

    Returns:
        The new owner, or None if there is one already (see :func:`void`).

    Raises:
        UserError: if the folder cannot be written.
    """
    owner = Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=uuid.uuid4().hex,
    )
    text = json.dumps(asdict(owner)) + "\n"
    aside = lock.with_name(f"{lock.name}.{owner.token}")
    try:
        aside.write_text(text, encoding="utf-8")
        try:
            os.link(aside, lock)
        except FileExistsError:
            return None
        except OSError:
            # No hard links here; exclusive creation is as atomic, though its content comes after.
            with lock.open("x", encoding="utf-8") as file:
                file.write(text)
        finally:
            aside.unlink(missing_ok=True)
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(
            f"The claim {lock} cannot be written: {error}. Free some space or choose another "
            "output folder."
        ) from None
    return owner


def holder(lock: Path) -> Owner | None:
    """Who holds the claim; None if nobody does or the file does not say."""
    try:
        return Owner(**json.loads(lock.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def void(lock: Path) -> Void | None:
    """Whether a claim that stands can be taken over, and why.

    It can if its process has ended (seen from the same machine), or if it has not been renewed for
    five minutes, by the clock of the file system, which all machines share.
    """
    owner = holder(lock)
    try:
        silent = _now(lock.parent) - lock.stat().st_mtime
    except OSError:
        return None
    if owner is not None and owner.host == socket.gethostname() and not _alive(owner.pid):
        return Void(owner, f"{owner} has ended without finishing")
    if silent > STALE_SECONDS:
        who = "its owner is not known, and" if owner is None else f"{owner}"
        return Void(owner, f"{who} has given no sign of life for {silent / 60:.0f} minutes")
    return None


def clear(lock: Path, found: Void) -> bool:
    """Remove a void claim. Returns whether it was still the same one.

    It is moved away before it is looked at again: of several that clear it only one succeeds, and a
    claim that was made in between is put back.
    """
    aside = lock.with_name(f"{lock.name}.void-{uuid.uuid4().hex}")
    try:
        lock.rename(aside)
    except OSError:
        return False
    same = holder(aside) == found.owner
    if not same:
        # If a third has claimed it already, the second notices at its next beat and stops.
        with suppress(OSError):
            os.link(aside, lock)
    aside.unlink(missing_ok=True)
    return same


def release(lock: Path, owner: Owner) -> None:
    """Give up one's own claim; another's is left alone."""
    if holder(lock) == owner:
        lock.unlink(missing_ok=True)


class Heartbeat:
    """Renews a claim from a thread, as a context manager.

    Args:
        lock: the claim's file.
        owner: who holds it.
        on_loss: called once, from the thread, if the claim was taken over by another or the
            process that started this one is gone.
    """

    def __init__(self, lock: Path, owner: Owner, on_loss: Callable[[str], None]) -> None:
        self._lock, self._owner, self._on_loss = lock, owner, on_loss
        self._parent = os.getppid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if os.getppid() != self._parent:
                return self._on_loss("the process that started it is gone")
            current = holder(self._lock)
            if current is not None and current != self._owner:
                return self._on_loss(f"its claim was taken over by {current}")
            # Without a reachable file system there is nothing to renew; the next beat tries again.
            with suppress(OSError):
                os.utime(self._lock)
        return None


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # There os.kill(pid, 0) is no question; the heartbeat decides alone.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not _zombie(pid)


def _zombie(pid: int) -> bool:
    """Whether a process has ended and only waits to be reaped (told on Linux alone)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]


def _now(folder: Path) -> float:
    """The time by the clock that dates the files of ``folder``."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
