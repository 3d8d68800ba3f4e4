"""Studies: grids and their errors, runs on executors, kill and resume, ledger, tables, pictures."""

from __future__ import annotations

import csv
import json
import math
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from forked import forked
from scipy.stats import kendalltau
from train_support import differences, rows, saved, trained, values
from typer.testing import CliRunner

import robustflat
from robustflat.cli import app
from robustflat.config import ConfigError
from robustflat.errors import UserError
from robustflat.files import locked, write_json
from robustflat.report import paper
from robustflat.report.study_figures import ranking_table, save_plots, save_tables, scatter
from robustflat.study import Event, StudyConfig, StudyResult, read_study, run_study, status
from robustflat.study.engine import Local, Order, Outcome, Processes, _visible_device, run_all
from robustflat.study.folder import RunFiles, StudyFolder, circumstances, job_of
from robustflat.study.grid import Point, expand, size
from robustflat.study.ledger import Ledger, ledger, save_ledger
from robustflat.study.ranking import Estimate
from robustflat.study.reading import check_study
from robustflat.study.result import Failure, RunResult, rank_all
from robustflat.study.row import _measures, work
from robustflat.study.targets import TARGETS, figures
from robustflat.subject import Subject, open_subject
from robustflat.train.folder import RunFolder

WEIGHTS = [{"name": "none"}, {"name": "awp", "gamma": 0.02}]


def study_values(output: Path | str = "unused", **changes: Any) -> dict[str, Any]:
    base = values(
        train={"epochs": 12, "batch_size": 16},
        listeners=[],
        evaluate={"gap_samples": 20},
        flatness={"samples": 16, "options": {"steps": 2}},
    )
    base |= {"optimizer": {"name": "sgd"}}
    del base["name"], base["weights"]
    found = {
        "name": "tiny",
        "output": str(output),
        "base": base,
        "grid": {"weights": WEIGHTS, "seed": [0]},
        "measures": ["worst_clean", "distance_frobenius"],
        "attack": "pgd-2",
    }
    return found | changes


def study(output: Path | str = "unused", **changes: Any) -> StudyConfig:
    return check_study(study_values(output, **changes))


# The grid


def test_the_grid_names_runs_by_their_factors() -> None:
    found = expand(study("out", grid={"weights": WEIGHTS, "seed": [0, 3]}))
    assert [p.name for p in found] == [
        "none-seed0",
        "none-seed3",
        "awp-strength0.02-seed0",
        "awp-strength0.02-seed3",
    ]
    assert found[2].factors == {"method": "awp", "strength": 0.02, "seed": 0}
    assert found[0].factors == {"method": "none", "strength": None, "seed": 0}
    for point in found:
        assert point.config.name == point.name
        assert point.config.seed == point.factors["seed"]
        assert point.config.threads == 1
        assert point.config.output == str(Path("out/tiny/runs"))
    assert found[3].config.weights.name == "awp"
    ends = [{"name": "awp", "gamma": gamma} for gamma in (1e38, 1e-38)]
    names = [p.name for p in expand(study(grid={"weights": ends}))]
    assert names == ["awp-strength1e38", "awp-strength1e-38"]
    assert study().nesting() == {"strength": "method"}


def test_paths_below_a_mapping_and_named_factors() -> None:
    grid = {"weights": WEIGHTS[1:], "weights.steps": [1, 2], "optimizer.lr": ["1/8", 0.25]}
    factors = {"steps": "weights.steps", "lr": ["nowhere", "optimizer.lr"]}
    chosen = study(grid=grid, factors=factors)
    assert [p.factors for p in expand(chosen)] == [
        {"steps": s, "lr": lr} for s in (1, 2) for lr in (0.125, 0.25)
    ]
    assert chosen.nesting() == {}
    alike = {"weights": [*WEIGHTS, {"name": "awp", "gamma": 0.02, "steps": 2}]}
    with pytest.raises(ConfigError, match=r"all factors \(method, strength\) are the same"):
        expand(study(grid=alike))
    with pytest.raises(ConfigError, match=r"factors\.x: no run has weights\.stops"):
        expand(study(factors={"x": "weights.stops", "s": "seed", "m": "weights.name"}))


def test_the_base_can_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    content = study_values(base="../run.yaml")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**study_values()["base"], "name": "other"}))
    path = tmp_path / "sub" / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    found = read_study(path, ["base.train.epochs=7", "name=renamed", "grid.seed=[4]"])
    assert found.name == "renamed"
    assert [p.config.train.epochs for p in expand(found)] == [7, 7]
    with pytest.raises(ConfigError, match=r"no configuration file .*the base of"):
        read_study(path, ["base=gone.yaml"])


def test_all_mistakes_of_a_study_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "name: s\nbase: 3\ngrid: {seed: []}\nmesures: [worst_clean]\n"
        "measures:\n  - worst_clean\n  - worst_clear\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_study(path)
    text = str(caught.value)
    assert "4 problems" in text
    assert f"{path}:2:1: base must be the path" in text
    assert f"{path}:3:8: grid.0.seed" in text
    assert f"{path}:4:1: mesures is not a known key" in text
    assert "Did you mean 'measures'?" in text
    assert f"{path}:7:5: measures.1: There is no flatness measure 'worst_clear'" in text


def test_bad_grid_points_are_listed_with_their_places(tmp_path: Path) -> None:
    content = study_values()
    content["grid"] = {
        "weights": [*WEIGHTS, {"name": "awp", "gamma": -1}, {"name": "sum", "rho": 1}],
        "attack.steps": [1, 0],
        "seed": [0, 1],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    lines = path.read_text().splitlines()
    with pytest.raises(ConfigError) as caught:
        read_study(path)
    text = str(caught.value)
    assert "12 of 16 grid points" in text
    gamma = next(i for i, line in enumerate(lines) if "gamma: -1" in line) + 1
    assert f"{path}:{gamma}:" in text
    assert "weights.gamma: " in text
    assert "weights.name is unknown (got 'sum'). Did you mean 'sam'?" in text
    named = [line.rpartition(" [")[2] for line in text.splitlines()[1:]]
    assert sorted(named) == [
        "attack.steps=0]",
        "weights=awp gamma=-1]",
        "weights=sum rho=1]",
    ]
    content["grid"] = {"attack.steps": [0], "seed": [0, 1]}
    content["base"]["weights"] = WEIGHTS[0]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"2 of 2 grid points(.|\n)*\[all grid points\]"):
        read_study(path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": {"name": ["a"]}}, "grid.name cannot be varied"),
        ({"grid": {"output": ["a"]}}, "grid.output cannot be varied"),
        ({"grid": {}}, "grid"),
        ({"measures": []}, "measures"),
        ({"measures": ["worst_clean", "worst_clean"]}, "names worst_clean twice"),
        ({"targets": ["robust_accuracy"]}, "Did you mean 'gap_robust_accuracy'"),
        ({"targets": ["attacked_accuracy"]}, "which nothing measures"),
        ({"attack": "fgsm"}, "attack"),
        ({"grid": {"optimizer.name, optimizer.lr": [["sgd", 1], ["adamw"]]}}, "lists of 2 values"),
        ({"nested": {"strength": "lr"}}, "both must be factors"),
        ({"nested": {"seed": "method", "method": "seed"}}, "nested in itself"),
    ],
)
def test_bad_studies_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        study(**changes)


def test_only_what_curvlinops_does_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The density is by Lanczos of our own; two estimators of the trace are not."""
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    assert expand(study(measures=["hessian_density", "hessian_trace"]))
    with pytest.raises(ConfigError, match=r"needs the package curvlinops.*robustflat\[curvature\]"):
        expand(
            study(
                measures=["hessian_trace"],
                grid={"weights": WEIGHTS, "flatness.options": [{"estimator": "xtrace"}]},
            )
        )


def test_what_could_not_be_measured_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"no option 'stps'.*all grid points"):
        expand(study(grid={"weights": WEIGHTS, "flatness.options": [{"stps": 3}]}))
    standard = {"attack": [{"name": "none"}], "objective": [{"name": "standard"}]}
    with pytest.raises(ConfigError, match="attack is none, so there is no norm"):
        expand(study(grid={"weights": WEIGHTS, **standard}))
    with pytest.raises(ConfigError, match=r"weights\.gamma\.x goes below weights\.gamma"):
        expand(study(grid={"weights": WEIGHTS[1:], "weights.gamma.x": [1]}))


def test_every_point_s_own_measures_are_judged() -> None:
    grid = {"flatness.options": [{"steps": 2}, {"stepz": 2}], "seed": [0, 1]}
    with pytest.raises(ConfigError, match=r"2 of 4 grid points(.|\n)*stepz"):
        expand(study(grid=grid, factors={"o": "flatness.options", "seed": "seed"}))
    # The same options, and no threat to measure them in.
    attacks = [{"name": "pgd", "eps": 0.1, "steps": 2}, {"name": "none"}]
    both = {
        "attack, objective": [
            [attacks[0], {"name": "adversarial"}],
            [attacks[1], {"name": "standard"}],
        ]
    }
    with pytest.raises(ConfigError, match=r"1 of 2 grid points(.|\n)*attack is none"):
        expand(study(grid=both, factors={"attack": "attack.name"}))


def test_a_list_of_blocks_is_their_union_and_a_key_of_several_paths_a_list() -> None:
    grid = [
        {"weights": WEIGHTS, "optimizer.name, optimizer.lr": [["sgd", 0.1], ["adamw", "1/1000"]]},
        {"weights": WEIGHTS[:1], "model.options.hidden": [[8], [16]], "train.epochs": [1]},
    ]
    chosen = study(grid=grid)
    assert size(chosen) == 4 + 2
    found = [(p.factors, p.config) for p in expand(chosen)]
    assert list(found[0][0]) == ["method", "strength", "epochs", "hidden", "name+lr"]
    assert [f["name+lr"] for f, _ in found] == ["sgd 0.1", "adamw 1/1000"] * 2 + ["sgd 0.1"] * 2
    assert [c.optimizer.lr for _, c in found] == [0.1, 0.001, 0.1, 0.001, 0.1, 0.1]
    assert [c.model.options["hidden"] for _, c in found][3:] == [[16], [8], [16]]
    assert [c.train.epochs for _, c in found] == [12, 12, 12, 12, 1, 1]
    assert len({p.name for p in expand(chosen)}) == 6
    assert [p.name for p in expand(chosen, limit=2)] == [p.name for p in expand(chosen)][:2]


def walked(**changes: Any) -> StudyConfig:
    grid = {
        "weights": [{"name": "none"}, *({"name": "awp", "gamma": g} for g in (0.01, 0.02))],
        "optimizer.lr": [0.1, 0.2, 0.3, 0.4],
        "train.batch_size": [8, 16],
        "train.epochs": [3],
        "seed": [0, 1],
    }
    return study(**{"grid": grid, "design": {"walks": 2}, **changes})


def test_walks_change_one_key_at_a_time_and_use_all_values_alike() -> None:
    chosen = walked()
    points = expand(chosen)
    # Two walks of a start and a change of each of the three keys that vary, with both seeds.
    assert len(points) == size(chosen) == 2 * 4 * 2
    assert [p.config.seed for p in points] == [0, 1] * 8
    levels = [(p.factors["strength"], p.factors["lr"], p.factors["batch_size"]) for p in points]
    assert levels[::2] == levels[1::2]
    assert len(set(levels)) == 8, "no combination comes twice"
    changed = []
    for walk in (levels[0:8:2], levels[8::2]):
        changes = [[key for key in range(3) if old[key] != new[key]] for old, new in pairwise(walk)]
        assert sorted(changes) == [[0], [1], [2]]
        changed.append(changes)
    # Starts and changes of two walks are four values of each key: all four of the second, once.
    rates = [levels[0][1], next(v[1] for v in levels[:8] if v[1] != levels[0][1])]
    rates += [levels[8][1], next(v[1] for v in levels[8:] if v[1] != levels[8][1])]
    assert sorted(rates) == [0.1, 0.2, 0.3, 0.4]
    assert expand(walked()) == points, "the same every time"
    assert expand(walked(design={"walks": 2, "seed": 1})) != points
    assert [p.name for p in expand(walked(design={"walks": 1}))] == [p.name for p in points[:8]]


def test_walks_without_seeds_and_too_many_of_them() -> None:
    grid = {"optimizer.lr": [0.1, 0.2, 0.3], "train.batch_size": [8, 16, 32, 64]}
    base = study_values()["base"] | {"weights": WEIGHTS[0]}
    few = study(grid=grid, base=base, design={"walks": 2})
    assert len({p.name for p in expand(few)}) == size(few) == 6
    with pytest.raises(UserError, match=r"too few combinations for design.walks = 9: after [23]"):
        expand(study(grid=grid, base=base, design={"walks": 9}))
    with pytest.raises(ConfigError, match=r"design walks through one mapping.*list of 2"):
        study(grid=[{"seed": [0]}, {"seed": [1]}], design={"walks": 1})
    with pytest.raises(ConfigError, match=r"design.walks"):
        study(design={"walks": 0})


def test_sections_are_called_as_the_grid_tells_them() -> None:
    objectives = [{"name": "adversarial"}, {"name": "trades", "beta": 3}]
    found = expand(
        study(
            grid={"objective": objectives, "seed": [0]},
            base=study_values()["base"] | {"weights": WEIGHTS[0]},
        )
    )
    assert [p.factors["objective"] for p in found] == ["adversarial", "trades beta=3"]
    assert [p.name for p in found] == ["adversarial-seed0", "trades-beta-3-seed0"]


def test_one_threat_is_measured_in() -> None:
    grid = {"weights": WEIGHTS[:1], "attack.eps": [0.1, 0.2]}
    with pytest.raises(ConfigError, match=r"different norms or eps.*all grid points"):
        expand(study(grid=grid))
    found = expand(study(grid=grid, threat={"norm": "l2", "eps": "1/2"}))
    assert [(p.config.attack.eps, p.threat.norm, p.threat.eps) for p in found] == [
        (0.1, "l2", 0.5),
        (0.2, "l2", 0.5),
    ]
    assert expand(study())[0].threat.eps == 0.1
    none = {"attack": [{"name": "none"}], "objective": [{"name": "standard"}]}
    (plain, _) = expand(
        study(grid={"weights": WEIGHTS, **none}, threat={"norm": "linf", "eps": 0.3})
    )
    assert plain.threat.eps == 0.3


CONFIGS = Path(__file__).parents[1] / "configs" / "study"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_run(path: Path) -> None:
    chosen = read_study(path)
    assert len(expand(chosen)) == size(chosen) > 10
    assert f"robustflat study configs/study/{path.name}" in path.read_text()


# Whole studies


def _run(path: Path) -> None:
    run_study(read_study(path), 1, yes=True)


def _row(job: Path) -> None:
    sys.exit(work(job))


@contextmanager
def forking() -> Iterator[None]:
    """Runs are done by processes that are forked, which takes a second of each and not five."""

    def process(self: Processes, order: Order, environment: dict[str, str]) -> Outcome:
        log = RunFiles.of_job(order.job).log
        found = forked(_row, order.job, said=log, **environment)
        found.join()
        return Outcome(code=found.exitcode, seconds=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "run", process)
        yield


NONE, AWP = "none-seed0", "awp-strength0.02-seed0"


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def timeless(result: StudyResult) -> list[dict[str, Any]]:
    """The ledger, but for the time that it took and where it lies."""
    found = ledger(result.runs, "")
    for row in found:
        assert row.pop("train_seconds") > 0
        assert row.pop("measure_seconds") > 0
        del row["config"]
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """Two runs at once, and one that cannot be trained."""
    output = tmp_path_factory.mktemp("whole")
    chosen = study(
        output, grid={"weights": [*WEIGHTS, {"name": "awp", "gamma": 1e38}], "seed": [0]}
    )
    events: list[Event] = []
    with pytest.raises(UserError, match=r"3 configurations .*interval needs at least 5"):
        run_study(chosen)
    seeds = study(output, grid={"weights": WEIGHTS, "seed": list(range(5))})
    with pytest.raises(UserError, match=r"2 configurations .seeds are none."):
        run_study(seeds)
    assert not StudyFolder(chosen).root.exists()
    with forking():
        result = run_study(chosen, 2, events.append, yes=True)
    assert sorted((e.run, e.state) for e in events) == [
        (AWP, "finished"),
        ("awp-strength1e38-seed0", "failed"),
        (NONE, "finished"),
    ]
    assert [(e.done, e.total) for e in events] == [(1, 3), (2, 3), (3, 3)]
    return result


def test_a_study_leaves_ordinary_runs_and_their_figures(uninterrupted: StudyResult) -> None:
    result = uninterrupted
    written = json.loads((result.folder / "study.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    for run in written["runs"]:
        assert RunFolder(result.folder / run["folder"]).last.is_file()
        targets = run["targets"]
        assert set(targets) == set(TARGETS) - {"attacked_accuracy"}
        model, images = _model_and_images(result.folder / run["folder"])
        tested = robustflat.evaluate(model, images, [robustflat.pgd("linf", 0.1, 2)], eps=0.1)
        assert targets["test_clean_accuracy"]["value"] == pytest.approx(tested.clean_accuracy)
        found = targets["test_robust_accuracy"]["value"]
        assert found == pytest.approx(tested.robust_accuracy, abs=0.051), "another random start"
        assert set(run["measures"]) == {"worst_clean", "distance_frobenius"}
        assert run["epoch"] == 12
        assert run["reached_loss"] is None
        assert run["passes"] > 0
        assert run["train_steps"] == 12 * math.ceil(60 / 16)
    ranking = written["rankings"]["gap_robust_loss"]["worst_clean"]
    x = [r.measure("worst_clean") for r in result.runs]
    gaps = [r.target("gap_robust_loss") for r in result.runs]
    assert ranking["tau"]["value"] == pytest.approx(kendalltau(x, gaps).statistic)
    assert ranking["granulated"]["axes"]["method"]["pairs"] == 1


def _model_and_images(folder: Path) -> tuple[Any, Any]:
    subject = open_subject(folder)
    return subject.network("last").model, subject.splits(20)["test"].tensors()


def measured_anew(
    result: StudyResult, chosen: StudyConfig, home: Path
) -> tuple[Subject, Point, dict[str, Any]]:
    """The first run of a study, measured as another study asks, with its parts elsewhere."""
    found = open_subject(result.folder / "runs" / NONE, device="cpu")
    subject, point = replace(found, home=RunFolder(home)), expand(chosen)[0]
    job = job_of(chosen, point)
    return subject, point, _measures(subject, subject.network("last"), job, point.config)[0]


def test_a_measure_that_is_said_in_two_ways_ends_no_row(
    uninterrupted: StudyResult, tmp_path: Path
) -> None:
    names = ["worst_clean with radius=0.1", "worst_clean with radius=0.10"]
    _, _, measured = measured_anew(uninterrupted, study(measures=names), tmp_path)
    first, second = (measured[name]["value"] for name in names)
    assert first == second > 0


def test_a_row_is_measured_with_the_attack_of_its_configuration(
    uninterrupted: StudyResult, tmp_path: Path
) -> None:
    base = study_values()["base"]
    base["flatness"] |= {"attack": "pgd-1"}
    chosen = study(base=base, measures=["worst_robust"])
    subject, point, measured = measured_anew(uninterrupted, chosen, tmp_path)
    network = subject.network("last")
    options = point.config.flatness.options
    data, threat = subject.tensors("train", 16), point.threat
    for attack, same in (("pgd-1", True), ("pgd-10-5", False)):
        (figure,) = robustflat.flatness(
            network.model, data, ["worst_robust"], threat.eps, threat.norm, point.config.seed,
            attack=attack, **options,
        ).values()  # fmt: skip
        assert (measured["worst_robust"]["value"] == figure.value) is same


def test_a_failure_is_told_with_its_last_lines_and_tried_again(uninterrupted: StudyResult) -> None:
    (failure,) = uninterrupted.failed
    assert failure.factors["strength"] == 1e38
    assert "ended with code 1. The last lines of" in failure.error
    assert "stopped being finite" in failure.error
    assert uninterrupted.to_dict()["complete"] is False
    chosen = uninterrupted.study
    assert [(s.run, s.state) for s in status(chosen)] == [
        (NONE, "done"),
        (AWP, "done"),
        (failure.run, "failed"),
    ]
    # Repeated with what can be trained alone, everything is kept.
    events: list[Event] = []
    before = {p: p.read_bytes() for p in uninterrupted.folder.iterdir() if p.is_file()}
    narrower = study(chosen.output)
    try:
        again = run_study(narrower, 1, events.append, yes=True)
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    assert [(e.run, e.state, e.done) for e in events] == [(NONE, "kept", 1), (AWP, "kept", 2)]
    assert timeless(again) == timeless(uninterrupted)


def test_a_killed_study_goes_on_to_the_same_bits(
    tmp_path: Path, uninterrupted: StudyResult
) -> None:
    path = tmp_path / "study.yaml"
    alone = {"weights": WEIGHTS[1:], "seed": [0]}
    path.write_text(yaml.safe_dump(study_values(tmp_path, grid=alone), sort_keys=True))
    files = RunFiles(tmp_path / "tiny" / "runs", AWP)
    command = forked(_run, path, said=tmp_path / "said")
    try:
        until(files.begun)
        (child,) = psutil.Process(command.pid).children()
        child.suspend()
        assert 0 < len(files.folder.metrics()) < 12, "in the middle of its training"
        assert [(s.run, s.state) for s in status(read_study(path))] == [(AWP, "at work")]
        with pytest.raises(UserError, match="Another process is at work on"):
            run_study(read_study(path), yes=True)
    finally:
        command.kill()
        command.join()
        child.resume()
    # Nobody told the run's process: it ends by itself, for its pipe is closed.
    child.wait(60)
    assert not files.row.exists()
    assert [(s.run, s.state) for s in status(read_study(path))] == [(AWP, "begun")]

    events: list[Event] = []
    with forking():
        result = run_study(study(tmp_path, grid=alone), 1, events.append, yes=True)
    assert [(e.run, e.state) for e in events] == [(AWP, "finished")]
    assert files.log.read_text().count(f"training {AWP}") == 2
    assert timeless(result) == timeless(uninterrupted)[1:]
    for run in result.runs:
        here, there = (r.folder / "runs" / run.run for r in (result, uninterrupted))
        left, right = (saved(f / "checkpoints" / "last.pt") for f in (here, there))
        assert differences(left["model"], right["model"]) == []
        assert differences(left["optimizer"], right["optimizer"]) == []


def _dask(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(f"distributed.cli.{name}", run_name="__main__")


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    """A scheduler and two workers on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    common = ["--host", "127.0.0.1", "--no-dashboard"]
    how = ["--port", str(port), *common]
    started = [forked(_dask, "dask_scheduler", *how, said=folder / "scheduler.log")]
    try:
        for k in range(2):
            at = ["--nthreads", "1", "--no-nanny", "--local-directory", str(folder / f"space{k}")]
            log = folder / f"worker{k}.log"
            started.append(forked(_dask, "dask_worker", address, *at, *common, said=log))
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.join()


@pytest.mark.filterwarnings("ignore")
def test_a_dead_workers_run_is_resumed_by_another(
    tmp_path: Path, uninterrupted: StudyResult
) -> None:
    pytest.importorskip("distributed")
    chosen = study(tmp_path, grid={"weights": WEIGHTS[1:], "seed": [0]})
    files = StudyFolder(chosen).files(AWP)
    events: list[Event] = []
    found: list[StudyResult] = []
    with cluster(tmp_path) as (address, workers):

        def go() -> None:
            found.append(run_study(chosen, 1, events.append, scheduler=address, yes=True))

        thread = threading.Thread(target=go)
        thread.start()

        def busy() -> psutil.Process | None:
            """The run's process, once it has saved something."""
            for worker in workers:
                for child in psutil.Process(worker.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if files.job.name in str(child.cmdline()) and files.begun():
                            return child
            return None

        until(lambda: busy() is not None)
        orphan = busy()
        assert orphan is not None
        orphan.suspend()
        worker = orphan.parent()
        assert 0 < len(files.folder.metrics()) < 12, "in the middle of its training"
        assert worker is not None
        worker.kill()
        # The other's process waits for this one, which ends once it sees that its worker is gone.
        orphan.resume()
        thread.join(120)
        assert not thread.is_alive()
        assert not orphan.is_running()
    assert [(e.run, e.state) for e in events] == [(AWP, "finished")]
    assert files.log.read_text().count(f"training {AWP}") == 2, "begun by one, ended by another"
    assert timeless(found[0]) == timeless(uninterrupted)[1:]


def test_a_scheduler_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match="no Dask scheduler at nonsense://x"):
        run_study(study(tmp_path), scheduler="nonsense://x", yes=True)


def test_one_row_is_remade_alone(
    tmp_path: Path, uninterrupted: StudyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a question, however long the study.
    monkeypatch.setattr("robustflat.study.run.MANY", 1)
    wider = study(tmp_path, grid={"weights": WEIGHTS, "seed": [0, 1]}, measures=["parameter_norm"])
    with pytest.raises(UserError, match=r"no run 'nobody'.*its 4 runs, such as 'none-seed0'"):
        run_study(wider, rows=["nobody"])
    with forking():
        result = run_study(wider, rows=[AWP])
    assert [r.run for r in result.runs] == [AWP]
    assert [f.run for f in result.failed] == [NONE, "none-seed1", "awp-strength0.02-seed1"]
    assert result.failed[0].error.startswith("It was not run yet")
    there = next(r for r in uninterrupted.runs if r.run == AWP)
    assert result.runs[0].measured["targets"] == there.measured["targets"]
    # Asked for more, it is measured and not trained again.
    last = RunFolder(tmp_path / "tiny" / "runs" / AWP).last
    before = last.stat().st_mtime_ns
    more = study(
        tmp_path,
        grid={"weights": WEIGHTS, "seed": [0, 1]},
        measures=["parameter_norm", "hessian_density"],
        attacks=["fgsm"],
        targets=["attacked_accuracy"],
    )
    more.base["flatness"]["options"] = {"lanczos_steps": 30, "probes": 3, "max_hvps": 60}
    with forking():
        again = run_study(more, rows=[AWP]).runs[0]
    assert last.stat().st_mtime_ns == before
    assert 0 <= again.target("attacked_accuracy") <= 1  # type: ignore[operator]
    assert again.measure("parameter_norm") == result.runs[0].measure("parameter_norm")


def test_the_command_line_says_how_far_a_study_is(uninterrupted: StudyResult) -> None:
    # The study as its folder tells it, which is what a row's command reads.
    path = uninterrupted.folder / "study.yaml"
    assert read_study(path) == uninterrupted.study
    command = timeless_command(uninterrupted)
    assert command == f"robustflat study {path} --row {NONE}"
    found = CliRunner().invoke(app, ["study", str(path), "--status"])
    assert found.exit_code == 0
    lines = found.output.splitlines()
    assert lines[0].split() == [NONE, "done", "epoch", "12", "of", "12"]
    assert lines[2].split()[:2] == ["awp-strength1e38-seed0", "failed"]
    assert lines[3] == "2 of 3 runs are done"
    # What is finished is shown and written without a process.
    shown = CliRunner().invoke(app, ["study", str(path), "--row", NONE])
    assert shown.exit_code == 1, "one run is missing"
    assert f"[1/1] {NONE} kept" in shown.output
    assert "How each measure ranks the robust accuracy gap, 2 runs" in shown.output
    written = {p.name for p in uninterrupted.folder.iterdir() if not p.name.startswith(".")}
    assert written >= {"ledger.csv", "plots", "runs", "study.json", "study.txt", "study.yaml"}


def timeless_command(result: StudyResult) -> str:
    with StudyFolder(result.study).ledger.open(newline="") as file:
        return next(csv.DictReader(file))["command"]


def test_studies_that_cannot_go_on_are_refused(tmp_path: Path, uninterrupted: StudyResult) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not the folder of a study"):
        run_study(study(tmp_path), yes=True)
    with pytest.raises(UserError, match="at least one job"):
        run_study(study(tmp_path), 0)
    with pytest.raises(UserError, match="read_study"):
        run_study(study(base="run.yaml"))
    output = uninterrupted.folder.parent
    base = study_values()["base"] | {"optimizer": {"name": "sgd", "lr": 0.3}}
    with pytest.raises(UserError, match=r"none-seed0.*another configuration.*optimizer\.lr"):
        run_study(study(output, base=base), yes=True)
    nonsense = study_values()["base"] | {"model": {"name": "nonsense"}}
    with pytest.raises(UserError, match=r"none-seed0, awp-strength0\.02-seed0: .*nonsense"):
        run_study(study(tmp_path, name="other", base=nonsense), yes=True)
    # Attacks are tried before anything is trained.
    with pytest.raises(UserError, match="pgd-20x"):
        run_study(study(tmp_path, name="other", attacks=["pgd-20x"]), yes=True)
    assert not list((tmp_path / "other").rglob("*.log"))


def test_long_studies_are_asked_about(tmp_path: Path) -> None:
    long = study(tmp_path, grid={"weights": WEIGHTS, "seed": list(range(5000))})
    with pytest.raises(UserError, match=r"10,000 runs, which take about .* hours of 2 .*--yes"):
        run_study(long, 2)
    assert not (tmp_path / "tiny").exists()


# The engine


class Processless(Processes):
    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def run(self, order: Order, environment: dict[str, str]) -> Outcome:
        if self.code == 99:
            raise RuntimeError("worker lost")
        return Outcome(code=self.code, seconds=1.5)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "killed by SIGKILL, perhaps for want of memory. The last lines"),
        (7, "ended with code 7. The last lines"),
        (3, "stopped from outside and saved"),
        (0, "ended with code 0"),
        (99, "The engine gave it up: RuntimeError: worker lost"),
    ],
)
def test_endings_in_words(tmp_path: Path, code: int, text: str) -> None:
    job = tmp_path / "a.job.json"
    RunFiles.of_job(job).log.write_text("\n".join(f"line {k}" for k in range(30)))
    events: list[Event] = []
    fake = Processless(code)
    with Local(1) as local:
        run_all(
            [Order(job=job, threads=2)],
            local,
            lambda order: fake.run(order, {}),
            lambda files: False,
            events.append,
        )
    (event,) = events
    assert (event.run, event.state) == ("a", "failed")
    assert text in event.text
    assert event.text.endswith("line 29")
    assert "line 17" not in event.text
    assert RunFiles.of_job(job).failed() == event.text


def test_processes_are_spread_over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_device(3, 0) == _visible_device(3, 1) == {}
    assert _visible_device(3, 2) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _visible_device(0, 2) == {"CUDA_VISIBLE_DEVICES": "4"}


def test_a_process_gets_its_device_and_threads_and_gives_the_device_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    local, seen = Local(2), []

    def run(order: Order, environment: dict[str, str]) -> Outcome:
        seen.append((environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]))
        raise RuntimeError

    local._processes.run = run  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(RuntimeError):
            local.perform(Order(job=tmp_path / "a.job.json", threads=3))
    local.shutdown()
    assert seen == [("0", "3"), ("1", "3"), ("0", "3")]


def test_stopping_ends_what_runs_and_starts_nothing(tmp_path: Path) -> None:
    processes, outcomes = Processes(), []
    job = tmp_path / "a.job.json"
    with locked(job):  # so that the process waits

        def go() -> None:
            outcomes.append(processes.run(Order(job=job, threads=None), dict(os.environ)))

        thread = threading.Thread(target=go)
        thread.start()
        until(lambda: bool(processes._open))
        processes.stop()
        thread.join(60)
    assert outcomes[0].code in (3, -signal.SIGTERM)
    with pytest.raises(CancelledError):
        processes.run(Order(job=job, threads=None), dict(os.environ))


# A common training loss


def test_training_stops_at_a_common_loss_and_stays_stopped(tmp_path: Path) -> None:
    whole = rows(trained(tmp_path, name="whole", train__epochs=4))
    losses = [row["monitor"]["train"]["robust_loss"] for row in whole]
    assert losses == sorted(losses, reverse=True), "the premise"
    limit = (losses[1] + losses[2]) / 2
    changes = {"name": "short", "train__epochs": 4, "train__stop_at_loss": limit}
    short = trained(tmp_path, **changes)
    assert [row["ended"] for row in rows(short)] == [None, None, "stop_at_loss"]
    assert [row["monitor"] for row in rows(short)] == [row["monitor"] for row in whole[:3]]
    before = short.last.read_bytes()
    trained(tmp_path, resume=True, **changes)
    assert short.last.read_bytes() == before
    never = {"name": "never", "train__epochs": 2, "train__stop_at_loss": 1e-9}
    assert [row["ended"] for row in rows(trained(tmp_path, **never))] == [None, None]
    with pytest.raises(ConfigError, match=r"monitor\.every is 0"):
        trained(tmp_path, name="x", train__stop_at_loss=1.0, monitor__every=0)


def test_the_clean_loss_is_looked_at_without_an_attack(tmp_path: Path) -> None:
    found = trained(
        tmp_path, attack={"name": "none"}, objective={"name": "standard"}, train__stop_at_loss=1e3
    )
    assert [row["ended"] for row in rows(found)] == ["stop_at_loss"]


# Ledger, tables and pictures


def made_up(folder: Path, **changes: Any) -> StudyResult:
    """Six configurations; m_i = i orders the accuracy gap perfectly and the loss gap not."""
    grid = {
        "weights": [{"name": "none"}, *({"name": "awp", "gamma": g} for g in (0.01, 0.02))],
        "train.batch_size": [8, 16],
        "seed": [0, 1],
    }
    chosen = study(folder, grid=grid, **changes)
    found = []
    for i, point in enumerate(expand(chosen)):
        batch = point.factors["batch_size"] == 16
        targets = {
            name: {"value": 0.3 - 0.01 * i, "low": None, "high": None}
            for name in TARGETS
            if name != "attacked_accuracy"
        }
        targets["gap_robust_accuracy"] = {
            "value": 0.1 + 0.05 * i,
            "low": 0.05 * i,
            "high": 0.2 + 0.05 * i,
        }
        targets["gap_robust_loss"] = {
            "value": float(i if not batch else -i),
            "low": None,
            "high": None,
        }
        measures = {m: {"value": 10.0**i, "standard_error": 0.5} for m in chosen.measures}
        if i == 3:
            measures["distance_frobenius"] = {"value": None, "standard_error": None, "error": "why"}  # type: ignore[dict-item]
        measured = {
            "targets": targets, "measures": measures, "epoch": 3, "weights": "raw",
            "reached_loss": None, "train_steps": 12, "train_seconds": 1.0, "passes": 7.0,
            "measure_seconds": 2.0, "images": {"train": 20, "test": 30},
            "circumstances": circumstances(job_of(chosen, point)),
        }  # fmt: skip
        config = job_of(chosen, point)["config"]
        found.append(
            RunResult(run=point.name, factors=point.factors, config=config, measured=measured)
        )
    return StudyResult(
        study=chosen,
        folder=folder,
        runs=found,
        failed=[Failure(run="x", factors={}, error="why")],
        rankings={t: rank_all(found, chosen, t) for t in chosen.targets},
        notes=("Varied: everything.",),
    )


def test_targets_point_to_the_worse() -> None:
    splits = {s: {} for s in ("train", "test")}
    gaps: dict[str, Any] = {}
    for k, name in enumerate(("robust_accuracy", "robust_loss", "clean_accuracy", "clean_loss")):
        splits["train"][name] = {"value": 10 + k, "low": 0, "high": 0}
        splits["test"][name] = {"value": 20 + k, "low": 0, "high": 0}
        gaps[name] = {"value": 30 + k, "low": 0, "high": 0}
    found = figures({"splits": splits, "gaps": {"train-test": gaps}})
    assert {k: v["value"] for k, v in found.items()} == {
        "test_robust_accuracy": 20, "test_robust_loss": 21, "test_clean_accuracy": 22,
        "test_clean_loss": 23, "gap_robust_accuracy": 30, "gap_robust_loss": 31,
        "gap_clean_accuracy": 32, "gap_clean_loss": 33,
    }  # fmt: skip
    less_is_worse = {n for n, t in TARGETS.items() if t.worse == -1}
    assert less_is_worse == {"test_robust_accuracy", "test_clean_accuracy", "attacked_accuracy"}


def test_rankings_say_where_an_order_holds_and_where_it_reverses(tmp_path: Path) -> None:
    result = made_up(tmp_path)
    perfect = result.rankings["gap_robust_accuracy"]["worst_clean"]
    assert perfect.tau.value == pytest.approx(1)
    assert perfect.tau.configurations == 6
    assert perfect.average.value == pytest.approx(1)
    assert perfect.sign_error.mean == 0
    # Accuracy on test falls as the measure rises: worse, so +1 too.
    assert result.rankings["test_robust_accuracy"]["worst_clean"].tau.value == pytest.approx(1)
    # Two measures alike: each p-value counts twice.
    p = perfect.tau.p_value
    assert p is not None
    assert perfect.corrected[0] == pytest.approx(2 * p, rel=0.5)
    mixed = result.rankings["gap_robust_loss"]["worst_clean"]
    assert mixed.axes["batch_size"].value == -1
    assert mixed.verdicts()["batch_size"] in ("holds", "reverses", "open")
    written = json.loads(json.dumps(result.to_dict()))["rankings"]["gap_robust_loss"]["worst_clean"]
    assert written["granulated"]["verdicts"] == mixed.verdicts()
    assert written["conditional"]["batch_size"]["levels"][0]["level"] == 8
    assert written["sign_error"]["worst"]["factor"] == mixed.sign_error.worst.factor  # type: ignore[union-attr]


def test_verdicts_by_hand(tmp_path: Path) -> None:
    whole = made_up(tmp_path).rankings["gap_robust_accuracy"]["worst_clean"]
    ends = {"a": (0.1, 0.9), "b": (-0.9, -0.1), "c": (-0.1, 0.9), "d": (None, None)}
    axes = {name: Estimate(value=0.0, low=low, high=high) for name, (low, high) in ends.items()}
    for average, expected in ((0.5, ["holds", "reverses"]), (-0.5, ["reverses", "holds"])):
        made = replace(whole, axes=axes, average=Estimate(value=average))
        assert list(made.verdicts().values()) == [*expected, "open", "open"]


def test_the_ledger_has_one_row_a_run_in_both_formats(tmp_path: Path) -> None:
    result = made_up(tmp_path)
    paths = save_ledger(result.runs, tmp_path / "ledger.csv", "robustflat study s.yaml --row")
    with paths[0].open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 12
    first = found[0]
    assert (first["run"], first["factor.method"], first["factor.strength"]) == (
        "none-batch_size8-seed0",
        "none",
        "",
    )
    assert float(found[2]["target.gap_robust_accuracy"]) == pytest.approx(0.2)
    assert [first[f"target.gap_robust_accuracy.{end}"] for end in ("low", "high")] == ["0.0", "0.2"]
    assert float(found[2]["measure.worst_clean"]) == 100
    assert found[3]["measure.distance_frobenius"] == ""
    assert found[3]["command"] == "robustflat study s.yaml --row " + found[3]["run"]
    assert json.loads(first["config"])["train"]["batch_size"] == 8
    assert {first[k] for k in ("epoch", "train_steps", "passes")} == {"3", "12", "7.0"}
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(paths[1]).to_pylist()
    assert [row["run"] for row in table] == [row["run"] for row in found]
    assert table[2]["measure.worst_clean"] == 100
    assert table[0]["factor.strength"] is None
    empty = save_ledger([], tmp_path / "empty.csv", "")
    assert empty[0].read_text() == "run\n"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_ledger_is_read_back_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    result = made_up(tmp_path)
    save_ledger(result.runs, tmp_path / "ledger.csv", "")
    found = Ledger(tmp_path / f"ledger{suffix}")
    elsewhere = result.study.model_copy(update={"output": "elsewhere"})
    for point, run in zip(expand(elsewhere), result.runs, strict=True):
        measured = dict(run.measured, run=point.name)
        if suffix == ".csv" or run is result.runs[3]:  # why it could not be measured is not told
            for figure in measured["measures"].values():
                figure.pop("error", None)
        assert found.measured(job_of(elsewhere, point)) == measured
    # Trained otherwise: another run. Measured otherwise: no row of the same ledger.
    (other, *_) = expand(study(grid={"weights": WEIGHTS, "train.batch_size": [4], "seed": [0]}))
    assert found.measured(job_of(result.study, other)) is None
    steps = result.study.model_copy(update={"attack": "pgd-3"})
    with pytest.raises(UserError, match=r"measured otherwise: attack is 'pgd-2' there and 'pgd-3'"):
        found.measured(job_of(steps, expand(steps)[0]))


def test_a_preset_with_the_options_of_the_study_keeps_its_name(
    uninterrupted: StudyResult, tmp_path: Path
) -> None:
    base = study_values()["base"]
    base["flatness"] |= {"options": {"steps": 1, "samples": 2}}
    names = ("wen2023_average", "worst_clean", "wen2023_worst")
    chosen = study(base=base, measures=names)
    subject, _, measured = measured_anew(uninterrupted, chosen, tmp_path)
    network = subject.network("last")
    figures = robustflat.flatness(
        network.model, subject.tensors("train", 16), names, steps=1, samples=2
    )
    assert [name.partition(" with ")[0] for name in figures] == list(names) != list(figures)
    assert {name: m["value"] for name, m in measured.items()} == dict(
        zip(names, [figure.value for figure in figures.values()], strict=True)
    )


def test_the_attack_of_robust_flatness_is_a_run_s_and_a_study_s(tmp_path: Path) -> None:
    """Rows of another attack, or of none that is said, are refused before anything is trained."""
    base = study_values()["base"]
    base["flatness"] = base["flatness"] | {"attack": "pgd-3:dlr-2"}
    with pytest.raises(ConfigError, match=r"flatness\.attack.*'pgd-3:dlr-2'"):
        expand(study(base=base))
    one = study_values()["base"]
    one["flatness"] = one["flatness"] | {"attack": "pgd-3"}
    there, here = (
        made_up(tmp_path, base=one),
        study(tmp_path / "here", grid=made_up(tmp_path).study.grid),
    )
    path = tmp_path / "ledger.csv"
    save_ledger(there.runs, path, "")
    sentence = "flatness_attack is 'pgd-3' there and 'pgd-10-5' here"
    with pytest.raises(UserError, match=f"ledger.csv has none-batch_size8-seed0.*{sentence}"):
        run_study(here, ledger=path, yes=True)
    assert not list((tmp_path / "here").rglob("*.log"))
    for run in there.runs:
        del run.measured["circumstances"]["flatness_attack"]
    save_ledger(there.runs, path, "")
    with pytest.raises(UserError, match="flatness_attack is None there and 'pgd-10-5' here"):
        run_study(here, ledger=path, yes=True)


def test_a_run_s_row_is_in_the_ledger_as_soon_as_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are those of before, in the order of the grid, whatever ends the study then."""
    made = made_up(tmp_path)
    folder, runs = StudyFolder(made.study), {r.run: r.measured for r in made.runs}
    (first, second, third, *_) = runs

    def finish(name: str) -> Event:
        files = folder.files(name)
        files.folder.root.mkdir(parents=True, exist_ok=True)
        write_json(files.row, {"run": name, **runs[name]})
        return Event(run=name, state="finished", text="", done=1, total=12)

    def rows_there() -> list[str]:
        with folder.ledger.open(newline="") as file:
            return [row["run"] for row in csv.DictReader(file)]

    def two_and_the_power_is_cut(*arguments: Any) -> None:
        on_event = arguments[4]
        on_event(finish(third))
        assert rows_there() == [second, third]
        on_event(finish(first))
        raise KeyboardInterrupt

    folder.prepare(made.study)
    finish(second)
    monkeypatch.setattr("robustflat.study.run.run_all", two_and_the_power_is_cut)
    with pytest.raises(KeyboardInterrupt):
        run_study(made.study, yes=True)
    assert rows_there() == [first, second, third]


def test_rows_of_a_ledger_are_not_run_again(
    tmp_path: Path, uninterrupted: StudyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"weights": WEIGHTS, "seed": [0, 1]}
    committed = StudyFolder(uninterrupted.study).ledger
    before = timeless(uninterrupted)
    asked: list[str] = []

    def none_is_run(orders: list[Order], *others: Any) -> None:
        asked.extend(RunFiles.of_job(order.job).name for order in orders)

    monkeypatch.setattr("robustflat.study.run.run_all", none_is_run)
    taken = run_study(study(tmp_path / "a", grid=grid), ledger=committed, yes=True)
    assert asked == ["none-seed1", "awp-strength0.02-seed1"]
    assert [dict(row, command="") for row in timeless(taken)] == [
        dict(row, command="") for row in before
    ]
    # Another machine changes nothing of what is trained; another seed does.
    asked.clear()
    base = study_values()["base"]
    base |= {"device": "auto", "data": {**base["data"], "root": "elsewhere"}}
    run_study(study(tmp_path / "c", grid=grid, base=base), ledger=committed, yes=True)
    assert asked == ["none-seed1", "awp-strength0.02-seed1"]
    # More than a row has is measured anew; what was made here is not replaced.
    asked.clear()
    more = study(tmp_path / "b", grid=grid, measures=["worst_clean", "path_norm"])
    assert not run_study(more, ledger=committed, yes=True).runs
    assert len(asked) == 4
    asked.clear()
    run_study(study(tmp_path / "a", grid=grid), yes=True)
    assert len(asked) == 2


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path, text in (
        (other, "no column 'circumstances'"),
        (tmp_path / "x.csv", "cannot be read"),
    ):
        with pytest.raises(UserError, match=text):
            run_study(study(tmp_path), ledger=path, yes=True)
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot be read|needs pyarrow"):
        Ledger(tmp_path / "x.parquet")


def test_runs_above_the_common_loss_are_not_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustflat.study import result as module

    made = made_up(tmp_path)
    by_name = {r.run: r.measured for r in made.runs}
    for name, measured in by_name.items():
        measured["reached_loss"] = "seed0" in name
    monkeypatch.setattr(RunFiles, "result", lambda self, job: by_name[self.name])
    folder = StudyFolder(made.study)
    folder.runs.mkdir(parents=True)
    found = module.collect(made.study, expand(made.study), folder)
    assert len(found.runs) == 12
    assert len(found.left_out) == 6
    assert all("seed1" in name for name in found.left_out)
    tau = found.rankings["gap_robust_accuracy"]["distance_frobenius"].tau
    assert (tau.configurations, tau.pairs) == (6, 15)
    assert any("6 of 12 runs ended above the common training loss" in n for n in found.notes)
    assert any(n == "distance_frobenius is missing of 1 of 12 runs: why" for n in found.notes)
    assert "Varied: method, strength, batch_size, seed" in found.notes[0]
    assert folder.ledger.is_file()


def test_tables_and_plots_show_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up(tmp_path)
    text = save_tables(result, tmp_path / "study.txt").read_text()
    assert "robust accuracy gap, 12 runs" in text
    table = ranking_table(result, "gap_robust_accuracy")
    cells = {str(column.header): [*map(str, column.cells)] for column in table.columns}
    assert cells["measure"][0] == "worst_clean"
    assert cells["tau"][0] == "+1.00"
    assert cells["method"][0].startswith("+1.00")
    mixed = ranking_table(result, "gap_robust_loss")
    cells = {str(column.header): [*map(str, column.cells)] for column in mixed.columns}
    ranking = result.rankings["gap_robust_loss"][cells["measure"][0]]
    mark = {"holds": "", "reverses": " reverses", "open": " ?"}[ranking.verdicts()["batch_size"]]
    assert cells["batch_size"][0] == f"{ranking.axes['batch_size'].value:+.2f}{mark}"
    assert cells["sign error"][0] == f"{ranking.sign_error.mean:.2f}"
    assert "note: Varied: everything." in text

    drawn = scatter(result, "worst_clean", "gap_robust_accuracy")
    assert [c.title.split(",")[0] for c in drawn] == ["method", "strength", "batch_size"]
    axis = result.rankings["gap_robust_accuracy"]["worst_clean"].axes["batch_size"]
    assert drawn[2].title.startswith(f"batch_size, granulated {axis.value:+.2f} [")
    assert (drawn[2].x.log, drawn[2].x.label) == (True, "worst clean")
    assert drawn[2].y.title == "robust accuracy gap (pp)"
    few, many = drawn[2].series
    assert [few.name, many.name] == ["8", "16"]
    assert few.y == pytest.approx([0.1, 0.15, 0.3, 0.35, 0.5, 0.55])
    runs = [r for r in result.runs if r.factors["batch_size"] == 8]
    assert few.x == [r.measure("worst_clean") for r in runs]
    figures = [r.measured["targets"]["gap_robust_accuracy"] for r in runs]
    assert (few.low, few.high) == tuple([f[key] for f in figures] for key in ("low", "high"))
    assert {few.run, many.run} == {0, 1}, "a colour a level"
    missing = scatter(result, "distance_frobenius", "gap_robust_accuracy")[2]
    assert sum(len(s.x) for s in missing.series) == 11, "what is not finite is not drawn"
    few_runs = replace(result, left_out=(result.runs[0].run,))
    less = scatter(few_runs, "worst_clean", "gap_robust_accuracy")[2]
    assert sum(len(s.x) for s in less.series) == len(result.runs) - 1
    backwards = replace(result, runs=result.runs[::-1])
    shown = scatter(backwards, "worst_clean", "gap_robust_accuracy")[2].series
    assert [s.name for s in shown] == ["8", "16"], "numbers ascend"
    seen = {}
    monkeypatch.setattr(paper, "save", lambda picture, path: seen.update({path: picture}))
    save_plots(result, tmp_path)
    picture = seen[tmp_path / "worst_clean-gap_robust_accuracy.png"]
    assert picture.get_suptitle().startswith("tau +1.00 [")
    assert picture.axes[2].get_ylabel() == "robust accuracy gap (pp)"
    assert max(picture.axes[2].lines[0].get_ydata()) == pytest.approx(55)
    monkeypatch.undo()
    paths = save_plots(result, tmp_path / "plots")
    assert len(paths) == 2 * 3
    monkeypatch.setattr("robustflat.report.study_figures._DRAWN", 1)
    surest = [str(next(ranking_table(result, t).columns[0].cells)) for t in result.study.targets]
    drawn = [path.stem for path in save_plots(result, tmp_path / "few")]
    assert drawn == [f"{n}-{t}" for n, t in zip(surest, result.study.targets, strict=True)]
    assert {p.name for p in paths} >= {"worst_clean-gap_robust_accuracy.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_plots(result, tmp_path / "file")
