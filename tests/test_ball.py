"""The geometry of lp balls, against its mathematics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustflat import Ball
from robustflat.perturb import parse_norm

NORMS = (1.0, 1.5, 2.0, 3.0, math.inf)
PROJECTED = (1.0, 2.0, math.inf)
GROUPS = ("row", "tensor", "global")
SHAPES = ([(3, 4)], [(5,)], [(2, 3, 2), (4,)], [(1, 6), (3, 2), ()])
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> list[Tensor]:
    """Lists of tensors with ties, zeros, whole zero groups and magnitudes from 1e-3 to 1e3."""
    shapes = draw(st.sampled_from(SHAPES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from(("normal", "ties", "sparse", "zero")))
    scale = draw(st.sampled_from((1e-3, 1.0, 30.0, 1e3)))
    out = []
    for shape in shapes:
        t = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        if kind == "ties":
            t = torch.randint(-2, 3, shape, generator=g).double() * scale
        elif kind == "sparse":
            t = t * (torch.rand(shape, generator=g) < 0.3)
        elif kind == "zero":
            t = torch.zeros_like(t)
        out.append(t.to(dtype))
    return out


def grouped(u: list[Tensor], group: str) -> list[Tensor]:
    """Every group as one float64 vector, by plain indexing."""
    u = [t.double() for t in u]
    if group == "global":
        return [torch.cat([t.flatten() for t in u])]
    if group == "tensor":
        return [t.flatten() for t in u]
    return [row.flatten() for t in u for row in (t if t.ndim > 1 else t.unsqueeze(0))]


def dual(p: float) -> float:
    return 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)


def norm(v: Tensor, p: float) -> float:
    if p == math.inf:
        return float(v.abs().max())
    return float((v.abs() ** p).sum() ** (1 / p))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(data=st.data())
def test_size_and_steepest_step(
    data: st.DataObject, dtype: torch.dtype, p: float, group: str
) -> None:
    g = data.draw(tensors(dtype))
    ball = Ball(p, 1.0, group)
    tol = CLOSE[dtype]
    sizes = [torch.broadcast_to(s, t.shape) for s, t in zip(ball.size(g), g, strict=True)]
    for size, v in zip(grouped(sizes, group), grouped(g, group), strict=True):
        assert size.tolist() == pytest.approx([norm(v, p)] * len(size), rel=tol, abs=1e-300)
    s = ball.steepest(g)
    assert [t.shape for t in s] == [t.shape for t in g]
    assert all(t.dtype == dtype for t in s)
    for v, w in zip(grouped(g, group), grouped(s, group), strict=True):
        if float(v.abs().max()) == 0:
            assert not w.any()
            continue
        assert norm(w, p) == pytest.approx(1, rel=tol)
        assert float(v @ w) == pytest.approx(norm(v, dual(p)), rel=2 * tol)
        # A zero coordinate is never moved.
        assert not w[v == 0].any()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("p", PROJECTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data(), radius=st.sampled_from((1e-3, 0.7, 8.0, 1e3)))
def test_projection_is_the_nearest_point(
    data: st.DataObject, radius: float, dtype: torch.dtype, p: float, group: str
) -> None:
    u = data.draw(tensors(dtype))
    ball = Ball(p, radius, group)
    before = [t.clone() for t in u]
    once = ball.project(u)
    assert all(torch.equal(a, b) for a, b in zip(u, before, strict=True))
    tol = CLOSE[dtype]
    for a, b in zip(once, ball.project(once), strict=True):
        torch.testing.assert_close(b, a, rtol=tol, atol=tol * radius)
    inside = ball.sample(u, torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    for x, q, v in zip(
        grouped(u, group), grouped(once, group), grouped(inside, group), strict=True
    ):
        scale = max(float(x.norm()), radius) * radius * math.sqrt(len(x))
        assert norm(q, p) <= radius * (1 + 4 * tol) + tol * float(x.abs().max())
        # The variational inequality that characterises the projection onto a convex set.
        assert float((x - q) @ (v - q)) <= 4 * tol * scale
        # A vertex or face point in the direction of the residual is the hardest v.
        residual = x - q
        if residual.any():
            hardest = grouped(Ball(p, 1.0, "tensor").steepest([residual]), "tensor")[0] * radius
            assert float(residual @ (hardest - q)) <= 8 * tol * scale


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("p", PROJECTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(data=st.data())
def test_projection_is_the_identity_inside_bit_for_bit(
    data: st.DataObject, dtype: torch.dtype, p: float, group: str
) -> None:
    u = data.draw(tensors(dtype))
    largest = max(norm(v, p) for v in grouped(u, group))
    ball = Ball(p, max(largest * 1.05, 1e-6), group)
    for a, b in zip(u, ball.project(u), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("p", PROJECTED)
def test_projection_onto_a_known_point(p: float) -> None:
    u = torch.tensor([[3.0, -4.0], [0.3, 0.4]])
    expected = {
        1.0: [[0.0, -1.0], [0.3, 0.4]],
        2.0: [[0.6, -0.8], [0.3, 0.4]],
        math.inf: [[1.0, -1.0], [0.3, 0.4]],
    }[p]
    torch.testing.assert_close(Ball(p, 1.0, "row").project([u])[0], torch.tensor(expected))
    # Two entries survive the l1 threshold here: (2, 1.5, 0.1) - 1.25 -> (0.75, 0.25, 0).
    if p == 1:
        got = Ball(1, 1.0).project([torch.tensor([[2.0, -1.5, 0.1]])])[0]
        torch.testing.assert_close(got, torch.tensor([[0.75, -0.25, 0.0]]))


@pytest.mark.parametrize("p", NORMS)
def test_rows_do_not_depend_on_the_batch_around_them(p: float) -> None:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(4, 2, 3, generator=g)
    b = torch.cat([a[:2], torch.randn(3, 2, 3, generator=g) * 1e6, a[2:], torch.zeros(1, 2, 3)])
    ball = Ball(p, 0.5, "row")
    operations = [ball.steepest, ball.size] + ([ball.project] if p in PROJECTED else [])
    for operation in operations:
        alone, among = operation([a])[0], operation([b])[0]
        assert torch.equal(alone, torch.cat([among[:2], among[5:7]]))
        single = torch.cat([operation([row.unsqueeze(0)])[0] for row in a])
        assert torch.equal(alone, single)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30, 1e38])
def test_tiny_and_huge_float32_gradients_give_a_unit_step(
    p: float, group: str, magnitude: float
) -> None:
    base = torch.tensor([[3.0, -1.0, 0.0], [0.5, 2.0, 1.0]])
    g = [base * magnitude, torch.tensor([1.0, -3.0]) * magnitude]
    for v, s in zip(
        grouped(g, group), grouped(Ball(p, 1.0, group).steepest(g), group), strict=True
    ):
        assert norm(s, p) == pytest.approx(1, rel=1e-5)
        if p == 2:
            torch.testing.assert_close(s, v / v.norm(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p", PROJECTED)
def test_projection_of_a_huge_point_is_on_the_sphere(p: float) -> None:
    # So far out that the radius is lost in the rounding of the point's own coordinates.
    u = torch.tensor([[3e15, -4e15]])
    (q,) = Ball(p, 1.0, "row").project([u])
    assert norm(q.double(), p) == pytest.approx(1, rel=1e-5)
    assert (q.sign() * u.sign() >= 0).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_radius_zero_gradient_and_sphere(p: float, group: str, dtype: torch.dtype) -> None:
    like = [torch.ones(3, 4, dtype=dtype), torch.ones(5, dtype=dtype)]
    g = torch.Generator().manual_seed(0)
    assert all(not t.any() for t in Ball(p, 0.0, group).project(like))
    zeros = [torch.zeros_like(t) for t in like]
    assert all(
        torch.equal(t, z) for t, z in zip(Ball(p, 1.0, group).steepest(zeros), zeros, strict=True)
    )
    on = Ball(p, 0.5, group).sample(like, g, surface=True)
    within = Ball(p, 0.5, group).sample(like, g)
    for a, b, t in zip(on, within, like, strict=True):
        assert a.shape == b.shape == t.shape
        assert a.dtype == b.dtype == dtype
    for v in grouped(on, group):
        assert norm(v, p) == pytest.approx(0.5, rel=CLOSE[dtype])
    for v in grouped(within, group):
        assert norm(v, p) <= 0.5 * (1 + CLOSE[dtype])


@pytest.mark.parametrize("p", NORMS)
def test_samples_are_uniform_in_the_ball(p: float) -> None:
    n, d, radius = 4000, 3, 0.7
    g = torch.Generator().manual_seed(7)
    (u,) = Ball(p, radius, "row").sample([torch.empty(n, d, dtype=torch.float64)], g)
    sizes = torch.linalg.vector_norm(u, p, dim=1) / radius
    # P(size <= r) = r^d for the uniform law, whatever the norm.
    assert stats.kstest((sizes**d).numpy(), "uniform").pvalue > 1e-3
    first = u[:, 0].numpy()
    # Signs are independent of sizes and of each other.
    assert stats.spearmanr(u[:, 0].abs().numpy(), u[:, 1].sign().numpy()).pvalue > 1e-3
    assert stats.spearmanr(u[:, 0].numpy(), u[:, 1].numpy()).pvalue > 1e-3
    # A coordinate's marginal has density proportional to (1 - |x|^p)^((d - 1) / p).
    if p != math.inf:
        grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)
        density = (1 - grid.abs() ** p).clamp_min(0) ** ((d - 1) / p)
        cumulative = (density.cumsum(0) / density.sum()).numpy()

        def law(x: Any) -> Any:
            cell = ((torch.as_tensor(x) / radius + 1) * 2000).round().long()
            return torch.from_numpy(cumulative)[cell].numpy()

        assert stats.kstest(first, law).pvalue > 1e-3
    else:
        assert stats.kstest(first / radius / 2 + 0.5, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_sphere_samples_have_the_uniform_marginal(p: float) -> None:
    n, d = 4000, 3
    g = torch.Generator().manual_seed(11)
    (u,) = Ball(p, 1.0, "row").sample([torch.empty(n, d, dtype=torch.float64)], g, surface=True)
    first = u[:, 0]
    if p == 2:  # Archimedes: a coordinate of the 2-sphere is uniform on [-1, 1].
        assert stats.kstest((first / 2 + 0.5).numpy(), "uniform").pvalue > 1e-3
    elif p == math.inf:  # on the cube's faces, a sixth of the mass at +1 and at -1 each
        assert float((first == 1).double().mean()) == pytest.approx(1 / 6, abs=0.02)
        inner = first[first.abs() < 1]
        assert stats.kstest((inner / 2 + 0.5).numpy(), "uniform").pvalue > 1e-3
    else:  # |x| on the simplex is Beta(1, d - 1)
        assert stats.kstest(first.abs().numpy(), stats.beta(1, d - 1).cdf).pvalue > 1e-3
        assert float((first > 0).double().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("group", ["tensor", "global"])
def test_samples_of_tensors_and_of_all_use_their_own_dimension(group: str) -> None:
    g = torch.Generator().manual_seed(5)
    like = [torch.empty(2, 1, dtype=torch.float64), torch.empty(3, dtype=torch.float64)]
    dims = [2, 3] if group == "tensor" else [5]
    draws: list[list[float]] = [[] for _ in dims]
    for _ in range(1500):
        u = Ball(2, 1.0, group).sample(like, g)
        for i, v in enumerate(grouped(u, group)):
            draws[i].append(float(v.norm()) ** dims[i])
    for values in draws:
        assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_sampling_follows_its_generator() -> None:
    for p, group in itertools.product(NORMS, GROUPS):
        like = [torch.empty(3, 4), torch.empty(2)]
        one, two, other = (
            Ball(p, 1.0, group).sample(like, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_dimensional_tensors_are_one_row() -> None:
    v = torch.tensor([3.0, 4.0])
    assert Ball(2, 1.0, "row").size([v])[0].item() == 5.0
    assert Ball(2, 1.0, "row").size([v[:, None]])[0].flatten().tolist() == [3.0, 4.0]
    assert Ball(2, 1.0, "row").size([torch.tensor(-2.0)])[0].item() == 2.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.5, 1.0, "row"), "norm"),
        ((math.nan, 1.0, "row"), "norm"),
        ((2, -1.0, "row"), "radius"),
        ((2, math.nan, "row"), "radius"),
        ((2, math.inf, "row"), "radius"),
        ((2, 1.0, "layer"), "group"),
    ],
)
def test_impossible_balls_are_refused(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Ball(*arguments)  # type: ignore[arg-type]


def test_norm_names_and_unknown_projections() -> None:
    assert [parse_norm(n) for n in ("linf", "L2", "l1", 3, 1.5)] == [math.inf, 2, 1, 3, 1.5]
    with pytest.raises(ValueError, match="'l7'"):
        parse_norm("l7")
    with pytest.raises(ValueError, match=r"1\.5"):
        Ball(1.5, 1.0).project([torch.ones(2, 2)])
