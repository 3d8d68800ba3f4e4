"""Owns the reading of a study from YAML: its base run put in, every problem with its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustflat.config.reading import apply_override, parse, read_text, validated
from robustflat.study.grid import Places, expand
from robustflat.study.schema import StudyConfig

# Grid points that are checked with their places in the file; all are before anything is trained.
CHECKED = 100


def read_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read and check a study with all its grid points; nothing is trained.

    Args:
        path: a YAML file; a ``base`` in it that is a path is relative to it.
        overrides: "key.path=value" each, as for a run; those below ``base.`` change the base run.

    Returns:
        The study, its base run a mapping.

    Raises:
        ConfigError: naming every problem with its file and line.
    """
    path = Path(path)
    values, places = parse(read_text(path), str(path))
    for override in overrides:
        if not override.startswith("base."):
            apply_override(override, values, places)
    if isinstance(values.get("base"), str):
        base = path.parent / values["base"]
        values["base"], below = parse(read_text(base, f" (the base of {path})"), str(base))
        places |= {("base", *keys): place for keys, place in below.items()}
    for override in overrides:
        if override.startswith("base."):
            apply_override(override, values, places)
    if isinstance(values.get("grid"), dict):
        # One block of combinations, as the schema reads it.
        values["grid"] = [values["grid"]]
        places = {
            ("grid", 0, *keys[1:]) if keys[0] == "grid" and len(keys) > 1 else keys: place
            for keys, place in places.items()
        }
    study = check_study(values, places, str(path))
    expand(study, places, CHECKED)
    return study


def check_study(
    values: dict[str, Any], places: Places | None = None, source: str = "study"
) -> StudyConfig:
    """Check already parsed values, but for the grid points.

    Args:
        values: as YAML gives them.
        places: where each key stands, for messages.
        source: what to call a key whose place is not known.

    Raises:
        ConfigError: naming every problem.
    """
    return validated(StudyConfig, values, places or {}, source)
