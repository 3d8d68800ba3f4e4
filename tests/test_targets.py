"""Losses and targets of PGD and APGD: formulas, closed forms, and AutoAttack's own as reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from evaluate_support import evaluate, held_out, linear, trained
from torch import Tensor

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate.attacks import plan
from robustflat.evaluate.attacks.targets import Targets
from robustflat.evaluate.frozen import held
from robustflat.evaluate.threat import Task
from robustflat.perturb.inputs import attack_losses, targeted_losses

INF = math.inf


def test_losses_towards_a_target_are_their_formulas() -> None:
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, t = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 0, 4, 2, 3, 3])
    p = z.exp() / z.exp().sum(1, keepdim=True)
    for i in range(6):
        ranked = sorted(z[i].tolist(), reverse=True)
        ahead = float(z[i, t[i]] - z[i, y[i]])
        expected = {
            "ce": math.log(float(p[i, t[i]])),
            "margin": ahead,
            "probability_margin": float(p[i, t[i]] - p[i, y[i]]),
            "dlr": ahead / (ranked[0] - 0.5 * (ranked[2] + ranked[3])),
        }
        assert set(expected) == set(targeted_losses)
        for name, value in expected.items():
            found = targeted_losses[name](z, torch.stack([y, t], 1))[i]
            assert float(found) == pytest.approx(value, rel=1e-9), name
        wrong = max(float(p[i, k]) for k in range(5) if k != y[i])
        found = attack_losses["probability_margin"](z, y)[i]
        assert float(found) == pytest.approx(wrong - float(p[i, y[i]]), rel=1e-9)


@pytest.mark.parametrize("loss", sorted(targeted_losses))
def test_pgd_climbs_towards_a_target(loss: Any) -> None:
    model, (x, y) = trained(), held_out(20)
    t = (y + 3) % 10
    moved = rf.pgd(eps=0.2, steps=10, loss=loss, restarts=2)(model, x, torch.stack([y, t], 1))
    before, after = (targeted_losses[loss](model(i), torch.stack([y, t], 1)) for i in (x, moved))
    assert (after > before).all()
    reached = (model(moved).argmax(1) == t).float().mean()
    away = rf.pgd(eps=0.2, steps=10)(model, x, y)
    assert reached > (model(away).argmax(1) == t).float().mean()


def unlike(classes: int = 6) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A linear model with weights of very different sizes, and images away from the box."""
    model = linear(classes, (1, 4, 4), seed=3)
    with torch.no_grad():
        model[1].weight.mul_(torch.logspace(-1, 1, classes)[:, None])
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = 0.3 + 0.4 * torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, x, model(x).argmax(1)


def distances(model: Any, x: Tensor, y: Tensor, dual: float) -> Tensor:
    """To the boundary of every class, inf for the label's own; [N, C]."""
    weight, logits = model[1].weight.detach().double(), model(x).detach().double()
    ahead = logits.gather(1, y[:, None]) - logits
    sizes = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=dual, dim=2)
    return (ahead / sizes).masked_fill(torch.arange(len(weight)) == y[:, None], INF)


@pytest.mark.parametrize(("norm", "dual"), [(INF, 1.0), (2.0, 2.0), (1.0, INF)])
def test_malt_ranks_by_the_distance_to_the_boundary_in_the_threat_s_norm(
    norm: float, dual: float
) -> None:
    model, x, y = unlike()
    far = distances(model, x, y, dual)
    found = Targets(ranking="malt", count=5).chosen(model, x, y, norm)
    assert torch.equal(found, far.argsort(1)[:, :5])
    by_logits = Targets(count=9).chosen(model, x, y, norm)
    expected = model(x).scatter(1, y[:, None], -INF).argsort(1, descending=True)[:, :5]
    assert torch.equal(by_logits, expected)
    assert not torch.equal(found, by_logits)
    assert torch.equal(Targets(ranking="malt", count=2).chosen(model, x, y, norm), found[:, :2])


@pytest.mark.parametrize("attack", ["pgd-40:margin", "apgd-40:margin"])
def test_one_target_by_malt_is_all_that_a_linear_model_needs(attack: str) -> None:
    model, x, y = unlike()
    far = distances(model, x, y, 1.0)
    nearest = far.min(1).values
    eps = float(nearest.median())
    keep = (nearest - eps).abs() > 1e-3
    x, y, far, nearest = x[keep], y[keep], far[keep], nearest[keep]
    by_malt = evaluate(model, (x, y), [f"{attack}:malt-1"], eps=eps, sanity=0)
    assert torch.equal(by_malt.outcomes == 0, nearest < eps)
    first = model(x).scatter(1, y[:, None], -INF).argmax(1)
    by_logits = evaluate(model, (x, y), [f"{attack}:logits-1"], eps=eps, sanity=0)
    reach = far.gather(1, first[:, None]).squeeze(1) < eps
    assert (by_logits.outcomes == 0)[reach].all()
    assert by_logits.robust_accuracy > by_malt.robust_accuracy
    # Every further target attacks what is left.
    all_of_them = evaluate(model, (x, y), [f"{attack}:logits-5"], eps=eps, sanity=0)
    assert all_of_them.robust_accuracy == by_malt.robust_accuracy


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.7)])
def test_apgd_is_autoattack_s_where_it_says_so(norm: str, eps: float) -> None:
    model, data = trained(), held_out(24)
    pairs = {
        "apgd": "apgd-ce",
        "apgd-100-1:dlr": "apgd-dlr",
        "apgd:dlr:logits-9": "apgd-t",
    }
    for ours, theirs in pairs.items():
        found = evaluate(model, data, [ours, theirs], norm=norm, eps=eps, sanity=0, batch_size=12)
        one, other = found.attacks.values()
        assert (one.broken, one.outside) == (other.broken, other.outside), ours
        assert 0 < one.broken < one.attacked
        assert found.robust_accuracy == one.accuracy, "the same examples"


def test_a_targeted_apgd_finds_the_images_of_autoattack_s_bit_for_bit() -> None:
    model, (x, y) = trained(), held_out(24)
    task = Task(norm=INF, eps=0.12, classes=10, shape=(1, 8, 8))
    ours, theirs = (plan(name, task)[0].attacks[0] for name in ("apgd:dlr:logits-9", "apgd-t"))
    with held(model):
        right = model(x).argmax(1) == y
        one, other = (attack.run(model, x[right], y[right], 3) for attack in (ours, theirs))
        broken = model(other).argmax(1) != y[right]
    assert 0 < int(broken.sum()) < len(broken)
    assert torch.equal(one[broken], other[broken])


def test_apgd_for_l1_and_with_restarts() -> None:
    model, data = trained(), held_out(30)
    found = evaluate(model, data, ["apgd-3:margin:malt-2", "apgd-3-9:margin:malt-2"], norm="l1",
                     eps=3.0, sanity=0)  # fmt: skip
    once, thrice = found.attacks.values()
    assert once.outside == thrice.outside == 0
    assert 0 < once.broken < thrice.broken
    assert found.robust_accuracy == thrice.accuracy


def names(*requests: Any, classes: int = 10) -> list[str]:
    task = Task(norm=INF, eps=0.1, classes=classes, shape=(1, 8, 8))
    return [suite.attacks[0].name for suite in plan(requests, task)]


def test_names_and_options_of_targets() -> None:
    assert names(
        "pgd-5:margin:malt-3",
        {"name": "pgd-5", "loss": "margin", "ranking": "malt", "targets": 3},
        {"name": "pgd", "targets": 2},
        "apgd:probability_margin",
        {"name": "apgd", "steps": 7, "loss": "margin", "ranking": "malt"},
        {"name": "apgd", "steps": 7, "restarts": 2},
    ) == [
        "pgd-5:margin:malt-3",
        "pgd-20:logits-2",
        "apgd:probability_margin",
        "apgd-7-1:margin:malt-9",
        "apgd-7-2:ce",
    ]
    task = Task(norm=INF, eps=0.1, classes=10, shape=(1, 8, 8))
    told = [
        attack.passes for suite in plan(["apgd-5:ce:malt-3", "pgd-5::logits-2"[:5]], task)
        for attack in suite.attacks
    ]  # fmt: skip
    assert told == [3 + 11 + 3 * 15, 14]


@pytest.mark.parametrize(
    ("request_", "words", "classes"),
    [
        ("pgd-5:margin:nearest-3", "ranked by logits or malt, got 'nearest'", 10),
        ("pgd-5:margin:malt-0", "at least 1, got 0", 10),
        ({"name": "pgd", "targets": "3"}, "at least 1, got '3'", 10),
        ("pgd-5:kl:malt-3", "kl knows no target", 10),
        ("apgd:kl", "apgd has no loss kl", 10),
        ("apgd:nonsense", "must be one of .*probability_margin", 10),
        ("apgd-0", "no step is no attack", 10),
        ({"name": "apgd", "step_size": 3}, "no option 'step_size'", 10),
        ("apgd:dlr:logits-2", "targeted DLR loss needs at least 4 classes, the model has 3", 3),
        ("pgd-5:dlr:malt-1", "targeted DLR loss needs at least 4", 3),
        ("apgd:dlr", "DLR loss needs at least 3 classes, the model has 2", 2),
    ],
)
def test_targets_that_cannot_be_tried_are_refused(request_: Any, words: str, classes: int) -> None:
    with pytest.raises(UserError, match=words):
        names(request_, classes=classes)


def test_with_few_classes_all_wrong_ones_are_the_targets() -> None:
    model = linear(3, (1, 4, 4))
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for ranking in ("logits", "malt"):
        found = Targets(ranking=ranking, count=9).chosen(model, x, model(x).argmax(1), INF)  # type: ignore[arg-type]
        assert found.shape == (5, 2)
