"""Two processes as torchrun starts them: one model, one run's folder, what one process would do."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import WORLD, together
from test_tensorboard import read
from train_support import config, differences, python, rows, saved, trained, write

from robustflat.config import read_config
from robustflat.report.tensorboard import TensorBoard
from robustflat.train import Trainer, train
from robustflat.train.folder import RunFolder

# Where two processes must do exactly what one does with the double batch: no BatchNorm, no random
# start, no augmentation, every batch full.
PLAIN: dict[str, Any] = {
    "data__train_samples": 60,
    "data__validation_samples": 40,
    "model": {"name": "small_cnn", "options": {"width": 4, "depth": 2, "batch_norm": False}},
    "attack": {"name": "pgd", "eps": 0.1, "steps": 3, "start": "zero"},
    "weights": {"name": "none"},
    "train__batch_size": 30,
    "train__epochs": 2,
}
# What else must stay equal in both processes, BatchNorm seen twice a step among it.
OTHERS: dict[str, dict[str, Any]] = {
    "trades_awp": {
        "objective": {"name": "trades"},
        "weights": {"name": "awp", "gamma": 0.05},
        "model": {"name": "small_cnn", "options": {"width": 4, "depth": 2}},
        "data__augment": {"crop": 1},
        "data__mix": {"name": "mixup"},
    },
    "mart_gsam": {
        "objective": {"name": "mart"},
        "weights": {"name": "gsam", "rho": 0.1, "alpha": 0.2},
        "model": {"name": "small_cnn", "options": {"width": 4, "depth": 2}},
        "train__average": {"name": "swa", "start_epoch": 0},
    },
    "msam_uneven": {
        "weights": {"name": "msam", "chunk": 4, "inner": {"name": "sam", "rho": 0.1}},
        "data__train_samples": 50,
        "train__precision": "bf16",
    },
    # Objectives that remember: what both processes saw, or an average of the shared weights.
    "ikl": PLAIN
    | {
        "objective": {"name": "ikl"},
        "attack": {"name": "pgd", "eps": 0.1, "steps": 2, "start": "zero", "loss": "ce"},
    },
    # Compared with one process; its last batch has 7 rows for one and 6 for the other.
    "watched": PLAIN
    | {
        "weights": {"name": "awp", "gamma": 0.05, "step": {"sync": "global"}},
        "data__train_samples": 45,
        "train__batch_size": 16,
        "monitor__step_every": 1,
        "listeners": ["tensorboard"],
    },
    "rebat": {
        "objective": {"name": "rebat", "decay": 0.8, "start_epoch": 1},
        "weights": {"name": "sam", "rho": 0.1},
        "model": {"name": "small_cnn", "options": {"width": 4, "depth": 2}},
    },
}


def trained_and_told(folder: Path) -> None:
    """Trains every run; each process leaves what it ended with."""
    whole = Trainer.run

    def run(self: Trainer) -> bool:
        finished = whole(self)
        state: dict[str, Any] = {"model": dict(self.model.named_parameters()), "average": None}
        state["objective"] = self._objective.state_dict()
        if self.average is not None:
            state["average"] = self.average.model.state_dict()
        torch.save(state, folder / f"{self.config.name}.{self.processes.rank}.pt")
        return finished

    Trainer.run = run  # type: ignore[method-assign]
    for name in OTHERS:
        said = read_config(folder / f"{name}.yaml")
        train(said, listeners=lambda f, said=said: [b.build(folder=f.root) for b in said.listeners])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    output = tmp_path_factory.mktemp("plain")
    path = write(output / "c.yaml", **PLAIN)
    # The one test in which torchrun itself starts them.
    start = ["--nproc-per-node=2", "--master-addr=127.0.0.1"]
    start += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    process = python("-m", "torch.distributed.run", *start, "-m", "robustflat", "train", str(path))
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert said.count("trained. Next:") == 1
    return RunFolder(output / "run")


def test_two_processes_leave_one_whole_run(plain: RunFolder) -> None:
    found = rows(plain)
    assert [row["epoch"] for row in found] == [1, 2]
    assert [row["steps"] for row in found] == [2, 4]  # 60 images by 30
    assert [row["skipped_steps"] for row in found] == [0, 0]
    environment = json.loads(plain.environment_file.read_text())
    assert [m["device"] for m in environment["processes"]] == ["cpu", "cpu"]
    assert environment["processes"][0]["host"] == socket.gethostname()
    assert plain.best.is_file()
    assert plain.last.is_file()
    assert saved(plain.last)["epoch"] == 2
    assert all(not key.startswith("module.") for key in saved(plain.last)["model"])


def test_two_processes_do_what_one_does_with_the_double_batch(
    plain: RunFolder, tmp_path: Path
) -> None:
    alone = trained(tmp_path, **(PLAIN | {"train__batch_size": 30}))
    one, two = saved(alone.last), saved(plain.last)
    begun = trained(
        tmp_path,
        name="b",
        **(PLAIN | {"train__batch_size": 30, "optimizer": {"name": "sgd", "lr": 1e-20}}),
    )
    weight = "net.linear.weight"
    assert float((saved(begun.last)["model"][weight] - one["model"][weight]).abs().max()) > 1e-3
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-5, atol=1e-5)
    for a, b in zip(rows(alone), rows(plain), strict=True):
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
        assert b["monitor"]["validation"]["robust_accuracy"] == pytest.approx(
            a["monitor"]["validation"]["robust_accuracy"], abs=0.026
        )
        # The loss of the whole batch, not of the first process's half.
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    for name, said in OTHERS.items():
        write(folder / f"{name}.yaml", name=name, **said)
    together(trained_and_told, folder, folder=folder)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_both_processes_end_with_the_same_parameters(others: Path, name: str) -> None:
    one, two = (saved(others / f"{name}.{rank}.pt") for rank in range(WORLD))
    assert differences(one, two) == []
    state = saved(others / name / "checkpoints" / "last.pt")
    for key, value in one["model"].items():
        assert torch.equal(value, state["model"][key])
        assert value.isfinite().all()
    # They did train.
    begun = trained(
        others / "begun" / name, **{**OTHERS[name], "optimizer": {"name": "sgd", "lr": 1e-20}}
    )
    assert differences(saved(begun.last)["model"], state["model"])


def test_what_is_told_of_two_processes_is_that_of_the_whole_batch(
    others: Path, tmp_path: Path
) -> None:
    alone, _ = train(
        config(tmp_path, **OTHERS["watched"]), listeners=lambda f: [TensorBoard(f.root)]
    )
    together = RunFolder(others / "watched")
    # Only the first process writes: one file for the run and one for each split.
    places = [path.parent.name for path in together.event_files()]
    assert sorted(places) == ["train", "validation", "watched"]
    one, two = read(alone.root), read(together.root)
    tags = [t for t in one.Tags()["scalars"] if not t.startswith(("8-machine", "1-robust/acc"))]
    assert two.Tags()["scalars"] == one.Tags()["scalars"]
    for name in (
        "1-robust/increase_under_weights", "2-weights/cosine_of_gradients", "4-attack/share_broken",
        "2-weights/gradient_norm_of_ascent", "4-attack/loss_at_step_3",
    ):  # fmt: skip
        assert name in tags
        assert len(one.Scalars(name)) == 6
    for tag in tags:
        found = [[(e.step, e.value) for e in run.Scalars(tag)] for run in (one, two)]
        assert [at for at, _ in found[0]] == [at for at, _ in found[1]]
        expected = pytest.approx([v for _, v in found[0]], rel=2e-3, abs=1e-4)
        assert [v for _, v in found[1]] == expected, tag


def test_priors_are_counted_over_all_processes(others: Path, tmp_path: Path) -> None:
    alone = saved(trained(tmp_path, **OTHERS["ikl"]).last)
    together = saved(others / "ikl" / "checkpoints" / "last.pt")
    prior = together["objective"]["prior"]
    torch.testing.assert_close(prior, alone["objective"]["prior"], rtol=1e-4, atol=1e-5)
    assert (prior - 0.1).abs().max() > 1e-3
    for key, value in alone["model"].items():
        torch.testing.assert_close(together["model"][key], value, rtol=1e-4, atol=1e-4)
