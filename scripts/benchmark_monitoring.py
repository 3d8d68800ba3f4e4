"""What watching a run costs, as ratios taken in one process.

    python scripts/benchmark_monitoring.py
    python scripts/benchmark_monitoring.py --case cifar10 --device cuda --width 64 --batch 128

Two runs of AT-AWP that are equal but for what is watched: one has the listeners of `robustflat
train` (progress, trace, TensorBoard) and takes the values of *every* step, the other has neither.
They take turns of ten steps, in changing order. The ratio is taken within each turn and its median
shown with the 95 % interval of a sign test, so that a machine whose speed drifts slows both alike.
CPU time is what the threads of this process worked (of a GPU it says nothing), wall time what a
person waits. At `monitor.step_every: 10`, the default, nine of ten steps are not looked at and the
cost is a tenth.

Then what is done between epochs, in training steps and as the share of a run: measuring accuracy
and loss on fixed images (`monitor.every`), the pictures (`monitor.pictures_every`) and, where it is
asked for, the look at the edge of stability (`monitor.edge`, 256 images, once an epoch).
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from robustflat import data
from robustflat.config import check_config
from robustflat.data.images import MemoryImages
from robustflat.report.following import Trace
from robustflat.report.progress import ProgressBar
from robustflat.report.tensorboard import TensorBoard
from robustflat.train import Listener, Trainer
from robustflat.train.folder import RunFolder
from robustflat.train.setup import use_threads

_TURN = 10  # steps
# Of the recipes whose settings the cases have: images trained on in an epoch.
_IMAGES = {"digits": 500, "cifar10": 49_000}


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description="Cost of watching a run, as ratios.")
    parser.add_argument("--case", choices=tuple(_IMAGES), action="append")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--width", type=int, default=8, help="of PreActResNet-18")
    parser.add_argument("--batch", type=int, default=32, help="of PreActResNet-18")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    table = Table(title=f"watched over unwatched, {args.rounds} turns of {_TURN} steps each")
    for heading in (
        "run",
        "seconds a step",
        "wall time",
        "CPU time",
        "every 10th",
        "measuring",
        "pictures",
        "edge",
    ):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for case in args.case or _IMAGES:
        with tempfile.TemporaryDirectory() as place:
            table.add_row(*_row(case, args, Path(place)))
    Console(width=140).print(table)


def _row(case: str, args: argparse.Namespace, place: Path) -> list[str]:
    runs = {watched: _begun(case, args, place, watched=watched) for watched in (True, False)}
    wall: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.rounds + 1):
        for watched in (True, False) if number % 2 else (False, True):
            run, began, worked = runs[watched], time.perf_counter(), time.process_time()
            run._train_epoch()  # ends by waiting for the device
            if number:  # the first warms up
                wall[watched].append(time.perf_counter() - began)
                cpu[watched].append(time.process_time() - worked)
            run.epoch, run.step = run.epoch + 1, 0
    run, config = runs[True], runs[True].config
    step = statistics.median(wall[False]) / _TURN
    measuring = _seconds(lambda: run._monitor(run.model))
    pictures = _seconds(lambda: _pictured(run))
    # Of weights that have moved since the look before, or that would find its own answer there.
    edge = _seconds(
        lambda: run._monitor.at_edge(run.model, run._step.optimizer, run._weights),
        run._train_epoch,
    )
    epoch = _IMAGES[case] / config.train.batch_size
    for listener in run.teller.listeners:
        listener.on_end()
    return [
        f"{case}: {config.model.name}, batch {config.train.batch_size}",
        f"{step:.3f}",
        _ratio(wall),
        _ratio(cpu),
        f"{(_median(cpu) - 1) / 10:+.2%}",
        *(
            f"{seconds / step:.1f} steps, {seconds / (step * steps):.2%}"
            for seconds, steps in (
                (measuring, epoch * config.monitor.every),
                (pictures, 5000),
                (edge, epoch),
            )
        ),
    ]


def _begun(case: str, args: argparse.Namespace, place: Path, *, watched: bool) -> Trainer:
    """A run whose epoch is a turn, at its first step."""
    found: dict[str, Any] = {"name": "run", "device": args.device, "train": {"epochs": 10**6}}
    found["weights"] = "awp"
    if case == "digits":
        batch = 32
        found |= {
            "threads": 1,
            "model": {"name": "small_cnn"},
            "monitor": {"every": 5, "train_samples": 200},
        }
        found["attack"] = {"name": "pgd", "eps": 0.2, "steps": 7}
    else:
        batch = args.batch
        found["model"] = {"name": "preact_resnet18", "options": {"width": args.width}}
        found["monitor"] = {}
    found["train"]["batch_size"] = batch
    # Never in a training of a turn a time.
    found["monitor"] |= {"step_every": int(watched), "edge": {"every": 10**6}}
    config = check_config(found)
    use_threads(config)
    folder = RunFolder(place / ("watched" if watched else "not"))
    folder.prepare(config, resume=False)
    bar = ProgressBar(Console(file=io.StringIO(), force_terminal=True), "run")
    listeners: list[Listener] = [bar, Trace(folder.root), TensorBoard(folder.root)]
    run = Trainer(
        config,
        _images(case, batch),
        torch.device(args.device),
        listeners=listeners if watched else (),
    )
    run.teller.start(0, 0)
    return run


def _images(case: str, batch: int) -> data.Data:
    if case == "digits":
        return data.load("digits", train_samples=_TURN * batch, validation_samples=200)
    # What is on them costs no time.
    drawn = torch.Generator().manual_seed(0)
    splits = {
        split: MemoryImages(
            torch.randint(0, 256, (count, 3, 32, 32), generator=drawn, dtype=torch.uint8),
            torch.arange(count) % 10,
        )
        for split, count in (("train", _TURN * batch), ("validation", 1000), ("test", 10))
    }
    return data.Data(
        **splits,
        classes=tuple("0123456789"),
        shape=(3, 32, 32),
        true_labels=splits["train"].labels,
    )


def _pictured(run: Trainer) -> None:
    pictures = run._monitor.pictures(run.model, run._classes)
    for listener in run.teller.listeners:
        listener.on_pictures({"steps": 0}, pictures)


def _seconds(look: Any, before: Any = lambda: None) -> float:
    """The median of three, after one of warm-up."""
    taken = []
    for _ in range(4):
        before()
        began = time.perf_counter()
        look()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _ratios(taken: dict[bool, list[float]]) -> list[float]:
    return sorted(a / b for a, b in zip(taken[True], taken[False], strict=True))


def _median(taken: dict[bool, list[float]]) -> float:
    return statistics.median(_ratios(taken))


def _ratio(taken: dict[bool, list[float]]) -> str:
    """The median over the turns of watched over unwatched, and its interval."""
    ratios = _ratios(taken)
    out = int(binom.ppf(0.025, len(ratios), 0.5))
    low, high = ratios[max(out - 1, 0)], ratios[-max(out, 1)]
    return f"{_median(taken) - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"


if __name__ == "__main__":
    main()
