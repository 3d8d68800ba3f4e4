"""Weight methods at equal cost: the epochs that each may train, and the table of what they reached.

    python scripts/methods.py epochs configs/study/methods.yaml
    robustflat study configs/study/methods.yaml --jobs 2 --yes
    python scripts/methods.py collect configs/study/methods.yaml docs/results/methods/methods.csv
    python scripts/methods.py table docs/results/methods/methods.csv

Cost is counted in units of one forward pass of one image. A backward pass costs as much again for
the gradient of the input alone (an attack's step: 2 units), and twice as much for that of the
weights (a forward and backward pass of the training: 3 units). Monitoring and the update of the
weights are not counted; nor does it count what can run side by side or is small for a real network.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from robustflat.config import RunConfig
from robustflat.errors import UserError
from robustflat.evaluate import scores
from robustflat.files import write_whole
from robustflat.perturb import Perturbation, pgd
from robustflat.study import read_study
from robustflat.study.folder import StudyFolder
from robustflat.study.grid import expand
from robustflat.subject import open_subject

ATTACK_STEP, WEIGHT_PASS = 2, 3
BASELINE = "none"
# Of the study's own ledger; whole configurations would make it ten times as long.
LEFT_OUT = "config"
Rows = list[dict[str, str]]
Floats = NDArray[np.float64]


def mean_passes(weights: Perturbation) -> float:
    """Forward and backward passes a step, over the period of a method that ascends now and then."""
    every: int = getattr(weights, "every", 1)
    return ((every - 1) + weights.passes) / every


def units(config: RunConfig) -> float:
    """What an epoch of a run costs for each training image.

    An attack of K steps costs 2 K on each batch that a step looks at (n-SAM attacks all of them),
    and each of a perturbation's passes 3.
    """
    weights: Perturbation = config.weights.build()
    steps: int = config.attack.steps
    return ATTACK_STEP * steps * weights.batches + WEIGHT_PASS * mean_passes(weights)


def epochs_for(budget: float, config: RunConfig) -> int:
    """The number of epochs whose cost comes nearest to a budget; at least one."""
    return max(1, round(budget / units(config)))


def print_epochs(study: Path) -> None:
    """For each combination of a study what an epoch costs, and how many cost as much as the first.

    The first combination is the measure: its epochs, unperturbed, are what there is to spend.
    """
    points = expand(read_study(study))
    first = points[0].config
    budget = first.train.epochs * units(first)
    sys.stdout.write(f"budget {budget:g} units an image\nepochs  nearest  units  run\n")
    for point in points:
        if point.config.seed == first.seed:
            nearest = epochs_for(budget, point.config)
            cost = point.config.train.epochs * units(point.config)
            row = f"{point.config.train.epochs:6d}  {nearest:7d}  {cost:5.0f}  {point.name}\n"
            sys.stdout.write(row)


def collect(study: Path, output: Path) -> None:
    """Write a study's ledger with what it lacks: the cost, and the test accuracy at the best epoch.

    "Best" is chosen on validation images, and attacked as the study attacks the last.

    Raises:
        UserError: if a run is not finished.
    """
    config = read_study(study)
    folder = StudyFolder(config)
    rows = read(folder.ledger)
    points = {point.name: point for point in expand(config)}
    left = sorted(set(points) - {row["run"] for row in rows})
    if left:
        raise UserError(f"{len(left)} runs of {study} are not finished, such as {left[0]}.")
    steps = int(config.attack.split("-")[1])
    for row in rows:
        point = points[row["run"]]
        subject = open_subject(folder.files(point.name).folder.root, device="cpu")
        best = subject.network("best")
        test = subject.splits(point.config.evaluate.gap_samples)["test"].tensors()
        found = scores(best.model, test, pgd(point.threat.norm, point.threat.eps, steps))
        row["best.epoch"] = str(best.epoch)
        row["best.test_robust_accuracy"] = str(float(found.robust_correct.double().mean()))
        row["units"] = str(point.config.train.epochs * units(point.config))
        row["passes_a_step"] = str(mean_passes(point.config.weights.build()))
        row.pop(LEFT_OUT, None)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text.getvalue())


def read(path: Path) -> Rows:
    """The rows of a CSV file.

    Raises:
        UserError: if there is none.
    """
    try:
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Run the study first.") from None


class Cell:
    """The runs of one configuration, in the order of their seeds."""

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.rows = sorted(rows, key=lambda row: int(row["factor.seed"]))
        self.method = self.rows[0]["factor.method"]
        self.epochs = int(self.rows[0]["epoch"])
        self.units = float(self.rows[0]["units"])

    @property
    def title(self) -> str:
        """The method with its strength, and what it moves where that is unusual."""
        row = self.rows[0]
        only = " (norm)" if row["factor.parameters"] == "norm" else ""
        return f"{self.method}{only} {row['factor.strength']}".strip()

    def values(self, figure: Callable[[Mapping[str, str]], float]) -> Floats:
        """A figure of every run, [seeds]."""
        return np.array([figure(row) for row in self.rows])


def cells_of(rows: Rows) -> list[Cell]:
    """The configurations of a ledger, in its order."""
    found: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        given = [key for key in row if key.startswith("factor.") and key != "factor.seed"]
        found.setdefault(tuple(row[key] for key in given), []).append(row)
    return [Cell(group) for group in found.values()]


def target(name: str, factor: float = 1.0) -> Callable[[Mapping[str, str]], float]:
    """A column of the ledger times a factor; not a number where it is empty."""
    return lambda row: factor * float(row[name] or "nan")


def robust(row: Mapping[str, str]) -> float:
    """Robust test accuracy at the last epoch, per cent."""
    return 100 * float(row["target.test_robust_accuracy"])


def best_minus_last(row: Mapping[str, str]) -> float:
    """What stopping at the best epoch would have kept, points of robust test accuracy."""
    return 100 * float(row["best.test_robust_accuracy"]) - robust(row)


LOSS_GAP = target("target.gap_robust_loss")
COLUMNS: tuple[tuple[str, Callable[[Mapping[str, str]], float], str], ...] = (
    ("robust", robust, ".1f"),
    ("best - last", best_minus_last, ".1f"),
    ("gap, points", target("target.gap_robust_accuracy", 100), ".1f"),
    ("loss gap", LOSS_GAP, ".2f"),
    ("clean", target("target.test_clean_accuracy", 100), ".1f"),
    ("worst", target("measure.worst_robust", 1000), ".0f"),
    ("average", target("measure.average_robust", 1000), ".0f"),
)


def least_difference(
    cells: Sequence[Cell], figure: Callable[[Mapping[str, str]], float], comparisons: int
) -> float:
    """How far apart the means of two configurations must be for chance not to explain it.

    Seeds are blocks: they share the split of the data and the first weights. What is left after
    the means of configurations and of seeds are taken away estimates the noise of a run, the same
    for all. Two-sided at 5 % for all comparisons together (Bonferroni).
    """
    table = np.array([cell.values(figure) for cell in cells])
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    variance = (rest**2).sum() / freedom
    quantile = stats.t.ppf(1 - 0.05 / (2 * comparisons), freedom)
    return float(quantile * np.sqrt(2 * variance / table.shape[1]))


def table(ledger: Path) -> str:
    """The table of a ledger, in Markdown, and which differences from no perturbation are no chance.

    There are two baselines: the one that spent as much, and the one that trained for as many
    epochs (the nearest number that there is), which tells a method from a shorter training.
    """
    cells = cells_of(read(ledger))
    plain = [cell for cell in cells if cell.method == BASELINE]
    others = [cell for cell in cells if cell.method != BASELINE]
    alike = {cell: min(plain, key=lambda c: abs(c.epochs - cell.epochs)) for cell in cells}
    least = least_difference(cells, robust, len(others))
    names = [name for name, _, _ in COLUMNS]
    head = ["method", "passes", "epochs", "units", *names, "- none, passes", "- none, epochs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell in [plain[0], *others, *plain[1:]]:
        figures = [_spread(cell.values(figure), form) for _, figure, form in COLUMNS]
        against = [_shown(cell, other, least) for other in (plain[0], alike[cell])]
        cost = [f"{float(cell.rows[0]['passes_a_step']):g}", str(cell.epochs), f"{cell.units:.0f}"]
        lines.append("| " + " | ".join([cell.title, *cost, *figures, *against]) + " |")
    for what, figure, form, better in (
        ("robust accuracy", robust, ".1f", 1),
        ("the loss gap", LOSS_GAP, ".2f", -1),
    ):
        least = least_difference(cells, figure, len(others))
        lines += ["", f"In {what} chance alone explains differences of up to {least:{form}}."]
        for against_what, baseline in (
            ("as many passes", dict.fromkeys(cells, plain[0])),
            ("as many epochs", alike),
        ):
            apart = {c: better * difference(c, baseline[c], figure) for c in others}
            good = [c.title for c, d in apart.items() if d > least]
            bad = [c.title for c, d in apart.items() if d < -least]
            lines.append(f"- Against none with {against_what} {len(good)} of {len(others)} are ")
            lines[-1] += f"better{_listed(good)}, and {len(bad)} worse{_listed(bad)}."
    return "\n".join(lines) + "\n"


def difference(cell: Cell, other: Cell, figure: Callable[[Mapping[str, str]], float]) -> float:
    """Of a figure's mean, over the same seeds."""
    return float((cell.values(figure) - other.values(figure)).mean())


def _shown(cell: Cell, other: Cell, least: float) -> str:
    if cell is other:
        return ""
    text = f"{difference(cell, other, robust):+.1f}"
    return f"**{text}**" if abs(difference(cell, other, robust)) > least else text


def _spread(values: Floats, form: str) -> str:
    """Mean and standard deviation over seeds."""
    return f"{values.mean():{form}} ({values.std(ddof=1):{form}})"


def _listed(titles: Sequence[str]) -> str:
    return f" ({', '.join(titles)})" if titles else ""


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description="Weight methods at equal cost.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("epochs").add_argument("study", type=Path)
    collecting = commands.add_parser("collect")
    collecting.add_argument("study", type=Path)
    collecting.add_argument("output", type=Path)
    commands.add_parser("table").add_argument("ledger", type=Path)
    given = parser.parse_args()
    try:
        if given.command == "epochs":
            print_epochs(given.study)
        elif given.command == "collect":
            collect(given.study, given.output)
        else:
            sys.stdout.write(table(given.ledger))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
