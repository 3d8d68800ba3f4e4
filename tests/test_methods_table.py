"""The study of all weight methods at equal cost: its configuration, and the script of its table."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from script_support import script
from torch import Tensor, nn
from train_support import config as run_config
from train_support import values

import robustflat as rf
from robustflat import registry
from robustflat.config import RunConfig
from robustflat.errors import UserError
from robustflat.study import read_study
from robustflat.study.folder import StudyFolder
from robustflat.study.grid import Point, expand
from robustflat.subject import open_subject
from robustflat.train import train
from robustflat.train.feed import Feed
from robustflat.train.parallel import Processes
from robustflat.train.setup import build_model, build_step, load_data

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "configs/study/methods.yaml"
OVERFIT = ROOT / "configs/study/methods-overfit.yaml"
RESULTS = ROOT / "docs/results/methods"
CPU = torch.device("cpu")


methods = script("methods")


@cache
def points_of(study: Path) -> list[Point]:
    return expand(read_study(study))


@pytest.fixture
def points() -> list[Point]:
    return points_of(STUDY)


@pytest.fixture(params=[STUDY, OVERFIT], ids=lambda path: path.stem)
def either(request: pytest.FixtureRequest) -> list[Point]:
    return points_of(request.param)


def is_control(point: Point, points: list[Point]) -> bool:
    """None for fewer epochs than the first, which is the measure of the cost."""
    epochs = point.config.train.epochs
    return point.config.weights.name == "none" and epochs != points[0].config.train.epochs


# --- the configuration


def test_every_method_is_there_at_two_strengths_and_three_seeds(points: list[Point]) -> None:
    # SAM-ON is a method of its own; custom is whatever its user makes of it.
    found: dict[tuple[Any, ...], dict[Any, set[Any]]] = {}
    for point in points:
        if not is_control(point, points):
            on = point.factors["parameters"] == "norm"
            by_strength = found.setdefault((point.factors["method"], on), {})
            by_strength.setdefault(point.factors["strength"], set()).add(point.factors["seed"])
    names = {(name, False) for name in registry.weights if name != "custom"}
    assert set(found) == names | {("sam", True)}
    for (name, _), by_strength in found.items():
        assert len(by_strength) == (1 if name == "none" else 2), name
        assert all(seeds == {0, 1, 2} for seeds in by_strength.values()), name


def test_overfitting_is_studied_for_the_weaker_of_each(points: list[Point]) -> None:
    def weights(of: list[Point]) -> dict[tuple[Any, ...], float | None]:
        found: dict[tuple[Any, ...], Any] = {}
        for point in of:
            key = (point.factors["method"], point.factors["parameters"])
            found[key] = min(found.get(key, np.inf), point.factors["strength"] or np.inf)
        return found

    assert weights(points_of(OVERFIT)) == weights(points)


def test_strengths_are_four_times_apart_and_reach_the_perturbation(points: list[Point]) -> None:
    found: dict[tuple[Any, ...], list[float]] = {}
    for point in points:
        weights = point.config.weights
        if weights.name != "none" and point.config.seed == 0:
            built = weights.build()
            key = (weights.name, built.parameters)
            found.setdefault(key, []).append(getattr(built, "inner", built).ball.radius)
    for key, (low, high) in found.items():
        assert high == pytest.approx(4 * low), key


def test_units_are_equal_to_within_half_an_epoch(either: list[Point]) -> None:
    first = either[0].config
    assert first.weights.name == "none"
    steps = first.attack.steps
    budget = first.train.epochs * (2 * steps + 3)
    for point in either:
        if not is_control(point, either):
            epoch = methods.units(point.config)
            spent = point.config.train.epochs * epoch
            assert abs(spent - budget) <= epoch / 2, point.name


def test_the_controls_are_as_short_as_the_methods(either: list[Point]) -> None:
    lengths = {p.config.train.epochs for p in either if p.config.weights.name != "none"}
    controls = {p.config.train.epochs for p in either if is_control(p, either)}
    full = either[0].config.train.epochs
    # LookSAM's length is nearly that of none itself.
    assert {e for e in lengths if e < 0.95 * full} == controls


def test_le_sam_is_told_how_long_it_has(either: list[Point]) -> None:
    for point in either:
        if point.config.weights.name == "lesam":
            told, images = point.config.weights, point.config.data.train_samples
            batches, rest = divmod(images, point.config.train.batch_size)
            assert rest == 0
            assert told.steps == point.config.train.epochs * batches
            # Published: a warm-up of 10 and a plateau until 160 of 200 epochs.
            assert told.warmup == round(told.steps / 20)
            assert told.hold == round(0.8 * told.steps)


class Meter(nn.Module):
    """Counts the images that go forward, by what their gradient is asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.units = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.units += len(x) * (2 if x.requires_grad else 3)
        logits: Tensor = self.model(x)
        return logits


def test_units_are_what_steps_do(points: list[Point]) -> None:
    # The formula against the work itself, over a whole period of the methods that have one.
    seen: set[str] = set()
    for point in points:
        config = point.config
        if config.weights.name in seen:
            continue
        seen.add(config.weights.name)
        data = load_data(config)
        weights = config.weights.build()
        feed = Feed(config, data, CPU, Processes(), weights)
        model = Meter(build_model(config, data, CPU)).train()
        step = build_step(config, model, CPU, data.shape)
        generator = torch.Generator().manual_seed(0)
        period = 5 if config.weights.name == "looksam" else 1
        for batches in [*feed.batches(0, 0)][:period]:
            step(model, batches, weights, generator)
        counted = model.units / (period * config.train.batch_size)
        assert counted == pytest.approx(methods.units(config)), config.weights.name
    assert len(seen) == len(list(registry.weights)) - 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"name": "none"}, 4 + 3),
        ({"name": "rwp"}, 4 + 33),
        ({"name": "looksam", "every": 4}, 4 + 3 * 5 / 4),
        ({"name": "nsam", "batches": 3, "inner": {"name": "sam"}}, 12 + 3 * 4),
        ({"name": "msam", "chunk": 4, "inner": {"name": "sam"}}, 4 + 6),
    ],
)
def test_units_of_an_epoch(weights: dict[str, Any], expected: float) -> None:
    assert methods.units(run_config(weights=weights)) == expected


def test_epochs_come_nearest_to_the_budget() -> None:
    config = run_config(weights={"name": "sam"})  # 10 units
    assert [methods.epochs_for(budget, config) for budget in (1, 96, 104, 106)] == [1, 10, 10, 11]


# --- the table


def row(method: str, epochs: int, seed: int, robust: float, **more: str) -> dict[str, str]:
    return {
        "run": f"{method}-{epochs}-{seed}",
        "factor.method": method,
        "factor.strength": "" if method == "none" else "0.1",
        "factor.parameters": "norm" if method == "on" else "all",
        "factor.epochs": str(epochs),
        "factor.seed": str(seed),
        "target.test_robust_accuracy": str(robust),
        "target.gap_robust_accuracy": "0.25",
        "target.gap_robust_loss": str(0.5 + seed / 10),
        "target.test_clean_accuracy": "0.9",
        "measure.worst_robust": "0.031",
        "measure.average_robust": "0.012",
        "epoch": str(epochs),
        "best.test_robust_accuracy": str(robust + 0.02),
        "units": "130.4",
        "passes_a_step": "1.2",
        **more,
    }


def rows() -> list[dict[str, str]]:
    """Seeds in orders of their own. Methods are 20 points above and 10 below the 60 of none."""
    shifts = {"none": {10: 0.0, 7: 0.05}, "high": {7: 0.2}, "on": {10: -0.1}, "same": {10: 0.001}}
    noise = [0.002, -0.001, -0.001]
    found = []
    for number, (method, lengths) in enumerate(shifts.items()):
        for epochs, shift in lengths.items():
            for seed in ((2 + number) % 3, number % 3, (1 + number) % 3):
                extra = noise[(seed + number) % 3]
                found.append(row(method, epochs, seed, 0.6 + 0.03 * seed - 0.03 + shift + extra))
    return found


def write(path: Path, content: list[Mapping[str, str]] | list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return path


def test_the_table(tmp_path: Path) -> None:
    text = methods.table(write(tmp_path / "l.csv", rows()))
    lines = text.splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    table = {}
    for line in lines[2:7]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[cells[0], cells[2]] = dict(zip(head, cells, strict=True))
    assert list(table) == [
        ("none", "10"), ("high 0.1", "7"), ("on (norm) 0.1", "10"), ("same 0.1", "10"),
        ("none", "7"),
    ]  # fmt: skip
    assert table["none", "10"] == {
        "method": "none", "passes": "1.2", "epochs": "10", "units": "130", "robust": "60.0 (2.9)",
        "best - last": "2.0 (0.0)", "gap, points": "25.0 (0.0)", "loss gap": "0.60 (0.10)",
        "clean": "90.0 (0.0)", "worst": "31 (0)", "average": "12 (0)",
        "- none, passes": "", "- none, epochs": "",
    }  # fmt: skip
    high = table["high 0.1", "7"]
    assert (high["- none, passes"], high["- none, epochs"]) == ("**+20.0**", "**+15.0**")
    on, same = table["on (norm) 0.1", "10"], table["same 0.1", "10"]
    assert (on["- none, passes"], on["- none, epochs"]) == ("**-10.0**", "**-10.0**")
    assert (same["- none, passes"], same["- none, epochs"]) == ("+0.1", "+0.1")
    assert lines[8].startswith("In robust accuracy chance alone explains differences of up to 0.")
    assert lines[9:11] == [
        f"- Against none with as many {what} 1 of 3 are better (high 0.1), "
        "and 1 worse (on (norm) 0.1)."
        for what in ("passes", "epochs")
    ]
    assert lines[12:] == [
        "In the loss gap chance alone explains differences of up to 0.00.",
        "- Against none with as many passes 0 of 3 are better, and 0 worse.",
        "- Against none with as many epochs 0 of 3 are better, and 0 worse.",
    ]


def test_a_smaller_loss_gap_is_better_and_each_has_its_own_baseline(tmp_path: Path) -> None:
    content = rows()
    for found in content:
        shift = {"same": -0.3, "high": 0.3}.get(found["factor.method"], 0.0)
        if found["factor.method"] == "none" and found["epoch"] == "7":
            shift = 0.4
        found["target.gap_robust_loss"] = str(float(found["target.gap_robust_loss"]) + shift)
    lines = methods.table(write(tmp_path / "l.csv", content)).splitlines()
    passes, epochs = lines[-2:]
    assert passes.endswith("1 of 3 are better (same 0.1), and 1 worse (high 0.1).")
    assert epochs.endswith("2 of 3 are better (high 0.1, same 0.1), and 0 worse.")


@pytest.mark.parametrize("ledger", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_the_results_are_those_of_their_ledger_and_study(ledger: Path) -> None:
    assert methods.table(ledger) in (RESULTS / "README.md").read_text()
    study = ROOT / "configs/study" / f"{ledger.stem}.yaml"
    names = {point.name for point in points_of(study)}
    assert {row["run"] for row in methods.read(ledger)} == names


def cells(table: np.ndarray[Any, Any]) -> list[Any]:
    return [
        methods.Cell([row(f"m{i}", 3, seed, value) for seed, value in enumerate(line)])
        for i, line in enumerate(table)
    ]


def test_two_configurations_differ_as_the_paired_t_test_says() -> None:
    table = np.random.default_rng(0).normal(0.6, 0.1, (2, 5))
    least = methods.least_difference(cells(table), methods.robust, 1)
    result = stats.ttest_rel(*table)
    critical = stats.t.ppf(0.975, 4)
    mean = 100 * abs(table[0].mean() - table[1].mean())
    assert mean / least == pytest.approx(abs(result.statistic) / critical)


def test_by_chance_nothing_differs_from_the_first() -> None:
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        # Seeds differ far more than the runs of one seed, and that shall not count.
        table = generator.normal(0, 0.01, (8, 3)) + generator.normal(0.5, 0.1, 3)
        least = methods.least_difference(cells(table), methods.robust, 7)
        means = 100 * table.mean(1)
        wrong += bool((abs(means[1:] - means[0]) > least).any())
    assert 1 <= wrong <= 18  # 10 expected at most; Bonferroni is a little careful


# --- what the ledger lacks


def test_collect_measures_the_best_epoch_on_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = values(train={"epochs": 3, "batch_size": 16}, optimizer={"name": "sgd", "lr": 0.3})
    del base["name"], base["weights"]
    grid = {"weights": [{"name": "none"}, {"name": "sam", "rho": 0.2}], "seed": [0]}
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(
            {"name": "s", "output": str(tmp_path), "base": base, "grid": grid, "attack": "pgd-3"}
        )
    )
    study = read_study(path)
    folder = StudyFolder(study)
    found: list[dict[str, str]] = []
    for point in expand(study):
        config: RunConfig = point.config
        train(config)
        found.append({"run": point.name, "config": "long", "epoch": "3"})
        if len(found) == 1:
            write(folder.ledger, found)
            with pytest.raises(UserError, match=r"1 runs of .* not finished, such as sam"):
                methods.collect(path, tmp_path / "out" / "ledger.csv")
    write(folder.ledger, found)

    monkeypatch.setattr(sys, "argv", ["x", "collect", str(path), str(tmp_path / "out/ledger.csv")])
    assert methods.main() == 0
    collected = methods.read(tmp_path / "out/ledger.csv")
    assert {"3"} != {got["best.epoch"] for got in collected}
    for point, got in zip(expand(study), collected, strict=True):
        subject = open_subject(folder.files(point.name).folder.root, device="cpu")
        network = subject.network("best")
        x, y = subject.splits(None)["test"].tensors()
        adversarial = rf.pgd("linf", 0.1, 3)(
            network.model, x, y, generator=torch.Generator().manual_seed(0)
        )
        right = (network.model(x).argmax(1) == y) & (network.model(adversarial).argmax(1) == y)
        assert float(got["best.test_robust_accuracy"]) == pytest.approx(float(right.float().mean()))
        passes = 1 if point.config.weights.name == "none" else 2
        assert float(got["units"]) == 3 * (4 + 3 * passes)
        assert float(got["passes_a_step"]) == passes
        assert int(got["best.epoch"]) == network.epoch
        assert "config" not in got

    path.write_text(path.read_text().replace("- 0", "- 0\n  - 1"))
    assert len(expand(read_study(path))) == 4
    monkeypatch.setattr(sys, "argv", ["x", "epochs", str(path)])
    assert methods.main() == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "     3        3     21  none-seed0",
        "     3        2     30  sam-strength0.2-seed0",
    ]
    monkeypatch.setattr(sys, "argv", ["x", "table", str(tmp_path / "nothing.csv")])
    assert methods.main() == 2
    assert "Run the study first" in capsys.readouterr().err
