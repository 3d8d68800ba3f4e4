"""Weight perturbations: closed forms on quadratics, what is moved, and every combination."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images, mlp
from scipy.optimize import brentq
from torch import Tensor, nn

import robustflat as rf
from robustflat import Ascent, Ball, WeightPerturbation
from robustflat.perturb import SCALES, select


class Quadratic(nn.Module):
    """L(w) = 1/2 w'Hw, with H positive definite."""

    def __init__(self, at_zero: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        a = torch.randn(6, 6, generator=g, dtype=torch.float64)
        self.h = a @ a.T / 6 + 0.1 * torch.eye(6, dtype=torch.float64)
        w = torch.randn(6, generator=g, dtype=torch.float64)
        self.w = nn.Parameter(w * 0 if at_zero else w)

    def forward(self) -> Tensor:
        return 0.5 * self.w @ self.h @ self.w


def gradient(model: nn.Module) -> Tensor:
    """The gradient, which is taken away, so that the next one is not added to it."""
    (p,) = model.parameters()
    assert p.grad is not None
    found, p.grad = p.grad, None
    return found


def close(a: Tensor, b: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-15)


def test_sam_gradient_of_a_quadratic() -> None:
    model = Quadratic()
    h, w, rho = model.h, model.w.detach().clone(), 0.3
    v = rho * h @ w / (h @ w).norm()
    value = rf.sam(rho).backward(model, model)
    close(gradient(model), h @ (w + v))
    close(value, 0.5 * (w + v) @ h @ (w + v))
    rf.sam(rho, "linf").backward(model, model)
    close(gradient(model), h @ (w + rho * (h @ w).sign()))
    rf.sam(rho, "l1").backward(model, model)
    g = h @ w
    largest = torch.where(g.abs() == g.abs().max(), g.sign(), 0.0)
    close(gradient(model), h @ (w + rho * largest))
    # p = 1.5 has q = 3: v = rho sign(g) g^2 / ||g^2||_1.5
    rf.sam(rho, 1.5).backward(model, model)
    v = rho * g.sign() * g**2 / torch.linalg.vector_norm(g**2, 1.5)
    close(gradient(model), h @ (w + v))
    rf.sam(rho, 3.0).backward(model, model)
    v = rho * g.sign() * g.abs() ** 0.5 / torch.linalg.vector_norm(g.abs() ** 0.5, 3)
    close(gradient(model), h @ (w + v))


def test_several_steps_on_a_quadratic() -> None:
    model = Quadratic()
    h, w, rho = model.h, model.w.detach().clone(), 0.3
    u = torch.zeros_like(w)
    for _ in range(3):
        g = h @ (w + u)
        u = u + rho / 3 * g / g.norm()
    rf.sam(rho, steps=3).backward(model, model)
    close(gradient(model), h @ (w + u))


def test_gsam_amp_asam_and_awp_of_a_quadratic() -> None:
    model = Quadratic()
    h, w, rho, alpha = model.h, model.w.detach().clone(), 0.3, 0.4
    g = h @ w
    gp = h @ (w + rho * g / g.norm())
    perpendicular = g - (g @ gp) / (gp @ gp) * gp
    rf.gsam(rho, alpha).backward(model, model)
    found = gradient(model)
    close(found, gp - alpha * perpendicular)
    assert abs(float((found - gp) @ gp)) < 1e-12
    rf.amp(0.05, inner_lr=0.01, steps=1).backward(model, model)
    close(
        gradient(model), h @ (w + 0.01 * g if 0.01 * g.norm() < 0.05 else w + 0.05 * g / g.norm())
    )
    rf.amp(0.05, inner_lr=10.0).backward(model, model)
    close(gradient(model), h @ (w + 0.05 * g / g.norm()))
    rf.awp(0.1, parameters="all").backward(model, model)
    close(gradient(model), h @ (w + 0.1 * w.norm() * g / g.norm()))
    magnitude = WeightPerturbation(
        name="custom", ball=Ball(2, 0.2, "global"), ascent=Ascent(1), scale=SCALES["magnitude"]
    )
    magnitude.backward(model, model)
    close(gradient(model), h @ (w + 0.2 * w**2 * g / (w * g).norm()))


def worst_quadratic(h: Tensor, w: Tensor, rho: float) -> float:
    """max of 1/2 (w+v)'H(w+v) over ||v|| <= rho: (lam I - H) v = Hw with ||v|| = rho."""
    values, vectors = np.linalg.eigh(h.numpy())
    b = vectors.T @ (h @ w).numpy()
    top = values[-1]

    def excess(lam: float) -> float:
        return float(np.sum((b / (lam - values)) ** 2)) - rho**2

    lam = brentq(excess, top + 1e-9, top + np.linalg.norm(b) / rho + 1, xtol=1e-14)
    v = torch.from_numpy(vectors @ (b / (lam - values)))
    assert float(v.norm()) == pytest.approx(rho, rel=1e-6)
    return float(0.5 * (w + v) @ h @ (w + v))


@pytest.mark.parametrize("at_zero", [False, True])
def test_worst_case_flatness_reaches_the_closed_form(at_zero: bool) -> None:
    model = Quadratic(at_zero)
    rho = 0.4
    worst = WeightPerturbation(
        name="worst",
        ball=Ball(2, rho, "global"),
        ascent=Ascent(300, 0.2, "uniform", keep="best"),
    )
    value = worst.backward(model, model, generator=torch.Generator().manual_seed(0))
    if at_zero:
        expected = 0.5 * rho**2 * float(torch.linalg.eigvalsh(model.h)[-1])
    else:
        expected = worst_quadratic(model.h, model.w.detach(), rho)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(value) <= expected * (1 + 1e-9)


def test_best_is_never_below_what_its_path_visited() -> None:
    model = Quadratic()
    seen: list[float] = []

    def loss() -> Tensor:
        value = -model()  # concave: long steps overshoot
        seen.append(float(value.detach()))
        return value

    bounce = WeightPerturbation(
        name="bounce", ball=Ball(2, 3.0, "global"), ascent=Ascent(9, 1.5, keep="best")
    )
    value = bounce.backward(loss, model)
    assert len(seen) == 11
    # 9 steps, the end, and the descent at the best of these 10 points.
    assert float(value) == max(seen)
    assert seen[-2] < max(seen)


def test_awp_moves_each_matrix_by_gamma_relative_to_its_norm() -> None:
    model = conv_bn()
    x, y = images()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for weights, gamma in ((rf.awp(0.02), 0.02), (rf.random_weights(0.02), 0.02)):
        with weights.perturbed(lambda: F.cross_entropy(model(x), y), model):
            for n, p in model.named_parameters():
                size = gamma * float(before[n].norm()) if p.ndim > 1 else 0.0
                assert float((p.detach() - before[n]).norm()) == pytest.approx(size, rel=1e-9)
    with rf.random_weights(0.02, "row").perturbed(lambda: model(x).sum(), model):
        for n, p in model.named_parameters():
            if p.ndim > 1:
                for a, b in zip(p.detach(), before[n], strict=True):
                    assert float((a - b).norm() / b.norm()) == pytest.approx(0.02, rel=1e-9)
    with rf.awp_global(0.02).perturbed(lambda: F.cross_entropy(model(x), y), model):
        delta = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
        whole = torch.cat([t.flatten() for t in before.values()])
        assert float(delta.norm() / whole.norm()) == pytest.approx(0.02, rel=1e-9)
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("all", {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}),
        ("matrices", {"0.weight", "4.weight"}),
        (r"re:^4\.", {"4.weight", "4.bias"}),
        ("re:bias$", {"0.bias", "1.bias", "4.bias"}),
    ],
)
def test_selection(which: str, names: set[str]) -> None:
    model = conv_bn()
    assert set(select(model, which)) == names
    x, y = images()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with rf.sam(0.3, parameters=which).perturbed(lambda: F.cross_entropy(model(x), y), model):
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= names
    assert moved
    # The descent gradient is that of all parameters.
    rf.sam(0.3, parameters=which).backward(lambda: F.cross_entropy(model(x), y), model)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_gsam_of_a_selection_leaves_the_other_gradients() -> None:
    x, y = images()
    one, two = conv_bn(), conv_bn()
    rf.gsam(0.3, 0.9, parameters="matrices").backward(lambda: F.cross_entropy(one(x), y), one)
    rf.sam(0.3, parameters="matrices").backward(lambda: F.cross_entropy(two(x), y), two)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) == (p.ndim == 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rf.awp(-1.0), "radius"),
        (lambda: rf.sam(float("nan")), "radius"),
        (lambda: rf.sam(0.1, "l0"), "norm"),
        (lambda: rf.awp(0.1, steps=0), "awp needs steps"),
        (lambda: rf.sam(0.1, steps=0), "sam needs steps"),
        (lambda: rf.amp(0.1, steps=0), "amp needs steps"),
        (lambda: rf.amp(0.1, inner_lr=-1), "step_size"),
        (lambda: rf.asam(0.1, eta=-1), "eta"),
        (lambda: rf.gsam(0.1, alpha=-1), "alpha"),
        (lambda: rf.sam(0.1, parameters="weights"), "re:weights"),
        (lambda: rf.sam(0.1, parameters="re:("), "regular expression"),
        (lambda: rf.sam(0.1, statistics="never"), "statistics"),  # type: ignore[arg-type]
        (lambda: rf.random_weights(0.1, statistics="centre"), "random"),
        (
            # No closed form projects onto this ball: found out at once, not at the first step.
            lambda: WeightPerturbation(
                name="custom", ball=Ball(1.5, 0.1, "global"), ascent=Ascent(2, 1.0)
            ),
            "1.5",
        ),
        (lambda: rf.nsam(rf.sam(0.1), 0), "batches"),
        (lambda: rf.msam(rf.sam(0.1), 0), "chunk"),
        (lambda: rf.msam(rf.nsam(rf.sam(0.1), 2), 3), "batches"),
    ],
)
def test_combinations_that_cannot_work_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_selection_that_fits_nothing_is_refused_at_the_step() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="re:conv"):
        rf.sam(0.1, parameters="re:conv").backward(lambda: model(images()[0]).sum(), model)


@pytest.mark.parametrize("rows", [4, 5, 6])
def test_msam_averages_the_gradients_of_its_chunks(rows: int) -> None:
    model = mlp(dtype=torch.float64)
    x, y = images(rows)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    total = 0.0
    for start in range(0, rows, 2):
        n = min(2, rows - start)
        part = x[start : start + n], y[start : start + n]
        model.zero_grad()
        total += (
            float(rf.sam(0.5).backward(lambda p=part: F.cross_entropy(model(p[0]), p[1]), model))
            * n
        )
        for e, p in zip(expected, model.parameters(), strict=True):
            e.add_(p.grad * n / rows)  # type: ignore[operator]
    msam = rf.msam(rf.sam(0.5), 2)
    model.zero_grad()
    value = msam.backward(lambda r: F.cross_entropy(model(x[r]), y[r]), model)
    assert float(value) == pytest.approx(total / rows, rel=1e-12)
    for e, p in zip(expected, model.parameters(), strict=True):
        close(p.grad, e)  # type: ignore[arg-type]
    again = msam.backward(lambda r: F.cross_entropy(model(x[r, ...]), y[r]), model, rows=rows)
    assert torch.equal(value, again)


def test_msam_says_what_it_cannot_do() -> None:
    model = mlp()
    x, y = images(4, dtype=torch.float32)
    with pytest.raises(ValueError, match="larger than the batch"):
        rf.msam(rf.sam(0.1), 5).backward(lambda r: F.cross_entropy(model(x[r]), y[r]), model)
    with pytest.raises(ValueError, match="rows=N"):
        rf.msam(rf.sam(0.1), 2).backward(lambda r: F.cross_entropy(model(x), y), model)


class Sum(nn.Module):
    """Two parameters whose gradients are one and the same tensor, and one of constant gradient."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 16, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(3, 16, generator=g, dtype=torch.float64))
        self.c = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.a + self.b) + 0.0 * self.c.sum()


@pytest.mark.parametrize("make", [lambda: mlp(dtype=torch.float64), Sum])
def test_nsam_climbs_the_mean_and_descends_the_first_batch(make: Any) -> None:
    model = make()
    data = [images(4, seed=s) for s in range(3)]
    loss = lambda i: F.cross_entropy(model(data[i][0]), data[i][1])  # noqa: E731
    parameters = list(model.parameters())
    mean = torch.autograd.grad(sum(loss(i) for i in range(3)) / 3, parameters)
    size = torch.sqrt(sum((g**2).sum() for g in mean))
    saved = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, mean, strict=True):
        p.data.add_(0.3 * g / size)
    expected_value = loss(0)
    expected = torch.autograd.grad(expected_value, parameters)
    for p, s in zip(parameters, saved, strict=True):
        p.data.copy_(s)
    value = rf.nsam(rf.sam(0.3), 3).backward(loss, model)
    close(value, expected_value.detach())
    for p, e in zip(parameters, expected, strict=True):
        close(p.grad, e, 1e-10)


def test_constant_gradients_that_share_memory_can_be_accumulated() -> None:
    # The gradient of p.sum() is one number expanded.
    model = nn.Linear(3, 1, bias=False).double()
    loss = lambda i: model.weight.sum() * (i + 1.0)  # noqa: E731
    rf.nsam(rf.sam(0.3), 2).backward(loss, model)
    close(model.weight.grad, torch.ones(1, 3, dtype=torch.float64))


def methods() -> dict[str, Any]:
    custom = WeightPerturbation(
        name="custom",
        ball=Ball(math.inf, 0.02, "row"),
        ascent=Ascent(2, 0.7, "uniform", keep="best"),
        scale=SCALES["row_norm"],
        parameters="re:weight",
    )
    return {
        "none": rf.no_perturbation(),
        "awp": rf.awp(0.05),
        "awp3": rf.awp(0.05, steps=3),
        "awp_global": rf.awp_global(0.05),
        "amp": rf.amp(0.05),
        "amp_global": rf.amp(0.05, 0.5, 2, "global"),
        "sam": rf.sam(0.05),
        "sam_linf": rf.sam(0.01, "linf"),
        "sam_p": rf.sam(0.05, 1.5),
        "asam": rf.asam(0.5),
        "gsam": rf.gsam(0.05, 0.4),
        "random": rf.random_weights(0.05),
        "random_row": rf.random_weights(0.05, "row"),
        "nsam": rf.nsam(rf.gsam(0.05, 0.4), 2),
        "msam": rf.msam(rf.awp(0.05), 2),
        "custom": custom,
    }


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "objective",
    [rf.standard(), rf.adversarial(), rf.trades(), rf.mart()],
    ids=lambda o: type(o).__name__,
)
@pytest.mark.parametrize("method", methods())
def test_every_method_with_every_objective_and_attack(
    method: str, objective: Any, norm: str
) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    weights = methods()[method]
    attack = rf.pgd(norm, 0.2, 2, start="normal", loss=objective.attack_options["loss"])
    x_adv = attack(model, x, y)
    whole = lambda: objective(model, x, x_adv, y)  # noqa: E731
    loss: Any = whole
    if method == "msam":
        loss = lambda r: objective(model, x[r], x_adv[r], y[r])  # noqa: E731
    elif method == "nsam":
        loss = lambda i: objective(model, *((x, x_adv, y) if i == 0 else (x_adv, x, y)))  # noqa: E731
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    plain = torch.autograd.grad(whole(), parameters)
    value = weights.backward(loss, model)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert value.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    # Off means the plain gradient; on means another one.
    changed = any((p.grad - g).abs().max() > 1e-5 for p, g in zip(parameters, plain, strict=True))
    assert changed == (method != "none")
    torch.optim.SGD(parameters, lr=0.1).step()
    assert not any(torch.equal(p, b) for p, b in zip(parameters[-2:], before[-2:], strict=True))


def test_the_older_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs a process group."""

        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.ones(3, 2))

    model = FullyShardedDataParallel()
    with pytest.raises(ValueError, match="fully_shard"):
        rf.awp(0.1).backward(lambda: model.flat.sum(), model)
