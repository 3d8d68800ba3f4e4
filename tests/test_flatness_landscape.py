from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flatness_models import conv_net, examples, full_hessian, mlp

import robustflat as rf
from robustflat.flatness import Landscape, between, landscape
from robustflat.flatness.directions import filter_normalised
from robustflat.flatness.subject import Subject
from robustflat.report.landscape_figures import landscape_figure, save_html, save_png

torch.set_num_threads(1)


def loss_of(model, data) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(data[0]), data[1]))


def directions(model, seed=0):
    named = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    subject = Subject(model, torch.zeros(1), torch.zeros(1), batch_size=1, seed=seed)
    return named, filter_normalised(subject, named, 2)


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
            assert drawn.losses["clean"][i, j] == pytest.approx(loss_of(model, data), rel=1e-12)
            right = (model(data[0]).argmax(1) == data[1]).double().mean().item()
            assert drawn.accuracies["clean"][i, j] == pytest.approx(right)
    assert drawn.axes == ([-0.5, 0.0, 0.5],) * 2


def test_fixed_and_remade_examples_agree_at_the_centre_and_remade_are_the_worse_elsewhere():
    model, data = mlp(), examples(30, (6,), 4)
    attack = rf.pgd(eps=0.1, steps=20, start="zero", keep="best")
    drawn = landscape(
        model, data, points=5, span=2.0, losses=["clean", "robust", "robust_fixed"], attack=attack
    )
    clean, robust, fixed = (drawn.losses[k] for k in ("clean", "robust", "robust_fixed"))
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
    low, mid, high = drawn.losses["clean"]
    length = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    assert (low - 2 * mid + high) / (h * length) ** 2 == pytest.approx(exact, rel=1e-3)


def test_a_line_meets_both_checkpoints_and_the_middle():
    a, b, data = mlp(seed=0), mlp(seed=1), examples(9, (6,), 4)
    container = mlp(seed=2)
    drawn = between(container, {"a": a, "b": b.state_dict()}, data, losses=["clean"])
    axis, losses = drawn.axes[0], drawn.losses["clean"]
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
    drawn = between(
        models[0], dict(zip("abc", models, strict=True)), data, losses=["clean"], points=13
    )
    x, y = drawn.axes
    assert drawn.losses["clean"][x.index(0.0), y.index(0.0)] == pytest.approx(
        loss_of(models[0], data), rel=1e-14
    )
    assert drawn.losses["clean"][10, y.index(0.0)] == pytest.approx(loss_of(models[1], data))
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
    # The third checkpoint is met when the grid is made of it: buffers go along.
    low, high = points["c"], points["c"]
    alone = between(
        models[0], {"a": models[0], "c": models[2]}, data, losses=["clean"], margin=0.0, points=2
    )
    assert alone.losses["clean"][1] == pytest.approx(loss_of(models[2], data))
    assert (low == high).all()


def test_interpolated_statistics_never_leave_the_checkpoints_range():
    a, b, data = conv_net(0), conv_net(1), examples(9, (1, 4, 4), 3)
    with torch.no_grad():
        b[1].running_var.mul_(100)
    drawn = between(
        a, {"a": a, "b": b}, (data[0].float(), data[1]), losses=["clean"], margin=2.0, points=11
    )
    assert np.isfinite(drawn.losses["clean"]).all()


def test_recomputed_statistics_are_those_of_the_images():
    model, (x, y) = conv_net().double(), examples(10, (1, 4, 4), 3)
    with torch.no_grad():
        model[1].running_mean.add_(5)
    drawn = landscape(
        model, (x, y), points=3, losses=["clean"], recompute_batchnorm=True, batch_size=4
    )
    # By hand: each batch's mean and unbiased variance, weighted by its examples.
    feature = model[0](x).detach()
    parts = feature.split(4)
    mean = sum(len(p) * p.mean((0, 2, 3)) for p in parts) / 10
    var = sum(len(p) * p.transpose(0, 1).flatten(1).var(1) for p in parts) / 10
    hand = conv_net().double()
    with torch.no_grad():
        hand[1].running_mean.copy_(mean)
        hand[1].running_var.copy_(var)
    assert drawn.losses["clean"][1] == pytest.approx(loss_of(hand, (x, y)), rel=1e-9)


def test_landscapes_are_saved_and_read_back(tmp_path):
    model, data = mlp(), examples(9, (6,), 4)
    drawn = landscape(model, data, points=3, dimensions=2, eps=0.05)
    drawn.losses["clean"][0, 0] = np.nan
    for path in drawn.save(tmp_path / "sub" / "plane.v1"):
        assert path.name.startswith("plane.v1.")
        assert Landscape.load(path).to_dict() == drawn.to_dict()
    content = json.loads((tmp_path / "sub" / "plane.v1.json").read_text())
    assert set(content) == {
        "format", "axes", "names", "losses", "accuracies", "points", "about",
    }  # fmt: skip
    assert content["losses"]["clean"][0][0] is None
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"not a landscape")
    with pytest.raises(rf.UserError, match="does not hold a landscape"):
        Landscape.load(bad)
    content["axes"][0].append(1.0)
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(rf.UserError, match="do not fit its axes"):
        Landscape.load(tmp_path / "odd.json")


def test_figures_show_every_loss_and_the_page_needs_nothing_else(tmp_path):
    model, data = mlp(), examples(9, (6,), 4)
    line = landscape(model, data, points=3, eps=0.05)
    runs = {"AT": line, "</script><b>AWP": line}
    axes = landscape_figure(runs, log=True).axes[0]
    assert len(axes.lines) == 4
    assert list(axes.lines[0].get_ydata()) == list(line.losses["clean"])
    assert axes.get_yscale() == "log"
    page = save_html(runs, tmp_path / "o" / "line.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|fetch\(|https?://(?!www\.w3\.org)", page)
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(text.group(1)) == {k: v.to_dict() for k, v in runs.items()}
    plane = landscape(model, data, points=3, dimensions=2, losses=["clean"])
    assert save_png({"AT": plane}, tmp_path / "o" / "plane.png").stat().st_size > 1000
    mesh = landscape_figure({"AT": plane}).axes[0].collections[0]
    assert np.allclose(mesh.get_array(), plane.losses["clean"].T)
    with pytest.raises(rf.UserError, match="cannot be drawn in one"):
        landscape_figure({"a": line, "b": plane})


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("1 or 2 dimensions", {"dimensions": 3}),
        ("points must be odd", {"points": 4}),
        ("span must be positive", {"span": 0.0}),
        ("losses must be some of", {"losses": ["worst"]}),
        ("directions must be one of", {"directions": "pca"}),
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
