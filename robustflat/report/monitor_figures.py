"""Figures of a run under way: attacked examples, confusion matrix, loss along a line of weights."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from robustflat.evaluate.shown import magnified
from robustflat.report.palette import colour
from robustflat.train.pictures import Pictures

_SHOWN = 8


def examples(pictures: Pictures) -> Figure:
    """Images, the same attacked, and the difference; over each what it is taken for."""
    count = min(_SHOWN, len(pictures.x))
    difference, largest = magnified(pictures.x[:count], pictures.x_adv[:count])
    rows = {
        "clean": (pictures.x[:count], pictures.clean),
        "attacked": (pictures.x_adv[:count], pictures.attacked),
        f"difference\n(full scale ±{largest:.3g})": (difference, None),
    }
    # One picture of all: axes of their own for each would take half a second.
    width = 1.3 * count + 1.5
    figure = Figure(figsize=(width, 4.3))
    axes = figure.add_axes((1.45 / width, 0.01, 1 - 1.5 / width, 0.98))
    axes.set_yticks(range(3), list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, (images, predictions) in enumerate(rows.values()):
        for i, image in enumerate(images):
            axes.imshow(
                _pixels(image).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest",
                extent=(i - 0.42, i + 0.42, row + 0.42, row - 0.42), aspect="auto",
            )  # fmt: skip
            if predictions is not None:
                taken = int(predictions[i])
                right = taken == int(pictures.y[i])
                axes.text(
                    i, row - 0.45, ("" if right else "✗ ") + pictures.classes[taken],
                    color="black" if right else colour(1), ha="center", va="bottom", fontsize=9,
                )  # fmt: skip
    axes.set(xlim=(-0.5, count - 0.5), ylim=(2.45, -0.62))
    return figure


def confusion(pictures: Pictures) -> Figure:
    """Shares of each class that are taken for which when attacked."""
    counts = pictures.confusion()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    size = len(pictures.classes)
    figure = Figure(figsize=(6.4, 5.6))
    axes = figure.add_axes((0.2, 0.18, 0.76, 0.76))
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class")
    axes.set_xlabel("taken for, when attacked")
    axes.set_ylabel("is")
    axes.set_title(f"{len(pictures.y)} {pictures.split} images")
    if size <= 20:
        lying = size <= 10 and max(map(len, pictures.classes)) < 4
        axes.set_xticks(
            range(size),
            pictures.classes,
            rotation=0 if lying else 45,
            ha="center" if lying else "right",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(size), pictures.classes)
        for i in range(size):
            for j in range(size):
                if counts[i, j]:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=color)
    return figure


def line(pictures: Pictures) -> Figure:
    """Losses along one direction in weight space."""
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.82))
    names = {"clean": "clean", "robust_fixed": "attacked at the centre"}
    for i, (loss, values) in enumerate(pictures.line.losses.items()):
        axes.plot(pictures.line.axes[0], values[0], marker=".", label=names[loss], color=colour(i))
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("distance along a random direction, in norms of the filters")
    axes.set_ylabel("training loss")
    axes.legend()
    return figure


def _pixels(image: Tensor) -> Tensor:
    """For matplotlib: channels last, or none if there is only one."""
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
