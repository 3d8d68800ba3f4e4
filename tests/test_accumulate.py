"""A batch in parts is the batch: one loss, one perturbation, one attack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference.nets import conv_bn, images, mlp
from torch import Tensor, nn
from train_support import SMALL_CNN, config, differences, same_run, saved, stopped, trained

import robustflat as rf
from robustflat.errors import UserError
from robustflat.perturb.parts import accumulated, slices
from robustflat.train.folder import RunFolder
from robustflat.train.step import TrainStep

OBJECTIVES: dict[str, Any] = {
    "standard": rf.standard(label_smoothing=0.1),
    "adversarial": rf.adversarial(),
    "trades": rf.trades(beta=3.0),
    "mart": rf.mart(),
    "mlcat": rf.mlcat(0.9),
    "ikl": rf.ikl(),
    "rebat": rf.rebat(),
}
WEIGHTS: dict[str, Any] = {
    "none": rf.no_perturbation(),
    "awp": rf.awp(0.1),
    "awp3": rf.awp(0.1, steps=3),
    "awp_global": rf.awp_global(0.1),
    "amp": rf.amp(0.1),
    "sam": rf.sam(0.2),
    "asam": rf.asam(0.5),
    "gsam": rf.gsam(0.2, 0.4),
    "gnp": rf.gnp(0.2),
    "gam": rf.gam(0.2, 0.2),
    "fsam": rf.fsam(0.2),
    "vasso": rf.vasso(0.2, 0.5),
    "momentum_sam": rf.momentum_sam(0.2),
    "looksam": rf.looksam(0.2, every=2),
    "lesam": rf.lesam(0.2, 0.1),
    "zsharp": rf.zsharp(0.2, 0.5),
    "random": rf.random_weights(0.2),
    "rwp_mix": rf.rwp_mix(0.05),
    "nsam": rf.nsam(rf.sam(0.2), 2),
    "msam": rf.msam(rf.sam(0.2), 4),
}


def followed(
    objective: Any, weights: Any, parts: int, attack: Any = None, rows: int = 11
) -> list[Tensor]:
    """The weights after three steps, with momentum, and the losses."""
    objective, weights = copy.deepcopy(objective), copy.deepcopy(weights)
    model = mlp(dtype=torch.float64)
    loss = objective.attack_options["loss"]
    attack = attack or rf.pgd("l2", 0.3, 2, 0.2, "normal" if loss == "kl" else "uniform", loss=loss)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=1e-2)
    step = TrainStep(attack=attack, objective=objective, optimizer=optimizer, accumulate=parts)
    objective.start(model)
    generator, losses = torch.Generator().manual_seed(1), []
    for i in range(3):
        batches = [images(rows, 3 * i + j) for j in range(weights.batches)]
        value, norm = step(model, batches, weights, generator)
        objective.after_step(model, i)
        objective.after_epoch(model, i)  # so that priors are used
        losses += [value, norm]
    return [*(p.detach() for p in model.parameters()), *losses]


@pytest.mark.parametrize(
    ("objective", "weights"),
    [*((o, "awp") for o in OBJECTIVES), *(("adversarial", w) for w in WEIGHTS if w != "awp")],
)
def test_parts_equal_the_whole_batch(objective: str, weights: str) -> None:
    one, parts = (followed(OBJECTIVES[objective], WEIGHTS[weights], k) for k in (1, 3))
    for a, b in zip(parts, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert not all(torch.equal(a, b) for a, b in zip(parts, one, strict=True))


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_an_attack_in_parts_is_the_attack(norm: str, loss: str) -> None:
    model, (x, y) = conv_bn(), images(7)
    attack = rf.pgd(norm, 0.2, 3, 0.1, "normal", loss=loss, restarts=3, keep="best")
    whole, parts = (
        attack(model, x, y, generator=torch.Generator().manual_seed(0), parts=k) for k in (1, 3)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)
    assert (whole - x).abs().max() > 0.01


def test_no_pass_sees_more_than_a_part() -> None:
    """Of a batch of 11 in 3 parts: 4 rows, in the attack and in climb and descent."""
    sizes: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return self.net(x)

    def own(model: nn.Module, x: Tensor, y: Tensor, *, generator: Any = None) -> Tensor:
        model(x)
        return x

    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for attack in (rf.pgd("linf", 0.1, 2), own):
        step = TrainStep(
            attack=attack,  # type: ignore[arg-type]
            objective=rf.trades(),
            optimizer=optimizer,
            accumulate=3,
        )
        for weights in (rf.sam(0.1), rf.msam(rf.sam(0.1), 8)):
            sizes.clear()
            step(model, [images(11)], weights, torch.Generator())
            attacks = 2 if attack is not own else 1
            assert max(sizes) == 4
            # Clean and attacked images, in ascent and descent.
            assert sum(sizes) == 11 * (attacks + 4)
    sizes.clear()
    rf.pgd("linf", 0.1, 2, start="normal", loss="kl")(model, *images(11), parts=3)
    assert (max(sizes), sum(sizes)) == (4, 33)
    # A chunk is cut into parts as large as those of a batch, where that is possible.
    sizes.clear()
    step = TrainStep(attack=None, objective=rf.standard(), optimizer=optimizer, accumulate=3)
    step(model, [images(24)], rf.msam(rf.sam(0.1), 12))
    assert sizes == [6] * 8


def test_only_one_graph_stands_at_a_time() -> None:
    """What a part's forward pass keeps is let go before the next part begins."""
    alive, most = 0, 0

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            nonlocal alive
            alive -= 1
            return g

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return Kept.apply(self.net(x))

    model, (x, y) = Net(), images(8)
    value = accumulated(
        lambda r: nn.functional.cross_entropy(model(x[r]), y[r]), slices(8, 4), model
    )
    assert (most, alive) == (1, 0)
    value.backward()
    assert (most, alive) == (1, 0)


def test_without_gradient_the_value_alone_is_computed() -> None:
    model, (x, y) = mlp(dtype=torch.float64), images(8)
    asked: list[bool] = []

    def loss(rows: slice) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    with torch.no_grad():
        value = accumulated(loss, slices(8, 4), model)
        torch.testing.assert_close(value, nn.functional.cross_entropy(model(x), y))
    assert not value.requires_grad
    assert asked == [False] * 4


def test_what_is_made_of_the_value_reaches_the_gradient() -> None:
    """As the share of a process's rows does, by which its loss is multiplied."""
    one, parts, (x, y) = mlp(dtype=torch.float64), mlp(dtype=torch.float64), images(8)
    (3 * nn.functional.cross_entropy(one(x), y)).backward()
    value = accumulated(
        lambda r: nn.functional.cross_entropy(parts(x[r]), y[r]), slices(8, 3), parts
    )
    (3 * value).backward()
    for a, b in zip(one.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_tied_frozen_and_unused_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(16, 16, dtype=torch.float64)
            self.frozen = nn.Linear(16, 3, dtype=torch.float64).requires_grad_(False)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.a(self.a(x.flatten(1)).tanh()))

    found = []
    for parts in (1, 2):
        model = Net()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        step = TrainStep(
            attack=None, objective=rf.standard(), optimizer=optimizer, accumulate=parts
        )
        step(model, [images(6)], rf.sam(0.1))
        assert model.unused.weight.grad is None
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weights", [rf.no_perturbation(), rf.sam(0.1), rf.gsam(0.1, 0.3)])
def test_a_scaler_scales_every_part(weights: Any) -> None:
    """As it does the whole batch; an overflow in one part skips the step."""
    found = []
    for parts in (1, 3):
        model = mlp(dtype=torch.float64)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scales: list[float] = []

        class Scaled(rf.standard):
            def __call__(self, *given: Any) -> Tensor:
                value = super().__call__(*given)
                value.register_hook(lambda g: scales.append(float(g)))  # noqa: B023
                return value

        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = TrainStep(
            attack=None,
            objective=Scaled(),
            optimizer=optimizer,
            scaler=scaler,
            accumulate=parts,
        )
        step(model, [images(6)], weights)
        assert min(scales) >= 1024 / parts - 1e-9
        found.append([p.detach().clone() for p in model.parameters()])
        before = found[-1]
        x, y = images(6)
        x[-1] = 1e308
        step(model, [(x * 10, y)], weights)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert scaler.get_scale() == 512
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_batch_norm_follows_every_part_once() -> None:
    model, by_hand = conv_bn(), conv_bn()
    x, y = images(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep(attack=None, objective=rf.standard(), optimizer=optimizer, accumulate=2)
    step(model, [(x, y)], rf.no_perturbation())
    for part in (x[:3], x[3:]):
        by_hand(part)
    for a, b in zip(model.buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("rows", "parts", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (11, 3, [3, 4, 4]), (3, 2, [3]), (1, 4, [1]), (5, 9, [2, 3])],
)
def test_parts_are_even_and_of_two_rows_at_least(rows: int, parts: int, sizes: list[int]) -> None:
    found = slices(rows, parts)
    assert [p.stop - p.start for p in found] == sizes
    assert [r for p in found for r in range(p.start, p.stop)] == list(range(rows))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"name": "gkl"}}, "no mean of one loss a row"),
        ({"weights": {"name": "esam", "rho": 0.1}}, "esam chooses examples"),
        ({"train__sync_batchnorm": True}, "equally many parts"),
        ({"train__accumulate": 9}, "two images or more"),
    ],
)
def test_what_has_no_parts_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config(**({"train__accumulate": 2} | changes))
    assert "train.accumulate" in str(caught.value)


def test_a_run_in_parts_is_the_run(tmp_path: Any) -> None:
    """The perceptron has no BatchNorm; float32, so to seven digits."""
    one, parts = (
        saved(trained(tmp_path / str(k), train__accumulate=k, train__average={"name": "ema"}).last)
        for k in (1, 3)
    )
    for key in ("model", "average_model"):
        for a, b in zip(one[key].values(), parts[key].values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert differences(one["model"], parts["model"]) != []


def test_a_run_in_parts_is_resumed_bit_for_bit(tmp_path: Any) -> None:
    said = {"train__accumulate": 2, "model": SMALL_CNN, "train__average": {"name": "ema"}}
    whole = trained(tmp_path / "whole", **said)
    folder = RunFolder(tmp_path / "again" / "run")
    asked = config(tmp_path / "again", **said)
    folder.prepare(asked, resume=False, machines=[])
    stopped(asked, folder, 5)
    same_run(whole, trained(tmp_path / "again", resume=True, **said))
