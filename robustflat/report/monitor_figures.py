"""Figures of a run under way: attacked examples, confusion matrix, loss along a line of weights."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from robustflat.train.pictures import Pictures

_SHOWN = 8
_CLEAN, _ROBUST = "#1f77b4", "#d62728"


def examples(pictures: Pictures) -> Figure:
    """Images, the same attacked, and the difference; over each what it is taken for."""
    count = min(_SHOWN, len(pictures.x))
    difference = (pictures.x_adv - pictures.x)[:count]
    largest = float(difference.abs().max())
    figure = Figure(figsize=(1.3 * count, 4.6), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    rows = (
        ("clean", pictures.x, pictures.clean),
        ("attacked", pictures.x_adv, pictures.attacked),
        (f"difference\n(full scale ±{largest:.3g})", None, None),
    )
    for axis, (title, images, predictions) in zip(axes, rows, strict=True):
        axis[0].set_ylabel(title)
        for i in range(count):
            if images is None or predictions is None:
                shown = difference[i] / (2 * largest or 1.0) + 0.5
            else:
                shown, taken = images[i], int(predictions[i])
                right = taken == int(pictures.y[i])
                axis[i].set_title(
                    ("" if right else "✗ ") + pictures.classes[taken],
                    color="black" if right else _ROBUST,
                    fontsize=9,
                )
            axis[i].imshow(
                _pixels(shown).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            axis[i].set_xticks([])
            axis[i].set_yticks([])
    return figure


def confusion(pictures: Pictures) -> Figure:
    """Shares of each class that are taken for which when attacked."""
    counts = pictures.confusion()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    size = len(pictures.classes)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class")
    axes.set_xlabel("taken for, when attacked")
    axes.set_ylabel("is")
    axes.set_title(f"{len(pictures.y)} {pictures.split} images")
    if size <= 20:
        axes.set_xticks(range(size), pictures.classes, rotation=45 if size > 10 else 0)
        axes.set_yticks(range(size), pictures.classes)
        for i in range(size):
            for j in range(size):
                if counts[i, j]:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=color)
    return figure


def line(pictures: Pictures) -> Figure:
    """Losses along one direction in weight space."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    names = {"clean": ("clean", _CLEAN), "robust_fixed": ("attacked at the centre", _ROBUST)}
    for loss, values in pictures.line.losses.items():
        name, color = names[loss]
        axes.plot(pictures.line.axes[0], values[0], marker=".", label=name, color=color)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("distance along a random direction, in norms of the filters")
    axes.set_ylabel("training loss")
    axes.legend()
    return figure


def _pixels(image: Tensor) -> Tensor:
    """For matplotlib: channels last, or none if there is only one."""
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
