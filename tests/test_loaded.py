"""A run in Python: its frames equal its files, and its figures say the same on every medium."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Picture
from test_report import landscape, make, metrics
from train_support import trained

import robustflat as rf
from robustflat.errors import UserError
from robustflat.report import paper
from robustflat.report.chart import Axis, Chart, Series
from robustflat.report.palette import DARK, LIGHT, ROLES, colour


def lines(picture: Picture, title: str) -> dict[str, Any]:
    """The curves of a panel by name."""
    (panel,) = [axes for axes in picture.axes if axes.get_title(loc="left") == title]
    return {str(line.get_label()): line for line in panel.get_lines()}


def test_metrics_are_a_frame(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    run = rf.load_run(folder.root)
    frame = run.metrics
    assert list(frame.index) == [1, 2, 3, 4, 5, 6]
    assert list(frame["train_loss"]) == [2.0 / epoch for epoch in range(1, 7)]
    for split in ("train", "validation"):
        found = frame[f"monitor.{split}.robust_accuracy"]
        assert [math.isnan(v) for v in found] == [True, False] * 3
        expected = [row["monitor"][split]["robust_accuracy"] for row in metrics() if row["monitor"]]
        assert list(found.dropna()) == expected
    empty = make(tmp_path / "b", bare=True)
    assert len(rf.load_run(str(empty.root)).metrics) == 0


def test_results_and_how_a_notebook_shows_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "a<b>")
    run = rf.load_run(folder.root)
    assert tuple(run.results.loc["worst case"]) == (
        0.5,
        pytest.approx(0.4387),
        pytest.approx(0.5587),
    )
    assert run.results.loc["best - last", "value"] == 0.0371
    shown = run._repr_html_()
    assert "a&lt;b&gt;" in shown
    assert "<td>0.5</td>" in shown
    assert repr(run) == f"Run({str(folder.root)!r})"
    bare = rf.load_run(make(tmp_path / "b", bare=True).root)
    assert len(bare.results) == 0
    assert "run.evaluate()" in bare._repr_html_()
    with pytest.raises(UserError, match="does not exist"):
        rf.load_run(tmp_path / "none")


def test_a_run_is_evaluated_and_measured(tmp_path: Path) -> None:
    run = rf.load_run(trained(tmp_path).root)
    found = run.evaluate(["fgsm"], samples=20, checkpoints=("last",), gap_samples=0)
    classes = found["checkpoints"]["last"]["test"]["classes"]
    test = found["checkpoints"]["last"]["test"]
    assert sum(one["count"] for one in classes.values()) == test["count"] == 20
    for key, total in (("clean", "clean_accuracy"), ("robust", "robust_accuracy")):
        assert sum(one[key] for one in classes.values()) == round(20 * test[total])
    assert run.results.loc["fgsm", "value"] == test["attacks"]["fgsm"]["accuracy"]
    stronger = run.evaluate(["fgsm"], norm="linf", eps=0.0, samples=20, gap_samples=0)
    (entry,) = [e for e in stronger["checkpoints"].values() if e["test"]]
    assert entry["test"]["robust_accuracy"] == entry["test"]["clean_accuracy"]
    measured = run.flatness(["average_clean"], samples=10, options={"radius": 0.02})
    assert measured["samples"] == 10
    assert json.loads(run.folder.flatness.read_text())["measurements"][0]["samples"] == 10
    with pytest.raises(UserError, match="no 'sample'"):
        run.evaluate(sample=3)


def test_figures_show_the_files_numbers_and_are_saved(tmp_path: Path) -> None:
    run = rf.load_run(make(tmp_path / "a").root)
    drawing = run.figure()
    picture = drawing.picture()
    robust = lines(picture, "Robust accuracy")
    left, right = (panel.get_subplotspec() for panel in picture.axes[:2])
    assert (left.rowspan, left.colspan.start, right.colspan.start) == (right.rowspan, 0, 1)
    assert list(robust["a"].get_xdata()) == [2, 4, 6]
    assert list(robust["a"].get_ydata()) == pytest.approx([58, 56, 54])
    # Train has no line in the legend but in its key: dashed.
    (train,) = [at for at in picture.axes[0].get_lines() if at.get_linestyle() == "--"]
    assert list(train.get_ydata()) == pytest.approx([30, 60, 90])
    assert train.get_color() == LIGHT[0]
    legend = picture.axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [
        "a", "validation", "train", "best checkpoint",
    ]  # fmt: skip
    styles = [(at.get_linestyle(), at.get_marker()) for at in legend.get_lines()]
    assert styles == [("-", "None"), ("-", "None"), ("--", "None"), ("None", "o")]
    legend = run.figure("gaps").picture().axes[0].get_legend()
    hollow = [at.get_markerfacecolor() == "none" for at in legend.get_lines()]
    assert [t.get_text() for t in legend.get_texts()] == ["train", "validation", "test"]
    assert hollow == [False, True, False]
    gap = lines(picture, "Gap of the robust accuracy (train − validation)")
    assert list(gap["a"].get_ydata()) == pytest.approx([30 - 58, 60 - 56, 90 - 54])
    assert "<svg" in drawing._repr_html_()
    for ending in ("png", "svg", "pdf", "html"):
        target = drawing.save(tmp_path / "o" / f"curves.{ending}")
        assert target.stat().st_size > 5000
    (interactive, *_) = drawing.plotly()
    assert list(interactive.data[0].y) == pytest.approx([58, 56, 54])
    assert interactive.data[0].line.color == LIGHT[0]
    landscape(planar=True).save(run.folder.landscapes / "plane.json")
    assert [f.data[0].type for f in run.figure("landscapes").plotly()][-2:] == [
        "contour",
        "surface",
    ]
    with pytest.raises(UserError, match="There are attacks, gaps"):
        run.figure("speed")
    with pytest.raises(UserError, match="was measured"):
        run.figure("spectra")
    with pytest.raises(UserError, match="cannot be written"):
        drawing.save(tmp_path / "curves.docx")


def test_attacks_on_paper_run_downwards_with_their_intervals(tmp_path: Path) -> None:
    picture = rf.load_run(make(tmp_path / "a").root).figure("attacks").picture()
    (panel,) = picture.axes
    bottom, top = panel.get_ylim()
    assert bottom > top
    (marks,) = [line for line in panel.get_lines() if line.get_label() == "a"]
    assert list(marks.get_xdata()) == pytest.approx([81.3, 54.3, 50.0])
    whiskers = [line.get_xdata() for line in panel.get_lines() if line is not marks]
    assert [(t.get_text(), t.xy[0]) for t in panel.texts][2] == ("50.0", pytest.approx(55.87))
    assert [list(w) for w in whiskers][-1] == pytest.approx([43.87, 55.87])
    names = [tick.get_text() for tick in panel.get_yticklabels()]
    assert names == ["no attack", "pgd-20", "square"]


def test_bands_bars_gaps_and_scales_on_paper() -> None:
    band = Series(name="b", run=1, x=[0, 1, 2], y=[1.0, 2.0, None], low=[0.5, 1.0, None],
                  high=[2.0, 3.0, None])  # fmt: skip
    bar = Series(
        name="", run=2, x=[1.0], y=[0.5], low=[0.25], high=[0.75], line=None, mark="square"
    )
    chart = Chart(title="t", series=[band, bar], x=Axis(label="x"), y=Axis(log=True))
    (panel,) = paper.draw([chart]).axes
    (shade,) = panel.collections
    points = shade.get_paths()[0].vertices
    assert points[:, 1].min() == 0.5
    assert points[:, 1].max() == 3.0
    assert panel.get_yscale() == "log"
    ends = [list(line.get_ydata()) for line in panel.get_lines()]
    assert [0.25, 0.75] in ends
    assert [t.get_text() for t in panel.get_legend().get_texts()] == ["b"]
    with pytest.raises(UserError, match="nothing to draw"):
        paper.draw([])


# --- the palette

# Machado, Oliveira & Fernandes (2009), severity 1, in linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def linear(text: str) -> np.ndarray[Any, Any]:
    parts = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(to_xyz @ rgb.clip(0, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_colours_are_told_apart_by_everybody(colours: tuple[str, ...], vision: str) -> None:
    seen = [lab(VISIONS[vision] @ linear(one)) for one in colours]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            # Cube roots alone are a little off the standard in the dark, so 30 and not 32.
            assert np.linalg.norm(one - other) > 30


def test_a_run_has_the_same_hue_on_both_pages() -> None:
    """Who speaks of the orange curve means the same run as who looks at it in the dark."""
    for light, dark in zip(LIGHT, DARK, strict=True):
        (_, *one), (_, *other) = lab(linear(light)), lab(linear(dark))
        angle = np.angle(complex(*one) / complex(*other), deg=True)
        grey = max(np.linalg.norm(one), np.linalg.norm(other)) < 10
        assert grey or abs(angle) < 25, (light, dark)


@pytest.mark.parametrize(("colours", "theme"), [(LIGHT, "light"), (DARK, "dark")])
def test_colours_stand_out_from_the_page(colours: tuple[str, ...], theme: str) -> None:
    def bright(text: str) -> float:
        return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(text)) + 0.05

    page = bright(ROLES[theme]["page"])
    for name, least in [*((c, 3.0) for c in colours), (ROLES[theme]["ink"], 7.0),
                        (ROLES[theme]["soft"], 4.5)]:  # fmt: skip
        ratio = bright(name) / page
        assert max(ratio, 1 / ratio) >= least, name
    assert colour(len(LIGHT)) == LIGHT[0]
