"""The one ascent loop, against functions whose maximum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustflat import Ascent, Ball
from robustflat.perturb import maximise


class Recorder:
    """The linear function <c, u>, one value a row, and every point at which it was asked."""

    def __init__(self, c: Tensor) -> None:
        self.c = c
        self.asked: list[Tensor] = []

    def __call__(self, u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self.asked.append(u[0].clone())
        return (self.c * u[0]).flatten(1).sum(1), [self.c.clone()]


C = torch.tensor([[3.0, -4.0, 0.0], [0.1, 0.2, -0.2]], dtype=torch.float64)


@pytest.mark.parametrize(("p", "q"), [(1, math.inf), (1.5, 3), (2, 2), (3, 1.5), (math.inf, 1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_linear_functions_reach_radius_times_the_dual_norm(p: float, q: float, steps: int) -> None:
    ball = Ball(p, 0.3, "row")
    (u,) = maximise(Recorder(C), ball, Ascent(steps, 1 / steps), [C])
    best = 0.3 * torch.linalg.vector_norm(C, q, dim=1)
    torch.testing.assert_close((C * u).sum(1), best, rtol=1e-12, atol=0)
    assert (ball.size([u])[0] <= 0.3 * (1 + 1e-12)).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_too_long_steps_are_projected_back(p: float) -> None:
    ball = Ball(p, 0.3, "row")
    asked = Recorder(C)
    (u,) = maximise(asked, ball, Ascent(20, 0.9, "uniform"), [C], torch.Generator().manual_seed(0))
    for point in [*asked.asked, u]:
        assert (ball.size([point])[0] <= 0.3 * (1 + 1e-12)).all()
    q = {1: math.inf, 2: 2, math.inf: 1}[p]
    reached = (C * u).sum(1) / (0.3 * torch.linalg.vector_norm(C, q, dim=1))
    assert (reached > 0.97).all()


def test_number_of_evaluations() -> None:
    for keep, expected in (("last", 4), ("best", 5)):
        asked = Recorder(C)
        maximise(asked, Ball(2, 1.0), Ascent(4, 0.25, keep=keep), [C])
        assert len(asked.asked) == expected


def test_a_start_counts_once() -> None:
    # The first gradient is asked for at the start, and one step of one radius leads away from it.
    g = torch.Generator().manual_seed(1)
    asked = Recorder(C)
    ball = Ball(2, 1.0)
    (u,) = maximise(asked, ball, Ascent(1, 0.5, "sphere"), [C], g)
    torch.testing.assert_close(ball.size(asked.asked)[0], torch.ones(2, 1, dtype=torch.float64))
    expected = ball.project([asked.asked[0] + 0.5 * ball.steepest([C])[0]])[0]
    torch.testing.assert_close(u, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("start", ["uniform", "sphere", "normal", "zero"])
def test_no_steps_leave_the_start(start: str) -> None:
    like = [torch.empty(200, 3, dtype=torch.float64)]
    g = torch.Generator().manual_seed(0)
    (u,) = maximise(Recorder(C), Ball(2, 0.5), Ascent(0, start=start), like, g)  # type: ignore[arg-type]
    sizes = Ball(2, 0.5).size([u])[0]
    if start == "zero":
        assert not u.any()
    elif start == "sphere":
        assert (sizes - 0.5).abs().max() < 1e-12
    elif start == "uniform":
        assert sizes.max() <= 0.5
        assert sizes.min() < 0.3
    else:
        assert float(u.std()) == pytest.approx(1e-3, rel=0.1)


def test_initial_is_projected_constrained_and_not_changed() -> None:
    initial = torch.full((2, 3), 9.0, dtype=torch.float64)
    asked = Recorder(C)
    maximise(
        asked,
        Ball(math.inf, 0.5),
        Ascent(1, 0.1, "uniform"),
        [C],
        initial=[initial],
        constrain=lambda u: [u[0].clamp(max=0.2)],
    )
    assert torch.equal(asked.asked[0], torch.full_like(initial, 0.2))
    assert (initial == 9).all()


def test_initial_is_projected_even_where_steps_alone_stay_inside() -> None:
    initial = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.0, 0.9]], dtype=torch.float64)
    ball = Ball(2, 1.0)
    (u,) = maximise(Recorder(C), ball, Ascent(1, 1.0), [C], initial=[initial])
    assert (ball.size([u])[0] <= 1 + 1e-12).all()


def test_raw_direction_multiplies_the_gradient() -> None:
    (u,) = maximise(Recorder(C), Ball(2, 100.0, "global"), Ascent(3, 0.5, direction="raw"), [C])
    torch.testing.assert_close(u, 1.5 * C, rtol=1e-14, atol=0)
    (u,) = maximise(Recorder(C), Ball(2, 1.0, "global"), Ascent(3, 0.5, direction="raw"), [C])
    torch.testing.assert_close(u, C / C.norm(), rtol=1e-12, atol=0)


def test_best_is_kept_for_each_row_over_start_and_end() -> None:
    # Row 0 is best at its start, row 1 in the middle (after one step), row 2 at its end.
    peak = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return -(u[0][:, 0] - peak).abs(), [torch.ones_like(u[0])]

    like = [torch.empty(3, 1, dtype=torch.float64)]
    (u,) = maximise(value_and_grad, Ball(2, 10.0), Ascent(2, 0.1, keep="best"), like)
    assert u[:, 0].tolist() == [0.0, 1.0, 2.0]
    (u,) = maximise(value_and_grad, Ball(2, 10.0), Ascent(2, 0.1), like)
    assert u[:, 0].tolist() == [2.0, 2.0, 2.0]


def test_best_of_one_value_in_all() -> None:
    def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return -(u[0].sum() - 1).abs(), [torch.ones_like(t) for t in u]

    like = [torch.empty(1, 1), torch.empty(3)]
    u = maximise(value_and_grad, Ball(math.inf, 10.0, "global"), Ascent(3, 0.1, keep="best"), like)
    assert [t.flatten().tolist() for t in u] == [[1.0], [1.0, 1.0, 1.0]]


def test_best_is_not_stuck_at_a_nan() -> None:
    values = iter([math.nan, 1.0, 0.5])

    def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return torch.tensor(next(values)), [torch.ones_like(u[0])]

    (u,) = maximise(
        value_and_grad, Ball(math.inf, 2.0), Ascent(2, 0.5, keep="best"), [torch.empty(1, 1)]
    )
    assert u.item() == 1.0


def test_a_quadratic_is_maximised_over_its_ball() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=g, dtype=torch.float64)
    h = a @ a.T

    def value_and_grad(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return 0.5 * u[0] @ h @ u[0], [h @ u[0]]

    (u,) = maximise(value_and_grad, Ball(2, 0.4, "global"), Ascent(300, 0.3, "sphere"), [h[0]], g)
    assert float(0.5 * u @ h @ u) == pytest.approx(
        0.5 * 0.16 * float(torch.linalg.eigvalsh(h)[-1]), rel=1e-9
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1, "step_size": -1.0}, "step_size"),
        ({"steps": 1, "step_size": math.nan}, "step_size"),
        ({"steps": 1, "start": "random"}, "start"),
        ({"steps": 1, "direction": "up"}, "direction"),
        ({"steps": 1, "keep": "all"}, "keep"),
    ],
)
def test_impossible_ascents_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Ascent(**arguments)  # type: ignore[arg-type]
