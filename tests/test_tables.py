"""What the terminal and TensorBoard show equals what was measured."""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from robustflat.cli.output import console
from robustflat.flatness import Progress
from robustflat.report.progress import Counter, ProgressBar
from robustflat.report.tables import Comparison, evaluation_table, gap_table, grid, significant
from robustflat.runs.comparison import Cell, Row, columns


def shown(thing: Any, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def line(text: str, name: str) -> list[str]:
    """The cells of the row that a table begins with a name."""
    (found,) = [row for row in text.splitlines() if row.strip("│┃ ").startswith(name)]
    return [cell.strip() for cell in found.strip("│┃").replace("┃", "│").split("│")]


def figures(robust: float | None, loss: float = 1.0) -> dict[str, float]:
    clean = {"clean_accuracy": 0.9, "clean_loss": 0.25}
    return clean if robust is None else {**clean, "robust_accuracy": robust, "robust_loss": loss}


def row(epoch: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "steps": 8 * epoch,
        "lr": 0.1,
        "train_loss": 1.5,
        "gradient_norm": 2.0,
        "skipped_steps": 0,
        "seconds": 3.0,
        "monitor": None,
        "monitor_average": None,
        "is_best": False,
        **changes,
    }


def monitored(train: float | None, validation: float | None) -> dict[str, Any]:
    return {"train": figures(train, 0.5), "validation": figures(validation, 0.875)}


def test_comparison_has_every_column_and_leaves_out_nothing() -> None:
    rows = [
        Row("one", "AT", (0,), {"clean": Cell(0.9012), "worst_clean": Cell(0.01234, unit="")}),
        Row(
            "two",
            "AT + awp(gamma=0.01)",
            (1,),
            {"clean": Cell(0.5), "best - last": Cell(-0.025, unit="pp")},
        ),
    ]
    assert columns(rows) == ["clean", "worst_clean", "best - last"]
    text = shown(Comparison(rows))
    assert line(text, "run ") == ["run", "one", "two"]
    assert line(text, "method") == ["method", "AT", "AT + awp(gamma=0.01)"]
    assert line(text, "seed") == ["seed", "0", "1"]
    assert line(text, "clean ") == ["clean", "90.1%", "50.0%"]
    assert line(text, "worst clean") == ["worst clean", "0.0123", "-"]
    assert line(text, "best - last ") == ["best - last", "-", "-2.5 pp"]


@pytest.mark.parametrize(("width", "tables"), [(60, 4), (80, 3), (100, 2), (130, 2), (200, 1)])
def test_no_name_is_cut_however_narrow_the_terminal(width: int, tables: int) -> None:
    names = [f"cifar10-preact-resnet18-{method}" for method in ("at", "awp", "sam", "trades-awp")]
    cells = {"AutoAttack": Cell(0.5), "worst_robust": Cell(0.0009, unit="")}
    rows = [Row(name, f"AT + method{i}(gamma=0.01)", (i,), cells) for i, name in enumerate(names)]
    text = shown(Comparison(rows), width)
    for i, name in enumerate(names):
        assert name in text
        assert f"AT + method{i}(gamma=0.01)" in text
    assert "..." not in text
    assert "…" not in text
    assert all(len(row) <= width for row in text.splitlines())
    assert text.count("Runs compared") == text.count("AutoAttack ") == tables
    assert text.count("0.000900") == 4


def test_a_name_longer_than_the_terminal_is_folded_not_cut() -> None:
    name = "".join(f"part{i}-" for i in range(12))
    text = shown(Comparison([Row(name, "AT", (0,), {"clean": Cell(0.5)})]), 40)
    heads = [part for part in text.splitlines() if "┃" in part]
    assert name in "".join(heads).translate({ord(c): None for c in "┃ "}).replace("run", "")
    assert all(len(part) <= 40 for part in text.splitlines())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0009, "0.000900"), (0.001, "0.00100"), (0.01234, "0.0123"), (0.25, "0.250"),
        (12.0, "12.0"), (123.4, "123"), (1234.0, "1230"), (0.9996, "1.00"), (-0.0271, "-0.0271"),
        (3.21e-9, "3.21e-09"), (4.56e9, "4.56e+09"), (0.0, "0"),
    ],
)  # fmt: skip
def test_figures_have_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_evaluation_table_gives_every_attack() -> None:
    attacks = {
        name: {
            "accuracy": accuracy, "interval": [accuracy - 0.01, accuracy + 0.02],
            "attacked": attacked, "broken": 7, "seconds": 1.26, "after": after,
        }
        for name, accuracy, attacked, after in (
            ("pgd-20", 0.6543, 180, None), ("square", 0.6, 131, "fab-t")
        )
    }  # fmt: skip
    result = {"clean_accuracy": 0.9, "clean_interval": [0.85, 0.94], "attacks": attacks}
    result |= {"robust_accuracy": 0.5, "robust_interval": [0.45, 0.55]}
    text = shown(evaluation_table("run: best", result))
    assert line(text, "none (clean)")[:3] == ["none (clean)", "90.00%", "85.0% .. 94.0%"]
    assert line(text, "pgd-20") == ["pgd-20", "65.43%", "64.4% .. 67.4%", "180", "7", "1.3"]
    assert line(text, "square after fab-t")[3] == "131"
    assert line(text, "worst case")[1:3] == ["50.00%", "45.0% .. 55.0%"]


def test_the_gap_is_a_table_with_differences_and_intervals() -> None:
    def figure(value: float | None, spread: float = 0.0) -> dict[str, float | None]:
        ends = (None, None) if value is None else (value - spread, value + spread)
        return {"value": value, "low": ends[0], "high": ends[1]}

    splits = {
        "train": {"robust_accuracy": figure(0.9), "robust_loss": figure(0.25)},
        "test": {"robust_accuracy": figure(0.625), "robust_loss": figure(None)},
    }
    gaps = {"robust_accuracy": figure(0.275, 0.05), "robust_loss": figure(None)}
    gaps["clean_loss"], splits["train"]["clean_loss"] = figure(-0.0), figure(0.5)
    splits["test"]["clean_loss"] = figure(0.5)
    found = {"splits": splits, "gaps": {"train-test": gaps}}
    report = {
        "run": "[a]", "gap_attack": "pgd-20",
        "overfitting": {"robust_accuracy": figure(-0.02, 0.01)},
        "checkpoints": {"best": {"gap": None}, "last": {"gap": found}},
    }  # fmt: skip
    text = shown(gap_table(report))
    assert "[a]: robust-generalization gap, pgd-20" in text
    rows = [
        [c.strip() for c in one.strip("│").split("│")] for one in text.splitlines() if "│" in one
    ]
    assert rows == [
        ["last", "robust accuracy", "90.00%", "62.50%", "+27.50 pp", "+22.50 pp .. +32.50 pp"],
        ["last", "robust loss", "0.250", "not finite", "not finite", "not finite .. not finite"],
        ["last", "clean loss", "0.500", "0.500", "+0.000", "+0.000 .. +0.000"],
        ["best - last", "robust accuracy", "", "", "-2.00 pp", "-3.00 pp .. -1.00 pp"],
    ]
    assert gap_table({**report, "overfitting": None}).row_count == 3


@pytest.mark.parametrize("name", ["[red]run", "[/]", "a[b]c", "[link=x]y"])
def test_names_are_no_markup(name: str) -> None:
    assert name in shown(Comparison([Row(name, "AT", (0,), {name: Cell(0.5)})]))
    attack = {"accuracy": 0.5, "interval": [0, 1], "attacked": 1, "broken": 1, "seconds": 0.0}
    attack["after"] = None
    result = {"clean_accuracy": 0.9, "clean_interval": [0, 1], "attacks": {name: attack}}
    text = shown(evaluation_table(f"{name}: best", result))
    assert text.count(name) == 2
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True)
    with Counter(console, name) as counter:
        counter.on_attack(name, 1, 2, 90)
        counter.on_measure(Progress(measure=name, done=1.0, total=4.0))
    assert name in file.getvalue()


def epoch_line(measured: dict[str, Any]) -> str:
    file = io.StringIO()
    bar = ProgressBar(Console(file=file, width=60), "run")
    bar.on_start(10, 8, 16)
    bar.on_step(2, 3, {})
    bar.on_epoch(measured)
    bar.on_end()
    return file.getvalue()


def test_progress_says_how_a_run_fares() -> None:
    text = epoch_line(row(3, monitor=monitored(0.75, 0.5), is_best=True))
    (found,) = [part for part in text.splitlines() if "epoch" in part]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d run epoch 3/10 loss 1.500 train clean 90.0% robust 75.0% "
        r"val clean 90.0% robust 50.0% best \d+ s left",
        " ".join(found.split()),
    )
    averaged = row(monitor=monitored(1.0, 1.0), monitor_average=monitored(0.25, 0.125))
    assert "12.5%" in epoch_line(averaged)
    assert "100.0%" not in epoch_line(averaged)
    assert "robust" not in epoch_line(row(monitor=monitored(None, None)))
    assert "clean" not in epoch_line(row())
    assert "loss" not in epoch_line(row(monitor=monitored(0.5, 0.5), train_loss=None))
    assert "nan" in epoch_line(row(monitor=monitored(0.5, 0.5), train_loss=math.nan))


def test_counters_show_how_far_they_are() -> None:
    file = io.StringIO()
    with Counter(Console(file=file, width=120, force_terminal=True), "run") as counter:
        counter.on_attack("pgd-20", 1, 4, 90)
        counter.on_attack("pgd-20", 2, 4, 85)
        counter.on_measure(Progress(measure="hessian_max", done=1.0, total=4.0))
    text = file.getvalue()
    assert "run  pgd-20: 85 standing" in text
    assert "run  hessian_max" in text


def test_what_programs_read_has_no_blanks_at_the_end_of_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [Row("one", "AT", (0,), {"clean": Cell(0.9)})]
    console().print(Comparison(rows))
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "Runs compared"
    assert not re.search(r" $", said, flags=re.MULTILINE)
    assert line(said, "clean ") == ["clean", "90.0%"]


def test_a_pipe_that_holds_no_boxes_gets_a_table_without(monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(held, encoding="ascii"))
    out = console()
    out.print(grid("title", ["a", "b"], [["x", "1"]]))
    sys.stdout.flush()
    text = held.getvalue().decode("ascii")
    assert "x" in text
    assert "+-" in text
