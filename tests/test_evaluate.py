"""Evaluation: exact figures on linear models, resuming, shards, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from evaluate_support import empty_record, evaluate, held_out, linear, trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import robustflat as rf
import robustflat.data
from robustflat.errors import UserError
from robustflat.evaluate import judge, measure, merge, wilson

INF = math.inf


def state_of(model):
    return (
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def same(left, right):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


# -- exact figures ----------------------------------------------------------------------------


def breakable_linf(model, x, y, eps):
    """Exactly which examples of a linear model some image of ball and box misclassifies.

    The margin to every wrong class is a sum over pixels, each of which is least at an end of its
    own interval [max(0, x - eps), min(1, x + eps)].
    """
    weight, bias = model[1].weight.double(), model[1].bias.double()
    flat = x.flatten(1).double()
    low, high = (flat - eps).clamp_min(0), (flat + eps).clamp_max(1)
    least = torch.full((len(x),), INF, dtype=torch.float64)
    for other in range(weight.shape[0]):
        w = weight[y] - weight[other]
        margin = (torch.where(w > 0, low, high) * w).sum(1) + bias[y] - bias[other]
        least = torch.where(y == other, least, torch.minimum(least, margin))
    return least


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_linf_accuracy_of_a_linear_model_is_the_closed_form(classes):
    model = linear(classes, (1, 4, 4))
    x = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    eps = 0.06
    least = breakable_linf(model, x, y, eps)
    # None so near to the boundary that rounding decides.
    keep = least.abs() > 1e-4
    x, y, least = x[keep], y[keep], least[keep]
    result = evaluate(
        model, (x, y), ["autoattack:custom=apgd-ce,apgd-t,fab-t"], "linf", eps, sanity=0
    )
    expected = int((least > 0).sum())
    assert 0 < expected < len(x)
    assert result.clean_accuracy == 1
    assert result.robust_accuracy == expected / len(x)
    assert torch.equal(result.outcomes == -1, least > 0)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("l1", INF)])
def test_l2_and_l1_accuracy_of_a_two_class_linear_model_is_the_distance_to_the_plane(norm, dual):
    model = linear(2, (1, 4, 4))
    x = 0.3 + 0.4 * torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    w = (model[1].weight[0] - model[1].weight[1]).double()
    logits = model(x).double()
    distance = (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(w, ord=dual)
    eps = 0.2  # the nearest point of the plane is inside the box
    keep = (distance - eps).abs() > 2e-3
    x, y, distance = x[keep], y[keep], distance[keep]
    result = evaluate(model, (x, y), ["autoattack:custom=fab-t"], norm, eps, sanity=0)
    expected = distance > eps
    assert 0 < int(expected.sum()) < len(x)
    assert torch.equal(result.outcomes == -1, expected)


def test_pgd_and_fgsm_are_exact_on_a_two_class_linear_model():
    model = linear(2, (3, 3, 3))
    x = torch.rand(80, 3, 3, 3, generator=torch.Generator().manual_seed(3))
    y = model(x).argmax(1)
    least = breakable_linf(model, x, y, 0.05)
    keep = least.abs() > 1e-4
    for name in ("fgsm", "pgd-20", "pgd-10-2:margin"):
        result = evaluate(model, (x[keep], y[keep]), name, "linf", 0.05, sanity=0)
        assert torch.equal(result.outcomes == -1, least[keep] > 0)


def test_eps_zero_is_the_clean_accuracy_and_each_figure_says_what_it_counts():
    model, (x, y) = trained(), held_out(60)
    clean = float((model(x).argmax(1) == y).double().mean())
    zero = evaluate(model, (x, y), ["pgd-5", "autoattack"], eps=0, sanity=0)
    assert zero.robust_accuracy == zero.clean_accuracy == clean < 1
    counted = Interrupting(model)
    evaluate(counted, (x, y), ["pgd-5"], eps=0, sanity=0)
    assert counted.calls == 2, "once clean, once to judge"

    result = evaluate(model, (x, y), ["fgsm", "pgd-20"], eps=0.2, sanity=0, batch_size=25)
    first, second = result.attacks.values()
    right = round(clean * 60)
    assert list(result.attacks) == ["fgsm", "pgd-20"]
    assert first.attacked == right
    # Each attack is on its own, on all that the model classifies.
    assert second.attacked == right
    assert first.alone == first.accuracy == (right - first.broken) / 60
    assert second.alone == second.accuracy == (right - second.broken) / 60
    assert first.after is second.after is None
    both = (result.outcomes >= 0).double().mean()
    assert result.robust_accuracy == pytest.approx(clean - float(both))
    assert result.robust_accuracy <= min(first.accuracy, second.accuracy)
    assert {name: suite.accuracy for name, suite in result.suites.items()} == {
        name: attack.accuracy for name, attack in result.attacks.items()
    }
    # The figure of FGSM, computed here by its formula.
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    x_adv = (x + 0.2 * g.sign()).clamp(0, 1)
    both = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert torch.equal((result.outcomes == -1) | (result.outcomes == 1), both)
    alone = evaluate(model, (x, y), ["pgd-20"], eps=0.2, sanity=0, batch_size=25)
    assert alone.attacks["pgd-20"].broken == second.broken
    assert torch.equal(result.outcomes == -1, both & (alone.outcomes == -1))
    content = result.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_worst_case_over_attacks_equals_the_intersection_of_what_survives_each():
    model, data = trained(), held_out(40)
    # Without random starts, so that compacting the batches changes nothing.
    requests = [
        {"name": "pgd", "steps": 3, "start": "zero", "loss": "margin"},
        "fgsm",
        {"name": "pgd", "steps": 8, "start": "zero"},
    ]
    alone = [evaluate(model, data, [r], eps=0.15, sanity=0) for r in requests]
    together = evaluate(model, data, requests, eps=0.15, sanity=0)
    survive_all = torch.stack([r.outcomes == -1 for r in alone]).all(0)
    assert torch.equal(together.outcomes == -1, survive_all)
    assert together.robust_accuracy < max(r.robust_accuracy for r in alone)


def test_wilson_interval_is_the_solution_of_its_equation():
    z = 1.959963984540054
    for k, n in [(0, 10), (3, 10), (10, 10), (431, 1000)]:
        low, high = wilson(k, n)
        for p in (low, high):
            if 0 < p < 1:
                assert (k / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, rel=1e-9)
        assert 0 <= low <= k / n <= high <= 1
    with pytest.raises(ValueError, match="proportion"):
        wilson(3, 2)


def test_measure_gives_loss_and_accuracy_and_touches_nothing():
    model, (x, y) = trained(), held_out(50)
    model.train()
    model[1].eval()
    before, rng = state_of(model), torch.get_rng_state()
    batches = list(zip(x.split(20), y.split(20), strict=True))
    clean = measure(model, batches)
    attacked = measure(model, batches, rf.pgd(eps=0.1, steps=3))
    assert same(before, state_of(model))
    assert torch.equal(rng, torch.get_rng_state())
    model.eval()
    assert clean.count == 50
    assert clean.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert clean.accuracy == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert attacked.loss > clean.loss
    with pytest.raises(UserError, match="no example"):
        measure(model, [])


# -- the judge --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [INF, 2.0, 1.0])
def test_the_judge_takes_no_example_that_is_out_of_ball_or_box_or_well_classified(norm):
    class Threshold(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([mean * 0, mean - 0.5], 1)

    eps = 0.1
    x = torch.full((6, 1, 2, 2), 0.49)
    step = torch.zeros_like(x)
    size = eps if norm == INF else eps / 4 ** (1 / norm)
    step[0] = size  # on the surface of the ball, misclassified
    step[1] = size * 1.5  # misclassified, but outside
    step[2] = -size  # inside, but well classified
    step[3] = size * (1 + 1e-5)  # outside by rounding: pulled in, still misclassified
    step[4] = math.nan
    y = torch.zeros(6, dtype=torch.int64)
    x[5] = 0.98
    y[5] = 1
    step[5] = 0.03 if norm == INF else size  # beyond the box
    verdict = judge(Threshold(), x, x + step, y, norm=norm, eps=eps)
    assert verdict.broken.tolist() == [True, False, False, True, False, False]
    assert verdict.outside.tolist() == [False, True, False, False, True, True]
    distance = torch.linalg.vector_norm(
        (verdict.x_adv.double() - x.double()).flatten(1), ord=norm, dim=1
    )
    assert float(distance.max()) <= eps * (1 + 1e-6)
    assert float(verdict.x_adv.min()) >= 0
    assert float(verdict.x_adv.max()) <= 1


@pytest.mark.parametrize("norm", [INF, 2.0, 1.0])
def test_a_pulled_in_example_is_inside_in_exact_arithmetic(norm):
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(200, 3, 8, 8, generator=generator)
    delta = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    sizes = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1).view(-1, 1, 1, 1)
    eps = 1 / 255
    candidate = (x + delta / sizes * eps * (1 + 5e-4)).clamp(0, 1).float()
    model = linear(2, (3, 8, 8))
    verdict = judge(model, x, candidate, model(x).argmax(1), norm=norm, eps=eps)
    distance = torch.linalg.vector_norm(
        (verdict.x_adv.double() - x.double()).flatten(1), ord=norm, dim=1
    )
    assert not bool(verdict.outside.any())
    assert float(distance.max()) <= eps * (1 + 1e-6)
    assert float((distance / eps).median()) > 0.99


# -- resuming, adding, sharding ---------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a kill, but within the test's process."""


class Interrupting(nn.Module):
    """Passes its input through a model, and dies at one forward pass."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls, self.fatal = net, 0, -1

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fatal:
            raise Killed
        return self.net(x)


def test_a_killed_evaluation_resumes_to_the_same_outcomes_wherever_it_died(tmp_path):
    model, data = Interrupting(trained()).eval(), held_out(30)
    weak = {"name": "pgd", "steps": 1, "step_size": 0.03, "restarts": 2}
    attacks = [weak, "pgd-6:margin"]
    arguments = {"eps": 0.15, "batch_size": 8, "sanity": 0, "seed": 5}
    whole = evaluate(model, data, attacks, **arguments)
    total = model.calls
    assert len(set(whole.outcomes.tolist())) == 4
    for number in range(1, total, 4):
        store = tmp_path / f"{number}"
        model.calls, model.fatal = 0, number
        before, rng = state_of(model), torch.get_rng_state()
        with pytest.raises(Killed):
            evaluate(model, data, attacks, store=store, **arguments)
        assert same(before, state_of(model))
        assert torch.equal(rng, torch.get_rng_state())
        model.fatal = -1
        model.calls = 0
        again = evaluate(model, data, attacks, store=store, **arguments)
        assert torch.equal(again.outcomes, whole.outcomes)
        assert again.robust_accuracy == whole.robust_accuracy
        assert [(a.attacked, a.broken) for a in again.attacks.values()] == [
            (a.attacked, a.broken) for a in whole.attacks.values()
        ]
        if number > total * 0.8:
            assert model.calls < total / 2, "what was done must not be done again"


def test_a_process_killed_for_good_leaves_a_store_that_goes_on(tmp_path):
    script = """
        import os, signal, sys, torch
        from torch import nn
        from robustflat.evaluate import Work, evaluate
        def progress(name, done, total, standing):
            if name == "pgd-9" and done == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        def go(store=None, on_progress=None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
            data = torch.rand(40, 1, 8, 8), torch.randint(4, (40,))
            work = Work(batch_size=4, sanity=0, on_progress=on_progress)
            return evaluate(model, data, ["fgsm", "pgd-9"], eps=0.004, store=store, work=work)
        if __name__ == "__main__":
            torch.set_num_threads(1)
            go(store=sys.argv[1], on_progress=progress)
    """
    code = textwrap.dedent(script)
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    content = json.loads((tmp_path / "outcomes.json").read_text())
    assert content["attacks"][1]["batches"] == 1
    here = {"__name__": "here"}
    exec(code, here)
    resumed, whole = here["go"](store=tmp_path), here["go"]()
    assert torch.equal(resumed.outcomes, whole.outcomes)
    assert whole.attacks["pgd-9"].attacked > 4
    assert len(set(whole.outcomes.tolist())) > 2


def test_an_attack_added_later_is_run_alone_and_adds_to_the_record(tmp_path):
    model, data = trained(), held_out(30)
    arguments = {"eps": 0.15, "sanity": 0, "store": tmp_path / "record.json"}
    first = evaluate(model, data, ["fgsm"], **arguments)
    second = evaluate(model, data, ["pgd-10"], **arguments)
    assert list(second.attacks) == ["fgsm", "pgd-10"]
    assert second.attacks["pgd-10"].attacked == int((first.outcomes != -2).sum())
    assert second.attacks["fgsm"].broken == first.attacks["fgsm"].broken
    calls = []
    third = evaluate(model, data, ["fgsm", "pgd-10"], **arguments, on_progress=calls.append)
    assert not calls, "both are on record"
    assert torch.equal(third.outcomes, second.outcomes)
    together = evaluate(model, data, ["fgsm", "pgd-10"], eps=0.15, sanity=0)
    assert torch.equal(together.outcomes, third.outcomes)


def test_a_store_of_another_evaluation_is_refused_and_left_alone(tmp_path):
    model, (x, y) = trained(), held_out(20)
    store = tmp_path / "record.json"
    evaluate(model, (x, y), ["fgsm"], eps=0.1, sanity=0, store=store)
    saved = store.read_bytes()
    with pytest.raises(UserError, match=r"eps: there 0\.1, here 0\.2"):
        evaluate(model, (x, y), ["fgsm"], eps=0.2, sanity=0, store=store)
    with pytest.raises(UserError, match="does the loader shuffle"):
        evaluate(model, (x.flip(0), y), ["fgsm"], eps=0.1, sanity=0, store=store)
    other = trained()
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    with pytest.raises(UserError, match="model: there"):
        evaluate(other, (x, y), ["fgsm"], eps=0.1, sanity=0, store=store)
    assert store.read_bytes() == saved
    for damage in (
        saved[:-20],
        b"",
        b"[]",
        b'{"format": "x"}',
        saved.replace(b'"right"', b'"r"'),
    ):
        store.write_bytes(damage)
        with pytest.raises(UserError, match="not an outcomes file"):
            evaluate(model, (x, y), ["fgsm"], eps=0.1, sanity=0, store=store)
        assert store.read_bytes() == damage


def test_shards_merge_to_the_count_over_all_of_them(tmp_path):
    model, data = trained(), held_out(31)
    arguments = {"eps": 0.15, "sanity": 0, "samples": 27}
    parts = [
        evaluate(model, data, ["fgsm", "pgd-10"], **arguments, shard=f"{i}/3", store=tmp_path)
        for i in (1, 2, 3)
    ]
    whole = merge(tmp_path)
    assert whole.count == 27 == sum(part.count for part in parts)
    standing = sum(round(part.robust_accuracy * part.count) for part in parts)
    assert whole.robust_accuracy == standing / 27
    broken = sum(part.attacks["pgd-10"].broken for part in parts)
    assert whole.attacks["pgd-10"].broken == broken
    # FGSM does not depend on the batch: there the merged outcomes are those of one run.
    one = evaluate(model, data, ["fgsm"], **arguments)
    assert torch.equal(one.outcomes == 0, whole.outcomes == 0)
    assert torch.equal(one.outcomes == -2, whole.outcomes == -2)
    for i, part in enumerate(parts):
        assert torch.equal(whole.outcomes[i::3], part.outcomes)
    (tmp_path / "outcomes-2-of-3.json").unlink()
    with pytest.raises(UserError, match="missing: 2/3"):
        merge(tmp_path)
    with pytest.raises(UserError, match="no shards"):
        merge(tmp_path / "nowhere")


def test_of_a_split_of_a_data_set_only_the_chosen_images_are_read():
    data = robustflat.data.load("digits")
    model = trained()
    x, y = data.test.tensors()
    reads = []

    class Watched(type(data.test)):
        def fetch(self, indices):
            reads.append(len(indices))
            return super().fetch(indices)

    watched = Watched(data.test.fetch(torch.arange(len(data.test))), data.test.labels)
    for arguments in ({"samples": 20}, {"samples": 20, "shard": "2/3"}, {"shard": "1/40"}):
        wanted = evaluate(model, (x, y), ["fgsm"], sanity=0, **arguments)
        found = evaluate(model, data.test, ["fgsm"], sanity=0, **arguments)
        assert torch.equal(found.outcomes, wanted.outcomes)
        assert found.count < len(x)
    reads.clear()
    evaluate(model, watched, [], samples=20, sanity=0)
    assert sum(reads) <= 20


def test_samples_are_balanced_and_always_the_same():
    model = linear(4, (1, 3, 3))
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (200,), generator=generator).sort().values
    x = torch.rand(200, 1, 3, 3, generator=generator)
    # Images that tell their class, so that the clean accuracy of a constant model counts them.
    model[1].weight.data.zero_()
    model[1].bias.data.copy_(torch.tensor([1.0, 0, 0, 0]))
    for seed in (0, 1):
        result = evaluate(model, (x, y), [], samples=40, seed=seed, sanity=0)
        assert result.clean_accuracy == 10 / 40


def test_bf16_search_is_verified_in_float32_and_named(tmp_path):
    model, data = trained(), held_out(24)
    store = tmp_path / "r.json"
    fast = evaluate(model, data, ["pgd-10"], eps=0.15, sanity=0, precision="bf16", store=store)
    assert list(fast.attacks) == ["pgd-10@bf16"]
    assert "bfloat16" in fast.warnings[0]
    both = evaluate(model, data, ["pgd-10"], eps=0.15, sanity=0, store=store)
    full = evaluate(model, data, ["pgd-10"], eps=0.15, sanity=0)
    assert list(both.attacks) == ["pgd-10@bf16", "pgd-10"]
    assert both.attacks["pgd-10"].accuracy == full.robust_accuracy
    assert both.robust_accuracy <= min(fast.robust_accuracy, full.robust_accuracy)
    # What was found in full precision too is beyond doubt; a note on the rest stays.
    assert not both.warnings
    more = {"eps": 0.15, "sanity": 0, "store": store}
    evaluate(model, data, ["pgd-4"], precision="bf16", **more)
    for attacks in (["fgsm"], ["pgd-10"]):
        (note,) = evaluate(model, data, attacks, **more).warnings
        assert note.startswith("pgd-4@bf16 searched in bfloat16")


# -- the model is left as it was; data in every form ------------------------------------------


def test_the_model_its_gradients_and_all_randomness_are_as_before():
    model, data = trained(), held_out(3)
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before, rng = state_of(model), torch.get_rng_state()
    result = evaluate(model, data, ["pgd-2", "autoattack:custom=fab-t"], eps=0.1, sanity=2)
    assert same(before, state_of(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert any("train mode" in sentence for sentence in result.warnings)
    eval_mode = evaluate(trained(), data, ["pgd-2"], eps=0.1, sanity=0)
    assert torch.equal(result.outcomes == 0, eval_mode.outcomes == 0)
    assert torch.equal(result.outcomes == -2, eval_mode.outcomes == -2)


def test_buffers_come_back_and_the_caller_s_autocast_and_inference_mode_stay_outside():
    class Watching(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            self.register_buffer("calls", torch.zeros(()))
            self.seen = set()

        def forward(self, x):
            self.calls += 1
            self.seen.add((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
            return self.net(x)

    model, data = Watching(trained()).eval(), held_out(6)
    plain = evaluate(model, data, ["pgd-4"], eps=0.2, sanity=4)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        ambient = evaluate(model, data, ["pgd-4"], eps=0.2, sanity=4)
    assert torch.equal(ambient.outcomes, plain.outcomes)
    assert model.seen == {(False, False)}
    assert float(model.calls) == 0
    measure(model, [data])
    assert float(model.calls) == 0
    with torch.inference_mode():
        made_inside = trained()
    with pytest.raises(UserError, match=r"made inside torch\.inference_mode"):
        evaluate(made_inside, data, ["pgd-4"])


def test_loaders_and_other_types_give_the_same_figures():
    model, (x, y) = trained(), held_out(21)
    wanted = evaluate(model, (x, y), ["pgd-3"], eps=0.1, sanity=0)
    for data in (
        DataLoader(TensorDataset(x, y), batch_size=8),
        TensorDataset(x, y),
        (x.double(), y.int()),
    ):
        found = evaluate(model, data, ["pgd-3"], eps=0.1, sanity=0)
        assert torch.equal(found.outcomes, wanted.outcomes)


def test_layouts_that_break_autoattack_give_the_same_figures():
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = conv(x).argmax(1)
    attack = "autoattack:custom=apgd-dlr"
    wanted = evaluate(conv, (x, y), attack, eps=0.001, sanity=0)
    assert 0 < wanted.robust_accuracy < 1
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    for images in (strided, x.to(memory_format=torch.channels_last)):
        found = evaluate(conv, (images, y), attack, eps=0.001, sanity=0)
        assert torch.equal(found.outcomes, wanted.outcomes)
    conv.to(memory_format=torch.channels_last)
    found = evaluate(conv, (x, y), attack, eps=0.001, sanity=0)
    assert found.robust_accuracy == wanted.robust_accuracy


def diverged():
    model = linear(3, (1, 3, 3))
    model[1].bias.data[1] = math.nan
    return model


IMAGES = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": (IMAGES * 2, LABELS)}, r"must be in \[0, 1\]"),
        ({"data": (IMAGES - 0.5, LABELS)}, r"must be in \[0, 1\]"),
        ({"data": (IMAGES.log() * 0 / 0, LABELS)}, r"must be in \[0, 1\]"),
        ({"data": ((IMAGES * 255).byte(), LABELS)}, "Divide bytes by 255"),
        ({"data": (IMAGES.flatten(1), LABELS)}, "four dimensions"),
        ({"data": (IMAGES[:0], LABELS[:0])}, "nothing to evaluate"),
        ({"data": (IMAGES, LABELS + 1)}, "has 3 classes, numbered from 0"),
        ({"data": (IMAGES, LABELS - 1)}, "must not be negative"),
        ({"data": (IMAGES, LABELS.float())}, "whole numbers"),
        ({"seed": 2**63}, r"below 2\^63"),
        ({"data": (IMAGES, F.one_hot(LABELS))}, "one class per image"),
        ({"data": (IMAGES, LABELS[:4])}, "one class per image"),
        ({"data": 3}, "loader"),
        ({"data": []}, "loader is empty"),
        ({"data": (torch.rand(6, 2, 3, 3), LABELS)}, "cannot classify images of the shape"),
        ({"model": diverged()}, "returns NaN for 6 of 6 images"),
        ({"model": nn.Identity()}, "must return logits"),
        ({"model": linear(3, (1, 3, 3)).double()}, "evaluated in float32"),
        ({"model": len}, r"must be a torch\.nn\.Module"),
        ({"eps": -1}, "finite number >= 0"),
        ({"eps": math.nan}, "finite number >= 0"),
        ({"norm": "l3"}, "'linf', 'l2' or 'l1'"),
        ({"norm": 3}, "'linf', 'l2' or 'l1'"),
        ({"precision": "fp8"}, "precision"),
        ({"batch_size": 0}, "batch_size"),
        ({"samples": 7}, "7 samples of 6"),
        ({"shard": "0/2"}, "i from 1 to n"),
        ({"shard": "a"}, "written i/n"),
        ({"shard": "1/7"}, "cannot be split into 7"),
        ({"attacks": "pdg-20"}, "Unknown attack 'pdg-20'. Did you mean 'pgd-20'"),
        ({"attacks": [{"name": "pgd", "step": 3}]}, "no option 'step'. Did you mean 'steps'"),
        ({"attacks": [{"steps": 3}]}, "under 'name'"),
        ({"attacks": [rf.pgd(eps=0.2)]}, "same norm and eps"),
        ({"attacks": [rf.pgd("l2", eps=0.1)]}, "same norm and eps"),
        ({"attacks": "pgd-5:nonsense"}, "loss"),
        ({"attacks": [{"name": "pgd", "restarts": 2, "start": "zero"}]}, "restarts"),
        ({"attacks": "autoattack:best"}, "versions are standard"),
        ({"attacks": "autoattack:custom=apgd"}, "custom AutoAttack is written"),
        ({"attacks": "autoattack:custom"}, "custom AutoAttack is written"),
        ({"attacks": "torchattacks:AutoAttack"}, "is not AutoAttack"),
        ({"attacks": "torchattacks:GWD"}, "no attack 'GWD'"),
        ({"attacks": [{"name": "torchattacks:CW", "cc": 1}]}, "no option 'cc'"),
    ],
)
def test_what_cannot_work_is_one_sentence(change, sentence):
    arguments = {
        "model": linear(3, (1, 3, 3)),
        "data": (IMAGES, LABELS),
        "attacks": ["fgsm"],
        "eps": 0.1,
        **change,
    }
    with pytest.raises(UserError, match=sentence) as raised:
        evaluate(**arguments)
    assert "\n" not in str(raised.value)


def test_a_store_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        evaluate(linear(3, (1, 3, 3)), (IMAGES, LABELS), ["fgsm"], store=tmp_path / "file" / "sub")


# -- what a mutation of the code once survived ------------------------------------------------


class Bright(nn.Module):
    """Class 1 for images brighter than `threshold` on average, else class 0."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([mean * 0, mean - self.threshold], 1)


@pytest.mark.parametrize("norm", [INF, 2.0, 1.0])
@pytest.mark.parametrize(
    ("over", "counts"), [(0.0, True), (5e-4, True), (2e-3, False), (0.02, False)]
)
def test_how_far_outside_the_ball_an_example_still_counts(norm, over, counts):
    eps, x = 0.1, torch.full((1, 1, 2, 2), 0.5)
    step = eps / 4 ** (0 if norm == INF else 1 / norm)
    y = torch.zeros(1, dtype=torch.int64)
    found = judge(Bright(0.501), x, x + step * (1 + over), y, norm=norm, eps=eps)
    assert found.broken.tolist() == [counts]
    assert found.outside.tolist() == [not counts]
    # Also where the image itself was misclassified before.
    before = judge(Bright(0.4), x, x + step * (1 + over), y, norm=norm, eps=eps)
    assert before.broken.tolist() == [counts]


@pytest.mark.parametrize(("pixel", "counts"), [(1.0, True), (1 + 5e-7, True), (1.0001, False)])
@pytest.mark.parametrize("dark", [False, True])
def test_a_pixel_beyond_the_box_does_not_count(pixel, counts, dark):
    x = torch.full((1, 1, 2, 2), 0.95)
    candidate = x.clone()
    candidate[0, 0, 0, 0] = pixel
    y = torch.zeros(1, dtype=torch.int64)
    if dark:
        x, candidate, y = 1 - x, 1 - candidate, 1 - y
    found = judge(Bright(0.04 if dark else 0.96), x, candidate, y, norm=INF, eps=0.1)
    assert found.broken.tolist() == [counts]
    assert float(found.x_adv.min()) >= 0
    assert float(found.x_adv.max()) <= 1
    just = judge(Bright(0.04 if dark else 0.96), x, candidate, y, norm=INF, eps=0.05 + 1e-6)
    assert just.broken.tolist() == [counts]


def test_a_logit_that_is_not_a_number_is_never_right():
    from robustflat.evaluate.accuracy import right

    logits = torch.tensor([[math.nan, 0.0], [0.0, math.nan], [1.0, 0.0], [math.nan, math.nan]])
    assert right(logits, torch.tensor([0, 0, 0, 1])).tolist() == [False, False, True, False]


def test_what_the_bf16_search_finds_is_judged_by_the_model_in_float32():
    class Liar(nn.Module):
        """Wrong about everything under autocast, and about nothing without it."""

        def forward(self, x):
            logits = torch.stack([x.flatten(1).mean(1) * 0 + 1, x.flatten(1).mean(1) * 0], 1)
            return -logits if torch.is_autocast_enabled("cpu") else logits

    x, y = torch.rand(6, 1, 3, 3), torch.zeros(6, dtype=torch.int64)
    found = evaluate(Liar(), (x, y), ["pgd-2"], eps=0.1, sanity=0, precision="bf16")
    assert found.robust_accuracy == found.clean_accuracy == 1


def test_eleven_shards_are_joined_in_the_order_of_their_numbers(tmp_path):
    model, data = trained(), held_out(35)
    arguments = {"eps": 0.15, "sanity": 0, "batch_size": 1}
    whole = evaluate(model, data, ["fgsm", "pgd-3"], **arguments)
    # Joined in the order of their names, shard 10 before shard 2, they would be another record.
    by_name = sorted(range(11), key=lambda i: str(i + 1))
    assert not torch.equal(whole.outcomes[:11][by_name], whole.outcomes[:11])
    for i in range(1, 12):
        evaluate(model, data, ["fgsm", "pgd-3"], **arguments, shard=f"{i}/11", store=tmp_path)
    found = merge(tmp_path)
    assert torch.equal(found.outcomes, whole.outcomes)
    for name, attack in whole.attacks.items():
        joined = found.attacks[name]
        for key in ("accuracy", "alone", "attacked", "broken", "outside", "options"):
            assert getattr(joined, key) == getattr(attack, key), key


def test_after_a_merge_the_doubts_are_those_of_the_whole(tmp_path, monkeypatch):
    from robustflat.evaluate import record as records
    from robustflat.evaluate import result

    # Square broke one of 600 in each shard: below 0.2 %, but 2 of 200 in one alone are not.
    for part, broke in ((1, [3, 4]), (2, []), (3, []), (4, []), (5, [])):
        made = empty_record(200, shard=f"{part}/5", data=str(part))
        made.path = tmp_path / f"outcomes-{part}-of-5.json"
        made.add("apgd-ce", {"attack": "autoattack:apgd-ce"})
        made.add("square", {"attack": "autoattack:square"}, 0, black_box=True)
        made.entries[1].broke, made.entries[1].taken = broke, [0] * len(broke)
        for entry in made.entries:
            entry.finished = True
        made.save()
        alone = result.from_record(records.load(made.path))
        assert bool(alone.warnings) == (part == 1)
    assert merge(tmp_path).warnings == []


def test_a_radius_belongs_to_its_norm():
    model, data = linear(3, (1, 3, 3)), (IMAGES, LABELS)
    with pytest.raises(UserError, match="say eps too"):
        evaluate(model, data, ["fgsm"], "l2", sanity=0)
    assert evaluate(model, data, [], sanity=0).settings["eps"] == 8 / 255


def test_two_pgds_that_differ_in_an_option_have_suites_of_their_own(tmp_path):
    model, data = trained(), held_out(12)
    small = {"name": "pgd", "steps": 4, "step_size": 0.001}
    found = evaluate(model, data, ["pgd-4", small], eps=0.15, sanity=0)
    assert list(found.suites) == list(found.attacks) == ["pgd-4", "pgd-4#2"]
    assert found.suites["pgd-4"].accuracy < found.suites["pgd-4#2"].accuracy
    assert (
        found.attacks["pgd-4#2"].options["step_size"] != found.attacks["pgd-4"].options["step_size"]
    )


def test_images_are_read_a_batch_at_a_time():
    """However many there are: nothing holds all of them as floats."""
    data = robustflat.data.load("digits").test
    reads = []

    class Watched(type(data)):
        def fetch(self, indices):
            reads.append(len(indices))
            return super().fetch(indices)

    watched = Watched(data.pixels, data.labels)
    wanted = evaluate(trained(), data.tensors(), ["fgsm"], eps=0.1, batch_size=50, sanity=8)
    found = evaluate(trained(), watched, ["fgsm"], eps=0.1, batch_size=50, sanity=8)
    assert torch.equal(found.outcomes, wanted.outcomes)
    assert found.warnings == wanted.warnings
    assert max(reads) <= 256, "the probes look at 256"


def test_an_attack_that_has_nothing_left_to_attack_has_ended_too():
    model, data = linear(4, (1, 3, 3)), (IMAGES, LABELS)
    found = evaluate(model, data, ["autoattack:custom=apgd-ce,apgd-dlr", "fgsm"], eps=1.0, sanity=0)
    assert found.attacks["apgd-dlr"].attacked == 0
    assert found.suites["autoattack:custom=apgd-ce,apgd-dlr"].accuracy == 0
    assert found.warnings == []


def test_a_radius_is_written_in_levels_only_where_people_do():
    from robustflat.evaluate.threat import radius

    written = {8 / 255: "8/255", 1 / 255: "1/255", 0.2: "0.2", 0.5: "0.5", 0.0: "0", 0.03: "0.03"}
    assert {eps: radius(eps) for eps in written} == written


def test_tensors_of_other_shapes_types_or_names_have_another_digest():
    from robustflat.evaluate.record import digest_of, fingerprint_of_state

    x = torch.arange(6.0)
    others = [x[:5], x.view(2, 3), x.view(torch.int32), x.flip(0)]
    assert len({digest_of([one]) for one in [x, *others]}) == 5
    assert digest_of([x, x]) != digest_of([x])
    assert digest_of([x.view(2, 3).t()]) == digest_of([x.view(2, 3).t().contiguous()])
    one, two = {"a": x, "b": x[:5]}, {"b": x, "a": x[:5]}
    assert fingerprint_of_state(one) != fingerprint_of_state(two)
    assert fingerprint_of_state({"a": x}) != fingerprint_of_state({"c": x})
    assert fingerprint_of_state({"b": x[:5], "a": x, "n": 3}) == fingerprint_of_state(one)


def test_outcomes_of_fewer_examples_are_damaged(tmp_path):
    model, data = linear(3, (1, 3, 3)), (IMAGES, LABELS)
    evaluate(model, data, ["fgsm"], sanity=0, store=tmp_path)
    path = tmp_path / "outcomes.json"
    content = json.loads(path.read_text())
    content["attacks"] = []
    for name in ("right", "positions", "labels", "predictions"):
        content[name] = content[name][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 5 outcomes for 6 examples"):
        evaluate(model, data, ["fgsm"], sanity=0, store=tmp_path)
