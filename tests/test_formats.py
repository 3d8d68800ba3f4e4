"""Tables for papers and programs, and runs taken together by seed."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from typing import Any

import pytest
from train_support import config

from robustflat.errors import UserError
from robustflat.report.formats import table
from robustflat.report.tables import Comparison, shown
from robustflat.runs.comparison import Cell, Row
from robustflat.runs.description import effect_of, setting_of
from robustflat.runs.grouping import by_seed, ordered


def row(name: str, seed: int, setting: str = "s", **cells: Any) -> Row:
    return Row(name, "AT", (seed,), cells, "raw", setting)


def share(value: float | None) -> Cell:
    return Cell(value, 0.1, 0.9, metric="clean")


def loss(value: float) -> Cell:
    return Cell(value, unit="", metric="worst_clean")


ROWS = [
    row("at-0", 3, clean=share(0.81), worst_clean=loss(0.02)),
    row("awp", 3, "t", clean=share(0.7)),
    row("at-1", 5, clean=share(0.84), worst_clean=loss(0.04)),
    row("at-2", 4, clean=share(0.93)),
]


def test_runs_of_one_setting_become_one_row() -> None:
    at, awp = by_seed(ROWS)
    assert (at.run, at.seeds, at.weights, at.setting) == ("at-*", (3, 5, 4), "raw", "s")
    assert (awp.run, awp.seeds) == ("awp", (3,))
    values = [0.81, 0.84, 0.93]
    clean = at.cells["clean"]
    assert clean.value == pytest.approx(sum(values) / 3)
    assert clean.deviation == pytest.approx(statistics.stdev(values))
    assert (clean.count, clean.unit, clean.metric) == (3, "%", "clean")
    assert (clean.low, clean.high) == (None, None), "an interval over images is none over seeds"
    worst = at.cells["worst_clean"]
    assert (worst.value, worst.count, worst.unit) == (pytest.approx(0.03), 2, "")
    assert awp.cells["clean"].deviation is None
    assert "worst_clean" not in awp.cells


def test_what_has_no_setting_stays_alone_and_names_stay_apart() -> None:
    models = [row("m", 0, "", clean=share(0.5)), row("n", 0, "", clean=share(0.6))]
    assert [r.run for r in by_seed(models)] == ["m", "n"]
    pairs = [row("a1", 0, "s"), row("a3", 0, "t"), row("a2", 1, "s"), row("a4", 1, "t")]
    assert [r.run for r in by_seed(pairs)] == ["a1, a2", "a3, a4"]
    infinite = [row("a", 0, clean=share(None)), row("b", 1, clean=share(0.5))]
    (together,) = by_seed(infinite)
    assert (together.cells["clean"].value, together.cells["clean"].count) == (None, 2)


def test_a_setting_is_all_that_changes_the_weights_but_the_seed(tmp_path: Any) -> None:
    base = config(tmp_path)
    same = (
        {"seed": 7}, {"name": "other"}, {"device": "cpu"},
        {"threads": 1}, {"data__root": "there"}, {"evaluate__samples": 3},
    )  # fmt: skip
    assert setting_of(config(tmp_path / "elsewhere")) == setting_of(base)
    for changes in same:
        assert setting_of(config(tmp_path, **changes)) == setting_of(base), changes
    for changes in ({"weights__gamma": 0.3}, {"train__epochs": 9}, {"monitor__every": 3}):
        assert setting_of(config(tmp_path, **changes)) != setting_of(base), changes
    off = effect_of(config(tmp_path, weights={"name": "none"}))
    assert [key for key in off if key.startswith("weights")] == ["weights.name"]
    assert effect_of(base)["seed"] == base.seed


def test_rows_are_ordered_by_a_figure() -> None:
    names = lambda rows: [r.run for r in rows]  # noqa: E731
    assert names(ordered(ROWS, "clean")) == ["at-2", "at-1", "at-0", "awp"]
    assert names(ordered(ROWS, "-clean")) == ["awp", "at-0", "at-1", "at-2"]
    # Those without the figure come last, whichever way.
    assert names(ordered(ROWS, "worst_clean"))[:2] == ["at-1", "at-0"]
    assert names(ordered(ROWS, "-worst_clean"))[:2] == ["at-0", "at-1"]
    apart = [
        row("x", 0, **{"clean [best]": share(0.1)}),
        row("y", 0, **{"clean [last]": share(0.2)}),
    ]
    assert names(ordered(apart, "clean")) == ["y", "x"]
    for written in ("Worst_Clean", "worst clean", "WORST CLEAN"):
        assert names(ordered(ROWS, written))[:2] == ["at-1", "at-0"]
    assert names(ordered([row("a", 0, AutoAttack=share(0.1))], "autoattack")) == ["a"]
    with pytest.raises(UserError, match=r"names no figure.*clean, worst_clean"):
        ordered(ROWS, "speed")


@pytest.mark.parametrize(
    ("cell", "digits", "said"),
    [
        (None, 3, "-"),
        (Cell(None), 3, "not finite"),
        (Cell(0.8125), 3, "81.2%"),
        (Cell(0.8125), 5, "81.250%"),
        (Cell(0.8125), 2, "81%"),
        (Cell(0.01234, unit=""), 3, "0.0123"),
        (Cell(0.01234, unit=""), 2, "0.012"),
        # The second digit of the deviation is the last of the mean.
        (Cell(0.8123, deviation=0.0131, count=3), 3, "81.2 ± 1.3%"),
        (Cell(0.8123, deviation=0.131, count=3), 3, "81 ± 13%"),
        (Cell(0.012341, unit="", deviation=0.00021, count=3), 3, "0.01234 ± 0.00021"),
        (Cell(123.4, unit="", deviation=12.3, count=2), 3, "123 ± 12"),
        (Cell(0.5, deviation=0.0, count=2), 3, "50.0 ± 0%"),
        # A difference of two shares is in points.
        (Cell(0.2512, unit="pp"), 3, "25.1 pp"),
        (Cell(0.2512, unit="pp", deviation=0.0131, count=2), 3, "25.1 ± 1.3 pp"),
    ],
)
def test_significant_digits(cell: Cell | None, digits: int, said: str) -> None:
    assert shown(cell, digits) == said


def test_fewer_seeds_than_the_row_has_are_told() -> None:
    (at, _) = by_seed(ROWS)
    assert shown(at.cells["worst_clean"], 3, at) == "0.030 ± 0.014 (n = 2)"
    assert shown(at.cells["clean"], 3, at) == "86.0 ± 6.2%"


def test_markdown_and_latex() -> None:
    rows = [
        row("a|b_1", 0, clean=share(0.8125), worst_clean=loss(0.5)),
        row("c", 1, clean=share(0.5), gap=Cell(0.25, unit="pp")),
    ]
    assert table(rows, "md").splitlines() == [
        "| run | method | seed | weights | clean (%) | worst clean | gap (pp) |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        "| a\\|b_1 | AT | 0 | raw | 81.2 | 0.500 | - |",
        "| c | AT | 1 | raw | 50.0 | - | 25.0 |",
    ]
    text = table(by_seed(ROWS), "latex", 2)
    lines = text.splitlines()
    assert lines[0] == r"\begin{tabular}{llllrr}"
    assert lines[2] == r"run & method & seeds & weights & clean (\%) & worst clean \\"
    assert lines[4] == r"at-* & AT & 3, 5, 4 & raw & 86.0 $\pm$ 6.2 & 0.030 $\pm$ 0.014 (n = 2) \\"
    assert lines[5].endswith(r"& 70 & - \\")
    assert lines[-1] == r"\end{tabular}"
    assert r"a|b\_1" in table(rows, "latex")
    assert r"\textbackslash{}\{\$\&\#\textasciitilde{}\textasciicircum{}\}" in table(
        [row("\\{$&#~^}", 0, clean=share(0.5))], "latex"
    )


def test_csv_and_json_hold_every_digit() -> None:
    third = 1 / 3
    rows = [row("a,b", 0, clean=share(third)), row("c", 1, worst_clean=loss(0.5))]
    first, second = csv.DictReader(io.StringIO(table(rows, "csv", 1)))
    assert (first["run"], float(first["clean"]), float(first["clean low"])) == ("a,b", third, 0.1)
    assert (first["clean high"], first["clean deviation"], first["clean count"]) == ("0.9", "", "1")
    assert (second["clean"], second["worst_clean"], second["seeds"]) == ("", "0.5", "1")
    grouped = next(csv.DictReader(io.StringIO(table(by_seed(ROWS), "csv"))))
    assert float(grouped["clean deviation"]) == pytest.approx(statistics.stdev([0.81, 0.84, 0.93]))
    assert (grouped["seeds"], grouped["clean count"]) == ("3 5 4", "3")
    found = json.loads(table([row("a", 0, clean=share(math.inf))], "json"))
    assert found[0]["cells"]["clean"]["value"] is None, "JSON has no infinity"
    assert json.loads(table(rows, "json"))[0]["cells"]["clean"]["value"] == third


def test_forms_and_digits_that_there_are_not() -> None:
    with pytest.raises(UserError, match="text, md, csv, latex, json, got 'xls'"):
        table(ROWS, "xls")
    for digits in (0, 16):
        with pytest.raises(UserError, match="1 to 15"):
            table(ROWS, "md", digits)


def test_the_terminal_shows_groups_too() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(Comparison(by_seed(ROWS)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3, 5, 4" in text
    assert "86.0 ± 6.2%" in text
