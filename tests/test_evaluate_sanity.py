"""Each reason for doubt: a model that gives it, and a sound one that does not."""

from __future__ import annotations

import torch
from evaluate_support import digits, empty_record, evaluate, held_out, trained
from torch import nn

from robustflat.evaluate.doubts import of_record

WORDS = {
    "softmax": "look like probabilities",
    "random": "for a randomised model",
    "gradient": "of the change of its margins unexplained",
    "saturated": "gradients vanish numerically",
    "optimises": "computes gradients while it classifies",
    "range": "does not seem to take images in [0, 1]",
    "zero": "exactly zero",
    "steps": "more steps are not stronger",
    "eps": "a larger eps is not stronger",
    "all": "every image allowed",
    "square": "black-box attack Square breaks",
    "train": "train mode",
}


def findings(model, data=None, eps=0.1, norm="linf", attacks=(), sanity=32):
    result = evaluate(
        model, held_out(120) if data is None else data, attacks, norm, eps, sanity=sanity
    )
    found = {key for key, words in WORDS.items() if any(words in w for w in result.warnings)}
    assert len(found) == len(result.warnings), result.warnings
    return found


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def test_a_sound_model_gives_no_reason_for_doubt_in_any_norm():
    assert findings(trained()) == set()
    assert findings(trained(), eps=0.3) == set()
    assert findings(trained(), eps=0.6, norm="l2") == set()
    assert findings(trained(), eps=2.0, norm="l1") == set()
    assert findings(trained(), eps=0) == set()


def test_train_mode():
    assert findings(trained().train()) == {"train"}


def test_softmax_outputs():
    class Softmax(Wrapped):
        def forward(self, x):
            return self.net(x).softmax(1)

    assert "softmax" in findings(Softmax(trained()).eval())


def test_randomness():
    class Noisy(Wrapped):
        def forward(self, x):
            return self.net(x + 0.05 * torch.randn_like(x))

    assert "random" in findings(Noisy(trained()).eval())


def test_optimising_at_test_time():
    class Purifying(Wrapped):
        def forward(self, x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (g,) = torch.autograd.grad(self.net(leaf).logsumexp(1).sum(), leaf)
            return self.net(x + 0.001 * g)

    assert "optimises" in findings(Purifying(trained()).eval())


def test_normalisation_outside_the_model():
    x, y = digits()
    mean, std = x.mean(), x.std()
    means = torch.stack([x[y == c].mean(0).flatten() for c in range(10)])

    class NearestMean(nn.Module):
        """The class whose mean is nearest, of images that are first brought to [0, 1]."""

        def __init__(self, scale, shift):
            super().__init__()
            self.scale, self.shift = scale, shift

        def forward(self, x):
            return -torch.cdist((x * self.scale + self.shift).flatten(1), means)

    data = held_out(250)
    assert findings(NearestMean(1.0, 0.0).eval(), data, eps=0) == set()
    assert findings(NearestMean(std, mean).eval(), data, eps=0) == {"range"}
    assert findings(NearestMean(0.5, 0.5).eval(), data, eps=0) == {"range"}
    assert findings(NearestMean(1 / 255, 0.0).eval(), data, eps=0) == {"range"}


def test_gradients_that_vanish_in_saturated_outputs():
    class Saturated(Wrapped):
        def forward(self, x):
            return 1e4 * self.net(x)

    found = findings(Saturated(trained()).eval())
    assert "zero" in found


def test_probabilities_that_round_to_one():
    class Sure(Wrapped):
        def forward(self, x):
            return 12 * self.net(x)

    found = findings(Sure(trained()).eval())
    assert "saturated" in found
    record = record_of()
    record.probes = [["masking", "gradients vanish numerically"]]
    assert of_record(record) == []


def test_gradients_shattered_by_quantisation():
    class Quantised(Wrapped):
        def forward(self, x):
            return self.net((8 * x).round() / 8)

    found = findings(Quantised(trained()).eval(), eps=0.3)
    # No gradient at all: PGD is a random start, and even Square does better.
    assert {"zero", "all", "square"} <= found


def test_a_gradient_that_points_elsewhere_makes_more_steps_and_more_room_useless():
    class Flip(torch.autograd.Function):
        """The identity, whose gradient is right at first and useless away from the image."""

        @staticmethod
        def forward(ctx, x, original):
            ctx.save_for_backward(x, original)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            x, original = ctx.saved_tensors
            away = (x - original).flatten(1).abs().amax(1) > 1e-6
            return torch.where(away.view(-1, 1, 1, 1), -g, g), None

    class Masked(Wrapped):
        def __init__(self, net, known):
            super().__init__(net)
            self.known = known

        def forward(self, x):
            distance = torch.cdist(x.detach().flatten(1), self.known.flatten(1))
            return self.net(Flip.apply(x, self.known[distance.argmin(1)]))

    data = held_out(60)
    found = findings(Masked(trained(), data[0]).eval(), data, eps=0.3)
    assert {"steps", "all", "square"} <= found


def test_a_larger_eps_that_does_less():
    class Stretch(nn.Module):
        def forward(self, x):
            return (x - 0.3) / 0.4

    class Hides(Wrapped):
        """Answers as for the image cut to the data's range once any pixel has moved far."""

        def forward(self, x):
            far = ((x - 0.5).abs() > 0.42).flatten(1).any(1)
            return torch.where(far[:, None], self.net(x.detach().clamp(0.3, 0.7)), self.net(x))

    x, y = held_out(120)
    data = (0.3 + 0.4 * x, y)
    sound = nn.Sequential(Stretch(), trained()).eval()
    assert "eps" not in findings(sound, data, eps=0.2)
    assert "eps" in findings(Hides(sound).eval(), data, eps=0.2)


def record_of(*broken, after=True):
    """A record of 1,000 examples: APGD broke the first 100, Square these besides."""
    made = empty_record(1000)
    made.add("apgd-ce", {"attack": "autoattack:apgd-ce"})
    made.add("square", {"attack": "autoattack:square"}, 0 if after else None, black_box=True)
    made.entries[0].broke, made.entries[1].broke = list(range(100)), list(broken)
    for entry in made.entries:
        entry.finished = True
    return made


def test_black_box_after_white_box_is_read_from_the_outcomes():
    # AutoAttack's own threshold is 0.2 %.
    assert of_record(record_of(*range(100, 102))) == []
    (sentence,) = of_record(record_of(*range(100, 103)))
    assert "square broke 3 of 1000" in sentence
    # What Square breaks on its own counts only where attacks with gradients did not.
    assert of_record(record_of(*range(102), after=False)) == []
    (sentence,) = of_record(record_of(*range(50, 103), after=False))
    assert "square broke 3 of 1000" in sentence
    alone = empty_record(10)
    alone.add("square", {"attack": "autoattack:square"}, black_box=True)
    alone.entries[0].broke, alone.entries[0].finished = list(range(5)), True
    assert of_record(alone) == []


def test_square_withdraws_or_confirms_a_suspicion_of_masked_gradients():
    suspicion = ["masking", "more steps are not stronger, so gradients are probably masked."]
    fact = ["", "Two passes over the same images gave different outputs."]
    for broken, words in (((), 1), (range(100, 102), 1), (range(100, 103), 3)):
        record = record_of(*broken)
        record.probes = [suspicion, fact]
        found = of_record(record)
        assert len(found) == words
        assert fact[1] in found
        assert (suspicion[1] in found) == (words == 3)
    # Without the whole of Square there is no evidence.
    record = record_of()
    record.entries[1].finished = False
    record.probes = [suspicion]
    assert suspicion[1] in of_record(record)


def test_an_undertrained_model_is_not_called_masked_once_square_breaks_no_more(monkeypatch):
    from robustflat.evaluate import doubts

    monkeypatch.setattr(doubts, "_ladder", lambda *a: ["gradients are probably masked"])
    data = held_out(24)
    arguments = {"eps": 0.05, "sanity": 4}
    assert evaluate(trained(), data, ["pgd-2"], **arguments).warnings
    assert not evaluate(trained(), data, ["apgd-ce", "square"], **arguments).warnings


def test_the_checks_can_be_left_out():
    assert findings(trained().train(), sanity=0) == set()


def test_a_network_trained_little_is_not_taken_for_one_that_masks_its_gradients():
    # Its outputs differ little, and cross-entropy, unlike the margin, breaks fewer than Square.
    assert findings(trained(steps=18)) == set()
    assert findings(trained(steps=12), eps=0.05) == set()
