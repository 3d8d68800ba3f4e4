"""Attacks of the user's own: judged like any other, and told of when they do what they must not."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import pytest
import torch
from evaluate_support import evaluate, held_out, linear, trained

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate import AttackError

EPS = 0.06


class Norm:
    def __eq__(self, other):
        return other == "linf"

    __hash__ = None


def two_classes(count=40):
    """A linear model of two classes, images that it classifies, and which of them can be broken."""
    model = linear(2, (1, 4, 4))
    x = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    toward = torch.where(y == 0, 1.0, -1.0)[:, None] * w
    worst = (x + EPS * toward.view_as(x).sign()).clamp(0, 1)
    margins = (model(worst) * torch.tensor([-1.0, 1.0])).sum(1) * torch.where(y == 0, 1, -1)
    keep = margins.abs() > 1e-4
    return model, x[keep], y[keep], (margins > 0)[keep]


def steepest(model, x, y, *, seed, eps=EPS, norm="linf"):
    """One step on the margin, exact on a linear model."""
    assert norm == "linf"
    assert x.shape[1:] == (1, 4, 4)
    moved = x.requires_grad_()
    logits = model(moved)
    (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum() * 2 - logits.sum(), moved)
    with torch.no_grad():
        x -= eps * gradient.sign()
    return x.clamp(0, 1)


CALLS: list[int] = []


class Stateful:
    def __init__(self, eps):
        self.eps = eps

    def __call__(self, model, x, y, *, seed):
        return steepest(model, x, y, seed=seed, eps=self.eps)


@pytest.mark.parametrize(
    "attack",
    [
        steepest,
        "test_own_attacks:steepest",
        {"name": "test_own_attacks:steepest", "norm": "linf"},
        {"name": steepest},
        functools.partial(steepest, eps=EPS),
        Stateful(EPS),
        Stateful(EPS).__call__,
    ],
)
def test_an_own_attack_is_judged_like_any_other(attack):
    model, x, y, broken = two_classes()
    assert 0 < int(broken.sum()) < len(x)
    before = x.clone()
    result = evaluate(model, (x, y), [attack], eps=EPS, batch_size=7, sanity=0)
    assert torch.equal(result.outcomes == 0, broken)
    assert not result.warnings
    assert torch.equal(x, before), "it works on copies"


def test_the_package_s_own_attacks_can_be_part_of_one():
    model, data = trained(), held_out(20)
    assert list(model.buffers()), "which attacks keep and put back"

    def attack(model, x, y, *, seed, eps):
        made = rf.pgd(eps=eps, steps=4)
        return made(model, x, y, generator=torch.Generator().manual_seed(seed))

    found = evaluate(model, data, [attack, "pgd-4"], eps=0.15, sanity=0)
    assert found.attacks["attack"].broken == found.attacks["pgd-4"].broken > 0


def test_what_an_own_attack_takes_is_said_to_be_unknown(caplog):
    model, x, y, _ = two_classes()
    right = int((model(x).argmax(1) == y).sum())
    with caplog.at_level("INFO", "robustflat.evaluate"):
        evaluate(model, (x, y), [steepest], eps=EPS, sanity=0)
        evaluate(model, (x, y), [steepest, "pgd-2"], eps=EPS, sanity=0)
    said = [line for line in caplog.messages if "images" in line]
    unknown = "What steepest takes is not known."
    assert f"{right} images. {unknown}" in said
    each = "At most 8 forward-pass equivalents for each of"
    assert f"{each} {right} images: pgd-2 8. {unknown}" in said


def test_eps_and_classes_are_given_to_who_names_them():
    seen = []

    def attack(model, x, y, *, seed, classes, eps, norm, more=3):
        seen.append((classes, eps, norm, more, seed, torch.is_grad_enabled()))
        return x

    model, x, y, _ = two_classes()
    evaluate(model, (x, y), [{"name": attack, "more": 5}], norm="l2", eps=0.5, seed=4, sanity=0)
    assert set(seen) == {(2, 0.5, "l2", 5, 4, True)}


@pytest.mark.parametrize(
    ("wrong", "which"),
    [
        (lambda model, x, y, *, seed: x + 2 * EPS, "all"),
        (lambda model, x, y, *, seed: x - 1.5, "all"),
        # What it does to its images is done to copies.
        (lambda model, x, y, *, seed: x.add_(2 * EPS), "all"),
        (lambda model, x, y, *, seed: x * math.nan, "all"),
        (lambda model, x, y, *, seed: torch.cat([x[:1] * math.inf, x[1:]]), "first"),
    ],
)
def test_what_is_outside_or_not_finite_is_counted_and_said_but_breaks_nothing(wrong, which):
    model, x, y, broken = two_classes()

    def attack(model, x, y, *, seed):
        return wrong(model, x, y, seed=seed)

    count = len(x) if which == "all" else math.ceil(len(x) / 10)
    result = evaluate(model, (x, y), [attack, steepest], eps=EPS, batch_size=10, sanity=0)
    assert result.attacks["attack"].broken == 0
    assert result.attacks["attack"].outside == count
    (sentence,) = result.warnings
    assert sentence.startswith(f"{count} images that attack returned lay outside")
    assert "the 0 that it broke are" in sentence
    assert torch.equal(result.outcomes == 1, broken), "what others find is kept"


def raises(model, x, y, *, seed):
    raise OSError("no more room")


def relabels(model, x, y, *, seed):
    y[0] += 1
    return x


def other_shape(model, x, y, *, seed):
    return x[:1]


def no_tensor(model, x, y, *, seed):
    return None


def retrains(model, x, y, *, seed):
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return x


def rewrites(model, x, y, *, seed):
    next(model.parameters()).data.zero_()
    return x


def recounts(model, x, y, *, seed):
    next(model.buffers()).add_(1)
    return x


def thaws(model, x, y, *, seed):
    next(model.parameters()).requires_grad_()
    return x


def switches(model, x, y, *, seed):
    model.net.train()
    return x


WRONG = [
    (raises, "The attack raises raised OSError: no more room"),
    (relabels, "The attack relabels changed 1 of the 2 labels it was given"),
    (other_shape, r"images of the shape it was given, \[2, 1, 4, 4\], got \[1, 1, 4, 4\]"),
    (no_tensor, "must return images of the shape .* got NoneType"),
    (retrains, "retrains changed the model"),
    (rewrites, "rewrites changed the model"),
    (recounts, "recounts changed the model"),
    (thaws, "thaws changed the model"),
    (switches, "switches changed the model"),
    (lambda model, x: x, r"<lambda> cannot be called: .* f\(model, x, y, \*, seed\)"),
    ({"name": steepest, "esp": 3}, "no option 'esp'. Did you mean 'eps'"),
    ("test_own_attacks:steep", "has no 'steep'. Did you mean"),
    ("nomodule_of_mine:attack", "needs the module nomodule_of_mine"),
    ({"name": 3}, "An attack is a name, a function"),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "sentence"), WRONG)
def test_an_attack_that_cannot_work_costs_nothing(attack, sentence):
    model, x, y, _ = two_classes()
    model.register_buffer("count", torch.zeros(()))
    ran = []

    def other(model, x, y, *, seed):
        ran.append(len(x))
        return x

    with pytest.raises(UserError, match=sentence):
        evaluate(model, (x, y), [other, attack], eps=EPS, sanity=0)
    assert ran in ([], [2]), "but for a trial on two images"
    assert not any(p.requires_grad is False for p in model.parameters())
    assert not model[1].training


def test_what_was_paid_for_is_kept_when_an_attack_fails_on_its_way(tmp_path):
    model, x, y, broken = two_classes()
    calls, healthy = CALLS, [False]
    calls.clear()

    def other(model, x, y, *, seed):
        CALLS.append(len(x))
        return steepest(model, x, y, seed=seed)

    def fails(model, x, y, *, seed):
        if len(x) > 2:
            calls.append(-len(x))
        if not healthy[0] and calls.count(-10) == 2:
            raise RuntimeError("at last")
        return x

    more = {"eps": EPS, "batch_size": 10, "sanity": 0}
    with pytest.raises(AttackError, match=r"fails raised RuntimeError: at last\. .*kept \(1 of its "
                       r"\d batches, other\).*the error's `result`") as raised:  # fmt: skip
        evaluate(model, (x, y), [other, fails], **more)
    assert list(raised.value.result.attacks) == ["other"]
    assert torch.equal(raised.value.result.outcomes == 0, broken)
    calls.clear()
    with pytest.raises(AttackError, match=r"outcomes\.json, and are not run again"):
        evaluate(model, (x, y), [other, fails], store=tmp_path, **more)
    paid = len(calls)
    healthy[0] = True
    result = evaluate(model, (x, y), [other], store=tmp_path, **more)
    assert len(calls) == paid, "nothing was run again"
    assert list(result.attacks) == ["other"]
    assert "fails was interrupted" in result.warnings[0]


def test_every_generator_is_seeded_and_put_back():
    def attack(model, x, y, *, seed):
        noise = random.random() + np.random.rand()
        return (x + 0.3 * (torch.rand(x.shape) - 0.5).sign() * noise / 2).clamp(0, 1)

    model, data = trained(), held_out(100)

    def outcomes(seed):
        return evaluate(model, data, [attack], eps=0.3, seed=seed, sanity=0).outcomes

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = outcomes(0)
    random.random(), np.random.rand(), torch.rand(3)
    assert torch.equal(first, outcomes(0))
    assert not torch.equal(first, outcomes(1))
    random.setstate(before[0])
    np.random.seed(5)
    expected = np.random.get_state()[1].copy()
    torch.set_rng_state(before[2])
    outcomes(1)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], expected)
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_attack_that_was_edited_is_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x, y, broken = two_classes()

    def run(text, attack="edited_attack:attack", **options):
        import sys

        if text is not None:
            (tmp_path / "edited_attack.py").write_text(text)
            sys.modules.pop("edited_attack", None)
        request = {"name": attack, **options}
        return evaluate(model, (x, y), [request], eps=EPS, sanity=0, store=tmp_path)

    does_nothing = "def attack(model, x, y, *, seed, factor=1):\n    return x\n"
    works = (
        "from test_own_attacks import steepest\n"
        "def attack(model, x, y, *, seed, factor=1):\n"
        "    return steepest(model, x, y, seed=seed, eps=0.06 * factor)\n"
    )
    assert list(run(does_nothing).attacks) == ["edited_attack:attack"]
    assert len(run(does_nothing).attacks) == 1
    found = run(works)
    assert list(found.attacks) == ["edited_attack:attack", "edited_attack:attack#2"]
    assert torch.equal(found.outcomes == 1, broken)
    assert len(run(None, factor=0.5).attacks) == 3

    def closing(factor):
        def attack(model, x, y, *, seed):
            return steepest(model, x, y, seed=seed, eps=EPS * factor)

        return attack

    assert len(run(None, closing(0.5)).attacks) == 4
    assert len(run(None, closing(0.5)).attacks) == 4
    assert len(run(None, closing(0.25)).attacks) == 5
    assert len(run(None, functools.partial(steepest, eps=EPS)).attacks) == 6
    assert len(run(None, functools.partial(steepest, eps=EPS / 2)).attacks) == 7
    assert len(run(None, Stateful(EPS)).attacks) == 8
    assert len(run(None, Stateful(EPS / 2)).attacks) == 9
    assert len(run(None, Stateful(EPS / 2)).attacks) == 9
    for i, weight in enumerate((0.0, 0.0, 1.0)):  # a surrogate is its weights
        surrogate = linear(2, (1, 4, 4))
        surrogate[1].weight.data.fill_(weight)

        def transferred(model, x, y, *, seed, surrogate=surrogate):
            return x

        assert len(run(None, transferred).attacks) == 10 + (i == 2)
    # What nobody can compare is never taken for the same.
    for i in range(2):
        assert len(run(None, functools.partial(steepest, eps=EPS, norm=Norm())).attacks) == 12 + i


def test_bf16_search_reaches_own_attacks():
    seen = set()

    def attack(model, x, y, *, seed):
        seen.add(model(x).dtype)
        seen.add(model.bf16)
        return x

    evaluate(trained(), held_out(4), [attack], eps=0.1, precision="bf16", sanity=0)
    assert seen == {torch.float32, True}
