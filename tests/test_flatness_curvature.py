from __future__ import annotations

import builtins
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flatness_models import Binary, conv_net, examples, flat_gradient, full_hessian, mlp
from scipy.sparse.linalg import eigsh

import robustflat as rf
from robustflat.config import RunConfig
from robustflat.flatness import flatness
from robustflat.flatness.spectrum import Krylov, extreme, quadrature
from robustflat.study import row

torch.set_num_threads(1)
# The larger net has more weights than are measured by forming the matrix.
NETS = {"dense": ((6, 4, 3), 4 * 7 + 3 * 5), "lanczos": ((6, 10, 4), 10 * 7 + 4 * 11)}


@pytest.fixture(params=list(NETS))
def case(request):
    sizes, count = NETS[request.param]
    model, (x, y) = mlp(sizes), examples(23, (6,), sizes[-1])
    h = full_hessian(model, x, y)
    assert len(h) == count
    return model, (x, y), h.numpy()


def test_extreme_eigenvalues_are_those_of_the_full_hessian(case):
    model, data, h = case
    exact = np.linalg.eigvalsh(h)
    figures = flatness(
        model, data, ["hessian_max", "hessian_min"], k=3, tolerance=1e-8, batch_size=7
    )
    top, bottom = figures["hessian_max"], figures["hessian_min"]
    assert top.details["eigenvalues"] == pytest.approx(exact[::-1][:3], rel=1e-7)
    assert bottom.details["eigenvalues"] == pytest.approx(exact[:3], rel=1e-6, abs=1e-8)
    assert top.value == top.details["eigenvalues"][0]
    assert exact[0] < 0
    assert max(top.details["residuals"]) < 1e-6


def test_residuals_bound_the_error_of_each_eigenvalue():
    model, data = mlp(NETS["lanczos"][0]), examples(23, (6,), 4)
    exact = np.linalg.eigvalsh(full_hessian(model, *data).numpy())
    figure = flatness(model, data, ["hessian_max"], k=2, tolerance=1e-2)["hessian_max"]
    found = zip(figure.details["eigenvalues"], figure.details["residuals"], strict=True)
    for value, residual in found:
        assert np.abs(exact - value).min() <= residual + 1e-12


def test_trace_layers_and_frobenius_norm(case):
    model, data, h = case
    figures = flatness(model, data, ["hessian_trace", "hessian_frobenius"], probes=60, batch_size=7)
    trace, frobenius = figures["hessian_trace"], figures["hessian_frobenius"]
    exact = {
        "all": float(np.trace(h)),
        "frobenius": float(np.linalg.norm(h)),
    }
    if trace.standard_error is None:  # formed as a matrix
        assert trace.value == pytest.approx(exact["all"], rel=1e-9)
        assert frobenius.value == pytest.approx(exact["frobenius"], rel=1e-9)
        tolerance = dict.fromkeys(trace.details["layers"], 1e-09)
    else:
        assert abs(trace.value - exact["all"]) < 4 * trace.standard_error
        assert abs(frobenius.value - exact["frobenius"]) < 4 * frobenius.standard_error
        # Hutchinson's variance with Rademacher probes: 2 (||H||_F^2 - ||diag H||^2) each.
        off = h - np.diag(np.diag(h))
        assert trace.standard_error == pytest.approx(
            math.sqrt(2 / 60) * np.linalg.norm(off), rel=0.4
        )
        tolerance = {k: 4 * v["standard_error"] for k, v in trace.details["layers"].items()}
    start = 0
    for name, parameter in model.named_parameters():
        block = float(np.diag(h)[start : start + parameter.numel()].sum())
        start += parameter.numel()
        assert abs(trace.details["layers"][name]["value"] - block) < tolerance[name]


def test_stated_standard_error_of_the_trace_is_the_spread_over_seeds():
    model, data = mlp(NETS["lanczos"][0]), examples(10, (6,), 4)
    exact = float(full_hessian(model, *data).trace())
    figures = [
        flatness(model, data, ["hessian_trace"], probes=6, seed=s)["hessian_trace"]
        for s in range(40)
    ]
    errors = np.array([f.value - exact for f in figures])
    stated = np.sqrt(np.mean([f.standard_error**2 for f in figures]))
    assert 0.65 < np.sqrt((errors**2).mean()) / stated < 1.5
    assert abs(errors.mean()) < 4 * stated / math.sqrt(40)


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace"])
def test_other_trace_estimators(estimator):
    model, data = mlp(NETS["lanczos"][0]), examples(23, (6,), 4)
    exact = float(full_hessian(model, *data).trace())
    figure = flatness(model, data, ["hessian_trace"], estimator=estimator, probes=60)[
        "hessian_trace"
    ]
    assert abs(figure.value - exact) < 6 * figure.standard_error
    assert figure.standard_error < 0.5
    assert figure.details["passes"]["hvp"] == pytest.approx(180)


def test_hutchpp_is_exact_for_a_hessian_of_low_rank():
    # Labels as the model gives them leave the Gauss-Newton term, of rank at most 2 * 3.
    model, (x, _) = mlp(NETS["lanczos"][0]), examples(2, (6,), 4)
    y = model(x).softmax(1).detach()
    exact = float(full_hessian(model, x, y).trace())
    figure = flatness(model, (x, y), ["hessian_trace"], estimator="hutchpp", probes=30)[
        "hessian_trace"
    ]
    assert figure.value == pytest.approx(exact, rel=1e-9)
    assert figure.standard_error < 1e-9


def test_spectral_density(case):
    model, data, h = case
    exact = np.linalg.eigvalsh(h)
    figure = flatness(model, data, ["hessian_density"], lanczos_steps=30, lanczos_runs=6)[
        "hessian_density"
    ]
    grid, density = np.array(figure.details["grid"]), np.array(figure.details["density"])
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.03)
    error = (figure.standard_error or 0) * 4 + 1e-9
    assert abs(figure.value - exact.mean()) < error
    assert abs(figure.details["negative_mass"] - (exact < 0).mean()) < 0.2
    assert grid[0] < exact[0] < exact[-1] < grid[-1]


def test_robust_curvature_is_the_hessian_at_the_adversarial_examples():
    model, (x, y) = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    attack = rf.pgd(eps=0.05, steps=3, start="zero")
    h = full_hessian(model, attack(model, x, y), y)
    figures = flatness(
        model, (x, y), ["hessian_max_robust", "hessian_min_robust"], attack=attack, tolerance=1e-9
    )
    exact = torch.linalg.eigvalsh(h)
    assert figures["hessian_max_robust"].value == pytest.approx(float(exact[-1]), rel=1e-7)
    assert figures["hessian_min_robust"].value == pytest.approx(float(exact[0]), rel=1e-5)


def test_convolutions_batchnorm_and_float32():
    model, (x, y) = conv_net(), examples(11, (1, 4, 4), 3)
    double = conv_net().double()
    exact = torch.linalg.eigvalsh(full_hessian(double, x, y))
    figure = flatness(model, (x.float(), y), ["hessian_max"], batch_size=4)["hessian_max"]
    assert figure.value == pytest.approx(float(exact[-1]), rel=1e-4)


def test_selection_of_parameters_is_a_block_of_the_hessian():
    model, (x, y) = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    h = full_hessian(model, x, y)[:60, :60]
    figure = flatness(model, (x, y), ["hessian_max"], parameters=r"re:^1\.weight$")["hessian_max"]
    assert figure.value == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-6)


def test_gradient_norm_and_alignment():
    model, (x, y) = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    gradient = flat_gradient(model, x, y)
    axis = torch.linalg.eigh(full_hessian(model, x, y)).eigenvectors[:, -1]
    figures = flatness(model, (x, y), ["gradient_norm", "alignment"], tolerance=1e-10, batch_size=2)
    assert figures["gradient_norm"].value == pytest.approx(float(gradient.norm()), rel=1e-9)
    details = figures["alignment"].details
    cosine = abs(float(gradient @ axis / gradient.norm()))
    assert figures["alignment"].value == pytest.approx(cosine, rel=1e-6)
    # AWP's perturbation: each matrix's share of the gradient, as long as the matrix; no biases.
    step, start = torch.zeros_like(gradient), 0
    for p in model.parameters():
        rows = slice(start, start + p.numel())
        start += p.numel()
        if p.ndim > 1:
            step[rows] = gradient[rows] / gradient[rows].norm() * p.detach().norm()
    assert details["awp"] == pytest.approx(abs(float(step @ axis / step.norm())), rel=1e-6)
    # A random direction's mean |cos|, by simulation.
    draw = torch.randn(20000, 114, generator=torch.Generator().manual_seed(0))
    simulated = float((draw[:, 0].abs() / draw.norm(dim=1)).mean())
    assert details["chance"] == pytest.approx(simulated, rel=0.03)


def test_fisher_trace_against_its_definition():
    model, (x, y) = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    exact = 0.0
    for image in x:
        log_p = model(image[None]).log_softmax(1)[0]
        for c in range(4):
            grads = torch.autograd.grad(log_p[c], list(model.parameters()), retain_graph=True)
            exact += (
                float(log_p[c].detach().exp())
                * sum(float(g.square().sum()) for g in grads)
                / len(x)
            )
    figure = flatness(model, (x, y), ["fisher_trace"], probes=150, batch_size=4)["fisher_trace"]
    assert abs(figure.value - exact) < 4 * figure.standard_error
    assert figure.standard_error < 0.1 * exact


def test_fisher_trace_equals_the_hessian_trace_where_labels_are_the_models_own():
    # There the Hessian of a linear softmax model is its Fisher information.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3)).double().eval()
    x = examples(8, (5,), 3)[0]
    y = model(x).softmax(1).detach()
    figures = flatness(model, (x, y), ["fisher_trace", "hessian_trace"], probes=300)
    fisher = figures["fisher_trace"]
    assert abs(fisher.value - figures["hessian_trace"].value) < 4 * fisher.standard_error


def test_pac_bayes_terms():
    model, (x, y) = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    figure = flatness(model, (x, y), ["pac_bayes"], rho=0.1, train_size=5000, confidence=0.9)[
        "pac_bayes"
    ]
    k, n = 114, 5000
    squared = sum(float(p.detach().square().sum()) for p in model.parameters())
    inside = k * math.log(1 + squared / 0.01 * (1 + math.sqrt(math.log(n) / k)) ** 2)
    inside += 4 * math.log(n / 0.1) + 8 * math.log(6 * n + 3 * k)
    assert figure.value == pytest.approx(math.sqrt(inside / (n - 1)), rel=1e-6)
    worst = flatness(model, (x, y), ["worst_clean"], ball="global", radius=0.1, parameters="all")
    assert figure.details["sharpness"] == pytest.approx(worst["worst_clean"].value, rel=1e-3)
    assert figure.details["bound"] == pytest.approx(
        figure.value + figure.details["worst_loss"], rel=1e-12
    )


def test_the_bound_is_of_all_images_and_not_of_those_measured(monkeypatch):
    model, data = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    few = flatness(model, data, ["pac_bayes"], examples=4)["pac_bayes"]
    assert (few.details["examples"], few.details["train_size"]) == (4, 9)
    said = flatness(model, data, ["pac_bayes"], examples=4, train_size=9)["pac_bayes"]
    assert few.value == said.value
    # A row of a study measures some of the images that its run was trained on.
    asked = {}
    monkeypatch.setattr(row, "flatness", lambda *given, **options: asked.update(options) or {})
    subject = SimpleNamespace(
        images=lambda: SimpleNamespace(train=range(321)), home=SimpleNamespace(root=Path())
    )
    config = RunConfig.model_validate({"name": "run", "flatness": {"options": {"radius": 0.2}}})
    job = {"threat": {"eps": 0.1, "norm": "linf"}}
    row._flatness(subject, SimpleNamespace(model=model, epoch=1), job, config, [], data, {})
    assert (asked["train_size"], asked["radius"]) == (321, 0.2)


def test_input_side_of_a_linear_model():
    w = np.array([0.7, -0.4, 0.2])
    x = torch.tensor([[0.5, 0.6, 0.3], [0.1, 0.9, 0.4]], dtype=torch.float64)
    y, eps = torch.tensor([0, 0]), 0.1
    z = x.numpy() @ w
    slope = 1 / (1 + np.exp(z))
    figures = flatness(
        Binary(list(w)), (x, y), ["input_gradient_norm", "local_linearity"], eps=eps, batch_size=1
    )
    norm = figures["input_gradient_norm"]
    assert norm.value == pytest.approx((slope * np.abs(w).sum()).mean(), rel=1e-9)
    assert norm.details["l2"] == pytest.approx((slope * np.linalg.norm(w)).mean(), rel=1e-9)
    # Along w . x the loss is convex, so the misfit is largest at one of the two extreme corners.
    reach = eps * np.abs(w).sum()
    corners = [
        np.log1p(np.exp(-(z + s * reach))) - np.log1p(np.exp(-z)) + slope * s * reach
        for s in (-1, 1)
    ]
    exact = np.maximum(*corners).mean()
    assert 0.97 * exact <= figures["local_linearity"].value <= exact * (1 + 1e-9)


def test_without_curvlinops_only_what_needs_it_fails(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "curvlinops":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    model, data = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    flatness(model, data, ["hessian_max", "hessian_trace", "hessian_density"], probes=2)
    begun: list[object] = []
    with pytest.raises(rf.UserError, match=r"pip install 'robustflat\[curvature\]'"):
        flatness(
            model, data, ["hessian_max", "hessian_trace"], estimator="xtrace",
            on_progress=begun.append,
        )  # fmt: skip
    assert not begun  # it is missed before anything is measured


def test_an_eigenvalue_that_did_not_converge_is_marked_and_costs_no_other_measure():
    model, data = mlp((6, 60, 10)), examples(9, (6,), 10)
    figures = flatness(
        model, data, ["hessian_max", "hessian_min", "gradient_norm"], k=2, max_hvps=4
    )
    exact = np.linalg.eigvalsh(full_hessian(model, *data).numpy())
    for name in ("hessian_max", "hessian_min"):
        details = figures[name].details
        assert details["converged"] is False
        assert details["products"] == 4
        assert details["passes"]["hvp"] == pytest.approx(4)
        near = zip(details["eigenvalues"], details["residuals"], strict=True)
        for value, residual in near:
            assert np.abs(exact - value).min() <= residual + 1e-12
            assert residual > 1e-4 * abs(exact).max() or value == details["eigenvalues"][0]
    assert figures["gradient_norm"].value > 0
    done = flatness(model, data, ["hessian_max"], max_hvps=200)["hessian_max"]
    assert done.details["converged"] is True
    assert figures["hessian_max"].value <= done.value


class Matrix:
    """A symmetric matrix in the place of a Hessian, that counts its products."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.size, self.dtype = matrix, len(matrix), matrix.dtype
        self.parameters, self.products = [matrix[0]], 0

    def flat_times(self, flat: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self.matrix @ flat


def symmetric(eigenvalues: np.ndarray, dtype: torch.dtype = torch.float64) -> Matrix:
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=g).double()).Q
    return Matrix(((q * torch.from_numpy(eigenvalues)) @ q.T).to(dtype))


SPECTRA = {
    "outliers": np.concatenate([np.linspace(-1, 1, 295), [3.0, 5, 9, 9.5, 20]]),
    "negative": -np.concatenate([np.linspace(0.1, 1, 298), [3.0, 8]]),
    "crowded": np.linspace(-1, 1, 300),
    "low rank": np.concatenate([np.zeros(295), [1.0, 2, 3, 4, -5]]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("k", [1, 4])
def test_lanczos_agrees_with_the_whole_matrix_and_with_arpack(spectrum, end, k):
    matrix = symmetric(SPECTRA[spectrum])
    pairs = extreme(matrix, k, end=end, tolerance=1e-9, max_hvps=5000, generator=torch.Generator())
    exact = np.sort(SPECTRA[spectrum])[:: 1 if end == "bottom" else -1][:k]
    if spectrum != "low rank" or k == 1:  # zero comes 295 times, and is met once from one start
        assert pairs.converged
        assert pairs.values == pytest.approx(exact, abs=1e-7)
        which = {"top": "LA", "bottom": "SA"}[end]
        arpack = eigsh(matrix.matrix.numpy(), k=k, which=which, return_eigenvectors=False)
        assert np.sort(pairs.values) == pytest.approx(np.sort(arpack), abs=1e-7)
    assert pairs.products == matrix.products
    vectors = pairs.vectors.numpy()
    assert vectors @ vectors.T == pytest.approx(np.eye(len(vectors)), abs=1e-9)
    true = np.linalg.norm(vectors @ matrix.matrix.numpy() - pairs.values[:, None] * vectors, axis=1)
    assert pairs.residuals == pytest.approx(true, abs=1e-8)


def test_the_basis_stays_orthonormal_in_float32_over_many_restarts():
    matrix = symmetric(SPECTRA["crowded"], torch.float32)
    krylov = Krylov(matrix, torch.randn(300, generator=torch.Generator()), 12)
    for _ in range(30):
        while krylov.count < 12:
            krylov.grow()
        values, columns = krylov.eigen()
        krylov.shrink(values[-6:], columns[:, -6:])
    basis = krylov._vectors[: krylov.count + 1]
    assert (basis @ basis.T).numpy() == pytest.approx(np.eye(krylov.count + 1), abs=1e-5)


def test_a_near_start_saves_products_and_an_old_eigenvector_is_left():
    matrix = symmetric(SPECTRA["outliers"])
    ask = {"tolerance": 1e-6, "max_hvps": 500}
    cold = extreme(matrix, 1, generator=torch.Generator(), **ask)
    moved = Matrix(matrix.matrix + 1e-3 * symmetric(SPECTRA["crowded"]).matrix)
    warm = extreme(moved, 1, near=cold.vectors[0], generator=torch.Generator(), **ask)
    again = extreme(moved, 1, generator=torch.Generator(), **ask)
    assert warm.values == pytest.approx(again.values, rel=1e-9)
    assert warm.products < again.products
    exact, vectors = torch.linalg.eigh(matrix.matrix)
    other = extreme(matrix, 1, near=vectors[:, 3], generator=torch.Generator(), **ask)
    assert other.values[0] == pytest.approx(float(exact[-1]), rel=1e-9)


def test_quadrature_is_exact_for_polynomials_below_twice_its_steps():
    matrix = symmetric(SPECTRA["outliers"])
    start = torch.randn(300, dtype=torch.float64, generator=torch.Generator())
    nodes, weights = quadrature(matrix, start, 5)
    assert len(nodes) == matrix.products == 5
    unit, power = start / start.norm(), start / start.norm()
    for degree in range(10):
        exact = float(unit @ power)
        assert float(weights @ nodes**degree) == pytest.approx(exact, rel=1e-9)
        power = matrix.matrix @ power
    few, _ = quadrature(symmetric(SPECTRA["low rank"]), start, 40)
    assert len(few) <= 7  # six different eigenvalues


def test_a_graph_of_the_gradient_serves_ten_probes():
    model, data = mlp(NETS["lanczos"][0]), examples(9, (6,), 4)
    passes = flatness(model, data, ["hessian_trace"], probes=25)["hessian_trace"].details["passes"]
    assert (passes["gradient"], passes["hvp"]) == pytest.approx((3, 25))
    assert passes["units"] == pytest.approx(3 * 3 + 25 * 6)


def test_the_squared_norm_of_the_bound_is_summed_in_double_precision():
    model, data = mlp(), examples(5, (6,), 4)
    exact = sum(float(p.detach().square().sum()) for p in model.parameters())
    found = flatness(model, data, ["pac_bayes"], steps=1)["pac_bayes"]
    assert found.details["squared_norm"] == pytest.approx(exact, rel=1e-13)
