"""The script of the evidence: ledgers added to, intervals, figures, and the check."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from script_support import script

from robustflat.landscapes import Landscape
from robustflat.runs import records
from robustflat.study import read_study
from robustflat.study.folder import StudyFolder, circumstances, job_of
from robustflat.study.grid import expand
from robustflat.study.result import RunResult, rank_all
from robustflat.study.targets import TARGETS

ROOT = Path(__file__).parents[1]
TINY = """
name: tiny
output: {output}
base: {{model: {{name: mlp, options: {{hidden: [4]}}}}, attack: {{eps: 0.1, steps: 1}}}}
grid: {{"weights.name, weights.gamma": [[awp, 0.01], [awp, 0.02]], seed: [0, 1]}}
measures: [worst_robust, parameter_norm]
targets: [gap_robust_loss]
"""


evidence = script("evidence")


def run(level: float, seed: int, value: float, measure: float = 1.0) -> RunResult:
    names = [name for name in TARGETS if name != "attacked_accuracy"]
    return RunResult(
        run=f"{level}-{seed}",
        factors={"method": "awp", "strength": level, "seed": seed},
        config={},
        measured={
            "targets": {name: {"value": value, "low": None, "high": None} for name in names},
            "measures": {"worst_robust": {"value": measure, "standard_error": None}},
            "reached_loss": None,
        },
    )


def test_an_interval_pools_the_noise_of_all_configurations() -> None:
    values = {0.1: [0.5, 0.7], 0.2: [0.1, 0.2, 0.6]}
    runs = [run(level, seed, v) for level, all_ in values.items() for seed, v in enumerate(all_)]
    cells = evidence.cells_of(runs)
    assert [len(cell.runs) for cell in cells] == [2, 3]
    assert cells[1].values("gap_robust_loss") == [0.1, 0.2, 0.6]
    assert cells[0].values("test_robust_accuracy") == pytest.approx([50, 70])
    variance = ((0.1**2) * 2 + np.var(values[0.2]) * 3) / 3
    expected = stats.t.ppf(0.975, 3) * np.sqrt(variance / np.array([2, 3]))
    width = evidence.half_width(cells, "gap_robust_loss")
    assert [width(cell) for cell in cells] == pytest.approx(expected)
    (_, _, first, _) = evidence.table(cells, ["gap_robust_loss"], evidence.strength_title).split(
        "\n", 3
    )
    assert first == f"| awp 0.1 | 2 | 0.6 ± {expected[0]:.2g} |"
    # What a seed does to both is no noise: rises of 0.2 and 0.6 leave +-0.1, 1 degree of freedom.
    pairs = [
        run(c, seed, v)
        for c, all_ in ((1, [0.1, 0.3]), (2, [0.2, 0.8]))
        for seed, v in enumerate(all_)
    ]
    cells = evidence.cells_of(pairs)
    width = evidence.half_width(cells, "gap_robust_loss")
    assert width(cells[0]) == pytest.approx(stats.t.ppf(0.975, 1) * np.sqrt(4 * 0.1**2 / 2))
    alone = evidence.cells_of(runs[:1])
    assert np.isnan(evidence.half_width(alone, "gap_robust_loss")(alone[0]))


def test_a_ledger_is_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustflat.files import write_json

    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(output="somewhere"))

    def study_of(name: str, output: str | None = None) -> Any:
        return read_study(file, [f"output={output or 'somewhere'}"])

    monkeypatch.setattr(evidence, "study_of", study_of)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    assert evidence.collect("tiny", str(tmp_path)) == 0
    assert evidence.kept("tiny") == []

    def finish(number: int, value: float) -> None:
        config = study_of("tiny", str(tmp_path))
        point = expand(config)[number]
        files = StudyFolder(config).files(point.name)
        files.folder.root.mkdir(parents=True, exist_ok=True)
        made = run(0.1, 0, value).measured
        made["measures"]["parameter_norm"] = {"value": 3.0, "standard_error": None}
        rest = {"run": point.name, "epoch": 20, "weights": "raw", "images": {"test": 5}}
        times = dict.fromkeys(("passes", "train_steps", "train_seconds", "measure_seconds"), 1)
        where = {"circumstances": circumstances(job_of(config, point))}
        write_json(files.row, made | rest | times | where)

    finish(0, 0.25)
    assert evidence.collect("tiny", str(tmp_path)) == 1
    finish(2, 0.5)
    # The first from its ledger, for nothing of it is elsewhere.
    (tmp_path / "tiny").rename(tmp_path / "gone")
    finish(2, 0.75)
    assert evidence.collect("tiny", str(tmp_path)) == 2
    found = evidence.kept("tiny")
    assert [r.target("gap_robust_loss") for r in found] == [0.25, 0.75]
    assert [r.factors["seed"] for r in found] == [0, 0]
    text = (tmp_path / "results/tiny.csv").read_text()
    assert str(tmp_path) not in text, "the rows do not say where they were made"
    rows = list(csv.DictReader(text.splitlines()))
    assert rows[0]["command"].startswith("robustflat study configs/study/tiny.yaml --row awp")


def test_runs_that_differ_are_seen() -> None:
    old = run(0.1, 0, 0.5)
    assert evidence._apart(old, run(0.1, 0, 0.5)) == 0
    assert evidence._apart(old, run(0.1, 0, 0.4)) == pytest.approx(0.2)
    assert evidence._apart(old, run(0.1, 0, 0.5, measure=-1.0)) == pytest.approx(2)
    assert evidence._apart(run(0.1, 0, 0.0), run(0.1, 0, 1e-6)) == pytest.approx(1e-3)


def test_a_measure_that_orders_as_the_target_does_has_tau_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [run(level, 0, level / 10, measure=level) for level in (1, 2, 3, 4, 5, 6)]
    config = read_study(ROOT / "configs/study/strength.yaml").model_copy(
        update={"measures": ("worst_robust",), "nested": {}}
    )
    gap = rank_all(runs, config, "gap_robust_loss")
    accuracy = rank_all(runs, config, "test_robust_accuracy")
    assert accuracy["worst_robust"].tau.value == pytest.approx(-1), "more of it is better"
    assert "| worst_robust | +1.00 [" in evidence.ranking_table(gap)
    sides = [
        replace(r, factors={**r.factors, "objective": side, "common_loss": loss})
        for side, loss, sign in (("trades", None, 1), ("mart", 1.3, -1))
        for r in (run(n, 0, sign * n / 10, measure=n) for n in range(1, 7))
    ]
    monkeypatch.setattr(evidence, "GROUPED", ("worst_robust",))
    head, _, row = evidence.group_table(sides, config, "gap_robust_loss").splitlines()
    assert head == "| measure | trades (6) | mart (6) | common loss (6) |"
    trades, mart, common = row.split(" | ")[1:]
    assert trades.startswith("+1.00")
    assert mart.startswith("-1.00")
    assert common.startswith(mart)
    above = replace(runs[0], measured={**runs[0].measured, "reached_loss": False})
    assert evidence.ranked_runs([above, *runs[1:]]) == runs[1:]


def test_a_share_of_the_kept_rows_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [run(0.1, seed, 0.5) for seed in range(7)]
    asked = []

    def again(config: Any, jobs: int, *, rows: list[str], yes: bool) -> Any:
        asked.append((config.output, jobs, rows, yes))
        made = [run(0.1, 0, 0.5), run(0.1, 3, 0.4)]
        return SimpleNamespace(runs=made, failed=[SimpleNamespace(run="0.1-6", error="no memory")])

    monkeypatch.setattr(evidence, "SMALL", ("strength", "ledger"))
    monkeypatch.setattr(evidence, "kept", lambda name: old if name == "strength" else [])
    monkeypatch.setattr(evidence, "run_study", again)
    assert evidence.redo(0.3, 2, str(tmp_path)) == 1, "one could not be made"
    assert asked == [(str(tmp_path), 2, ["0.1-0", "0.1-3", "0.1-6"], True)]
    assert capsys.readouterr().out.splitlines() == [
        "strength: 0.1-0: 0.00% apart",
        "strength: 0.1-3: 20.00% apart",
        "strength: 0.1-6: no memory",
    ]
    monkeypatch.setattr("sys.argv", ["evidence.py", "redo", "--share", "1", "--output", "there"])
    monkeypatch.setattr(evidence, "redo", lambda *given: asked.append(given) or 1)
    assert evidence.main() == 1
    assert asked[-1] == (1.0, 2, "there")


def test_what_a_ledger_does_not_have_is_collected_from_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(output=tmp_path))
    monkeypatch.setattr(evidence, "study_of", lambda *_: read_study(file))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    evidence.collect_whole_runs("tiny", None)
    assert not (tmp_path / "results").exists(), "where there are no runs nothing is written"
    point = expand(read_study(file))[1]
    home = StudyFolder(read_study(file)).files(point.name).folder
    home.root.mkdir(parents=True)
    looks = [
        {"epoch": 1, "monitor": None, "monitor_average": None},
        {"epoch": 2, "monitor": {"train": {"robust_loss": 2.0}}, "monitor_average": None},
        {"epoch": 3, "monitor": {"train": {"robust_loss": 1.5}}, "flatness": {"alignment": 0.5},
         "monitor_average": {"train": {"robust_loss": 1.0}}},
    ]  # fmt: skip
    home.metrics_file.write_text("".join(json.dumps(look) + "\n" for look in looks))
    common = {"checkpoint": "best", "samples": 50, "epoch": 2}
    result = {
        "suites": {"pgd-1": {}, "x": {}},
        "robust_accuracy": 0.3,
        "robust_interval": [0.2, 0.4],
    }
    tested = {**common, "kind": "test", "result": result}
    details = {"grid": [0.0, 9.0], "density": [0.7, 0.1]}
    spectrum = {"hessian_density_robust with attack=pgd-10": {"value": 4.0, "details": details}}
    records.add(home.evaluation, "evaluate", point.name, [tested])
    records.add(
        home.flatness,
        "flatness",
        point.name,
        [{**common, "kind": "flatness", "measures": spectrum}],
    )
    Landscape(
        axes=([-1.0, 1.0], [0.0, 2.0]), names=("a", "b"),
        losses={"clean": np.arange(8.0).reshape(2, 2, 2)},
        accuracies={"clean": np.zeros((2, 2, 2))}, about={"checkpoint": "last"}, measured=8,
    ).save(home.landscapes / "plane.json")  # fmt: skip
    evidence.collect_whole_runs("tiny", None)
    assert evidence.read_rows("tiny-epochs") == [
        {"run": point.name, "epoch": "2", "train.robust_loss": "2.0", "alignment": ""},
        {"run": point.name, "epoch": "3", "train.robust_loss": "1.0", "alignment": "0.5"},
    ]
    first, second = evidence.read_rows("tiny-checkpoints")
    assert [first[k] for k in ("checkpoint", "figure", "images", "value", "low", "high")] == [
        "best", "pgd-1 + x", "50", "0.3", "0.2", "0.4",
    ]  # fmt: skip
    assert (second["figure"], second["value"], second["low"]) == (
        "hessian_density_robust",
        "4.0",
        "",
    )
    lines = evidence.read_rows("tiny-lines")
    assert [(r["kind"], r["x"], r["value"]) for r in lines[:2]] == [
        ("hessian_density_robust", "0.0", "0.7"),
        ("hessian_density_robust", "9.0", "0.1"),
    ]
    # The mean over the two pairs of directions, at all points of the plane.
    assert [(r["kind"], r["checkpoint"], r["x"], r["y"], r["value"]) for r in lines[2:]] == [
        ("plane clean", "last", "-1.0", "0.0", "2.0"),
        ("plane clean", "last", "-1.0", "2.0", "3.0"),
        ("plane clean", "last", "1.0", "0.0", "4.0"),
        ("plane clean", "last", "1.0", "2.0", "5.0"),
    ]


def test_figures_of_both_checkpoints_and_of_every_look() -> None:
    runs = [run(level, seed, 0.5) for level in (0.1, 0.2) for seed in (0, 1)]
    place = {"run": runs[0].run, "low": "0.1"}
    rows = [
        {**place, "checkpoint": "best", "figure": "pgd-10", "value": "0.3"},
        {**place, "checkpoint": "last", "figure": "pgd-10", "value": "0.25"},
        {**place, "checkpoint": "best", "figure": "worst_robust", "value": "0.4", "low": ""},
    ]
    first, second = evidence.with_checkpoints(runs, rows)[:2]
    assert first.measure("best pgd-10") == pytest.approx(30)
    assert first.measure("best - last pgd-10") == pytest.approx(5)
    assert first.measure("best worst_robust") == 0.4
    assert first.measure("worst_robust") == 1
    assert second.measure("best - last pgd-10") is None
    assert "best pgd-10" not in runs[0].measured["measures"]
    cells = evidence.cells_of([first, second])
    _, _, row = evidence.table(cells, ["last pgd-10"], str).splitlines()
    assert row.endswith("| 25 |"), "one value has no interval"
    looks = [
        {"run": r.run, "epoch": epoch, "alignment": str(value * k)}
        for r, value in zip(runs, (0.1, 0.3, 0.5, 0.5), strict=True)
        for k, epoch in enumerate(("10", "2"), 1)
    ]
    cells = evidence.cells_of(runs)
    epochs, means, widths = evidence.along(cells[0], cells, looks, "alignment")
    assert epochs == [2, 10]
    assert means == pytest.approx([0.4, 0.2])
    # Half of what the seeds are apart in one configuration and not in the other.
    expected = stats.t.ppf(0.975, 1) * np.sqrt(4 * 0.05**2 / 2)
    assert widths == pytest.approx([2 * expected, expected])


@pytest.mark.parametrize("name", ["strength", "why-sam"])
def test_the_committed_rows_are_runs_of_their_studies(name: str) -> None:
    path = ROOT / f"docs/results/evidence/{name}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = evidence.kept(name)
    assert [r.run for r in found] == [row["run"] for row in rows]
    assert len(found) >= 20
    text = (path.parent / "tables.md").read_text()
    cells = evidence.cells_of(found)
    title = evidence.strength_title if name == "strength" else evidence.variant
    columns = evidence.STRENGTH_COLUMNS if name == "strength" else evidence.WHY_COLUMNS
    first = [cell for cell in cells if name == "strength" or cell.level("noise") is None]
    assert evidence.table(first, columns, title) in text
    draw = evidence.draw_strength if name == "strength" else evidence.draw_why
    assert len(draw(found).axes) == 4
