"""Finished runs read back: the right weights on the right images, and rows that say what was."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train_support import SMALL_CNN, config, evaluate_subject, saved, trained

import robustflat as rf
from robustflat.config import write_config
from robustflat.errors import UserError
from robustflat.evaluate.shown import Shown
from robustflat.report.tables import Comparison
from robustflat.runs import records
from robustflat.runs.comparison import Cell, columns, compare, limits
from robustflat.runs.description import describe, method_of
from robustflat.runs.evaluation import Wanted
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


def test_an_evaluation_keeps_a_few_images_and_what_they_are_taken_for(folder: RunFolder) -> None:
    said = evaluate_subject(open_subject(folder.root), Wanted(gap_samples=0, samples=20))
    said = said["checkpoints"]["best"]["test"]["examples"]
    shown = Shown.load(folder.outcomes / said["file"])
    assert shown is not None
    assert said["attack"] == "pgd-20"
    assert len(shown.x) == len(said["images"]) == 8
    assert len(set(shown.y.tolist())) == 8  # of as many classes
    x, y = load_data(folder.read_config()).test.tensors()
    places = [int((x == image).flatten(1).all(1).nonzero()[0]) for image in shown.x]
    assert y[places].tolist() == shown.y.tolist()
    difference = shown.x_adv - shown.x
    assert 0.09 < float(difference.abs().max()) <= 0.1 + 1e-6
    assert float(shown.x_adv.min()) >= 0
    assert float(shown.x_adv.max()) <= 1
    model = open_subject(folder.root, device="cpu").network("best", None).model
    with torch.no_grad():
        for key, images in (("clean", shown.x), ("attacked", shown.x_adv)):
            predicted = model(images).argmax(1)
            assert [str(int(c)) for c in predicted] == [image[key] for image in said["images"]]
            assert torch.equal(predicted, getattr(shown, key))
    assert [image["label"] for image in said["images"]] == [str(int(c)) for c in shown.y]


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
        (subject.tensors("train", 10**6), dataset.train.tensors()),
        (subject.tensors("train", 20), dataset.train.tensors(20)),
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
        return json.loads(json.dumps(report))

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


def test_flatness_is_measured_on_the_images_of_its_paper_or_those_that_are_said(
    folder: RunFolder, tmp_path: Path
) -> None:
    run = open_subject(folder.root, device="cpu")
    run = replace(run, home=RunFolder(tmp_path / "home"))
    ask = {"samples": 20, "options": {"samples": 1, "radius": [0.5, 0.1]}}
    names = ["stutz2021_average", "average_clean"]
    found = measure_subject(run, names, **ask)["measures"]
    points = ("", "radius=0.1, ")
    preset = [f"stutz2021_average with examples=20, {p}samples=1" for p in points]
    assert set(found) == {
        *preset, "average_clean with radius=0.5", "average_clean with radius=0.1",
    }  # fmt: skip
    kept = {one["split"]: one for one in records.read(run.home.flatness, "flatness")}
    assert set(kept["test"]["measures"]) == set(preset)
    assert set(kept["train"]["measures"]) == set(found) - set(preset)
    # The figure is that of the test images.
    x, y = run.tensors("test", 20)
    alone = rf.flatness(
        run.network("last").model, (x, y), ["stutz2021_average"], run.the_threat().eps,
        run.the_threat().norm_name, run.seed, samples=1,
    )  # fmt: skip
    (figure,) = alone.values()
    assert found[preset[0]]["value"] == pytest.approx(figure.value)
    assert found[preset[0]]["details"]["settings"]["distribution"] == "sphere"
    # What is measured otherwise is added, under its own name; nothing is lost.
    more = measure_subject(run, ["stutz2021_average"], split="train", samples=20,
                           options={"samples": 1})  # fmt: skip
    (name,) = more["measures"]
    assert name == "stutz2021_average with examples=20, samples=1, split=train"
    measure_subject(run, ["average_clean"], samples=20, options={"examples": 10})
    measure_subject(run, ["pac_bayes"], samples=20, options={"steps": 1})
    entries = records.read(run.home.flatness, "flatness")
    assert len(entries) == 5
    bound = entries[-1]["measures"]["pac_bayes"]["details"]
    assert bound["train_size"] == len(run.images().train) > 20


def test_the_configuration_says_the_attack_of_robust_flatness(
    folder: RunFolder, tmp_path: Path
) -> None:
    """As --attack does, but that presets keep their own, and names tell only what is not usual."""
    run = open_subject(folder.root, device="cpu")
    said = run.flatness.model_copy(update={"attack": "pgd-1"})
    run = replace(run, home=RunFolder(tmp_path / "home"), flatness=said)
    steps = {"samples": 12, "options": {"steps": 1}}
    found = measure_subject(run, ["worst_robust", "stutz2021_worst"], **steps)["measures"]
    x, y = run.tensors("train", 12)
    (same,) = rf.flatness(
        run.network("last").model, (x, y), ["worst_robust"], 0.1, seed=run.seed, attack="pgd-1",
        steps=1,
    ).values()  # fmt: skip
    assert found["worst_robust"]["value"] == same.value
    assert "steps=1," in found["worst_robust"]["details"]["settings"]["attack"]
    (preset,) = (figure for name, figure in found.items() if name.startswith("stutz2021"))
    assert "steps=20," in preset["details"]["settings"]["attack"]
    entries = records.read(run.home.flatness, "flatness")
    assert [one["attack"] for one in entries] == ["pgd-1", None]
    # The same attack by name is the same measurement; another is none of the usual.
    again = measure_subject(run, ["worst_robust"], attack="pgd-1", **steps)
    assert again["measures"] == {"worst_robust": again["measures"]["worst_robust"]}
    assert again["measures"]["worst_robust"]["value"] == same.value
    assert len(records.read(run.home.flatness, "flatness")) == 2
    other = measure_subject(run, ["worst_robust"], attack="pgd-2", **steps)["measures"]
    assert other["worst_robust with attack=pgd-2"]["value"] != same.value


def test_flatness_of_a_run_without_an_attack(tmp_path: Path) -> None:
    # The clean measures need no threat.
    plain = trained(tmp_path, attack={"name": "none"}, objective={"name": "standard"})
    report = measure_subject(open_subject(plain.root, device="cpu"), ["average_clean"], samples=20)
    assert report["measures"]["average_clean"]["value"] is not None


# --- comparing


def made(root: Path, *entries: dict[str, Any]) -> RunFolder:
    """The folder of a run with these measurements."""
    folder = RunFolder(root)
    root.mkdir(parents=True)
    weights = {"name": "awp", "gamma": "1/8"}
    write_config(config(root.parent, seed=3, weights=weights), folder.config_file)
    for path, kinds in (
        (folder.evaluation, ("test", "gap", "overfitting")),
        (folder.flatness, ("flatness",)),
    ):
        found = [entry for entry in entries if entry["kind"] in kinds]
        if found:
            path.write_text(json.dumps({"format": "x", "measurements": found}))
    return folder


COMMON = {
    "checkpoint": "last", "epoch": 2, "weights": "raw", "norm": "linf", "eps": 8 / 255,
    "data": "digits", "seed": 0, "attack": "pgd-20",
}  # fmt: skip


def figure(value: float | None) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - 0.01, value + 0.01)
    return {"value": value, "low": low, "high": high}


def attacked(robust: float = 0.5, count: int = 360, options: Any = None, **about: Any) -> Any:
    suites = {"pgd-20": robust, "autoattack": robust - 0.1}
    result = {
        "count": count, "clean_accuracy": 0.9, "clean_interval": [0.8, 0.95],
        "robust_accuracy": robust - 0.2, "robust_interval": [0.1, 0.5],
        "suites": {
            name: {
                "accuracy": share, "interval": [share - 0.1, share + 0.1],
                "attacks": [name] if name == "pgd-20" else ["apgd-ce", "square"],
            }
            for name, share in suites.items()
        },
        "attacks": {"pgd-20": {"options": {"steps": 20, **(options or {})}}},
        "warnings": [], "settings": {"labels": "abcdef0123"},
    }  # fmt: skip
    return {"kind": "test", **COMMON, "checkpoint": "best", **about, "result": result}


def gauged(robust: float = 0.3, loss: float | None = 0.4, train: int = 500, **about: Any) -> Any:
    gaps = {"train-test": {"robust_accuracy": figure(robust), "robust_loss": figure(loss)}}
    counts = {"train": train, "validation": 50, "test": 300}
    return {"kind": "gap", **COMMON, **about, "result": {"counts": counts, "gaps": gaps}}


def overfitted(robust: float = 0.05, **about: Any) -> Any:
    figures = {"robust_accuracy": figure(robust)}
    return {"kind": "overfitting", **COMMON, "count": 300, **about, "figures": figures}


def flat(name: str = "worst_robust", value: float = 0.25, about: Any = None, **details: Any) -> Any:
    details = {"loss": name.split("_")[1], "ball": "tensor", "radius": 0.1, **details}
    measure = {"value": value, "standard_error": 0.05, "details": details}
    measures = {name: measure, "none": {"value": None, "standard_error": None}}
    common = {**COMMON, "split": "train", "samples": 100, "attack": None}
    return {"kind": "flatness", **common, **(about or {}), "measures": measures}


def test_a_curve_and_corruptions_are_compared(tmp_path: Path) -> None:
    about = {"norm": "linf", "attack": "pgd-20", "samples": None}
    points = [
        {"eps": eps, "accuracy": share, "interval": [share - 0.1, share + 0.1]}
        for eps, share in ((0.0, 0.9), (0.25, 0.5))
    ]
    curve = {**COMMON, **about, "kind": "curve", "eps": 0.25,
             "result": {"count": 50, "points": points}}  # fmt: skip
    options = {"folder": "c", "corruptions": ["fog", "snow"]}
    spoilt = {"kind": "corruptions", **COMMON, "options": options,
              "result": {"count": 40, "mean_error": 0.25, "mce": 0.75}}  # fmt: skip
    few = {**spoilt, "options": {"folder": "c", "corruptions": ["fog"]}}
    one, two = RunFolder(tmp_path / "one"), made(tmp_path / "two", attacked())
    made(one.root, attacked())
    records.add(one.curves, "evaluate", "one", [curve])
    records.add(one.corruptions, "corruptions", "one", [spoilt])
    (first, second) = compare([one, two])
    assert set(first.cells) - set(second.cells) == {
        "over radii [linf 0]", "over radii [linf 0.25]", "corrupted", "mCE",
    }  # fmt: skip
    at = first.cells["over radii [linf 0.25]"]
    assert (at.value, at.low, at.high) == (0.5, 0.4, 0.6)
    assert first.cells["corrupted"] == Cell(0.75, metric="corrupted")
    assert first.cells["mCE"] == Cell(0.75, metric="mCE")
    # Of other corruptions the mean is another figure.
    records.add(two.corruptions, "corruptions", "two", [few])
    (first, second) = compare([one, two])
    assert "corrupted [corruptions fog, snow]" in first.cells
    assert "corrupted [corruptions fog]" in second.cells
    # A home in which nothing else was measured is one too.
    alone = RunFolder(tmp_path / "alone")
    records.add(alone.corruptions, "corruptions", "m", [{**spoilt, "checkpoint": "given"}])
    (row,) = compare([alone])
    assert row.cells["corrupted"].value == 0.75
    one._clear()
    assert not one.records


def test_a_worst_case_over_many_attacks_has_a_short_name_of_its_own(tmp_path: Path) -> None:
    test = attacked()
    for number in range(7):
        test["result"]["suites"][f"mine{number}"] = test["result"]["suites"]["pgd-20"]
    other = attacked()
    other["result"]["suites"] = {**test["result"]["suites"]}
    other["result"]["suites"]["yours"] = other["result"]["suites"].pop("mine6")
    rows = compare([made(tmp_path / "one", test), made(tmp_path / "two", other)])
    names = [next(n for n in row.cells if n.startswith("worst case")) for row in rows]
    assert names[0] != names[1]
    assert all(len(name) < 100 for name in names)
    assert "more (" in names[0]


def test_rows_say_what_the_files_say(tmp_path: Path) -> None:
    one = made(tmp_path / "one", attacked(), gauged(), gauged(0.1, checkpoint="best"),
               overfitted(), flat())  # fmt: skip
    two = made(tmp_path / "two", flat(value=0.125))
    rows = compare([one, two])
    cells = rows[0].cells
    assert (rows[0].run, rows[0].seeds, rows[0].weights) == ("one", (3,), "raw")
    assert rows[0].method == "AT + awp(gamma=0.125)"
    assert cells["clean"] == Cell(0.9, 0.8, 0.95, metric="clean")
    assert cells["pgd-20"] == Cell(0.5, pytest.approx(0.4), pytest.approx(0.6), metric="pgd-20")
    assert cells["AutoAttack"].value == pytest.approx(0.4)
    assert cells["worst case"].value == pytest.approx(0.3)
    assert cells["robust gap"].value == 0.3, "that of the last checkpoint"
    assert cells["best - last"].value == 0.05
    assert (cells["loss gap"].value, cells["loss gap"].unit) == (0.4, "")
    assert [cells[name].unit for name in ("clean", "robust gap")] == ["%", "pp"]
    low, high = pytest.approx(0.2), pytest.approx(0.3)
    assert cells["worst_robust"] == Cell(0.25, low, high, "", "worst_robust")
    assert cells["none"].value is None, "it was measured, and is not finite"
    assert set(rows[1].cells) == {"worst_robust", "none"}
    assert columns(rows) == ["clean", "pgd-20", "AutoAttack", "worst case", "robust gap",
                             "loss gap", "best - last", "worst_robust", "none"]  # fmt: skip
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    console.print(Comparison(rows))
    text = console.export_text()
    assert "90.0%" in text
    assert "0.250" in text


DIFFERENT: list[tuple[Any, Any, str]] = [
    (attacked(), attacked(norm="l2", eps=0.5), "pgd-20 [{}];linf 8/255;l2 0.5"),
    (attacked(), attacked(eps=0.1), "AutoAttack [{}];linf 8/255;linf 0.1"),
    (attacked(), attacked(count=100), "worst case [{}];360 images of digits;100 images of digits"),
    (attacked(), attacked(data="mnist5k"), "clean [{}];360 images of digits;360 images of mnist5k"),
    (attacked(), attacked(checkpoint="last"), "clean [{}];best;last"),
    (attacked(), attacked(seed=1), "pgd-20 [{}];seed 0;seed 1"),
    (attacked(options={"step_size": 0.1}), attacked(options={"step_size": 0.2}),
     "pgd-20 [{}];step size 0.1;step size 0.2"),
    (gauged(), gauged(eps=0.1), "robust gap [{}];linf 8/255;linf 0.1"),
    (gauged(), gauged(train=90),
     "loss gap [{} and 300 images of digits];500;90"),
    (gauged(), gauged(attack="pgd-50"), "robust gap [{}];pgd-20;pgd-50"),
    (overfitted(), overfitted(eps=0.1), "best - last [{}];linf 8/255;linf 0.1"),
    (flat(), flat(radius=0.2), "worst_robust [{}];radius 0.1;radius 0.2"),
    (flat(), flat(about={"samples": 7}), "worst_robust [{} train images of digits];100;7"),
    (flat(), flat(about={"split": "test"}),
     "worst_robust [100 {} images of digits];train;test"),
    (flat(), flat(about={"data": "mnist5k"}),
     "worst_robust [100 train images of {}];digits;mnist5k"),
    (flat(settings={"steps": 2, "seed": 0}), flat(settings={"steps": 9, "seed": 1}),
     "worst_robust [{}];steps 2;steps 9"),
    (flat(), flat(about={"attack": "pgd-50"}), "worst_robust [{}];of the measure;pgd-50"),
    (flat(settings={"normalise_logits": False}), flat(settings={"normalise_logits": True}),
     "worst_robust [{}];normalise logits False;normalise logits True"),
    (flat(), flat(about={"eps": 0.1}), "worst_robust [{}];linf 8/255;linf 0.1"),
    (flat(), flat(about={"checkpoint": "best"}), "worst_robust [{}];last;best"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "expected"), DIFFERENT)
def test_figures_of_different_circumstances_share_no_column(
    tmp_path: Path, one: Any, two: Any, expected: str
) -> None:
    pattern, *said = expected.split(";")
    rows = compare([made(tmp_path / "one", one), made(tmp_path / "two", two)])
    for row, words, other in zip(rows, said, said[::-1], strict=True):
        assert pattern.format(words) in row.cells
        assert pattern.format(other) not in row.cells
    # Within one run nothing is lost either.
    (row,) = compare([made(tmp_path / "both", one, two)])
    assert {pattern.format(words) for words in said} <= set(row.cells)


def test_limits_are_said_of_what_shares_no_column_and_only_of_that(tmp_path: Path) -> None:
    both = made(tmp_path / "both", attacked(), attacked(count=100), gauged())
    few = made(tmp_path / "few", attacked(count=100), gauged())
    none = made(tmp_path / "none", gauged(), flat())
    assert limits([both, few]) == [], "they have a column of 100 images each"
    assert limits([both, none]) == [], "what was not measured is no other circumstance"
    other = made(tmp_path / "other", attacked(count=7, eps=0.1))
    said = limits([few, other, both])
    images = "few: 100 images of digits; other: 7 images of digits; both: 360 images of digits and "
    images += "100 images of digits"
    figures = "clean, pgd-20, AutoAttack, worst case"
    threats = "few: linf 8/255; other: linf 0.1; both: linf 8/255"
    beside = "so not to be compared"
    assert said == [
        f"Not of the same images ({images}), {beside}: {figures}.",
        f"Not of the same threat ({threats}), {beside}: pgd-20, AutoAttack, worst case.",
    ]


def test_sentences_call_measures_as_people_do(tmp_path: Path) -> None:
    one = made(tmp_path / "one", flat(value=0.25))
    two = made(tmp_path / "two", flat(value=0.125, radius=0.2))
    (said,) = limits([one, two])
    assert said == (
        "Not of the same radius (one: radius 0.1; two: radius 0.2), so not to be compared: worst "
        "robust."
    )


def test_figures_of_attacks_come_first_whenever_they_were_measured(tmp_path: Path) -> None:
    folder = made(tmp_path / "one", overfitted(), gauged(), attacked(), flat())
    wanted = ["clean", "pgd-20", "AutoAttack", "worst case", "robust gap", "loss gap",
              "best - last", "worst_robust", "none"]  # fmt: skip
    assert columns(compare([folder])) == wanted


def test_images_of_one_number_are_told_apart_by_a_mark(tmp_path: Path) -> None:
    one, two = attacked(), attacked()
    two["result"]["settings"] = {"labels": "ffffff0000"}
    rows = compare([made(tmp_path / "one", one), made(tmp_path / "two", two)])
    assert "clean [fingerprint -abcdef]" in rows[0].cells
    assert "clean [fingerprint -ffffff]" in rows[1].cells


def test_what_does_not_concern_a_figure_does_not_part_it(tmp_path: Path) -> None:
    one = made(tmp_path / "one", attacked(), flat("worst_clean"))
    two = made(tmp_path / "two", attacked(eps=0.1), flat("worst_clean", about={"eps": 0.1}))
    rows = compare([one, two])
    assert "clean" in rows[0].cells
    assert "worst_clean" in rows[1].cells


def test_raw_and_averaged_weights_are_told_apart(tmp_path: Path) -> None:
    raw, average = attacked(), attacked(0.6, weights="average")
    rows = compare([made(tmp_path / "one", raw), made(tmp_path / "two", average)])
    # Which weights a run has belongs to its method ...
    assert [row.weights for row in rows] == ["raw", "average"]
    assert all("pgd-20" in row.cells for row in rows)
    # ... unless it was measured at both.
    (row,) = compare([made(tmp_path / "both", raw, average)])
    assert row.cells["pgd-20 [raw]"].value == 0.5
    assert row.cells["pgd-20 [average]"].value == 0.6


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [made(tmp_path / place / "run", attacked()) for place in ("a", "b")]
    assert [row.run for row in compare(folders)] == ["a/run", "b/run"]


def test_a_gap_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    # An infinite robust loss is null in JSON.
    rows = compare([made(tmp_path / "one", gauged(loss=None))])
    assert "loss gap" not in rows[0].cells
    console = Console(width=200, quiet=True)
    console.print(Comparison(rows))


# --- records


def test_records_are_added_to_and_replace_only_their_own(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    first = [attacked(), gauged(), overfitted()]
    records.add(path, "evaluate", "run", first)
    others = [
        attacked(checkpoint="last"), attacked(eps=0.1), attacked(norm="l2"), attacked(seed=1),
        attacked(samples=7), attacked(weights="average"), attacked(data="mnist5k"),
        gauged(attack="pgd-50"), gauged(eps=0.1), overfitted(samples=7),
    ]  # fmt: skip
    for one in others:
        records.add(path, "evaluate", "run", [one])
    assert records.read(path, "evaluate") == [*first, *others]
    # The same measurement again, of a run that has been trained further.
    again = attacked(0.7, epoch=9)
    records.add(path, "evaluate", "run", [again])
    assert records.read(path, "evaluate") == [*first[1:], *others, again]


def test_flatness_is_added_measure_by_measure(tmp_path: Path) -> None:
    path = tmp_path / "flatness.json"
    for one in (flat("worst_robust", 1.0), flat("worst_clean", 2.0), flat("worst_robust", 3.0)):
        records.add(path, "flatness", "run", [one])
    (found,) = records.read(path, "flatness")
    values = {name: figure["value"] for name, figure in found["measures"].items()}
    assert values == {"worst_robust": 3.0, "worst_clean": 2.0, "none": None}
    for about in ({"samples": 7}, {"checkpoint": "best"}, {"options": {"radius": 1}}):
        records.add(path, "flatness", "run", [flat(about=about)])
    assert len(records.read(path, "flatness")) == 4
    # Of another state of the network nothing old is kept.
    records.add(path, "flatness", "run", [flat("worst_clean", 5.0, about={"epoch": 8})])
    newest = records.flatness_of(records.read(path, "flatness"))
    assert newest is not None
    assert set(newest["measures"]) == {"worst_clean", "none"}


def test_the_newest_evaluation_is_of_one_threat_and_one_state() -> None:
    found = records.evaluation_of(
        [attacked(eps=0.1), gauged(0.2, eps=0.1), attacked(0.4), gauged(), overfitted()]
    )
    assert found is not None
    assert (found["norm"], found["eps"], found["gap_attack"]) == ("linf", 8 / 255, "pgd-20")
    assert list(found["checkpoints"]) == ["best", "last"]
    assert found["checkpoints"]["best"]["test"]["robust_accuracy"] == pytest.approx(0.2)
    assert found["checkpoints"]["best"]["gap"] is None
    assert found["overfitting"]["robust_accuracy"]["value"] == 0.05
    # Another epoch's figures are not this one's.
    later = records.evaluation_of([gauged(), attacked(checkpoint="last", epoch=9)])
    assert later is not None
    assert later["checkpoints"]["last"]["gap"] is None
    assert records.evaluation_of([]) is None


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
