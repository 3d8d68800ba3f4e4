"""Schedules against closed forms, optimizers against torch's, averages against arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from reference.nets import conv_bn, images
from torch import Tensor, nn

from robustflat.config import ConfigError, check_config
from robustflat.config.schema import Optimizer
from robustflat.errors import UserError
from robustflat.train.averaging import Average, ema, swa
from robustflat.train.optim import OPTIMIZERS as NAMED
from robustflat.train.optim import SCHEDULES, build_optimizer
from robustflat.train.parallel import Processes


def schedule(name: str, **said: Any) -> Any:
    return SCHEDULES[name](**said)


def optimizer_section(**said: Any) -> Any:
    return TypeAdapter(Optimizer).validate_python(said)


def factors(config: Any, epochs: int = 20, steps: int = 5) -> list[float]:
    return [config(i / steps, epochs, 1 / steps) for i in range(epochs * steps)]


def test_constant() -> None:
    assert factors(schedule(name="constant")) == [1.0] * 100


def test_piecewise_is_the_schedule_of_the_papers() -> None:
    # Rice et al. 2020: 200 epochs, divided by 10 at 100 and 150.
    config = schedule(name="piecewise")
    got = [config(e, 200, 0.001) for e in (0, 99.999, 100, 149.999, 150, 199.9)]
    assert got == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-15)
    config = schedule(name="piecewise", milestones=[0.25, 0.5, 1.0], factor=0.5)
    assert factors(config, 8, 1) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert factors(schedule(name="piecewise", milestones=[]), 8, 1) == [1] * 8


def test_cosine_is_torch_s() -> None:
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], 1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.1)
    for got in factors(schedule(name="cosine", final=0.1)):
        assert got == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_linear() -> None:
    for i, got in enumerate(factors(schedule(name="linear", final=0.2))):
        assert got == pytest.approx(1 - 0.8 * i / 100, rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "piecewise", "cosine", "linear"])
def test_warm_up_climbs_linearly_and_then_meets_the_schedule(name: str) -> None:
    got = factors(schedule(name=name, warmup_epochs=4))
    # Twenty steps that all move: the first at a twentieth, the last at the whole rate.
    assert got[:20] == pytest.approx([(i + 1) / 20 for i in range(20)], abs=1e-15)
    assert got[20] == 1
    if name == "cosine":
        assert got[20:] == pytest.approx([(1 + math.cos(math.pi * i / 80)) / 2 for i in range(80)])
    if name == "linear":
        assert got[20:] == pytest.approx([1 - i / 80 for i in range(80)])
    if name == "piecewise":  # milestones count from the beginning
        assert [got[49], got[50], got[74], got[75]] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_one_cycle() -> None:
    got = factors(schedule(name="one_cycle", peak=0.25, initial=0.1, final=0.01))
    # As in Rice et al. 2020, a step has the rate of its end.
    assert got[0] == pytest.approx(0.1 + 0.9 / 25)
    assert got[24] == 1 == max(got)
    assert got[9] == pytest.approx(0.1 + 0.9 * 10 / 25)
    assert got[49] == pytest.approx(1 - 0.99 * 25 / 75)
    assert got[99] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["constant", "piecewise", "cosine", "linear", "one_cycle"])
def test_factors_are_shares(name: str) -> None:
    warm = {} if name == "one_cycle" else {"warmup_epochs": 0.5}
    assert all(0 <= f <= 1 for f in factors(schedule(name=name, **warm), 3, 7))


# --- optimizers


def follow(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    for seed in range(4):
        x, y = images(seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": (
        {"name": "sgd", "lr": 0.3},
        lambda g: torch.optim.SGD(g, 0.3, momentum=0.9, weight_decay=5e-4),
    ),
    "nesterov": (
        {"name": "sgd", "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
        lambda g: torch.optim.SGD(g, 0.1, momentum=0.5, nesterov=True, weight_decay=0.1),
    ),
    "plain": (
        {"name": "sgd", "momentum": 0, "weight_decay": 0},
        lambda g: torch.optim.SGD(g, 0.1),
    ),
    "adamw": (
        {"name": "adamw", "lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1},
        lambda g: torch.optim.AdamW(g, 0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_all", [True, False])
def test_optimizers_are_torch_s(name: str, decay_all: bool) -> None:
    said, theirs = OPTIMIZERS[name]
    config = optimizer_section(**said, decay_all=decay_all)
    one, two = conv_bn(), conv_bn()
    groups: list[dict[str, Any]] = [{"params": list(two.parameters())}]
    if not decay_all:
        groups = [
            {"params": [two[0].weight, two[4].weight]},  # type: ignore[index]
            {
                "params": [two[0].bias, *two[1].parameters(), two[4].bias],  # type: ignore[index]
                "weight_decay": 0.0,
            },
        ]
    got, expected = follow(build_optimizer(config, one), one), follow(theirs(groups), two)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_fused_and_foreach_are_torch_s_and_the_same_update(name: str, way: str) -> None:
    plain, other = conv_bn(), conv_bn()
    expected = follow(build_optimizer(optimizer_section(name=name, lr=0.1), plain), plain)
    optimizer = build_optimizer(optimizer_section(name=name, lr=0.1, **{way: True}), other)
    assert all(group[way] is True for group in optimizer.param_groups)
    for a, b in zip(follow(optimizer, other), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_left_alone_an_optimizer_chooses_its_implementation_by_the_device() -> None:
    for name in ("sgd", "adamw"):
        (group,) = build_optimizer(optimizer_section(name=name), conv_bn()).param_groups
        assert group["foreach"] in (None, False)  # torch's default on a CPU; on CUDA foreach
        assert group["fused"] is None  # False would keep torch from foreach on CUDA
    (group,) = build_optimizer(optimizer_section(foreach=False), conv_bn()).param_groups
    assert group["foreach"] is False


def test_fused_where_there_is_no_such_thing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.*adadelta has no fused implementation"):
        check_config({"name": "a", "optimizer": {"name": "adadelta", "fused": True}})
    with pytest.raises(ConfigError, match=r"foreach and fused.*one of them"):
        check_config({"name": "a", "optimizer": {"foreach": True, "fused": True}})
    with pytest.raises(UserError, match=r"optimizer.fused.*no fused sgd .* on meta.*Leave it out"):
        build_optimizer(optimizer_section(fused=True), conv_bn().to("meta"))


def test_exempt_parameters_do_not_decay() -> None:
    model = conv_bn()
    before = [p.detach().clone() for p in model.parameters()]
    config = optimizer_section(lr=0.1, momentum=0, weight_decay=0.5, decay_all=False)
    optimizer = build_optimizer(config, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(
            p.detach(), b * (0.95 if p.ndim > 1 else 1.0), rtol=0, atol=1e-15
        )


def test_frozen_parameters_are_left_out() -> None:
    model = conv_bn()
    model[0].requires_grad_(False)  # type: ignore[index]
    groups = build_optimizer(optimizer_section(decay_all=False), model).param_groups
    held = [p for g in groups for p in g["params"]]
    assert all(p.requires_grad for p in held)
    assert len(held) == 4


@pytest.mark.parametrize("name", NAMED)
def test_every_optimizer_that_has_a_name_is_built_and_steps(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    optimizer = build_optimizer(optimizer_section(name=name, lr=0.25), model)
    assert type(optimizer).__name__.lower() == name
    assert all(g["lr"] == 0.25 for g in optimizer.param_groups)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# --- averages


class One(nn.Module):
    """One weight and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("b", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def put(self, value: float) -> None:
        with torch.no_grad():
            self.w.fill_(value)
            self.b.fill_(-value)  # type: ignore[operator]
            self.n.add_(1)  # type: ignore[operator]


def test_ema_of_known_weights() -> None:
    # The first is taken whole, and from then on a <- d a + (1 - d) w.
    model, d, known = One(), 0.9, [3.0, -1.0, 4.0, 1.0, 5.0]
    average = Average(ema(decay=d, warmup=False), model)
    assert not average.started
    for w in known:
        model.put(w)
        average.after_step(model, 0)
        average.after_epoch(model, 0)
    n = len(known)
    expected = d ** (n - 1) * known[0]
    expected += sum((1 - d) * d ** (n - 1 - i) * known[i] for i in range(1, n))
    assert average.started
    assert not average.needs_refresh
    assert average.model.w.tolist() == pytest.approx([expected] * 2, rel=1e-12)  # type: ignore[union-attr,operator]
    assert average.model.b.tolist() == pytest.approx([-expected] * 2, rel=1e-12)  # type: ignore[union-attr,operator]
    assert model.w.tolist() == [5.0, 5.0]


def test_ema_of_constant_weights_is_them() -> None:
    model = One()
    model.put(0.1)
    average = Average(ema(decay=0.7), model)
    for _ in range(10):
        average.after_step(model, 0)
    assert torch.allclose(average.model.w, model.w, rtol=1e-15)  # type: ignore[arg-type]


def test_ema_starts_when_told() -> None:
    model = One()
    average = Average(ema(decay=0.5, start_epoch=2, warmup=False), model)
    for epoch, w in enumerate([9.0, 9.0, 2.0, 4.0]):
        model.put(w)
        assert average.started == (epoch > 2)
        average.after_step(model, epoch)
    assert average.model.w.tolist() == [3.0, 3.0]  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(("start", "every"), [(0, 1), (2, 1), (1, 3), (6, 2)])
def test_swa_is_the_arithmetic_mean(start: int, every: int) -> None:
    model, known = One(), [3.0, -1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    average = Average(swa(start_epoch=start, every=every), model)
    for epoch, w in enumerate(known):
        model.put(w - 100)
        average.after_step(model, epoch)
        model.put(w)
        average.after_epoch(model, epoch)
    taken = known[start::every]
    mean = sum(taken) / len(taken)
    assert average.model.w.tolist() == pytest.approx([mean] * 2, rel=1e-12)  # type: ignore[union-attr,operator]
    assert average.usable  # it has no statistics to compute anew


def test_ema_warms_up() -> None:
    # The n-th update decays by at most (1 + n) / (10 + n), counted from 0; the first is whole.
    model, known = One(), [3.0, -1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    average = Average(ema(decay=0.35), model)
    expected = known[0]
    for n, w in enumerate(known):
        model.put(w)
        average.after_step(model, 0)
        decay = min(0.35, (1 + n) / (10 + n))
        expected = w if n == 0 else decay * expected + (1 - decay) * w
        assert average.model.w.tolist() == pytest.approx([expected] * 2, rel=1e-12)  # type: ignore[union-attr,operator]


def test_swa_is_used_with_statistics_of_its_own_alone() -> None:
    model = conv_bn()
    average = Average(swa(start_epoch=0), model)
    assert not average.usable
    for seed in (1, 2):
        average.after_epoch(model, seed)
        assert average.needs_refresh
        assert not average.usable
        again = Average(swa(start_epoch=0), conv_bn())
        again.load_state_dict(average.state_dict())
        assert again.needs_refresh
        average.refresh([images(6, seed)[0]], Processes())
        assert average.usable
        again.load_state_dict(average.state_dict())
        assert again.usable


def test_an_average_goes_on_from_its_state() -> None:
    one, two = One(), One()
    for config in (ema(decay=0.9), swa(start_epoch=0)):
        whole, first = Average(config, one), Average(config, one)
        for w in (1.0, 5.0):
            one.put(w)
            for a in (whole, first):
                a.after_step(one, 0)
                a.after_epoch(one, 0)
        second = Average(config, two)
        second.load_state_dict(first.state_dict())
        one.put(7.0)
        for a in (whole, second):
            a.after_step(one, 0)
            a.after_epoch(one, 0)
        assert torch.equal(whole.model.w, second.model.w)  # type: ignore[arg-type]


def test_refreshed_statistics_are_those_of_the_averaged_weights() -> None:
    model = conv_bn()
    average = Average(swa(start_epoch=0), model)
    for seed in range(3):
        with torch.no_grad():
            for p, q in zip(model.parameters(), conv_bn(seed).parameters(), strict=True):
                p.copy_(q)
        average.after_epoch(model, seed)
    batches = [images(6, seed)[0] for seed in range(4)]
    average.refresh(batches, Processes())
    conv, norm = average.model[0], average.model[1]  # type: ignore[index]
    seen = [conv(x).detach().transpose(0, 1).flatten(1) for x in batches]
    mean = torch.stack([h.mean(1) for h in seen]).mean(0)
    variance = torch.stack([h.var(1, unbiased=True) for h in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-12, atol=1e-14)
    assert norm.momentum == 0.1
    assert not any(m.training for m in average.model.modules())
    assert not any(p.requires_grad for p in average.model.parameters())
    # A second time begins anew.
    average.refresh(batches[:1], Processes())
    torch.testing.assert_close(norm.running_mean, seen[0].mean(1), rtol=1e-12, atol=1e-14)


def test_an_average_leaves_the_model_alone() -> None:
    model = conv_bn()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for config in (ema(decay=0.9), swa(start_epoch=0)):
        average = Average(config, model)
        for _ in range(2):
            average.after_step(model, 0)
            average.after_epoch(model, 0)
        average.refresh([images()[0]], Processes())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
