"""Label-smoothed TRADES, IKL, GKL, ReBAT and MLCAT beside their formulas, with their memories."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import objectives as ref
from reference.nets import CLASSES, conv_bn, images, mlp
from torch import Tensor, nn

import robustflat as rf
from robustflat.objectives import Objective

EPOCHS, STEPS = 3, 3
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for step in range(STEPS):
        x, y = images(7, seed=10 * epoch + step)
        g = torch.Generator().manual_seed(step)
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        yield x, (x + 0.3 * noise).clamp(0, 1), y


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def follow(objective: Objective, model: nn.Module, weights: Any = None) -> Iterator[float]:
    """Train with ``objective``, yielding each step's loss."""
    optimizer, weights = sgd(model), weights or rf.no_perturbation()
    objective.start(model)
    for epoch in range(EPOCHS):
        for x, x_adv, y in batches(epoch):
            optimizer.zero_grad()
            closure = lambda: objective(model, x, x_adv, y)  # noqa: E731, B023
            yield float(weights.backward(closure, model))
            optimizer.step()
            objective.after_step(model, epoch)
        objective.after_epoch(model, epoch)


def assert_same_path(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-9) -> None:
    expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    for name, value in [*ours.named_parameters(), *ours.named_buffers()]:
        gap = (value - expected[name]).double().norm() / expected[name].double().norm()
        assert gap < tolerance, name


# --- trajectories ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (
            rf.trades(5.0, label_smoothing=0.1),
            lambda m, x, a, y: ref.smooth_trades(m, x, a, y, 5.0, 0.1),
        ),
        (rf.mlcat(1.0), lambda m, x, a, y: ref.mlcat(m, a, y, 1.0, hold=True)),
        (
            rf.mlcat(1.0, hold_factor=False),
            lambda m, x, a, y: ref.mlcat(m, a, y, 1.0, hold=False),
        ),
    ],
    ids=["trades-smooth", "mlcat", "mlcat-released"],
)
def test_objectives_without_memory(objective: Objective, loss: Loss) -> None:
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    optimizer, mine = sgd(theirs), follow(objective, ours)
    lifted = 0
    for epoch in range(EPOCHS):
        for x, x_adv, y in batches(epoch):
            next(mine)
            optimizer.zero_grad()
            loss(theirs, x, x_adv, y).backward()
            optimizer.step()
            with torch.no_grad():
                rows = F.cross_entropy(copy.deepcopy(theirs)(x_adv), y, reduction="none")
                lifted += int((rows < 1.0).sum())
    assert next(mine, None) is None
    assert 5 < lifted < 7 * EPOCHS * STEPS - 5
    assert_same_path(ours, theirs)


@pytest.mark.parametrize("gamma", [None, 0.2, 0.7])
@pytest.mark.parametrize("climbed", [False, True])
def test_ikl_and_gkl_with_their_priors(gamma: float | None, climbed: bool) -> None:
    options = {"alpha": 1.5, "beta": 3.0, "temperature": 2.0}
    objective = rf.ikl(**options) if gamma is None else rf.gkl(**options, gamma=gamma)
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    # The weight adversary asks for the loss once more, at other weights: it must not be counted.
    mine = follow(objective, ours, rf.awp(0.01) if climbed else None)
    optimizer, priors = sgd(theirs), ref.Priors(CLASSES, 2.0)

    def loss(x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        attacked, clean = theirs(x_adv), theirs(x)
        if gamma is None:
            return ref.kl_improved(clean, attacked, y, priors.prior, 1.5, 3.0), clean
        return ref.kl_general(clean, attacked, y, priors.prior, 1.5, 3.0, gamma), clean

    for epoch in range(EPOCHS):
        for batch in batches(epoch):
            next(mine)
            centre = {n: p.detach().clone() for n, p in theirs.named_parameters()}
            if climbed:
                buffers = {n: b.clone() for n, b in theirs.named_buffers()}
                matrices = [p for p in theirs.parameters() if p.ndim > 1]
                gradients = torch.autograd.grad(loss(*batch)[0], matrices)
                with torch.no_grad():
                    for n, b in theirs.named_buffers():
                        b.copy_(buffers[n])
                    for p, g in zip(matrices, gradients, strict=True):
                        p.add_(0.01 * p.norm() / g.norm() * g)
            optimizer.zero_grad()
            value, clean = loss(*batch)
            value.backward()
            with torch.no_grad():
                for n, p in theirs.named_parameters():
                    p.copy_(centre[n])
            optimizer.step()
            priors.see(clean, batch[2])
        next(mine, None) if epoch == EPOCHS - 1 else None
        priors.end_epoch()
    assert_same_path(ours, theirs)
    torch.testing.assert_close(objective.state_dict()["prior"], priors.prior, rtol=1e-9, atol=0)
    assert (priors.prior - 1 / CLASSES).abs().max() > 0.02


@pytest.mark.parametrize("start_epoch", [0, 1, 2])
def test_rebat_with_its_averaged_model(start_epoch: int) -> None:
    objective = rf.rebat(beta=2.0, decay=0.6, start_epoch=start_epoch)
    ours = conv_bn()
    theirs = copy.deepcopy(ours)
    optimizer, mine = sgd(theirs), follow(objective, ours)
    averaged, begun = ref.frozen_copy(theirs), False
    for epoch in range(EPOCHS):
        for _, x_adv, y in batches(epoch):
            next(mine)
            # In the very first step the two are one model, and the term and its gradient are 0.
            other = averaged if begun else None
            optimizer.zero_grad()
            ref.rebat(theirs, other, x_adv, y, 2.0).backward()
            optimizer.step()
            begun = begun or epoch >= start_epoch
            ref.average_into(averaged, theirs, 0.6 if epoch >= start_epoch else 0.0)
    assert next(mine, None) is None
    assert_same_path(ours, theirs)
    state = objective.state_dict()["average"]
    for name, value in averaged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(state[f"module.{name}"], value, rtol=1e-9, atol=0)


# --- what they reduce to, and their rows ----------------------------------------------------


def wide_batch() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = mlp(dtype=torch.float64)
    x, y = images(9)
    return model, x, (x + 0.3 * torch.randn_like(x)).clamp(0, 1), y


ALL = [
    rf.standard(label_smoothing=0.1),
    rf.adversarial(label_smoothing=0.1),
    rf.trades(3.0, 0.1),
    rf.mart(3.0),
    rf.mlcat(1.0),
    rf.mlcat(1.0, hold_factor=False),
    rf.ikl(),
    rf.rebat(),
]


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_the_loss_is_the_mean_of_its_rows_and_rows_are_independent(objective: Objective) -> None:
    model, x, x_adv, y = wide_batch()
    objective.start(model)
    objective.after_step(model)
    rows = objective.rows(model, x, x_adv, y)
    assert rows.shape == (9,)
    assert torch.equal(rows.mean(), objective(model, x, x_adv, y))
    part = objective.rows(model, x[2:5], x_adv[2:5], y[2:5])
    torch.testing.assert_close(part, rows[2:5], rtol=1e-12, atol=1e-14)


def test_gkl_is_ikl_at_gamma_one_and_has_no_rows() -> None:
    model, x, x_adv, y = wide_batch()
    one, other = rf.gkl(temperature=4.0, gamma=1.0), rf.ikl()
    for objective in (one, other):
        objective(model, x, x_adv, y)
        objective.after_step(model)
        objective.after_epoch(model)
    torch.testing.assert_close(
        one(model, x, x_adv, y), other(model, x, x_adv, y), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match=r"no loss of a single row.*Use ikl"):
        one.rows(model, x, x_adv, y)


def test_off_is_off() -> None:
    model, x, x_adv, y = wide_batch()
    averaged = rf.rebat(0.0)
    averaged.start(model)
    averaged.after_step(model)
    plain = rf.adversarial()(model, x, x_adv, y)
    assert torch.equal(averaged(model, x, x_adv, y), plain)
    for hold in (True, False):
        assert torch.equal(rf.mlcat(0.0, hold)(model, x, x_adv, y), plain)
    assert torch.equal(rf.ikl(0.0, 0.0)(model, x, x_adv, y), rf.standard()(model, x, x_adv, y))
    assert torch.equal(rf.trades(2.0, 0.0)(model, x, x_adv, y), rf.trades(2.0)(model, x, x_adv, y))


def test_lifted_losses_weigh_more_or_nothing() -> None:
    model, x, x_adv, y = wide_batch()
    parameters = list(model.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    plain = F.cross_entropy(model(x_adv), y, reduction="none").detach()
    c = float(plain.median()) + 1e-6
    held, released = rf.mlcat(c), rf.mlcat(c, hold_factor=False)
    for i in range(9):
        a = gradient(F.cross_entropy(model(x_adv), y, reduction="none")[i])
        b = gradient(held.rows(model, x, x_adv, y)[i])
        z = gradient(released.rows(model, x, x_adv, y)[i])
        small = bool(plain[i] < c)
        torch.testing.assert_close(b, a * (c / float(plain[i]) if small else 1.0))
        assert torch.equal(z, torch.zeros_like(z) if small else a)


def test_a_loss_of_zero_is_lifted_without_nan() -> None:
    z = torch.tensor([[500.0, 0.0, 0.0]], requires_grad=True)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return z

    for hold in (True, False):
        x, y = torch.zeros(1, 1), torch.tensor([0])
        (gradient,) = torch.autograd.grad(rf.mlcat(1.5, hold)(Fixed(), x, x, y), z)
        assert gradient.isfinite().all()


# --- memories -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [rf.ikl, rf.gkl, lambda: rf.rebat(decay=0.6, start_epoch=1)])
@pytest.mark.parametrize("cut", range(1, EPOCHS * STEPS))
def test_going_on_from_a_saved_state_is_bit_identical(
    make: Callable[[], Objective], cut: int
) -> None:
    def run(cut: int | None) -> tuple[nn.Module, dict[str, Any]]:
        model, objective = conv_bn(), make()
        optimizer = sgd(model)
        objective.start(model)
        for done in range(EPOCHS * STEPS):
            if done == cut:
                saved = copy.deepcopy(objective.state_dict())
                objective = make()
                objective.start(model)
                objective.load_state_dict(saved)
            epoch, step = divmod(done, STEPS)
            x, x_adv, y = list(batches(epoch))[step]
            optimizer.zero_grad()
            objective(model, x, x_adv, y).backward()
            optimizer.step()
            objective.after_step(model, epoch)
            if step == STEPS - 1:
                objective.after_epoch(model, epoch)
        return model, objective.state_dict()

    (whole, end), (resumed, other_end) = run(None), run(cut)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(end) == str(other_end)


def test_priors_are_the_same_whatever_the_processes() -> None:
    # Two processes with half a batch each count what one counts with all of it.
    model, x, x_adv, y = wide_batch()
    x, x_adv, y = x[:8], x_adv[:8], y[:8]
    one, halves = rf.ikl(), [rf.ikl(), rf.ikl()]
    one(model, x, x_adv, y)
    one.after_step(model)
    one.after_epoch(model)
    for k, objective in enumerate(halves):
        objective(model, x[k::2], x_adv[k::2], y[k::2])
    counts: list[Tensor] = []
    for objective in copy.deepcopy(halves):
        objective.after_step(model, 0, lambda t: counts.append(t) or t)  # type: ignore[func-returns-value]
    shared = sum(counts) / 2
    for objective in halves:
        objective.after_step(model, 0, lambda t: shared)
        objective.after_epoch(model)
        found = objective.state_dict()["prior"]
        torch.testing.assert_close(found, one.state_dict()["prior"], rtol=1e-12, atol=0)


def test_priors_outlive_a_bad_step_an_absent_class_and_an_evaluation() -> None:
    model, x, x_adv, y = wide_batch()
    objective, first = rf.ikl(), torch.full((CLASSES, CLASSES), 1 / 3, dtype=torch.float64)
    y = torch.where(y == 2, 1, y)
    objective(model, x, x_adv, y)
    objective.after_step(model)
    good = objective.state_dict()["total"].clone()
    objective.after_step(model)  # nothing was seen since
    assert torch.equal(objective.state_dict()["total"], good)
    objective(model, x * float("nan"), x_adv, y)
    objective.after_step(model)
    assert torch.equal(objective.state_dict()["total"], good)
    objective.after_step(model)  # nothing was seen since
    assert torch.equal(objective.state_dict()["total"], good)
    objective.after_epoch(model)
    prior = objective.state_dict()["prior"]
    assert torch.equal(prior[2], first[2])
    torch.testing.assert_close(prior.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    objective.after_epoch(model)  # an epoch without a step changes nothing
    assert torch.equal(objective.state_dict()["prior"], prior)
    assert objective.state_dict()["total"] is None


def test_soft_labels_count_by_their_shares() -> None:
    model, x, x_adv, y = wide_batch()
    hard, soft = rf.ikl(), rf.ikl()
    for objective, labels in ((hard, y), (soft, F.one_hot(y, CLASSES).double())):
        objective(model, x, x_adv, labels)
        objective.after_step(model)
        objective.after_epoch(model)
    a, b = hard.state_dict()["prior"], soft.state_dict()["prior"]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        hard(model, x, x_adv, y), soft(model, x, x_adv, F.one_hot(y, CLASSES).double())
    )


def test_the_averaged_model_is_a_bystander() -> None:
    model = conv_bn()
    objective = rf.rebat(decay=0.5)
    x, y = images()
    with pytest.raises(ValueError, match=r"objective.start\(model\)"):
        objective(model, x, x, y)
    with pytest.raises(ValueError, match="must be started"):
        objective.load_state_dict({})
    objective.start(model)
    objective.after_step(model)
    before = copy.deepcopy(objective.state_dict())
    objective(model, x, x, y).backward()
    after = objective.state_dict()
    assert all(torch.equal(v, after["average"][k]) for k, v in before["average"].items())
    assert objective == rf.rebat(decay=0.5)
    assert hash(objective) == hash(rf.rebat(decay=0.5))


def test_passes_of_each_objective() -> None:
    # IKL's released code sees the adversarial batch first.
    for objective, seen in (
        (rf.ikl(), "ac"),
        (rf.gkl(), "ac"),
        (rf.mlcat(), "a"),
        (rf.rebat(), "a"),
    ):
        model = conv_bn()
        x, y = images()
        x_adv = x.flip(-1) * 0.5
        expected = copy.deepcopy(model)
        for c in seen:
            expected(x if c == "c" else x_adv)
        objective.start(model)
        objective(model, x, x_adv, y)
        for a, b in zip(model.buffers(), expected.buffers(), strict=True):
            assert torch.equal(a, b)
        assert objective.sees_clean == ("c" in seen)
        assert objective.needs_attack


def test_attack_options_are_the_papers() -> None:
    uniform, normal = {"loss": "ce", "start": "uniform"}, {"loss": "kl", "start": "normal"}
    for objective in (rf.adversarial(), rf.mlcat(), rf.rebat()):
        assert objective.attack_options == uniform
    for objective in (rf.trades(), rf.ikl(), rf.gkl()):
        assert objective.attack_options == normal
    assert rf.mart().attack_options == {"loss": "ce", "start": "normal"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: rf.ikl(alpha=-1.0),
        lambda: rf.ikl(beta=float("nan")),
        lambda: rf.ikl(temperature=0.0),
        lambda: rf.ikl(temperature=float("inf")),
        lambda: rf.gkl(gamma=-0.1),
        lambda: rf.gkl(beta=-1.0),
        lambda: rf.rebat(beta=-1.0),
        lambda: rf.rebat(decay=1.0),
        lambda: rf.rebat(start_epoch=-1),
        lambda: rf.mlcat(-0.5),
        lambda: rf.trades(label_smoothing=1.0),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Objective]) -> None:
    with pytest.raises(ValueError, match="got"):
        make()
