"""Owns evaluation.json and its kin: measurements that are added to, and replace their own.

A measurement is a mapping with its ``kind`` and its circumstances (checkpoint, weights, threat,
images, seed, ...). It replaces one of equal circumstances, and never another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustflat.errors import UserError
from robustflat.evaluate.threat import radius
from robustflat.files import json_safe, read_json, update_json
from robustflat.subject import Subject
from robustflat.train.folder import RunFolder, versions

FORMAT = "robustflat-record-2"
Measurement = dict[str, Any]

# What tells measurements apart. Not the epoch: of a run that was trained further, the measurement
# of its present last checkpoint replaces that of an earlier one.
_OWN = (
    "kind", "checkpoint", "weights", "norm", "eps", "data", "split", "samples", "seed",
    "batch_size", "attack", "options",
)  # fmt: skip


def measurement(subject: Subject, kind: str, state: Mapping[str, Any], **own: Any) -> Measurement:
    """A measurement of a subject in a state, with the circumstances that all have and its own."""
    return {
        "kind": kind,
        **state,
        "data": subject.data,
        "said": dict(subject.said),
        "device": str(subject.device),
        "versions": versions(),
        **own,
    }


def read(path: Path, command: str) -> list[Measurement]:
    """The measurements of a file, oldest first; empty if there is no file.

    Args:
        path: The file.
        command: That writes it, for messages.

    Raises:
        UserError: If it is damaged.
    """
    return _measurements(read_json(path), path, command)


def all_of(folder: RunFolder) -> list[Measurement]:
    """All that was measured of a run or a model.

    Raises:
        UserError: If a file is damaged.
    """
    return [one for path, command in folder.records.items() for one in read(path, command)]


def add(path: Path, command: str, subject: str, found: Sequence[Measurement]) -> None:
    """Add measurements to a file; each replaces its own earlier one.

    Raises:
        UserError: If the file is damaged or cannot be written.
    """
    new: list[Measurement] = json_safe(list(found))

    def change(content: Any) -> dict[str, Any]:
        kept = _measurements(content, path, command)
        for one in new:
            same = [old for old in kept if _own(old) == _own(one)]
            kept = [old for old in kept if old not in same]
            for old in same:
                if one["kind"] == "flatness" and old["epoch"] == one["epoch"]:
                    one["measures"] = {**old["measures"], **one["measures"]}
            kept.append(one)
        return {"format": FORMAT, "subject": subject, "measurements": kept}

    update_json(path, change)


def evaluation_of(found: Sequence[Measurement]) -> dict[str, Any] | None:
    """The newest evaluation: the attacks and gaps under the threat that was measured last.

    What was measured on other images than the run's own is left out beside what was on them.

    Returns:
        Keys ``norm``, ``eps``, ``gap_attack``, ``checkpoints`` (by name, each with ``epoch``,
        ``weights``, ``model``, and ``test`` and ``gap`` or None) and ``overfitting``; None if there
        is none.
    """
    if not found:
        return None
    found = _at_home(found)
    norm, eps = found[-1]["norm"], found[-1]["eps"]
    checkpoints: dict[str, Any] = {}
    overfitting, attack = None, None
    for one in found:
        if (one["norm"], one["eps"]) != (norm, eps):
            continue
        if one["kind"] == "overfitting":
            overfitting = one["figures"]
            continue
        place = checkpoints.setdefault(one["checkpoint"], {"test": None, "gap": None})
        state = {key: one.get(key) for key in ("epoch", "weights", "model")}
        if any(place.get(key) != value for key, value in state.items()):
            place |= {"test": None, "gap": None}
        place |= {**state, one["kind"]: one["result"]}
        attack = one["attack"] if one["kind"] == "gap" else attack
    order = sorted(checkpoints, key=("best", "last", "given").index)
    return {
        "norm": norm,
        "eps": eps,
        "gap_attack": attack,
        "checkpoints": {name: checkpoints[name] for name in order},
        "overfitting": overfitting,
    }


def flatness_of(found: Sequence[Measurement]) -> dict[str, Any] | None:
    """The newest flatness: of each measure the last figure of the same network.

    A figure has also ``images`` (such as "100 train images") and ``threat``, None of a clean loss.
    """
    if not found:
        return None
    found = _at_home(found)
    keys = ("checkpoint", "epoch", "weights", "model")
    same = [one for one in found if all(one.get(key) == found[-1].get(key) for key in keys)]
    measures = {}
    for one in same:
        images = f"{one['samples']} {one['split']} images"
        for name, figure in one["measures"].items():
            is_clean = (figure.get("details") or {}).get("loss") == "clean"
            threat = None if is_clean else threat_of(one)
            measures[name] = {**figure, "images": images, "threat": threat}
    return {**{key: found[-1].get(key) for key in keys}, "measures": measures}


def threat_of(one: Measurement) -> str:
    """Its threat in words: "linf 8/255"."""
    return f"{one['norm']} {radius(one['eps'])}"


def _measurements(content: Any, path: Path, command: str) -> list[Measurement]:
    if content is None:
        return []
    try:
        found = content["measurements"]
        if not isinstance(found, list) or any(not isinstance(one["kind"], str) for one in found):
            raise TypeError("its measurements are none")
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not what this version's `robustflat {command}` writes "
            f"({type(error).__name__}: {error}). Move it away, and measure again."
        ) from None
    return list(found)


def _own(one: Measurement) -> list[Any]:
    # A run's checkpoint of a name is one; models of a name may be many.
    model = one.get("model") if one["checkpoint"] == "given" else None
    return [model, _elsewhere(one), *(one.get(key) for key in _OWN)]


def _elsewhere(one: Measurement) -> Any:
    """The data set that a run was measured on in place of its own images; None of its own."""
    return one.get("said", {}).get("data")


def _at_home(found: Sequence[Measurement]) -> Sequence[Measurement]:
    """What was measured on a run's own images, or all if nothing was."""
    return [one for one in found if _elsewhere(one) is None] or found
