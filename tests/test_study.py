"""Studies: rankings against SciPy and by hand, grids and their errors, claims, kill and resume."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import kendalltau
from train_support import differences, python, saved, values

from robustflat.config import ConfigError
from robustflat.errors import UserError
from robustflat.report.study_figures import save_plots, save_tables, scatter
from robustflat.study import Event, StudyConfig, StudyResult, claims, read_study, run_study
from robustflat.study.ending import explain
from robustflat.study.folder import RunFiles, StudyFolder
from robustflat.study.grid import expand
from robustflat.study.ranking import bootstrap, granulated, tau
from robustflat.study.reading import check_study
from robustflat.study.result import Failure, RunResult, rank
from robustflat.study.schedule import _visible_device

WEIGHTS = [{"name": "none"}, {"name": "awp", "gamma": 0.02}]


def study_values(output: Path | str = "unused", **changes: Any) -> dict[str, Any]:
    base = values(
        train={"epochs": 1, "batch_size": 16},
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
        "measures": ["worst_clean", "average_clean"],
        "attacks": ["pgd-2"],
    }
    return found | changes


def study(output: Path | str = "unused", **changes: Any) -> StudyConfig:
    return check_study(study_values(output, **changes))


# Rankings


def test_tau_counts_concordant_and_discordant_pairs() -> None:
    # Of the 6 pairs only (3, 4) is discordant.
    found = tau([1, 2, 3, 4], [10, 20, 40, 30])
    assert found.value == pytest.approx((5 - 1) / 6)
    assert found.p_value == pytest.approx(kendalltau([1, 2, 3, 4], [10, 20, 40, 30]).pvalue)
    assert found.runs == 4
    assert tau([3, 2, 1], [5, 6, 7]).value == pytest.approx(-1)
    # Ties: one pair tied in the measure, two of the other five discordant.
    assert tau([1, 1, 2, 3], [2, 1, 3, 0]).value == pytest.approx((2 - 3) / math.sqrt(5 * 6))


@pytest.mark.parametrize(("x", "y"), [([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])])
def test_tau_of_nothing_to_order_is_not_known(x: list[float], y: list[float]) -> None:
    found = tau(x, y)
    assert (found.value, found.low, found.high, found.p_value) == (None, None, None, None)


def test_every_bootstrap_draw_is_the_tau_of_its_resample() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=7).round(1), rng.normal(size=7).round(1)
    drawn = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=40)
    expected = [kendalltau(np.repeat(x, c), np.repeat(y, c)).statistic for c in drawn]
    found = bootstrap(x, y, 40, np.random.default_rng(5))
    np.testing.assert_allclose(found, [t for t in expected if not math.isnan(t)], atol=1e-12)


def test_the_interval_covers_the_true_tau() -> None:
    rng, rho, covered, width = np.random.default_rng(1), 0.6, 0, 0.0
    truth = 2 / math.pi * math.asin(rho)  # of a bivariate normal (Kendall & Gibbons 1990)
    for _ in range(150):
        x, noise = rng.normal(size=(2, 24))
        found = tau(x, rho * x + math.sqrt(1 - rho**2) * noise)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
        width += (found.high - found.low) / 150
    assert 0.88 <= covered / 150 <= 0.99
    # The standard error of tau of 24 such pairs is about 0.11.
    assert 0.3 < width < 0.6


def test_granulated_tau_by_hand() -> None:
    # The measure follows a alone; the gap follows b, and a a little.
    levels = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
    measure, gap = [0.0, 0.1, 1.0, 1.1], [0.0, 5.0, 1.0, 4.0]
    found = granulated(measure, gap, levels)
    # a: from (0,0) to (1,0) both rise; from (0,1) to (1,1) the gap falls. b: both always rise.
    assert found.axes["a"].tau == 0
    assert found.axes["b"].tau == 1
    assert [(x.groups, x.pairs) for x in found.axes.values()] == [(2, 2), (2, 2)]
    assert found.average == 0.5
    # A tie is neither, and stays in the denominator.
    assert granulated([1, 1, 2], [1, 2, 3], [{"a": i} for i in range(3)]).axes["a"].tau == 2 / 3


def test_granulated_tau_is_the_formula_of_jiang_et_al() -> None:
    rng = np.random.default_rng(2)
    shape = (3, 2, 4)
    mu, g = rng.normal(size=shape), rng.normal(size=shape)
    levels = [dict(zip("xyz", at, strict=True)) for at in itertools.product(*map(range, shape))]
    found = granulated(list(mu.flat), list(g.flat), levels)
    psis = []
    for axis, name in enumerate("xyz"):
        lines = [np.moveaxis(v, axis, -1).reshape(-1, shape[axis]) for v in (mu, g)]
        psis.append(np.mean([kendalltau(a, b).statistic for a, b in zip(*lines, strict=True)]))
        assert found.axes[name].tau == pytest.approx(psis[-1])
    assert found.average == pytest.approx(np.mean(psis))


def test_a_nested_strength_is_compared_within_its_method() -> None:
    levels = [
        {"method": "none", "strength": None, "seed": 0},
        {"method": "awp", "strength": 1, "seed": 0},
        {"method": "awp", "strength": 2, "seed": 0},
        {"method": "sam", "strength": 1, "seed": 0},
        {"method": "sam", "strength": 1, "seed": 1},
    ]
    measure, gap = [5.0, 4, 3, 6, 7], [5.0, 3, 4, 6, 1]
    found = granulated(measure, gap, levels, {"strength": "method"})
    # method, seed 0: none-awp1 +, none-awp2 +, none-sam +, awp1-sam +, awp2-sam +.
    assert (found.axes["method"].tau, found.axes["method"].pairs) == (1, 5)
    assert (found.axes["strength"].tau, found.axes["strength"].pairs) == (-1, 1)
    assert (found.axes["seed"].tau, found.axes["seed"].pairs) == (-1, 1)
    assert found.average == 0, "a seed is no hyper-parameter"
    crossed = granulated(measure, gap, levels)
    assert crossed.axes["method"].pairs == 1, "without nesting: awp1-sam alone"


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
    assert f"{path}:3:8: grid.seed" in text
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
        "weights=(name=awp gamma=-1)]",
        "weights=(name=sum rho=1)]",
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
        ({"targets": ["accuracy"]}, "targets"),
        ({"nested": {"strength": "lr"}}, "both must be factors"),
        ({"nested": {"seed": "method", "method": "seed"}}, "nested in itself"),
    ],
)
def test_bad_studies_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        study(**changes)


def test_what_could_not_be_measured_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"no option 'stps'.*all grid points"):
        expand(study(grid={"weights": WEIGHTS, "flatness.options": [{"stps": 3}]}))
    standard = {"attack": [{"name": "none"}], "objective": [{"name": "standard"}]}
    with pytest.raises(ConfigError, match="attack is none"):
        expand(study(grid={"weights": WEIGHTS, **standard}))
    with pytest.raises(ConfigError, match=r"weights\.gamma\.x goes below weights\.gamma"):
        expand(study(grid={"weights": WEIGHTS[1:], "weights.gamma.x": [1]}))


# Claims


def lock_of(tmp_path: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A claim as another process would have left it."""
    lock = tmp_path / "run.lock"
    claims.take(lock)
    content = json.loads(lock.read_text()) | {"token": "other"} | changes
    lock.write_text(json.dumps(content))
    return lock, content


def dead_pid() -> int:
    process = python("-c", "")
    process.communicate()
    return process.pid


def test_one_of_many_gets_the_claim(tmp_path: Path) -> None:
    lock, start, won = tmp_path / "run.lock", threading.Barrier(16), []

    def attempt() -> None:
        start.wait()
        won.append(claims.take(lock))

    threads = [threading.Thread(target=attempt) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (owner,) = [o for o in won if o is not None]
    assert claims.holder(lock) == owner
    assert owner.pid == os.getpid()
    assert list(tmp_path.iterdir()) == [lock]
    assert claims.void(lock) is None, "the owner lives"
    claims.release(lock, owner)
    assert not lock.exists()


def test_a_claim_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError("no links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    lock = tmp_path / "run.lock"
    owner = claims.take(lock)
    assert owner is not None
    assert claims.holder(lock) == owner
    assert claims.take(lock) is None


def test_the_claim_of_a_dead_process_is_void(tmp_path: Path) -> None:
    lock, content = lock_of(tmp_path, pid=dead_pid())
    found = claims.void(lock)
    assert found is not None
    assert str(content["pid"]) in found.why
    assert "ended without finishing" in found.why
    assert claims.clear(lock, found)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_from_elsewhere_is_void_when_it_is_silent(tmp_path: Path) -> None:
    lock, _ = lock_of(tmp_path, host="elsewhere", pid=dead_pid())
    assert claims.void(lock) is None, "its processes cannot be seen from here"
    old = time.time() - claims.STALE_SECONDS - 60
    os.utime(lock, (old, old))
    found = claims.void(lock)
    assert found is not None
    assert "elsewhere" in found.why
    assert "no sign of life for 6 minutes" in found.why
    lock.write_text("")
    assert claims.void(lock) is None, "it may be just being written"
    os.utime(lock, (old, old))
    empty = claims.void(lock)
    assert empty is not None
    assert claims.clear(lock, empty)


def test_a_claim_made_in_between_is_not_cleared(tmp_path: Path) -> None:
    lock, _ = lock_of(tmp_path, pid=dead_pid())
    found = claims.void(lock)
    assert found is not None
    lock.unlink()
    newer = claims.take(lock)
    assert not claims.clear(lock, found)
    assert claims.holder(lock) == newer
    assert list(tmp_path.iterdir()) == [lock]


def test_the_heartbeat_renews_and_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    lock = tmp_path / "run.lock"
    owner, lost = claims.take(lock), []
    assert owner is not None
    os.utime(lock, (0, 0))
    with claims.Heartbeat(lock, owner, lost.append):
        until(lambda: lock.stat().st_mtime > 0)
        lock.unlink()
        other, _ = lock_of(tmp_path)
        until(lambda: bool(lost))
    claims.release(lock, owner)
    assert other.exists(), "another's claim is left alone"
    assert "taken over by" in lost[0]
    lock.unlink()
    owner = claims.take(lock)
    assert owner is not None
    with claims.Heartbeat(lock, owner, lost.append):
        monkeypatch.setattr(os, "getppid", lambda: -1)
        until(lambda: len(lost) == 2)
    assert "started it is gone" in lost[1]


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_workers_are_spread_over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_device(3, 0) == _visible_device(3, 1) == {}
    assert _visible_device(3, 2) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _visible_device(0, 2) == {"CUDA_VISIBLE_DEVICES": "4"}


def test_endings_in_words() -> None:
    assert "killed by SIGKILL, perhaps for want of memory" in explain(-9, Path("a.log"))
    assert "ended with code 7; a.log" in explain(7, Path("a.log"))


# Whole studies

RUN = """
import sys
from robustflat.study import read_study, run_study
run_study(read_study(sys.argv[1]), 1)
"""


def figures(result: StudyResult) -> dict[str, Any]:
    """Everything that a study found but for the time it took."""
    found = json.loads(json.dumps(result.to_dict()))
    for run in found["runs"]:
        assert run.pop("seconds") > 0
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    events: list[Event] = []
    result = run_study(study(tmp_path_factory.mktemp("whole")), 1, events.append)
    states = [(e.run, e.state, e.done) for e in events]
    awp = "awp-strength0.02-seed0"
    assert states == [
        ("none-seed0", "started", 0),
        ("none-seed0", "finished", 1),
        (awp, "started", 1),
        (awp, "finished", 2),
    ]
    return result


def test_a_study_leaves_ordinary_runs_and_their_figures(uninterrupted: StudyResult) -> None:
    result = uninterrupted
    assert result.failed == []
    written = json.loads((result.folder / "study.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["complete"] is True
    for run in written["runs"]:
        folder = result.folder / run["folder"]
        found = json.loads((folder / "evaluation.json").read_text())["measurements"]
        (gap,) = [o["result"] for o in found if (o["kind"], o["checkpoint"]) == ("gap", "last")]
        assert run["gap"] == gap["gaps"]["train-test"]
        both = [gap["splits"][s]["robust_accuracy"]["value"] for s in ("train", "test")]
        assert run["gap"]["robust_accuracy"]["value"] == pytest.approx(both[0] - both[1])
        (flatness,) = json.loads((folder / "flatness.json").read_text())["measurements"]
        assert flatness["checkpoint"] == "last"
        for name, figure in flatness["measures"].items():
            assert run["measures"][name]["value"] == figure["value"]
        assert list(run["test"]) == ["pgd-2"]
    x, y = ([r.measure("worst_clean") for r in result.runs] for _ in range(2))
    assert x == y
    ranking = written["rankings"]["robust_loss"]["worst_clean"]
    gaps = [r.gap("robust_loss") for r in result.runs]
    assert ranking["tau"] == pytest.approx(kendalltau(x, gaps).statistic)
    assert ranking["granulated"]["axes"]["method"]["pairs"] == 1


def test_a_killed_study_goes_on_to_the_same_bits(
    tmp_path: Path, uninterrupted: StudyResult
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_values(tmp_path), sort_keys=True))
    files = RunFiles(tmp_path / "tiny" / "runs", "awp-strength0.02-seed0")
    command = python("-c", RUN, str(path))
    try:
        # Once the second run trains, the first is finished.
        until(lambda: files.log.is_file() and "training" in files.log.read_text())
        owner = claims.holder(files.lock)
        assert owner is not None
        for pid in (command.pid, owner.pid):
            os.kill(pid, signal.SIGKILL)
    finally:
        command.kill()
        command.communicate()
    until(lambda: claims.void(files.lock) is not None)
    assert not files.measured.exists()

    events: list[Event] = []
    result = run_study(study(tmp_path), 1, events.append)
    assert [(e.run, e.state) for e in events] == [
        ("none-seed0", "kept"),
        (files.name, "taken over"),
        (files.name, "started"),
        (files.name, "finished"),
    ]
    assert str(owner.pid) in events[1].text
    assert figures(result) == figures(uninterrupted)
    for run in result.runs:
        here, there = (r.folder / "runs" / run.run for r in (result, uninterrupted))
        left, right = (saved(f / "checkpoints" / "last.pt") for f in (here, there))
        assert differences(left["model"], right["model"]) == []
        assert differences(left["optimizer"], right["optimizer"]) == []


def test_a_failure_is_reported_and_the_other_runs_are_kept(uninterrupted: StudyResult) -> None:
    output = uninterrupted.folder.parent
    weights = [*WEIGHTS, {"name": "awp", "gamma": 1e38}]
    wider = study(output, grid={"weights": weights, "seed": [0]})
    events: list[Event] = []
    before = StudyFolder(wider).result.read_bytes()
    try:
        result = run_study(wider, 2, events.append)
    finally:
        StudyFolder(wider).result.write_bytes(before)
    assert [e.state for e in events] == ["kept", "kept", "started", "failed"]
    assert figures(result)["runs"] == figures(uninterrupted)["runs"]
    (failure,) = result.failed
    assert failure.factors["strength"] == 1e38
    assert "stopped being finite" in failure.error
    assert result.to_dict()["complete"] is False
    assert not RunFiles(output / "tiny" / "runs", failure.run).lock.exists()


def test_a_run_that_another_process_works_at_is_left_to_it(
    tmp_path: Path, uninterrupted: StudyResult
) -> None:
    chosen = study(tmp_path, grid={"weights": WEIGHTS[:1], "seed": [0]})
    StudyFolder(chosen).prepare(chosen)
    files = StudyFolder(chosen).files("none-seed0")
    there = claims.take(files.lock)
    events: list[Event] = []

    def finish(event: Event) -> None:
        events.append(event)
        if event.state == "waiting":
            files.folder.root.mkdir()
            files.measured.write_text(json.dumps(uninterrupted.runs[0].measured))

    result = run_study(chosen, 1, finish)
    assert [e.state for e in events] == ["waiting", "finished"]
    assert str(there) in events[0].text
    assert [r.run for r in result.runs] == ["none-seed0"]


def test_studies_that_cannot_go_on_are_refused(tmp_path: Path, uninterrupted: StudyResult) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not the folder of a study"):
        run_study(study(tmp_path))
    with pytest.raises(UserError, match="at least one job"):
        run_study(study(tmp_path), 0)
    with pytest.raises(UserError, match="read_study"):
        run_study(study(base="run.yaml"))
    output = uninterrupted.folder.parent
    base = study_values()["base"] | {"optimizer": {"name": "sgd", "lr": 0.3}}
    with pytest.raises(UserError, match=r"none-seed0.*another configuration.*optimizer\.lr"):
        run_study(study(output, base=base))
    with pytest.raises(UserError, match=r"none-seed0, awp-strength0\.02-seed0: .*nonsense"):
        run_study(study(tmp_path, name="other", base=study_values()["base"] | NONSENSE))
    assert not list((tmp_path / "other").rglob("*.lock"))


NONSENSE = {"model": {"name": "nonsense"}}


# Tables and pictures


def made_up(folder: Path) -> StudyResult:
    """A result whose measure m_i = i orders the accuracy gap perfectly and the loss gap not."""
    chosen = study(folder, grid={"weights": WEIGHTS, "seed": [0, 1]})
    runs = []
    for i, point in enumerate(expand(chosen)):
        gap = {
            "robust_accuracy": {"value": 0.1 + 0.05 * i, "low": 0.05 * i, "high": 0.2 + 0.05 * i},
            "robust_loss": {"value": -float(i), "low": None, "high": None},
        }
        splits = {s: {"robust_accuracy": {"value": 0.5}} for s in ("train", "test")}
        measures = {m: {"value": 10.0**i, "standard_error": None} for m in chosen.measures}
        measured = {"gap": gap, "splits": splits, "measures": measures}
        if i == 3:
            measures["average_clean"]["value"] = None  # type: ignore[assignment]
        runs.append(RunResult(run=point.name, factors=point.factors, measured=measured))
    return StudyResult(
        study=chosen,
        folder=folder,
        runs=runs,
        failed=[Failure(run="x", factors={}, error="why")],
        rankings={
            t: {m: rank(runs, m, t, chosen.nesting()) for m in chosen.measures}
            for t in chosen.targets
        },
    )


def test_tables_and_plots_show_the_figures(tmp_path: Path) -> None:
    result = made_up(tmp_path)
    text = save_tables(result, tmp_path / "study.txt").read_text()
    assert "accuracy gap, 4 runs" in text
    (row, *_) = [line for line in text.splitlines() if line.startswith("│ worst_clean")]
    assert [cell.strip() for cell in row.strip("│").split("│")][:2] == ["worst_clean", "+1.00"]
    assert "-1.00" in text
    assert "25.0%" in text

    drawn = scatter(result, "worst_clean")
    accuracy, loss = drawn.axes
    assert accuracy.get_xscale() == "log"
    assert accuracy.get_title().startswith("tau +1.00")
    assert loss.get_title().startswith("tau -1.00")
    assert accuracy.get_ylabel() == "robust accuracy gap (points)"
    points = [line for line in accuracy.lines if line.get_marker() != "None"]
    assert [float(p.get_ydata()[0]) for p in points] == pytest.approx([10, 15, 20, 25])
    assert len({p.get_color() for p in points}) == 2, "a colour a method"
    assert len({p.get_marker() for p in points}) == 2, "a marker a strength"
    labels = [t.get_text() for t in drawn.legends[0].get_texts()]
    assert labels == ["method", "none", "awp", "", "strength", "-", "0.02"]
    unknown = [
        x for x in scatter(result, "average_clean").axes[0].lines if x.get_marker() != "None"
    ]
    assert len(unknown) == 3, "what is not finite is not drawn"

    paths = save_plots(result, tmp_path / "plots")
    assert [p.name for p in paths] == ["worst_clean.png", "average_clean.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_plots(result, tmp_path / "file")
