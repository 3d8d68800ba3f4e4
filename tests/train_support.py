"""Small runs on digits, and ways to compare them, that the tests of training share."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import robustflat
from robustflat.config import RunConfig, check_config
from robustflat.runs.evaluation import Job
from robustflat.train import Trainer, train
from robustflat.train.folder import RunFolder
from robustflat.train.setup import load_data

BASE: dict[str, Any] = {
    "name": "run",
    "device": "cpu",
    "data": {"train_samples": 60, "test_samples": 40, "validation_samples": 40},
    "model": {"name": "mlp", "options": {"hidden": [16]}},
    "attack": {"name": "pgd", "eps": 0.1, "steps": 2},
    "objective": {"name": "adversarial"},
    "weights": {"name": "awp", "gamma": 0.02},
    "train": {"epochs": 2, "batch_size": 16},
    "listeners": [],
    "monitor": {"steps": 2, "train_samples": 40, "pictures_every": 0},
}
SMALL_CNN = {"name": "small_cnn", "options": {"width": 4, "depth": 2}}


def values(**changes: Any) -> dict[str, Any]:
    """The values of a small run; ``data__mix={...}`` sets data.mix."""
    found = copy.deepcopy(BASE)
    for path, value in changes.items():
        *above, last = path.split("__")
        target = found
        for key in above:
            target = target.setdefault(key, {})
        target[last] = value
    return found


def config(output: Path | str = "unused", **changes: Any) -> RunConfig:
    return check_config(values(output=str(output), **changes))


def write(path: Path, **changes: Any) -> Path:
    """A YAML file whose run goes beside it."""
    path.write_text(yaml.safe_dump(values(output=str(path.parent), **changes)))
    return path


def trained(output: Path, *, resume: bool = False, **changes: Any) -> RunFolder:
    folder, finished = train(config(output, **changes), resume=resume)
    assert finished
    return folder


def stopped(asked: RunConfig, folder: RunFolder, after: int) -> Trainer:
    """A run that was asked to stop after so many steps."""

    class Stop:
        taken = 0

        def on_start(self, epochs: int, steps: int, done: int) -> None: ...
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            self.taken += 1
            trainer.stop_requested = self.taken == after

        def on_epoch(self, row: dict[str, Any]) -> None: ...
        def on_end(self) -> None: ...

    cpu = torch.device("cpu")
    trainer = Trainer(asked, load_data(asked), cpu, folder=folder, listeners=[Stop()])
    assert not trainer.run()
    return trainer


def saved(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl but for the time they took, read by the strict JSON parser."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = folder.metrics_file.read_text()
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    for row in found:
        assert row.pop("seconds") >= 0
    return found


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested values differ by a single bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [at]
    if isinstance(a, dict):
        if not isinstance(b, dict) or list(a) != list(b):
            return [at]
        return [found for k in a for found in differences(a[k], b[k], f"{at}.{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [at]
        return [
            f
            for i, (p, q) in enumerate(zip(a, b, strict=True))
            for f in differences(p, q, f"{at}.{i}")
        ]
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return []
    return [] if a == b else [at]


def same_run(
    one: RunFolder, two: RunFolder, ignore: tuple[str, ...] = ("seconds", "config")
) -> None:
    """Both runs ended with the same bits: weights, optimizer, averages and figures."""
    assert rows(one) == rows(two)
    for a, b in ((one.last, two.last), (one.best, two.best)):
        assert a.is_file() == b.is_file()
        if a.is_file():
            left, right = saved(a), saved(b)
            for key in ignore:
                left.pop(key, None), right.pop(key, None)
            assert differences(left, right) == []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def python(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    """A Python process that imports this very package."""
    root = str(Path(robustflat.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def measurements(view: dict[str, Any]) -> dict[str, Any]:
    """A made-up evaluation, as `records.evaluation_of` shows it, as evaluation.json holds it."""
    common = {"norm": view["norm"], "eps": view["eps"], "data": "digits", "seed": 0}
    common |= {"attack": view["gap_attack"]}
    found: list[dict[str, Any]] = []
    for name, entry in view["checkpoints"].items():
        about = {"checkpoint": name, "epoch": entry["epoch"], "weights": entry["weights"]}
        for kind in ("test", "gap"):
            if entry[kind] is not None:
                found.append({"kind": kind, **about, **common, "result": entry[kind]})
    if view["overfitting"] is not None:
        about = {"kind": "overfitting", "checkpoint": "best - last", "weights": "raw", "count": 200}
        found.append({**about, **common, "figures": view["overfitting"]})
    return {"format": "robustflat-record-2", "subject": "run", "measurements": found}


def evaluate_subject(subject: Any, wanted: Any = None, *more: Any) -> dict[str, Any]:
    return Job(subject, wanted).run(*more)
