"""Measures of complexity against closed forms, small nets by brute force, and invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flatness_models import Binary, examples, full_hessian, mlp
from torch import Tensor, nn
from torch.func import functional_call

import robustflat as rf
from robustflat.errors import UserError
from robustflat.flatness import Figure, cost, flatness
from robustflat.models.normalized import Normalize

torch.set_num_threads(1)


def measured(model: nn.Module, data: tuple[Tensor, Tensor], name: str, **options: Any) -> Figure:
    options = {"eps": 0.1, "batch_size": 3, **options}
    return flatness(model, data, [name], **options)[name]


class Given(nn.Module):
    """A model whose logits are its image; one idle weight, for a landscape needs some."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + 0 * self.weight


# Weights alone


def test_norms_products_and_sums_by_hand() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[3.0, 0], [0, 4]]))
        net[3].weight.copy_(torch.tensor([[0.0, 2], [1, 0]]))
        net[1].bias.copy_(torch.tensor([1.0, 2]))
        net[3].bias.copy_(torch.tensor([-3.0, 0]))
    data = (torch.rand(4, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))
    names = [
        "parameter_norm", "spectral_product", "spectral_sum", "frobenius_product", "frobenius_sum",
        "path_norm",
    ]  # fmt: skip
    found = {n: f.value for n, f in flatness(net, data, names).items()}
    # Spectral 4 and 2; Frobenius^2 25 and 5; two layers.
    assert found == {
        "parameter_norm": pytest.approx(math.sqrt(25 + 5 + 5 + 9)),
        "spectral_product": pytest.approx(math.log(16 * 4)),
        "spectral_sum": pytest.approx(2 * math.sqrt(16 * 4)),
        "frobenius_product": pytest.approx(math.log(25 * 5)),
        "frobenius_sum": pytest.approx(2 * math.sqrt(25 * 5)),
        # Of ones: hidden (9 + 1, 16 + 4); outputs 4 * 20 + 9 and 1 * 10 + 0.
        "path_norm": pytest.approx(math.sqrt(89 + 10)),
    }
    layers = measured(net, data, "spectral_product").details["layers"]
    assert layers == {"1.weight": pytest.approx(4), "3.weight": pytest.approx(2)}


def test_distances_from_the_start_by_hand() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        net[1].weight += torch.tensor([[3.0, 0], [0, 4]])
        net[3].weight += torch.tensor([[0.0, 2], [1, 0]])
        net[3].bias += 7  # a bias is no layer
    data = (torch.rand(4, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))
    options = {"initial": before}
    assert measured(net, data, "distance_spectral", **options).value == pytest.approx(math.sqrt(20))
    assert measured(net, data, "distance_frobenius", **options).value == pytest.approx(
        math.sqrt(30)
    )
    with pytest.raises(UserError, match="Pass them as initial="):
        measured(net, data, "distance_spectral")
    with pytest.raises(UserError, match=r"no tensor 1\.weight"):
        measured(net, data, "distance_spectral", initial={})


def test_the_path_norm_sees_batchnorm_as_the_linear_map_that_it_is() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -0.5])), norm.bias.copy_(torch.tensor([0.3, -0.7]))
        norm.running_mean.copy_(torch.tensor([0.4, -1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    head = [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 3)]
    net = nn.Sequential(Normalize([0.5], [0.2]), conv, norm, *head).double().eval()
    folded = nn.Conv2d(1, 2, 3, padding=1)
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        folded.weight.copy_(conv.weight * slope[:, None, None, None] / 0.2)
        folded.bias.copy_(norm.bias - norm.running_mean * slope)
    alone = nn.Sequential(folded, *head).double().eval()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    data = (x, torch.tensor([0, 1]))
    found, expected = (measured(n, data, "path_norm").value for n in (net, alone))
    # What the image's mean adds to the biases is no weight's path.
    assert found == pytest.approx(expected, rel=1e-3)
    strange = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)).double().eval()
    with pytest.raises(UserError, match="not defined for the layer LayerNorm"):
        measured(strange, data, "path_norm")


# Outputs


def test_margins_by_hand() -> None:
    logits = torch.tensor([[3.0, 1, 0], [0, 2, 5], [1, 1, 4], [2, 0, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])
    data = (logits, labels)
    clean = measured(Given(), data, "logit_margin", eps=0.0)
    assert clean.value == pytest.approx((2 - 3 + 3 - 2) / 4)
    assert clean.standard_error == pytest.approx(torch.tensor([2.0, -3, 3, -2]).std() / 2)
    assert clean.details["percentiles"]["50"] == pytest.approx(0)
    ten = measured(Given(), data, "logit_margin_p10", eps=0.0).value
    assert ten == pytest.approx(torch.tensor([2.0, -3, 3, -2]).quantile(0.1).item())
    p = logits.softmax(1)
    by_hand = [p[0, 0] - p[0, 1], p[1, 1] - p[1, 2], p[2, 2] - p[2, 0], p[3, 1] - p[3, 0]]
    assert measured(Given(), data, "probability_margin").value == pytest.approx(sum(by_hand) / 4)
    soft = (logits, F.one_hot(labels, 3).double())
    assert measured(Given(), soft, "logit_margin").value == clean.value


def test_robust_margins_of_a_linear_model() -> None:
    # Logits (w x, 0), label 0: the margin is w x, and the attack takes eps ||w||_1.
    model, x = Binary([2.0, -1.0]), torch.tensor([[0.5, 0.5], [0.6, 0.3]], dtype=torch.float64)
    data = (x, torch.zeros(2, dtype=torch.long))
    clean = measured(model, data, "logit_margin").value
    assert clean == pytest.approx((0.5 + 0.9) / 2)
    for name in ("logit_margin_robust", "logit_margin_p10_robust", "probability_margin_robust"):
        robust = measured(model, data, name).value
        margin = torch.tensor([0.5 - 0.3, 0.9 - 0.3], dtype=torch.float64)
        expected = {
            "logit_margin_robust": margin.mean(),
            "logit_margin_p10_robust": margin.quantile(0.1),
            "probability_margin_robust": (2 * margin.sigmoid() - 1).mean(),
        }[name]
        assert robust == pytest.approx(float(expected)), name


def test_the_divergence_is_of_the_attacked_from_the_clean_prediction() -> None:
    model, x = Binary([2.0, -1.0]), torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    found = measured(model, (x, torch.zeros(1, dtype=torch.long)), "kl_robust").value
    p, q = (torch.tensor(z, dtype=torch.float64).sigmoid() for z in (0.2, 0.5))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert found == pytest.approx(float(expected))
    other_way = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert found != pytest.approx(float(other_way), rel=1e-3)


def test_boundary_thickness_counts_the_open_part_of_the_segment() -> None:
    class Shifted(Binary):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.5)

    # At 0.7 the logit is 4, at x_adv = 0.3 it is -4; 0 < tanh(z/2) < 0.75 for 0 < z < 1.946.
    model = Shifted([20.0])
    data = (torch.tensor([[0.7], [0.99]], dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    found = measured(model, data, "boundary_thickness", eps=0.4)
    assert found.details["changed"] == 0.5, "0.99 stays on its side"
    assert found.value == pytest.approx(0.4 * (2 * math.atanh(0.75)) / 8, abs=0.4 / 32)
    none = measured(model, data, "boundary_thickness", eps=0.01)
    assert math.isnan(none.value)
    assert none.details["changed"] == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_local_lipschitz_constant_of_a_linear_model(norm: str) -> None:
    # |w d| / ||d|| is at most the dual norm of w, at every size of d.
    model = Binary([2.0, -1.0])
    data = (torch.rand(5, 2, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    found = measured(model, data, "local_lipschitz", norm=norm).value
    assert found == pytest.approx(3.0 if norm == "linf" else math.sqrt(5), rel=0.02)
    with pytest.raises(UserError, match="whose eps is 0"):
        measured(model, data, "local_lipschitz", eps=0.0)


# Weights and loss


def test_pac_bayes_noise_of_a_linear_model() -> None:
    # Errors of (w + s z) x < 0 at w = 1, x = 1: Phi(-1 / s) of the directions.
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1) * self.weight
            return torch.cat([z, 0 * z], 1)

    data = (torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.long))
    found = measured(Line(), data, "pac_bayes_sigma", samples=150)
    sigma = found.details["sigma"]
    assert found.value == pytest.approx(sigma**-2)
    assert found.details["error"] == 0
    # Phi(-1 / sigma) = 0.1 at sigma = 1 / 1.2816.
    assert sigma == pytest.approx(0.780, rel=0.15)
    with torch.no_grad():
        doubled = Line()
        doubled.weight.fill_(2)
    plain, relative = (
        measured(doubled, data, name, samples=150).details["sigma"]
        for name in ("pac_bayes_sigma", "pac_bayes_magnitude")
    )
    assert plain == pytest.approx(2 * sigma, rel=0.01), "the same directions at any scale"
    own = measured(Line(), data, "pac_bayes_magnitude", samples=150).details["sigma"]
    assert relative == pytest.approx(own, rel=1e-3), "magnitude-aware: the scale does not matter"


def test_fisher_rao_norm_by_brute_force_and_by_homogeneity() -> None:
    model, (x, y) = mlp(), examples(5, (6,), 4)
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in named.values()])
    by_data, by_model = [], []
    for i in range(5):
        z = functional_call(model, named, (x[i : i + 1],))
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(
                -z.log_softmax(1)[0, k], list(named.values()), retain_graph=True)])
            for k in range(4)
        ]  # fmt: skip
        along = [float(row @ flat) ** 2 for row in rows]
        by_data.append(along[int(y[i])])
        by_model.append(float((z.softmax(1)[0] * torch.tensor(along)).sum().detach()))
    found = measured(model, (x, y), "fisher_rao")
    assert found.value == pytest.approx(math.sqrt(sum(by_data) / 5))
    assert found.details["model"] == pytest.approx(math.sqrt(sum(by_model) / 5))
    # Without biases a ReLU net of L layers has J w = L f.
    net = mlp((6, 8, 8, 4), relu=True)
    with torch.no_grad():
        [layer.bias.zero_() for layer in net if isinstance(layer, nn.Linear)]
        z = net(x)
        slope = ((z.softmax(1) - F.one_hot(y, 4)) * 3 * z).sum(1)
    found = measured(net, (x, y), "fisher_rao", parameters="matrices")
    assert found.value == pytest.approx(float(slope.square().mean().sqrt()))
    attack = rf.pgd("linf", 0.1, 5, start="zero")
    moved = attack(net, x, y)
    for name, more in (("fisher_rao", {"parameters": "matrices"}), ("relative_flatness", {})):
        robust = measured(net, (x, y), f"{name}_robust", attack=attack, **more).value
        assert robust == pytest.approx(measured(net, (moved, y), name, **more).value)
        assert robust != pytest.approx(measured(net, (x, y), name, **more).value)


def test_relative_flatness_is_that_of_the_full_hessian_and_of_no_scale() -> None:
    model, (x, y) = mlp((6, 5, 3), relu=True), examples(7, (6,), 3)
    hessian = full_hessian(model, x, y)
    sizes = [p.numel() for p in model.parameters()]
    start = sum(sizes[:2])
    block = hessian[start : start + 15, start : start + 15].view(3, 5, 3, 5)
    weight = model[3].weight.detach()
    traces = torch.einsum("sitj,ij->st", block, torch.eye(5, dtype=torch.float64))
    expected = float(((weight @ weight.T) * traces).sum())
    found = measured(model, (x, y), "relative_flatness").value
    assert found == pytest.approx(expected)
    with torch.no_grad():
        model[1].weight *= 3
        model[1].bias *= 3
        model[3].weight /= 3
    assert measured(model, (x, y), "relative_flatness").value == pytest.approx(found)
    with pytest.raises(UserError, match="the model has none"):
        measured(Given(), (x[:, :3], y), "relative_flatness")


def test_the_weight_curvature_index_is_that_of_the_full_hessian() -> None:
    model, (x, y) = mlp((3, 4, 3)), examples(7, (3,), 3)
    diagonal = torch.split(
        full_hessian(model, x, y).diag(), [p.numel() for p in model.parameters()]
    )
    expected = sum(
        math.sqrt(float(p.detach().square().sum() * d.sum()))
        for p, d in zip(model.parameters(), diagonal, strict=True)
        if p.ndim > 1
    )
    found = measured(model, (x, y), "weight_curvature")
    assert found.value == pytest.approx(expected)
    assert list(found.details["layers"]) == ["1.weight", "3.weight"]
    # Beside the trace it costs nothing.
    both = cost(["weight_curvature", "hessian_trace"], 7).total
    assert both == cost(["hessian_trace"], 7).total


def test_the_noise_of_pac_bayes_adds_to_the_error_that_is_there() -> None:
    model, data = mlp(), examples(20, (6,), 4)
    figure = flatness(model, data, ["pac_bayes_sigma"], samples=2)["pac_bayes_sigma"]
    assert figure.details["error"] > 0.2
    assert figure.details["sigma"] > 1e-2
