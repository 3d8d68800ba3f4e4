"""Landscapes of runs and other models, by the command: what is drawn, of whom, kept where."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_support import SMALL_CNN, trained

from robustflat.cli import main
from robustflat.flatness import MEASURES
from robustflat.landscapes import Landscape, drawn_in
from robustflat.runs.flatness import measure_subject
from robustflat.subject import open_subject
from robustflat.train.folder import RunFolder

torch.set_num_threads(1)
SAID = ["--model", "small_cnn", "--model-option", "width=4", "--model-option", "depth=2",
        "--data", "digits", "--norm", "linf", "--eps", "0.1"]  # fmt: skip
FAST = ["--points", "3", "--samples", "30", "--attack", "pgd-1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one architecture with BatchNorm, and the weights of the first, elsewhere."""
    root = tmp_path_factory.mktemp("landscapes")
    for seed, name in enumerate("ab"):
        trained(
            root, name=name, seed=seed, model=SMALL_CNN, train__epochs=1, data__test_samples=None
        )
    torch.save(open_subject(root / "a", device="cpu").network("last").model.state_dict(),
               root / "net.pt")  # fmt: skip
    return root


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path) -> Any:
    monkeypatch.chdir(place)

    def call(*arguments: Any, code: int = 0) -> str:
        line = ["robustflat", "landscape", *FAST, "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert int(ended.value.code or 0) == code, said.err
        return said.out + said.err

    return call


def newest(folder: Path) -> Landscape:
    return drawn_in(RunFolder(folder).landscapes)[-1]


def loss(place: Path, name: str, split: str, limit: int = 30) -> float:
    subject = open_subject(place / name, device="cpu")
    model, (x, y) = subject.network("last").model, subject.tensors(split, limit)
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def test_every_landscape_of_a_run_is_kept_with_its_circumstances(
    draw: Any, place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o" / "line.png"
    said = draw("a", "b", "--draws", 2, "--output", output)
    assert f"written: {output}" in said
    assert output.stat().st_size > 1000
    draw("a", "--dimensions", 2, "--split", "test", "--loss", "clean", "--seed", 5,
         "--output", tmp_path / "plane.pdf")  # fmt: skip
    line, plane = drawn_in(RunFolder("a").landscapes)
    assert (line.kind, line.draws, plane.kind) == ("line", 2, "plane"), "neither replaces the other"
    about = line.about
    assert (about["subject"], about["checkpoint"], about["epoch"]) == ("a", "last", 1)
    assert (about["data"], about["split"], about["examples"]) == ("digits", "train", 30)
    assert (about["norm"], about["eps"], about["attack"]) == ("linf", 0.1, "pgd-1")
    assert (about["weights"], about["seed"], about["batchnorm"]) == ("raw", 0, "keep")
    assert (plane.about["split"], plane.about["eps"], plane.about["seed"]) == ("test", None, 5)
    assert line.losses["clean"][0, 1] == pytest.approx(loss(place, "a", "train"), rel=1e-5)
    assert plane.losses["clean"][0, 1, 1] == pytest.approx(loss(place, "a", "test"), rel=1e-5)
    assert line.about["subject"] != newest(place / "b").about["subject"] == "b"
    # Drawn once more, nothing is measured.
    assert "Nothing is left to measure" in draw("a", "--draws", 2, "--output", output)


def test_another_state_threat_or_attack_is_another_landscape(draw: Any, place: Path) -> None:
    draw("a", "--output", "l.png")
    before = len(drawn_in(RunFolder("a").landscapes))
    draw("a", "--output", "l.png", "--norm", "l2", "--eps", "0.5", "--checkpoint", "best")
    found = newest(place / "a").about
    assert (found["norm"], found["eps"], found["checkpoint"]) == ("l2", 0.5, "best")
    draw("a", "--output", "l.png", "--span", "0.3", "--directions", "gradient",
         "--direction-loss", "robust", "--parameters", "all")  # fmt: skip
    found = newest(place / "a")
    assert (found.axes[0], found.about["directions"]) == ([-0.3, 0.0, 0.3], "gradient")
    assert (found.about["direction_loss"], found.about["parameters"]) == ("robust", "all")
    assert len(drawn_in(RunFolder("a").landscapes)) == before + 2


def test_between_runs_statistics_are_interpolated_refreshed_or_kept(draw: Any, place: Path) -> None:
    ends = {}
    for mode in ("interpolate", "refresh", "keep"):
        flag = [] if mode == "interpolate" else ["--batchnorm", mode]
        draw("a", "b", "--between", "--split", "test", "--output", "between.png", *flag)
        found = newest(place / "a")
        assert (found.kind, found.about["batchnorm"]) == ("between-line", mode)
        assert (found.about["subject"], list(found.points)) == (["a", "b"], ["a", "b"])
        ends[mode] = found.losses["clean"][0]
    assert len({values[-1] for values in ends.values()}) == 3
    kinds = [found.kind for found in drawn_in(RunFolder("b").landscapes)]
    assert "between-line" not in kinds, "its home is the first one's"


def test_between_the_best_and_the_last_checkpoint_of_a_run(draw: Any, tmp_path: Path) -> None:
    folder = trained(tmp_path, model=SMALL_CNN, train__epochs=2)
    subject = open_subject(folder.root, device="cpu")
    best, last = (subject.network(name).model for name in ("best", "last"))
    assert (subject.network("best").epoch, subject.network("last").epoch) == (1, 2)
    draw(folder.root, "--between", "--output", "line.png", "--points", 25, "--split", "test")
    found = newest(folder.root)
    assert list(found.points) == ["best", "last"]
    x, y = subject.tensors("test", 30)
    for model, (at,) in zip((best, last), found.points.values(), strict=True):
        place = min(range(25), key=lambda i: abs(found.axes[0][i] - at))
        with torch.no_grad():
            expected = float(F.cross_entropy(model(x), y))
        assert found.losses["clean"][0, place] == pytest.approx(expected, rel=1e-4)


def test_statistics_are_refreshed_on_training_images_where_test_images_are_measured(
    draw: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustflat.landscapes import scene

    seen = []
    monkeypatch.setattr(
        scene, "recompute_statistics", lambda model, x, size: seen.append((x.clone(), size))
    )
    draw("a", "--batchnorm", "refresh", "--split", "test", "--output", "l.png", "--seed", 9)
    train = open_subject(place / "a", device="cpu").tensors("train", 30)[0]
    assert len(seen) == 3
    for x, _ in seen:
        assert torch.equal(x.flatten(1).sort(dim=0).values, train.flatten(1).sort(dim=0).values)


def test_a_model_from_elsewhere_is_drawn_as_the_run_that_it_came_from(
    draw: Any, place: Path
) -> None:
    draw("net.pt", *SAID, "--split", "test", "--output", "net.png")
    draw("a", "--split", "test", "--output", "a.png", "--norm", "linf", "--eps", "0.1")
    (theirs,) = drawn_in(place / "evaluations" / "net.pt" / "landscapes")
    mine = newest(place / "a")
    assert theirs.about["subject"] == "net.pt"
    assert theirs.about["data"] == mine.about["data"] == "digits"
    for kind in ("clean", "robust"):
        assert theirs.losses[kind] == pytest.approx(mine.losses[kind], rel=1e-5)
        assert theirs.accuracies[kind] == pytest.approx(mine.accuracies[kind])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "--split", "all"], "The split must be one of train, validation, test, got 'all'"),
        (["a", "--batchnorm", "interpolate"], "batchnorm must be one of keep, refresh here"),
        (["a", "--attack", "square"], "Unknown attack 'square' of a robust loss"),
        (["a", "b", "--between", "--dimensions", "2"], "leave --dimensions"),
        (["net.pt", *SAID, "--between"], "two or three of them"),
        (["a", "--between", "--checkpoint", "best"], "without --checkpoint"),
        (["a", "b", "a", "b", "--between"], "got 4"),
        (["a", "--samples", "0"], "at least 1"),
        (["net.pt"], "name it with --model"),
        (["nothing"], "does not exist"),
        (["a", "--output", "l.docx"], "cannot be written"),
        (["a", "--norm", "l2"], "give --norm and --eps both"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(draw: Any, arguments: list[str], sentence: str) -> None:
    assert sentence in draw(*arguments, code=2)


def test_what_cannot_be_drawn_is_said_first_and_what_is_not_finite_afterwards(
    draw: Any, place: Path, tmp_path: Path
) -> None:
    assert "b is named more than once" in draw("a", "b", "b", "--between", code=2)
    kept = len(list(RunFolder(place / "a").landscapes.glob("*.json")))
    ask = ["a", "--loss", "clean", "--output"]
    said = draw(*ask, tmp_path / "l.foo", "--seed", 77, code=2)
    assert "no ending of a picture" in said
    assert len(list(RunFolder(place / "a").landscapes.glob("*.json"))) == kept
    assert "a: 2 of 3 losses are not finite" in draw(*ask, tmp_path / "l.png", "--span", "1e20")
    assert "not finite" not in draw(*ask, tmp_path / "m.png")


def test_a_record_tells_how_many_images_were_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = MEASURES["andriushchenko2023_average"]
    small = replace(preset, changes={**preset.changes, "examples": 30})
    monkeypatch.setitem(MEASURES, preset.name, small)
    subject = open_subject(place / "a", device="cpu")
    for ask, number, ending in (
        ({"samples": 40}, 40, " with examples=40, samples=1"),
        ({"samples": 20}, 20, " with examples=20, samples=1"),
        ({"options": {"examples": 20}}, 20, " with examples=20, samples=1"),
    ):
        options = {"samples": 1, **ask.pop("options", {})}
        names = [preset.name, "gradient_norm"]
        found = measure_subject(subject, names, **ask, options=options)
        assert found["samples"] == number
        assert set(found["measures"]) == {preset.name + ending, "gradient_norm"}
        for figure in found["measures"].values():
            assert figure["details"]["examples"] == number
