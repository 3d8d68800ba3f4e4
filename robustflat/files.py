"""Files that are always whole, by one process at a time, and JSON that every program can read."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from robustflat.errors import UserError

_log = logging.getLogger(__name__)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file (text as UTF-8) aside and put it in place in one step.

    Args:
        path: of the file.
        content: all of it.
        durable: wait until the disk has it, so that it outlasts a power failure.

    Raises:
        OSError: if it cannot be written; what stood there before is then intact.
    """
    # A name of its own: another process may be writing the same file.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder of a file that is written inside.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error}. Free some space or choose another folder; what "
            "was saved before is intact."
        ) from None


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write text, whole or not at all; ``durable`` as for :func:`write_whole`.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(path):
        write_whole(path, text, durable=durable)


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write JSON for programs: whole or not at all, numbers finite or null.

    ``durable`` as for :func:`write_whole`.

    Raises:
        UserError: if it cannot be written.
    """
    text = json.dumps(json_safe(content), indent=2, allow_nan=False)
    write_text(path, text + "\n", durable=durable)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of a file that is read inside what is wrong with it.

    Raises:
        UserError: if it is missing, no text or damaged.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Remove it, and run the command that wrote it again."
        ) from None


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    if not path.exists():
        return None
    with readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


def update_json(path: Path, change: Callable[[Any], Any]) -> Any:
    """Replace what a JSON file holds (None if there is none) by what ``change`` makes of it.

    No other process's change is lost meanwhile.

    Raises:
        UserError: if the file is damaged or cannot be written; it is then as it was.
    """
    with locked(path):
        content = json_safe(change(read_json(path)))
        write_json(path, content)
    return content


@contextmanager
def locked(path: Path, *, patience: float | None = None) -> Iterator[None]:
    """Keep other processes out of ``path`` meanwhile; wait for one that is at it already.

    A lock ends with the process that holds it, however that ends.

    Args:
        path: what is worked on; the lock's file lies beside it.
        patience: seconds to wait at most; None waits as long as it takes.

    Raises:
        UserError: if the folder cannot be written, or patience is at its end.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("Waiting for another process that is at work on %s.", path)
            try:
                lock.acquire(timeout=-1 if patience is None else patience)
            except Timeout:
                raise UserError(
                    f"Another process is at work on {path}. Wait until it ends, or end it first: "
                    "two would spoil each other's files."
                ) from None
    try:
        yield
    finally:
        lock.release()


def json_safe(value: Any) -> Any:
    """``value`` with tuples as lists, keys as text, and null for numbers JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
