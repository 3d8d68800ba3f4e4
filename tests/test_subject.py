"""Every kind of subject, with every option: either the effect or a sentence that refuses it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from evaluate_support import shorten
from PIL import Image
from torch import nn
from train_support import config, saved, trained

import robustflat as rf
from robustflat import models
from robustflat.cli import app, main
from robustflat.elsewhere import Elsewhere
from robustflat.errors import UserError
from robustflat.evaluate import Team
from robustflat.files import update_json
from robustflat.runs.evaluation import Wanted, evaluate_subject
from robustflat.runs.flatness import measure_subject
from robustflat.runs.records import evaluation_of, read
from robustflat.subject import open_subject

FACTORY = """
import torch
from robustflat import models
def make(num_classes, file):
    net = models.build("mlp", num_classes=num_classes, in_channels=1, mean=(0.0,), std=(1.0,),
                       image_size=(8, 8), options={"hidden": [16]}).net
    net.load_state_dict(torch.load(file))
    return net
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
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))

    def call(kind: str, *arguments: Any) -> tuple[int, str]:
        given = [*KINDS[kind], *(SAID if kind != "run" else []), "--device", "cpu"]
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
        code, said = run(kind, "--attack", "pgd-2", "--no-gap", "--output", tmp_path / kind)
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
        assert run(kind, "--attack", "pgd-2", "--no-gap", "--output", tmp_path / kind)[0] == 0
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


# An option, and for every kind of subject a test of its effect or words of its refusal.
EFFECTS: dict[str, tuple[list[str], Any]] = {
    "samples": (["--samples", "12"], lambda one: one["result"]["count"] == 12),
    "attack": (["--attack", "pgd-1"], lambda one: list(one["result"]["attacks"]) == ["pgd-1"]),
    "seed": (["--seed", "3"], lambda one: one["seed"] == 3),
    "precision": (
        ["--precision", "bf16"],
        lambda one: list(one["result"]["attacks"]) == ["pgd-2@bf16"],
    ),
    "threat": (
        ["--norm", "l2", "--eps", "1/2"],
        lambda one: (one["norm"], one["eps"]) == ("l2", 0.5),
    ),
    "component": (["--attack", "apgd-ce"], lambda one: "apgd-ce" in one["result"]["suites"]),
}
REFUSED_BY_MODELS = {
    "checkpoint": (["--checkpoint", "best"], "leave --checkpoint and --weights out"),
    "weights": (["--weights", "raw"], "leave --checkpoint and --weights out"),
}
REFUSED_BY_ALL = {
    "norm alone": (["--norm", "l2"], "both, or neither"),
    "shard": (["--shard", "3/2"], "i from 1 to n"),
    "merge": (["--merge"], "no shards"),
    "samples": (["--samples", "0"], "samples must be at least 1"),
    "attack": (["--attack", "pdg-20"], "Did you mean pgd-20"),
    "device": (["--device", "cuda:63"], "cuda:63"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_its_effect_on_every_kind(run: Any, tmp_path: Path, kind: str) -> None:
    base = ("--attack", "pgd-2", "--no-gap")
    for option, (arguments, holds) in EFFECTS.items():
        output = tmp_path / option
        more = [] if option in ("attack", "component") else base[:2]
        code, said = run(kind, *more, "--no-gap", "--output", output, *arguments)
        assert code == 0, (option, said)
        (one,) = attacked_in(output)
        assert holds(one), option
        assert (output / "evaluate.log").is_file()
    for part in ("1/2", "2/2"):
        code, said = run(kind, *base, "--samples", 30, "--output", tmp_path / "s", "--shard", part)
        assert code == 0, said
        assert not (tmp_path / "s" / "evaluation.json").exists()
    assert run(kind, *base, "--samples", 30, "--output", tmp_path / "s", "--merge")[0] == 0
    assert run(kind, *base, "--samples", 30, "--output", tmp_path / "w.json")[0] == 0
    (whole,) = read(tmp_path / "w.json", "evaluate")
    (joined,) = attacked_in(tmp_path / "s")
    assert joined["result"]["clean_accuracy"] == whole["result"]["clean_accuracy"]
    assert joined["result"]["count"] == 30
    if kind != "run":
        code, said = run(kind, *base[:2], "--gap-samples", 10, "--output", tmp_path / "g")
        assert code == 0, said
        assert [one["kind"] for one in read(tmp_path / "g" / "evaluation.json", "")] == [
            "test",
            "gap",
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    run: Any, tmp_path: Path, kind: str
) -> None:
    refusals = dict(REFUSED_BY_ALL)
    if kind == "run":
        for option in ("--data", "--root", "--model", "--model-option", "--normalise"):
            refusals[option] = ([option, "digits=1"], f"leave {option} out")
        refusals["--trust"] = (["--trust"], "leave --trust out")
        refusals.pop("norm alone")
        refusals["norm alone"] = (["--norm", "l2"], "both, or neither")
    else:
        refusals |= REFUSED_BY_MODELS
        refusals.pop("norm alone")
        refusals["option"] = (["--model-option", "mean"], "name=value")
    for option, (arguments, words) in refusals.items():
        output = tmp_path / option.replace("/", "")
        more = () if option == "attack" else ("--attack", "pgd-2")
        code, said = run(kind, *more, "--no-gap", "--output", output, *arguments)
        assert code == 2, (option, said)
        assert words in said, option
        assert not (output / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("target", "said", "words"),
    [
        ("nothing", Elsewhere(), "does not exist"),
        ("whole.pt", Elsewhere(), "name it with --model"),
        ("whole.pt", Elsewhere(model="mlp"), "say also --data, --norm, --eps"),
        ("mlp", Elsewhere(data="digits"), "say also --norm, --eps"),
        ("program.ts", Elsewhere(model="mlp", data="digits"), "leave it out"),
        ("a", Elsewhere(data="digits"), "leave --data out"),
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
        ("subject_factory:bare", {}, "--normalise none if it does"),
        ("program.ts", {"trust": True}, "--normalise none if it does"),
        ("program.ts", {"normalise": "none"}, "--trust"),
        ("net.pt", {"model": "mlp", "normalise": "1/2/3"}, "1 numbers each"),
        ("net.pt", {"model": "mlp", "normalise": "0.1,0.2/0.3"}, "1 numbers each"),
        ("net.pt", {"model": "mlp", "normalise": "none", "model_option": {"mean": 0}}, "no option"),
        ("whole.pt", {"model": "mlp", "normalise": "none", "model_option": {"hidden": [16]}},
         "holds its own"),
        ("torchvision.models:resnet18", {"normalise": "none"}, None),
        ("torchvision.models:resnet18", {"normalise": "none",
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
        classes = said.get("model_option", {}).get("num_classes", 1000)
        assert subject.network().model.fc.out_features == classes
        return
    with pytest.raises(UserError, match=words):
        subject.network()


def test_the_doubt_names_more_or_less_normalisation(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from robustflat.data import load

    digits = load("digits")
    x, y = digits.train.tensors()
    means = torch.stack([x[y == c].mean(0).flatten() for c in range(10)])

    def save_net(scale: float, shift: float, name: str) -> None:
        """The nearest mean, of pixels x that come as (x - shift) / scale."""
        net = models.build("mlp", num_classes=10, in_channels=1, mean=(0.0,), std=(1.0,),
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
    monkeypatch.setattr("robustflat.runs.evaluation.evaluate_subject", paid.append)
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
    decode = FileImages._decode
    monkeypatch.setattr(
        FileImages, "_decode", lambda self, path: (decoded.append(path), decode(self, path))[1]
    )
    subject = open_subject(folder.root, device="cpu")
    subject.network("last")
    assert not decoded, "nothing has been measured yet"
    evaluate_subject(subject, Wanted(attacks=["fgsm"], samples=6, gap_samples=0))
    assert len(set(decoded)) == 6
    assert all("test" in str(path) for path in decoded)
    evaluate_subject(subject, Wanted(attacks=["fgsm"], samples=6, gap_samples=4))
    assert len({path for path in decoded if "train" in str(path)}) == 8, "4 train, 4 validation"


def test_the_gap_is_kept_and_not_measured_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustflat.runs import evaluation

    subject = open_subject(place / "a", device="cpu", output=tmp_path)
    once = evaluate_subject(subject, Wanted(attacks=[]))
    calls: list[Any] = []
    scores = evaluation.scores
    monkeypatch.setattr(evaluation, "scores", lambda *a, **k: (calls.append(a), scores(*a, **k))[1])
    assert evaluate_subject(subject, Wanted(attacks=[])) == once
    assert not calls
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
    with pytest.raises(UserError, match="must be 1/1"):
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


def test_flatness_and_landscape_take_the_options_of_evaluate(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*KINDS["net"], *SAID, "--device", "cpu", "--samples", "10"]
    given += ["--measure", "gradient_norm"]
    monkeypatch.setattr(sys, "argv", ["robustflat", "flatness", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err
    (found,) = read(place / "evaluations" / "net.pt" / "flatness.json", "flatness")
    assert (found["checkpoint"], found["norm"], found["eps"]) == ("given", "linf", 0.1)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    names = {name: {p.name for p in commands[name].params} for name in commands}
    shared = {"targets", "norm", "eps", "device", "data", "root", "trust"}
    shared |= {"model", "model_option", "normalise", "image_size"}
    assert all(shared < names[name] for name in ("evaluate", "flatness", "landscape"))
