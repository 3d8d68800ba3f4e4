"""MLflow and Weights & Biases get the curves of a run, in folders of this machine."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from train_support import config, stopped

from robustflat.errors import UserError
from robustflat.report.trackers import MLflow, WandB, _Tracker
from robustflat.train import Listener, train
from robustflat.train.folder import RunFolder

WHY = "{0} is not installed: pip install 'robustflat[{0}]'"
EVERY = {"monitor__step_every": 1}


def interrupted(output: Path, tracker: Callable[[RunFolder], Listener]) -> RunFolder:
    """Two epochs of four steps, told of twice: until it is stopped in the second, and resumed."""

    class Stop(Listener):
        def on_step(self, epoch: int, step: int, values: Any) -> None:
            if (epoch, step) == (1, 1):
                raise KeyboardInterrupt

    asked = config(output, **EVERY)
    folder = RunFolder(output / "run")
    folder.prepare(asked, resume=False)
    stopped(asked, folder, 3)
    with pytest.raises(KeyboardInterrupt):
        train(asked, resume=True, listeners=lambda f: [tracker(f), Stop()])
    train(asked, resume=True, listeners=lambda f: [tracker(f)])
    return folder


def accuracies(folder: RunFolder) -> list[tuple[int, Any]]:
    rows = [json.loads(text) for text in folder.metrics_file.read_text().splitlines()]
    return [
        (r["steps"], pytest.approx(r["monitor"]["validation"]["robust_accuracy"])) for r in rows
    ]


class Gone(_Tracker):
    """A tracker whose server fails at a step; 0: it does not answer at all."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__("json", folder)
        self.at, self.told = at, []

    def _open(self, known: str | None, config: dict[str, Any]) -> str:
        if not self.at:
            raise ConnectionError("no server.\nTraceback ...")
        return "id"

    def _send(self, values: dict[str, float], at: int) -> None:
        if at == self.at:
            raise ConnectionError("no server.\nTraceback ...")
        self.told.append(at)


def test_a_tracker_that_cannot_be_opened_is_a_sentence_and_one_that_is_lost_ends_nothing(
    tmp_path: Path,
) -> None:
    asked = config(tmp_path, **EVERY)
    with pytest.raises(UserError, match=r"json could not be opened: no server\. Ch"):
        train(asked, listeners=lambda f: [Gone(f.root, 0)])
    kept: list[Gone] = []

    def lost(folder: RunFolder) -> list[Listener]:
        kept.append(Gone(folder.root, 3))
        return [*kept]

    with pytest.warns(UserWarning, match="json was lost at step 3: no server"):
        _, finished = train(asked, overwrite=True, listeners=lost)
    assert finished
    assert kept[0].told == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_the_curves_of_a_run_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason=WHY.format("mlflow"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'store'}"
    folder = interrupted(tmp_path, lambda f: MLflow(f.root, uri=uri))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("robustflat")
    (run,) = client.search_runs([experiment.experiment_id])  # not two
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["weights.gamma"] == "0.02"
    history = client.get_metric_history(run.info.run_id, "validation/robust/accuracy")
    assert {m.step: m.value for m in history} == dict(accuracies(folder))
    history = client.get_metric_history(run.info.run_id, "robust/increase_under_weights")
    assert {m.step for m in history} == set(range(4, 9))


def records(path: Path) -> Iterator[Any]:
    """What W&B keeps offline: protocol buffers in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def complete(path: Path) -> list[Any]:
    """The records once the last is there: W&B's service may write them after it said goodbye."""
    deadline = time.monotonic() + 60
    while True:
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, [r.WhichOneof("record_type") for r in found]
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_the_curves_of_a_run_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = interrupted(tmp_path, lambda f: WandB(f.root, mode="offline"))
    files = sorted(folder.root.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    told: dict[str, list[tuple[int, float]]] = {}
    known = folder.known_as("wandb").read_text()
    for file in files:
        found = complete(file)
        (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.display_name, run.project) == (known, "run", "robustflat")
        said = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
        assert said["weights"]["gamma"] == 0.02
        for line in (r.history for r in found if r.WhichOneof("record_type") == "history"):
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item}
            for name, value in values.items():
                told.setdefault(name, []).append((values["_step"], value))
    assert dict(told["validation/robust/accuracy"]) == dict(accuracies(folder))
    assert {step for step, _ in told["robust/increase_under_weights"]} == set(range(4, 9))


def test_training_anew_begins_anew_with_trackers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    asked = config(tmp_path)
    folder.prepare(asked, resume=False)
    for tracker in ("mlflow", "wandb"):
        folder.known_as(tracker).write_text("an earlier one")
    folder.prepare(asked, resume=True)
    assert folder.known_as("wandb").is_file()
    folder.prepare(asked, resume=False)
    assert not folder.known_as("mlflow").exists()
    assert not folder.known_as("wandb").exists()


@pytest.mark.parametrize("tracker", [MLflow, WandB])
def test_a_package_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: type[MLflow | WandB]
) -> None:
    def without(module: str) -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr("robustflat.report.trackers.import_module", without)
    with pytest.raises(UserError, match=rf"robustflat\[{tracker.__name__.lower()}\]"):
        tracker(tmp_path)
