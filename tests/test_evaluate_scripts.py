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
    (one,) = json.loads(out.read_text())["measurements"]
    content = one["result"]
    assert (one["data"], one["norm"], one["eps"]) == ("digits", "linf", 8 / 255)
    assert content["count"] == 20
    assert content["settings"]["eps"] == 8 / 255
    assert list(content["attacks"]) == ["apgd-ce", "apgd:dlr:malt-3"]
    assert f"{content['robust_accuracy']:.2%}" in printed.out
    assert call(monkeypatch, "autoattack.py", given[0], "--model", "mpl", *given[3:]) == 2
    assert "Did you mean 'mlp'" in capsys.readouterr().err


def entry(**changes):
    """A measurement of AutoAttack on all of CIFAR-10's test images, changed."""
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"]
    suites = {
        "pgd-20": {"accuracy": 0.61, "attacks": ["pgd-20"]},
        "autoattack": {"accuracy": 0.5953, "attacks": attacks},
    }
    result = {
        "count": 10_000, "clean_accuracy": 0.8969, "robust_accuracy": 0.58,
        "suites": suites, "warnings": ["A doubt."], "settings": {"samples": None},
    }  # fmt: skip
    one = {"kind": "test", "checkpoint": "best", "data": "cifar10", "norm": "linf", "eps": 8 / 255}
    return {**one, "result": result | changes.pop("result", {}), **changes}


@pytest.fixture
def entered(monkeypatch, tmp_path, capsys):
    """The entry made of some measurements, or the sentence that refuses them."""

    def made(*measurements, more=()):
        (tmp_path / "e.json").write_text(json.dumps({"measurements": measurements}))
        out = tmp_path / "entry.json"
        out.unlink(missing_ok=True)
        about = ["--link", "l", "--name", "n", "--authors", "a", "--dataset", "cifar10"]
        about += ["--venue", "v", "--architecture", "MLP", "--out", out, *more]
        code = call(monkeypatch, "robustbench_entry.py", tmp_path / "e.json", *about)
        said = capsys.readouterr().err
        assert out.exists() == (code == 0)
        return json.loads(out.read_text()) if code == 0 else said

    return made


def test_a_robustbench_entry_has_the_fields_of_robustbench(entered):
    # Those of RobustBench's own model_info/cifar10/Linf/Carmon2019Unlabeled.json.
    written = {
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
    assert entered(entry()) == written
    last = entry(checkpoint="last", result={"clean_accuracy": 0.5})
    assert entered(entry(), last, more=("--checkpoint", "best")) == written
    assert entered(entry(), last, more=("--checkpoint", "last"))["clean_acc"] == "50.00"
    assert "choose by --checkpoint" in entered(entry(), last)
    assert entered(entry(norm="l2", eps=0.5))["eps"] == "0.5"


def test_what_robustbench_does_not_rank_is_refused(entered):
    short = {"autoattack": {"accuracy": 0.6, "attacks": ["apgd-ce", "square"]}}
    worst = {name: {"accuracy": 0.6, "attacks": [name]} for name in ("apgd-ce", "square")}
    for change, sentence in (
        ({"data": "digits"}, "one is of digits"),
        ({"eps": 4 / 255}, "under linf 4/255"),
        ({"norm": "l2"}, "under l2 8/255"),
        ({"result": {"count": 1000}}, "all 10,000 test images"),
        ({"result": {"settings": {"samples": 10_000}}}, "all 10,000 test images"),
        ({"result": {"suites": short}}, "AutoAttack standard did not run"),
        ({"result": {"suites": worst}}, "AutoAttack standard did not run"),
        ({"kind": "gap"}, "nothing was attacked"),
    ):
        assert sentence in entered(entry(**change)), change
    assert "checkpoint best" in entered(entry(), more=("--checkpoint", "last"))
    assert "RobustBench ranks" in entered(entry(), more=("--dataset", "mnist"))
