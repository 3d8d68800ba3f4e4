from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flatness_models import Binary, examples, flat_gradient, full_hessian, mlp

import robustflat as rf
from robustflat.flatness import MEASURES, Options, cost, flatness
from robustflat.flatness.closure import Closure, attack_cost
from robustflat.flatness.curvature import hessian_probes
from robustflat.flatness.examples import read_examples
from robustflat.flatness.subject import Subject

torch.set_num_threads(1)
W, X = [0.7, -0.4, 0.2], [0.5, 0.6, 0.3]
ONE = (torch.tensor([X], dtype=torch.float64), torch.tensor([0]))
R = 0.05


def only(figures):
    (figure,) = figures.values()
    return figure


def softplus(z: float) -> float:
    return math.log1p(math.exp(z))


def rise(shift: float, at: list[float] = X) -> float:
    """The loss's rise where w . x falls by ``shift``."""
    z = float(np.dot(W, at))
    return softplus(shift - z) - softplus(-z)


def dual(vector: np.ndarray, norm: str) -> float:
    return float({"l2": np.linalg.norm(vector), "linf": np.abs(vector).sum()}[norm])


w, x0 = np.array(W), np.array(X)
SHIFTS = {
    ("global", "l2"): R * dual(x0, "l2"),
    ("global", "linf"): R * dual(x0, "linf"),
    ("tensor", "l2"): R * np.linalg.norm(w) * dual(x0, "l2"),
    ("global_relative", "l2"): R * np.linalg.norm(w) * dual(x0, "l2"),
    ("row", "l2"): R * np.linalg.norm(w) * dual(x0, "l2"),
    ("row", "linf"): R * np.linalg.norm(w) / math.sqrt(3) * dual(x0, "linf"),
    ("adaptive", "l2"): R * dual(np.abs(w) * x0, "l2"),
    ("adaptive", "linf"): R * dual(np.abs(w) * x0, "linf"),
}


@pytest.mark.parametrize(("ball", "norm"), SHIFTS)
def test_worst_and_ascent_direction_of_one_logistic_example_in_closed_form(ball, norm):
    # One example's loss is monotone in w . x, so both directions are the dual norm's maximiser.
    figures = flatness(
        Binary(W), ONE, ["worst_clean", "ascent_clean"], radius=R, ball=ball, weight_norm=norm
    )
    expected = rise(SHIFTS[ball, norm])
    assert figures["ascent_clean"].value == pytest.approx(expected, rel=1e-9)
    assert figures["worst_clean"].value == pytest.approx(expected, rel=1e-9)


def test_average_direction_by_quadrature():
    # In the plane, v . x = radius |x| cos(t) with t uniform.
    model = Binary([0.7, -0.4])
    data = (torch.tensor([[0.5, 0.6]], dtype=torch.float64), torch.tensor([0]))
    z, size = 0.7 * 0.5 - 0.4 * 0.6, math.hypot(0.5, 0.6)
    t = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    exact = np.log1p(np.exp(-z + size * np.cos(t))).mean() - softplus(-z)
    figure = flatness(model, data, ["average_clean"], radius=1.0, ball="global", samples=400)[
        "average_clean"
    ]
    assert figure.standard_error is not None
    assert abs(figure.value - exact) < 4 * figure.standard_error
    assert figure.standard_error < 0.1 * math.sqrt(0.5) * size


def test_stated_standard_error_of_the_average_is_the_spread_over_seeds():
    model, data = mlp(), examples(20, (6,), 4)
    runs = [
        flatness(model, data, ["average_clean"], seed=s, radius=0.5, samples=8)["average_clean"]
        for s in range(40)
    ]
    spread = np.std([run.value for run in runs], ddof=1)
    stated = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    assert 0.65 < spread / stated < 1.5


@pytest.mark.parametrize("distribution", ["sphere", "ball", "normal"])
def test_average_distributions_have_their_second_moment(distribution):
    # At a minimum the rise is v'Hv/2, whose mean is trace(H) E|v|^2 / 2D.
    model, (x, _) = mlp(), examples(30, (6,), 4)
    y = model(x).softmax(1).detach()
    h = full_hessian(model, x, y)
    d, r = len(h), 1e-2
    squared = {"sphere": r**2, "ball": r**2 * d / (d + 2), "normal": r**2 * d}[distribution]
    figure = flatness(
        model, (x, y), ["average_clean"], ball="global", radius=r, parameters="all",
        samples=200, distribution=distribution,
    )["average_clean"]  # fmt: skip
    exact = float(h.trace()) * squared / (2 * d)
    assert abs(figure.value - exact) < 4 * figure.standard_error + 0.01 * exact


def test_small_radius_theory_at_a_minimum_and_away_from_it():
    model, (x, y) = mlp(), examples(30, (6,), 4)
    soft = model(x).softmax(1).detach()
    top = float(torch.linalg.eigvalsh(full_hessian(model, x, soft))[-1])
    options = {"ball": "global", "radius": 1e-2, "parameters": "all", "steps": 40}
    worst = flatness(model, (x, soft), ["worst_clean"], **options)["worst_clean"]
    assert worst.value == pytest.approx(1e-4 / 2 * top, rel=0.02)
    # Elsewhere the gradient rules: radius * |g|.
    options["radius"] = 1e-6
    slope = float(flat_gradient(model, x, y).norm())
    for name in ("worst_clean", "ascent_clean"):
        value = flatness(model, (x, y), [name], **options)[name].value
        assert value == pytest.approx(1e-6 * slope, rel=1e-4)


def test_robust_loss_of_a_linear_model_in_closed_form():
    # PGD's optimum is x - eps sign(w); no weight changes sign within this ball.
    eps = 0.1
    attacked = x0 - eps * np.sign(w)
    expected = rise(0.01 * float(np.linalg.norm(attacked)), list(attacked))
    figures = flatness(
        Binary(W), ONE, ["worst_robust", "worst_robust_fixed", "ascent_robust"], eps=eps,
        radius=0.01, ball="global",
    )  # fmt: skip
    for figure in figures.values():
        assert figure.value == pytest.approx(expected, rel=1e-7)


def test_remade_examples_follow_a_weight_that_changes_sign():
    # In one dimension at w = 0.05 all is explicit: robust loss softplus(-w x + eps |w|).
    model, eps, r = Binary([0.05]), 0.3, 0.4
    data = (torch.tensor([[0.1 + eps]], dtype=torch.float64), torch.tensor([0]))

    def robust(weight: float) -> float:
        return softplus(-weight * (0.1 + eps) + eps * abs(weight))

    grid = np.linspace(0.05 - r, 0.05 + r, 4001)
    remade = max(map(robust, grid)) - robust(0.05)
    fixed = softplus(-(0.05 - r) * 0.1) - robust(0.05)
    figures = flatness(
        model, data, ["worst_robust", "worst_robust_fixed"], eps=eps, radius=r, ball="global"
    )
    assert figures["worst_robust_fixed"].value == pytest.approx(fixed, rel=1e-7)
    assert figures["worst_robust"].value == pytest.approx(remade, rel=1e-3)
    assert remade > 1.5 * fixed


def test_eps_zero_is_clean_and_radius_zero_is_zero():
    model, data = mlp(), examples(13, (6,), 4)
    for kind in ("worst", "ascent", "average"):
        names = [f"{kind}_{loss}" for loss in ("clean", "robust", "robust_fixed")]
        figures = flatness(model, data, names, eps=0.0, batch_size=5, samples=3)
        # Where nothing is drawn, that is but for the directions, which are each measure's own.
        drawn_for_none = {
            "worst": lambda figure: figure.details["restarts"][0],
            "ascent": lambda figure: figure.value,
            "average": lambda figure: figure.details["reference_loss"],
        }[kind]
        clean, *robust = (drawn_for_none(figures[name]) for name in names)
        assert clean > 0
        assert robust == [clean, clean]
        zero = flatness(model, data, names, radius=0.0, eps=0.05, batch_size=5, samples=3)
        assert [zero[n].value for n in names] == [0.0, 0.0, 0.0]


def test_worst_is_at_least_ascent_and_nothing_is_negative():
    for seed in range(3):
        model, data = mlp(seed=seed, relu=True), examples(20, (6,), 4, seed)
        figures = flatness(
            model, data, ["worst_robust", "ascent_robust", "worst_clean", "ascent_clean"],
            eps=0.05, steps=2, radius=0.3,
        )  # fmt: skip
        for loss in ("clean", "robust"):
            assert figures[f"worst_{loss}"].value >= figures[f"ascent_{loss}"].value >= 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adaptive_sharpness_is_unchanged_by_rescaling_layers_and_others_are_not(norm):
    model, data = mlp((6, 8, 4), relu=True), examples(20, (6,), 4)
    names = ["worst_clean", "ascent_robust", "worst_robust"]

    def measured(**options: object) -> list[float]:
        options = {"radius": 0.05, "weight_norm": norm, "parameters": "all", **options}
        return [f.value for f in flatness(model, data, names, eps=0.05, **options).values()]

    before, plain = measured(ball="adaptive", restarts=1), measured(ball="global", restarts=1)
    with torch.no_grad():
        model[1].weight.mul_(4)
        model[1].bias.mul_(4)
        model[3].weight.div_(4)
    assert measured(ball="adaptive", restarts=1) == pytest.approx(before, rel=1e-6)
    assert measured(ball="global", restarts=1) != pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize(
    "name", [n for n in MEASURES if not n.startswith(("stutz", "andri", "hessian_density"))]
)
def test_no_value_depends_on_the_batch_size(name):
    model, data = mlp((6, 5, 4)), examples(7, (6,), 4)
    initial = {k: v + 1 for k, v in model.state_dict().items()}
    options = {"eps": 0.5, "probes": 3, "samples": 3, "steps": 3, "initial": initial}
    options["usual_attack"] = "pgd-2-2"
    values = [
        only(flatness(model, data, [name], batch_size=size, **options)).value for size in (7, 4, 1)
    ]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6, abs=1e-12, nan_ok=True)


def test_m_sharpness_is_the_mean_over_chunks_weighted_by_their_examples():
    model, data = mlp(), examples(11, (6,), 4)
    x, y, _ = read_examples(data)
    whole = flatness(model, data, ["ascent_clean"], m=4, batch_size=3)["ascent_clean"]
    parts = [
        flatness(model, (x[i : i + 4], y[i : i + 4]), ["ascent_clean"])["ascent_clean"].value
        for i in (0, 4, 8)
    ]
    assert whole.value == pytest.approx((4 * parts[0] + 4 * parts[1] + 3 * parts[2]) / 11)
    together = flatness(model, data, ["worst_clean"])["worst_clean"].value
    separately = flatness(model, data, ["worst_clean"], m=4)["worst_clean"].value
    assert separately > together  # a maximum for each chunk is the larger


def test_where_every_step_overshoots_into_lower_loss_the_centre_is_the_worst():
    class Hill(torch.nn.Module):
        """log(1 + exp(-w^2)), highest at w = 0."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[1e-3]], dtype=torch.float64))

        def forward(self, x):
            z = self.weight.square().expand(len(x), 1)
            return torch.cat([z, torch.zeros_like(z)], 1)

    figure = only(flatness(Hill(), ONE, ["worst_clean"], ball="global", radius=0.1))
    # The first restart begins by the gradient at the centre, the second elsewhere.
    assert figure.details["restarts"][1] < 0
    assert figure.value == figure.details["restarts"][0] == 0


def test_the_errors_of_examples_and_of_chunks_are_those_of_their_means():
    model, data = mlp(), examples(11, (6,), 4)
    x, y, _ = read_examples(data)
    gradient = flat_gradient(model, x, y)
    before = F.cross_entropy(model(x), y, reduction="none").detach()
    step = 0.05 * gradient / gradient.norm()
    figure = only(flatness(model, data, ["ascent_clean"], ball="global", radius=0.05,
                           parameters="all"))  # fmt: skip
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            p.add_(step[start : start + p.numel()].view_as(p))
            start += p.numel()
        difference = F.cross_entropy(model(x), y, reduction="none") - before
    assert figure.value == pytest.approx(float(difference.mean()))
    error = float(difference.std()) / math.sqrt(11)
    assert figure.details["example_standard_error"] == pytest.approx(error)
    # Chunks share neither images nor directions: their errors add in quadrature.
    chunks = only(flatness(model, data, ["average_clean"], m=6, samples=4))
    errors = [np.std(part, ddof=1) / 2 for part in chunks.details["samples"]]
    shared = math.hypot(6 / 11 * errors[0], 5 / 11 * errors[1])
    assert chunks.standard_error == pytest.approx(shared)


def test_normalised_logits_do_not_see_the_scale_of_the_last_layer():
    model, data = mlp(), examples(15, (6,), 4)

    def reference() -> float:
        figure = flatness(model, data, ["ascent_clean"], normalise_logits=True)["ascent_clean"]
        return figure.details["reference_loss"]

    before = reference()
    z = model(data[0]).detach()
    z = z - z.mean(1, keepdim=True)
    assert before == pytest.approx(
        float(F.cross_entropy(z / z.norm(dim=1, keepdim=True), data[1])), rel=1e-9
    )
    with torch.no_grad():
        model[3].weight.mul_(5)
        model[3].bias.mul_(5)
    assert reference() == pytest.approx(before, rel=1e-9)


def test_presets_reproduce_their_definitions():
    eps = 0.1
    figures = flatness(
        Binary(W), ONE, ["wu2020", "wen2023_worst", "wen2023_ascent", "andriushchenko2023_worst"],
        eps=eps,
    )  # fmt: skip
    attacked = x0 - eps * np.sign(w)
    shift = 5e-3 * np.linalg.norm(w) * np.linalg.norm(attacked)
    assert figures["wu2020"].value == pytest.approx(rise(shift, list(attacked)), rel=1e-7)
    for name in ("wen2023_worst", "wen2023_ascent"):
        assert figures[name].value == pytest.approx(rise(0.05 * np.linalg.norm(x0)), rel=1e-9)
    # With two classes the normalised logits are constant until w . x changes sign.
    assert figures["andriushchenko2023_worst with examples=1"].value == 0
    # Stutz: every sample on the sphere of half each tensor's norm, normalisation layers left out.
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    figure = only(
        flatness(
            net.double().eval(), examples(9, (6,), 4), ["stutz2021_average"], samples=2, eps=0.03
        )
    )
    assert figure.details["parameters"] == "no_norm"
    without = flatness(net, examples(9, (6,), 4), ["stutz2021_average"], samples=2, eps=0.03,
                       parameters=r"re:^(1\.weight|1\.bias)$")  # fmt: skip
    assert only(without).value == figure.value
    assert (figure.details["radius"], figure.details["ball"]) == (0.5, "tensor")
    # 20 steps and the best of 21 points, remade at 2 + 1 weights.
    assert figure.details["passes"]["input_gradient"] == pytest.approx(63)


def test_users_options_and_attack_override_a_preset():
    model, data = mlp(), examples(9, (6,), 4)
    mine = only(flatness(model, data, ["wu2020"], radius=0.1, attack=rf.fgsm(eps=0.02)))
    same = flatness(model, data, ["ascent_robust_fixed"], radius=0.1, attack=rf.fgsm(eps=0.02))
    assert mine.value == same["ascent_robust_fixed"].value


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in MEASURES
        if not n.startswith(("stutz", "andri", "hessian_m", "hessian_d", "align"))
    ],
)
@pytest.mark.parametrize("restarts", [1, 2])
def test_the_passes_stated_beforehand_are_those_made(name, restarts):
    model, data = mlp((6, 8, 4)), examples(10, (6,), 4)
    options = {"steps": 3, "samples": 2, "probes": 4, "attack": rf.pgd(eps=0.05, steps=3, restarts=restarts)}  # noqa: E501  # fmt: skip
    stated = cost([name], 10, **options)
    options["initial"] = model.state_dict()
    spent = only(flatness(model, data, [name], batch_size=4, **options)).details["passes"]
    (passes,) = stated.measures.values()
    assert spent == pytest.approx(passes.to_dict())
    assert passes.units == pytest.approx(stated.total.units)


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"loss": "kl", "start": "normal"}, {"keep": "best"}, {"eps": 0.0}]
)
def test_an_attack_costs_as_many_passes_as_the_model_makes(settings, restarts):
    attack, model, passes = rf.pgd(steps=4, restarts=restarts, **settings), mlp(), []
    model.register_forward_hook(lambda *given: passes.append(torch.is_grad_enabled()))
    x, y, _ = read_examples(examples(6, (6,), 4))
    closure = Closure(model=model, x=x, y=y, batch_size=6, count=lambda *told: None, attack=attack)
    closure.attacked()
    assert attack_cost(attack) == {
        "input_gradient": sum(passes), "forward": len(passes) - sum(passes),
    }  # fmt: skip


def test_a_part_of_the_examples_is_attacked_from_its_own_starts():
    options = Options(attack=rf.pgd(eps=0.3, steps=1, step_size=0.05, restarts=2))
    subject = Subject(mlp(), *examples(9, (6,), 4), batch_size=4, seed=0)
    whole = subject.closure(options, "robust")
    part = whole.part(slice(4, 8)).attacked()
    torch.testing.assert_close(part, whole.attacked()[4:8], rtol=0, atol=0)


def test_the_error_of_the_frobenius_norm_is_that_of_a_root():
    model, data = mlp((6, 10, 4)), examples(9, (6,), 4)
    options = Options(attack=rf.pgd(), probes=7)
    subject = Subject(model, *read_examples(data)[:2], batch_size=9, seed=0)
    squares = [p["square"] for p in hessian_probes(subject, options, "clean")]
    figure = only(flatness(model, data, ["hessian_frobenius"], probes=7))
    assert figure.value == pytest.approx(math.sqrt(np.mean(squares)))
    error = np.std(squares, ddof=1) / math.sqrt(7) / (2 * figure.value)
    assert figure.standard_error == pytest.approx(error)


def test_shared_work_is_stated_once():
    both = cost(["hessian_trace", "hessian_frobenius"], 10, probes=5)
    assert both.total.hvp == both.measures["hessian_trace"].hvp == 5
    assert "10 examples" in str(both)
    assert both.total.units == 3 + 5 * 6


def test_stated_cost_of_presets_and_sweeps_is_that_of_each():
    stated = cost(["stutz2021_worst", "worst_robust"], 1000)
    assert stated.total.units == pytest.approx(sum(p.units for p in stated.measures.values()))
    # Stutz: 10 restarts of 20 steps and a last value, the ascent and the centre.
    gradients = 10 * 21 + 1
    units = 3 * gradients + 1 + 21 * 2 * (gradients + 1)
    assert stated.measures["stutz2021_worst"].units == units
    swept = cost(["worst_clean"], 10, radius=[0.1, 0.2, 0.3])
    assert swept.total.units == pytest.approx(3 * cost(["worst_clean"], 10).total.units)


def test_a_changed_preset_has_another_name_and_figures_tell_their_settings():
    model, data = mlp(), examples(9, (6,), 4)
    names = flatness(model, data, ["wu2020", "worst_clean"], steps=2, radius=0.1, probes=3)
    assert list(names) == ["wu2020 with radius=0.1", "worst_clean"]
    assert list(flatness(model, data, ["wu2020"], radius=5e-3, k=2)) == ["wu2020"]
    assert list(cost(["stutz2021_average"], 1000, attack=rf.fgsm(eps=0.1)).measures) == [
        "stutz2021_average with attack=fgsm"
    ]
    settings = names["worst_clean"].details["settings"]
    assert (settings["steps"], settings["radius"], settings["seed"]) == (2, 0.1, 0)
    assert settings["restarts"] == 2
    # Settings that do not act on a measure are none of its circumstances.
    assert {"distribution", "samples", "probes", "attack", "examples"}.isdisjoint(settings)
    assert "radius=0.03137" in names["wu2020 with radius=0.1"].details["settings"]["attack"]
    (wen,) = cost(["wen2023_worst"], 9, steps=2, samples=3).measures
    assert wen == "wen2023_worst with steps=2"
    published = {name: m.split for name, m in MEASURES.items() if m.split}
    assert published == {
        "stutz2021_average": "test", "stutz2021_worst": "test",
        "andriushchenko2023_worst": "train", "andriushchenko2023_average": "train",
    }  # fmt: skip


class Noted(Options):
    """Options that note which of them are read."""

    read: ClassVar[set[str]] = set()
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __getattribute__(self, name):
        if name in Options.__dataclass_fields__:
            Noted.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_names_the_options_that_act_on_it(name):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 11), torch.nn.Linear(11, 3))
    data = examples(4, (6,), 3)
    start = {k: v + 1 for k, v in net.double().eval().state_dict().items()}
    subject = Subject(net, *data, batch_size=4, seed=0, initial=start)
    measure = MEASURES[name]
    settings = {"samples": 1, "probes": 1, "steps": 1, "restarts": 1, "lanczos_steps": 2}
    options = Noted(attack=rf.pgd(eps=0.1, steps=1), max_hvps=2, lanczos_runs=1,
                    **(dict(measure.changes) | settings))  # fmt: skip
    Noted.read.clear()
    measure.run(subject, options)
    # The loss always looks whether to normalise; all kinds make the closure of every loss.
    said = {*measure.uses, "examples", "normalise_logits", "attack"}
    if name != "pac_bayes":  # it copies all into those of a sharpness
        assert Noted.read <= said
    assert {*measure.uses} - Noted.read <= {"attack", "train_size"}
    assert measure.is_attacked == (measure.loss != "clean" or "attack" in measure.uses)


def test_what_does_not_act_on_a_measure_is_not_swept_and_no_value_comes_twice():
    figures = cost(["wen2023_average", "hessian_trace", "worst_clean"], 9, probes=[10, 20, 10.0],
                   radius=[0.1, 0.1])  # fmt: skip
    assert list(figures.measures) == [
        "wen2023_average with radius=0.1", "hessian_trace with probes=10",
        "hessian_trace with probes=20", "worst_clean with radius=0.1",
    ]  # fmt: skip


def test_worst_sharpness_where_a_loss_is_not_finite_is_not_finite():
    model, data = mlp((6, 8, 8, 8, 8, 4), relu=True).float(), examples(9, (6,), 4)
    (figure,) = flatness(model, data, ["worst_clean"], radius=1e12).values()
    assert not math.isfinite(figure.value)
    assert figure.to_dict()["value"] is None


def test_a_sweep_is_one_figure_for_each_setting_along_the_same_directions():
    model, data = mlp(), examples(9, (6,), 4)
    figures = flatness(model, data, ["average_clean"], radius=[0.1, 1e-7], samples=3)
    assert list(figures) == ["average_clean with radius=0.1", "average_clean with radius=1e-07"]
    for radius in (0.1, 1e-7):
        alone = flatness(model, data, ["average_clean"], radius=radius, samples=3)["average_clean"]
        assert figures[f"average_clean with radius={radius}"].value == alone.value
    # Along the same directions the rise is linear in a small radius, sample by sample.
    pair = flatness(model, data, ["average_clean"], radius=[1e-6, 2e-6], samples=3)
    small, large = (np.array(f.details["samples"]) for f in pair.values())
    assert large == pytest.approx(2 * small, rel=1e-3)
    one = "worst_clean with steps=3, ball=row"
    figures = flatness(model, data, [one, "worst_clean"])
    assert list(figures) == ["worst_clean with ball=row, steps=3", "worst_clean"]
    settings = [f.details["settings"]["ball"] for f in figures.values()]
    assert settings == ["row", "tensor"]
    with pytest.raises(rf.UserError, match="are written as in"):
        flatness(model, data, ["worst_clean with nonsense"])


@pytest.mark.parametrize("ball", ["tensor", "row", "global_relative"])
def test_normal_displacements_have_on_average_the_length_of_a_relative_ball(ball, monkeypatch):
    model, data = mlp((6, 40, 4)), examples(4, (6,), 4)
    weight = model[1].weight.detach().clone()
    moved: list[float] = []
    original = Closure.losses

    def losses(self):
        moved.append(float((model[1].weight.detach() - weight).square().sum()))
        return original(self)

    monkeypatch.setattr(Closure, "losses", losses)
    flatness(
        model, data, ["average_clean"], ball=ball, radius=0.1, distribution="normal", samples=40
    )
    share = np.mean(moved[1:]) / (0.01 * float(weight.square().sum()))
    whole = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    total = sum(float(p.detach().square().sum()) for p in model.parameters() if p.ndim > 1)
    expected = 1.0
    if ball == "global_relative":
        expected = total * weight.numel() / whole / float(weight.square().sum())
    assert share == pytest.approx(expected, rel=0.15)


def reference_stutz(model, x, y, eps, attack, displacements):
    """Mean rise of the robust loss over given displacements, examples remade at each."""

    def robust():
        return float(F.cross_entropy(model(attack(model, x, y)), y).detach())

    before, rises = robust(), []
    for moves in displacements:
        with torch.no_grad():
            for p, v in moves:
                p.add_(v)
        rises.append(robust() - before)
        with torch.no_grad():
            for p, v in moves:
                p.sub_(v)
    return float(np.mean(rises))


def test_published_averages_are_their_formulas_over_the_directions_drawn():
    model = mlp((6, 8, 4))
    data = examples(20, (6,), 4)
    x, y, _ = read_examples(data)
    subject = Subject(model, x, y, batch_size=20, seed=0)
    named = dict(model.named_parameters())
    like = [p.detach().clone() for p in named.values()]
    # Stutz et al.: each tensor, biases included, moves by half its norm in a uniform direction.
    zero = rf.pgd(eps=0.03, steps=20, step_size=0.007 / 0.0314 * 0.03, start="zero")
    stutz = only(flatness(model, data, ["stutz2021_average"], eps=0.03, attack=zero, samples=3))
    moves = []
    for i in range(3):
        g = subject.generator("stutz2021_average", 0, i)
        drawn = [torch.randn(t.shape, dtype=t.dtype, generator=g) for t in like]
        v = [0.5 * t.norm() * d / d.norm() for t, d in zip(like, drawn, strict=True)]
        moves.append(list(zip(named.values(), v, strict=True)))
    expected = reference_stutz(model, x, y, 0.03, zero, moves)
    assert stutz.value == pytest.approx(expected, rel=1e-6)
    assert stutz.standard_error > 0
    # Andriushchenko et al.: N(0, rho^2 w^2) on every weight, logits normalised, m examples each.
    figure = only(flatness(model, data, ["andriushchenko2023_average"], samples=2, m=10))
    rises = []
    for chunk in range(2):
        rows = slice(10 * chunk, 10 * chunk + 10)

        def loss(rows=rows):
            z = model(x[rows]).detach()
            z = z - z.mean(1, keepdim=True)
            return float(F.cross_entropy(z / z.norm(dim=1, keepdim=True), y[rows]))

        before = loss()
        for i in range(2):
            g = subject.generator("andriushchenko2023_average", chunk, i)
            v = [0.05 * t.abs() * torch.randn(t.shape, dtype=t.dtype, generator=g) for t in like]
            with torch.no_grad():
                for p, d, t in zip(named.values(), v, like, strict=True):
                    p.copy_(t + d)
            rises.append(loss() - before)
            with torch.no_grad():
                for p, t in zip(named.values(), like, strict=True):
                    p.copy_(t)
    assert figure.value == pytest.approx(np.mean(rises), rel=1e-9)


def test_published_worst_cases_reach_their_maxima():
    # One logistic example: the worst robust loss in a relative L2 ball is explicit.
    eps, attacked = 0.1, x0 - 0.1 * np.sign(w)
    stutz = only(flatness(Binary(W), ONE, ["stutz2021_worst"], eps=eps))
    shift = 0.003 * np.linalg.norm(w) * np.linalg.norm(attacked)
    assert stutz.value == pytest.approx(rise(shift, list(attacked)), rel=1e-6)
    assert len(stutz.details["restarts"]) == 10
    # Three classes, one example: normalised logits fall along no more than rho |w|, entry by entry.
    model, (x, y) = mlp((5, 3)), examples(1, (5,), 3)
    figure = only(flatness(model, (x, y), ["andriushchenko2023_worst"]))
    centre = [p.detach().clone() for p in model.parameters()]

    def normalised(parts):
        z = x @ parts[0].T + parts[1]
        z = z - z.mean(1, keepdim=True)
        return float(F.cross_entropy(z / z.norm(), y))

    g = torch.Generator().manual_seed(0)
    corners = [
        normalised(
            [
                t
                + 2e-3
                * t.abs()
                * (torch.rand(t.shape, dtype=t.dtype, generator=g) > 0.5).double().mul(2).sub(1)
                for t in centre
            ]
        )
        for _ in range(500)
    ]
    rises = max(corners) - normalised(centre)
    assert figure.value >= rises
    slopes = torch.autograd.grad(
        (lambda z: F.cross_entropy(z / z.norm(), y))((lambda z: z - z.mean())(model(x))),
        list(model.parameters()),
    )
    linear = sum(float((s.abs() * t.abs()).sum()) for s, t in zip(slopes, centre, strict=True))
    assert figure.value == pytest.approx(2e-3 * linear, rel=0.02)


def test_the_strongest_restart_of_the_attack_counts():
    model, (x, y) = mlp((6, 8, 4), seed=2), examples(12, (6,), 4)
    attack = rf.pgd(eps=0.3, steps=1, restarts=4)
    subject = Subject(model, x, y, batch_size=5, seed=0)
    options = Options(attack=attack)
    whole = subject.closure(options, "robust").losses()
    starts = subject.closure(options, "robust").starts
    each = [
        Closure(
            model=model,
            x=x,
            y=y,
            batch_size=12,
            count=lambda *_: None,
            attack=rf.pgd(eps=0.3, steps=1),
            starts=(s,),
        ).losses()
        for s in starts
    ]
    assert whole.numpy() == pytest.approx(torch.stack(each).amax(0).numpy(), rel=1e-12)
    assert not torch.equal(torch.stack(each).amax(0), torch.stack(each).amin(0))


def test_a_robust_loss_is_attacked_from_five_starts_unless_another_attack_is_said():
    net, data = mlp(relu=True), examples(12, (6,), 4)

    def of(**said):
        return only(flatness(net, data, ["worst_robust"], eps=0.4, steps=1, **said))

    assert of().details == of(attack="pgd-10-5").details
    assert of().details["reference_loss"] > of(attack="pgd-10").details["reference_loss"]
