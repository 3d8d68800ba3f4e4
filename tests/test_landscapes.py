from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flatness_models import Binary, conv_net, examples, flat_gradient, full_hessian, mlp
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize

import robustflat as rf
from robustflat.evaluate import Team
from robustflat.files import locked
from robustflat.flatness.options import Options
from robustflat.flatness.subject import Subject
from robustflat.landscapes import Landscape, between, drawn_in, landscape, scene
from robustflat.landscapes.batchnorm import recompute_statistics
from robustflat.landscapes.directions import Random, eigenvectors
from robustflat.landscapes.span import Span, copied
from robustflat.report import figures
from robustflat.report.interactive import plotly
from robustflat.report.landscape_picture import landscape_figure
from robustflat.report.paper import save

torch.set_num_threads(1)
viridis = colormaps["viridis"]


def loss_of(model, data) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(data[0]), data[1]))


def directions(model, seed=0, draw=0, normalised="filter"):
    named = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    subject = Subject(model, torch.zeros(1), torch.zeros(1), batch_size=1, seed=seed)
    source = Random(named, normalised)
    ways = [source.draw(subject.generator("direction", axis, draw)) for axis in range(2)]
    return named, ways


def test_filter_normalised_directions_have_every_filters_norm_and_are_shared_by_models():
    model, other = conv_net(), conv_net(1)
    named, ways = directions(model)
    for way in ways:
        for d, p in zip(way, named.values(), strict=True):
            assert torch.allclose(d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1), rtol=1e-5)
    theirs = directions(other)[1]
    for a, b in zip(ways[1], theirs[1], strict=True):
        cosines = F.cosine_similarity(a.flatten(1), b.flatten(1))
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-5)
    assert not torch.equal(directions(model, 1)[1][0][0], ways[0][0])


def test_values_on_the_grid_are_the_losses_at_those_weights():
    model, data = mlp(relu=True), examples(9, (6,), 4)
    drawn = landscape(model, data, dimensions=2, points=3, span=0.5, losses=["clean"], batch_size=4)
    named, ways = directions(model)
    centre = {n: p.detach().clone() for n, p in named.items()}
    for i, a in enumerate((-0.5, 0.0, 0.5)):
        for j, b in enumerate((-0.5, 0.0, 0.5)):
            with torch.no_grad():
                for k, (n, p) in enumerate(named.items()):
                    p.copy_(centre[n] + a * ways[0][k] + b * ways[1][k])
            assert drawn.losses["clean"][0, i, j] == pytest.approx(loss_of(model, data), rel=1e-12)
            right = (model(data[0]).argmax(1) == data[1]).double().mean().item()
            assert drawn.accuracies["clean"][0, i, j] == pytest.approx(right)
    assert drawn.axes == ([-0.5, 0.0, 0.5],) * 2


def test_fixed_and_remade_examples_agree_at_the_centre_and_remade_are_the_worse_elsewhere():
    model, data = mlp(), examples(30, (6,), 4)
    attack = rf.pgd(eps=0.1, steps=20, start="zero", keep="best")
    drawn = landscape(
        model, data, points=5, span=2.0, losses=["clean", "robust", "robust_fixed"], attack=attack
    )
    clean, robust, fixed = (drawn.losses[k][0] for k in ("clean", "robust", "robust_fixed"))
    assert robust[2] == fixed[2]
    assert clean[2] == pytest.approx(loss_of(model, data), rel=1e-12)
    for i in (0, 1, 3, 4):
        assert robust[i] > fixed[i]
        assert robust[i] > clean[i]
    zero = landscape(model, data, points=3, losses=["clean", "robust"], eps=0.0)
    assert np.array_equal(zero.losses["clean"], zero.losses["robust"])


def test_along_the_top_eigenvector_the_curvature_is_its_eigenvalue():
    model, data = mlp((6, 10, 4)), examples(20, (6,), 4)
    exact = float(torch.linalg.eigvalsh(full_hessian(model, *data))[-1])
    h = 1e-3
    drawn = landscape(
        model, data, directions="eigenvectors", parameters="all", points=3, span=h,
        losses=["clean"],
    )  # fmt: skip
    low, mid, high = drawn.losses["clean"][0]
    length = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    assert (low - 2 * mid + high) / (h * length) ** 2 == pytest.approx(exact, rel=1e-3)


def test_a_line_meets_both_checkpoints_and_the_middle():
    a, b, data = mlp(seed=0), mlp(seed=1), examples(9, (6,), 4)
    container = mlp(seed=2)
    drawn = between(container, {"a": a, "b": b.state_dict()}, data, losses=["clean"])
    axis, losses = drawn.axes[0], drawn.losses["clean"][0]
    ends = drawn.points
    distance = math.sqrt(
        sum(
            float((p - q).detach().square().sum())
            for p, q in zip(a.parameters(), b.parameters(), strict=True)
        )
    )
    assert ends["a"] == (0.0,)
    assert ends["b"][0] == pytest.approx(distance)
    assert losses[axis.index(0.0)] == pytest.approx(loss_of(a, data), rel=1e-14)
    assert losses[20] == pytest.approx(loss_of(b, data), rel=1e-9)
    assert axis[20] == pytest.approx(distance)
    with torch.no_grad():
        for p, q, m in zip(a.parameters(), b.parameters(), container.parameters(), strict=True):
            m.copy_((p + q) / 2)
    assert losses[12] == pytest.approx(loss_of(container, data), rel=1e-9)


def test_a_plane_meets_its_three_checkpoints():
    models, data = [conv_net(seed).double() for seed in range(3)], examples(9, (1, 4, 4), 3)
    # The third is moved so that it lies straight above the first, where the grid has a point.
    first, second, third = ([p.detach() for p in model.parameters()] for model in models)
    edge = [q - p for p, q in zip(first, second, strict=True)]
    dot = [float(((r - p) * e).sum()) for p, r, e in zip(first, third, edge, strict=True)]
    share = sum(dot) / sum(float(e.square().sum()) for e in edge)
    for r, e in zip(third, edge, strict=True):
        r.sub_(share * e)
    drawn = between(
        models[0], dict(zip("abc", models, strict=True)), data, losses=["clean"], points=13
    )
    x, y = drawn.axes
    assert drawn.losses["clean"][0, x.index(0.0), y.index(0.0)] == pytest.approx(
        loss_of(models[0], data), rel=1e-14
    )
    assert drawn.losses["clean"][0, 10, y.index(0.0)] == pytest.approx(loss_of(models[1], data))
    # Distances in the plane are distances in weight space.
    points = {k: np.array(v) for k, v in drawn.points.items()}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        far = math.sqrt(
            sum(
                float((p - q).detach().square().sum())
                for p, q in zip(models[i].parameters(), models[j].parameters(), strict=True)
            )
        )
        assert np.linalg.norm(points["abc"[i]] - points["abc"[j]]) == pytest.approx(far)
    # Weights and statistics are the third one's there.
    assert points["c"][0] == pytest.approx(0, abs=1e-12)
    assert y[10] == pytest.approx(points["c"][1])
    found = drawn.losses["clean"][0, x.index(0.0), 10]
    assert found == pytest.approx(loss_of(models[2], data))


def test_in_a_plane_weights_and_statistics_are_combined_alike():
    models = [conv_net(seed).double() for seed in range(3)]
    states = {name: copied(model) for name, model in zip("abc", models, strict=True)}
    span = Span(states, models[0])
    points = {name: np.array(at) for name, at in span.points.items()}
    means = {name: state["1.running_mean"] for name, state in states.items()}
    weights = {name: state["5.weight"] for name, state in states.items()}
    buffer = dict(models[0].named_buffers())["1.running_mean"]
    number = list(span.moved).index("5.weight")
    for shares in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.5, 0.3)):
        at = sum(share * points[name] for name, share in zip("abc", shares, strict=True))
        assert span.shares(at) == pytest.approx(shares, abs=1e-12)
        span.set_buffers(at)
        expected = sum(s * means[name] for name, s in zip("abc", shares, strict=True))
        assert torch.allclose(buffer, expected, rtol=1e-12)
        weight = weights["a"] + sum(x * axis[number] for x, axis in zip(at, span.axes, strict=True))
        expected = sum(s * weights[name] for name, s in zip("abc", shares, strict=True))
        assert torch.allclose(weight, expected, rtol=1e-9, atol=1e-12)


def test_interpolated_statistics_never_leave_the_checkpoints_range():
    a, b, data = conv_net(0), conv_net(1), examples(9, (1, 4, 4), 3)
    with torch.no_grad():
        b[1].running_var.mul_(100)
    drawn = between(
        a, {"a": a, "b": b}, (data[0].float(), data[1]), losses=["clean"], margin=2.0, points=11
    )
    assert np.isfinite(drawn.losses["clean"]).all()


def test_refreshed_statistics_are_those_of_the_images_mixed():
    model, (x, y) = conv_net().double(), examples(300, (1, 4, 4), 3)
    y = y.sort().values
    x = x / 10 + 0.4 * y.view(-1, 1, 1, 1)  # Of each class another mean.
    with torch.no_grad():
        model[1].running_mean.add_(5)
    drawn = landscape(
        model, (x, y), points=3, losses=["clean"], batchnorm="refresh", batch_size=30, refresh_on=x
    )
    # By hand: mean and variance of all. Of batches of one class each, the variance would lack that
    # between the classes, most of it.
    feature = model[0](x).detach()
    hand, apart = conv_net().double(), conv_net().double()
    with torch.no_grad():
        hand[1].running_mean.copy_(feature.mean((0, 2, 3)))
        hand[1].running_var.copy_(feature.transpose(0, 1).flatten(1).var(1))
        apart[1].running_mean.copy_(feature.mean((0, 2, 3)))
        within = [feature[y == c].transpose(0, 1).flatten(1).var(1) for c in range(3)]
        apart[1].running_var.copy_(sum(within) / 3)
    found = drawn.losses["clean"][0, 1]
    assert abs(found - loss_of(hand, (x, y))) < 0.2 * abs(found - loss_of(apart, (x, y)))


def test_batches_count_by_their_images_in_refreshed_statistics():
    model, x = conv_net().double(), examples(10, (1, 4, 4), 3)[0]
    before = model[1].momentum
    with torch.no_grad():
        model[1].running_mean.add_(5)
        parts = model[0](x).split(4)
        recompute_statistics(model, x, 4)
    mean = sum(len(p) * p.mean((0, 2, 3)) for p in parts) / 10
    var = sum(len(p) * p.transpose(0, 1).flatten(1).var(1) for p in parts) / 10
    assert torch.allclose(model[1].running_mean, mean, rtol=1e-9)
    assert torch.allclose(model[1].running_var, var, rtol=1e-9)
    assert model[1].momentum == before
    assert not any(module.training for module in model.modules())


def test_the_robust_loss_of_a_linear_model_is_its_closed_form_at_every_point():
    # For label 0 the loss is softplus(-w . x), and the worst x' within eps has w . x lower by
    # eps * ||w||_1. The images are far enough from the box's border for all of that.
    model, eps = Binary([1.0, -2.0, 0.5]), 0.1
    x = torch.full((2, 3), 0.5, dtype=torch.float64) + torch.tensor([[0.1], [-0.2]])
    data = x, torch.zeros(2, dtype=torch.long)
    drawn = landscape(
        model, data, losses=["clean", "robust", "robust_fixed"], eps=eps, attack="pgd-20",
        points=5, span=0.8,
    )  # fmt: skip
    (d,) = directions(model)[1][0]
    for i, a in enumerate((-0.8, -0.4, 0.0, 0.4, 0.8)):
        w = model.weight.detach() + a * d
        worst = x @ w.T - eps * w.abs().sum()
        fixed = (x - eps * model.weight.detach().sign()) @ w.T
        for kind, z in (("clean", x @ w.T), ("robust", worst), ("robust_fixed", fixed)):
            assert drawn.losses[kind][0, i] == pytest.approx(float(F.softplus(-z).mean()))
            assert drawn.accuracies[kind][0, i] == float((z > 0).double().mean())


def test_draws_have_directions_of_their_own_and_a_mean_and_a_spread():
    model, data = mlp(), examples(9, (6,), 4)
    three = landscape(model, data, draws=3, points=3, span=0.7, losses=["clean"])
    one = landscape(model, data, points=3, span=0.7, losses=["clean"])
    assert (three.draws, one.draws) == (3, 1)
    assert three.losses["clean"].shape == (3, 3)
    assert np.array_equal(three.losses["clean"][0], one.losses["clean"][0])
    ends = three.losses["clean"][:, 2]
    assert len(set(ends)) == 3
    for draw in range(3):
        moved = mlp()
        named, ways = directions(moved, draw=draw)
        with torch.no_grad():
            for p, d in zip(named.values(), ways[0], strict=True):
                p.add_(0.7 * d)
        assert ends[draw] == pytest.approx(loss_of(moved, data), rel=1e-12)
    assert three.mean()["clean"][2] == pytest.approx(sum(ends) / 3)
    variance = sum((v - sum(ends) / 3) ** 2 for v in ends) / 2
    assert three.spread()["clean"][2] == pytest.approx(math.sqrt(variance))
    assert three.spread()["clean"][1] == 0
    assert one.spread() == {}
    assert three.mean("accuracies")["clean"].shape == (3,)
    # The axis of a line is the first of a plane.
    plane = landscape(model, data, dimensions=2, points=3, span=0.7, losses=["clean"])
    assert np.array_equal(plane.losses["clean"][0, :, 1], one.losses["clean"][0])


@pytest.mark.parametrize("normalised", ["layer", "global"])
def test_other_random_directions_are_as_long_as_the_layer_or_all_weights(normalised):
    named, ways = directions(conv_net(), normalised=normalised)
    lengths = torch.stack([d.norm() for d in ways[0]])
    own = torch.stack([p.detach().norm() for p in named.values()])
    assert lengths.norm() == pytest.approx(float(own.norm()), rel=1e-5)
    assert torch.allclose(lengths, own, rtol=1e-5) == (normalised == "layer")
    assert not torch.equal(ways[0][0], ways[1][0])
    filters = zip(ways[0], named.values(), strict=True)
    for d, p in filters:
        rows = d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1)
        assert not torch.allclose(*rows, rtol=1e-2), "not filter by filter"


def test_directions_are_drawn_on_the_cpu_whatever_the_models_device():
    weights = {"w": torch.nn.Parameter(torch.ones(2, 3, device="meta"))}
    source, asked = Random(weights, "filter"), []
    source._ball = SimpleNamespace(
        sample=lambda like, generator, surface: asked.append((like, generator)) or like
    )
    (way,) = source.draw(torch.Generator())
    assert (asked[0][0][0].device.type, asked[0][1].device.type) == ("cpu", "cpu")
    assert way.device.type == "meta"


def test_defaults_reach_as_far_as_they_say():
    model, data = mlp(), examples(5, (6,), 4)
    for directions, reach in (("filter", 1), ("layer", 1), ("eigenvectors", 0.05)):
        drawn = landscape(model, data, directions=directions, losses=["clean"])
        assert (len(drawn.axes[0]), drawn.axes[0][-1], drawn.about["span"]) == (21, reach, reach)
    plane = landscape(model, data, dimensions=2, losses=["clean"])
    assert plane.losses["clean"].shape == (1, 11, 11)
    drawn = between(model, {"a": model, "b": mlp(seed=1)}, data, losses=["clean"])
    assert len(drawn.axes[0]) == 25
    assert drawn.about["margin"] == 0.25


def test_along_the_gradient_the_slope_is_its_length():
    model, data, h = mlp(), examples(20, (6,), 4), 1e-4
    slope = float(flat_gradient(model, *data).norm())
    drawn = landscape(
        model, data, directions="gradient", parameters="all", points=3, span=h, losses=["clean"]
    )
    low, _, high = drawn.losses["clean"][0]
    length = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    assert (high - low) / (2 * h * length) == pytest.approx(slope, rel=1e-5)
    # That of the robust loss at the images that the attack finds.
    attack, (x, y) = rf.pgd(eps=0.1, steps=3, start="zero"), data
    robust = float(flat_gradient(model, attack(model, x, y), y).norm())
    drawn = landscape(
        model, data, directions="gradient", parameters="all", points=3, span=h, attack=attack,
        losses=["robust_fixed"], direction_loss="robust",
    )  # fmt: skip
    low, _, high = drawn.losses["robust_fixed"][0]
    assert (high - low) / (2 * h * length) == pytest.approx(robust, rel=1e-5)
    assert robust > 1.01 * slope


def test_the_second_axis_is_the_second_eigenvector():
    model, data, h = mlp((6, 10, 4)), examples(20, (6,), 4), 1e-3
    exact = torch.linalg.eigvalsh(full_hessian(model, *data)).flip(0)
    drawn = landscape(
        model, data, directions="eigenvectors", dimensions=2, parameters="all", points=3, span=h,
        losses=["clean"],
    )  # fmt: skip
    grid = drawn.losses["clean"][0]
    length = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    for number, (low, mid, high) in enumerate((grid[:, 1], grid[1, :])):
        curvature = (low - 2 * mid + high) / (h * length) ** 2
        assert curvature == pytest.approx(float(exact[number]), rel=1e-2)


def test_an_eigenvector_has_one_sign_whatever_the_solvers_start():
    model, data, options = mlp(), examples(20, (6,), 4), Options(attack=rf.pgd(), k=2)
    named = dict(model.named_parameters())
    for seed in (0, 1, 2):
        subject = Subject(model, *data, batch_size=20, seed=seed)
        for way in eigenvectors(subject, options, "clean", named):
            flat = torch.cat([t.flatten() for t in way])
            assert flat[flat.abs().argmax()] > 0


def test_between_checkpoints_statistics_are_kept_refreshed_or_interpolated():
    a, b, (x, y) = conv_net(0).double(), conv_net(1).double(), examples(12, (1, 4, 4), 3)
    fresh = torch.rand(7, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        b[1].running_mean.add_(3)
    found = {
        mode: between(
            a, {"a": a, "b": b}, (x, y), losses=["clean"], margin=0.0, points=2, batchnorm=mode,
            **({"refresh_on": fresh} if mode == "refresh" else {}),
        )
        for mode in ("interpolate", "keep", "refresh")
    }  # fmt: skip
    ends = {mode: drawn.losses["clean"][0] for mode, drawn in found.items()}
    assert {mode: drawn.about["batchnorm"] for mode, drawn in found.items()} == dict(
        zip(found, found, strict=True)
    )
    default = between(a, {"a": a, "b": b}, (x, y), losses=["clean"], margin=0.0, points=2)
    assert np.array_equal(default.losses["clean"][0], ends["interpolate"])
    assert ends["interpolate"][1] == pytest.approx(loss_of(b, (x, y)))
    hand = copy.deepcopy(b)
    with torch.no_grad():
        for mine, theirs in zip(hand[1].buffers(), a[1].buffers(), strict=True):
            mine.copy_(theirs)
    assert ends["keep"][1] == pytest.approx(loss_of(hand, (x, y)))
    assert ends["keep"][0] == pytest.approx(loss_of(a, (x, y)))
    for net, end in ((a, ends["refresh"][0]), (b, ends["refresh"][1])):
        with torch.no_grad():
            feature = net[0](fresh)
            hand = copy.deepcopy(net)
            hand[1].running_mean.copy_(feature.mean((0, 2, 3)))
            hand[1].running_var.copy_(feature.transpose(0, 1).flatten(1).var(1))
        assert end == pytest.approx(loss_of(hand, (x, y)), rel=1e-6)
    assert len({ends[mode][1] for mode in ends}) == 3


# --- the record


class Stop(Exception):  # noqa: N818
    pass


def stopping(after):
    def on_progress(progress):
        if progress.done >= after:
            raise Stop

    return on_progress


def test_an_interrupted_plane_goes_on_where_it_stopped(tmp_path):
    model, data = mlp(), examples(7, (6,), 4)
    options = {"dimensions": 2, "points": 3, "eps": 0.05, "attack": "pgd-2"}
    seen = []
    whole = landscape(model, data, on_progress=seen.append, **options)
    assert whole.complete
    total = seen[-1].done
    assert total == pytest.approx(seen[-1].total) == pytest.approx(9 * (1 + 1 + 2 * 2))
    path = tmp_path / "plane.json"
    with pytest.raises(Stop):
        landscape(model, data, store=path, on_progress=stopping(total / 2), **options)
    begun = Landscape.load(path)
    assert not begun.complete
    assert 0 < begun.measured < 9
    flat = begun.losses["robust"].ravel()
    assert np.isfinite(flat[: begun.measured]).all()
    assert np.isnan(flat[begun.measured :]).all()
    rest = []
    resumed = landscape(model, data, store=path, on_progress=rest.append, **options)
    assert rest[-1].done == pytest.approx(total * (9 - begun.measured) / 9)
    assert rest[-1].done == pytest.approx(rest[-1].total)
    for kind in ("clean", "robust"):
        assert np.array_equal(resumed.losses[kind], whole.losses[kind])
        assert np.array_equal(resumed.accuracies[kind], whole.accuracies[kind])
    # A third time, nothing is measured at all.
    again = landscape(model, data, store=path, on_progress=stopping(0), **options)
    assert again.to_dict() == resumed.to_dict() == Landscape.load(path).to_dict()


def test_a_landscape_is_kept_while_it_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "PAUSE", 0.0)
    path, known = tmp_path / "line.json", []

    def look(progress):
        known.append(Landscape.load(path).measured if path.exists() else 0)

    landscape(mlp(), examples(7, (6,), 4), points=5, losses=["clean"], store=path, on_progress=look)
    assert known == [0, 1, 2, 3, 4]


def test_a_landscape_replaces_its_own_earlier_one_and_no_other(tmp_path):
    model, other, data = mlp(), mlp(seed=1), examples(7, (6,), 4)
    options = {"points": 3, "eps": 0.05, "attack": "pgd-1"}
    path = tmp_path / "line.json"
    landscape(model, data, store=path, **options)
    for change in (
        {"seed": 1}, {"eps": 0.06}, {"attack": "pgd-2"}, {"points": 5}, {"losses": ["clean"]},
        {"span": 0.5}, {"draws": 2}, {"directions": "layer"}, {"parameters": "all"},
        {"batchnorm": "refresh"}, {"norm": "l2"}, {"about": {"split": "test"}}, {"examples": 6},
    ):  # fmt: skip
        with pytest.raises(rf.UserError, match="holds another landscape"):
            landscape(model, data, store=path, **{**options, **change})
    kept = Landscape.load(path)
    assert kept.losses["clean"][0, 1] == pytest.approx(loss_of(model, data))
    # The same of other weights, as of a run that was trained further, takes its place; so does the
    # same on other images.
    options["about"] = {"epoch": 2}
    drawn = landscape(other, data, store=path, **options)
    assert drawn.losses["clean"][0, 1] == pytest.approx(loss_of(other, data))
    assert Landscape.load(path).to_dict() == drawn.to_dict()
    images = data[0] / 2, data[1]
    drawn = landscape(other, images, store=path, **options)
    assert drawn.losses["clean"][0, 1] == pytest.approx(loss_of(other, images))
    # So does one between checkpoints of which another was trained further.
    line = tmp_path / "between.json"
    for second in (mlp(seed=1), mlp(seed=2)):
        drawn = between(
            model, {"a": model, "b": second}, data, store=line, losses=["clean"], points=2,
            margin=0.0,
        )  # fmt: skip
        assert drawn.losses["clean"][0, 1] == pytest.approx(loss_of(second, data))
    for change in ({"margin": 0.5}, {"points": 3}, {"batchnorm": "keep"}):
        options = {"margin": 0.0, "points": 2, "losses": ["clean"], "store": line, **change}
        with pytest.raises(rf.UserError, match="holds another landscape"):
            between(model, {"a": model, "b": mlp(seed=2)}, data, **options)


def test_refreshing_on_other_images_is_another_landscape(tmp_path):
    model, data, path = conv_net().double(), examples(7, (1, 4, 4), 3), tmp_path / "line.json"
    options = {"points": 3, "losses": ["clean"], "batchnorm": "refresh", "store": path}
    first = landscape(model, data, **options)
    second = landscape(model, data, refresh_on=data[0][:3], **options)
    assert not np.array_equal(first.losses["clean"], second.losses["clean"])


def test_in_a_folder_every_landscape_has_a_file_of_its_own(tmp_path):
    model, data = mlp(), examples(7, (6,), 4)
    options = {"points": 3, "losses": ["clean"], "store": tmp_path / "landscapes"}
    landscape(model, data, **options)
    landscape(model, data, dimensions=2, **options)
    landscape(model, data, seed=1, **options)
    landscape(model, data, **options)
    between(model, {"a": model, "b": mlp(seed=1)}, data, **{**options, "points": 2})
    landscape(model, data, **options)
    with pytest.raises(Stop):
        landscape(model, data, seed=2, on_progress=stopping(2), **options)
    names = sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "landscapes").glob("*.json"))
    assert names == [
        "between-line-checkpoints", "line-filter", "line-filter", "line-filter", "plane-filter"
    ]  # fmt: skip
    drawn = drawn_in(tmp_path / "landscapes")
    assert [found.kind for found in drawn] == ["plane", "line", "between-line", "line"]
    assert [found.about["seed"] for found in drawn] == [0, 1, 0, 0], "asked for last, it is last"
    assert drawn_in(tmp_path / "nothing") == []


def test_a_record_tells_its_circumstances_and_is_json(tmp_path):
    model, data = mlp(), examples(9, (6,), 4)
    path = tmp_path / "sub" / "plane.json"
    drawn = landscape(
        model, data, points=3, dimensions=2, norm="l2", eps=0.5, attack="pgd-3-2:margin", seed=4,
        batch_size=5, store=path, about={"split": "test"},
    )  # fmt: skip
    drawn.losses["clean"][0, 0, 0] = np.nan
    assert drawn.save(path) == path
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["losses"]["clean"][0][0][0] is None
    assert content["losses"]["robust"] == drawn.losses["robust"].tolist()
    assert (content["kind"], content["complete"]) == ("plane", True)
    about = content["about"]
    assert "radius=0.5" in about.pop("attack_settings")
    assert about == {
        "directions": "filter", "parameters": "matrices", "direction_loss": None, "split": "test",
        "grid": [3, 3], "draws": 1, "span": 1.0,
        "losses": ["clean", "robust"], "norm": "l2", "eps": 0.5, "attack": "pgd-3-2:margin",
        "seed": 4, "examples": 9, "batch_size": 5, "batchnorm": "keep", "dtype": "float64",
        "device": "cpu", "versions": {"robustflat": rf.__version__, "torch": torch.__version__},
    }  # fmt: skip
    assert Landscape.load(path).to_dict() == drawn.to_dict()
    assert Landscape.load(path).points == {"model": (0.0, 0.0)}
    given = landscape(model, data, points=3, attack=rf.fgsm("l2", 0.25), norm="linf", eps=0.1)
    assert (given.about["norm"], given.about["eps"]) == ("l2", 0.25), "the attack's own"
    toward = {"directions": "gradient", "direction_loss": "robust", "eps": 0.25}
    about = landscape(model, data, points=3, losses=["clean"], attack="pgd-1", **toward).about
    assert (about["eps"], about["attack"]) == (0.25, "pgd-1"), "which the direction depends on"
    clean = landscape(model, data, points=3, losses=["clean"]).about
    assert clean["norm"] is clean["eps"] is clean["attack"] is clean["attack_settings"] is None


def test_a_loss_that_overflows_is_null(tmp_path):
    model, data = mlp(relu=True).float(), examples(5, (6,), 4)
    drawn = landscape(
        model, (data[0].float(), data[1]), points=3, span=1e30, losses=["clean"],
        store=tmp_path / "l.json",
    )  # fmt: skip
    assert np.isnan(drawn.losses["clean"][0]).tolist() == [True, False, True]
    assert np.isfinite(drawn.accuracies["clean"]).all()
    assert drawn.complete
    # Infinite at one end, not a number at the other: both are unknown, as they are in the file.
    data = torch.full((1, 1), 2.0, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    ends = landscape(Binary([1.0]), data, points=3, span=1.7e308, losses=["clean"])
    assert np.isnan(ends.losses["clean"][0]).tolist() == [True, False, True]


def test_two_commands_do_not_draw_one_landscape_at_once(tmp_path):
    path, tried = tmp_path / "l.json", []

    def other(progress):
        with pytest.raises(rf.UserError, match="Another process"), locked(path, patience=0):
            pass
        tried.append(progress)

    landscape(
        mlp(), examples(5, (6,), 4), points=3, losses=["clean"], store=path, on_progress=other
    )
    assert len(tried) == 3
    with locked(path, patience=0):
        pass


def test_what_is_no_landscape_is_a_sentence(tmp_path):
    bad = tmp_path / "bad.json"
    drawn = landscape(mlp(), examples(5, (6,), 4), points=3, losses=["clean"])
    content = drawn.to_dict()
    for wrong in (
        "not JSON", "[]", "null", json.dumps({**content, "format": "robustflat-landscape/1"}),
        json.dumps({**content, "axes": [[0.0]]}), json.dumps({**content, "losses": {}}),
        json.dumps({**content, "losses": {"clean": [[1.0, "x", 2.0]]}}),
        json.dumps({k: v for k, v in content.items() if k != "about"}),
    ):  # fmt: skip
        bad.write_text(wrong)
        with pytest.raises(rf.UserError, match="does not hold a landscape"):
            Landscape.load(bad)
    with pytest.raises(rf.UserError, match="does not hold a landscape"):
        Landscape.load(tmp_path / "missing.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(rf.UserError, match=r"could not be written|cannot be written"):
        drawn.save(tmp_path / "file" / "l.json")


def _share(rank, port, folder, directions):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank:
        Landscape.save = None  # Only the first may write.
    seen = []
    landscape(
        mlp(), examples(7, (6,), 4), points=5, eps=0.05, attack="pgd-2", directions=directions,
        store=folder, team=Team.of_torchrun(), losses=["clean", "robust_fixed"],
        on_progress=seen.append,
    )  # fmt: skip
    if rank == 0 and directions == "filter":
        # Of 5 points it measured 3, with 2 losses, which count for two processes.
        assert seen[-1].done == pytest.approx(2 * 3 * 2)


@pytest.mark.parametrize("directions", ["filter", "eigenvectors"])
def test_processes_share_the_points_and_find_what_one_finds(tmp_path, directions):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    team = [
        context.Process(target=_share, args=(rank, port, tmp_path, directions)) for rank in (0, 1)
    ]
    for process in team:
        process.start()
    for process in team:
        process.join(60)
    assert [process.exitcode for process in team] == [0, 0]
    (found,) = drawn_in(tmp_path)
    alone = landscape(
        mlp(), examples(7, (6,), 4), points=5, eps=0.05, attack="pgd-2", directions=directions,
        losses=["clean", "robust_fixed"],
    )  # fmt: skip
    for kind in alone.losses:
        assert np.array_equal(found.losses[kind], alone.losses[kind])


# --- the pictures


AXES = ([-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5, 1.0, 1.5])


def surface(slope_x, slope_y, offset=0.0, kinds=("clean", "robust"), **about):
    """Planes over AXES that are linear, which interpolation leaves as they are; robust 4 higher."""
    x, y = np.meshgrid(*AXES, indexing="ij")
    grid = offset + slope_x * x + slope_y * y
    losses = {kind: (grid + 4 * (kind == "robust"))[None] for kind in kinds}
    return Landscape(
        axes=AXES, names=("one", "two"), losses=losses,
        accuracies={kind: grid / 20 for kind, grid in losses.items()},
        points={"model": (0.0, 0.0)}, about=about, measured=15,
    )  # fmt: skip


class Rendered:
    """A figure's pixels, by the data coordinates of its axes."""

    def __init__(self, figure):
        self.canvas = FigureCanvasAgg(figure)
        self.canvas.draw()
        self.pixels = np.asarray(self.canvas.buffer_rgba())

    def at(self, axes, x, y):
        column, row = axes.transData.transform((x, y))
        return self.pixels[len(self.pixels) - 1 - round(row), round(column)][:3] / 255


# Away from labels and contour lines (these are at whole and half numbers of the surface).
SPOTS = ((-0.83, -0.41), (0.87, -0.38), (-0.86, 1.37), (0.88, 1.42), (0.31, 0.77))


def test_planes_are_drawn_upright_on_one_scale_of_colours():
    found = {"AT": surface(1.0, 3.0, 6.1), "AWP": surface(-1.0, 0.5, 5.2)}
    figure = landscape_figure(found, log=False)
    panels, bar = figure.axes[:4], figure.axes[4]
    titles = [panel.get_title() for panel in panels]
    assert titles == [
        "AT: loss, clean",
        "AT: loss, robust",
        "AWP: loss, clean",
        "AWP: loss, robust",
    ]
    # Side by side: in one row clean and robust.
    boxes = [panel.get_subplotspec() for panel in panels]
    assert [(b.rowspan.start, b.colspan.start) for b in boxes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    low, high = 6.1 - 1 - 1.5, 6.1 + 1 + 4.5 + 4
    assert bar.get_ylim() == pytest.approx((low, high))
    assert bar.get_ylabel() == "loss"
    assert len(figure.axes) == 5, "one colour bar"
    norm, picture = Normalize(low, high), Rendered(figure)
    values = [
        lambda x, y: 6.1 + x + 3 * y, lambda x, y: 10.1 + x + 3 * y,
        lambda x, y: 5.2 - x + y / 2, lambda x, y: 9.2 - x + y / 2,
    ]  # fmt: skip
    for panel, value in zip(panels, values, strict=True):
        assert (panel.get_xlabel(), panel.get_xlim()) == ("one", (-1, 1))
        assert panel.get_ylim() == (-0.5, 1.5)
        assert panel.get_aspect() == 1
        hits = [
            np.abs(picture.at(panel, x, y) - viridis(norm(value(x, y)))[:3]).max() for x, y in SPOTS
        ]
        assert sum(hit < 0.03 for hit in hits) >= 4, "all but what a contour line may cover"
        # The lines of equal loss lie where the loss is what their label says.
        lines = next(c for c in panel.collections if len(c.get_edgecolor()) and c.levels.size < 30)
        for level, path in zip(lines.levels, lines.get_paths(), strict=True):
            for x, y in path.vertices[:: max(1, len(path.vertices) // 9)]:
                assert value(x, y) == pytest.approx(level, abs=0.02)
        labels = [float(text.get_text()) for text in panel.texts]
        assert labels
        assert set(labels) <= {float(f"{level:g}") for level in lines.levels}
        (mark,) = panel.lines
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0, 0)
    assert [panels[0].get_ylabel(), panels[2].get_ylabel()] == ["two", "two"]


def test_a_steep_plane_is_drawn_on_a_logarithmic_scale_if_nobody_says_otherwise():
    grid = np.exp(np.add.outer(np.array(AXES[0]) * 3, np.array(AXES[1]) * 2))
    steep = replace(surface(1, 1), losses={"clean": grid[None]})
    figure = landscape_figure({"AT": steep})
    panel, bar = figure.axes
    assert bar.get_yscale() == "log"
    assert bar.get_ylabel() == "loss (logarithmic scale)"
    norm, picture = LogNorm(grid.min(), grid.max()), Rendered(figure)
    hits = [
        np.abs(picture.at(panel, x, y) - viridis(norm(math.exp(3 * x + 2 * y)))[:3]).max()
        for x, y in SPOTS
    ]
    assert sum(hit < 0.03 for hit in hits) >= 4
    assert landscape_figure({"AT": steep}, log=False).axes[1].get_yscale() == "linear"
    assert landscape_figure({"AT": steep}, quantity="accuracies").axes[-1].get_yscale() == "linear"
    flat = surface(1.0, 1.0, 5.0)
    assert landscape_figure({"AT": flat}).axes[-1].get_yscale() == "linear"
    assert landscape_figure({"AT": flat}, log=True).axes[-1].get_yscale() == "log"


def test_what_is_not_finite_is_grey_and_a_flat_plane_is_drawn():
    hole = surface(1.0, 3.0, 6.1, kinds=["clean"])
    hole.losses["clean"][0, 2, 4] = np.nan
    figure = landscape_figure({"AT": hole})
    grey = Rendered(figure).at(figure.axes[0], 0.97, 1.46)
    assert np.abs(grey - 0xBB / 255).max() < 0.01
    Rendered(landscape_figure({"AT": surface(0.0, 0.0, 2.0, kinds=["clean"])}))
    hole.losses["clean"][:] = np.nan
    Rendered(landscape_figure({"AT": hole}))


def line(kinds=("clean", "robust"), draws=3, **about):
    at = np.array(AXES[0])
    grid = np.stack([1 + draw + at**2 for draw in range(draws)])
    return Landscape(
        axes=(AXES[0],), names=("direction",), measured=3 * draws, about=about,
        losses={kind: grid * (1 + (kind == "robust")) for kind in kinds},
        accuracies=dict.fromkeys(kinds, grid / 10), points={"model": (0.0,)},
    )  # fmt: skip


def test_lines_have_a_band_of_one_standard_deviation_around_the_mean():
    about = {"norm": "linf", "eps": 8 / 255, "attack": "pgd-10", "examples": 512, "split": "test",
             "data": "cifar10", "batchnorm": "keep", "directions": "filter"}  # fmt: skip
    figure = landscape_figure({"AT": line(**about), "AWP": line(draws=1, **about)}, log=True)
    (axes,) = figure.axes
    at_robust, at_clean, _, awp_clean = axes.lines
    assert at_robust.get_ydata().tolist() == [6.0, 4.0, 6.0]
    assert awp_clean.get_ydata().tolist() == [2.0, 1.0, 2.0]
    assert at_clean.get_xdata().tolist() == AXES[0]
    colours = [each.get_color() for each in axes.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [each.get_linestyle() for each in axes.lines] == ["-", "--", "-", "--"]
    legend = axes.get_legend()
    said = {t.get_text(): (h.get_color(), h.get_linestyle())
            for t, h in zip(legend.texts, legend.legend_handles, strict=True)}  # fmt: skip
    assert list(said) == ["AT", "AWP", "robust", "clean"]
    assert [said["AT"][0], said["AWP"][0]] == [colours[0], colours[2]]
    assert [said["robust"][1], said["clean"][1]] == ["-", "--"]
    # The losses 1, 2, 3 and twice these deviate by 1 and by 2; a single draw has no band.
    bands = [band.get_paths()[0].get_extents() for band in axes.collections]
    assert [(b.y0, b.y1) for b in bands] == [(2, 8), (1, 4)]
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("direction", "loss")
    said = " ".join(figure.get_supxlabel().split())
    for part in ("linf 8/255", "pgd-10", "512 test images of cifar10", "statistics kept",
                 "standard deviation of 3 directions"):  # fmt: skip
        assert part in said
    accuracies = landscape_figure({"AT": line(draws=1, **about)}, quantity="accuracies")
    assert accuracies.axes[0].get_ylabel() == "accuracy (%)"
    assert accuracies.axes[0].lines[0].get_ydata().tolist() == [20, 10, 20]
    assert accuracies.axes[0].get_yscale() == "linear"
    assert "directions" not in accuracies.get_supxlabel()
    assert accuracies.axes[0].get_title("left") == "Accuracy around the weights"
    picture = Rendered(figure)
    for text in (figure._supxlabel, axes._left_title):
        box = text.get_window_extent(picture.canvas.get_renderer())
        assert box.x0 > 0
        assert box.x1 < picture.pixels.shape[1], "nothing is cut off"


def test_checkpoints_are_named_where_they_are():
    about = {"directions": "checkpoints", "batchnorm": "interpolate", "norm": None, "eps": None}
    through = replace(line(draws=1, **about), points={"a": (-1.0,), "b": (0.5,)})
    figure = landscape_figure({"": through})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    assert [text.xy[0] for text in axes.texts] == [-1.0, 0.5]
    assert [text.get_text() for text in axes.get_legend().texts] == ["robust", "clean"]
    assert [each.get_xdata()[0] for each in axes.lines[2:]] == [-1.0, 0.5]
    assert axes.get_title("left") == "Loss on the line through a and b"
    page = plotly(figures.landscapes({"": through})[0])["layout"]["shapes"]
    assert [(mark["x0"], mark["x1"], mark["label"]["text"]) for mark in page] == [
        (-1.0, -1.0, "a"), (0.5, 0.5, "b")
    ]  # fmt: skip
    assert "robust" not in figure.get_supxlabel()
    plane = replace(surface(1, 1, **about), points={"a": (0.0, 0.0), "b": (0.5, 0.0), "c": (0, 1)})
    figure = landscape_figure({"": plane})
    assert figure.get_suptitle() == "Loss on the plane through a (1), b (2), c (3)"
    names = [t for t in figure.axes[0].texts if t.get_bbox_patch()]
    assert [(t.get_text(), t.xy) for t in names] == [
        ("1", (0, 0)), ("2", (0.5, 0)), ("3", (0, 1))
    ]  # fmt: skip
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in figure.axes[0].lines] == [
        (0, 0), (0.5, 0), (0, 1)
    ]  # fmt: skip


def test_pictures_are_written_and_what_cannot_be_is_a_sentence(tmp_path):
    found = {"AT": line()}
    for ending in ("png", "pdf", "svg"):
        save(landscape_figure(found), path := tmp_path / "o" / f"l.{ending}")
        assert path.stat().st_size > 1000
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "l.docx", tmp_path / "file" / "l.png"):
        with pytest.raises(rf.UserError, match="cannot be written"):
            save(landscape_figure(found), path)
    for wrong in ({}, {"a": line(), "b": surface(1, 1)}):
        with pytest.raises(rf.UserError, match="all lines or all planes"):
            landscape_figure(wrong)
    with pytest.raises(rf.UserError, match="losses or accuracies"):
        landscape_figure(found, quantity="speed")


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("1 or 2 dimensions", {"dimensions": 3}),
        ("points must be odd", {"points": 4}),
        ("span must be positive", {"span": 0.0}),
        ("losses must be some of", {"losses": ["worst"]}),
        ("directions must be one of", {"directions": "pca"}),
        ("direction_loss must be clean or robust", {"direction_loss": "worst"}),
        ("one gradient", {"directions": "gradient", "dimensions": 2}),
        ("draws must be at least 1", {"draws": 0}),
        ("1 for eigenvectors, got 2", {"draws": 2, "directions": "eigenvectors"}),
        ("batchnorm must be one of keep, refresh here", {"batchnorm": "interpolate"}),
        ("batch_size must be at least 1", {"batch_size": 0}),
        ("no setting 'recompute_batchnorm'. Did you mean 'batchnorm'", {"recompute_batchnorm": 1}),
        ("Unknown attack 'square' of a robust loss", {"attack": "square"}),
        ("norm must be", {"norm": "l7"}),
        ("eps must be", {"eps": -1.0}),
        ("losses must be some of", {"losses": []}),
    ],
)
def test_bad_landscapes_are_sentences(message, options):
    with pytest.raises(rf.UserError, match=message):
        landscape(mlp(), examples(5, (6,), 4), **options)


def test_checkpoints_that_span_nothing_are_refused():
    a, data = mlp(), examples(5, (6,), 4)
    middle, far = mlp(), mlp()
    with torch.no_grad():
        for i, m in enumerate((middle, far), 1):
            for p in m.parameters():
                p.mul_(1 + i)
    with pytest.raises(rf.UserError, match="same weights"):
        between(a, {"a": a, "b": mlp()}, data)
    with pytest.raises(rf.UserError, match="on one line"):
        between(a, {"a": a, "b": middle, "c": far}, data)
    with pytest.raises(rf.UserError, match="does not fit the model"):
        between(a, {"a": a, "b": mlp((6, 9, 4))}, data)
    with pytest.raises(rf.UserError, match=r"two [(]a line[)] or three"):
        between(a, {"a": a}, data)
