"""The script of the evidence: ledgers added to, intervals, figures, and the check."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from script_support import script

from robustflat.study import read_study
from robustflat.study.folder import StudyFolder, circumstances, job_of
from robustflat.study.grid import expand
from robustflat.study.result import RunResult
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
    gap = evidence.rankings(runs, config, "gap_robust_loss")
    assert gap["worst_robust"].whole.value == pytest.approx(1)
    assert gap["worst_robust"].corrected == pytest.approx(gap["worst_robust"].whole.p_value)
    accuracy = evidence.rankings(runs, config, "test_robust_accuracy")
    assert accuracy["worst_robust"].whole.value == pytest.approx(-1), "more of it is better"
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
