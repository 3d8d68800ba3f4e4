"""Processes that train together: resuming, faults told once, devices, shares of the work."""

from __future__ import annotations

import os
import signal
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command, forked, pair, together
from torch import nn
from train_support import SMALL_CNN, config, differences, same_run, saved, trained, write

from robustflat.config import read_config
from robustflat.data import MemoryImages
from robustflat.errors import UserError
from robustflat.files import locked
from robustflat.train import loop, parallel, run, train
from robustflat.train.feed import placed
from robustflat.train.folder import RunFolder
from robustflat.train.monitor import Monitor
from robustflat.train.parallel import Processes, device_name, synchronised, was_restarted
from robustflat.train.setup import build_model, load_data
from robustflat.train.step import TrainStep

CPU = torch.device("cpu")
BATCHNORM: dict[str, Any] = {
    "model": SMALL_CNN,
    "data__augment": {"crop": 1},
    "train__epochs": 3,
    "train__average": {"name": "ema", "decay": 0.9},
}
RUNS: dict[str, dict[str, Any]] = {
    "awp": BATCHNORM,
    "trades": BATCHNORM
    | {
        "objective": {"name": "trades"},
        "weights": {"name": "random", "gamma": 0.02, "step": {"sync": "global"}},
    },
}


class Heard:
    """A listener that does nothing."""

    def on_start(self, epochs: int, steps: int, done: int) -> None: ...
    def on_step(self, epoch: int, step: int, values: Any) -> None: ...
    def on_epoch(self, row: dict[str, Any]) -> None: ...
    def on_end(self) -> None: ...


def trained_and_cut(folder: Path) -> None:
    """Trains each run whole, then stopped by a SIGTERM to one process and resumed."""
    rank, made, seen = int(os.environ["RANK"]), list[Any](), list[Any]()
    take, replica, leave = TrainStep.__call__, loop.replica, parallel._leave

    def remembered(*arguments: Any) -> nn.Module:
        found = replica(*arguments)
        made.append(weakref.ref(found))
        return found

    def checked() -> None:
        # On torch 2.6 a replica that outlives its group may wait for ever at its end.
        assert made
        assert not any(replica() for replica in made)
        leave()

    def watched(self: TrainStep, model: Any, batches: Any, weights: Any, *rest: Any) -> Any:
        seeds = [r.initial_seed() for r in rest if isinstance(r, torch.Generator)]
        seen.append([weights.sync, *seeds])
        # The buffers are those that the step before left.
        torch.save([seen, dict(model.module.named_buffers())], folder / f"seen.{rank}.pt")
        return take(self, model, batches, weights, *rest)

    class Stop(Heard):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            if (epoch, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)

    # This process ends with it.
    loop.replica, parallel._leave = remembered, checked  # type: ignore[assignment]
    TrainStep.__call__ = watched  # type: ignore[method-assign, assignment]
    for name in RUNS:
        train(read_config(folder / f"{name}.yaml"))
        cut = read_config(folder / f"{name}-cut.yaml")
        _, finished = train(cut, listeners=lambda folder: [Stop()])
        assert not finished
        _, finished = train(cut, resume=True)
        assert finished


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, said in RUNS.items():
        write(folder / f"{name}.yaml", name=name, **said)
        write(folder / f"{name}-cut.yaml", name=f"{name}-cut", **said)
    together(trained_and_cut, folder, folder=folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_resume_bit_for_bit(pairs: Path, name: str) -> None:
    same_run(RunFolder(pairs / name), RunFolder(pairs / f"{name}-cut"))


def test_both_processes_hold_the_same_buffers_and_draw_other_random_numbers(pairs: Path) -> None:
    (one, of_one), (two, of_two) = (saved(pairs / f"seen.{rank}.pt") for rank in (0, 1))
    assert differences(of_one, of_two) == []
    assert len(one) == len(two) >= 12
    assert {sync for sync, *_ in one} == {"local", "global"}
    for (sync, *a), (_, *b) in zip(one, two, strict=True):
        assert a[0] != b[0]  # the attack's
        # Of the weights: where all climb together, they start from the same point.
        assert (a[1] == b[1]) == (sync == "global")
        assert a[0] != a[1]


def test_a_run_of_two_processes_is_not_resumed_by_one(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"2 process\(es\) .* with 1: .*--nproc-per-node=2"):
        train(config(pairs, name="awp", **RUNS["awp"]), resume=True)


def dying(path: Path) -> None:
    """The command line, of which the second process dies in its first life."""
    steps, take = [], TrainStep.__call__

    def fatal(*arguments: Any, **more: Any) -> Any:
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(*arguments, **more)

    if os.environ["RANK"] == "1" and not was_restarted():
        TrainStep.__call__ = fatal  # type: ignore[method-assign]
    command("train", str(path))


def test_a_process_that_dies_ends_the_others_with_a_sentence_and_all_resume(
    pairs: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.yaml", train__checkpoint_minutes=1e-4, **RUNS["awp"])
    (codes, said), (others, then) = pair(dying, path, folder=tmp_path, lives=2)
    assert codes == [1, -signal.SIGKILL]
    assert said.count("lost the others") == 1
    assert "Stopped: Process 0 of 2" in said
    assert others == [0, 0], then
    assert then.count("trained. Next:") == 1
    assert "lost" not in then
    one, two = (RunFolder(f).root for f in (pairs / "awp", tmp_path / "run"))
    same_run(RunFolder(one), RunFolder(two))


def refused_by_the_second(path: Path) -> None:
    def refused(config: Any) -> Any:
        raise UserError("The disk of this host alone is broken.")

    if os.environ["RANK"] == "1":
        run.load_data = refused
    command("train", str(path))


def test_a_mistake_that_one_host_meets_is_told_once_and_ends_all(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml")
    ((codes, said),) = pair(refused_by_the_second, path, folder=tmp_path)
    assert codes == [2, 2]  # and not after the hour that the others would wait
    assert said.count("Error: The disk of this host alone is broken.") == 1
    assert "Traceback" not in said
    assert "trained" not in said
    assert not (tmp_path / "run").exists()


# --- devices


@pytest.mark.parametrize(
    ("name", "local_rank", "local_world", "gpus", "expected"),
    [
        ("auto", 0, 1, 0, "cpu"),
        ("auto", 0, 1, 8, "cuda:0"),
        ("auto", 3, 4, 4, "cuda:3"),
        ("auto", 3, 4, 0, "cpu"),
        ("cpu", 1, 4, 8, "cpu"),
        ("cuda", 0, 1, 2, "cuda:0"),
        ("cuda", 1, 2, 2, "cuda:1"),
        ("cuda:1", 0, 1, 2, "cuda:1"),
    ],
)
def test_each_process_has_a_device_of_its_own(
    name: str, local_rank: int, local_world: int, gpus: int, expected: str
) -> None:
    # Two hosts: what counts is the rank on this one.
    processes = Processes(local_world + local_rank, 2 * local_world, local_rank, local_world)
    assert device_name(name, processes, gpus) == expected


def test_processes_do_not_share_a_gpu() -> None:
    processes = Processes(2, 4, 2, 4)
    with pytest.raises(UserError, match=r"4 processes .* 2 GPU.*--nproc-per-node=2"):
        device_name("auto", processes, 2)
    with pytest.raises(UserError, match=r"cuda:1 would put all 4 processes"):
        device_name("cuda:1", processes, 4)


# --- started again, signals, the lock


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_what_starts_a_run_again_resumes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    folder = trained(tmp_path)
    before = folder.last.stat().st_mtime_ns
    monkeypatch.setenv(name, "0")
    assert not was_restarted()
    with pytest.raises(UserError, match="already exists"):
        train(config(tmp_path))
    monkeypatch.setenv(name, "1")
    # Not even --overwrite, which stands in the job's script, loses what the first life did.
    train(config(tmp_path), overwrite=True)
    assert folder.last.stat().st_mtime_ns == before  # not even to the same end


class Warned(Heard):
    """A listener that is sent Slurm's warning."""

    def on_step(self, epoch: int, step: int, values: Any) -> None:
        if (epoch, step) == (0, 2):
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("answer", ["requeued", "refused", "no slurm"])
def test_sigusr1_saves_and_asks_to_be_requeued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str
) -> None:
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    end = "echo no such job >&2; exit 1" if answer == "refused" else "exit 0"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{end}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    if answer != "no slurm":
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
    said = config(tmp_path)
    if answer == "refused":
        with pytest.raises(UserError, match=r"saved, but .*4711 .*no such job.*--resume"):
            train(said, listeners=lambda folder: [Warned()])
    else:
        _, finished = train(said, listeners=lambda folder: [Warned()])
        assert not finished
    state = saved(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 3)
    asked = tmp_path / "asked"
    assert asked.exists() == (answer != "no slurm")
    if answer != "no slurm":
        assert asked.read_text() == "requeue 4711\n"
    same_run(trained(tmp_path, resume=True), trained(tmp_path / "whole"))


def test_sigterm_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr("robustflat.train.run._requeue", lambda: pytest.fail("asked"))

    class Ended(Warned):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            if (epoch, step) == (0, 2):
                os.kill(os.getpid(), signal.SIGTERM)

    _, finished = train(config(tmp_path), listeners=lambda folder: [Ended()])
    assert not finished


def _hold(folder: Path, held: Path) -> None:
    with locked(folder):
        held.touch()
        time.sleep(60)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Any]:
    """Another process that is at work on the run, as one left over by a killed torchrun is."""
    process = forked(_hold, tmp_path / "run", tmp_path / "held", said=tmp_path / "said")
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield process
    process.kill()


def test_a_run_that_another_process_writes_is_left_alone(held: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Another process is at work on .*run"):
        train(config(tmp_path))
    assert not (tmp_path / "run").exists()
    # Its lock ends with it, however it ends.
    held.kill()
    held.join(60)
    trained(tmp_path)


# --- shares of the work


@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_first_process_of_every_host_prepares_the_data(
    monkeypatch: pytest.MonkeyPatch, local_rank: int
) -> None:
    told: list[str] = []

    class Host(Processes):
        @contextmanager
        def together(self) -> Iterator[None]:
            yield
            told.append("all wait")

    monkeypatch.setattr(run, "load_data", lambda config: told.append("load") or "images")
    # The second host: its first process is not the first of all.
    assert run._load_once(config(), Host(2 + local_rank, 4, local_rank, 2)) == "images"
    expected = ["all wait", "load", "all wait"] if local_rank else ["load", "all wait", "all wait"]
    assert told == expected


@dataclass(frozen=True)
class Pretended(Processes):
    """One of two processes; what the other one has is given."""

    other: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.other.append(value)
        return list(self.other)


def test_processes_share_the_monitoring_and_find_what_one_finds() -> None:
    settings = config(
        model=SMALL_CNN,
        evaluate__batch_size=16,
        monitor__flatness=["ascent_robust", "average_clean", "ascent_clean"],
    )
    data = load_data(settings)
    model = build_model(settings, data, CPU)
    assert data.validation is not None
    splits = {"train": data.train.tensors(), "validation": data.validation.tensors()}
    alone = Monitor(settings, splits, CPU, Processes())
    for look in ("__call__", "flatness"):
        other: list[Any] = []
        monitors = [Monitor(settings, splits, CPU, Pretended(r, 2, other=other)) for r in (1, 0)]
        for monitor in monitors[:1]:
            with pytest.raises(KeyError):  # its own half is not all
                getattr(monitor, look)(model)
        assert getattr(monitors[1], look)(model) == getattr(alone, look)(model)
        assert len(other) == 2
        assert abs(len(other[0]) - len(other[1])) <= 1


def test_images_stay_with_the_host_where_the_gpu_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = load_data(config()).train
    assert isinstance(images, MemoryImages)
    size, gpu = images.pixels.nbytes, torch.device("cuda:0")
    went: list[Any] = []
    monkeypatch.setattr(MemoryImages, "to", lambda self, device: went.append(device) or self)
    for place, free, goes in [
        ("auto", 2 * size, True),
        ("auto", 2 * size - 1, False),
        ("device", 0, True),
        ("host", 10 * size, False),
    ]:
        went.clear()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        placed(images, place, gpu)
        assert went == [gpu] * goes, (place, free)
    # It is no part of what a run is.
    assert config(data__place="host").data.place == "host"


def test_where_images_are_kept_changes_nothing(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    trained(tmp_path, resume=True, data__place="host")
    same_run(folder, trained(tmp_path / "host", data__place="host"))


def test_batchnorm_is_synchronised_on_gpus_alone() -> None:
    with pytest.raises(UserError, match=r"sync_batchnorm needs GPUs, got device cpu"):
        synchronised(nn.BatchNorm2d(3), CPU)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    weight = model[1].weight
    found = synchronised(model, torch.device("cuda:0"))
    assert isinstance(found[1], nn.SyncBatchNorm)  # type: ignore[index]
    assert found[1].weight is weight  # type: ignore[index]
