"""Corrupted test sets: read as published, refused where they are not whole, and their errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from train_support import trained

import robustflat.data as datasets
from robustflat.cli import main
from robustflat.data import CORRUPTIONS, corrupted
from robustflat.elsewhere import Elsewhere
from robustflat.errors import UserError
from robustflat.report.page import write_page
from robustflat.runs.comparison import compare
from robustflat.runs.corruptions import ALEXNET, mean_corruption_error, measure_corruptions
from robustflat.subject import Subject, open_subject

SOME = ("fog", "snow")
FACTORY = """
from torch import nn
class Brightest(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]
def make():
    return Brightest()
"""


def arrays(folder: Path, names: tuple[str, ...] = SOME, count: int = 40) -> Path:
    """A set whose images of class k have pixel k brightest; severity s spoils every s-th of 8."""
    folder.mkdir()
    labels = torch.arange(count) % 10
    every = []
    for severity in range(1, 6):
        pixels = np.zeros((count, 8, 8, 1), np.uint8)
        pixels[range(count), labels // 8, labels % 8] = 200
        spoilt = torch.arange(count) % 8 < severity
        pixels[spoilt.numpy(), 1, 1] = 255  # pixel 9
        every.append(pixels)
    for number, name in enumerate(names):
        turned = every if number % 2 == 0 else every[::-1]
        np.save(folder / f"{name}.npy", np.concatenate(turned))
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5).astype(np.uint8))
    return folder


def share(severity: int, count: int = 40) -> float:
    """Of all images those spoilt that are not of class 9."""
    return sum(i % 8 < severity and i % 10 != 9 for i in range(count)) / count


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("brightest.py").write_text(FACTORY)
    said = Elsewhere(data="digits", normalise="none")
    yield open_subject("brightest:make", device="cpu", elsewhere=said)
    sys.modules.pop("brightest", None)


def test_folders_are_decoded_by_as_many_threads_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "c")
    for split in ("train", "test"):
        (tmp_path / "own" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "own" / split).symlink_to(tmp_path / "c" / "fog" / "1")
    Path("reddest.py").write_text(FACTORY.replace(":10", "::64"))
    monkeypatch.syspath_prepend(str(tmp_path))
    said = Elsewhere(data="image_folder", root=tmp_path / "own", image_size=8, normalise="none")
    seen = []
    plain = datasets.FileImages.fetch

    def fetch(self: datasets.FileImages, indices: torch.Tensor) -> torch.Tensor:
        seen.append(self.threads)
        return plain(self, indices)

    monkeypatch.setattr(datasets.FileImages, "fetch", fetch)
    subject = open_subject("reddest:make", device="cpu", elsewhere=said, workers=3)
    measure_corruptions(subject, tmp_path / "c", corruptions=SOME)
    sys.modules.pop("reddest", None)
    assert len(seen) >= 11
    assert set(seen) == {3}


def test_errors_by_corruption_and_severity(subject: Subject, tmp_path: Path) -> None:
    folder = arrays(tmp_path / "c")
    told: list[Any] = []
    found = measure_corruptions(subject, folder, corruptions=SOME,
                                on_progress=lambda *a: told.append(a))  # fmt: skip
    result = found["result"]
    expected = [share(severity) for severity in range(1, 6)]
    assert result["errors"] == {"fog": expected, "snow": expected[::-1]}
    assert result["mean_error"] == pytest.approx(sum(expected) / 5)
    x, y = datasets.load("digits").test.tensors()
    wrong = (x.flatten(1)[:, :10].argmax(1) != y).float().mean()
    assert result["clean_error"] == pytest.approx(float(wrong))
    assert (result["mce"], result["count"]) == (None, 40)
    assert [(done, total) for _, done, total in told] == [(i, 11) for i in range(1, 12)]
    assert told[-1][0] == "snow 5"
    (kept,) = json.loads(Path("evaluations/brightest-make/corruptions.json").read_text())[
        "measurements"
    ]
    assert kept["result"] == result
    assert (kept["data"], kept["checkpoint"], kept["samples"]) == ("digits", "given", None)
    # Another choice of images is another measurement; the same one replaces its own.
    few = measure_corruptions(subject, folder, corruptions=SOME, samples=10)
    assert few["result"]["count"] == 10
    chosen = datasets.balanced(torch.arange(40) % 10, 10, seed=0).tolist()
    wrong = [sum(i % 8 < severity and i % 10 != 9 for i in chosen) / 10 for severity in range(1, 6)]
    assert few["result"]["errors"]["fog"] == wrong
    measure_corruptions(subject, folder, corruptions=SOME)
    again = json.loads(Path("evaluations/brightest-make/corruptions.json").read_text())
    assert [one["samples"] for one in again["measurements"]] == [10, None]


def test_arrays_are_mapped_in_the_order_of_severities(tmp_path: Path) -> None:
    folder = arrays(tmp_path / "c")
    sets = corrupted(folder, list("0123456789"), (1, 8, 8), SOME)
    assert [(one.corruption, one.severity) for one in sets] == [
        (name, severity) for name in SOME for severity in range(1, 6)
    ]
    for place, severity in ((sets[1], 2), (sets[5], 5)):
        images = place.images()
        assert len(images) == 40
        stored = torch.from_numpy(np.load(folder / f"{place.corruption}.npy"))
        rows = stored[(place.severity - 1) * 40 : place.severity * 40].permute(0, 3, 1, 2)
        assert torch.equal(images.fetch(torch.arange(40)), rows)
        assert int((rows[:, 0, 1, 1] == 255).sum()) == 5 * severity
        assert torch.equal(images.labels, torch.arange(40) % 10)


SPOILT = {
    "missing": (lambda f: (f / "snow.npy").unlink(), "no file .*snow.npy: the set is not whole"),
    "unlabelled": (lambda f: (f / "labels.npy").unlink(), "no labels.npy"),
    "shorter": (lambda f: np.save(f / "snow.npy", np.load(f / "snow.npy")[:-1]),
                r"snow.npy must hold uint8 of shape \[200, 8, 8, 1\].*\[199, 8, 8, 1\]"),
    "floats": (lambda f: np.save(f / "snow.npy", np.load(f / "snow.npy") / 255), "float64"),
    "other-size": (lambda f: np.save(f / "snow.npy", np.load(f / "snow.npy")[:, :7]), "7, 8, 1"),
    "labels-odd": (lambda f: np.save(f / "labels.npy", np.zeros(199, int)), "as many for each"),
    "labels-floats": (lambda f: np.save(f / "labels.npy", np.zeros(200)), "whole numbers"),
    "labels-many": (lambda f: np.save(f / "labels.npy", np.full(200, 10)), "from 0 to 9"),
    "labels-less": (lambda f: np.save(f / "labels.npy", np.full(200, -1)), "from 0 to 9"),
    "labels-none": (lambda f: np.save(f / "labels.npy", np.zeros(0, int)), "from 0 to 9"),
    "damaged": (lambda f: (f / "snow.npy").write_bytes(b"nonsense"), "damaged or no array"),
    "objects": (lambda f: np.save(f / "snow.npy", np.array([{}]), allow_pickle=True), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_set_that_is_not_whole_is_refused_before_anything_is_paid(
    kind: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = arrays(tmp_path / "c")
    spoil, words = SPOILT[kind]
    spoil(folder)
    monkeypatch.setattr(nn.Module, "__call__", None)
    with pytest.raises(UserError, match=words):
        measure_corruptions(subject, folder, corruptions=SOME)
    assert not Path("evaluations").exists()


def tree(folder: Path, names: tuple[str, ...] = SOME) -> Path:
    """ImageNet-C's folders: the class is told by the pixel that is brightest, or all are black."""
    for name in names:
        for severity in range(1, 6):
            for label in (0, 3):
                place = folder / name / str(severity) / str(label)
                place.mkdir(parents=True)
                for number in range(2):
                    pixels = np.zeros((8, 8, 3), np.uint8)
                    pixels[0, label] = 0 if number < severity - 3 else 255
                    Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def test_folders_are_read_by_class_and_severity(tmp_path: Path) -> None:
    sets = corrupted(tree(tmp_path / "c"), ["0", "3", "5"], (3, 8, 8), SOME)
    assert len(sets) == 10
    images = sets[3].images()
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.shape == (3, 8, 8)
    pixels = images.fetch(torch.arange(4))
    assert pixels[:, 0, 0].argmax(1).tolist() == [0, 0, 0, 3]
    assert int(pixels[1].max()) == 255
    assert corrupted(tmp_path / "c", ["0", "3"], (3, 4, 4), ("fog",))[0].images().shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("spoil", "classes", "words"),
    [
        ("snow/4/3/1.png", "03", r"snow/4 has 1 images of '3' and .*fog/1 2"),
        ("snow/5", "03", "no folder .*snow/5: the set is not whole"),
        (None, "0", "has the class '3', which the model's data have not"),
    ],
)
def test_folders_that_are_not_whole_are_refused(
    spoil: str | None, classes: str, words: str, tmp_path: Path
) -> None:
    import shutil

    folder = tree(tmp_path / "c")
    if spoil is not None:
        place = folder / spoil
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UserError, match=words):
        corrupted(folder, list(classes), (3, 8, 8), SOME)
    with pytest.raises(UserError, match="no folder"):
        corrupted(tmp_path / "absent", list(classes), (3, 8, 8), SOME)


def test_mce_is_in_units_of_alexnets_errors() -> None:
    assert dict(zip(CORRUPTIONS, ALEXNET, strict=True))["brightness"] == 0.564592
    half = {name: [error / 2] * 5 for name, error in zip(CORRUPTIONS, ALEXNET, strict=True)}
    assert mean_corruption_error(half, 1000) == pytest.approx(0.5)
    # A mean of ratios, not a ratio of means.
    one = half | {"brightness": [0.2, 0.4, 0.6, 0.8, 1.0]}
    assert mean_corruption_error(one, 1000) == pytest.approx(0.5 * 14 / 15 + 0.6 / 0.564592 / 15)
    assert mean_corruption_error(half, 10) is None
    assert mean_corruption_error({"fog": [0.5]}, 1000) is None
    assert mean_corruption_error(half | {"saturate": [0.5]}, 1000) is None


def test_the_command_for_runs_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train_samples": 60, "validation_samples": 20}
    run = trained(tmp_path, name="a", train__epochs=1, data=data)
    arrays(tmp_path / "c", CORRUPTIONS, 20)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["robustflat", "corruptions", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out + said.err

    code, said = call("a", "--folder", "c", "--device", "cpu")
    assert code == 0, said
    assert "mean of 15" in said
    assert "jpeg_compression" in said
    assert "The mean is that of the errors themselves." in " ".join(said.split())
    (kept,) = json.loads((run.root / "corruptions.json").read_text())["measurements"]
    (row,) = compare([run])
    assert row.cells["corrupted"].value == pytest.approx(1 - kept["result"]["mean_error"])
    assert "mCE" not in row.cells
    write_page([run], tmp_path / "report.html")
    assert "corrupted" in (tmp_path / "report.html").read_text()
    assert kept["checkpoint"] == "best"
    assert len(kept["result"]["errors"]) == 15
    code, said = call("a", "--folder", "c", "--corruption", "mist")
    assert (code, "mist.npy: the set is not whole" in said) == (2, True)
    code, said = call("a", "--folder", "c", "--samples", "30")
    assert (code, "Asked for 30 samples of 20" in said) == (2, True)
    code, said = call("a", "--folder", "c", "--checkpoint", "first")
    assert (code, "best or last" in said) == (2, True)
