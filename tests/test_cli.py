"""The command line: every mistake is one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_support import (
    SMALL_CNN,
    contents,
    evaluate_subject,
    python,
    rows,
    saved,
    trained,
    values,
    write,
)

import robustflat as rf
from robustflat.cli import main
from robustflat.runs.evaluation import Wanted
from robustflat.runs.records import evaluation_of
from robustflat.subject import open_subject
from robustflat.train.folder import RunFolder


class Ran:
    """How a command ended and what it said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["robustflat", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return Ran(int(ended.value.code or 0), said.out, said.err)

    return call


@pytest.fixture
def refused(run: Any) -> Any:
    def call(*arguments: Any) -> str:
        ran = run(*arguments)
        assert ran.code == 2, ran.out + ran.err
        assert ran.out.strip() == ""
        assert ran.err.strip()
        message: str = ran.err
        return message

    return call


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained run that was not measured yet; nobody writes to it."""
    return trained(
        tmp_path_factory.mktemp("cli"),
        model=SMALL_CNN,
        train__epochs=3,
        train__average={"name": "ema", "decay": 0.8},
        evaluate={"attacks": ["pgd-5"], "gap_samples": 30, "batch_size": 30},
        flatness={"measures": ["average_clean"], "samples": 30},
    )


def copied(folder: RunFolder, root: Path) -> RunFolder:
    return RunFolder(shutil.copytree(folder.root, root))


@pytest.fixture
def fresh(untouched: RunFolder, tmp_path: Path) -> RunFolder:
    """A trained run of the test's own."""
    return copied(untouched, tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(untouched: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same, evaluated; tests leave it as it is."""
    folder = copied(untouched, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate_subject(open_subject(folder.root, device="cpu"), Wanted(checkpoints=("best", "last")))
    return folder


# --- train


def test_train(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", listeners=["tensorboard"])
    ran = run("train", path, "train.epochs=1", "weights={name: sam, rho: 0.1}")
    assert ran.code == 0, ran.err
    folder = RunFolder(tmp_path / "run")
    assert str(folder.root) in ran.out
    assert "epoch   1" in ran.out
    assert folder.read_config().weights.name == "sam"
    assert [row["epoch"] for row in rows(folder)] == [1]
    assert folder.event_files()
    # The resolved configuration is a configuration.
    assert run("train", folder.config_file, "--resume").code == 0
    message = run("train", path).err
    assert "already exists" in message
    ran = run("train", path, "--overwrite", "train.epochs=2")
    assert ran.code == 0
    assert [row["epoch"] for row in rows(folder)] == [1, 2]


BAD_TRAIN: dict[str, tuple[list[str], str]] = {
    "unknown key": (["train.epoch=3"], "Did you mean 'epochs'"),
    "wrong type": (["train.epochs=many"], "whole number"),
    "negative": (["attack.eps=-8/255"], "greater than or equal to 0"),
    "unknown method": (["weights.name=avp"], "Did you mean 'awp'"),
    "gamma with none": (
        ["weights.name=none", "weights.gamma=1"],
        "weights.gamma is not a known key",
    ),
    "warm-up": (["weights.when.from_epoch=3"], "from_epoch is 3 of train.epochs 2"),
    "chunk": (["weights={name: msam, chunk: 17, inner: sam}"], "weights.chunk is 17"),
    "bad override": (["epochs"], "key.path=value"),
    "data": (["data.name=imagenet"], "data set 'imagenet'"),
    "data not there": (["data.name=cifar10", "data.root=/nowhere"], "data.download: true"),
    "too many": (["data.train_samples=100000"], "1397"),
    "model": (["model.name=resnet"], "resnet"),
    "model option": (["model.options={hiden: [3]}"], "hiden"),
    "weights file": (["model.weights=none.pt"], "none.pt"),
    "selection": (["weights.parameters='re:nothing'"], "re:nothing"),
    "device": (["device=cuda:63"], "cuda:63"),
    "extra": (["data.extra={path: none.npz}"], "none.npz"),
    "image size": (["data.image_size=8"], "image_folder"),
    "cutout": (["data.augment.cutout=9"], "cutout"),
    "nesterov": (["optimizer={name: sgd, momentum: 0, nesterov: true}"], "nesterov"),
    "norm of no pgd": (["attack={name: fgsm, eps: 0.1, norm: 1.5}"], "attack"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
@pytest.mark.parametrize("command", ["train", "check"])
def test_mistakes_in_a_configuration(
    refused: Any, run: Any, tmp_path: Path, case: str, command: str
) -> None:
    overrides, part = BAD_TRAIN[case]
    path = write(tmp_path / "c.yaml")
    before = contents(tmp_path)
    message = refused(command, path, *overrides)
    assert part in message
    assert message.startswith("Error: ")
    assert contents(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_configurations_that_are_none(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "syntax.yaml").write_text("a: [")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name, part in {
        "none": "no configuration file",
        "list": "a list",
        "empty": "nothing",
        "syntax": "syntax.yaml:1:5",
        "binary": "cannot be read",
    }.items():
        for command in ("train", "check"):
            assert part in refused(command, tmp_path / f"{name}.yaml")
    assert "cannot be read" in refused("train", tmp_path)


def test_an_existing_run_is_refused_and_untouched(refused: Any, tmp_path: Path) -> None:
    folder = trained(tmp_path)
    path = write(tmp_path / "c.yaml")
    before = contents(folder.root)
    assert "--overwrite" in refused("train", path)
    assert "attack.eps" in refused("train", path, "attack.eps=0.3", "--resume")
    assert "train.epoch" in refused("train", path, "train.epoch=3", "--overwrite")
    assert "hiden" in refused("train", path, "model.options={hiden: 3}", "--overwrite")
    folder.last.write_bytes(folder.last.read_bytes()[:-200])
    damaged = contents(folder.root)
    assert "damaged" in refused("train", path, "--resume")
    assert contents(folder.root) == damaged
    assert {k for k in before if before[k] != damaged[k]} == {"checkpoints/last.pt"}


def test_a_run_that_diverges_exits_with_one(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", optimizer={"name": "sgd", "lr": 1e30, "weight_decay": 0})
    ran = run("train", path)
    assert ran.code == 1
    assert ran.err.startswith("Stopped: ")
    assert "epoch 1, step" in ran.err
    assert "optimizer.lr" in ran.err


def test_an_interrupt_is_told_without_a_traceback(
    run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robustflat.train.train", interrupt)
    ran = run("train", write(tmp_path / "c.yaml"))
    assert ran.code == 130
    assert "--resume" in ran.err


# --- check, list, help


def test_check(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml")
    ran = run("check", path, "weights.gamma=0.5")
    assert ran.code == 0, ran.err
    for part in (
        "60 train, 40 validation, 40 test",
        "1x8x8, 10 classes",
        # 64 x 16 + 16, 16 x 10 + 10, of which AWP moves the matrices.
        "1,210 parameters",
        "2 tensors, 1,184",
        "AT + awp(gamma=0.5)",
        "2 epochs of 4",
    ):
        assert part in ran.out, part
    assert not (tmp_path / "run").exists()


def test_every_configuration_of_the_repository_is_valid() -> None:
    from robustflat.config import read_config

    # Grids of studies hold no single run.
    found = [
        path
        for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml")
        if "grid" not in yaml.safe_load(path.read_text())
    ]
    assert found
    names = [read_config(path).name for path in found]
    assert len(set(names)) == len(names)


def test_list(run: Any, refused: Any) -> None:
    ran = run("list")
    assert ran.code == 0
    for name in ("awp", "trades", "one_cycle", "mnist5k", "wide_resnet", "row_norm", "adamw"):
        assert f"  {name}" in ran.out
    only = run("list", "objective").out
    assert only.splitlines()[0] == "objective:"
    assert "  mart " in only
    assert "    mart(beta=6)" in only
    assert "awp" not in only
    assert "Kinds: weights" in refused("list", "nothing")


def test_what_is_listed_can_be_used(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml")
    for kind in ("schedule", "optimizer"):
        listed = run("list", kind).out.splitlines()[1:]
        names = [line.split()[0] for line in listed if line[:3].strip()]
        assert len(names) > 5
        for name in names:
            if ":" not in name and name != "muon":  # which takes matrices only
                assert run("check", path, f"{kind}={{name: {name}}}").code == 0


def test_usage(run: Any) -> None:
    assert run("--help").code == 0
    for command in ("train", "check", "list", "evaluate", "flatness", "compare"):
        assert command in run("--help").out
        ran = run(command, "--help")
        assert ran.code == 0
        assert "Usage" in ran.out
    for wrong in (("trian",), ("train",), ("train", "c.yaml", "--resum"), ("compare",)):
        assert run(*wrong).code == 2


def test_the_module_starts() -> None:
    out, err = (process := python("-m", "robustflat", "--help")).communicate(timeout=60)
    assert process.returncode == 0, err
    assert "train" in out


# --- evaluate


def test_evaluate_writes_what_it_says(run: Any, fresh: RunFolder) -> None:
    ran = run("evaluate", fresh.root, "--checkpoint", "both", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "pgd-5" in ran.out
    assert "run: robust-generalization gap, pgd-20" in ran.out
    assert "best - last" in ran.out
    content = json.loads(fresh.evaluation.read_text())
    assert list(content) == ["format", "subject", "measurements"]
    assert content["subject"] == "run"
    report = evaluation_of(content["measurements"])
    assert (report["norm"], report["eps"]) == ("linf", 0.1)
    for one in content["measurements"]:
        # A figure carries its circumstances.
        for key in ("checkpoint", "weights", "norm", "eps", "data", "samples", "seed",
                    "batch_size", "device", "versions"):  # fmt: skip
            assert key in one, (one["kind"], key)
        assert one["versions"]["pyautoattack"]
    log = (fresh.root / "evaluate.log").read_text()
    for said in (log, ran.err):
        assert "At most 14 forward-pass equivalents for each of" in said
        assert re.search(r"pgd-5: \d+\.\d\d % of 40 left after \d+ s", said)
        assert "gap of last, train:" in said
    best = saved(fresh.best)["epoch"]
    for name, epoch in (("best", best), ("last", 3)):
        entry = report["checkpoints"][name]
        assert entry["epoch"] == epoch
        assert entry["weights"] == "average"
        test = entry["test"]
        assert test["count"] == 40
        assert 0 <= test["robust_accuracy"] <= test["clean_accuracy"] <= 1
        assert test["attacks"]["pgd-5"]["attacked"] == round(40 * test["clean_accuracy"])
        assert set(entry["gap"]["gaps"]) == {"train-validation", "train-test"}
        assert entry["gap"]["counts"] == {"train": 30, "validation": 30, "test": 30}
        gaps = entry["gap"]["gaps"]["train-test"]["robust_accuracy"]
        splits = entry["gap"]["splits"]
        assert gaps["value"] == pytest.approx(
            splits["train"]["robust_accuracy"]["value"] - splits["test"]["robust_accuracy"]["value"]
        )
    robust = [
        report["checkpoints"][name]["gap"]["splits"]["test"]["robust_accuracy"]["value"]
        for name in ("best", "last")
    ]
    assert report["overfitting"]["robust_accuracy"]["value"] == pytest.approx(robust[0] - robust[1])


def test_the_evaluated_accuracy_is_that_of_the_weights(run: Any, fresh: RunFolder) -> None:
    from robustflat.train.setup import build_model, load_data

    for which, key in (("raw", "model"), ("average", "average_model")):
        assert (
            run("evaluate", fresh.root, "--checkpoint", "last", "--weights", which,
                "--samples", 30, "--attack", "pgd-2", "--norm", "linf", "--eps", "1/100").code == 0
        )  # fmt: skip
        report = evaluation_of(json.loads(fresh.evaluation.read_text())["measurements"])
        entry = report["checkpoints"]["last"]
        assert report["eps"] == 0.01
        assert entry["weights"] == which
        assert report["checkpoints"]["best"]["test"] is None
        settings = fresh.read_config()
        dataset = load_data(settings)
        model = build_model(settings, dataset, torch.device("cpu")).eval()
        model.load_state_dict(saved(fresh.last)[key])
        x, y = dataset.test.tensors(30)
        right = int((model(x).argmax(1) == y).sum())
        assert entry["test"]["clean_accuracy"] == right / 30


BAD_EVALUATE: dict[str, tuple[list[str], str]] = {
    "attack": (["--attack", "pdg-5"], "pdg-5"),
    "checkpoint": (["--checkpoint", "first"], "best"),
    "weights": (["--weights", "mean"], "average"),
    "eps": (["--norm", "linf", "--eps", "eight"], "--eps"),
    "eps nan": (["--norm", "linf", "--eps", "nan"], "--eps"),
    "eps over zero": (["--norm", "linf", "--eps", "8/0"], "--eps"),
    "negative eps": (["--norm", "linf", "--eps=-0.1"], "eps"),
    "norm": (["--norm", "l7", "--eps", "1"], "norm"),
    "norm without eps": (["--norm", "l2"], "both, or neither"),
    "eps without norm": (["--eps", "1"], "both, or neither"),
    "data": (["--data", "digit"], "Did you mean 'digits'"),
    "root": (["--root", "data"], "leave --root out"),
    "trust": (["--trust"], "leave --trust out"),
    "model": (["--model", "mlp"], "leave --model out"),
    "option": (["--model-option", "mean=0"], "leave --model-option out"),
    "normalise": (["--normalise", "none"], "leave --normalise out"),
    "merge and shard": (["--merge", "--shard", "1/2"], "leave --shard out"),
    "merge of nothing": (["--merge"], "no shards"),
    "negative gap": (["--gap-samples=-3"], "gap-samples"),
    "precision": (["--precision", "fp8"], "fp32, bf16"),
    "too many steps": (["--attack", f"pgd-1{'0' * 400}"], "cannot be made"),
    "output of several": (["other", "--output", "o"], "home of one subject"),
    "shard": (["--shard", "3/2"], "shard"),
    "no shard": (["--shard", "half"], "shard"),
    "samples": (["--samples", "0"], "samples"),
    "negative samples": (["--samples=-3"], "samples"),
    "seed": (["--seed=-1"], "eed"),
    "device": (["--device", "cuda:63"], "cuda:63"),
    "second target": ([".", "--attack", "pgd-1"], "not the folder of a run"),
}


@pytest.mark.parametrize("case", BAD_EVALUATE)
def test_mistakes_in_evaluate(refused: Any, evaluated: RunFolder, case: str) -> None:
    arguments, part = BAD_EVALUATE[case]
    before = contents(evaluated.root)
    assert part in refused("evaluate", evaluated.root, *arguments)
    assert contents(evaluated.root) == before


def test_runs_that_cannot_be_evaluated(refused: Any, tmp_path: Path) -> None:
    assert "does not exist" in refused("evaluate", tmp_path / "none")
    assert "not the folder of a run" in refused("evaluate", tmp_path)
    for damage in ("missing", "cut", "hostile", "edited"):
        folder = trained(tmp_path, name=damage)
        if damage == "missing":
            folder.best.unlink()
            folder.last.unlink()
        elif damage == "cut":
            folder.best.write_bytes(folder.best.read_bytes()[:500])
        elif damage == "hostile":
            torch.save({"format": 1, "model": run_module_hook}, folder.best)
        else:
            settings = values(output=str(tmp_path), name=damage, model=SMALL_CNN)
            folder.config_file.write_text(yaml.safe_dump(settings))
        message = refused("evaluate", folder.root, "--attack", "pgd-2")
        assert str(folder.root) in message, damage
        assert not folder.evaluation.exists()


def run_module_hook() -> None:
    """Stands in a pickle, and must not be looked up."""


def test_a_run_without_the_checkpoint_asked_for(run: Any, refused: Any, tmp_path: Path) -> None:
    # Without validation there is no best: to attack nothing in silence would look like a success.
    folder = trained(tmp_path, monitor__every=0, data__validation_samples=0)
    message = refused("evaluate", folder.root, "--attack", "pgd-2")
    assert "best" in message
    assert "--checkpoint last" in message
    assert run("evaluate", folder.root, "--attack", "pgd-2", "--checkpoint", "last").code == 0
    report = evaluation_of(json.loads(folder.evaluation.read_text())["measurements"])
    assert list(report["checkpoints"]) == ["last"]
    assert report["overfitting"] is None


def test_a_run_without_attack_must_be_told_the_threat(
    run: Any, refused: Any, tmp_path: Path
) -> None:
    folder = trained(tmp_path, attack={"name": "none"}, objective={"name": "standard"})
    assert "--norm linf --eps 8/255" in refused("evaluate", folder.root, "--attack", "pgd-2")
    assert "--eps" in refused("evaluate", folder.root, "--attack", "pgd-2", "--norm", "l2")
    said = ("--attack", "pgd-2", "--norm", "l2", "--eps", "1/2")
    assert run("evaluate", folder.root, *said).code == 0
    found = json.loads(folder.evaluation.read_text())["measurements"]
    assert {(one["norm"], one["eps"]) for one in found} == {("l2", 0.5)}


# --- flatness


def test_flatness_writes_what_it_says(run: Any, fresh: RunFolder) -> None:
    ran = run("flatness", fresh.root, "--measure", "ascent_clean", "--measure", "average_clean",
              "--samples", 20, "--option", "radius=1/100")  # fmt: skip
    assert ran.code == 0, ran.err
    (report,) = json.loads(fresh.flatness.read_text())["measurements"]
    assert (report["norm"], report["eps"], report["options"]) == ("linf", 0.1, {"radius": 0.01})
    said = [line for line in ran.err.splitlines() if line.startswith("At most")]
    assert len(said) == 1, "what it costs is said once"
    assert (report["checkpoint"], report["epoch"], report["samples"]) == ("last", 3, 20)
    assert report["weights"] == "average"
    for name, figure in report["measures"].items():
        assert name in ran.out
        assert isinstance(figure["value"], float)
        assert {"value", "standard_error", "details"} <= set(figure)
    assert "ascent_clean" in report["measures"]


def test_flatness_on_another_split_with_another_attack_at_several_radii(
    run: Any, evaluated: RunFolder
) -> None:
    def measured(*arguments: object) -> list[dict[str, Any]]:
        ran = run("flatness", evaluated.root, "--measure", "worst_robust", "--measure",
                  "average_clean", "--samples", 12, *arguments)  # fmt: skip
        assert ran.code == 0, ran.err
        found: list[dict[str, Any]] = json.loads(evaluated.flatness.read_text())["measurements"]
        return found

    measured("--option", "steps=1")
    found = measured("--split", "test", "--attack", "pgd-3-2:margin", "--option", "steps=1",
                     "--option", "radius=[0.02, 1/25]")  # fmt: skip
    plain, other = found[-2:]
    assert (plain["split"], plain["attack"]) == ("train", "pgd-10-5")
    assert list(plain["measures"]) == ["worst_robust", "average_clean"]
    assert other["split"] == "test"
    # Whoever reads the names alone does not take one for the other.
    assert list(other["measures"]) == [
        f"{name} with {more}radius={radius}, split=test"
        for name, more in (("worst_robust", "attack=pgd-3-2:margin, "), ("average_clean", ""))
        for radius in ("0.02", "0.04")
    ]
    subject = open_subject(evaluated.root, device="cpu")
    attack = rf.pgd(eps=0.1, steps=3, restarts=2, loss="margin")
    (figure,) = rf.flatness(
        subject.network("last").model, subject.tensors("test", 12), ["worst_robust"], 0.1,
        seed=subject.seed, attack=attack, steps=1, radius=0.04,
    ).values()  # fmt: skip
    assert figure.value > 0
    name = "worst_robust with attack=pgd-3-2:margin, radius=0.04, split=test"
    assert other["measures"][name]["value"] == pytest.approx(figure.value, rel=1e-5)
    assert other["attack"] == "pgd-3-2:margin"
    seeded = measured("--seed", "7", "--option", "steps=1")[-1]
    assert list(seeded["measures"]) == [
        "worst_robust with seed=7", "average_clean with seed=7",
    ]  # fmt: skip
    (figure,) = rf.flatness(
        subject.network("last").model, subject.tensors("train", 12), ["average_clean"], 0.1, seed=7
    ).values()
    assert seeded["measures"]["average_clean with seed=7"]["value"] == figure.value
    assert seeded["seed"] == figure.details["settings"]["seed"] == 7


def test_a_measure_of_one_s_own(run: Any, evaluated: RunFolder, monkeypatch: Any) -> None:
    folder = evaluated.root.parent / "own"
    folder.mkdir()
    (folder / "own_measures.py").write_text(
        "from robustflat.flatness import Passes, measure\n"
        "@measure(cost=Passes(forward=2), uses=('steps',))\n"
        "def count(subject, options, loss, name):\n"
        '    """The number of images, times the steps."""\n'
        "    return len(subject) * options.steps\n"
    )
    monkeypatch.chdir(folder)
    name = "own_measures:count"
    ran = run("flatness", evaluated.root, "--measure", name, "--samples", 12,
              "--option", "steps=[2,5]")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "At most 4 forward-pass equivalents" in ran.err
    found = json.loads(evaluated.flatness.read_text())["measurements"][-1]["measures"]
    assert {key: figure["value"] for key, figure in found.items()} == {
        f"{name} with steps=2": 24, f"{name} with steps=5": 60,
    }  # fmt: skip
    x, y = torch.rand(7, 1, 8, 8), torch.zeros(7).long()
    model = open_subject(evaluated.root, device="cpu").network("last").model
    assert rf.flatness(model, (x, y), [name], steps=3)[name].value == 21


BAD_FLATNESS: dict[str, tuple[list[str], str]] = {
    "measure": (["--measure", "sharpnes"], "sharpnes"),
    "option": (["--option", "radiuss=1"], "radius"),
    "no option": (["--option", "radius"], "name=value"),
    "bad option": (
        ["--option", "radius=large"],
        "radius must be a number or a fraction such as 8/255 (got 'large')",
    ),
    "negative option": (["--option", "radius=-1"], "radius"),
    "attack as option": (["--option", "attack=pgd-20"], "--attack"),
    "seed as option": (["--option", "seed=3"], "no option 'seed'"),
    "idle option": (["--measure", "gradient_norm", "--option", "radius=0.3"], "nothing"),
    "empty sweep": (["--option", "radius=[]"], "at least one"),
    "both": (["--checkpoint", "both"], "last"),
    "weights": (["--weights", "mean"], "average"),
    "split": (["--split", "held-out"], "train, validation, test"),
    "attack": (["--measure", "worst_robust", "--attack", "autoattack"], "pgd-STEPS"),
    "sweep": (["--option", "radius=[0.1, -1]"], "radius"),
    "samples": (["--samples", "0"], "samples"),
    "negative samples": (["--samples=-3"], "samples"),
}


@pytest.mark.parametrize("case", BAD_FLATNESS)
def test_mistakes_in_flatness(refused: Any, evaluated: RunFolder, case: str) -> None:
    arguments, part = BAD_FLATNESS[case]
    before = contents(evaluated.root)
    assert part in refused("flatness", evaluated.root, *arguments)
    assert contents(evaluated.root) == before


# --- compare


def test_compare(run: Any, fresh: RunFolder, tmp_path: Path) -> None:
    run("evaluate", fresh.root, "--checkpoint", "both")
    said = ("--norm", "linf", "--eps", "1/100")
    run("evaluate", fresh.root, "--attack", "pgd-5", "--samples", 30, *said)
    ran = run("compare", fresh.root, fresh.root)
    assert ran.code == 0, ran.err
    written = ("--format", "json", "--output", tmp_path / "rows.json")
    assert run("compare", fresh.root, fresh.root, *written).code == 0
    table = json.loads((tmp_path / "rows.json").read_text())
    assert len(table) == 2
    assert "AT + awp(gamma=0.02)" in ran.out
    for column in ("clean", "pgd-5", "robust gap", "best - last"):
        assert column in ran.out
        # What was measured at both checkpoints and under several threats says so.
        assert any(name.startswith(column) for name in table[0]["cells"])
    assert any("best" in name and "linf 0.1" in name for name in table[0]["cells"])


def test_compare_sorts_groups_and_formats(run: Any, evaluated: RunFolder) -> None:
    ran = run("compare", evaluated.root, evaluated.root, "--group", "--format", "md")
    assert ran.code == 0, ran.err
    head, rule, *lines = ran.out.splitlines()
    assert head.startswith("| run | method | seeds | weights | clean")
    assert len(lines) == 1, "two runs of one setting"
    assert set(rule) <= set("| -:")
    ran = run("compare", evaluated.root, "--sort=-best - last", "--digits", 5)
    assert ran.code == 0, ran.err
    assert re.search(r"clean .*\d\.\d{3}%", ran.out)


def test_runs_that_cannot_be_compared(
    run: Any, refused: Any, evaluated: RunFolder, tmp_path: Path
) -> None:
    folder = trained(tmp_path)
    message = refused("compare", evaluated.root, folder.root)
    assert f"robustflat evaluate {folder.root}" in message
    assert "does not exist" in refused("compare", tmp_path / "none")
    for damaged in ("{", "[]", "{}", '{"checkpoints": 3}', '{"measurements": 3}', "\x00"):
        folder.evaluation.write_text(damaged)
        message = refused("compare", folder.root)
        assert str(folder.evaluation) in message
    folder.evaluation.unlink()
    folder.flatness.write_text('{"measures": {"a": 3}}')
    assert str(folder.flatness) in refused("compare", folder.root)
    folder.flatness.write_text('{"measurements": [{"kind": "flatness", "measures": {"a": 3}}]}')
    assert str(folder.root) in refused("compare", folder.root)
    nowhere = folder.flatness / "rows.json"  # a file, not a folder
    ran = run("compare", evaluated.root, "--format", "csv", "--output", nowhere)
    assert ran.code == 2
    assert "could not be written" in ran.err
    for wrong, said in (
        (("--output", "x"), "--output needs a --format"),
        (("--format", "xls"), "got 'xls'"),
        (("--format", "md", "--digits", "0"), "--digits"),
        (("--digits", "0"), "--digits"),
        (("--sort", "speed"), "names no figure"),
    ):
        assert said in refused("compare", evaluated.root, *wrong)
