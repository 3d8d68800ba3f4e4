"""Files that are always whole, and JSON that every program can read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustflat.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside and put it in place in one step.

    Raises:
        OSError: if it cannot be written; what stood there before is then intact.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for programs: whole or not at all, numbers finite or null.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        write_whole(path, json.dumps(json_safe(content), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error}. Free some space or choose another folder."
        ) from None


def json_safe(value: Any) -> Any:
    """``value`` with tuples as lists, keys as text, and null for numbers JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
