"""The sharpness notions and SAM against the theory of Wen, Ma and Li (2023), on a toy loss."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from script_support import script
from torch.func import functional_call

import robustflat as rf

notions = script("sharpness_notions")

# The toy in closed form: lambda_k(theta) = BASE - DEPTH cos(theta - PLACE).
BASE, DEPTH, PLACE = np.array([6.6, 4.6, 3.0]), np.array([1.0, 0.8, 0.6]), np.array([-1.3, 0, 1.3])
# A sum of cosines is a cosine, whose phase is that of the sum of the phasors.
OPTIMA = {
    "lambda_1": -1.3,
    "lambda_min": 1.3,
    "trace": float(np.angle((DEPTH * np.exp(1j * PLACE)).sum())),
}
# Wen et al. 2023, table 1.
PREDICTED = {
    "worst direction": "lambda_1",
    "ascent direction": "lambda_min",
    "average direction": "trace",
    "SAM, full batch": "lambda_1",
    "SAM, batch size 1": "trace",
    "mSAM, m = 1": "trace",
}


def curvature(theta: float) -> Any:
    return BASE - DEPTH * np.cos(theta - PLACE)


def loss(point: Any) -> float:
    return float(0.5 * (curvature(point[0]) * point[1:] ** 2).sum())


def gradient(point: Any) -> Any:
    slope = DEPTH * np.sin(point[0] - PLACE)
    along = 0.5 * (slope * point[1:] ** 2).sum()
    return np.concatenate([[along], curvature(point[0]) * point[1:]])


def valley(point: Any) -> Any:
    model = notions.Valley(float(point[0]))
    with torch.no_grad():
        model.x.copy_(torch.as_tensor(point[1:]))
    return model


@pytest.fixture(scope="module")
def journeys() -> dict[str, Any]:
    return {v.name: notions.travel(v) for v in notions.variants()}


def test_the_quantities_are_those_of_the_closed_form() -> None:
    theta = np.linspace(-3, 3, 7)
    found = notions.along(torch.as_tensor(theta))
    expected = np.array([curvature(t) for t in theta])
    np.testing.assert_allclose(found["lambda_1"], expected.max(1), rtol=1e-12)
    np.testing.assert_allclose(found["lambda_min"], expected.min(1), rtol=1e-12)
    np.testing.assert_allclose(found["trace"], expected.sum(1), rtol=1e-12)


def test_the_optima_are_those_of_the_closed_form_and_far_apart() -> None:
    assert notions.optima() == pytest.approx(OPTIMA, abs=1.1e-3)
    places = sorted(OPTIMA.values())
    assert min(np.diff(places)) > 0.9


def test_each_data_point_is_zero_on_the_valley_with_a_hessian_of_rank_one() -> None:
    model = notions.Valley(0.2)
    for k in range(3):

        def single(point: torch.Tensor, k: int = k) -> torch.Tensor:
            values = {"theta": point[0], "x": point[1:]}
            return functional_call(model, values, (slice(k, k + 1),))

        floor = torch.tensor([0.2, 0, 0, 0], dtype=torch.float64)
        assert single(floor) == 0
        matrix = torch.autograd.functional.hessian(single, floor)
        assert torch.linalg.matrix_rank(matrix) == 1
        assert matrix[k + 1, k + 1].item() == pytest.approx(3 * curvature(0.2)[k])


@pytest.mark.parametrize("point", [(-1.0, 0.1, 0.05, -0.1), (0.4, -0.02, 0.2, 0.1)])
def test_the_worst_direction_is_the_maximum_over_the_ball(point: tuple[float, ...]) -> None:
    centre = np.array(point)
    value = notions.worst_direction(1.0).backward(*[valley(point)] * 2).item()
    offsets = np.random.default_rng(0).standard_normal((200_000, 4))
    offsets /= np.linalg.norm(offsets, axis=1, keepdims=True)
    w = centre + offsets
    values = BASE - DEPTH * np.cos(w[:, :1] - PLACE)
    best = (0.5 * values * w[:, 1:] ** 2).sum(1).max()
    # 200,000 points leave no more than some thousandths to find.
    assert best * 0.999 <= value <= best * 1.01


def test_the_ascent_direction_has_the_whole_derivative_and_sam_has_not() -> None:
    point, rho, h = np.array([0.4, 0.2, -0.3, 0.25]), 0.7, 1e-6

    def perturbed(w: Any) -> float:
        g = gradient(w)
        return loss(w + rho * g / np.linalg.norm(g))

    expected = [(perturbed(point + h * e) - perturbed(point - h * e)) / (2 * h) for e in np.eye(4)]
    model = valley(point)
    notions.ascent_direction(rho)(model, torch.Generator())
    found = np.array([model.theta.grad.item(), *model.x.grad.tolist()])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)

    g = gradient(point)
    model.zero_grad()
    rf.sam(rho).backward(model, model)
    sam = np.array([model.theta.grad.item(), *model.x.grad.tolist()])
    np.testing.assert_allclose(sam, gradient(point + rho * g / np.linalg.norm(g)), rtol=1e-12)
    assert np.abs(sam - expected).max() > 0.1


@pytest.mark.parametrize("name", PREDICTED)
def test_each_drifts_to_the_predicted_minimiser(name: str, journeys: dict[str, Any]) -> None:
    journey = journeys[name]
    assert journey.nearest == PREDICTED[name]
    # Less than a fifth of the way to the next optimum; the random ones still fluctuate.
    assert journey.end == pytest.approx(OPTIMA[PREDICTED[name]], abs=0.18)
    # It ended in the valley, not on one of its walls.
    assert journey.points[-1, 1:].abs().max() < 0.3


def test_nothing_drifts_without_a_perturbation(journeys: dict[str, Any]) -> None:
    descent = journeys["gradient descent"]
    assert descent.nearest is None
    assert loss(descent.points[-1].numpy()) < 1e-12
    off = notions.Variant("off", None, lambda m, _: rf.sam(0.0).backward(m, m), lr=0.03, steps=300)
    assert torch.equal(notions.travel(off).points, descent.points)


def test_each_quantity_is_least_for_those_that_follow_it(journeys: dict[str, Any]) -> None:
    for quantity, value in {
        "lambda_1": lambda theta: curvature(theta).max(),
        "lambda_min": lambda theta: curvature(theta).min(),
        "trace": lambda theta: curvature(theta).sum(),
    }.items():
        reached = {name: value(journeys[name].end) for name in PREDICTED}
        followers = {name for name, follows in PREDICTED.items() if follows == quantity}
        worst_follower = max(reached[name] for name in followers)
        best_other = min(reached[name] for name in PREDICTED if name not in followers)
        assert worst_follower < best_other - 0.1


def test_full_batch_sam_aligns_the_gradient_with_the_top_eigenvector(
    journeys: dict[str, Any],
) -> None:
    sam = journeys["SAM, full batch"]
    assert sam.final_alignment > 0.999
    assert sam.alignment[0] < 0.9
    # The same ascent step, differentiated through, turns to the other end of the spectrum.
    assert journeys["ascent direction"].final_alignment < 0.3
    assert journeys["SAM, batch size 1"].final_alignment < 0.97


def test_the_derivative_of_the_ascent_alone_parts_sam_from_the_ascent_direction(
    journeys: dict[str, Any],
) -> None:
    ascent, sam = journeys["ascent direction"].variant, journeys["SAM, full batch"].variant
    journey = notions.travel(replace(ascent, backward=sam.backward))
    assert journey.end == pytest.approx(OPTIMA["lambda_1"], abs=0.05)
    assert journey.final_alignment > 0.99


def test_full_batch_sam_oscillates_with_the_amplitude_of_the_closed_form(
    journeys: dict[str, Any],
) -> None:
    """x_1 -> (1 - lr lambda_1) x_1 - lr lambda_1 rho sign(x_1) has this cycle of length two."""
    late = journeys["SAM, full batch"].points[-10:, 1]
    step = 0.03 * 5.6
    assert late.abs().tolist() == pytest.approx([step * notions.RHO / (2 - step)] * 10, rel=1e-3)
    assert (late[1:] * late[:-1] < 0).all()


def test_the_table_and_the_picture_are_made(journeys: dict[str, Any], tmp_path: Path) -> None:
    text = io.StringIO()
    Console(width=80, file=text).print(notions.table(list(journeys.values())))
    for name in (*journeys, "lambda_min", "+1.30"):
        assert name in text.getvalue()
    notions.draw(list(journeys.values())).savefig(tmp_path / "picture.png", dpi=60)
    assert (tmp_path / "picture.png").stat().st_size > 5000
