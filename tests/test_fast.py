"""The compiled search: compiled once, judged by the eager model, and off where it cannot be."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_support import evaluate, held_out, shorten, trained
from pyautoattack.fab_projections import projection_linf
from torch import Tensor, nn
from torch._dynamo.utils import counters

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate import fast, scores
from robustflat.perturb.compiled import Compiled

ATTACKS = ["pgd-4", "apgd-10:dlr:malt-2", "autoattack:custom=apgd-ce,fab,fab-t,square"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but the last stage, which takes a compiler and seconds."""
    monkeypatch.setattr(fast, "check_compiler", lambda device: None)
    monkeypatch.setattr(fast, "Compiled", functools.partial(Compiled, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()


def test_all_attacks_search_with_one_compiled_model_of_any_size(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    model, data = trained(), held_out(23)
    more: dict[str, Any] = {"eps": 0.15, "sanity": 0, "batch_size": 9}
    eager = evaluate(model, data, ATTACKS, **more)
    assert not counters["stats"]["unique_graphs"]
    found = evaluate(model, data, ATTACKS, compile=True, **more)
    assert (eager.settings["compiled"], found.settings["compiled"]) == (False, True)
    assert torch.equal(found.outcomes, eager.outcomes)
    assert 0 < found.robust_accuracy < found.clean_accuracy
    # With a gradient and without: batches of all sizes share these, of one image too.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert all(p.requires_grad for p in model.parameters())


def test_robust_flatness_searches_compiled_at_every_weights(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, data = trained(), held_out(20)
    asked: dict[str, Any] = {"eps": 0.15, "attack": "pgd-4", "steps": 3, "restarts": 1}
    asked |= {"batch_size": 9, "store": tmp_path / "parts.jsonl"}
    names = ["worst_clean", "worst_robust"]
    eager = rf.flatness(model, data, names, **asked)
    assert not counters["stats"]["unique_graphs"]
    searched = []
    forward = Compiled.forward
    monkeypatch.setattr(
        Compiled, "forward", lambda net, x: (searched.append(1), forward(net, x))[1]
    )
    found = rf.flatness(model, data, names, compile=True, **asked)
    # Adversarial examples are remade at displaced weights: at the old ones they would be weaker.
    assert len(searched) > 4 * 3
    for name in names:
        assert found[name].value == pytest.approx(eager[name].value, rel=1e-4)
    said = [found[name].details["settings"].get("compiled") for name in names]
    assert (said, eager[names[1]].details["settings"].get("compiled")) == ([None, True], None)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert all(p.requires_grad for p in model.parameters())
    counters.clear()
    rf.flatness(model, data, ["worst_clean"], compile=True, **asked)
    assert not counters["stats"]["unique_graphs"]


def test_robust_flatness_is_measured_by_the_eager_model(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, names = trained(), held_out(20), ["logit_margin", "logit_margin_robust"]
    asked: dict[str, Any] = {"eps": 0.15, "attack": "pgd-4"}
    clean, attacked = (f.value for f in rf.flatness(model, data, names, **asked).values())
    monkeypatch.setattr(fast, "Compiled", Wrong)
    found = rf.flatness(model, data, names, compile=True, **asked)
    # A search that goes the wrong way finds images that the model is surer of.
    assert attacked < clean == found[names[0]].value < found[names[1]].value


def test_one_image_is_computed_as_it_is(quick: None) -> None:
    model, (x, _) = trained(), held_out(3)
    net = Compiled(model, backend="eager", any_size=True)
    for count in (3, 1, 2):
        assert torch.allclose(net(x[:count]), model(x[:count]), atol=1e-6)
        assert net(x[:count]).shape == (count, 10)


class Wrong(nn.Module):
    """A compiled model that computes another function."""

    def __init__(self, model: nn.Module, **_: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = -self.model(x)
        return found


def test_the_eager_model_judges(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "Compiled", Wrong)
    model, data = trained(), held_out(40)
    more: dict[str, Any] = {"eps": 0.15, "sanity": 0}
    # It misclassifies every clean image, and pulls all images to where the true one is right.
    found = evaluate(model, data, ["pgd-4"], compile=True, **more)
    assert found.clean_accuracy > 0.5
    assert found.robust_accuracy > evaluate(model, data, ["pgd-4"], **more).robust_accuracy
    attack = rf.pgd(eps=0.15, steps=4)
    misled, plain = (scores(model, data, attack, fast=is_fast) for is_fast in (True, False))
    assert torch.equal(misled.clean_loss, plain.clean_loss)
    assert misled.robust_loss.mean() < plain.robust_loss.mean()
    assert misled.robust_correct.sum() > plain.robust_correct.sum()


def test_the_gap_is_that_of_the_eager_search(quick: None) -> None:
    model, data, attack = trained(), held_out(30), rf.pgd(eps=0.15, steps=4)
    found = scores(model, data, attack, fast=True)
    assert counters["stats"]["unique_graphs"]
    plain = scores(model, data, attack)
    assert torch.allclose(found.robust_loss, plain.robust_loss, rtol=1e-3)
    assert torch.equal(found.robust_correct, plain.robust_correct)


class Asks(nn.Module):
    """A pass that hangs on a value, which cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x) * (2 if x.sum().item() > -1 else 1)
        return found


def missing(device: torch.device) -> None:
    raise UserError(f"torch.compile does not work on {device}: no compiler.")


@pytest.mark.parametrize("reason", ["no compiler", "cannot compile this model"])
def test_where_it_cannot_be_compiled_the_search_is_the_eager_one_and_this_is_said(
    quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    model = Asks().eval() if reason != "no compiler" else trained()
    if reason == "no compiler":
        monkeypatch.setattr(fast, "check_compiler", missing)
    with caplog.at_level(logging.WARNING, "robustflat"):
        found = evaluate(model, held_out(20), ["pgd-3"], eps=0.15, sanity=0, compile=True)
    assert "The search is not compiled, and takes longer: torch.compile" in caplog.text
    assert reason in caplog.text
    assert not found.settings["compiled"]
    eager = evaluate(model, held_out(20), ["pgd-3"], eps=0.15, sanity=0)
    assert torch.equal(found.outcomes, eager.outcomes)


def test_a_store_tells_the_two_apart(quick: None, tmp_path: Any) -> None:
    model, data = trained(), held_out(10)
    evaluate(model, data, ["fgsm"], eps=0.1, sanity=0, store=tmp_path)
    with pytest.raises(UserError, match="compiled: there False, here True"):
        evaluate(model, data, ["fgsm"], eps=0.1, sanity=0, store=tmp_path, compile=True)


@pytest.mark.parametrize("far", [0.0, 0.02, 1.0, 100.0, 1e5])
def test_the_nearest_point_in_linf_is_that_of_a_linear_program(far: float) -> None:
    from scipy.optimize import linprog

    gen = torch.Generator().manual_seed(0)
    points = torch.rand(6, 12, generator=gen)
    points[:, 0], points[:, 1] = 0, 1
    normals = torch.randn(6, 12, generator=gen)
    normals[:, 2] = 0
    offsets = (normals * points).sum(1) + far * torch.randn(6, generator=gen)
    steps = fast.nearest_linf(points, normals, offsets)
    theirs = projection_linf(points, normals, offsets)
    assert torch.allclose(steps, theirs, atol=1e-6)
    for x, w, b, step in zip(points.double(), normals.double(), offsets.double(), steps,
                             strict=True):  # fmt: skip
        assert (x + step >= -1e-6).all()
        assert (x + step <= 1 + 1e-6).all()
        # Smallest r with |step| <= r in all coordinates; no such program where none reaches it.
        eye, ones = torch.eye(12), torch.ones(12, 1)
        best = linprog(
            [0.0] * 12 + [1.0],
            A_ub=torch.cat([torch.cat([eye, -ones], 1), torch.cat([-eye, -ones], 1)]).numpy(),
            b_ub=[0.0] * 24,
            A_eq=[[*w.tolist(), 0.0]],
            b_eq=[float(b - w @ x)],
            bounds=[(-float(v), 1 - float(v)) for v in x] + [(0, 1)],
        )
        assert best.success == (float(abs(w @ (x + step) - b)) < 1e-4)
        if best.success:
            assert float(step.abs().max()) == pytest.approx(best.fun, abs=1e-6)


def test_fab_projects_without_a_sort_in_a_compiled_search_alone(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    calls = []

    def spy(*given: Tensor) -> Tensor:
        calls.append(len(given[0]))
        return projection_linf(*given)

    monkeypatch.setattr(fast, "nearest_linf", spy)
    model, data = trained(), held_out(20)
    more: dict[str, Any] = {"eps": 0.15, "sanity": 0}
    evaluate(model, data, ["fab-t"], **more)
    assert not calls
    evaluate(model, data, ["fab-t"], compile=True, **more)
    assert calls
    calls.clear()
    evaluate(model, data, ["fab-t"], **more)
    assert not calls
