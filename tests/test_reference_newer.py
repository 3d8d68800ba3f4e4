"""The references of the newer methods are right: closed forms, identities, and what they reduce to.

Where a loss is quadratic, a gradient elsewhere is g + H v, so a whole trajectory can be written
down with matrices alone. That is done here in numpy, apart from autograd and from the references.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import newer, newer_choosing
from reference import weights as older
from reference.nets import conv_bn, group_layer, images
from torch import Tensor, nn

Array = np.ndarray
Direction = Callable[[Array], Array]

N, ROWS = 12, 8
LR, MOMENTUM, DECAY = 0.05, 0.9, 0.1


class Bowls(nn.Module):
    """A matrix and a bias, and a normalisation layer's two vectors: 6 + 2 + 2 + 2 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        g = torch.Generator().manual_seed(3)
        for p in self.parameters():
            nn.init.uniform_(p, 0.3, 1.5, generator=g)
            p.data.mul_(torch.randn(p.shape, generator=g).sign())
        self.double()


RANDOM = np.random.default_rng(0)
ROOTS = RANDOM.normal(size=(ROWS, N, N)) / 3
CURVATURE = np.einsum("rij,rkj->rik", ROOTS, ROOTS)
BOTTOM = RANDOM.normal(size=(ROWS, N)) / 2
H = CURVATURE.mean(0)
MATRIX, NORM = np.arange(N) < 6, np.arange(N) >= 8
WEIGHT = MATRIX | (NORM & (np.arange(N) < 10))
NAMES = {
    "layer.weight": range(6),
    "layer.bias": range(6, 8),
    "norm.weight": range(8, 10),
    "norm.bias": range(10, 12),
}


def loss(model: nn.Module, rows: bool = False) -> Tensor:
    w = torch.cat([p.flatten() for p in model.parameters()])
    away = w - torch.from_numpy(BOTTOM)
    each = 0.5 * torch.einsum("ri,rij,rj->r", away, torch.from_numpy(CURVATURE), away)
    return each if rows else each.mean()


def value(w: Array) -> Array:
    return 0.5 * np.einsum("ri,rij,rj->r", w - BOTTOM, CURVATURE, w - BOTTOM)


def slopes(w: Array) -> Array:
    return np.einsum("rij,rj->ri", CURVATURE, w - BOTTOM)


def grad(w: Array) -> Array:
    return slopes(w).mean(0)


def norm(a: Array) -> float:
    return float(np.sqrt((a**2).sum()))


def flat(model: nn.Module) -> Array:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def follow(reference: Any, direction: Direction, extra: Any = None, steps: int = 6) -> None:
    """Whole steps of the reference beside SGD by hand along ``direction(w)``."""
    model = Bowls()
    optimizer = sgd(model)
    w, buffer = flat(model), np.zeros(N)
    for k in range(steps):
        buffer = MOMENTUM * buffer + direction(w) + DECAY * w
        w = w - LR * buffer
        reference.step(model, optimizer, loss, *([] if extra is None else [extra(k)]))
        np.testing.assert_allclose(flat(model), w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("parameters", "part"), [("all", np.ones(N)), ("norm", NORM), ("no_norm", ~NORM)]
)
def test_sam(parameters: str, part: Array) -> None:
    def direction(w: Array) -> Array:
        g = part * grad(w)
        return grad(w) + H @ (0.3 * g / norm(g))

    follow(newer.Sam(0.3, parameters), direction)


@pytest.mark.parametrize(
    ("parameters", "part"), [("all", np.ones(N)), ("norm", NORM), ("no_norm", ~NORM)]
)
@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_asam(parameters: str, part: Array, eta: float) -> None:
    def direction(w: Array) -> Array:
        scale = np.where(WEIGHT, np.abs(w) + eta, 1.0)
        g = part * grad(w)
        return grad(w) + H @ (0.3 * scale**2 * g / norm(scale * g))

    follow(newer.Asam(0.3, eta, parameters), direction)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_gnp(alpha: float) -> None:
    # The penalised gradient: g + lambda H g / ||g|| with lambda = alpha rho, exact for a quadratic.
    follow(newer.Gnp(0.3, alpha), lambda w: grad(w) + alpha * 0.3 * H @ grad(w) / norm(grad(w)))


def test_fsam() -> None:
    seen: list[Array] = []

    def direction(w: Array) -> Array:
        g = grad(w)
        # m after gradients g_0 .. g_{t-1}: lmbda^(t-1) g_0 + (1 - lmbda) sum_j lmbda^(t-1-j) g_j.
        t = len(seen)
        share = [0.6 ** (t - 1)] + [0.4 * 0.6 ** (t - 1 - j) for j in range(1, t)]
        d = g - 0.8 * sum(c * old for c, old in zip(share, seen, strict=True)) if seen else g
        seen.append(g)
        return g + H @ (0.3 * d / norm(d))

    follow(newer.Fsam(0.3, 0.8, 0.6), direction)


@pytest.mark.parametrize("floor", [0.0, 1e-7, 1e-2])
def test_vasso(floor: float) -> None:
    seen: list[Array] = []

    def direction(w: Array) -> Array:
        seen.append(grad(w))
        t = len(seen) - 1
        share = [0.6**t] + [0.4 * 0.6 ** (t - j) for j in range(1, t + 1)]
        m = sum(c * g for c, g in zip(share, seen, strict=True))
        return grad(w) + H @ (0.3 * m / (norm(m) + floor))

    follow(newer.Vasso(0.3, 0.4, floor), direction)


def test_momentum_sam() -> None:
    seen: list[Array] = []

    def direction(w: Array) -> Array:
        b = sum(0.7 ** (len(seen) - 1 - j) * g for j, g in enumerate(seen))
        g = grad(w) - (H @ (0.3 * b / norm(b)) if seen else 0)
        seen.append(g)
        return g

    follow(newer.MomentumSam(0.3, 0.7), direction)


def test_momentum_sam_is_the_released_recursion_where_nothing_decays() -> None:
    # Released: the perturbed weights are what is kept; b is the optimizer's own buffer.
    model = Bowls()
    reference = newer.MomentumSam(0.3, MOMENTUM)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    kept, b, inverse = flat(model), np.zeros(N), 0.0
    for _ in range(6):
        g = grad(kept)
        kept = kept + 0.3 * inverse * b
        b = MOMENTUM * b + g
        kept = kept - LR * b
        inverse = 1 / norm(b)
        centre = kept
        kept = kept - 0.3 * inverse * b
        reference.step(model, optimizer, loss)
        np.testing.assert_allclose(flat(model), centre, rtol=1e-10)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_looksam(every: int) -> None:
    taken, u = 0, np.zeros(N)

    def direction(w: Array) -> Array:
        nonlocal taken, u
        g = grad(w)
        if taken % every == 0:
            rise = H @ (0.3 * g / norm(g))
            across = rise - (rise @ g) / (g @ g) * g  # g itself has no part across g
            u, d = across / norm(across), g + rise
        else:
            d = g + 0.7 * norm(g) * u
        taken += 1
        return d

    follow(newer.LookSam(0.3, 0.7, every), direction, steps=7)


def test_mixed_random_perturbation() -> None:
    rng = np.random.default_rng(1)
    draws = [rng.normal(size=N) for _ in range(6)]
    k = 0

    def direction(w: Array) -> Array:
        nonlocal k
        size = np.r_[[norm(w[:3])] * 3, [norm(w[3:6])] * 3, [norm(w[6:8])] * 2]
        size = np.r_[size, [norm(w[8:10])] * 2, [norm(w[10:])] * 2]
        k += 1
        return grad(w) + 0.4 * H @ (0.5 * size * draws[k - 1])

    def extra(k: int) -> dict[str, Tensor]:
        shapes = {n: p.shape for n, p in Bowls().named_parameters()}
        return {
            n: torch.from_numpy(draws[k][list(at)]).reshape(shapes[n]) for n, at in NAMES.items()
        }

    follow(newer.RwpMix(0.5, 0.4), direction, extra)


def test_gam() -> None:
    rho, norm_rho, beta0, beta1, gamma = 0.2, 0.4, 0.3, 0.6, 0.25

    def direction(w: Array) -> Array:
        g = grad(w)
        step = H @ g / norm(g)  # g1 - g = rho H n(g)
        g1, e1 = g + rho * step, norm_rho * step / norm(step)
        g2 = g + H @ e1
        g3 = g + H @ (e1 + rho * g2 / norm(g2))
        ahead = beta1 * g1 + (1 - beta1) * g3
        behind = g + (1 - beta0) * g2
        return ahead - gamma * (np.eye(N) - np.outer(ahead, ahead) / (ahead @ ahead)) @ behind

    follow(newer.Gam(rho, norm_rho, beta0, beta1, gamma), direction)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.7, 0.95])
def test_zsharp(quantile: float) -> None:
    def direction(w: Array) -> Array:
        g = grad(w)
        v = 0.3 * g / norm(g)
        m = g[:6]
        z = np.abs(m - m.mean()) / np.std(m, ddof=1)
        few = m * (z > np.quantile(z, quantile))
        v[:6] = 0.3 * few / norm(few)
        return g + H @ v

    follow(newer_choosing.ZSharp(0.3, quantile), direction)


@pytest.mark.parametrize("gamma", [0.5, 0.75, 0.98, 0.99, 1.0])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_esam(gamma: float, beta: float) -> None:
    kept = [None, {"layer.weight", "norm.bias"}, {"norm.weight"}, set(NAMES), set(), {"layer.bias"}]
    k = 0

    def direction(w: Array) -> Array:
        nonlocal k
        here = kept[k]
        part = grad(w)
        for n, at in NAMES.items():
            if here is not None and n not in here:
                part[list(at)] = 0
        k += 1
        v = 0.3 / beta * part / (norm(part) + 1e-7)
        rise = value(w + v) - value(w)
        # The ranks of the released rule: all from .99, else those above the int(8 gamma)-th.
        everyone = gamma >= 0.99 or not part.any()
        take = np.argsort(-rise)[: ROWS if everyone else int(ROWS * gamma) - 1]
        return slopes(w + v)[take].mean(0)

    reference = newer_choosing.Esam(0.3, beta, gamma)
    follow(reference, direction, lambda k: kept[k])


def test_esam_descends_on_all_examples_where_none_rises_most() -> None:
    # k = 0, k = 1, and no tensor that climbs: nothing is strictly above the k-th largest rise.
    everything = Bowls()
    newer_choosing.Esam(0.3, 1.0, 1.0).step(everything, sgd(everything), loss)
    for gamma in (0.1, 0.2):
        few = Bowls()
        newer_choosing.Esam(0.3, 1.0, gamma).step(few, sgd(few), loss)
        np.testing.assert_array_equal(flat(few), flat(everything))
    still, plain = Bowls(), Bowls()
    newer_choosing.Esam(0.3, 0.5, 0.5).step(still, sgd(still), loss, set())
    Plain().step(plain, sgd(plain), loss)
    np.testing.assert_allclose(flat(still), flat(plain), rtol=1e-12)


@pytest.mark.parametrize("threshold", [2.0, 99.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_robust_weight_perturbation(threshold: float, steps: int) -> None:
    chosen: list[int] = []

    def climb(w: Array) -> Array:
        d, v = np.zeros(N), np.zeros(N)
        for _ in range(steps):
            small = value(w + v) < threshold
            chosen.append(int(small.sum()))
            d = d + 0.01 * MATRIX * (slopes(w + v) * small[:, None]).sum(0) / ROWS
            v = 0.2 * norm(MATRIX * w) * d / norm(d) if d.any() else d
        return v

    reference = newer_choosing.Rwp(0.2, threshold, steps, 0.01)
    follow(reference, lambda w: grad(w) + H @ climb(w), steps=4)
    if threshold == 2.0:
        assert min(chosen) < ROWS
    # inner_lr cancels: d is only ever used for where it points.
    chosen.clear()
    other = newer_choosing.Rwp(0.2, threshold, steps, 7.0)
    follow(other, lambda w: grad(w) + H @ climb(w), steps=4)


def test_robust_weight_perturbation_in_its_released_order() -> None:
    # The optimizer at w + v decays w + v: the weights differ by lr * decay * v in the first step.
    default, released = Bowls(), Bowls()
    v = newer_choosing.Rwp(0.2, 9.0, 3).perturbation(default, loss)
    newer_choosing.Rwp(0.2, 9.0, 3).step(default, sgd(default), loss)
    newer_choosing.Rwp(0.2, 9.0, 3, released_order=True).step(released, sgd(released), loss)
    for (n, a), b in zip(default.named_parameters(), released.parameters(), strict=True):
        expected = LR * DECAY * v[n] if n in v else torch.zeros_like(a)
        torch.testing.assert_close((a - b).detach(), expected, rtol=1e-9, atol=1e-14)
    assert list(v) == ["layer.weight"]


@pytest.mark.parametrize("rho_max", [None, 0.0, 0.1, 9.0])
def test_lesam(rho_max: float | None) -> None:
    sigmas = [newer.lesam_sigma(k, 0.4, 6, 2, 3) for k in range(6)]
    k = 0

    def direction(w: Array) -> Array:
        nonlocal k
        g = grad(w)
        radius = sigmas[k] / norm(g)
        k += 1
        return g + H @ ((min(radius, rho_max) if rho_max else radius) * g / norm(g))

    follow(newer.Lesam(rho_max, floor=0.0), direction, lambda k: sigmas[k])
    k = 0
    follow(newer.Lesam(rho_max), direction, lambda k: sigmas[k])  # 1e-12 under the root


def test_lesam_budget_is_the_linear_rise_of_the_loss() -> None:
    model = Bowls()
    w, g = flat(model), grad(flat(model))
    newer.Lesam(floor=0.0).step(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, 0.25)
    # The step went down g + H v; so v is known, and <g, v> is the budget.
    v = np.linalg.solve(H, w - flat(model) - g)
    assert v @ g == pytest.approx(0.25, rel=1e-9)


def test_lesam_schedule() -> None:
    sigma = [newer.lesam_sigma(e, 0.35, 200) for e in range(200)]
    assert sigma[0] == 0
    assert sigma[5] == pytest.approx(0.35 * 5 / 9)
    assert sigma[9:160] == [0.35] * 151
    assert sigma[160] == 0.35
    assert sigma[199] == pytest.approx(0, abs=1e-15)
    for e in range(160, 200):  # half a cosine, symmetric about its middle
        assert sigma[e] + sigma[359 - e] == pytest.approx(0.35)
    assert sigma[173] == pytest.approx(0.35 * 0.75)
    assert newer.lesam_sigma(199, 0.35, 200, sigma_min=0.1) == pytest.approx(0.1)
    assert newer.lesam_sigma(0, 0.35, 9, warmup=0, decay_start=0) == 0.35
    assert newer.lesam_sigma(0, 0.35, 9, warmup=1) == 0.35
    assert newer.lesam_sigma(8, 0.35, 9, warmup=0, decay_start=8) == 0
    # A decay within the warm-up waits for its end.
    assert newer.lesam_sigma(4, 0.35, 10, warmup=5, decay_start=2) == 0.35
    assert newer.lesam_sigma(5, 0.35, 10, warmup=5, decay_start=2) == 0.35
    assert newer.lesam_sigma(6, 0.35, 10, warmup=5, decay_start=2) < 0.35


def batch_loss(seed: int) -> newer.Loss:
    x, y = images(8, seed=seed)

    def loss(m: nn.Module, rows: bool = False) -> Tensor:
        return F.cross_entropy(m(x), y, reduction="none" if rows else "mean")

    return loss


def path(reference: Any, net: Callable[[], nn.Module] = conv_bn, *extra: Any) -> nn.Module:
    """The net after four steps."""
    model = net()
    optimizer = sgd(model)
    for k in range(4):
        reference.step(model, optimizer, batch_loss(k), *extra)
    return model


class Plain(newer.Method):
    def step(self, model: nn.Module, optimizer: newer.Optimizer, loss: newer.Loss) -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


class OldSam(newer.Method):
    """The reference that SAM is held against elsewhere."""

    def step(self, model: nn.Module, optimizer: newer.Optimizer, loss: newer.Loss) -> None:
        older.step_at(model, optimizer, loss, older.sam(model, loss, 0.2), "both")


class OldAsam(newer.Method):
    def step(self, model: nn.Module, optimizer: newer.Optimizer, loss: newer.Loss) -> None:
        older.step_at(model, optimizer, loss, older.asam(model, loss, 0.5, 0.01), "both")


class MatrixAwp(newer.Method):
    """One step up the ball of gamma ||w||, over all matrices together."""

    def step(self, model: nn.Module, optimizer: newer.Optimizer, loss: newer.Loss) -> None:
        g = older._grads(copy.deepcopy(model), loss)
        w = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}
        size = 0.05 * older._global(w) / older._global({n: g[n] for n in w})
        older.step_at(model, optimizer, loss, {n: size * g[n] for n in w}, "perturbed")


REDUCTIONS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "sam": (newer.Sam(0.2), OldSam(), ()),
    "asam": (newer.Asam(0.5, 0.01), OldAsam(), ()),
    "gnp, alpha 1": (newer.Gnp(0.2, 1.0), OldSam(), ()),
    "gnp, alpha 0": (newer.Gnp(0.2, 0.0), Plain(), ()),
    "fsam, sigma 0": (newer.Fsam(0.2, 0.0), OldSam(), ()),
    "vasso, theta 1": (newer.Vasso(0.2, 1.0, 0.0), OldSam(), ()),
    "momentum_sam, rho 0": (newer.MomentumSam(0.0), Plain(), ()),
    "looksam, every 1": (newer.LookSam(0.2, 0.7, 1), OldSam(), ()),
    "looksam, rho 0": (newer.LookSam(0.0, 0.0, 2), Plain(), ()),
    "rwp_mix, gamma 0": (
        newer.RwpMix(0.0, 0.5),
        Plain(),
        ({n: torch.ones_like(p) for n, p in conv_bn().named_parameters()},),
    ),
    "rwp, threshold high": (newer_choosing.Rwp(0.05, 99.0, 1), MatrixAwp(), ()),
    "rwp, threshold low": (newer_choosing.Rwp(0.05, 0.0, 3), Plain(), ()),
    "rwp, gamma 0": (newer_choosing.Rwp(0.0, 1.0, 3), Plain(), ()),
    "gam, gamma 0, beta1 1": (newer.Gam(0.2, 0.1, 0.5, 1.0, 0.0), OldSam(), ()),
    "esam, beta 1, gamma 1": (newer_choosing.Esam(0.2, 1.0, 1.0, 0.0), OldSam(), ()),
    "esam, rho 0": (newer_choosing.Esam(0.0, 1.0, 1.0), Plain(), ()),
    "lesam, capped": (newer.Lesam(0.2, 0.0), OldSam(), (1e9,)),
    "lesam, sigma 0": (newer.Lesam(0.2), Plain(), (0.0,)),
}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=n)


@pytest.mark.parametrize("case", REDUCTIONS)
def test_reduces(case: str) -> None:
    reference, other, extra = REDUCTIONS[case]
    assert_same(path(copy.deepcopy(reference), conv_bn, *extra), path(other))


def test_the_two_selections_part_the_parameters() -> None:
    for net, expected in (
        (conv_bn, {"1.weight", "1.bias"}),
        (group_layer, {"1.weight", "1.bias", "4.0.weight", "4.0.bias"}),
        (Bowls, {"norm.weight", "norm.bias"}),
    ):
        model = net()
        assert newer.chosen(model, "norm") == expected
        everything = {n for n, _ in model.named_parameters()}
        assert newer.chosen(model, "no_norm") == everything - expected
        assert newer.chosen(model, "all") == everything


def test_zsharp_makes_each_matrix_as_long_as_rho() -> None:
    model, reference = conv_bn(), newer_choosing.ZSharp(0.3, 0.8)
    g = newer.gradient(model, batch_loss(0), {}, False)
    v = reference.perturbation(g)
    for n, t in v.items():
        if t.dim() > 1:
            assert float(t.norm()) == pytest.approx(0.3)
            share = float((t != 0).double().mean())
            assert share == pytest.approx(0.2, abs=0.05), n
        else:
            torch.testing.assert_close(t, 0.3 * g[n] / newer.length(g))
    # No z-score is strictly above the largest: the matrix goes the way of the vectors.
    v = newer_choosing.ZSharp(0.3, 1.0).perturbation(g)
    assert float(newer.length(v)) == pytest.approx(0.3)
    # One element has no spread, two have equal z-scores: nothing is kept of either.
    for t in (torch.tensor([[2.0]]), torch.tensor([[3.0, -1.0]])):
        torch.testing.assert_close(
            newer_choosing.ZSharp(0.3, 0.0).perturbation({"a": t})["a"], 0.3 * t / t.norm()
        )


def test_gam_corrects_across_its_own_direction() -> None:
    model = group_layer()
    reference = newer.Gam(0.2, 0.1, 0.5, 0.6, 0.3)
    g0, g1, g2, g3 = reference.gradients(model, batch_loss(0))
    ahead = newer.plus(newer.times(0.6, g1), newer.times(0.4, g3))
    reference.step(model, torch.optim.SGD(model.parameters(), lr=0.0), batch_loss(0))
    taken = {n: p.grad for n, p in model.named_parameters()}
    across = newer.plus(taken, newer.times(-1.0, ahead))
    assert abs(float(newer.inner(across, ahead))) < 1e-12
    assert float(newer.length(across)) > 1e-2
    behind = newer.plus(g0, newer.times(0.5, g2))
    assert float(newer.inner(across, behind)) == pytest.approx(
        -0.3 * (float(newer.length(behind)) ** 2)
        + 0.3 * float(newer.inner(behind, newer.unit(ahead))) ** 2
    )


# How often a step moves BatchNorm's running statistics, and whether from the centre first.
MOVES: dict[str, tuple[Any, tuple[Any, ...], int, bool]] = {
    "sam": (newer.Sam(0.5), (), 2, True),
    "asam": (newer.Asam(0.5, 0.1), (), 2, True),
    "gnp": (newer.Gnp(0.5, 0.5), (), 1, True),
    "fsam": (newer.Fsam(0.5), (), 1, True),
    "vasso": (newer.Vasso(0.5, 0.9), (), 2, True),
    "momentum_sam": (newer.MomentumSam(0.5), (), 1, False),
    "looksam": (newer.LookSam(0.5, 0.5, 2), (), 1, True),
    "rwp_mix": (
        newer.RwpMix(0.5, 0.5),
        ({n: torch.ones_like(p) for n, p in conv_bn().named_parameters()},),
        1,
        True,
    ),
    "rwp": (newer_choosing.Rwp(0.5, 9.0, 3), (), 1, False),
    "gam": (newer.Gam(0.5, 0.5, 0.5, 0.5, 0.5), (), 1, True),
    "zsharp": (newer_choosing.ZSharp(0.5), (), 2, True),
    "esam": (newer_choosing.Esam(0.5, 1.0, 0.5), (), 2, True),
    "lesam": (newer.Lesam(), (0.5,), 2, True),
}


@pytest.mark.parametrize("case", MOVES)
def test_running_statistics_move_as_in_the_released_code(case: str) -> None:
    reference, extra, moves, from_centre = MOVES[case]
    reference = copy.deepcopy(reference)
    model = conv_bn()
    optimizer = sgd(model)
    if case == "momentum_sam":  # Its first step has nothing to climb along.
        reference.step(model, optimizer, batch_loss(5))
    batch = batch_loss(0)
    at_centre = copy.deepcopy(model)
    batch(at_centre)
    before = int(model[1].num_batches_tracked)
    reference.step(model, optimizer, batch, *extra)
    assert int(model[1].num_batches_tracked) - before == moves
    same = torch.equal(model[1].running_mean, at_centre[1].running_mean)
    assert same == (from_centre and moves == 1)


def test_looksam_moves_the_statistics_in_its_cheap_steps_too() -> None:
    model, reference = conv_bn(), newer.LookSam(0.5, 0.5, 3)
    optimizer = sgd(model)
    for k in range(4):
        at_centre = copy.deepcopy(model)
        batch_loss(k)(at_centre)
        reference.step(model, optimizer, batch_loss(k))
        assert int(model[1].num_batches_tracked) == k + 1
        assert torch.equal(model[1].running_mean, at_centre[1].running_mean)


@pytest.mark.parametrize("statistics", ["centre", "perturbed", "both"])
@pytest.mark.parametrize("case", sorted(set(MOVES) - {"momentum_sam", "looksam", "rwp", "gam"}))
def test_statistics_can_be_asked_for(case: str, statistics: str) -> None:
    reference, extra, _, _ = MOVES[case]
    reference = copy.deepcopy(reference)
    reference.statistics = statistics
    model = conv_bn()
    batch = batch_loss(0)
    at_centre = copy.deepcopy(model)
    batch(at_centre)
    reference.step(model, sgd(model), batch, *extra)
    assert int(model[1].num_batches_tracked) == (2 if statistics == "both" else 1)
    same = torch.equal(model[1].running_mean, at_centre[1].running_mean)
    assert same == (statistics == "centre")


def test_what_is_random_has_the_size_that_it_says() -> None:
    # ||noise_f|| is about gamma ||w_f|| sqrt(d), d the elements of the filter.
    model = conv_bn()
    g = torch.Generator().manual_seed(0)
    draws = {
        n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in model.named_parameters()
    }
    there = copy.deepcopy(model)
    seen: list[dict[str, Tensor]] = []

    def spy(m: nn.Module, rows: bool = False) -> Tensor:
        seen.append({n: p.detach().clone() for n, p in m.named_parameters()})
        return batch_loss(0)(m)

    newer.RwpMix(0.1, 0.5).step(there, sgd(there), spy, draws)
    w, moved = model[4].weight.detach(), seen[1]["4.weight"]
    for row, after in zip(w, moved, strict=True):
        assert float((after - row).norm()) == pytest.approx(
            0.1 * float(row.norm()) * math.sqrt(row.numel()), rel=0.3
        )
