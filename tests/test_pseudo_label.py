"""The script that labels unlabelled images, from a run to batches with extra images."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_support import trained

import robustflat.data as rd
from robustflat.subject import open_subject

SCRIPT = Path(__file__).parents[1] / "scripts" / "pseudo_label.py"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["pseudo_label.py", *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


def test_labels_are_the_networks_and_the_images_can_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, train__epochs=1).root
    digits = rd.load("digits").test.subset(torch.arange(70))
    pixels = digits.fetch(torch.arange(70)).permute(0, 2, 3, 1).numpy()
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    assert "holds no image" in str(call(monkeypatch, run, folder))
    np.save(folder / "image-0.npy", pixels[:50])
    np.save(folder / "image-1.npy", pixels[50:])
    np.save(folder / "label-1.npy", np.zeros(20, int))

    asked = (run, folder, "--batch-size", 16, "--checkpoint", "last", "--device", "cpu")
    assert call(monkeypatch, *asked) == 0
    printed = capsys.readouterr().out
    assert "label-0.npy: 50 labels, by class" in printed
    assert "label-1.npy is there already" in printed
    images = rd.load_extra(folder, shape=(1, 8, 8), num_classes=10)
    model = open_subject(run, device="cpu").network("last").model
    x, y = images.tensors()
    assert y[:50].tolist() == model(x[:50]).argmax(1).tolist()
    assert len(set(y[:50].tolist())) > 1
    assert y[50:].tolist() == [0] * 20
    assert sorted(p.name for p in folder.iterdir()) == [
        "image-0.npy", "image-1.npy", "label-0.npy", "label-1.npy",
    ]  # fmt: skip

    np.save(folder / "image-2.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert "must be uint8 of shape [N, 8, 8, 1]" in str(call(monkeypatch, *asked))
    (folder / "image-2.npy").write_bytes(b"no")
    assert "could not be read" in str(call(monkeypatch, *asked))
