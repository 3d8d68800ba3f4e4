"""Killed, stopped or failed runs go on bit for bit; nothing that exists is lost by accident."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked import command, forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_support import (
    SMALL_CNN,
    config,
    contents,
    differences,
    rows,
    same_run,
    saved,
    trained,
    write,
)

from robustflat.config import read_config, write_config
from robustflat.errors import UserError
from robustflat.report.tensorboard import TensorBoard
from robustflat.train import Trainer, train
from robustflat.train.folder import RunFolder

# Everything that has a state of its own: momentum, an average, BatchNorm, random starts,
# augmentation, mixtures, a warm-up, a schedule.
RICH: dict[str, Any] = {
    "model": SMALL_CNN,
    "data__augment": {"crop": 1, "flip": True},
    "data__mix": {"name": "mixup"},
    "weights": {"name": "awp", "gamma": 0.05, "when": {"from_epoch": 2, "every": 2}},
    "optimizer": {"name": "sgd", "lr": 0.05},
    "schedule": {"name": "cosine", "warmup_epochs": 1},
    "train__epochs": 4,
    "train__batch_size": 8,
    "train__average": {"name": "ema", "decay": 0.9, "start_epoch": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that nothing interrupted."""
    return trained(tmp_path_factory.mktemp("whole"), **RICH)


class Watcher:
    """A listener that does nothing."""

    def on_start(self, epochs: int, steps: int, done: int) -> None: ...
    def on_step(self, epoch: int, step: int, values: Any) -> None: ...
    def on_epoch(self, row: dict[str, Any]) -> None: ...
    def on_end(self) -> None: ...


class Stop(Watcher):
    """Sends this process a SIGTERM after a step, or raises after an epoch was told."""

    def __init__(self, *at: int) -> None:
        self.at = at

    def on_step(self, epoch: int, step: int, values: Any) -> None:
        if (epoch, step) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch(self, row: dict[str, Any]) -> None:
        if (row["epoch"],) == self.at:
            raise KeyboardInterrupt


def stopped(output: Path, *at: int, **said: Any) -> RunFolder:
    folder, finished = train(config(output, **said), listeners=lambda folder: [Stop(*at)])
    assert not finished
    return folder


# --- SIGTERM


@pytest.mark.parametrize("at", [(0, 0), (1, 2), (2, 7), (3, 6)])
def test_a_stopped_run_goes_on_where_it_stood(
    tmp_path: Path, whole: RunFolder, at: tuple[int, int]
) -> None:
    folder = stopped(tmp_path, *at, **RICH)
    state = saved(folder.last)
    assert (state["epoch"], state["step"]) == (at[0], at[1] + 1)
    assert len(rows(folder)) == at[0] if at[0] else not folder.metrics_file.exists()
    trained(tmp_path, resume=True, **RICH)
    same_run(folder, whole)


def test_several_stops(tmp_path: Path, whole: RunFolder) -> None:
    stopped(tmp_path, 0, 3, **RICH)
    for at in ((0, 4), (1, 0), (3, 1)):
        _, finished = train(
            config(tmp_path, **RICH), resume=True, listeners=lambda f, at=at: [Stop(*at)]
        )
        assert not finished
    same_run(trained(tmp_path, resume=True, **RICH), whole)


def test_the_handler_of_the_caller_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped(tmp_path, 0, 0)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("method", ["msam", "nsam", "swa", "adamw", "bf16"])
def test_other_states_go_on_too(tmp_path: Path, method: str) -> None:
    said: dict[str, dict[str, Any]] = {
        "msam": {"weights": {"name": "msam", "chunk": 4, "inner": "sam"}},
        "nsam": {"weights": {"name": "nsam", "batches": 2, "inner": "sam"}},
        "swa": {"train__average": {"name": "swa", "start_epoch": 0}, "model": SMALL_CNN},
        "adamw": {"optimizer": {"name": "adamw"}, "objective": {"name": "trades"}},
        "bf16": {"train__precision": "bf16", "weights": {"name": "random", "gamma": 0.1}},
    }
    one = trained(tmp_path / "one", train__epochs=3, **said[method])
    stopped(tmp_path / "two", 1, 1, train__epochs=3, **said[method])
    same_run(one, trained(tmp_path / "two", resume=True, train__epochs=3, **said[method]))


# --- SIGKILL


def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    # Long enough to be hit in the middle, and with a checkpoint after every step or so.
    said = RICH | {
        "train__epochs": 10,
        "train__checkpoint_minutes": 1e-4,
        "listeners": ["tensorboard"],
    }
    uninterrupted = trained(tmp_path / "whole", **said)
    (tmp_path / "killed").mkdir()
    path = write(tmp_path / "killed" / "c.yaml", **said)
    folder = RunFolder(tmp_path / "killed" / "run")
    die = random.Random(0)
    killed_at = []
    for attempt in range(2):
        log = tmp_path / f"{attempt}.said"
        process = forked(command, "train", str(path), *["--resume"] * bool(attempt), said=log)
        began = time.monotonic()
        last = folder.last.stat().st_mtime_ns if folder.last.is_file() else None
        while process.is_alive() and time.monotonic() - began < 300:
            # It trains once its checkpoint changes; then it dies at a random moment.
            if folder.last.is_file() and folder.last.stat().st_mtime_ns != last:
                time.sleep(die.uniform(0, 0.25))
                break
            time.sleep(0.002)
        process.kill()
        process.join()
        assert "Error" not in log.read_text()
        if process.exitcode == 0:
            break
        state = saved(folder.last)  # always whole
        killed_at.append((state["epoch"], state["step"]))
    assert killed_at == sorted(killed_at)
    assert killed_at[0] < (10, 0)
    resumed, finished = train(
        read_config(path), resume=True, listeners=lambda f: [TensorBoard(f.root)]
    )
    assert finished
    same_run(resumed, uninterrupted)
    curve = events(resumed)
    assert [step for step, _ in curve] == [r["steps"] for r in rows(resumed)]


def events(folder: RunFolder) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder.root))
    read.Reload()
    return [(e.step, e.value) for e in read.Scalars("5-optimisation/epoch_loss")]


# With a checkpoint after every step the last one holds all steps of an epoch that did not end.
@pytest.mark.parametrize("minutes", [10, 1e-9])
@pytest.mark.parametrize("first", [True, False])
def test_an_epoch_told_but_not_saved_is_told_once(
    tmp_path: Path, first: bool, minutes: float
) -> None:
    said: dict[str, Any] = {"train__epochs": 3, "train__checkpoint_minutes": minutes}

    def listeners(folder: RunFolder, *stop: int) -> list[Any]:
        told: list[Any] = [Stop(*stop), TensorBoard(folder.root)]
        return told if first else told[::-1]

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, **said), listeners=lambda f: listeners(f, 2))
    folder, _ = train(config(tmp_path, **said), resume=True, listeners=listeners)
    losses = [(row["steps"], pytest.approx(row["train_loss"])) for row in rows(folder)]
    assert events(folder) == losses
    assert [at for at, _ in losses] == [4, 8, 12]


WRITES = ["best", "metrics", "last"]


@pytest.mark.parametrize("write_", WRITES)
@pytest.mark.parametrize("before", [True, False])
def test_death_between_the_writes_of_an_epoch(
    tmp_path: Path, whole: RunFolder, monkeypatch: Any, write_: str, before: bool
) -> None:
    # A process that dies right before or after any one of an epoch's writes.
    import robustflat.train.loop as loop

    class Death(BaseException):
        pass

    def dying(real: Any, kind: str) -> Any:
        def call(first: Any, second: Any, *rest: Any) -> None:
            epoch = second.get("epoch")
            name = kind or Path(first).stem
            strike = name == write_ and epoch == 2
            if strike and before:
                raise Death
            real(first, second, *rest)
            if strike:
                raise Death

        return call

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", dying(loop.save_checkpoint, ""))
        patch.setattr(RunFolder, "append_metrics", dying(RunFolder.append_metrics, "metrics"))
        # The second epoch of this run is its best so far, so all three are written.
        assert rows(whole)[1]["is_best"]
        with pytest.raises(Death):
            train(config(tmp_path, **RICH))
    same_run(trained(tmp_path, resume=True, **RICH), whole)


def test_death_while_the_folder_is_made(tmp_path: Path, monkeypatch: Any) -> None:
    # Whatever it had come to, --resume begins.
    import robustflat.train.folder as module

    whole = trained(tmp_path / "whole")

    class Death(BaseException):
        pass

    def die(*a: Any, **k: Any) -> None:
        raise Death

    def die_halfway(value: Any, path: Path) -> None:
        path.with_name(path.name + ".tmp").write_text("name: ru")
        raise Death

    for i, (name, deed) in enumerate(
        [("write_config", die), ("write_config", die_halfway), ("environment", die)]
    ):
        output = tmp_path / str(i)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, deed)
            with pytest.raises(Death):
                train(config(output))
        folder = trained(output, resume=True)
        same_run(folder, whole)
        assert folder.environment_file.is_file()


# --- what resuming refuses, and what it leaves alone


def test_a_changed_configuration_is_refused_by_its_keys(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    before = contents(folder.root)
    with pytest.raises(UserError) as caught:
        train(
            config(tmp_path, attack__eps=0.2, train__epochs=3, data__augment={"flip": True}),
            resume=True,
        )
    message = str(caught.value)
    assert "attack.eps, data.augment.flip, train.epochs" in message
    with pytest.raises(UserError, match=r"weights\.gamma, weights\.name"):
        train(config(tmp_path, weights={"name": "none"}), resume=True)
    with pytest.raises(UserError, match="differ in seed"):
        train(config(tmp_path, seed=3), resume=True)
    assert contents(folder.root) == before
    # The device may change, and where the data lie.
    trained(tmp_path, resume=True, device="auto", data__root="elsewhere")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, whole: RunFolder) -> None:
    folder = trained(tmp_path, **RICH)
    before = contents(folder.root)
    trained(tmp_path, resume=True, **RICH)
    assert contents(folder.root) == before
    same_run(folder, whole)


def test_resuming_nothing_begins(tmp_path: Path, whole: RunFolder) -> None:
    same_run(trained(tmp_path, resume=True, **RICH), whole)


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    before = contents(folder.root)
    with pytest.raises(UserError, match=r"already exists.*--resume.*--overwrite"):
        train(config(tmp_path))
    assert contents(folder.root) == before


def test_overwriting_replaces_the_run_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = trained(tmp_path, seed=1, train__epochs=3)
    (folder.root / "notes.txt").write_text("mine")
    (folder.root / "thesis").mkdir()
    (folder.root / "thesis" / "a.json").write_text("{}")
    folder.evaluation.write_text("{}")
    replaced, finished = train(config(tmp_path), overwrite=True)
    assert finished
    same_run(replaced, trained(tmp_path / "fresh"))
    assert (folder.root / "notes.txt").read_text() == "mine"
    assert (folder.root / "thesis" / "a.json").exists()
    assert not folder.evaluation.exists()


def test_a_folder_that_is_no_run_is_never_cleared(tmp_path: Path) -> None:
    mine = tmp_path / "run"
    mine.mkdir()
    (mine / "data.json").write_text("mine")
    for said in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError):
            train(config(tmp_path), **said)  # type: ignore[arg-type]
    assert contents(mine) == {"data.json": b"mine"}
    (tmp_path / "other").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        train(config(tmp_path, name="other"), overwrite=True)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    trained(tmp_path)


def test_a_damaged_configuration_of_the_run(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    folder.config_file.write_text("name: [")
    with pytest.raises(UserError, match="not valid YAML"):
        train(config(tmp_path), resume=True)


@pytest.mark.parametrize("foreign", ["evaluation", "others", "shapes", "best of an older"])
def test_a_foreign_last_checkpoint_is_one_sentence(tmp_path: Path, foreign: str) -> None:
    import torch

    folder = trained(tmp_path)
    content = saved(folder.last)
    if foreign == "evaluation":
        content = saved(folder.best)  # it has no optimizer to go on with
    elif foreign == "others":
        content = {"format": 1, "model": {}}
    elif foreign == "shapes":
        content = saved(trained(tmp_path, name="b", model=SMALL_CNN).last)
    else:
        content["optimizer"] = {"state": 3, "param_groups": []}
    torch.save(content, folder.last)
    before = contents(folder.root)
    with pytest.raises(UserError) as caught:
        train(config(tmp_path), resume=True)
    assert str(folder.last) in str(caught.value)
    assert contents(folder.root) == before


# --- a full disk


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "os.fsync"])
def test_a_full_disk_keeps_the_older_checkpoint(
    tmp_path: Path, whole: RunFolder, monkeypatch: Any, where: str
) -> None:
    class Fill(Watcher):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            if (epoch, step) == (1, 3):
                monkeypatch.setattr(where, full)

    with pytest.raises(UserError) as caught:
        train(config(tmp_path, **RICH), listeners=lambda folder: [Fill()])
    message = str(caught.value)
    assert "No space left" in message
    assert "--resume" in message or "Free some space" in message
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    assert saved(folder.last)["epoch"] == 1
    assert not list(folder.root.rglob("*.tmp"))
    same_run(trained(tmp_path, resume=True, **RICH), whole)


def test_a_trainer_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    from robustflat.train.setup import load_data

    monkeypatch.chdir(tmp_path)
    settings = config()
    trainer = Trainer(settings, load_data(settings), torch.device("cpu"))
    assert not trainer.resume()
    assert trainer.run()
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_is_written_whole(tmp_path: Path) -> None:
    settings = config(tmp_path)
    write_config(settings, tmp_path / "c.yaml")
    assert differences(read_config(tmp_path / "c.yaml").model_dump(), settings.model_dump()) == []
