"""Finished runs read back: the right weights on the right images, and rows that say what was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train_support import SMALL_CNN, config, saved, trained

from robustflat.errors import UserError
from robustflat.report.tables import comparison_table
from robustflat.runs.comparison import Cell, columns, compare, method_of
from robustflat.runs.description import describe
from robustflat.runs.evaluation import Wanted, evaluate_subject
from robustflat.runs.flatness import measure_subject
from robustflat.subject import open_subject
from robustflat.train.folder import RunFolder
from robustflat.train.setup import load_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(
        tmp_path_factory.mktemp("runs"),
        model=SMALL_CNN,
        train__epochs=3,
        train__average={"name": "swa", "start_epoch": 1},
        train__channels_last=True,
        evaluate={"attacks": ["pgd-3"], "gap_samples": 20, "batch_size": 17},
    )


# --- restoring


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_the_network_has_the_weights_of_the_checkpoint(folder: RunFolder, checkpoint: Any) -> None:
    run = open_subject(folder.root, device="cpu")
    state = saved(folder.best if checkpoint == "best" else folder.last)
    for which in ("raw", "average", "auto"):
        if which == "average" and state["average_model"] is None:
            with pytest.raises(UserError, match="no averaged weights"):
                run.network(checkpoint, "average")
            continue
        network = run.network(checkpoint, which)  # type: ignore[arg-type]
        averaged = which != "raw" and state["average_model"] is not None
        expected = state["average_model"] if averaged else state["model"]
        assert network.weights == ("average" if averaged else "raw")
        assert network.epoch == state["epoch"]
        assert not any(m.training for m in network.model.modules())
        for key, value in network.model.state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_the_images_are_those_of_the_training(folder: RunFolder) -> None:
    subject, dataset = open_subject(folder.root, device="cpu"), load_data(config())
    assert dataset.validation is not None
    whole, part = subject.splits(None), subject.splits(20)
    pairs = [
        (subject.train_tensors(10**6), dataset.train.tensors()),
        (subject.train_tensors(20), dataset.train.tensors(20)),
        (whole["train"].tensors(), dataset.train.tensors()),
        (whole["validation"].tensors(), dataset.validation.tensors()),
        (whole["test"].tensors(), dataset.test.tensors()),
        (part["train"].tensors(), dataset.train.tensors(20)),
        (part["test"].tensors(), dataset.test.tensors(20)),
    ]
    for mine, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    # No image is in two splits.
    prints = [{x.numpy().tobytes() for x in images.tensors()[0]} for images in whole.values()]
    assert len(set().union(*prints)) == sum(len(p) for p in prints)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_subject(tmp_path / "none")
    with pytest.raises(UserError, match="not the folder of a run"):
        open_subject(tmp_path)


def test_a_checkpoint_of_another_network(folder: RunFolder, tmp_path: Path) -> None:
    other = trained(tmp_path)
    other.best.write_bytes(folder.best.read_bytes())
    with pytest.raises(UserError, match="does not fit the model"):
        open_subject(other.root, device="cpu").network("best")


# --- evaluating


def test_evaluating_again_gives_the_same_and_keeps_what_was_done(folder: RunFolder) -> None:
    run = open_subject(folder.root, device="cpu")

    def figures() -> dict[str, Any]:
        report = evaluate_subject(run, Wanted(checkpoints=("best", "last")))
        text = json.loads(folder.evaluation.read_text())
        assert text == json.loads(json.dumps(report))
        return text

    one, two = figures(), figures()
    for report in (one, two):
        for entry in report["checkpoints"].values():
            for attack in entry["test"]["attacks"].values():
                attack.pop("seconds")
    assert one == two
    assert one["checkpoints"]["best"]["test"]["settings"]["batch_size"] == 17


def test_a_new_training_does_not_inherit_old_outcomes(tmp_path: Path) -> None:
    said: dict[str, Any] = {"evaluate": {"attacks": ["pgd-3"], "gap_samples": 20}}
    one = trained(tmp_path, **said)
    evaluate_subject(open_subject(one.root, device="cpu"))
    from robustflat.train import train

    train(config(tmp_path, seed=5, train__epochs=4, **said), overwrite=True)
    report = evaluate_subject(open_subject(one.root, device="cpu"))
    network = open_subject(one.root, device="cpu").network("best").model
    x, y = load_data(config()).test.tensors()
    right = float((network(x).argmax(1) == y).float().mean())
    assert report["checkpoints"]["best"]["test"]["clean_accuracy"] == pytest.approx(right)


def test_measuring_is_repeatable_and_leaves_the_network_alone(folder: RunFolder) -> None:
    run = open_subject(folder.root, device="cpu")
    before = folder.last.read_bytes()
    kept = {k: v.clone() for k, v in run.network("last").model.state_dict().items()}
    one = measure_subject(run, ["average_clean", "ascent_clean"], samples=20)
    two = measure_subject(run, ["average_clean", "ascent_clean"], samples=20)
    assert {k: v["value"] for k, v in one["measures"].items()} == {
        k: v["value"] for k, v in two["measures"].items()
    }
    assert folder.last.read_bytes() == before
    again = run.network("last").model.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in again.items())


def test_flatness_of_a_run_without_an_attack(tmp_path: Path) -> None:
    # The clean measures need no threat.
    plain = trained(tmp_path, attack={"name": "none"}, objective={"name": "standard"})
    report = measure_subject(open_subject(plain.root, device="cpu"), ["average_clean"], samples=20)
    assert report["measures"]["average_clean"]["value"] is not None


# --- comparing


def made(tmp_path: Path, name: str, evaluation: Any = None, flatness: Any = None) -> RunFolder:
    folder = trained(
        tmp_path, name=name, train__epochs=1, seed=3, weights={"name": "awp", "gamma": "1/8"}
    )
    for path, content in ((folder.evaluation, evaluation), (folder.flatness, flatness)):
        if content is not None:
            path.write_text(json.dumps(content))
    return folder


def figure(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value}


def evaluation(robust_loss: float | None = 0.5) -> dict[str, Any]:
    attack = {"accuracy": 0.5, "interval": [0.4, 0.6], "alone": 0.5, "attacked": 9, "broken": 1}
    weaker = attack | {"alone": None, "accuracy": 0.4}
    test = {
        "clean_accuracy": 0.9,
        "clean_interval": [0.8, 0.95],
        "robust_accuracy": 0.4,
        "robust_interval": [0.3, 0.5],
        "attacks": {"pgd-20": attack, "apgd-t": weaker},
        "warnings": [],
    }
    gap = {
        "gaps": {"train-test": {"robust_accuracy": figure(0.3), "robust_loss": figure(robust_loss)}}
    }
    return {
        "checkpoints": {
            "best": {"epoch": 1, "weights": "raw", "test": test, "gap": gap},
            "last": {"epoch": 2, "weights": "raw", "test": None, "gap": gap},
        },
        "overfitting": {"robust_accuracy": figure(0.05)},
    }


def test_rows_say_what_the_files_say(tmp_path: Path) -> None:
    measures = {
        "worst_clean": {"value": 0.25, "standard_error": 0.05},
        "broken": {"value": None, "standard_error": None},
        "hessian_max": {"value": 12.0, "standard_error": None},
    }
    one = made(tmp_path, "one", evaluation(), {"measures": measures})
    two = made(tmp_path, "two", None, {"measures": {"worst_clean": measures["worst_clean"]}})
    rows = compare([one, two])
    cells = rows[0].cells
    assert (rows[0].run, rows[0].seed, rows[0].method) == ("one", 3, "AT + awp(gamma=0.125)")
    assert cells["clean"] == Cell(0.9, 0.8, 0.95)
    assert cells["pgd-20"].value == 0.5
    assert "apgd-t" not in cells  # it ran on what the first left, so it has no figure of its own
    assert cells["worst case"].value == 0.4
    assert cells["robust gap"].value == 0.3
    assert cells["best - last"].value == 0.05
    assert not cells["loss gap"].share
    assert cells["worst_clean"] == Cell(0.25, pytest.approx(0.2), pytest.approx(0.3), share=False)
    assert "broken" not in cells
    assert cells["hessian_max"].low is None
    assert set(rows[1].cells) == {"worst_clean"}
    assert columns(rows)[:2] == ["clean", "pgd-20"]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(rows))
    text = console.export_text()
    assert "90.0%" in text
    assert "0.250" in text
    two_line = next(line for line in text.splitlines() if "two" in line)
    assert two_line.count(" - ") >= 3
    console.file.close()


def test_a_gap_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    # An infinite robust loss is null in JSON.
    rows = compare([made(tmp_path, "one", evaluation(None))])
    comparison = comparison_table(rows)
    assert "loss gap" not in rows[0].cells
    console = Console(width=200, quiet=True)
    console.print(comparison)


def test_methods_in_words() -> None:
    for changes, words in (
        ({"weights": {"name": "none"}}, "AT"),
        ({"objective": {"name": "trades"}, "weights": {"name": "none"}}, "TRADES"),
        ({"weights": {"name": "sam", "rho": 0.1, "steps": 2}}, "AT + sam(rho=0.1, steps=2)"),
        (
            {"objective": {"name": "standard"}, "weights": {"name": "awp", "gamma": 0.005}},
            "standard + awp(gamma=0.005)",
        ),
    ):
        assert method_of(config(**changes)) == words


def test_description_and_catalogue() -> None:
    lines = "\n".join(describe(config(data__train_samples=50, train__batch_size=24)))
    assert "2 epochs of 3" in lines  # 24, 24 and 2
    lines = "\n".join(describe(config(data__train_samples=50, train__batch_size=7)))
    assert "2 epochs of 7" in lines  # the last one alone is left out
