"""A run is followed from another terminal, and told in plain lines where there is none."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_tables import monitored, row
from train_support import config

from robustflat.errors import UserError
from robustflat.report import following
from robustflat.report.following import Trace, follow
from robustflat.report.progress import Pace, ProgressBar, duration, figures
from robustflat.train import train
from robustflat.train.folder import RunFolder


def console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=200, force_terminal=terminal), file


@pytest.mark.parametrize("terminal", [False, True])
def test_plain_lines_have_times_and_no_bar(terminal: bool) -> None:
    where, file = console(terminal=terminal)
    bar = ProgressBar(where, "run", plain=True)
    bar.on_start(10, 8, 0)
    bar.on_step(0, 7, {"images_per_second": 1234.5})
    bar.on_epoch(row(1, monitor=monitored(0.75, 0.5)))
    bar.on_epoch(row(2))
    bar.on_end()
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert re.match(r"\d\d:\d\d:\d\d  run  epoch   1/10  loss 1.500  train clean", lines[0])
    assert "1,234 images/s" in lines[0]
    assert lines[0].endswith(" left")
    assert "epoch   2/10" in lines[1]
    assert "\x1b" not in file.getvalue()


def test_a_terminal_has_a_bar_with_epoch_steps_and_throughput() -> None:
    where, file = console(terminal=True)
    bar = ProgressBar(where, "[red]run", plain=False)
    bar.on_start(10, 8, 16)
    bar.on_step(4, 3, {"images_per_second": 99.0})
    bar._progress.refresh()
    bar.on_end()
    assert "[red]run  epoch 5/10" in file.getvalue()
    assert "36/80" in file.getvalue()
    assert "99 images/s" in file.getvalue()


def test_averaged_weights_are_said() -> None:
    where, file = console()
    bar = ProgressBar(where, "run")
    bar.on_start(10, 8, 0)
    bar.on_epoch(row(1, monitor=monitored(0.75, 0.5), monitor_average=monitored(0.5, 0.25)))
    assert "(averaged weights)" in file.getvalue()
    assert "25.0%" in file.getvalue()


def test_the_time_left_is_that_of_the_steps_taken_since_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("robustflat.report.progress.time.monotonic", lambda: now)
    pace = Pace()
    pace.start(10, 10, 40)
    assert pace.left() == ""
    now = 130.0
    pace.step(4, 9, {})  # 10 steps in 30 s, 50 to go
    assert pace.left() == "2 min left"
    pace.step(9, 9, {})
    assert pace.left() == ""
    assert [duration(s) for s in (45, 119, 720, 12060)] == ["45 s", "2 min", "12 min", "3 h 21 min"]


def test_a_trace_says_how_far_a_run_is(tmp_path: Path) -> None:
    folder, _ = train(config(tmp_path, monitor__step_every=3), listeners=lambda f: [Trace(f.root)])
    said = json.loads(folder.progress_file.read_text())
    assert (said["state"], said["done"], said["steps"], said["epochs"]) == ("finished", 8, 4, 2)
    assert said["values"]["lr"] > 0
    assert abs(said["time"] - time.time()) < 60


def test_a_run_that_stops_early_says_so(tmp_path: Path) -> None:
    trace = Trace(tmp_path)
    trace.on_start(3, 4, 0)
    trace.on_step(0, 1, {})
    trace.on_epoch(row(1))
    trace.on_end()
    file = RunFolder(tmp_path).progress_file
    assert json.loads(file.read_text())["state"] == "stopped"
    trace.on_epoch(row(2, ended="patience"))
    trace.on_end()
    assert json.loads(file.read_text())["state"] == "finished"


def test_following_shows_every_epoch_of_a_run_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_EVERY", 0.02)
    folder, trace = RunFolder(tmp_path / "run"), Trace(tmp_path / "run")
    folder.prepare(config(tmp_path), resume=False)
    trace.on_start(3, 8, 0)
    where, file = console()
    ended: list[str] = []
    other = threading.Thread(target=lambda: ended.append(follow(folder, where)))
    other.start()
    for epoch in (1, 2, 3):
        trace.on_step(epoch - 1, 7, {"images_per_second": 10.0})
        measured: dict[str, Any] = row(epoch, monitor=monitored(0.5, epoch / 8))
        folder.append_metrics(measured)
        trace.on_epoch(measured)
        time.sleep(0.05)
    trace.on_end()
    other.join(10)
    assert ended == ["finished"]
    lines = file.getvalue().splitlines()
    assert [re.findall(r"epoch +(\d)/3", text) for text in lines] == [["1"], ["2"], ["3"]]
    assert "37.5%" in lines[2]


def test_a_trace_is_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 100.0, []
    monkeypatch.setattr(following.time, "monotonic", lambda: now)
    monkeypatch.setattr(following, "write_json", lambda path, said, **_: written.append(said))
    trace = Trace(tmp_path)
    trace.on_start(3, 8, 0)
    for step, later in enumerate((100.4, 100.9, 101.1, 101.5, 102.2)):
        now = later
        trace.on_step(0, step, {})
    assert [said["done"] for said in written] == [0, 3, 5]


def test_a_run_that_goes_back_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = RunFolder(tmp_path / "run"), Trace(tmp_path / "run")
    folder.prepare(config(tmp_path), resume=False)
    trace.on_start(3, 8, 0)
    for epoch, accuracy in ((1, 0.25), (2, 0.5)):
        folder.append_metrics(row(epoch, monitor=monitored(0.5, accuracy)))
    waits = iter(range(2))

    def sleep(seconds: float) -> None:
        if next(waits) == 0:  # as it is after --overwrite
            folder.metrics_file.unlink()
            folder.append_metrics(row(1, monitor=monitored(0.5, 0.125)))
        else:
            trace.on_end()

    monkeypatch.setattr(following.time, "sleep", sleep)
    where, file = console()
    follow(folder, where)
    found = [
        re.findall(r"epoch +(\d)/3.*robust +([\d.]+)%", t) for t in file.getvalue().splitlines()
    ]
    assert found == [[("1", "25.0")], [("2", "50.0")], [("1", "12.5")]]


def test_an_epoch_that_collapsed_says_so() -> None:
    def said(epoch: int) -> list[str]:
        return figures(row(3, monitor=monitored(0.75, 0.5), alarm={"epoch": epoch}))

    assert said(3)[-1] == "collapsed"
    assert "collapsed" not in said(2)


def test_a_run_that_says_nothing_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = RunFolder(tmp_path / "run"), Trace(tmp_path / "run")
    folder.prepare(config(tmp_path), resume=False)
    trace.on_start(3, 8, 0)
    monkeypatch.setattr(following, "_SILENT", -1.0)
    waits = iter(range(3))

    def sleep(seconds: float) -> None:
        if next(waits) == 2:
            trace.on_end()

    monkeypatch.setattr(following.time, "sleep", sleep)
    where, file = console()
    assert follow(folder, where) == "stopped"
    assert file.getvalue().count("no sign of life") == 1


def test_what_is_no_run_under_way_is_one_sentence(tmp_path: Path) -> None:
    where, _ = console()
    with pytest.raises(UserError, match="does not exist"):
        follow(RunFolder(tmp_path / "nowhere"), where)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config(tmp_path), resume=False)
    for content in (None, "{", "[]", '{"state": "training"}'):
        if content is not None:
            folder.progress_file.write_text(content)
        with pytest.raises(UserError, match="nothing to follow"):
            follow(folder, where)
