"""The robust-generalization gap: its definition, its signs, and intervals that cover."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from evaluate_support import digits, held_out, trained

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate import Scores, gap, overfitting, scores
from robustflat.evaluate.intervals import bootstrap_means, percentiles


def made(clean, robust, clean_loss=None, robust_loss=None):
    clean, robust = torch.tensor(clean), torch.tensor(robust)
    return Scores(
        clean_correct=clean,
        robust_correct=robust,
        clean_loss=(~clean).float() if clean_loss is None else torch.tensor(clean_loss),
        robust_loss=(~robust).float() if robust_loss is None else torch.tensor(robust_loss),
    )


def test_scores_are_those_of_the_attack_at_the_weights_given():
    model, (x, y) = trained(), held_out(50)
    attack = rf.pgd(eps=0.15, steps=4, start="zero")
    model.train()
    buffers = [b.clone() for b in model.buffers()]
    found = scores(model, (x, y), attack, batch_size=20)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    model.eval()
    with torch.no_grad():
        x_adv = attack(model, x, y)
        clean, attacked = model(x), model(x_adv)
    right = clean.argmax(1) == y
    assert torch.equal(found.clean_correct, right)
    assert torch.equal(found.robust_correct, right & (attacked.argmax(1) == y))
    torch.testing.assert_close(found.clean_loss, F.cross_entropy(clean, y, reduction="none"))
    torch.testing.assert_close(
        found.robust_loss, F.cross_entropy(attacked, y, reduction="none"), rtol=1e-3, atol=1e-4
    )


def test_an_attack_that_happens_to_correct_an_image_does_not_make_it_robust():
    class Brightness(torch.nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    def brighten(model, x, y, *, generator):
        return torch.ones_like(x)

    x = torch.tensor([0.2, 0.2, 0.8, 0.8]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    found = scores(Brightness(), (x, torch.tensor([0, 1, 0, 1])), brighten)
    assert found.clean_correct.tolist() == [True, False, False, True]
    assert found.robust_correct.tolist() == [False, False, False, True]


def test_the_gap_is_train_minus_test_and_a_training_set_learnt_by_heart_has_one():
    x, y = digits()
    model = trained()
    attack = rf.pgd(eps=0.1, steps=4)
    few = (x[:300], y[:300])
    splits = {
        "train": scores(model, few, attack),
        "validation": scores(model, (x[300:400], y[300:400]), attack),
        "test": scores(model, held_out(200), attack),
    }
    found = gap(splits, resamples=200)
    assert found.counts == {"train": 300, "validation": 100, "test": 200}
    assert list(found.gaps) == ["train-validation", "train-test"]
    train, test = found.splits["train"], found.splits["test"]
    assert train["robust_accuracy"].value == splits["train"].robust_correct.double().mean()
    for key, sign in (
        ("clean_accuracy", 1),
        ("robust_accuracy", 1),
        ("clean_loss", -1),
        ("robust_loss", -1),
    ):
        figure = found.gaps["train-test"][key]
        assert figure.value == pytest.approx(sign * (train[key].value - test[key].value))
        assert figure.low <= figure.value <= figure.high
    assert found.gaps["train-test"]["robust_loss"].value > 0
    content = found.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert gap(splits, resamples=200) == found, "the same seed gives the same intervals"


def test_the_same_split_twice_has_no_gap_but_an_interval():
    split = made([True] * 70 + [False] * 30, [True] * 40 + [False] * 60)
    found = gap({"train": split, "test": split})
    figure = found.gaps["train-test"]["robust_accuracy"]
    assert figure.value == 0
    # The difference of two independent binomials of n = 100, p = 0.4.
    half = 1.96 * math.sqrt(2 * 0.4 * 0.6 / 100)
    assert figure.low == pytest.approx(-half, rel=0.15)
    assert figure.high == pytest.approx(half, rel=0.15)


def test_overfitting_is_paired():
    best = made([True] * 80 + [False] * 20, [True] * 50 + [False] * 50)
    last = made([True] * 80 + [False] * 20, [True] * 40 + [False] * 60)
    found = overfitting(best, last)
    assert found["clean_accuracy"].value == 0
    # The two never differ there, so no resample can.
    assert (found["clean_accuracy"].low, found["clean_accuracy"].high) == (0, 0)
    assert found["robust_accuracy"].value == pytest.approx(0.1)
    assert found["robust_loss"].value == pytest.approx(0.1)
    # Ten of a hundred differ: the variance is that of a mean of 0.1, not of two of 0.5 and 0.4.
    assert found["robust_accuracy"].high - 0.1 == pytest.approx(
        1.96 * math.sqrt(0.1 * 0.9 / 100), rel=0.2
    )
    with pytest.raises(UserError, match="same examples"):
        overfitting(best, made([True], [True]))


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        sample = torch.rand(1, 60, generator=generator)
        low, high = percentiles(bootstrap_means(sample, 300, generator)[:, 0])
        covered += low <= 0.5 <= high
    # 95 % of 200, within four standard deviations, and a little less as percentile intervals do.
    assert 0.86 * 200 <= covered <= 200


def test_bootstrap_draws_the_same_examples_for_all_figures():
    values = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    draws = bootstrap_means(torch.cat([values, 1 - values]), 100, torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws.sum(1), torch.ones(100, dtype=torch.float64))
    assert float(draws[:, 0].std()) == pytest.approx(
        float(values.std(correction=0)) / math.sqrt(50), rel=0.3
    )


def test_losses_without_a_number_are_null_and_a_train_split_is_needed():
    bad = made([True, False], [True, False], robust_loss=[math.nan, math.inf])
    content = gap({"train": bad, "test": bad}).to_dict()
    json.dumps(content, allow_nan=False)
    assert content["gaps"]["train-test"]["robust_loss"]["value"] is None
    with pytest.raises(UserError, match="split named 'train'"):
        gap({"test": bad})
