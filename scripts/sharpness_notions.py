"""Which flat minimum each notion of sharpness, and each kind of SAM, looks for (Wen et al. 2023).

A loss with a whole circle of minimisers, along which the largest eigenvalue of the Hessian, its
smallest (across the circle) and its trace are least at three different places. Everything starts at
one point and descends. "How Does Sharpness-Aware Minimization Minimize Sharpness?" says where each
ends:

    notion, added to the loss                            is least where
    worst direction    max L(w + v) - L(w)               lambda_1 is
    ascent direction   L(w + rho g / |g|) - L(w)         lambda_min is
    average direction  E L(w + v) - L(w)                 the trace is
    method
    full-batch SAM                                       lambda_1 is
    batch-size-1 SAM                                     the trace is

Full-batch SAM steps in the ascent direction and yet does not follow lambda_min: it does not
differentiate through g / |g|, and its own oscillation turns g into the top eigenvector.

    python scripts/sharpness_notions.py          seconds; prints a table, draws a picture
    python scripts/sharpness_notions.py --film docs/pictures/three-notions.gif       moving, too

Exits with 1 if anything ends elsewhere than the paper says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import robustflat as rf

# The loss is quadratic across the valley whatever the distance, so rho only sets the pace.
RHO = 1.0
START = 0.5
# Of the quantities, in the picture; None is gradient descent.
COLOURS = {"lambda_1": "#d55e00", "lambda_min": "#0072b2", "trace": "#009e73", None: "#777777"}
SYMBOLS = {"lambda_1": r"$\lambda_1$", "lambda_min": r"$\lambda_{\min}$", "trace": "trace"}

# Leaves the gradient to descend in ``.grad``.
Backward = Callable[["Valley", torch.Generator], object]


class Valley(nn.Module):
    """Three data points with losses l_k = 3/2 lambda_k(theta) x_k^2; x = 0 minimises all of them.

    The mean L = 1/2 sum_k lambda_k(theta) x_k^2 has, on the circle x = 0, the Hessian
    diag(0, lambda(theta)); each data point's own Hessian there has rank one, as in the paper.
    lambda_k(theta) = base_k - depth_k cos(theta - place_k), and no two of them ever meet.
    """

    base: Tensor
    depth: Tensor
    place: Tensor

    def __init__(self, theta: float = START) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.x = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))
        for name, values in (
            ("base", (6.6, 4.6, 3.0)),
            ("depth", (1.0, 0.8, 0.6)),
            ("place", (-1.3, 0.0, 1.3)),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))

    def forward(self, rows: slice = slice(None)) -> Tensor:
        """The mean loss of the data points ``rows``."""
        curvature = self.base - self.depth * torch.cos(self.theta - self.place)
        return (1.5 * curvature * self.x.square())[rows].mean()

    def loss_at(self, point: Tensor) -> Tensor:
        """The mean loss of all data at ``point [4]``, which is theta and x."""
        loss: Tensor = functional_call(self, {"theta": point[0], "x": point[1:]}, ())
        return loss


@dataclass(frozen=True)
class Variant:
    """A notion of sharpness, or a method, and how it is descended.

    Attributes:
        name: in the table and the picture.
        follows: the quantity it is expected to make small; None, none at all.
        backward: leaves the gradient to descend in ``.grad``.
        lr: learning rate.
        steps: of gradient descent.
        lr_across: learning rate of x, if not ``lr``.
    """

    name: str
    follows: str | None
    backward: Backward
    lr: float
    steps: int
    lr_across: float | None = None


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Where a variant went.

    Attributes:
        variant: which.
        points: (theta, x) before every step and after the last, ``[steps + 1, 4]``.
        alignment: abs(cos) of the gradient and the Hessian's top eigenvector at them,
            ``[steps + 1]``.
    """

    variant: Variant
    points: Tensor
    alignment: Tensor

    @property
    def end(self) -> float:
        """The mean theta of the last tenth, which for the random ones still fluctuates."""
        return float(self.points[-(self.variant.steps // 10) :, 0].mean())

    @property
    def final_alignment(self) -> float:
        """The mean alignment of the last tenth."""
        return float(self.alignment[-(self.variant.steps // 10) :].mean())

    @property
    def nearest(self) -> str | None:
        """The quantity that is least nearest to the end; None if nothing moved along the valley."""
        if abs(self.end - START) < 0.05:
            return None
        return min(optima(), key=lambda name: abs(optima()[name] - self.end))


def along(theta: Tensor) -> dict[str, Tensor]:
    """The three quantities at the minimisers ``theta [N]``, from the Hessian of the loss there."""
    values = torch.linalg.eigvalsh(_hessians(theta))
    # The smallest of the four belongs to the direction along the valley, and is zero.
    return {"lambda_1": values[:, -1], "lambda_min": values[:, 1], "trace": values.sum(1)}


@cache
def optima() -> dict[str, float]:
    """The theta at which each of the three quantities is least, to within 0.001."""
    theta = torch.linspace(-torch.pi, torch.pi, 6001, dtype=torch.float64)
    return {name: float(theta[values.argmin()]) for name, values in along(theta).items()}


def alignments(points: Tensor) -> Tensor:
    """abs(cos) ``[N]`` of the gradient at ``points [N, 4]`` and the top eigenvector beneath it."""
    gradients = vmap(grad(Valley().loss_at))(points)
    top = torch.linalg.eigh(_hessians(points[:, 0])).eigenvectors[:, :, -1]
    return torch.cosine_similarity(gradients, top, eps=torch.finfo(top.dtype).tiny).abs()


def _hessians(theta: Tensor) -> Tensor:
    floor = torch.cat([theta.unsqueeze(1), theta.new_zeros(len(theta), 3)], dim=1)
    matrices: Tensor = vmap(jacrev(grad(Valley().loss_at)))(floor)
    return matrices


def worst_direction(rho: float) -> rf.WeightPerturbation:
    """The maximum over the ball itself, for SAM's gradient is the maximum's at the maximiser.

    A step of ten radii, projected, all but replaces the perturbation by rho g(w + v) / |g(w + v)|:
    power iteration, here with a ratio of eigenvalues of at most 0.85.
    """
    ascent = rf.Ascent(12, 10.0)
    return rf.WeightPerturbation(name="worst", ball=rf.Ball(2, rho, "global"), ascent=ascent)


def average_direction(rho: float) -> rf.WeightPerturbation:
    """A direction drawn anew at each step, so that the expected gradient is the average's."""
    ascent = rf.Ascent(0, start="sphere")
    return rf.WeightPerturbation(name="average", ball=rf.Ball(2, rho, "global"), ascent=ascent)


def ascent_direction(rho: float) -> Backward:
    """The gradient of L(w + rho g / |g|) with the derivative of g / |g|, which SAM leaves out."""
    ball = rf.Ball(2, rho, "global")

    def backward(model: Valley, _: torch.Generator) -> None:
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradient = torch.autograd.grad(model(), parameters, create_graph=True)
        step = ball.steepest(list(gradient))
        moved = [p + rho * s for p, s in zip(parameters, step, strict=True)]
        value = functional_call(model, dict(zip(names, moved, strict=True)), ())
        for p, g in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            p.grad = g

    return backward


def variants(rho: float = RHO) -> tuple[Variant, ...]:
    """The three notions, the methods, and gradient descent beside them."""
    worst, average = _whole(worst_direction(rho)), _whole(average_direction(rho))
    ascent = ascent_direction(rho)
    return (
        Variant("worst direction", "lambda_1", worst, lr=0.04, steps=300),
        # Across the valley this one's curvature grows as 1 / |x|^2 and throws x out to |x|^2 ~
        # lr_across; at the same rates SAM still goes to lambda_1 (tests/test_theory.py).
        Variant("ascent direction", "lambda_min", ascent, lr=0.04, lr_across=1e-4, steps=1500),
        Variant("average direction", "trace", average, lr=0.03, steps=1500),
        Variant("SAM, full batch", "lambda_1", _whole(rf.sam(rho)), lr=0.03, steps=700),
        Variant("SAM, batch size 1", "trace", _single(rf.sam(rho)), lr=0.005, steps=1600),
        Variant("mSAM, m = 1", "trace", _chunks(rf.msam(rf.sam(rho), 1)), lr=0.01, steps=700),
        Variant("gradient descent", None, _whole(rf.no_perturbation()), lr=0.03, steps=300),
    )


def _whole(perturbation: rf.WeightPerturbation) -> Backward:
    return lambda model, generator: perturbation.backward(model, model, generator=generator)


def _single(perturbation: rf.WeightPerturbation) -> Backward:
    def backward(model: Valley, generator: torch.Generator) -> None:
        row = int(torch.randint(3, (), generator=generator))
        perturbation.backward(lambda: model(slice(row, row + 1)), model)

    return backward


def _chunks(perturbation: rf.msam) -> Backward:
    return lambda model, _: perturbation.backward(model, model, rows=3)


def travel(variant: Variant, seed: int = 0) -> Journey:
    """Descend from the start with ``variant`` and plain SGD."""
    model = Valley()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([model.theta], lr=variant.lr)
    optimizer.add_param_group({"params": [model.x], "lr": variant.lr_across or variant.lr})
    points = torch.empty(variant.steps + 1, 4, dtype=torch.float64)
    for i in range(variant.steps + 1):
        points[i, 0], points[i, 1:] = model.theta.detach(), model.x.detach()
        if i < variant.steps:
            optimizer.zero_grad()
            variant.backward(model, generator)
            optimizer.step()
    return Journey(variant=variant, points=points, alignment=alignments(points))


def table(journeys: Sequence[Journey]) -> Table:
    """One row for each journey, and where each quantity is least."""
    places = ", ".join(f"{name} at {theta:+.2f}" for name, theta in optima().items())
    result = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"From theta = {START:+.2f} down the valley",
        caption=f"Least along the valley: {places}. |cos|: of gradient and top eigenvector.",
    )
    result.add_column("descends on", no_wrap=True)
    for heading in ("ends\nat", "lambda\n_1", "lambda\n_min", "trace"):
        result.add_column(heading, justify="right")
    result.add_column("predicted", no_wrap=True)
    result.add_column("nearest", no_wrap=True)
    result.add_column("|cos|", justify="right")
    for journey in journeys:
        there = along(torch.tensor([journey.end], dtype=torch.float64))
        result.add_row(
            journey.variant.name,
            f"{journey.end:+.2f}",
            *(f"{float(values):.2f}" for values in there.values()),
            journey.variant.follows or "stays",
            journey.nearest or "stays",
            f"{journey.final_alignment:.3f}",
        )
    return result


def draw(journeys: Sequence[Journey]) -> Figure:
    """The quantities along the valley; below, the way of each variant and its alignment."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 3), width_ratios=(5, 3))
    valley = figure.add_subplot(grid[0, 0])
    ways = figure.add_subplot(grid[1, 0], sharex=valley)
    aligned = figure.add_subplot(grid[1, 1], sharey=ways)
    key = figure.add_subplot(grid[0, 1])
    _draw_valley(valley)
    for name, place in optima().items():
        ways.axvline(place, color=COLOURS[name], lw=7, alpha=0.18)
    for journey in journeys:
        _draw_journey(journey, ways, aligned)
    ways.plot(START, 0, "o", color="black", ms=7, zorder=5, clip_on=False)
    ways.annotate("start", (START, 0), (9, -5), textcoords="offset points", va="top")
    ways.set(ylim=(1.02, 0), xlabel=r"place in the valley, $\theta$", ylabel="share of its steps")
    ways.set_title("Where each notion and each method drifts", loc="left")
    aligned.set(xlim=(-0.03, 1.03), xlabel="|cos(gradient, top eigenvector)|, running mean")
    aligned.set_title("How far it aligns the gradient", loc="left")
    aligned.tick_params(labelleft=False)
    key.axis("off")
    handles, labels = ways.get_legend_handles_labels()
    key.legend(handles, labels, loc="center left", frameon=False, handlelength=3.2)
    for axes in (valley, ways, aligned):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_valley(axes: Axes) -> None:
    theta = torch.linspace(-2.2, 2.2, 401, dtype=torch.float64)
    for name, values in along(theta).items():
        axes.plot(theta, values - values.min(), color=COLOURS[name], lw=2.2)
        axes.plot(optima()[name], 0, "v", color=COLOURS[name], ms=9, clip_on=False, zorder=5)
        axes.text(optima()[name], 0.16, SYMBOLS[name], color=COLOURS[name], ha="center", size=12)
    axes.set(ylabel="above its least value", ylim=(0, None))
    axes.tick_params(labelbottom=False)
    axes.set_title("Three measures of flatness, least at three places", loc="left")


def _draw_journey(journey: Journey, ways: Axes, aligned: Axes) -> None:
    variant = journey.variant
    style = {"direction": "--", "m = 1": ":"}.get(variant.name.split(maxsplit=1)[-1], "-")
    colour = COLOURS[variant.follows]
    aim = "stays" if variant.follows is None else f"least {SYMBOLS[variant.follows]}"
    share = torch.linspace(0, 1, len(journey.points))
    label = f"{variant.name} ({aim})"
    ways.plot(journey.points[:, 0], share, style, color=colour, lw=1.8, label=label)
    # Single directions fluctuate between 0 and 1.
    window = variant.steps // 20
    smooth = journey.alignment.unfold(0, window, 1).mean(1)
    aligned.plot(smooth, share[window // 2 :][: len(smooth)], style, color=colour, lw=1.8)


def film(journeys: Sequence[Journey], path: Path, frames: int = 48) -> None:
    """Write the ways down the valley as a moving picture, a lane for each, with a rest at the end.

    Args:
        journeys: one lane each, from the top.
        path: a .gif file.
        frames: of the moving part; each journey is shown at the same share of its steps.
    """
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    valley, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    _draw_valley(valley)
    for name, place in optima().items():
        lanes.axvline(place, color=COLOURS[name], lw=7, alpha=0.18)
    lanes.set(ylim=(len(journeys) - 0.4, -0.6), xlabel=r"place in the valley, $\theta$")
    lanes.set_yticks(range(len(journeys)), [journey.variant.name for journey in journeys])
    lanes.tick_params(axis="y", length=0)
    for axes in (valley, lanes):
        axes.spines[["top", "right"]].set_visible(False)
    marks = []
    for lane, journey in enumerate(journeys):
        colour = COLOURS[journey.variant.follows]
        lanes.plot(START, lane, "|", color="black", ms=12)
        (trail,) = lanes.plot([], [], color=colour, lw=2, alpha=0.45)
        (dot,) = lanes.plot([], [], "o", color=colour, ms=9)
        marks.append((lane, journey, trail, dot))

    def show(frame: int) -> None:
        for lane, journey, trail, dot in marks:
            last = positions(journey, frames)[min(frame, frames - 1)]
            way = journey.points[: last + 1, 0]
            trail.set_data(way, [lane] * len(way))
            dot.set_data(way[-1:], [lane])

    moving = FuncAnimation(figure, show, frames=frames + frames // 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    moving.save(path, PillowWriter(fps=12), dpi=80)


def positions(journey: Journey, frames: int) -> list[int]:
    """The index into a journey's points that each frame of a film shows, first and last included.

    Early frames are close together, since most of the way is gone in the first steps.
    """
    steps = journey.variant.steps
    return [round(steps * (frame / (frames - 1)) ** 2) for frame in range(frames)]


def main() -> int:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/sharpness_notions.png"))
    parser.add_argument("--film", type=Path, help="also a moving picture, a .gif file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    journeys = [travel(variant, arguments.seed) for variant in variants()]
    console = Console()
    console.print(table(journeys))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(journeys).savefig(arguments.output, dpi=150)
    if arguments.film is not None:
        film(journeys, arguments.film)
    console.print(f"{arguments.output} drawn, {time.perf_counter() - begin:.0f} s in all.")
    return 0 if all(j.nearest == j.variant.follows for j in journeys) else 1


if __name__ == "__main__":
    raise SystemExit(main())
