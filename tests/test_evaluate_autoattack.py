"""AutoAttack bit for bit as the official driver, its traps, and torchattacks behind the adapter."""

from __future__ import annotations

import random
import sys

import numpy as np
import pyautoattack
import pytest
import torch
from evaluate_support import evaluate, held_out, linear, shorten, trained
from torch import nn

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate import evaluation
from robustflat.evaluate.attacks import plan
from robustflat.evaluate.threat import Task
from robustflat.perturb import Ball


@pytest.fixture
def short(monkeypatch):
    return shorten(monkeypatch)


def compare(monkeypatch, driver_class, version, norm, eps, *, attacks=None, count=20, batch=8):
    """Run both; every adversarial image and every outcome must be the same, to the last bit."""
    model, (x, y) = trained(), held_out(count)
    seen = []
    judge = evaluation.judge

    def spy(model, x, candidate, y, **kwargs):
        verdict = judge(model, x, candidate, y, **kwargs)
        seen.extend((c, v) for c, v in zip(candidate, verdict.broken, strict=True) if v)
        return verdict

    monkeypatch.setattr(evaluation, "judge", spy)
    name = f"autoattack:{version}" + (f"={','.join(attacks)}" if attacks else "")
    result = evaluate(model, (x, y), [name], norm, eps, seed=3, batch_size=batch, sanity=0)
    driver = driver_class(
        model, norm=norm.capitalize(), eps=eps, seed=3, version=version, attacks=attacks
    )
    x_adv, _ = driver.run_standard_evaluation(x, y, batch_size=batch)
    standing = model(x_adv).argmax(1) == y
    assert torch.equal(result.outcomes == -1, standing)
    changed = (x_adv - x).flatten(1).abs().amax(1) > 0
    broken = {tuple(image.flatten().tolist()) for image, _ in seen}
    assert broken == {tuple(image.flatten().tolist()) for image in x_adv[changed]}
    assert 0 < len(broken) < count
    return result


@pytest.mark.parametrize(
    ("version", "norm", "eps"),
    [
        ("standard", "linf", 0.2),
        ("standard", "l2", 0.8),
        ("standard", "l1", 1.5),
        ("plus", "linf", 0.2),
        ("rand", "linf", 0.15),
    ],
)
def test_the_official_driver_finds_the_same_images(monkeypatch, short, version, norm, eps):
    result = compare(monkeypatch, short, version, norm, eps)
    assert (
        list(result.attacks)
        == {
            "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
            "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
            "rand": ["apgd-ce", "apgd-dlr"],
        }[version]
    )


@pytest.mark.parametrize("name", ["apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_each_component_alone_finds_the_images_of_the_official_driver(monkeypatch, short, name):
    norm, eps = ("l2", 1.2) if name.startswith("fab") else ("linf", 0.25)
    compare(monkeypatch, short, "custom", norm, eps, attacks=[name])


def test_the_official_driver_finds_the_same_images_with_its_full_budget(monkeypatch):
    compare(
        monkeypatch,
        pyautoattack.AutoAttack,
        "custom",
        "linf",
        0.3,
        attacks=["apgd-ce", "apgd-t"],
        count=8,
    )


def test_fab_has_the_restarts_and_targets_of_the_official_driver(monkeypatch):
    calls = []

    def perturb(self, x, y):
        calls.append((self.targeted, self.n_restarts, self.n_target_classes))
        return x

    monkeypatch.setattr(pyautoattack.autoattack.FABAttack_PT, "perturb", perturb)
    for classes, targets in ((10, 9), (5, 4)):
        model = linear(classes, (1, 4, 4))
        x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        threat = Task(norm=float("inf"), eps=0.1, classes=classes, shape=(1, 4, 4))
        for version, expected in (
            ("standard", [(True, 1, targets)]),
            ("plus", [(False, 5, 9), (True, 1, targets)]),
            ("custom=fab-t", [(True, 1, targets)]),
        ):
            calls.clear()
            for attack in plan([f"autoattack:{version}"], threat)[0].attacks:
                if attack.name.startswith("fab"):
                    attack.run(model, x, model(x).argmax(1), 0)
            assert calls == expected


def test_fast_is_what_its_two_attacks_find_and_standard_after_it_repeats_the_first_alone(short):
    model, data = trained(), held_out(20)
    fast = evaluate(model, data, ["autoattack:fast"], eps=0.2, sanity=0)
    whole = evaluate(model, data, ["autoattack:fast", "autoattack"], eps=0.2, sanity=0)
    assert list(fast.attacks) == ["apgd-ce", "apgd:dlr:malt-3"]
    assert list(whole.attacks) == ["apgd-ce", "apgd:dlr:malt-3", "apgd-t", "fab-t", "square"]
    for name, attack in fast.attacks.items():
        assert whole.attacks[name].accuracy == attack.accuracy
    # Each standard component attacks what those of standard left, whatever else was run.
    alone = evaluate(model, data, ["autoattack"], eps=0.2, sanity=0)
    assert alone.attacks["apgd-t"].attacked == whole.attacks["apgd-t"].attacked
    assert whole.attacks["apgd-t"].after == fast.attacks["apgd:dlr:malt-3"].after == "apgd-ce"
    # By its own name the second is the same attack, with all its steps.
    (suite,), (named,) = (plan([name], Task(norm=2.0, eps=1.0, classes=10, shape=(1, 8, 8)))
                          for name in ("autoattack:fast", "apgd:dlr:malt-3"))  # fmt: skip
    assert suite.attacks[1].identity == named.attacks[0].identity
    plus = evaluate(model, data, ["autoattack", "autoattack:plus"], eps=0.2, sanity=0)
    assert "apgd-ce#2" in plus.attacks, "five restarts are another attack than one"


def test_a_kill_inside_autoattack_resumes_to_the_same_outcomes(short, tmp_path):
    model, data = trained(), held_out(20)
    whole = evaluate(model, data, eps=0.2, batch_size=6, sanity=0)
    batches = []
    for stop in (1, 4):
        done = iter(range(100))

        def progress(*args, done=done, stop=stop):
            if next(done) == stop:
                raise KeyboardInterrupt

        store = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                model, data, eps=0.2, batch_size=6, sanity=0, store=store, on_progress=progress
            )
        again = evaluate(
            model,
            data,
            eps=0.2,
            batch_size=6,
            sanity=0,
            store=store,
            on_progress=lambda *args: batches.append(args),
        )
        assert torch.equal(again.outcomes, whole.outcomes)
    assert batches
    arguments = {"eps": 0.2, "batch_size": 6, "sanity": 0, "store": tmp_path / "x"}

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, **arguments, on_progress=interrupt)
    # What was interrupted waits, does not count, and is not forgotten.
    other = evaluate(model, data, ["fgsm"], **arguments)
    assert list(other.attacks) == ["fgsm"]
    assert "apgd-ce was interrupted" in other.warnings[0]
    assert other.robust_accuracy == other.attacks["fgsm"].accuracy
    again = evaluate(model, data, **arguments)
    assert not again.warnings
    for name, attack in whole.attacks.items():
        assert again.attacks[name].accuracy == attack.accuracy


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
def test_few_classes_run_by_the_documented_rule(short, classes):
    model = linear(classes, (1, 8, 8))
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    cases = [("standard", "linf", 0.02), ("standard", "l2", 0.1), ("standard", "l1", 0.3)]
    cases += [("plus", "linf", 0.02), ("rand", "linf", 0.02), ("fast", "l2", 0.1)]
    for version, norm, eps in cases:
        result = evaluate(model, (x, y), [f"autoattack:{version}"], norm, eps, sanity=0)
        notes = " ".join(result.warnings)
        if classes == 2:
            assert "apgd-t" not in result.attacks
            assert "apgd-dlr" not in result.attacks
            assert "left out" in notes
        if classes == 3 and version != "rand":
            assert "apgd-t" not in result.attacks
            assert "apgd-dlr" in result.attacks
            assert "in place of ap" in notes
            assert version != "fast" or "in place of apgd:dlr:malt-3" in notes
        if classes > 3:
            assert not result.warnings
        assert result.clean_accuracy == 1
    if classes == 2:
        with pytest.raises(UserError, match="None of apgd-t can run with 2 classes"):
            evaluate(model, (x, y), ["autoattack:custom=apgd-t"], sanity=0)


def test_square_is_left_out_of_images_it_cannot_attack(short):
    model = linear(4, (1, 4, 9))
    x = torch.rand(6, 1, 4, 9, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    l2 = evaluate(model, (x, y), norm="l2", eps=0.05, sanity=6)
    assert "square" not in l2.attacks
    assert "4 pixels high" in l2.warnings[0]
    assert "square" in evaluate(model, (x, y), norm="linf", eps=0.01, sanity=0).attacks


def test_tracers_survive(short):
    model, data = trained(), held_out(4)

    def tracer(frame, event, argument):
        return None

    before, profile = sys.gettrace(), sys.getprofile()
    sys.settrace(tracer)
    try:
        evaluate(model, data, eps=0.1, sanity=4)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert sys.getprofile() is profile


# -- torchattacks -----------------------------------------------------------------------------


def test_torchattacks_by_name_with_options_leaves_modes_and_generators_alone(capsys):
    model, data = trained(), held_out(8)
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    result = evaluate(
        model,
        data,
        [
            {"name": "torchattacks:FGSM"},
            {"name": "torchattacks:CW", "c": 2, "steps": 5},
            "torchattacks:DeepFool",
            {"name": "torchattacks:OnePixel", "steps": 1, "popsize": 4},
            {"name": "torchattacks:Square", "n_queries": 5},
        ],
        eps=0.1,
        sanity=0,
    )
    assert list(result.attacks) == [
        f"torchattacks:{name}" for name in ("FGSM", "CW", "DeepFool", "OnePixel", "Square")
    ]
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capsys.readouterr().out == ""
    # The same step as ours, so the same examples.
    ours = evaluate(model, data, ["fgsm"], eps=0.1, sanity=0)
    assert torch.equal(ours.outcomes == 0, result.outcomes == 0)
    # DeepFool looks for the nearest example; what is further than eps does not count.
    alone = evaluate(model, data, ["torchattacks:DeepFool"], "l2", eps=1e-4, sanity=0)
    assert alone.attacks["torchattacks:DeepFool"].broken == 0
    assert (
        alone.attacks["torchattacks:DeepFool"].outside
        == alone.attacks["torchattacks:DeepFool"].attacked
    )
    assert not alone.warnings


def test_an_attack_that_leaves_the_ball_is_not_believed():
    model, data = trained(), held_out(20)
    honest = evaluate(model, data, ["torchattacks:FGSM"], eps=0.02, sanity=0)
    cheat = evaluate(model, data, [{"name": "torchattacks:FGSM", "eps": 0.3}], eps=0.02, sanity=0)
    assert cheat.attacks["torchattacks:FGSM"].broken == 0
    assert cheat.robust_accuracy == cheat.clean_accuracy >= honest.robust_accuracy
    assert "lay outside the ball" in cheat.warnings[0]


def test_torchattacks_on_a_model_without_parameters_and_on_one_it_cannot_attack(capsys):
    class Brightness(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = (x.flatten(1).mean(1) > 0.5).long()
    result = evaluate(Brightness(), (x, y), ["torchattacks:FGSM"], eps=1.0, sanity=0)
    assert result.robust_accuracy == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="torchattacks:PIFGSMPP failed on images of the shape"):
        evaluate(Brightness(), (x, y), ["torchattacks:PIFGSMPP"], eps=0.1, sanity=0)


# -- names ------------------------------------------------------------------------------------


def test_every_form_of_a_request_names_the_same_attack_once():
    threat = Task(norm=float("inf"), eps=0.1, classes=10, shape=(1, 8, 8))
    same = [
        "pgd-20",
        "pgd",
        {"name": "pgd"},
        {"name": "pgd-20"},
        {"name": "pgd", "steps": 20},
        rf.pgd(eps=0.1, steps=20),
    ]
    assert [s.name for s in plan(same, threat)] == ["pgd-20"]
    different = [
        "pgd-20-2",
        "pgd-20:dlr",
        {"name": "pgd", "start": "sphere"},
        rf.pgd(eps=0.1, steps=20, keep="best"),
        "fgsm",
    ]
    assert len(plan(different, threat)) == 5
    listed = {"name": "autoattack", "version": "custom", "attacks": ["apgd-ce", "square"]}
    (a,), (b,) = plan([listed], threat), plan(["autoattack:custom=apgd-ce,square"], threat)
    assert [x.identity for x in a.attacks] == [x.identity for x in b.attacks]
    assert [x.black_box for x in a.attacks] == [False, True]


def test_restarts_are_a_worst_case_and_each_attacks_only_what_stands():
    class Counting(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.rows = net, []

        def forward(self, x):
            self.rows.append(len(x))
            return self.net(x)

    model, (x, y) = Counting(trained()).eval(), held_out(40)
    threat = Task(norm=float("inf"), eps=0.2, classes=10, shape=(1, 8, 8))
    (attack,) = plan(["pgd-1-4"], threat)[0].attacks
    right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    model.rows.clear()
    x_adv = attack.run(model, x, y, 0)
    broken = model.net(x_adv).argmax(1) != y
    assert model.rows[0] == len(x)
    assert sorted(model.rows, reverse=True) == model.rows
    assert model.rows[-1] < len(x)
    assert int(broken.sum()) > len(x) - model.rows[2], "later restarts add to the first"
    size = Ball(float("inf"), 1.0, "row").size([x_adv - x])[0]
    assert float(size.max()) <= 0.2 + 1e-6


def test_autoattack_does_not_depend_on_what_was_asked_for_before_it(short, tmp_path):
    """Attacked are all that the model classifies, in the official driver's own batches."""
    model, data = trained(), held_out(20)
    arguments = {"eps": 0.2, "batch_size": 6, "sanity": 0}
    alone = evaluate(model, data, **arguments)
    evaluate(model, data, ["pgd-5"], **arguments, store=tmp_path)
    after = evaluate(model, data, ["autoattack"], **arguments, store=tmp_path)
    assert list(after.suites) == ["pgd-5", "autoattack"]
    assert after.suites["autoattack"].accuracy == alone.suites["autoattack"].accuracy
    assert alone.suites["autoattack"].accuracy == alone.attacks["square"].accuracy
    assert alone.suites["autoattack"].attacks == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for name, attack in alone.attacks.items():
        for key in ("accuracy", "attacked", "broken", "after"):
            assert getattr(after.attacks[name], key) == getattr(attack, key)
    assert after.robust_accuracy <= alone.robust_accuracy


def test_components_are_attacks_by_name_with_the_settings_of_standard(short):
    model, data = trained(), held_out(20)
    both = evaluate(model, data, ["apgd-ce", "autoattack"], eps=0.2, sanity=0)
    assert list(both.attacks)[:2] == ["apgd-ce", "apgd-t"], "the first is the same in both"
    alone = evaluate(model, data, ["apgd-t"], eps=0.2, sanity=0)
    assert alone.attacks["apgd-t"].alone is not None
    assert both.attacks["apgd-t"].after == "apgd-ce"
    with pytest.raises(UserError, match="no option"):
        evaluate(model, data, [{"name": "apgd-ce", "steps": 3}], eps=0.2, sanity=0)


def test_notes_on_few_classes_stay_when_another_attack_is_added(short, tmp_path):
    model = linear(3, (1, 8, 8))
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    arguments = {"eps": 0.02, "sanity": 0, "store": tmp_path}
    (note,) = evaluate(model, (x, y), **arguments).warnings
    assert evaluate(model, (x, y), ["fgsm"], **arguments).warnings == [note]


@pytest.mark.parametrize("name", ["pgd-5-2", "pgd-4:kl", "apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_an_attack_takes_is_at_most_what_was_said(name, norm):
    class Counting(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.units = net, 0.0

        def forward(self, x):
            self.units += (2 if x.requires_grad and torch.is_grad_enabled() else 1) * len(x)
            return self.net(x)

    model = Counting(linear(4, (1, 5, 5))).eval()
    x = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    task = Task(norm=float("inf") if norm == "linf" else 2.0, eps=1e-4, classes=4, shape=(1, 5, 5))
    (suite,) = plan([name], task)
    model.units = 0
    suite.attacks[0].run(model, x, y, 0)
    assert 0.3 * suite.attacks[0].passes <= model.units / len(x) <= suite.attacks[0].passes
