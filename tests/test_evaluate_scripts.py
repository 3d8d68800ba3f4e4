"""The two scripts, run in-process on small things."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from robustflat import models

SCRIPTS = Path(__file__).parent.parent / "scripts"


def call(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return ended.value.code


def test_autoattack_evaluates_a_checkpoint_and_a_robustbench_entry_is_made_of_it(
    tmp_path, monkeypatch, capsys
):
    model = models.build(
        "mlp", num_classes=10, in_channels=1, mean=(0.3,), std=(0.4,), image_size=(8, 8)
    )
    torch.save(model.state_dict(), tmp_path / "w.pt")
    out = tmp_path / "e.json"
    given = (tmp_path / "w.pt", "--model", "mlp", "--data", "digits", "--norm", "linf")
    given = (*given, "--eps", "8/255", "--samples", 20)
    code = call(monkeypatch, "autoattack.py", "--version", "fast", *given, "--output", out)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "robustflat evaluate --attack autoattack:fast" in printed.err
    content = json.loads(out.read_text())["checkpoints"]["given"]["test"]
    assert content["count"] == 20
    assert content["settings"]["eps"] == 8 / 255
    assert list(content["attacks"]) == ["apgd-ce", "apgd-t"]
    assert f"{content['robust_accuracy']:.2%}" in printed.out
    assert call(monkeypatch, "autoattack.py", given[0], "--model", "mpl", *given[3:]) == 2
    assert "Did you mean mlp" in capsys.readouterr().err
    out.write_text(json.dumps(content))

    about = ["--link", "l", "--name", "n", "--authors", "a", "--dataset", "cifar10"]
    about += ["--venue", "v", "--architecture", "MLP", "--out", tmp_path / "entry.json"]
    assert call(monkeypatch, "robustbench_entry.py", out, *about) == 2
    assert "fab-t, square did not run" in capsys.readouterr().err
    attack = content["attacks"]["apgd-ce"]
    content["attacks"] |= {"fab-t": attack, "square": attack}
    out.write_text(json.dumps(content))
    assert call(monkeypatch, "robustbench_entry.py", out, *about) == 2
    assert "all test images" in capsys.readouterr().err
    content["settings"]["samples"] = None
    content |= {"clean_accuracy": 0.8969, "robust_accuracy": 0.5953}
    out.write_text(json.dumps(content))
    assert call(monkeypatch, "robustbench_entry.py", out, *about) == 0
    # The fields of RobustBench's own model_info/cifar10/Linf/Carmon2019Unlabeled.json.
    written = json.loads((tmp_path / "entry.json").read_text())
    assert written == {
        "link": "l",
        "name": "n",
        "authors": "a",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "v",
        "architecture": "MLP",
        "eps": "8/255",
        "clean_acc": "89.69",
        "reported": "59.53",
        "autoattack_acc": "59.53",
    }
    # A run's evaluation has one such result for each checkpoint that was attacked.
    run = {"checkpoints": {"best": {"test": content}, "last": {"test": None}}}
    out.write_text(json.dumps(run))
    about[-1] = tmp_path / "run.json"
    assert call(monkeypatch, "robustbench_entry.py", out, *about) == 0
    assert json.loads((tmp_path / "run.json").read_text()) == written
    about[-1] = tmp_path / "other.json"
    assert call(monkeypatch, "robustbench_entry.py", out, *about, "--checkpoint", "last") == 2
    assert "no attacked test images" in capsys.readouterr().err
    out.write_text("{}")
    assert call(monkeypatch, "robustbench_entry.py", out, *about) == 2
    assert "not the JSON of an evaluation" in capsys.readouterr().err
