"""The names and numbers of a run's curves, the same for every tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# TensorBoard sorts by name: what is looked at first has the lowest number. Names are the line (the
# run's own "", or a split of it) and the chart, so that splits share a chart.
Curves = dict[tuple[str, str], float]

_OF_STEPS = {
    "rise": "1-robust/increase_under_weights",
    "perturbation": "2-weights/relative_size",
    "loss/centre": "2-weights/loss_at_centre",
    "loss/perturbed": "2-weights/loss_at_perturbed",
    "cosine/gradients": "2-weights/cosine_of_gradients",
    "cosine/successive": "2-weights/cosine_of_successive",
    "gradient_norm/ascent": "2-weights/gradient_norm_of_ascent",
    "gradient_norm/descent": "2-weights/gradient_norm_of_descent",
    "attack/broken": "4-attack/share_broken",
    "lr": "5-optimisation/lr",
    "radius": "5-optimisation/radius",
    "eps": "5-optimisation/eps",
    "gradient_norm": "5-optimisation/gradient_norm",
    "images_per_second": "8-machine/images_per_second",
    "memory": "8-machine/memory_bytes",
    "edge/seconds": "8-machine/edge_seconds",
    "edge/products": "8-machine/edge_products",
}
_OF_EPOCHS = {
    "train_loss": "5-optimisation/epoch_loss",
    "gradient_norm": "5-optimisation/epoch_gradient_norm",
    "skipped_steps": "5-optimisation/skipped_steps",
    "seconds": "8-machine/epoch_seconds",
    "best_minus_last": "1-robust/overfitting_best_minus_last",
}
# Of the weights that the best checkpoint is chosen by: the average where there is one.
_OUTCOME = "9-outcome"


def of_step(values: Mapping[str, float]) -> Curves:
    """The curves that a step's values continue."""
    found = {}
    for name, value in values.items():
        kind, _, rest = name.partition("/")
        chart = _OF_STEPS.get(name)
        if kind == "attack" and chart is None:
            chart = f"4-attack/{rest.replace('/', '_at_step_')}"
        elif kind == "edge" and chart is None:
            chart = f"6-flatness/edge_{rest}"
        elif kind == "layers":
            chart = f"9-layers/{rest}"
        found["", chart or f"7-own/{name}"] = value
    return found


def of_epoch(row: Mapping[str, Any]) -> Curves:
    """The curves that a row of metrics.jsonl continues, gaps included."""
    found: Curves = {
        ("", chart): row[key] for key, chart in _OF_EPOCHS.items() if row.get(key) is not None
    }
    for suffix, key in (("", "monitor"), ("-average", "monitor_average")):
        measured = row.get(key) or {}
        for split, figures in measured.items():
            for name, value in figures.items():
                kind, _, what = name.partition("_")
                number = {"robust": 1, "clean": 3}[kind]
                found[split + suffix, f"{number}-{kind}/{what}"] = value
        for what, gap in _gaps(measured):
            found[suffix[1:], f"1-robust/{what}"] = gap
    chosen = row.get("monitor_average") or row.get("monitor") or {}
    outcome = dict(_gaps(chosen)) | chosen.get("validation", {})
    found |= {("", f"{_OUTCOME}/{name}"): value for name, value in outcome.items()}
    for name, value in (row.get("batchnorm_drift") or {}).items():
        found["", f"5-optimisation/batchnorm_drift_of_{name}"] = value
    for name, value in (row.get("flatness") or {}).items():
        if value is not None:
            found["", f"6-flatness/{name}"] = value
    return found


def _gaps(measured: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Robust train less validation, and for losses the other way round: positive overfits."""
    if "validation" in measured and "robust_loss" in measured["train"]:
        train, held_out = measured["train"], measured["validation"]
        yield "accuracy_gap", train["robust_accuracy"] - held_out["robust_accuracy"]
        yield "loss_gap", held_out["robust_loss"] - train["robust_loss"]
