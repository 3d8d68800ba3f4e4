"""The report page: what it says equals the runs' files, whatever they hold and lack."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_support import config, measurements

from robustflat.config import write_config
from robustflat.errors import UserError
from robustflat.evaluate.shown import Shown
from robustflat.files import write_json
from robustflat.landscapes import Landscape
from robustflat.report import figures, interactive, page_pictures
from robustflat.report.chart import Axis, Chart, Plane, Series, is_empty
from robustflat.report.page import write_landscapes, write_page
from robustflat.report.palette import themes
from robustflat.report.record import read_records
from robustflat.train.folder import RunFolder

VOID = {"meta", "input", "br", "img"}


@pytest.fixture(autouse=True)
def small_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly's five megabytes are for browsers only."""
    if "browser" not in request.fixturenames:
        monkeypatch.setattr(interactive, "library", lambda: "")


class Page(HTMLParser):
    """Elements of a page as (tag, attributes, text inside); every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, "tags are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute stands twice in {tag}"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def find(self, tag: str, kind: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements of a tag, and of a class if one is named."""
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and (kind is None or kind in (attributes.get("class") or "").split())
        ]

    def values(self) -> list[float]:
        """The numbers of all <data> elements, in order."""
        return [float(a["value"] or "nan") for a, _ in self.find("data")]


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def evaluation(robust: float, *, warnings: tuple[str, ...] = (), gap: float = 0.2) -> Any:
    """An evaluation of 200 images with made-up figures, none of which equals another."""
    attacks = {
        name: {
            "accuracy": robust + more, "interval": [robust + more - 0.0613, robust + more + 0.0587],
            "alone": robust + more, "after": None, "attacked": 180 - i,
            "broken": 40 + i, "outside": 0, "seconds": 1.5, "options": {},
        }
        for i, (name, more) in enumerate({"pgd-20": 0.043, "square": 0.0}.items())
    }  # fmt: skip
    test = {
        "count": 200, "clean_accuracy": robust + 0.313, "clean_interval": [0.91, 0.97],
        "robust_accuracy": robust, "robust_interval": [robust - 0.0613, robust + 0.0587],
        "confidence": 0.95, "attacks": attacks, "warnings": list(warnings),
        "suites": {
            name: {key: attack[key] for key in ("accuracy", "interval")} | {"attacks": [name]}
            for name, attack in attacks.items()
        },
        "settings": {"norm": "linf", "eps": 0.1, "seed": 0, "samples": None, "shard": None,
                     "data": "aa", "labels": "bb"},
    }  # fmt: skip

    def figures(accuracy: float, loss: float, half: float) -> dict[str, Any]:
        return {
            "clean_accuracy": interval(accuracy + 0.1, half),
            "robust_accuracy": interval(accuracy, half),
            "clean_loss": interval(loss / 3, half),
            "robust_loss": interval(loss, half),
        }

    def gaps(shift: float) -> dict[str, Any]:
        splits = {
            "train": figures(0.81 + shift, 0.4, 0.011),
            "validation": figures(0.63, 0.9, 0.021),
            "test": figures(0.81 + shift - gap, 1.1, 0.017),
        }
        differences = {
            f"train-{other}": {
                name: interval(abs(figure["value"] - splits[other][name]["value"]), 0.03)
                for name, figure in splits["train"].items()
            }
            for other in ("validation", "test")
        }
        counts = {"train": 300, "validation": 100, "test": 200}
        return {"confidence": 0.95, "counts": counts, "splits": splits, "gaps": differences}

    return {
        "run": "run", "seed": 0, "norm": "linf", "eps": 8 / 255, "gap_attack": "pgd-20",
        "checkpoints": {
            "best": {"epoch": 4, "weights": "raw", "test": test, "gap": gaps(0.0)},
            "last": {"epoch": 6, "weights": "raw", "test": None, "gap": gaps(0.07)},
        },
        "overfitting": {"robust_accuracy": interval(0.0371, 0.01)},
    }  # fmt: skip


def flatness(scale: float = 1.0) -> dict[str, Any]:
    details = {"loss": "clean", "ball": "tensor", "weight_norm": "l2", "radius": 0.1}
    details["example_standard_error"] = 0.0032
    one = {
        "kind": "flatness", "checkpoint": "last", "epoch": 6, "weights": "raw", "samples": 60,
        "norm": "linf", "eps": 0.1, "data": "digits", "split": "train", "attack": None,
        "measures": {
            "average_clean": {
                "value": 0.0271 * scale, "standard_error": 0.0011, "details": details,
            },
            "hessian_min": {"value": None, "standard_error": None, "details": {}},
        },
    }  # fmt: skip
    return {"format": "robustflat-record-2", "subject": "run", "measurements": [one]}


def metrics(train: float = 0.9) -> list[dict[str, Any]]:
    def figures(accuracy: float, loss: float | None) -> dict[str, float | None]:
        return {
            "clean_accuracy": accuracy + 0.05, "clean_loss": 0.3,
            "robust_accuracy": accuracy, "robust_loss": loss,
        }  # fmt: skip

    rows = []
    for epoch in range(1, 7):
        measured = {
            "train": figures(train * epoch / 6, 1.0 / epoch),
            "validation": figures(0.6 - 0.01 * epoch, None if epoch == 2 else 1.25),
        }
        seen = epoch % 2 == 0
        rows.append(
            {"epoch": epoch, "train_loss": 2.0 / epoch, "monitor": measured if seen else None,
             "monitor_average": None, "is_best": epoch == 4,
             "flatness": {"worst_clean": 0.1 * epoch} if seen else None}
        )  # fmt: skip
    return rows


def landscape(planar: bool = False, seed: int = 0) -> Landscape:
    axis = [-0.5, 0.0, 0.5]
    if planar:
        grid = np.array([[1.0, 2.0, 3.0], [2.0, 0.5, math.nan], [4.0, 5.0, 6.0]])
        return Landscape(
            axes=(axis, axis), names=("one", "two"), losses={"robust": grid[None]},
            accuracies={"robust": grid[None] / 10}, points={"model": (0.0, 0.0)}, measured=9,
            about={"directions": "filter", "seed": seed},
        )  # fmt: skip
    # Two draws, whose mean is shown.
    losses = {"clean": np.array([3.0, 0.25, 4.0]), "robust": np.array([5.0, math.nan, 6.0])}
    return Landscape(
        axes=(axis,),
        names=("filter direction 1",),
        losses={kind: np.stack([grid - 0.125, grid + 0.125]) for kind, grid in losses.items()},
        accuracies={"clean": np.array([[0.5, 0.9, 0.4]] * 2)},
        about={"directions": "filter", "seed": 0, "examples": 60},
        measured=6,
    )


def make(root: Path, *, bare: bool = False, **changes: Any) -> RunFolder:
    """A run's folder with everything in it, or with its configuration only."""
    folder = RunFolder(root)
    root.mkdir(parents=True)
    write_config(config(root.parent, **changes), folder.config_file)
    if not bare:
        write_json(folder.evaluation, measurements(evaluation(0.5)))
        write_json(folder.flatness, flatness())
        write_json(folder.environment_file, {"versions": {"torch": "2.0"}, "cuda": None})
        folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in metrics()))
        landscape().save(folder.landscapes / "line.json")
    return folder


def written(tmp_path: Path, *folders: RunFolder) -> str:
    write_page(folders, tmp_path / "out" / "report.html")
    return (tmp_path / "out" / "report.html").read_text("utf-8")


def cells(page: str, label: str) -> list[tuple[dict[str, str | None], str, list[float]]]:
    """Attributes, text and numbers of the comparison's cells in the row of a label."""
    section = page.split("<h2>Comparison</h2>")[1].split("</section>")[0]
    (row,) = [
        row.split("</tr>")[0]
        for row in section.split("<tr")[1:]
        if (words := Page("<table><tr" + row.split("</tr>")[0] + "</tr></table>").find("th"))
        and words[0][1].startswith(label)
        and "<thead" not in row
    ]
    found = Page("<table><tr" + row + "</tr></table>")
    inner = ["<td" + c.split("</td>")[0] + "</td>" for c in row.split("<td")[1:]]
    return [(a, t, Page(c).values()) for (a, t), c in zip(found.find("td"), inner, strict=True)]


def specs(page: str) -> dict[str, dict[str, Any]]:
    """The first drawing of every figure, by its title."""
    found = {}
    for part in page.split("<figure")[1:]:
        inside = Page("<figure" + part.split("</figure>")[0] + "</figure>")
        scripts = inside.find("script")
        if scripts:
            found[inside.find("figcaption")[0][1]] = json.loads(scripts[0][1])
    return found


def key_of(section: str) -> list[tuple[dict[str, str | None], str]]:
    """The marks of a section's key, each with its meaning."""
    (key,) = re.findall(r'<p class="key">(.*?)</p>', section)
    page = Page(key)
    return [(a, t) for (a, _), (_, t) in zip(page.find("i"), page.find("span"), strict=True)]


def traces(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A drawing's curves by name."""
    return {n: trace for trace in spec["data"] if (n := trace["meta"].get("name"))}


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, make(tmp_path / "a"), make(tmp_path / "b", weights__gamma=0.5))
    page = Page(text)
    for tag, attributes, _ in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert not {"href", "srcset", "action"} & attributes.keys()
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "http" not in text.replace("http-equiv", "").lower()
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [a for a, _ in page.find("meta") if a.get("http-equiv")]
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert "connect" not in (policy["content"] or "")
    # Each figure says what it is to those who do not see it, and has its numbers as a table.
    for attributes, _ in page.find("div", "plot"):
        assert attributes["role"] == "img"
        assert attributes["aria-label"]


def test_hostile_names_and_text_are_only_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'&{{ 7 * 7 }}%{x}"
    # A slash would make folders of it.
    name = bad.replace("/", "∕")
    folder = make(tmp_path / name)
    with folder.config_file.open("a") as file:
        file.write(f"# {bad}\n")
    found = evaluation(0.5, warnings=(bad,))
    tested = found["checkpoints"]["best"]["test"]
    tested["attacks"] = {bad: tested["attacks"]["square"]}
    tested["suites"] = {bad: tested["suites"]["square"] | {"attacks": [bad]}}
    write_json(folder.evaluation, measurements(found))
    write_json(folder.environment_file, {"versions": {bad: bad}, "command": [bad]})
    text = written(tmp_path, folder, make(tmp_path / "b"))
    page = Page(text)
    for attributes, words in page.find("script"):
        assert "alert(1)</" not in words
        assert "alert" not in words or attributes.get("type") == "application/json"
    assert "49" not in page.find("h1")[0][1]
    assert bad in page.find("li")[0][1]
    assert any(bad in words for _, words in page.find("pre"))
    assert name in page.find("h1")[0][1]
    # Neither does the name become an attribute anywhere.
    assert not {k for _, a, _ in page.elements for k in a if k.startswith("on")}
    # Nor markup, or a value, in what Plotly shows when pointed at.
    (trace, *_) = traces(specs(text)["Robust accuracy"]).values()
    assert "<script" not in trace["hovertemplate"]
    assert "%{x}" not in trace["hovertemplate"].split("<extra>")[1]


def test_comparison_shows_the_numbers_of_the_files(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    write_json(two.evaluation, measurements(evaluation(0.3, gap=0.35)))
    text = written(tmp_path, one, two)
    expected = {
        "clean": ([0.813, 0.613], ["81.3%", "61.3%"]),
        "pgd-20": ([0.543, 0.343], ["54.3%", "34.3%"]),
        "worst case": ([0.5, 0.3], ["50.0%", "30.0%"]),
        "Robust gap, accuracy": ([0.2, 0.35], ["20.0 pp", "35.0 pp"]),
        "Robust gap, loss": ([0.7, 0.7], ["0.700", "0.700"]),
        "Robust overfitting": ([0.0371, 0.0371], ["3.7 pp", "3.7 pp"]),
        "average clean": ([0.0271, 0.0271], ["0.0271", "0.0271"]),
    }
    for label, (numbers, shown) in expected.items():
        found = cells(text, label)
        assert [n for _, _, inner in found for n in inner] == pytest.approx(numbers), label
        assert all(t.startswith(s) for (_, t, _), s in zip(found, shown, strict=True)), label
    # The interval of the worst case, and the standard error of the sharpness: of directions and
    # of images, hypot(0.0011, 0.0032).
    assert cells(text, "worst case")[0][1].endswith("43.9 to 55.9%")
    assert cells(text, "average clean")[0][1].endswith("± 0.0034")
    assert cells(text, "square")[0][1].startswith("50.0%")
    # The section on flatness tells the two errors apart.
    said = [t for _, t in Page(text).find("small")]
    assert {"± 0.0011 over directions", "± 0.0032 over images"} <= set(said)
    parts = [t for _, t in Page(text).find("tr", "part")]
    assert parts == [
        "Accuracy on test images", "Robust generalization", "Sharpness of the training loss",
    ]  # fmt: skip


def test_a_run_that_was_not_evaluated_keeps_its_column(tmp_path: Path) -> None:
    full, bare = make(tmp_path / "a"), make(tmp_path / "b", bare=True)
    text = written(tmp_path, full, bare)
    assert [t for _, t, _ in cells(text, "clean")] == ["81.3%91.0 to 97.0%", "–"]


def test_attacks_that_differ_make_one_line_without_dashes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    found = evaluation(0.3)
    test = found["checkpoints"]["best"]["test"]
    for kind in ("attacks", "suites"):
        test[kind]["fab"] = test[kind].pop("pgd-20")
    test["suites"]["fab"]["attacks"] = ["fab"]
    write_json(two.evaluation, measurements(found))
    text = written(tmp_path, one, two)
    assert [t for _, t, _ in cells(text, "other attacks")] == ["pgd-20: 54.3%", "fab: 34.3%"]
    assert "–" not in [t for _, t, _ in cells(text, "worst case") + cells(text, "square")]


def test_other_circumstances_are_told_in_the_cell_and_none_is_better(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    found = evaluation(0.1)
    found["eps"] = 0.25
    write_json(two.evaluation, measurements(found))
    shown = cells(written(tmp_path, one, two), "square")
    assert "linf 8/255" in shown[0][1]
    assert "linf 0.25" in shown[1][1]
    assert not any("better" in str(attributes) for attributes, *_ in shown)


@pytest.mark.parametrize(
    ("robust", "gap", "scale", "better"),
    [
        # 0.0613 + 0.0587 = 0.12 is where the intervals of two robust accuracies just meet.
        (0.381, 0.2, 1.0, {}),
        (0.379, 0.2, 1.0, {"worst case": 0}),
        (0.619, 0.2, 1.0, {}),
        (0.621, 0.2, 1.0, {"worst case": 1}),
        # Gaps of +- 0.03: 0.2 and 0.13 are apart, and the smaller is the better one.
        (0.5, 0.13, 1.0, {"Robust gap, accuracy": 1}),
        (0.5, 0.15, 1.0, {}),
        # Standard errors 0.0034: 2 * 1.96 * 0.0034 = 0.0133 apart is enough, 0.0122 is not.
        (0.5, 0.2, 0.5, {"average clean": 1}),
        (0.5, 0.2, 0.55, {}),
    ],
)
def test_better_only_beyond_the_intervals(
    tmp_path: Path, robust: float, gap: float, scale: float, better: dict[str, int]
) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    write_json(two.evaluation, measurements(evaluation(robust, gap=gap)))
    write_json(two.flatness, flatness(scale))
    text = written(tmp_path, one, two)
    for label in ("worst case", "pgd-20", "Robust gap, accuracy", "average clean"):
        marked = [i for i, (a, _, _) in enumerate(cells(text, label)) if "better" in str(a)]
        # The intervals of PGD's accuracies are as wide and as far apart.
        expected = better.get("worst case" if label == "pgd-20" else label)
        assert marked == ([] if expected is None else [expected]), label


def test_curves_hold_the_metrics(tmp_path: Path) -> None:
    drawn = specs(written(tmp_path, make(tmp_path / "z"), make(tmp_path / "a")))
    robust = traces(drawn["Robust accuracy"])
    for name, expected in (("train", [30, 60, 90]), ("validation", [58, 56, 54])):
        assert robust[f"a, {name}"]["x"] == [2, 4, 6]
        assert robust[f"a, {name}"]["y"] == pytest.approx(expected, rel=1e-12)
    assert traces(drawn["Clean accuracy"])["a, train"]["y"] == pytest.approx([35, 65, 95])
    assert traces(drawn["Clean loss"])["a, train"]["y"] == [0.3, 0.3, 0.3]
    loss = traces(drawn["Robust loss"])
    assert loss["a, validation"]["y"] == [None, 1.25, 1.25], "null is no point"
    assert loss["a, train"]["y"] == pytest.approx([1 / 2, 1 / 4, 1 / 6])
    assert not loss["a, validation"]["connectgaps"]
    # Train is dashed, and a dot stands out at the best epoch, on validation only.
    assert (robust["a, train"]["line"]["dash"], robust["a, validation"]["line"]["dash"]) == (
        "dash", "solid",
    )  # fmt: skip
    sizes = robust["a, validation"]["marker"]["size"]
    assert sizes[1] > max(sizes[0], sizes[2])
    assert "marker" not in robust["a, train"]["mode"]
    # Each run has its own colour.
    assert robust["z, train"]["line"]["color"] == "@0@"
    assert robust["a, train"]["line"]["color"] == "@1@"
    assert robust["a, train"]["meta"]["run"] == 1
    # The legend has each run once, by a solid line.
    listed = [t for t in drawn["Robust accuracy"]["data"] if t["showlegend"]]
    assert [(t["name"], t["line"]["dash"]) for t in listed] == [("z", "solid"), ("a", "solid")]
    assert robust["a, train"]["legendgroup"] == "a"
    # The gap is larger where it is worse: train minus validation, for the loss the other way.
    gap = drawn["Gap of the robust accuracy (train − validation)"]
    assert traces(gap)["a"]["y"] == pytest.approx([30 - 58, 60 - 56, 90 - 54])
    assert gap["layout"]["yaxis"]["title"]["text"] == "pp"
    assert drawn["Robust accuracy"]["layout"]["yaxis"]["title"]["text"] == ""
    assert (gap["layout"]["yaxis"]["zeroline"], gap["layout"]["yaxis"]["rangemode"]) == (
        True, "tozero",
    )  # fmt: skip
    gap = drawn["Gap of the robust loss (validation − train)"]
    assert traces(gap)["a"]["y"] == [None, pytest.approx(1.25 - 1 / 4), pytest.approx(1.25 - 1 / 6)]
    during = drawn["Flatness during training: worst_clean"]
    assert traces(during)["a"]["y"] == pytest.approx([0.2, 0.4, 0.6])
    assert traces(during)["a"]["x"] == [2, 4, 6]


def test_curves_are_of_the_averaged_weights_where_there_are_any_and_say_so(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    rows = metrics()
    rows[5]["monitor_average"] = {
        split: {**figures_, "robust_accuracy": 0.123}
        for split, figures_ in rows[5]["monitor"].items()
    }
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = written(tmp_path, folder)
    parts = [s for s in text.split("<section>") if "<h2>Learning curves" in s]
    assert traces(specs(parts[0])["Robust accuracy"])["a, train"]["y"][2] == pytest.approx(12.3)
    assert "Of a: of the averaged weights." in parts[0]


def test_marks_stand_where_the_files_say(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    found = evaluation(0.5)
    test = found["checkpoints"]["best"]["test"]
    test["suites"]["autoattack"] = {
        "accuracy": 0.5, "interval": [0.4, 0.6], "attacks": ["pgd-20", "square"],
    }  # fmt: skip
    test["attacks"]["square"]["after"] = "pgd-20"
    last = json.loads(json.dumps(test))
    last["clean_accuracy"] = 0.7
    found["checkpoints"]["last"]["test"] = last
    write_json(folder.evaluation, measurements(found))
    spec = specs(written(tmp_path, folder))["Still classified correctly, with 95% intervals"]
    best, late = traces(spec)["a, best"], traces(spec)["a, last"]
    assert best["x"] == pytest.approx([81.3, 54.3, 50.0])
    assert late["x"][0] == pytest.approx(70.0)
    # Beside the ends of the whiskers.
    words = [t for t in spec["data"] if t["mode"] == "text"]
    assert [t["text"] for t in words] == [
        [f"\u00a0{x}" for x in row] for row in (("81.3", "54.3", "50.0"), ("70.0", "54.3", "50.0"))
    ]
    assert words[0]["x"] == pytest.approx([97.0, 60.17, 55.87])
    assert (words[1]["y"], words[1]["textposition"]) == (late["y"], "middle right")
    assert spec["layout"]["margin"]["r"] > 30, "room for words beside 100 %"
    assert best["error_x"]["array"] == pytest.approx([97 - 81.3, 5.87, 5.87])
    assert best["error_x"]["arrayminus"] == pytest.approx([81.3 - 91, 6.13, 6.13])
    assert (best["marker"]["symbol"], late["marker"]["symbol"]) == ("circle", "circle-open")
    # From top to bottom: the axis runs downwards, and each mark is nearest to its own row.
    axis = spec["layout"]["yaxis"]
    assert axis["ticktext"] == ["no attack", "AutoAttack:<br>pgd-20", "then square"]
    assert axis["range"][0] > axis["range"][1]
    for trace in (best, late):
        nearest = [min(axis["tickvals"], key=lambda tick, y=y: abs(tick - y)) for y in trace["y"]]
        assert nearest == axis["tickvals"]
        assert all(axis["range"][1] < y < axis["range"][0] for y in trace["y"])
    assert all(a < b for a, b in zip(best["y"], late["y"], strict=True))


def test_the_gap_of_every_checkpoint(tmp_path: Path) -> None:
    text = written(tmp_path, make(tmp_path / "a"))
    section = text.split("<h2>Robust-generalization gap</h2>")[1].split("</section>")[0]
    drawn = specs(section)
    found = traces(drawn["Robust accuracy"])
    values = {name: t["x"][0] for name, t in found.items()}
    assert values == pytest.approx({
        "a, best, train": 81, "a, best, validation": 63, "a, best, test": 61,
        "a, last, train": 88, "a, last, validation": 63, "a, last, test": 68,
    })  # fmt: skip
    symbols = {name: t["marker"]["symbol"] for name, t in found.items()}
    assert symbols["a, best, train"] == "square"
    assert symbols["a, best, validation"] == "circle-open"
    assert symbols["a, best, test"] == "circle"
    assert found["a, best, train"]["error_x"]["array"] == pytest.approx([1.1])
    assert round(found["a, best, test"]["y"][0]) == 0
    assert round(found["a, last, test"]["y"][0]) == 1
    axis = drawn["Robust accuracy"]["layout"]["yaxis"]
    assert axis["ticktext"] == ["a, best<br>gap 20.0 pp", "a, last<br>gap 20.0 pp"]
    joins = [t for t in drawn["Robust accuracy"]["data"] if not t["meta"]["name"]]
    assert [t["x"] for t in joins] == [pytest.approx([61, 81]), pytest.approx([63, 88])]
    loss = {name: t["x"][0] for name, t in traces(drawn["Robust loss"]).items()}
    assert (loss["a, best, train"], loss["a, best, test"]) == (0.4, 1.1)
    # In numbers.
    table = section.split("Clean and robust figures of every split</summary>")[1]
    numbers = Page("<section><details>" + table + "</section>").values()
    splits = evaluation(0.5)["checkpoints"]["best"]["gap"]["splits"]
    assert numbers[:4] == [splits["train"][k]["value"] for k in (
        "robust_accuracy", "robust_loss", "clean_accuracy", "clean_loss")]  # fmt: skip
    assert len(numbers) == 2 * 5 * 4
    assert " pp" in table, "a difference of shares is one of points"
    assert "300 train, 100 validation, 200 test" in section
    key = {t: a["class"] for a, t in key_of(section)}
    assert key == {"train": "square", "validation": "circle-open", "test": "circle"}
    assert "L∞, ε = 8/255" in text


def test_a_figure_that_is_not_finite(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    found = evaluation(0.5)
    nothing = {"value": None, "low": None, "high": None}
    for entry in found["checkpoints"].values():
        entry["gap"]["splits"]["test"]["robust_loss"] = nothing
        entry["gap"]["gaps"]["train-test"]["robust_loss"] = nothing
    write_json(folder.evaluation, measurements(found))
    assert "not finite" in written(tmp_path, folder)


def test_accuracy_by_class(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    found = evaluation(0.5)
    found["checkpoints"]["best"]["test"]["classes"] = {
        "cat": {"count": 20, "clean": 18, "robust": 5},
        "dog": {"count": 40, "clean": 30, "robust": 2},
    }
    write_json(folder.evaluation, measurements(found))
    drawn = specs(written(tmp_path, folder))
    for title, expected in (
        ("Clean accuracy by class", [90.0, 75.0]),
        ("Worst-case accuracy by class", [25.0, 5.0]),
    ):
        spec = drawn[title]
        assert traces(spec)["a, best"]["x"] == expected
        assert spec["layout"]["yaxis"]["ticktext"] == ["cat", "dog"]
        assert traces(spec)["a, best"]["y"] == spec["layout"]["yaxis"]["tickvals"]


def pixels(source: str) -> np.ndarray[Any, Any]:
    head, _, content = source.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_examples_are_shown_with_what_they_are_taken_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    x = torch.tensor([[0.0, 1.0], [0.4, 0.6]]).view(2, 1, 1, 2)
    moved = torch.tensor([[0.2, 0.9], [0.3, 0.6]]).view(2, 1, 1, 2)
    shown = {"x": x, "x_adv": moved, "y": torch.tensor([0, 1])}
    Shown(**shown, clean=torch.tensor([0, 0]), attacked=torch.tensor([1, 1])).save(
        folder.outcomes / "some.pt"
    )
    found = evaluation(0.5)
    found["checkpoints"]["best"]["test"]["examples"] = {
        "attack": "pgd-7", "file": "some.pt",
        "images": [
            {"label": "cat", "clean": "cat", "attacked": "dog"},
            {"label": "dog", "clean": "cat", "attacked": "dog"},
        ],
    }  # fmt: skip
    write_json(folder.evaluation, measurements(found))
    text = written(tmp_path, folder, make(tmp_path / "b"))
    (table,) = re.findall(r'<table class="pictures">.*?</table>', text, re.S)
    (section,) = [part for part in text.split("<section>") if part.startswith("<h2>Examples")]
    (lacks,) = re.findall(r'<p class="missing">.*?</p>', section)
    assert Page(lacks).find("span", "name")[0][1] == "b"
    page = Page(table)
    assert [t for _, t in page.find("th")] == [
        "clean", "attacked by pgd-7", "difference, full scale ±0.2",
    ]  # fmt: skip
    rows = [Page("<table><tr" + row + "</table>") for row in table.split("<tr")[1:-1]]
    rows.append(Page("<table><tr" + table.split("<tr")[-1].replace("</tbody>", "")))
    said = [[(t, "wrong" in (a.get("class") or "")) for a, t in r.find("small")] for r in rows]
    assert said == [[("cat", False), ("✗ cat", True)], [("✗ dog", True), ("dog", False)], []]
    alts = [[a["alt"] for a, _ in row.find("img")] for row in rows]
    assert alts[:2] == [
        ["cat, clean", "dog, clean"],
        ["cat, attacked by pgd-7", "dog, attacked by pgd-7"],
    ]
    seen = [[pixels(a["src"] or "").tolist() for a, _ in row.find("img")] for row in rows]
    assert seen[0] == [[[0, 255]], [[102, 153]]]
    assert seen[1] == [[[51, 230]], [[76, 153]]]
    # 0.2 is white, -0.1 half way to black, 0 grey.
    assert seen[2] == [[[255, 64]], [[64, 128]]]
    # Another file, and none at all.
    (folder.outcomes / "some.pt").unlink()
    assert '<table class="pictures' not in written(tmp_path, folder)


def test_large_examples_in_colour_are_made_smaller() -> None:
    image = torch.zeros(3, 120, 240)
    image[0] = 1.0
    found = pixels(page_pictures._source(image))
    assert found.shape == (48, 96, 3)
    assert found[10, 10].tolist() == [255, 0, 0]


def test_landscapes_of_several_directions_have_bands(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    landscape().save(folder.landscapes / "line.json")
    drawn = specs(written(tmp_path, folder))
    spec = drawn["Loss around the weights"]
    clean, robust = traces(spec)["a, clean"], traces(spec)["a, robust"]
    assert (clean["x"], clean["y"]) == ([-0.5, 0.0, 0.5], [3.0, 0.25, 4.0])
    assert robust["y"] == [5.0, None, 6.0]
    assert (clean["line"]["dash"], robust["line"]["dash"]) == ("dash", "solid")
    assert traces(drawn["Accuracy around the weights"])["a, clean"]["y"] == pytest.approx(
        [50, 90, 40]
    )
    assert drawn["Loss around the weights, logarithmic"]["layout"]["yaxis"]["type"] == "log"
    section = written(tmp_path, folder).split("<h2>Weight-loss landscape</h2>")[1]
    section = section.split("</section>")[0]
    assert {t: a["class"] for a, t in key_of(section)} == {"robust": "solid", "clean": "dash"}
    # The legend has the run by its solid line.
    assert [t["line"]["dash"] for t in spec["data"] if t["showlegend"]] == ["solid"]
    one = landscape()
    several = Landscape(
        axes=one.axes, names=one.names, measured=6, about=one.about,
        losses={"clean": np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]])},
        accuracies={"clean": np.full((2, 3), 0.5)},
    )  # fmt: skip
    several.save(folder.landscapes / "line.json")
    low, high, middle = specs(written(tmp_path, folder))["Loss around the weights"]["data"]
    spread = math.sqrt(2)
    assert middle["y"] == [2.0, 2.0, 4.0]
    assert low["y"] == pytest.approx([2 - spread, 2, 4 - spread])
    assert high["y"] == pytest.approx([2 + spread, 2, 4 + spread])
    assert high["fill"] == "tonexty"


def test_planes_lie_as_their_axes_say_on_one_scale(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    landscape(planar=True).save(one.landscapes / "plane.json")
    other = landscape(planar=True)
    axes = (other.axes[0], [1.0, 2.0, 4.0])
    Landscape(
        axes=axes, names=other.names, losses={"robust": 2 * other.losses["robust"]},
        accuracies=other.accuracies, points={"model": (0.5, 1.0)}, measured=9,
    ).save(two.landscapes / "plane.json")  # fmt: skip
    text = written(tmp_path, one, two)
    drawn = specs(text)
    grid = landscape(planar=True).losses["robust"][0]
    contour, model = drawn["b: loss, robust"]["data"]
    assert (contour["x"], contour["y"]) == ([-0.5, 0.0, 0.5], [1.0, 2.0, 4.0])
    for i in range(3):
        for j in range(3):
            expected = None if math.isnan(grid[i, j]) else pytest.approx(2 * grid[i, j])
            assert contour["z"][j][i] == expected, "rows along y, columns along x"
    assert (model["x"], model["y"]) == ([0.5], [1.0])
    assert contour["colorbar"]["title"]["text"] == "loss"
    assert contour["colorscale"] == "Viridis"
    titles = [drawn["b: loss, robust"]["layout"][k]["title"]["text"] for k in ("xaxis", "yaxis")]
    assert titles == list(landscape(planar=True).names)
    ends = [(d["data"][0]["zmin"], d["data"][0]["zmax"]) for t, d in drawn.items() if ": loss" in t]
    assert ends == [(0.5, 12.0)] * 2
    # Also as a surface, of the same values, colours and height.
    surfaces = [
        json.loads(words)
        for _, words in Page(text).find("script")
        if '"surface"' in words and words.startswith("{")
    ]
    assert surfaces[1]["data"][0]["z"] == contour["z"]
    assert surfaces[0]["layout"]["scene"]["zaxis"]["range"] == [0.5, 12.0]
    assert surfaces[0]["layout"]["scene"]["xaxis"]["title"]["text"] == titles[0]
    assert any("drawn in different ways" in words for _, words in Page(text).find("li"))


def test_steep_planes_are_logarithmic_under_the_names_of_their_values() -> None:
    plane = Plane(
        title="t", run=0, axes=([0.0, 1.0], [0.0, 1.0]), names=("x", "y"),
        values=[[0.1, 1.0], [10.0, 0.0]], limits=(0.1, 10.0), log=True,
    )  # fmt: skip
    contour = interactive.plotly(plane)["data"][0]
    assert contour["z"] == [[pytest.approx(-1), pytest.approx(1)], [0.0, None]]
    assert contour["customdata"] == [[0.1, 10.0], [1.0, None]]
    bar = dict(zip(contour["colorbar"]["ticktext"], contour["colorbar"]["tickvals"], strict=True))
    assert bar == pytest.approx({f"{v:g}": math.log10(v) for v in (0.1, 0.2, 0.5, 1, 2, 5, 10)})
    assert (contour["zmin"], contour["zmax"]) == pytest.approx((-1, 1))


def test_a_page_of_landscapes_alone(tmp_path: Path) -> None:
    write_landscapes({"one": landscape(), "</script><b>": landscape()}, tmp_path / "o" / "l.html")
    text = (tmp_path / "o" / "l.html").read_text()
    assert "<b>" not in text.split("<body>")[1]
    assert traces(specs(text)["Loss around the weights"])["one, clean"]["y"] == [3.0, 0.25, 4.0]
    assert len(specs(text)) == 2
    write_landscapes({"one": landscape(planar=True)}, tmp_path / "plane.html")
    for wrong in ({}, {"a": landscape(), "b": landscape(planar=True)}):
        with pytest.raises(UserError, match="all lines or all planes"):
            write_landscapes(wrong, tmp_path / "l.html")


def test_spectra(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    content = flatness()
    content["measurements"][0]["measures"]["hessian_density"] = {
        "value": 0.1, "standard_error": None,
        "details": {"grid": [-1.0, 0.0, 2.0], "density": [0.1, 3.0, 0.0]},
    }  # fmt: skip
    write_json(folder.flatness, content)
    spec = specs(written(tmp_path, folder))["Spectral density of the Hessian"]
    assert traces(spec)["a"]["x"] == [-1.0, 0.0, 2.0]
    assert traces(spec)["a"]["y"] == [0.1, 3.0, None], "no logarithm of zero"


def test_missing_pieces_name_the_command(tmp_path: Path) -> None:
    full, bare = make(tmp_path / "a"), make(tmp_path / "b c", bare=True)
    page = Page(written(tmp_path, full, bare))
    usages = [text for _, text in page.find("code") if text.startswith("robustflat")]
    assert [shlex.split(usage)[1:] for usage in usages] == [
        ["evaluate", str(bare.root)],
        ["evaluate", str(bare.root)],
        ["evaluate", str(full.root), str(bare.root)],  # of the examples
        ["evaluate", str(bare.root)],
        ["train", str(bare.config_file), "--resume"],
        ["flatness", str(bare.root)],
        ["landscape", str(bare.root)],
    ]
    assert all("not measured: run robustflat" in t for _, t in page.find("p", "missing"))
    alone = Page(written(tmp_path, bare))
    assert not alone.find("figure")
    assert len(alone.find("p", "missing")) == 7
    # One command for all that it measures; a training goes on by one of its own.
    other = make(tmp_path / "d", bare=True)
    page = Page(written(tmp_path, bare, other))
    usages = [shlex.split(t)[1:] for _, t in page.find("code") if t.startswith("robustflat")]
    assert usages[-1] == ["landscape", str(bare.root), str(other.root)]
    trained = [["train", str(run.config_file), "--resume"] for run in (bare, other)]
    assert [usage for usage in usages if usage[0] == "train"] == trained
    (said,) = [t for _, t in page.find("p", "missing") if "robustflat landscape" in t]
    assert said.startswith("b c d not measured: run")
    assert [t for _, t in page.find("span", "run-1") if t == "d"]
    # A run that was not monitored will not be by going on with it.
    row = {**metrics()[0], "monitor": None}
    bare.metrics_file.write_text(json.dumps(row))
    assert (
        "not monitored: see the setting monitor.every"
        in Page(written(tmp_path, bare)).find("p", "missing")[4][1]
    )


def test_settings_that_differ_in_effect_and_environments(tmp_path: Path) -> None:
    one = make(tmp_path / "a", seed=3)
    two = make(tmp_path / "b", weights__gamma=0.5, name="other", device="auto", threads=1)
    write_json(two.environment_file, {"versions": {"torch": "2.1"}, "cuda": "H100"})
    text = written(tmp_path, one, two)
    page = Page(text)
    keys = [t for _, t in page.find("code") if not t.startswith("robustflat")]
    assert keys == ["seed", "weights.gamma"], "names, places and devices change no weight"
    plain = make(tmp_path / "c", bare=True, seed=3, weights={"name": "none"})
    keys = [t for _, t in Page(written(tmp_path, one, plain)).find("code")]
    assert {k for k in keys if k.startswith("weights.")} == {"weights.name", "weights.gamma"}
    more = make(tmp_path / "e", weights={"name": "awp", "steps": 3, "when": {"from_epoch": 2}})
    keys = [t for _, t in Page(written(tmp_path, more, plain)).find("code")]
    # What it is known by though it is as usual, and what is not as usual.
    assert [k for k in keys if k.startswith("weights.")] == [
        "weights.name", "weights.when.from_epoch", "weights.gamma", "weights.steps",
    ]  # fmt: skip
    averaged = make(tmp_path / "f", bare=True, seed=3, train__average={"name": "ema"})
    keys = [t for _, t in Page(written(tmp_path, one, averaged)).find("code")]
    assert [k for k in keys if k.startswith("train.")] == [
        "train.average.name", "train.average.decay",
    ]  # fmt: skip
    (gamma,) = [t for _, t in page.find("tr") if t.startswith("weights.gamma")]
    assert gamma == "weights.gamma0.020.5", "each run has its own"
    rows = [t for _, t in page.find("tr", "differs")]
    assert rows == ["torch2.02.1", "deviceCPUH100"]
    # In the files themselves the lines that differ stand out.
    marked = [t.strip() for _, t in page.find("mark")]
    assert "gamma: 0.5" in marked
    assert "seed: 3" in marked
    assert not any(line.startswith("lr:") for line in marked)
    assert "Seeds: 0, 3." in page.find("p", "lead")[0][1]
    same = written(tmp_path, one, make(tmp_path / "d", seed=3))
    assert "The runs have the same settings" in same
    assert "<h2>Settings that differ" in same
    alone = written(tmp_path, one)
    assert "<h2>Settings</h2>" in alone
    assert "The runs have" not in alone


def test_runs_of_one_setting_are_taken_together(tmp_path: Path) -> None:
    folders = [make(tmp_path / f"at-{i}", seed=i) for i in range(2)]
    write_json(folders[1].evaluation, measurements(evaluation(0.3)))
    other = make(tmp_path / "awp", weights__gamma=0.5)
    text = written(tmp_path, *folders, other)
    section = text.split("<h2>Over seeds</h2>")[1].split("</section>")[0]
    page = Page("<section>" + section + "</section>")
    (first, second) = [t for _, t in page.find("tr")][1:]
    assert first.startswith("at-*AT")
    assert "seeds 0, 1" in first
    assert second.startswith("awp")
    assert "n = 1: seeds 0" in second
    heads = [t for _, t in page.find("button")]
    worst = heads.index("worst case") - 1
    cells_ = [t for _, t in page.find("td")][worst]
    # 0.5 and 0.3: their mean, and their sample deviation 0.1414.
    assert cells_ == "40%± 14%"
    assert "n = 2: seeds 0, 1" in first
    gap = [t for _, t in page.find("td")][heads.index("robust gap") - 1]
    assert gap == "20.0 pp± 0 pp"
    assert page.values()[worst] == pytest.approx(0.4)
    assert "<h2>Over seeds" not in written(tmp_path, folders[0], other)


def test_warnings_come_before_the_figures_each_once(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    assert "raised no doubt" in written(tmp_path, one, two)
    write_json(one.evaluation, measurements(evaluation(0.5, warnings=("Zero gradients.",))))
    found = evaluation(0.5, warnings=("Zero gradients.",))
    found["eps"] = 0.5
    found["checkpoints"]["best"]["test"]["settings"] |= {"data": "cc", "shard": "0/2"}
    found["checkpoints"]["best"]["test"]["attacks"].pop("square")
    found["checkpoints"]["best"]["test"]["suites"].pop("square")
    write_json(two.evaluation, measurements(found))
    text = written(tmp_path, one, two)
    assert "raised no doubt" not in text
    assert text.index("Before trusting") < text.index("<h2>Comparison")
    said = [t for _, t in Page(text).find("li")]
    assert said[0] == "a, best checkpoint; b, best checkpoint: Zero gradients."
    assert sum("Zero gradients" in sentence for sentence in said) == 1
    for words in (
        "Not of the same threat (a: linf 8/255; b: linf 0.5), so not to be compared: ",
        "Not of the same fingerprint (a: fingerprint aa-bb; b: fingerprint cc-bb), so not to ",
    ):
        assert any(words in sentence for sentence in said), words


def test_averaged_weights_are_said_where_they_are_shown(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    found = evaluation(0.5)
    for entry in found["checkpoints"].values():
        entry["weights"] = "average"
    write_json(folder.evaluation, measurements(found))
    page = Page(written(tmp_path, folder, make(tmp_path / "b")))
    heads = [t for a, t in page.find("th") if a.get("scope") == "col"]
    assert "average" in heads[0]
    assert "weights" not in heads[1]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = make(tmp_path / "x" / "a"), make(tmp_path / "y" / "a")
    heads = [t for _, t in Page(written(tmp_path, one, two, one)).find("th", "run-0")]
    assert heads[0].startswith("x/a")
    with pytest.raises(UserError, match="no run"):
        write_page([], tmp_path / "report.html")


def _no_gap(text: str) -> str:
    content = json.loads(text)
    (gap,) = [one for one in content["measurements"] if one["kind"] == "gap" and one["epoch"] == 6]
    del gap["result"]["gaps"]["train-test"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("evaluation", lambda text: text[:100]),
        ("evaluation", lambda text: "[]"),
        ("evaluation", lambda text: '{"checkpoints": 3}'),
        ("evaluation", _no_gap),
        ("evaluation", lambda text: text.replace('"pgd-20": {', '"pgd-20": 3, "x": {', 1)),
        ("flatness", lambda text: "{"),
        ("flatness", lambda text: text.replace("standard_error", "se")),
        ("environment_file", lambda text: "nonsense"),
        ("environment_file", lambda text: "3"),
        ("metrics_file", lambda text: text.replace("{", "[", 1)),
        ("metrics_file", lambda text: "3\n" + text),
        ("metrics_file", lambda text: "[]\n" + text),
        ("metrics_file", lambda text: '[["epoch", 1]]\n' + text),
        ("metrics_file", lambda text: text.replace('"epoch"', '"age"')),
        ("landscapes/line.json", lambda text: text[:50]),
        ("config_file", lambda text: "name: ["),
    ],
)
def test_damaged_files_are_one_clear_sentence(
    tmp_path: Path, file: str, damage: Callable[[str], str]
) -> None:
    folder = make(tmp_path / "a")
    before = written(tmp_path, folder)
    path: Path = getattr(folder, file, folder.root / file)
    path.write_text(damage(path.read_text(encoding="latin-1")), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        write_page([folder], tmp_path / "out" / "report.html")
    assert str(folder.root) in str(caught.value)
    assert (tmp_path / "out" / "report.html").read_text("utf-8") == before, "the old page is kept"


def test_half_written_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    with folder.metrics_file.open("a") as file:
        file.write('{"epoch": 7, "mon')
    assert traces(specs(written(tmp_path, folder))["Clean loss"])["a, train"]["x"] == [2, 4, 6]


def test_a_damaged_row_of_metrics_costs_no_other_row(tmp_path: Path) -> None:
    """A run that goes on writes all rows anew, so none after a damaged one may be passed by."""
    folder = make(tmp_path / "a")
    first, second, *rest = folder.metrics_file.read_text().splitlines()
    text = "\n".join([first, second[:9], *rest])
    folder.metrics_file.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 2"):
        folder.append_metrics({"epoch": 7})
    assert folder.metrics_file.read_text() == text
    folder.metrics_file.write_text(f"{first}\n3\n{second}")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 2"):
        folder.metrics()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "file" / "report.html", tmp_path / "folder"):
        with pytest.raises(UserError, match="could not be written"):
            write_page([folder], output)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "folder"]
    with pytest.raises(UserError, match="does not exist"):
        write_page([RunFolder(tmp_path / "none")], tmp_path / "new" / "report.html")
    assert not (tmp_path / "new").exists()


def every_figure(folder: RunFolder) -> list[Any]:
    records = read_records([folder])
    return [figure for make_ in figures.FIGURES.values() for figure in make_(records)]


def test_plotly_knows_all_that_is_asked_of_it(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    folder = make(tmp_path / "a")
    landscape(planar=True).save(folder.landscapes / "plane.json")
    found = every_figure(folder)
    assert len(found) > 10
    for figure in found:
        for theme in ("light", "dark"):
            # Refuses every attribute and colour that Plotly does not have.
            Figure(interactive.resolved(figure, theme))
    Figure(interactive.resolved(found[-1], "light", surface=True))


def test_every_colour_of_a_figure_has_a_meaning_in_both_themes(tmp_path: Path) -> None:
    text = json.dumps([interactive.plotly(f) for f in every_figure(make(tmp_path / "a"))])
    used = set(re.findall(r'"@(\w+)@', text))
    assert {"0", "ink", "page", "line"} <= used
    for theme in themes().values():
        assert used <= theme.keys()


@pytest.mark.parametrize(
    ("values", "dtick"), [([1.0, 200.0], "D2"), ([1.0, 400.0], 1), ([1e-9, 1.0, 100.0], 2)]
)
def test_logarithmic_axes_have_some_marks_and_not_too_many(values: Any, dtick: Any) -> None:
    line = Series(name="l", run=0, x=list(range(len(values))), y=values)
    chart = Chart(title="t", series=[line], x=Axis(), y=Axis(log=True))
    assert interactive.plotly(chart)["layout"]["yaxis"]["dtick"] == dtick


def test_gaps_and_lone_points_and_empty_charts() -> None:
    line = Series(name="l", run=7, x=[1, 2, 3, 4], y=[1.0, None, math.inf, -2.0])
    chart = Chart(title="t", series=[line], x=Axis(label="x"), y=Axis(log=True))
    (trace,) = interactive.plotly(chart)["data"]
    assert trace["y"] == [1.0, None, None, None]
    assert trace["line"]["color"] == "@1@", "colours begin again"
    assert not is_empty(chart)
    assert is_empty(Chart(title="t", series=[Series(name="l", run=0, x=[1], y=[None])], x=Axis()))
    lone = Series(name="l", run=0, x=[1], y=[2.0])
    assert (
        "markers"
        in interactive.plotly(Chart(title="t", series=[lone], x=Axis()))["data"][0]["mode"]
    )


def test_a_page_on_the_home_of_a_model_alone_and_beside_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    home = RunFolder(tmp_path / "home")
    home.root.mkdir()
    for name, kind in (("evaluation", "test"), ("flatness", "flatness")):
        content = json.loads(getattr(run, name).read_text())
        content["measurements"] = [
            {**one, "checkpoint": "given", "epoch": None, "data": "mnist5k",
             "said": {"model": "small_cnn", "normalise": "data"}}
            for one in content["measurements"]
            if one["kind"] == kind and one["checkpoint"] == {"test": "best"}.get(kind, "last")
        ]  # fmt: skip
        write_json(getattr(home, name), content)
    alone = written(tmp_path, home)
    for words in ("Data: mnist5k. Threat: L∞", "the models as they were given", "normalise: data"):
        assert words in alone
    assert "Learning curves" not in alone
    assert "epoch None" not in alone
    assert "config.yaml" not in alone
    both = written(tmp_path, run, home)
    assert "Learning curves" in both
    assert "Not of the same checkpoint" in both
    home.evaluation.unlink()
    home.flatness.unlink()
    with pytest.raises(UserError, match="not the folder of a run"):
        written(tmp_path, home)
