"""Figures by class: counted one by one, and shown."""

from __future__ import annotations

import io

import torch
from evaluate_support import evaluate, held_out, trained
from rich.console import Console
from sklearn.metrics import confusion_matrix

from robustflat.evaluate.classes import by_class
from robustflat.report.tables import class_tables, weakest


def test_confusion_and_figures_by_class_are_counts() -> None:
    model, (x, y) = trained(), held_out(120)
    result = evaluate(model, (x, y), ["pgd-3", "fgsm"], eps=0.12, sanity=0, samples=90)
    kept = y[result.positions]
    clean = model(x[result.positions]).argmax(1)
    assert (result.confusion().numpy() == confusion_matrix(kept, clean, labels=range(10))).all()
    attacked = confusion_matrix(kept, result.attacked, labels=range(10))
    assert (result.confusion(attacked=True).numpy() == attacked).all()
    assert attacked.trace() == round(90 * result.robust_accuracy) < 90
    figures = result.by_class([f"digit {i}" for i in range(9)])
    assert list(figures) == [*(f"digit {i}" for i in range(9)), "9"]
    for label, (name, of) in enumerate(figures.items()):
        assert of["count"] == int((kept == label).sum())
        assert of["clean"] == int(((clean == label) & (kept == label)).sum())
        assert of["robust"] == attacked[label, label]
        names = list(figures)
        for key, matrix in (("clean_as", result.confusion().numpy()), ("attacked_as", attacked)):
            expected = {names[k]: n for k, n in enumerate(matrix[label]) if n and k != label}
            assert of[key] == expected, name
    assert set(by_class(*(torch.tensor([3]) for _ in range(4)))) == {"3"}


FIGURES = {
    "cat": {"count": 20, "clean": 18, "robust": 5, "clean_as": {"dog": 2},
            "attacked_as": {"dog": 12, "[b]": 3}},
    "dog": {"count": 40, "clean": 30, "robust": 2, "clean_as": {"cat": 10},
            "attacked_as": {"cat": 38}},
}  # fmt: skip


def printed(figures: dict[str, dict[str, object]]) -> list[str]:
    out = io.StringIO()
    for table in class_tables(figures):
        Console(file=out, width=100).print(table)
    return [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]


def test_classes_are_shown_the_weakest_first_and_what_is_taken_for_what() -> None:
    lines = printed(FIGURES)
    rows = [line for line in lines if line.startswith(("cat", "dog"))]
    assert rows == [
        "dog 40 75.0% 5.0% cat (38)",
        "cat 20 90.0% 25.0% dog (12), [b] (3)",
        "cat 18 2",
        "dog 10 30",
        "cat 5 12 3",
        "dog 38 2 ·",
    ]
    assert sum("Taken for" in line for line in lines) == 2
    assert weakest(FIGURES) == (
        "The weakest class is dog: 5.0% of its 40 images withstand all attacks, 75.0% are "
        "classified without one."
    )


def test_matrices_of_many_classes_are_left_out() -> None:
    many = {str(i): {**FIGURES["cat"], "robust": i % 7} for i in range(21)}
    lines = printed(many)
    assert not any("Taken for" in line for line in lines)
    assert sum(line.endswith("dog (12), [b] (3)") for line in lines) == 21
