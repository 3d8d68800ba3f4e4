"""The report page: what it says equals the runs' files, whatever they hold and lack."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_support import config, measurements

from robustflat.config import write_config
from robustflat.errors import UserError
from robustflat.files import write_json
from robustflat.landscapes import Landscape
from robustflat.report.charts import Line, line_chart, log_ticks, number, plane, ticks
from robustflat.report.markup import Html, node
from robustflat.report.page import write_page
from robustflat.train.folder import RunFolder

VOID = {"meta", "input", "br"}


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
    one = {
        "kind": "flatness", "checkpoint": "last", "epoch": 6, "weights": "raw", "samples": 60,
        "norm": "linf", "eps": 0.1,
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
    (row,) = [r for r in section.split("<tr") if f'<th scope="row">{label}<' in r]
    found = Page("<table><tr" + row.split("</table>")[0].removesuffix("</tbody>") + "</table>")
    inner = ["<td" + c.split("</td>")[0] + "</td>" for c in row.split("<td")[1:]]
    return [(a, t, Page(c).values()) for (a, t), c in zip(found.find("td"), inner, strict=True)]


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, make(tmp_path / "a"), make(tmp_path / "b", weights__gamma=0.5))
    page = Page(text)
    for tag, attributes, _ in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    assert "http" not in text.replace("http-equiv", "").lower()
    assert "url(" not in text
    assert "@import" not in text
    assert "@BODY@" not in text
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    (policy,) = [a for a, _ in page.find("meta") if a.get("http-equiv")]
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_hostile_names_and_text_are_only_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'&@BODY@"
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
    assert len(page.find("script")) == 1
    assert "alert(1)" not in page.find("script")[0][1]
    assert bad in page.find("li")[0][1]
    assert any(bad in words for _, words in page.find("pre"))
    assert name in page.find("h1")[0][1]
    # Neither does the name become an attribute anywhere.
    handlers = {k for _, a, _ in page.elements for k in a if k.startswith("on")}
    assert not handlers


def test_comparison_shows_the_numbers_of_the_files(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    write_json(two.evaluation, measurements(evaluation(0.3, gap=0.35)))
    text = written(tmp_path, one, two)
    expected = {
        "clean": ([0.813, 0.613], ["81.3%", "61.3%"]),
        "pgd-20": ([0.543, 0.343], ["54.3%", "34.3%"]),
        "worst case": ([0.5, 0.3], ["50.0%", "30.0%"]),
        "Robust gap, accuracy": ([0.2, 0.35], ["20.0 pp", "35.0 pp"]),
        "Robust gap, loss": ([0.7, 0.7], ["0.7", "0.7"]),
        "Robust overfitting": ([0.0371, 0.0371], ["3.7 pp", "3.7 pp"]),
        "avg clean": ([0.0271, 0.0271], ["0.0271", "0.0271"]),
    }
    for label, (numbers, shown) in expected.items():
        found = cells(text, label)
        assert [n for _, _, inner in found for n in inner] == pytest.approx(numbers), label
        assert all(t.startswith(s) for (_, t, _), s in zip(found, shown, strict=True)), label
    # The interval of the worst case, and the standard error of the sharpness.
    assert cells(text, "worst case")[0][1].endswith("43.9 to 55.9%")
    assert cells(text, "avg clean")[0][1].endswith("± 0.0011")
    assert cells(text, "square")[0][1].startswith("50.0%")


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
        # Standard errors 0.0011: 2 * 1.96 * 0.0011 = 0.0043 apart is enough, 0.0027 is not.
        (0.5, 0.2, 0.83, {"avg clean": 1}),
        (0.5, 0.2, 0.9, {}),
    ],
)
def test_better_only_beyond_the_intervals(
    tmp_path: Path, robust: float, gap: float, scale: float, better: dict[str, int]
) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    write_json(two.evaluation, measurements(evaluation(robust, gap=gap)))
    write_json(two.flatness, flatness(scale))
    text = written(tmp_path, one, two)
    for label in ("worst case", "pgd-20", "Robust gap, accuracy", "avg clean"):
        marked = [i for i, (a, _, _) in enumerate(cells(text, label)) if "better" in str(a)]
        # The intervals of PGD's accuracies are as wide and as far apart.
        expected = better.get("worst case" if label == "pgd-20" else label)
        assert marked == ([] if expected is None else [expected]), label


def test_curves_hold_the_metrics(tmp_path: Path) -> None:
    page = Page(written(tmp_path, make(tmp_path / "a")))
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for attributes, _ in page.find("path"):
        x, y = ([float(v) for v in (attributes[k] or "").split()] for k in ("data-x", "data-y"))
        curves.setdefault(str(attributes["data-name"]), (x, y))
    for name, expected in (("train", [0.3, 0.6, 0.9]), ("validation", [0.58, 0.56, 0.54])):
        assert curves[f"a, {name}"][0] == [2, 4, 6]
        assert curves[f"a, {name}"][1] == pytest.approx(expected, rel=1e-12)
    # The first curve of the run's bare name is the gap: train minus validation.
    gap = curves["a"]
    assert gap[0] == [2, 4, 6]
    assert gap[1] == pytest.approx([0.3 - 0.58, 0.6 - 0.56, 0.9 - 0.54])
    loss = [a for a, _ in page.find("path") if a["data-name"] == "a, validation"][1]
    assert (loss["data-x"], loss["data-y"]) == ("4 6", "1.25 1.25"), "null is no point"
    titles = [text for _, text in page.find("figcaption")]
    assert "Flatness during training: worst_clean" in titles
    robust = next(a for a, _ in page.find("path") if a["data-name"] == "a, robust")
    assert (robust["data-x"], robust["data-y"]) == ("-0.5 0.5", "5.0 6.0")


def test_marks_stand_where_the_axis_says(tmp_path: Path) -> None:
    text = written(tmp_path, make(tmp_path / "a"))
    section = text.split("<h2>Robust accuracy by attack</h2>")[1].split("</svg>")[0]
    page = Page("<svg" + section.split("<svg")[1] + "</svg>")
    at = {
        float(words.rstrip("%")) / 100: float(a["x"] or 0)
        for a, words in page.find("text")
        if words.endswith("%")
    }
    (low, x_low), *_, (high, x_high) = sorted(at.items())
    dots = [float(a["cx"] or 0) for a, _ in page.find("circle")]
    for value, x in zip((0.813, 0.543, 0.5), dots, strict=True):
        assert x == pytest.approx(x_low + (x_high - x_low) * (value - low) / (high - low), abs=0.02)
    whisker = page.find("line", "whisker")[2][0]
    ends = [float(whisker[k] or 0) for k in ("x1", "x2")]
    assert ends[1] - ends[0] == pytest.approx((x_high - x_low) * 0.12 / (high - low), abs=0.02)
    assert "50.0  [43.9, 55.9]" in section


def test_gap_table_and_words(tmp_path: Path) -> None:
    text = written(tmp_path, make(tmp_path / "a"))
    section = text.split("<h2>Robust-generalization gap</h2>")[1].split("</section>")[0]
    numbers = Page("<section>" + section + "</section>").values()
    splits = evaluation(0.5)["checkpoints"]["best"]["gap"]["splits"]
    assert numbers[:4] == [splits["train"][k]["value"] for k in (
        "clean_accuracy", "robust_accuracy", "clean_loss", "robust_loss")]  # fmt: skip
    assert len(numbers) == 2 * 5 * 4
    assert "gap 20.0 pp" in section
    assert "300 train, 100 validation, 200 test" in section
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


def test_two_dimensional_landscapes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    landscape(planar=True).save(one.landscapes / "plane.json")
    page = Page(written(tmp_path, one, two))
    fills = [(a["fill"], text) for a, text in page.find("rect") if "fill" in a]
    assert len(fills) == 9
    by_text = {text: fill for fill, text in fills}
    assert by_text["one 0, two 0: 0.5"] == "#440154", "the darkest of viridis"
    assert by_text["one 0.5, two 0.5: 6"] == "#fde725", "the lightest"
    assert by_text["one 0, two 0.5: not finite"] == "#888888"
    differ = "drawn in different ways"
    assert not any(differ in text for _, text in page.find("li")), "a line is no other plane"
    landscape(planar=True, seed=1).save(two.landscapes / "plane.json")
    page = Page(written(tmp_path, one, two))
    assert any(differ in text for _, text in page.find("li"))
    half = replace(landscape(planar=True), measured=8)
    half.save(two.landscapes / "plane.json")
    page = Page(written(tmp_path, one, two))
    assert len([a for a, _ in page.find("rect") if "fill" in a]) == 9, "what is half done"


def test_missing_pieces_name_the_command(tmp_path: Path) -> None:
    full, bare = make(tmp_path / "a"), make(tmp_path / "b c", bare=True)
    page = Page(written(tmp_path, full, bare))
    usages = [text for _, text in page.find("code") if text.startswith("robustflat")]
    assert [shlex.split(usage)[1:] for usage in usages] == [
        ["evaluate", str(bare.root)],
        ["evaluate", str(bare.root)],
        ["evaluate", str(bare.root)],
        ["train", str(bare.config_file), "--resume"],
        ["flatness", str(bare.root)],
        ["landscape", str(bare.root)],
    ]
    assert all("not measured: run robustflat" in t for _, t in page.find("p", "missing"))
    alone = Page(written(tmp_path, bare))
    assert not alone.find("svg")
    assert len(alone.find("p", "missing")) == 6
    # A run that was not monitored will not be by going on with it.
    row = {**metrics()[0], "monitor": None}
    bare.metrics_file.write_text(json.dumps(row))
    assert (
        "not monitored: see its setting monitor.every"
        in Page(written(tmp_path, bare)).find("p", "missing")[3][1]
    )


def test_settings_and_environments(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", seed=3), make(tmp_path / "b", weights__gamma=0.5)
    write_json(two.environment_file, {"versions": {"torch": "2.1"}, "cuda": "H100"})
    text = written(tmp_path, one, two)
    page = Page(text)
    keys = [t for _, t in page.find("code") if not t.startswith("robustflat")]
    assert keys == ["seed", "weights.gamma"]
    plain = make(tmp_path / "c", bare=True, seed=3, weights={"name": "none"})
    keys = [t for _, t in Page(written(tmp_path, one, plain)).find("code")]
    assert {"weights.name", "weights.gamma", "weights.steps"} < set(keys)
    assert "weights.when.until_epoch" not in keys, "null where it is known"
    rows = [t for _, t in page.find("tr", "differs")]
    assert rows == ["torch2.02.1", "deviceCPUH100"]
    assert "gamma: 0.5" in page.find("pre")[1][1]
    assert "Seeds: 0, 3." in page.find("p", "lead")[0][1]


def test_warnings_come_before_the_figures(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    assert "raised no doubt" in written(tmp_path, one, two)
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
    assert said[0] == "b, best checkpoint: Zero gradients."
    for words in (
        "the threat differs (a: linf 8/255; b: linf 0.5): ",
        "the fingerprint differs (a: fingerprint aa-bb; b: fingerprint cc-bb): clean, ",
    ):
        assert any(words in sentence for sentence in said), words


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
    page = Page(written(tmp_path, folder))
    assert page.find("path")[0][0]["data-x"] == "2 4 6"


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "file" / "report.html", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot be written"):
            write_page([folder], output)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "folder"]
    with pytest.raises(UserError, match="does not exist"):
        write_page([RunFolder(tmp_path / "none")], tmp_path / "new" / "report.html")
    assert not (tmp_path / "new").exists()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_cover_the_range(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low + 1e-6 * span
    assert found[-1] >= high - 1e-6 * span
    assert 2 <= len(found) <= 13
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3


@given(st.floats(1e-8, 1e8), st.floats(1.0, 1e6))
def test_log_ticks_cover_the_range(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert found[0] <= low * (1 + 1e-6)
    assert found[-1] >= low * ratio * (1 - 1e-6)
    assert found == sorted(set(found))
    assert len(found) >= 2


def test_numbers_and_markup() -> None:
    assert [number(0.12345, u) for u in ("", "%", "pp")] == ["0.123", "12.3%", "12.3 pp"]
    assert number(None) == number(math.nan) == "not finite"
    assert node("p", "<a> & b", None, Html("<i></i>"), class_='"x"', data_y=None) == (
        '<p class="&quot;x&quot;">&lt;a&gt; &amp; b<i></i></p>'
    )


def test_lines_break_where_nothing_can_be_drawn() -> None:
    line = Line(name="l", run=0, x=[1, 2, 3, 4, 5], y=[1.0, 10.0, None, 0.0, 100.0])
    linear = Page(line_chart("t", [line], x_label="x")).find("path")[0][0]
    log = Page(line_chart("t", [line], x_label="x", log=True)).find("path")[0][0]
    assert [str(p["d"]).count("M") for p in (linear, log)] == [2, 2]
    assert linear["data-x"] == "1 2 4 5"
    assert log["data-x"] == "1 2 5"
    # From 1 over 10 to 100, the logarithmic steps are equal.
    y = [float(part.split()[1]) for part in str(log["d"]).replace("L", "M").split("M")[1:]]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.02)
    empty = line_chart("t", [Line(name="l", run=0, x=[1], y=[None])], x_label="x")
    assert "Nothing finite" in empty
    Page(line_chart("t", [Line(name="l", run=0, x=[1], y=[2.0])], x_label="x"))
    Page(plane("t", ([0.0], [0.0]), ("a", "b"), [[1.0]], (1.0, 1.0)))


PROBE_HEAD = """<script>
const problems = [];
addEventListener("error", e => problems.push(String(e.message)));
addEventListener("securitypolicyviolation", e => problems.push(e.violatedDirective));
</script></head>"""
PROBE_BODY = """<script>
const all = kind => [...document.querySelectorAll(kind)];
const shown = kind => all(kind).filter(e => e.getClientRects().length).length;
const page = document.documentElement, result = { widest: page.scrollWidth - page.clientWidth };
result.charts = shown("svg"); result.curves = shown("svg.lines path");
result.boxes = shown("nav input");
result.outside = all("svg text").filter(text => {
  const svg = text.ownerSVGElement.viewBox.baseVal, box = text.getBBox();
  const right = box.x + box.width, bottom = box.y + box.height;
  return box.width && (box.x < -2 || right > svg.width + 2 || bottom > svg.height + 2);
}).map(text => text.textContent);
const colour = run => getComputedStyle(all(`svg.lines .run-${run} path`)[0]).stroke;
result.colours = [colour(0), colour(1)];
const box = all("nav input")[0], before = [shown(".run-0"), shown(".run-1")];
box.click();
result.hidden = { before, after: [shown(".run-0"), shown(".run-1")] };
const svg = all("svg.lines")[0], area = svg.getBoundingClientRect();
const at = { clientX: area.right - 20, clientY: area.top + 20 };
const point = () => svg.dispatchEvent(new PointerEvent("pointermove", at));
const tipped = document.getElementById("tip");
point(); result.one = tipped.innerText;
box.click(); point(); result.both = tipped.innerText;
svg.dispatchEvent(new PointerEvent("pointerleave")); result.left = tipped.hidden;
const panels = () => all(".switch > div").map(panel => getComputedStyle(panel).display);
result.linear = panels();
document.getElementById("scale-log").click();
result.log = panels();
result.problems = problems;
const out = document.createElement("pre");
out.id = "probe"; out.textContent = JSON.stringify(result); document.body.append(out);
</script></body>"""


def test_in_a_real_browser(tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium or chrome is installed")
    text = written(tmp_path, make(tmp_path / "a"), make(tmp_path / "b"))
    page = tmp_path / "probe.html"
    text = text.replace("</head>", PROBE_HEAD).replace("</body>", PROBE_BODY)
    page.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1200,900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"the browser does not start here: {done.stderr[-200:]}")
    assert "CONSOLE" not in done.stderr
    (probe,) = [t for a, t in Page(done.stdout).find("pre") if a.get("id") == "probe"]
    found = json.loads(probe)
    assert found["problems"] == []
    assert found["widest"] <= 0, "the page scrolls sideways"
    assert found["outside"] == [], "text sticks out of its chart"
    # One chart of attacks, two of gaps, six of curves, one of flatness, two landscapes in sight.
    assert found["charts"] == 1 + 2 + 6 + 1 + 2
    assert found["curves"] == 2 * (4 * 2 + 2 + 1 + 2 + 1)
    assert found["boxes"] == 2
    assert found["colours"] == ["rgb(51, 102, 170)", "rgb(221, 119, 34)"]
    (zero, one), (after_zero, after_one) = found["hidden"]["before"], found["hidden"]["after"]
    assert zero == one > 0
    assert (after_zero, after_one) == (0, one)
    assert found["one"].split("\n") == ["epoch 6", "b, train 90.0%", "b, validation 54.0%"]
    assert found["both"].count("90.0%") == 2
    assert found["left"] is True
    assert (found["linear"], found["log"]) == (["block", "none"], ["none", "block"])
