"""Every kind of subject, with every option: either the effect or a sentence that refuses it."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from evaluate_support import shorten
from PIL import Image
from torch import nn
from train_support import config, evaluate_subject, saved, trained

import robustflat as rf
from robustflat import models
from robustflat.cli import app, main
from robustflat.data import images as image_files
from robustflat.elsewhere import Elsewhere
from robustflat.errors import UserError
from robustflat.evaluate import Team, doubts, fast
from robustflat.files import update_json
from robustflat.perturb.compiled import Compiled
from robustflat.runs.comparison import compare
from robustflat.runs.evaluation import Wanted
from robustflat.runs.flatness import measure_subject
from robustflat.runs.records import evaluation_of, read
from robustflat.subject import open_subject
from robustflat.train.folder import RunFolder

FACTORY = """
import torch
from robustflat import models
def make(num_classes, file):
    net = models.build("mlp", num_classes=num_classes, in_channels=1,
                       image_size=(8, 8), options={"hidden": [16]}).net
    net.load_state_dict(torch.load(file))
    return net
def takes_nothing(**options):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())
    net.said = options
    return net
def attack(model, x, y, *, seed, eps):
    return (x + eps * (2 * torch.rand(x.shape) - 1).sign()).clamp(0, 1)
def fails(model, x, y, *, seed):
    raise OSError("no more room")
def bare(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and its network in every other form; all of them are the same classifier."""
    root = tmp_path_factory.mktemp("subjects")
    evaluate = {"attacks": ["pgd-2"], "gap_samples": 20, "batch_size": 5}
    data = {"train_samples": 200, "validation_samples": 40}
    folder = trained(root, name="a", train__epochs=8, evaluate=evaluate, data=data,
                     train__average={"name": "swa", "start_epoch": 1})  # fmt: skip
    model = open_subject(folder.root, device="cpu").network("best").model
    assert isinstance(model, models.Normalized)
    torch.save(model.state_dict(), root / "whole.pt")
    torch.save(model.net.state_dict(), root / "net.pt")
    (root / "subject_factory.py").write_text(FACTORY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.rand(2, 1, 8, 8)), str(root / "program.ts"))
    return root


KINDS: dict[str, list[str]] = {
    "run": ["a"],
    "weights": ["whole.pt", "--model", "mlp", "--model-option", "hidden=[16]"],
    "net": ["net.pt", "--model", "mlp", "--model-option", "hidden=[16]", "--normalise", "data"],
    "program": ["program.ts", "--trust", "--normalise", "none"],
    "factory": ["subject_factory:make", "--model-option", "file=net.pt", "--normalise", "data"],
}
SAID = ["--data", "digits", "--norm", "linf", "--eps", "0.1"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path) -> Any:
    shorten(monkeypatch)
    # Checks that have tests of their own, and cost more than all that is tried here.
    monkeypatch.setattr(doubts, "probes", lambda *a, **k: [])
    monkeypatch.setattr(fast, "Compiled", functools.partial(Compiled, backend="eager"))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))

    def call(kind: str, *arguments: Any) -> tuple[int, str]:
        given = KINDS.get(kind, [str(kind)])
        given = [*given, *(SAID if kind in MODELS else []), "--device", "cpu"]
        given += map(str, arguments)
        monkeypatch.setattr(sys, "argv", ["robustflat", "evaluate", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out + said.err

    return call


def attacked_in(output: Path) -> list[dict[str, Any]]:
    return [one for one in read(output / "evaluation.json", "evaluate") if one["kind"] == "test"]


def test_all_forms_of_one_model_have_the_same_figures(run: Any, tmp_path: Path) -> None:
    found = {}
    for kind in KINDS:
        code, said = run(kind, "--attack", "pgd-2", "--gap-samples", 0, "--output", tmp_path / kind)
        assert code == 0, said
        (found[kind],) = attacked_in(tmp_path / kind)
    clean = {kind: one["result"]["clean_accuracy"] for kind, one in found.items()}
    # "data" normalises with all training images, the run with the 60 that it was trained on.
    assert clean["run"] == clean["weights"] == clean["program"]
    assert clean["net"] == clean["factory"] == pytest.approx(clean["run"], abs=0.05)
    robust = {kind: one["result"]["robust_accuracy"] for kind, one in found.items()}
    # Batches of other sizes have other random starts.
    assert robust["weights"] == robust["program"] == pytest.approx(robust["run"], abs=0.01)
    assert robust["run"] < clean["run"]


def test_models_stand_beside_runs(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for kind in ("run", "program"):
        assert (
            run(kind, "--attack", "pgd-2", "--gap-samples", 0, "--output", tmp_path / kind)[0] == 0
        )
    homes = [str(tmp_path / "program"), str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["robustflat", "compare", *homes])
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert not ended.value.code, said
    assert all(len(line) <= 60 for line in said.splitlines()), "COLUMNS is obeyed"
    assert "pgd-2 [given]" in said
    assert "pgd-2 [best]" in said
    assert "program" in said


def test_only_what_is_attacked_asks_a_model_for_a_threat(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(place)

    def said(command: str, *arguments: str) -> tuple[int, str]:
        weights = [*KINDS["weights"], "--data", "digits", "--samples", "12"]
        monkeypatch.setattr(sys, "argv", ["robustflat", command, *weights, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return int(ended.value.code or 0), told.out + told.err

    picture = ("--points", "3", "--output", str(tmp_path / "line.png"))
    for command, clean, robust in (
        ("flatness", ("--measure", "average_clean"), ("--measure", "average_robust")),
        ("landscape", (*picture, "--loss", "clean"), picture),
        ("evaluate", None, ("--attack", "pgd-1")),
    ):
        if clean is not None:
            code, text = said(command, *clean)
            assert code == 0, text
        code, text = said(command, *robust)
        assert code == 2
        assert "so it names no threat to be measured under. Say it: --norm linf" in text


# --- every option of evaluate, for every kind of subject: its effect, or words of its refusal

FILES = ("weights", "net")
MODELS = (*FILES, "program", "factory")
ALL = ("run", *MODELS)
Found = Callable[[dict[str, Any]], bool]
# Of a call the option, the kinds of subject, what is said, and what must hold of the measurement of
# the test images, or words of the sentence that refuses it.
TABLE: list[tuple[str, Sequence[str], Sequence[Any], Found | str]] = [
    ("attack", ALL, ["--attack", "fgsm"], lambda one: list(one["result"]["attacks"]) == ["fgsm"]),
    ("attack", ALL, ["--attack", "apgd-ce"], lambda one: "apgd-ce" in one["result"]["suites"]),
    ("attack", ALL, ["--attack", "subject_factory:attack"],
     lambda one: one["result"]["attacks"]["subject_factory:attack"]["attacked"] > 10),
    ("attack", ALL, ["--attack", "subject_factory:atack"], "Did you mean 'attack'"),
    ("attack", ALL, ["--attack", "subject_factory:bare"], "cannot be called"),
    ("attack", ALL, ["--attack", "transfer:a"],
     lambda one: one["result"]["attacks"]["transfer:a"]["attacked"] > 10),
    ("attack", ALL, ["--attack", "transfer:b"], "the folder of a run"),
    ("attack", ALL, ["--attack", "pdg-20"], "Did you mean 'pgd-20'"),
    ("attack", ALL, ["--attack", "pgd-0"], "no step is no attack"),
    ("checkpoint", ["run"], ["--checkpoint", "last"], lambda one: one["checkpoint"] == "last"),
    ("checkpoint", MODELS, ["--checkpoint", "best"], "leave --checkpoint and --weights out"),
    ("weights", ["run"], ["--weights", "raw"], lambda one: one["weights"] == "raw"),
    ("weights", MODELS, ["--weights", "raw"], "leave --checkpoint and --weights out"),
    ("samples", ALL, ["--samples", 12], lambda one: one["result"]["count"] == 12),
    ("samples", ALL, ["--samples", 0], "samples must be a whole number >= 1"),
    ("samples", ALL, ["--samples", 3000], "Asked for 3000 samples of"),
    ("precision", ALL, ["--precision", "bf16"],
     lambda one: list(one["result"]["attacks"]) == ["pgd-2@bf16"]),
    ("precision", ALL, ["--precision", "fp16"], "fp32, bf16"),
    ("radii", ALL, ["--radii", "0"], "at least one radius above 0"),
    ("radii", ALL, ["--radii", "0.1,x"], "--radii"),
    ("radii", ALL, ["--radii", "0.1", "--shard", "1/2"], "no place for --shard"),
    ("curve", ALL, ["--curve", "c.png"], "over --radii"),
    ("curve", ALL, ["--radii", "0.1", "--curve", "c.txt"], "no ending of a picture"),
    ("compiled", ["run", *FILES, "factory"], ["--compile"], lambda one: one["compiled"] is True),
    # What cannot be compiled is searched as it is, and told.
    ("compiled", ["program"], ["--compile"], lambda one: one["compiled"] is False),
    ("by_class", ALL, ["--by-class"], lambda one: len(one["result"]["classes"]) == 10),
    ("save_adversarial", ALL, ["--save-adversarial", "adv.txt"], "ends in .npz"),
    ("save_adversarial", ALL, ["--save-adversarial", "adv.npz", "--merge"], "with every --shard"),
    ("save_adversarial", ["run"], ["--save-adversarial", "adv.npz", "--checkpoint", "both"],
     "name one --checkpoint"),
    ("seed", ALL, ["--seed", 3], lambda one: one["seed"] == 3),
    ("seed", ALL, ["--seed", 10**30], "below 2^63"),
    ("norm", ALL, ["--norm", "l2", "--eps", "1/2"],
     lambda one: (one["norm"], one["eps"]) == ("l2", 0.5)),
    ("norm", ["run"], ["--norm", "l2"], "both, or neither"),
    ("eps", ["run"], ["--eps", "1"], "both, or neither"),
    ("eps", ALL, ["--eps", "nan"], "--eps"),
    ("device", ALL, ["--device", "cuda:63"], "cuda:63"),
    ("device", ALL, ["--device", "cpu"], lambda one: one["device"] == "cpu"),
    ("shard", ALL, ["--shard", "3/2"], "i from 1 to n"),
    ("merge", ALL, ["--merge"], "There are no shards"),
    ("merge", ALL, ["--merge", "--shard", "1/2"], "leave --shard out"),
    ("model", ["run"], ["--model", "mlp"], "leave --model out"),
    ("model", FILES, ["--model", "small_cnn"], "no option 'hidden'"),
    ("model", ["program", "factory"], ["--model", "mlp"], "leave it out"),
    ("model_option", ["run"], ["--model-option", "hidden=[8]"], "leave --model-option out"),
    ("model_option", ["program"], ["--model-option", "hidden=[8]"], "leave --model-option out"),
    ("model_option", FILES, ["--model-option", "hidden=[8]"], "do not fit the model"),
    ("model_option", ["factory"], ["--model-option", "hiden=8"], "no option 'hiden'"),
    ("model_option", [*FILES, "factory"], ["--model-option", "hidden"], "name=value"),
    ("model_option", ["factory"], [],
     lambda one: one["said"]["model_option"] == {"file": "net.pt"}),
    ("normalise", ["run"], ["--normalise", "none"], "leave --normalise out"),
    ("normalise", ["weights"], ["--normalise", "none"], "holds its own normalisation"),
    ("normalise", ["net", "program", "factory"], ["--normalise", "9/0.01"],
     lambda one: one["result"]["clean_accuracy"] < 0.3 and one["said"]["normalise"] == "9/0.01"),
    ("normalise", ["net", "program", "factory"], ["--normalise", "much"], "--normalise must be"),
    ("image_size", ["run"], ["--image-size", 8], "leave --image-size out"),
    ("image_size", MODELS, ["--image-size", 8], "image_size is for image_folder"),
    ("image_size", ["run"], ["--data", "digits", "--image-size", 8], "is for image_folder"),
    ("data", ["run"], ["--data", "digits"],
     lambda one: (one["data"], one["said"]) == ("digits", {"data": "digits"})),
    ("data", ["run"], ["--data", "mnist5k"], "was trained on 10 classes of images [1, 8, 8]"),
    ("data", ["run"], ["--data", "digit"], "Did you mean 'digits'"),
    ("data", MODELS, ["--data", "digit"], "Did you mean 'digits'"),
    ("data", MODELS, ["--data", "digits"], lambda one: one["data"] == "digits"),
    ("root", ["run"], ["--root", "data"], "leave --root out"),
    ("root", MODELS, ["--root", "data"], "leave --root out"),
    ("root", MODELS, ["--data", "mnist", "--root", "nowhere"], "is not in nowhere"),
    ("root", ["run"], ["--data", "digits", "--root", "data"], "leave --root out"),
    ("root", ["run"], ["--data", "mnist", "--root", "nowhere"], "is not in nowhere"),
    ("download", ["run"], ["--download"], "leave --download out"),
    ("download", ["run"], ["--data", "digits", "--download"], "leave --download out"),
    ("download", MODELS, ["--download"], "leave --download out"),
    ("batch_size", ALL, ["--batch-size", 7], lambda one: one["batch_size"] == 7),
    ("batch_size", ALL, ["--batch-size", 0], "--batch-size must be at least 1"),
    ("workers", ALL, ["--workers", 0], "--workers must be at least 1"),
    ("workers", ALL, ["--workers", 2], "these data are in memory"),
    ("trust", ["run"], ["--trust"], "leave --trust out"),
    ("trust", ["program"], ["--no-trust"], "say so: trust=True, or --trust"),
    ("trust", ["program"], [], lambda one: one["result"]["count"] == 30),
    ("trust", [*FILES, "factory"], ["--trust"], "is for programs"),
]  # fmt: skip
# What has a test of its own, for every kind: shards joined, the gap, and the home.
ALONE = {"targets": ALL, "shard": ALL, "merge": ALL, "gap_samples": ALL, "output": ALL}
ALONE |= {"save_adversarial": ALL}
ALONE |= {"model": FILES, "model_option": FILES, "image_size": FILES, "root": FILES}


def test_the_table_is_complete() -> None:
    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    tried = {(option, kind) for option, kinds, *_ in TABLE for kind in kinds}
    tried |= {(option, kind) for option, kinds in ALONE.items() for kind in kinds}
    assert tried == {(parameter.name, kind) for parameter in command.params for kind in ALL}


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded as a whole, as ever, but not made into machine code."""
    monkeypatch.setattr("robustflat.evaluate.fast.check_compiler", lambda device: None)
    monkeypatch.setattr(
        "robustflat.evaluate.fast.Compiled", functools.partial(Compiled, backend="aot_eager")
    )


@pytest.mark.parametrize("kind", ALL)
def test_every_option_has_its_effect_or_is_refused(
    run: Any, tmp_path: Path, quickly_compiled: None, kind: str
) -> None:
    for i, (option, kinds, said, expected) in enumerate(TABLE):
        if kind not in kinds:
            continue
        home = tmp_path / str(i)
        attack = [] if option == "attack" else ["--attack", "pgd-2"]
        code, text = run(
            kind, "--samples", 30, *attack, "--gap-samples", 0, "--output", home, *said
        )
        if isinstance(expected, str):
            assert code == 2, (said, text)
            assert expected in text, (said, text)
            assert not home.exists(), said
        else:
            assert code == 0, (said, text)
            (one,) = read(home / "evaluation.json", "evaluate")
            assert expected(one), said
            assert one["kind"] == "test"
            assert (home / "evaluate.log").is_file()


@pytest.mark.parametrize("kind", ALL)
def test_examples_of_every_kind_are_saved_and_attack_again(
    run: Any, tmp_path: Path, kind: str
) -> None:
    base = ("--samples", 30, "--gap-samples", 0)
    file = tmp_path / "adv.npz"
    first = (*base, "--attack", "pgd-2", "--save-adversarial", file)
    code, said = run(kind, *first, "--output", tmp_path / "a", "--by-class")
    assert code == 0, said
    assert "Taken for, under all attacks" in said
    assert "The weakest class is" in said
    code, said = run(kind, *first, "--output", tmp_path / "b")
    assert code == 2
    assert "exists: remove it" in said
    again = (*base, "--attack", f"transfer:{file}", "--output", tmp_path / "b")
    code, said = run(kind, *again)
    assert code == 0, said
    assert "Taken for" not in said
    (made,), (stored,) = attacked_in(tmp_path / "a"), attacked_in(tmp_path / "b")
    assert stored["result"]["robust_accuracy"] == made["result"]["robust_accuracy"]
    code, said = run(kind, *again, "--norm", "linf", "--eps", "0.2")
    assert code == 2
    assert "made for linf 0.1, and the evaluation is for linf 0.2" in said


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_has_a_curve_over_radii(run: Any, tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    said = ("--samples", 30, "--output", home, "--attack", "pgd-2", "--curve", tmp_path / "c.png")
    code, text = run(kind, *said, "--radii", "0.1,13/255")
    assert code == 0, text
    assert "13/255" in text
    (one,) = read(home / "curves.json", "evaluate")
    assert (one["kind"], one["attack"], one["samples"]) == ("curve", "pgd-2", 30)
    points = one["result"]["points"]
    assert [point["eps"] for point in points] == [0.0, 13 / 255, 0.1]
    assert points[0]["accuracy"] > points[1]["accuracy"] > points[2]["accuracy"]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 400
    assert not (home / "evaluation.json").exists()


@pytest.mark.parametrize("kind", ALL)
def test_an_own_attack_that_fails_loses_nothing(run: Any, tmp_path: Path, kind: str) -> None:
    base = ("--samples", 30, "--gap-samples", 0, "--output", tmp_path, "--attack", "fgsm")
    code, said = run(kind, *base, "--attack", "subject_factory:fails")
    assert code == 2
    assert "The attack subject_factory:fails raised OSError: no more room" in said
    assert not (tmp_path / "evaluation.json").exists()
    assert run(kind, *base)[0] == 0


@pytest.mark.parametrize("kind", ALL)
def test_shards_of_every_kind_are_joined_and_its_gap_is_measured(
    run: Any, tmp_path: Path, kind: str
) -> None:
    base = ("--attack", "pgd-2", "--samples", 30)
    for part in ("1/2", "2/2"):
        code, said = run(
            kind, *base, "--gap-samples", 0, "--output", tmp_path / "s", "--shard", part
        )
        assert code == 0, said
        assert not (tmp_path / "s" / "evaluation.json").exists()
    for attack, code in (("pgd-3", 2), ("pgd-2", 0)):
        said = run(kind, *base, "--gap-samples", 0, "--output", tmp_path / "s", "--merge",
                   *(("--attack", attack) if code else ()))  # fmt: skip
        assert said[0] == code, said
        assert not code or "attacked with pgd-2, not with pgd-3" in said[1]
        assert "forward-pass equivalents" not in said[1], "what is joined is not attacked again"
        if code:  # what was measured of the whole is not lost by joining
            whole = run(
                kind, *base[2:], "--attack", "fgsm", "--gap-samples", 0, "--output", tmp_path / "s"
            )
            assert whole[0] == 0
    # Without an attack whatever the shards have is joined, not what would be attacked with.
    said = run(kind, *base[2:], "--gap-samples", 0, "--output", tmp_path / "s", "--merge")
    assert said[0] == 0, said
    assert run(kind, *base, "--gap-samples", 10, "--output", tmp_path / "w.json")[0] == 0
    found = read(tmp_path / "w.json", "evaluate")
    gaps = ["gap", "gap", "overfitting"] if kind == "run" else ["gap"]
    assert [one["kind"] for one in found] == ["test", *gaps]
    assert found[1]["result"]["counts"]["train"] == 10
    (joined,) = read(tmp_path / "s" / "evaluation.json", "evaluate")
    assert set(joined["result"]["suites"]) == {"pgd-2", "fgsm"}
    assert joined["result"]["robust_accuracy"] <= joined["result"]["suites"]["pgd-2"]["accuracy"]
    same = found[0]["result"]["settings"]["data"]
    assert joined["result"]["settings"]["data"] == same, "they are the same images"
    assert joined["result"]["clean_accuracy"] == found[0]["result"]["clean_accuracy"]
    assert joined["result"]["count"] == 30
    code, said = run(kind, *base, "--shard", "1/2", "--gap-samples", 3, "--output", tmp_path / "x")
    assert code == 2
    assert "A shard has no gap" in said


def test_images_of_a_folder_are_brought_to_the_size_that_is_said(run: Any, tmp_path: Path) -> None:
    """Images with a light half and a dark one, which says the class; the whole must be shrunk."""
    for split in ("train", "test"):
        for name, (left, right) in {"a": (255, 0), "b": (0, 255)}.items():
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGB", (24, 24), (left,) * 3)
                image.paste((right,) * 3, (12, 0, 24, 24))
                image.save(tmp_path / "images" / split / name / f"{i}.png")
    net = models.build("mlp", num_classes=2, in_channels=3,
                       image_size=(8, 8), options={"hidden": [2]}).net  # fmt: skip
    first, second = [m for m in net.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        sides = torch.ones(3, 8, 8)
        sides[:, :, 4:] = 0
        first.weight.copy_(torch.stack([sides.flatten(), 1 - sides.flatten()]))
        first.bias.zero_()
        second.weight.copy_(torch.eye(2))
        second.bias.zero_()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    given = ["--model", "mlp", "--model-option", "hidden=[2]", "--normalise", "none"]
    given += ["--data", "image_folder", "--root", tmp_path / "images", "--norm", "linf"]
    given += ["--eps", "1/255", "--attack", "fgsm"]
    for size, code in ((8, 0), (6, 2), (None, 2)):
        home = tmp_path / str(size)
        more = [] if size is None else ["--image-size", size]
        ended, said = run(tmp_path / "net.pt", *given, "--output", home, *more)
        assert ended == code, said
        if code == 0:
            (one,) = read(home / "evaluation.json", "evaluate")
            assert one["result"]["clean_accuracy"] == 1
            assert one["said"]["image_size"] == 8
    # How many classes it has is looked at before anything is done.
    given[-1] = "apgd-dlr"
    ended, said = run(tmp_path / "net.pt", *given, "--output", tmp_path / "x", "--image-size", 8)
    assert ended == 2
    assert "with 2 classes" in said
    assert not (tmp_path / "x").exists()


def test_one_home_keeps_the_figures_of_different_models(run: Any, tmp_path: Path) -> None:
    # Nothing is said of a gap: it is not known what a model was trained on.
    base = ("--attack", "pgd-1", "--samples", 20, "--output", tmp_path)
    for normalise in ("data", "none", "data"):
        assert run("net", *base, "--normalise", normalise)[0] == 0
    found = read(tmp_path / "evaluation.json", "evaluate")
    assert [one["said"]["normalise"] for one in found] == ["none", "data"]
    (row,) = compare([RunFolder(tmp_path)])
    names = [name for name in row.cells if name.startswith("clean")]
    assert len(names) == 2
    assert all("normalise" in name for name in names)
    newest = evaluation_of(found)
    assert newest is not None
    assert newest["checkpoints"]["given"]["model"] == found[-1]["model"]


def test_a_home_that_is_a_file_and_a_configuration_are_told_as_such(
    run: Any, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("mine")
    for home, words in ((tmp_path / "x.txt", "is a file"), ("/proc/none/x", "could not be writ")):
        code, said = run("weights", "--attack", "pgd-1", "--samples", 20, "--output", home)
        assert code == 2
        assert words in said
    assert (tmp_path / "x.txt").read_text() == "mine"
    code, said = run("a/config.yaml", *SAID, "--attack", "pgd-1")
    assert code == 2
    assert "is a configuration, not a model" in said


@pytest.mark.parametrize(
    ("target", "said", "words"),
    [
        ("nothing", Elsewhere(), "does not exist"),
        ("whole.pt", Elsewhere(), "name it with --model"),
        ("whole.pt", Elsewhere(model="mlp"), "say also --data: a model alone"),
        ("program.ts", Elsewhere(model="mlp", data="digits"), "leave it out"),
        ("a", Elsewhere(model="mlp"), "leave --model out"),
    ],
)
def test_what_is_missing_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: Elsewhere, words: str
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=words) as raised:
        open_subject(target, elsewhere=said)
    assert "not the folder of a run" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "said", "words"),
    [
        ("mlp", {}, "has no weights"),
        ("timm:resnet18.a1_in1k", {}, "has no weights"),
        ("net.pt", {"model": "mlp", "model_option": {"hidden": [16]}},
         "--normalise none if it does"),
        ("subject_factory:bare", {"normalise": "none"}, "draws weights at random"),
        ("subject_factory:takes_nothing", {}, "--normalise none if it does"),
        ("program.ts", {"trust": True}, "--normalise none if it does"),
        ("program.ts", {"normalise": "none"}, "--trust"),
        ("net.pt", {"model": "mlp", "normalise": "1/2/3"}, "1 numbers each"),
        ("net.pt", {"model": "mlp", "normalise": "0.1,0.2/0.3"}, "1 numbers each"),
        ("net.pt", {"model": "mlp", "normalise": "none", "model_option": {"mean": 0}}, "no option"),
        ("whole.pt", {"model": "mlp", "normalise": "none", "model_option": {"hidden": [16]}},
         "holds its own"),
        ("torchvision.models:resnet18", {"normalise": "none"}, "draws weights at random"),
        ("subject_factory:takes_nothing", {"normalise": "none"}, None),
        ("subject_factory:takes_nothing", {"normalise": "none",
          "model_option": {"num_classes": 10}}, None),
    ],
)  # fmt: skip
def test_a_model_is_never_guessed(
    place: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: Any, words: str | None
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    subject = open_subject(
        target, norm="linf", eps=0.1, device="cpu", elsewhere=Elsewhere(data="digits", **said)
    )
    if words is None:
        # Nothing is passed but what was said or a parameter names.
        assert subject.network().model.said == said.get("model_option", {})
        return
    with pytest.raises(UserError, match=words):
        subject.network()


def test_the_doubt_names_more_or_less_normalisation(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from robustflat.data import load

    digits = load("digits")
    x, y = digits.train.tensors()
    said = Elsewhere(model="mlp", model_option={"hidden": [16]}, data="digits", normalise="data")
    opened = open_subject(place / "net.pt", norm="linf", eps=0.1, device="cpu", elsewhere=said)
    layer = opened.network().model.normalize
    assert (layer.mean.item(), layer.std.item()) == pytest.approx((*digits.mean, *digits.std))
    means = torch.stack([x[y == c].mean(0).flatten() for c in range(10)])

    def save_net(scale: float, shift: float, name: str) -> None:
        """The nearest mean, of pixels x that come as (x - shift) / scale."""
        net = models.build("mlp", num_classes=10, in_channels=1,
                           image_size=(8, 8), options={"hidden": [64]}).net  # fmt: skip
        first, second = [m for m in net.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            first.weight.copy_(torch.eye(64) * scale)
            first.bias.fill_(shift)
            second.weight.copy_(2 * means)
            second.bias.copy_(-means.square().sum(1))
        torch.save(net.state_dict(), tmp_path / name)

    save_net(1.0, 0.0, "raw.pt")
    save_net(float(digits.std[0]), float(digits.mean[0]), "normalised.pt")
    wanted = Wanted(attacks=[])

    def doubts(name: str, normalise: str) -> str:
        said = Elsewhere(
            model="mlp", model_option={"hidden": [64]}, data="digits", normalise=normalise
        )
        home = tmp_path / normalise.replace("/", "-") / name
        subject = open_subject(
            tmp_path / name, norm="linf", eps=0.1, device="cpu", output=home, elsewhere=said
        )
        found = evaluate_subject(subject, wanted)["checkpoints"]["given"]["test"]
        return " ".join(w for w in found["warnings"] if "does not seem to take" in w)

    assert doubts("raw.pt", "none") == ""
    assert doubts("normalised.pt", "data") == ""
    assert "--normalise none" in doubts("raw.pt", "0.9/0.05")
    assert "--normalise data" in doubts("normalised.pt", "none")


# --- runs


def test_every_target_is_looked_at_before_any_is_paid_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    paid: list[Any] = []
    monkeypatch.setattr("robustflat.runs.evaluation.Job.run", lambda *a: paid.append(a))
    monkeypatch.setattr(sys, "argv", ["robustflat", "evaluate", str(place / "a"), "b=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "b=1 does not exist" in capsys.readouterr().err
    assert not paid


def test_restoring_needs_no_file_of_initial_weights(tmp_path: Path, place: Path) -> None:
    weights = tmp_path / "initial.pt"
    weights.write_bytes((place / "whole.pt").read_bytes())
    folder = trained(tmp_path, name="b", model={**config().model.model_dump(),
                                                 "weights": str(weights)})  # fmt: skip
    weights.unlink()
    network = open_subject(folder.root, device="cpu").network("last")
    state = saved(folder.last)["model"]
    assert all(torch.equal(v, state[k]) for k, v in network.model.state_dict().items())


def test_all_images_of_a_run_s_data_set_do_not_meet_the_outcomes_of_its_own(
    tmp_path: Path,
) -> None:
    folder = trained(tmp_path, train__epochs=1)  # with fewer test images than digits has
    wanted = Wanted(attacks=["fgsm"], gap_samples=0)
    own = open_subject(folder.root, device="cpu")
    count = len(own.images().test)
    evaluate_subject(own, wanted)
    whole = open_subject(folder.root, device="cpu", elsewhere=Elsewhere(data="digits"))
    assert len(whole.images().test) > count
    evaluate_subject(whole, wanted)
    found = attacked_in(folder.root)
    assert [one["said"] for one in found] == [{}, {"data": "digits"}]
    counts = [one["result"]["count"] for one in found]
    assert counts == [count, len(whole.images().test)]
    shown = evaluation_of(read(folder.evaluation, "evaluate"))
    assert shown is not None
    assert shown["checkpoints"]["best"]["test"] == found[0]["result"], "that on its own images"


def test_images_on_the_disk_are_decoded_only_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustflat.data.images import FileImages

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 30), ("test", 24)):
        for name in ("dark", "light"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 100, (8, 8, 3), generator=generator, dtype=torch.uint8)
                pixels = (noise + (150 if name == "light" else 0)).numpy()
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    data = {"name": "image_folder", "root": str(tmp_path / "images"), "validation_samples": 10}
    folder = trained(tmp_path, data=data | {"train_samples": None, "test_samples": None},
                     train__epochs=1)  # fmt: skip
    decoded: list[Path] = []
    decode = FileImages._fitted
    monkeypatch.setattr(
        FileImages, "_fitted", lambda self, i: (decoded.append(self.path(i)), decode(self, i))[1]
    )
    subject = open_subject(folder.root, device="cpu")
    subject.network("last")
    assert not decoded, "nothing has been measured yet"
    evaluate_subject(subject, Wanted(attacks=["fgsm"], samples=6, gap_samples=0))
    assert len(set(decoded)) == 6
    assert all("test" in path.parts for path in decoded)
    evaluate_subject(subject, Wanted(attacks=["fgsm"], samples=6, gap_samples=4))
    assert len({path for path in decoded if "train" in path.parts}) == 8, "4 train, 4 validation"


def test_the_gap_is_kept_and_not_measured_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import robustflat.evaluate.gaps as gaps

    subject = open_subject(place / "a", device="cpu", output=tmp_path)
    once = evaluate_subject(subject, Wanted(attacks=[]))
    calls: list[Any] = []
    scores = gaps.scores
    monkeypatch.setattr(gaps, "scores", lambda *a, **k: (calls.append(a), scores(*a, **k))[1])
    assert evaluate_subject(subject, Wanted(attacks=[])) == once
    assert not calls
    # Each figure is that of its own split and checkpoint.
    for name, entry in once["checkpoints"].items():
        for split, images in subject.splits(20).items():
            x, y = images.tensors()
            right = float((subject.network(name).model(x).argmax(1) == y).double().mean())
            assert entry["gap"]["splits"][split]["clean_accuracy"]["value"] == pytest.approx(right)
    # Of another size, or at other weights, it is another one.
    smaller = evaluate_subject(subject, Wanted(attacks=[], gap_samples=10))
    assert len(calls) == 6
    assert smaller["checkpoints"]["last"]["gap"]["counts"] == {
        "train": 10,
        "validation": 10,
        "test": 10,
    }
    found = read(tmp_path / "evaluation.json", "evaluate")
    assert len([one for one in found if one["kind"] == "gap"]) == 4
    evaluate_subject(subject, Wanted(attacks=[], weights="raw"))
    assert len(calls) > 6
    # What is asked to be attacked also bounds the gap.
    few = evaluate_subject(subject, Wanted(attacks=[], samples=8))
    assert few["checkpoints"]["last"]["gap"]["counts"]["train"] == 8


def test_a_damaged_store_of_the_gap_is_a_sentence(place: Path, tmp_path: Path) -> None:
    subject = open_subject(place / "a", device="cpu", output=tmp_path)
    evaluate_subject(subject, Wanted(attacks=[]))
    (path,) = (tmp_path / "outcomes").glob("gap-last-train-*.pt")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        evaluate_subject(subject, Wanted(attacks=[]))
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="holds no scores"):
        evaluate_subject(subject, Wanted(attacks=[]))


def test_best_and_last_of_different_kinds_of_weights_are_not_compared(tmp_path: Path) -> None:
    folder = trained(tmp_path, train__epochs=3, train__average={"name": "swa", "start_epoch": 2},
                     evaluate={"gap_samples": 20})  # fmt: skip
    best = saved(folder.best)
    # Of another network than the last one, so that the two cannot be mistaken for each other.
    other = {k: v.flip(0) if v.ndim > 1 else v for k, v in best["model"].items()}
    torch.save({**best, "average_model": None, "model": other}, folder.best)
    subject = open_subject(folder.root, device="cpu")
    found = evaluate_subject(subject, Wanted(attacks=[]))
    weights = {name: entry["weights"] for name, entry in found["checkpoints"].items()}
    assert weights == {"best": "raw", "last": "average"}
    assert found["overfitting"] is None
    assert "--weights raw" in found["notes"][0]
    raw = evaluate_subject(subject, Wanted(attacks=[], weights="raw"))
    assert raw["notes"] == []
    both = [raw["checkpoints"][name]["gap"]["splits"]["test"] for name in ("best", "last")]
    assert both[0]["robust_accuracy"]["value"] != both[1]["robust_accuracy"]["value"]
    assert raw["overfitting"]["robust_accuracy"]["value"] == pytest.approx(
        both[0]["robust_accuracy"]["value"] - both[1]["robust_accuracy"]["value"]
    )


def test_flatness_of_a_run_without_an_attack_is_measured_under_the_threat_that_is_said(
    tmp_path: Path,
) -> None:
    plain = trained(tmp_path, attack={"name": "none"}, objective={"name": "standard"})
    measures = ["average_clean", "average_robust"]
    subject = open_subject(plain.root, device="cpu")
    for measure in ("average_robust", "input_gradient_norm", "local_linearity"):
        with pytest.raises(UserError, match="--norm linf --eps"):
            measure_subject(subject, [measure], samples=20)
    assert measure_subject(subject, measures[:1], samples=20)["eps"] == 0
    said = open_subject(plain.root, norm="linf", eps=0.1, device="cpu")
    found = measure_subject(said, measures, samples=20)
    clean, robust = (found["measures"][name]["value"] for name in measures)
    assert clean != robust
    assert (found["norm"], found["eps"]) == ("linf", 0.1)


@pytest.mark.parametrize("command", ["flatness", "landscape"])
def test_flatness_and_landscape_take_a_threat(
    place: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain = trained(tmp_path, attack={"name": "none"}, objective={"name": "standard"})
    more = {
        "flatness": ["--measure", "average_robust"],
        "landscape": ["--points", "3", "--output", str(tmp_path / "l.png")],
    }[command]
    for said, code in (([], 2), (["--norm", "linf"], 2), (["--norm", "linf", "--eps", "0.1"], 0)):
        line = ["robustflat", command, str(plain.root), "--samples", "10", *more, *said]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            main()
        err = capsys.readouterr().err
        assert (ended.value.code or 0) == code, err
        assert code == 0 or "--eps" in err


# --- several processes, at once or together


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forked attacks for a short time only."""
    shorten(monkeypatch)


def _evaluate(
    target: Path, home: Path, eps: float, shard: str | None, fatal: int, port: str, rank: int
) -> None:
    def progress(name: str, done: int, total: int, left: int) -> None:
        if name == "apgd-ce" and done == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    if port:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    subject = open_subject(target, norm="linf", eps=eps, device="cpu", output=home)
    attacks = ["pgd-3", "autoattack:custom=apgd-ce,apgd-t"]
    wanted = Wanted(attacks=attacks, samples=24, shard=shard, gap_samples=0 if shard else 10)
    evaluate_subject(subject, wanted, progress, Team.of_torchrun())


def evaluating(
    target: Path, home: Path, eps: float = 0.1, shard: str | None = None, fatal: int = 0,
    port: str = "", rank: int = 0,
) -> Any:  # fmt: skip
    """A process at its work; forked, because starting one anew takes seconds."""
    arguments = (target, home, eps, shard, fatal, port, rank)
    process = multiprocessing.get_context("fork").Process(target=_evaluate, args=arguments)
    process.start()
    return process


def ended(process: Any, code: int = 0) -> None:
    process.join(timeout=120)
    assert process.exitcode == code


def outcomes(home: Path, name: str = "outcomes.json") -> Any:
    (path,) = (home / "outcomes").glob(f"best-*/{name}")
    content = json.loads(path.read_text())
    for attack in content["attacks"]:
        attack.pop("seconds")
    return content


def test_a_sharded_evaluation_that_was_killed_goes_on_to_the_same_outcomes(
    short: None, place: Path, tmp_path: Path
) -> None:
    first = [evaluating(place / "a", tmp_path / "one", shard=f"{i}/2") for i in (1, 2)]
    for process in first:
        ended(process)
    ended(evaluating(place / "a", tmp_path / "two", shard="1/2", fatal=1), -signal.SIGKILL)
    name = "outcomes-1-of-2.json"
    assert not outcomes(tmp_path / "two", name)["attacks"][-1]["finished"]
    subject = open_subject(place / "a", norm="linf", eps=0.1, device="cpu", output=tmp_path / "two")
    with pytest.raises(UserError, match="missing: 2/2"):
        evaluate_subject(subject, Wanted(samples=24, merge=True))
    second = [evaluating(place / "a", tmp_path / "two", shard=f"{i}/2") for i in (1, 2)]
    for process in second:
        ended(process)
    for part in (1, 2):
        name = f"outcomes-{part}-of-2.json"
        assert outcomes(tmp_path / "one", name) == outcomes(tmp_path / "two", name)
    found = evaluate_subject(subject, Wanted(samples=24, merge=True, gap_samples=0))
    assert found["checkpoints"]["best"]["test"]["count"] == 24


def test_commands_at_once_on_one_home_lose_nothing(
    short: None, place: Path, tmp_path: Path
) -> None:
    both = [evaluating(place / "a", tmp_path / "home", eps) for eps in (0.1, 0.05, 0.1)]
    for process in both:
        ended(process)
    found = read(tmp_path / "home" / "evaluation.json", "evaluate")
    threats = [(one["kind"], one["eps"]) for one in found if one["kind"] == "test"]
    assert sorted(threats) == [("test", 0.05), ("test", 0.1)]
    assert not list((tmp_path / "home").rglob("*.tmp"))
    # The third found the work of the first done: nothing was attacked twice.
    log = (tmp_path / "home" / "evaluate.log").read_text()
    assert log.count("apgd-t: ") == 2


def test_files_written_at_once_are_whole_and_no_change_is_lost(tmp_path: Path) -> None:
    def add(name: str) -> None:
        for i in range(25):
            update_json(tmp_path / "f.json", lambda held, i=i: [*(held or []), [name, i]])

    start = multiprocessing.get_context("fork").Process
    processes = [start(target=add, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        ended(process)
    content = json.loads((tmp_path / "f.json").read_text())
    assert len(content) == 50
    for name in "ab":
        assert [i for who, i in content if who == name] == list(range(25))


def test_processes_together_find_what_one_finds(short: None, place: Path, tmp_path: Path) -> None:
    def pair(home: Path, fatal: int = 0) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [evaluating(place / "a", home, fatal=fatal, port=port, rank=rank) for rank in (0, 1)]

    ended(evaluating(place / "a", tmp_path / "one"))
    for process in pair(tmp_path / "two"):
        ended(process)
    assert outcomes(tmp_path / "one") == outcomes(tmp_path / "two")
    one, two = (
        evaluation_of(read(tmp_path / home / "evaluation.json", "")) for home in ("one", "two")
    )
    assert one is not None
    assert two is not None
    for name, entry in one["checkpoints"].items():
        assert entry["gap"] == two["checkpoints"][name]["gap"]
    assert one["overfitting"] == two["overfitting"]
    # Killed in the middle, it goes on, with one process now, to the same end.
    first, second = pair(tmp_path / "killed", fatal=2)
    ended(first, -signal.SIGKILL)
    second.kill()
    second.join()
    held = outcomes(tmp_path / "killed")["attacks"]
    assert [attack["finished"] for attack in held] == [True, False, False]
    ended(evaluating(place / "a", tmp_path / "killed"))
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "one")


def test_what_one_of_several_processes_cannot_do_ends_all_of_them() -> None:
    team = Team(0, 1)
    with pytest.raises(UserError, match="no more"):
        list(team.each(lambda i: (_ for _ in ()).throw(UserError("no more")), range(3)))
    assert list(team.each(lambda i: i * i, range(2, 5))) == [[4], [9], [16]]


@pytest.mark.parametrize("measure", ["flatness", "landscape"])
def test_a_radius_is_one_in_its_norm(measure: str) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    data = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(UserError, match="norm='l2' say eps too"):
        getattr(rf, measure)(model, data, norm="l2")


def test_help_and_names_need_no_torch_and_functions_keep_their_names() -> None:
    code = (
        "import sys, robustflat.cli as cli; assert 'torch' not in sys.modules; "
        "import robustflat.evaluate.record, robustflat.flatness, robustflat as rf; "
        "assert rf.evaluate.__name__ == 'evaluate' and callable(rf.evaluate); "
        "assert callable(rf.flatness) and all(hasattr(rf, name) for name in rf.__all__); "
        "assert not hasattr(rf, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_what_needs_no_threat_is_measured_without_one(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*KINDS["weights"], "--data", "digits", "--device", "cpu", "--samples", "10"]
    clean = {
        "flatness": ["--measure", "gradient_norm"],
        "landscape": ["--points", "3", "--loss", "clean", "--output", str(place / "clean.png")],
    }
    robust = {"flatness": ["--measure", "average_robust"], "landscape": [], "evaluate": []}
    for wanted, code in ((clean, 0), (robust, 2)):
        for command, more in wanted.items():
            monkeypatch.setattr(sys, "argv", ["robustflat", command, *given, *more])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr()
            assert (ended.value.code or 0) == code, said.err
            assert not said.out.startswith("\n"), "no empty line where there is no terminal"
            assert not code or "--norm linf --eps 8/255" in said.err
    assert (place / "clean.png").is_file()


def test_a_factory_is_called_twice_only(run: Any, place: Path, tmp_path: Path) -> None:
    """Once for the model, and once more to see whether its weights are random."""
    code = (
        "from subject_factory import make\n"
        "calls = []\n"
        "def counted(num_classes, file):\n"
        "    calls.append(file)\n"
        "    return make(num_classes, file)\n"
    )
    (place / "counting.py").write_text(code)
    given = ("counting:counted", "--model-option", "file=net.pt", "--normalise", "data", *SAID)
    assert run(*given, "--attack", "pgd-2", "--samples", 20, "--output", tmp_path / "home")[0] == 0
    assert len(sys.modules["counting"].calls) == 2
    said = Elsewhere(data="digits", normalise="data", model_option={"file": "net.pt"})
    subject = open_subject("counting:counted", device="cpu", elsewhere=said)
    assert subject.network() is subject.network(), "many evaluations of one subject"
    assert len(sys.modules["counting"].calls) == 4
    assert open_subject("a").restore("last", "raw") is not open_subject("a").restore("last", "raw")
    subject = open_subject("a", device="cpu")
    assert subject.network("last", "raw") is subject.network("last", "raw")
    assert subject.network("last", "raw") is not subject.network("best", "raw")


def test_a_damaged_record_is_told_of_before_anything_is_paid(run: Any, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{")
    code, said = run("weights", "--attack", "pgd-2", "--output", tmp_path)
    assert code == 2
    assert "forward-pass equivalents" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_evaluations_with_two_seeds_stand_beside_each_other(run: Any, tmp_path: Path) -> None:
    for seed in (0, 1, 0):
        said = run("weights", "--attack", "pgd-1", "--samples", 20, "--seed", seed,
                   "--output", tmp_path)  # fmt: skip
        assert said[0] == 0, said
    assert sorted(one["seed"] for one in attacked_in(tmp_path)) == [0, 1]


def test_all_images_asked_for_by_number_are_the_whole(run: Any, tmp_path: Path) -> None:
    for samples in (["--samples", 360], []):
        assert run("weights", "--attack", "fgsm", *samples, "--output", tmp_path)[0] == 0
    (one,) = read(tmp_path / "evaluation.json", "evaluate")
    assert one["samples"] is None
    assert one["result"]["settings"]["samples"] is None
    assert len(list((tmp_path / "outcomes").glob("*/outcomes.json"))) == 1


def test_flatness_and_landscape_take_the_options_of_evaluate(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*KINDS["net"], *SAID, "--device", "cpu", "--samples", "10"]
    given += ["--measure", "gradient_norm"]
    monkeypatch.setattr(sys, "argv", ["robustflat", "flatness", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err
    found = read(place / "evaluations" / "net.pt" / "flatness.json", "flatness")[-1]
    assert (found["checkpoint"], found["norm"], found["eps"]) == ("given", "linf", 0.1)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    names = {name: {p.name for p in commands[name].params} for name in commands}
    shared = {"targets", "norm", "eps", "device", "data", "root", "trust"}
    shared |= {"model", "model_option", "normalise", "image_size"}
    assert all(shared < names[name] for name in ("evaluate", "flatness", "landscape"))


def test_flatness_hands_compile_on(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, ...]] = []

    @contextmanager
    def compiled(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Iterator[Any]:
        asked.append(tuple(shape))
        yield model

    monkeypatch.setattr("robustflat.flatness.measuring.compiled", compiled)
    for said in ([], ["--compile"]):
        given = [*KINDS["net"], *SAID, "--device", "cpu", "--samples", "10", *said]
        given += ["--measure", "average_robust", "--option", "samples=2"]
        monkeypatch.setattr(sys, "argv", ["robustflat", "flatness", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        found = read(place / "evaluations" / "net.pt" / "flatness.json", "flatness")[-1]
        settings = found["measures"]["average_robust"]["details"]["settings"]
        assert settings.get("compiled", False) == bool(said)
    assert asked == [(1, 8, 8)]


def test_other_images_of_a_run_have_no_gap_and_a_store_of_their_own(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--attack", "pgd-2", "--samples", 20, "--output", tmp_path]
    assert run("run", *base)[0] == 0
    assert run("run", *base, "--data", "digits")[0] == 0
    kinds = [one["kind"] for one in read(tmp_path / "evaluation.json", "evaluate")]
    assert kinds.count("gap") == 2, "best and last of the run's own images only"
    code, said = run("run", *base, "--data", "digits", "--gap-samples", 5)
    assert (code, "leave --gap-samples out, or --data" in said) == (2, True)
    # Images of another name are attacked anew, whatever else agrees.
    own = open_subject("a", device="cpu")
    stores = len(list((tmp_path / "outcomes").glob("best-*")))
    other = dataclasses.replace(own, data="other", home=RunFolder(tmp_path))
    evaluate_subject(other, Wanted(attacks=["pgd-2"], samples=20, gap_samples=0))
    assert len(list((tmp_path / "outcomes").glob("best-*"))) == stores + 1


def test_image_files_are_decoded_by_as_many_threads_as_are_asked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/a/0", "train/b/0", "test/a/0", "test/b/0", "test/b/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    said = Elsewhere(model="mlp", data="image_folder", root=tmp_path)
    monkeypatch.chdir(place)
    subject = open_subject("whole.pt", device="cpu", elsewhere=said, workers=3, batch_size=2)
    assert subject.images().test.threads == 3
    assert subject.splits(2)["test"].threads == 3
    assert subject.evaluation.batch_size == 2
    usual = open_subject("whole.pt", device="cpu", elsewhere=said)
    assert usual.images().train.threads == min(8, os.cpu_count() or 1)
    assert usual.evaluation.batch_size == 200
    used: list[int] = []
    pool = image_files.ThreadPoolExecutor
    monkeypatch.setattr(image_files, "ThreadPoolExecutor", lambda n: used.append(n) or pool(n))
    subject.tensors("test", 3)
    assert used == [3]
