"""One step equals a loop written by hand, and does nothing behind one's back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images, mlp
from test_meta import NoSync
from torch import Tensor, nn

import robustflat as rf
from robustflat.train.step import Autocast, TrainStep

ATTACK = rf.pgd("linf", 0.1, 3, 0.05, "zero")


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-2)


def step(model: nn.Module, objective: Any = None, **said: Any) -> TrainStep:
    objective = objective or rf.adversarial()
    kl = objective.attack_options["loss"] == "kl"
    attack = rf.pgd("linf", 0.1, 3, 0.05, "normal", loss="kl") if kl else ATTACK
    return TrainStep(**({"attack": attack, "objective": objective, "optimizer": sgd(model)} | said))


def pgd_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Three steps of 0.05 in a ball of 0.1, in eval mode."""
    flags = [m.training for m in model.modules()]
    model.eval()
    x_adv = x.clone()
    for _ in range(3):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + 0.05 * g.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    for m, flag in zip(model.modules(), flags, strict=True):
        m.training = flag
    return x_adv


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.named_buffers()}


def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for k, v in model.named_buffers():
            v.copy_(values[k])


def awp_by_hand(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> float:
    """Wu et al. 2020, one step; leaves the gradient at the perturbed weights."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    kept = statistics(model)
    gradients = torch.autograd.grad(loss(), matrices)
    put(model, kept)
    centre = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        for p, g in zip(matrices, gradients, strict=True):
            p.add_(gamma * p.norm() * g / g.norm())
    model.zero_grad()
    value = loss()
    value.backward()
    with torch.no_grad():
        for p, c in zip(matrices, centre, strict=True):
            p.copy_(c)
    return float(value.detach())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)), mean over rows."""
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()


OBJECTIVES: dict[str, tuple[Any, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]]] = {
    "standard": (rf.standard(), lambda m, x, a, y: F.cross_entropy(m(x), y)),
    "adversarial": (rf.adversarial(), lambda m, x, a, y: F.cross_entropy(m(a), y)),
}


@pytest.mark.parametrize("weights", ["none", "awp"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_steps_equal_a_loop_by_hand(objective: str, weights: str) -> None:
    ours, theirs = conv_bn(), conv_bn()
    made, by_hand = OBJECTIVES[objective]
    take, optimizer = step(ours, made), sgd(theirs)
    method = rf.awp(0.1) if weights == "awp" else rf.no_perturbation()
    for seed in range(3):
        x, y = images(6, seed, margin=0.2)
        value, norm = take(ours, [(x, y)], method)
        x_adv = pgd_by_hand(theirs, x, y)

        def loss(x: Tensor = x, x_adv: Tensor = x_adv, y: Tensor = y) -> Tensor:
            return by_hand(theirs, x, x_adv, y)

        if weights == "awp":
            expected = awp_by_hand(theirs, loss, 0.1)
        else:
            theirs.zero_grad()
            out = loss()
            out.backward()
            expected = float(out.detach())
        size = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))  # type: ignore[union-attr]
        optimizer.step()
        assert float(value) == pytest.approx(expected, rel=1e-10)
        assert float(norm) == pytest.approx(size, rel=1e-10)
        assert not value.requires_grad
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", ["none", "awp", "sam"])
def test_trades_steps_equal_a_loop_by_hand(weights: str) -> None:
    ours, theirs = conv_bn(), conv_bn()
    take, optimizer = step(ours, rf.trades(3.0)), sgd(theirs)
    method = {"none": rf.no_perturbation(), "awp": rf.awp(0.1), "sam": rf.sam(0.2)}[weights]
    for seed in range(3):
        x, y = images(6, seed)
        take(ours, [(x, y)], method, torch.Generator().manual_seed(seed))
        # TRADES' released attack: from 0.001 times normal noise, up the divergence.
        theirs.eval()
        with torch.no_grad():
            clean = theirs(x)
        noise = torch.empty_like(x).normal_(0, 1e-3, generator=torch.Generator().manual_seed(seed))
        x_adv = x + noise
        for _ in range(3):
            x_adv.requires_grad_()
            (g,) = torch.autograd.grad(kl(clean, theirs(x_adv)) * len(x), x_adv)
            x_adv = x_adv.detach() + 0.05 * g.sign()
            x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
        theirs.train()

        def loss(x: Tensor = x, x_adv: Tensor = x_adv, y: Tensor = y) -> Tensor:
            out = theirs(x)
            return F.cross_entropy(out, y) + 3.0 * kl(out, theirs(x_adv))

        if weights == "awp":
            awp_by_hand(theirs, loss, 0.1)
        elif weights == "sam":
            parameters = list(theirs.parameters())
            gradients = torch.autograd.grad(loss(), parameters)
            kept, centre = statistics(theirs), [p.detach().clone() for p in parameters]
            length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p.add_(0.2 * g / length)
            theirs.zero_grad()
            loss().backward()
            put(theirs, kept)  # SAM's code keeps the statistics of the first pass
            with torch.no_grad():
                for p, c in zip(parameters, centre, strict=True):
                    p.copy_(c)
        else:
            theirs.zero_grad()
            loss().backward()
        optimizer.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    x, y = images()
    plain, clipped = conv_bn(), conv_bn()
    _, norm = step(plain)(plain, [(x, y)], rf.no_perturbation())
    bound = float(norm) / 3
    _, same = step(clipped, clip=bound)(clipped, [(x, y)], rf.no_perturbation())
    assert float(same) == pytest.approx(float(norm), rel=1e-12)  # before clipping
    for p, q in zip(plain.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad / 3, rtol=1e-5, atol=1e-9)  # type: ignore[operator]
    loose = conv_bn()
    step(loose, clip=float(norm) * 1.01)(loose, [(x, y)], rf.no_perturbation())
    for p, q in zip(plain.parameters(), loose.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("weights", [rf.no_perturbation(), rf.awp(0.1), rf.sam(0.1)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_whole(weights: Any, poison: float) -> None:
    model = conv_bn()
    take = step(model, skip_nonfinite=True)
    x, y = images()
    take(model, [(x, y)], weights)
    before = copy.deepcopy(model.state_dict())
    momentum = copy.deepcopy(take.optimizer.state_dict())
    bad = x.clone()
    bad[0, 0, 0, 0] = poison
    _, norm = take(model, [(bad, y)], weights)
    assert not math.isfinite(float(norm))
    # Statistics too: with nan in them, every later attack in eval mode would be nan.
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    state = take.optimizer.state_dict()["state"]
    for i, held in momentum["state"].items():
        assert torch.equal(held["momentum_buffer"], state[i]["momentum_buffer"])
    _, norm = take(model, [(x, y)], weights)
    assert math.isfinite(float(norm))
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_a_step_that_is_not_finite_and_not_skipped_shows_in_its_norm() -> None:
    model = conv_bn()
    x, y = images()
    _, norm = step(model)(model, [(x * math.nan, y)], rf.no_perturbation())
    assert not math.isfinite(float(norm))


@pytest.mark.parametrize("skip", [True, False])
def test_a_scaler_recovers_from_overflow(skip: bool) -> None:
    # Scaled by 2^127 the loss overflows float32; the scale must halve until it does not.
    class Large(rf.adversarial):
        def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            return 100 * super().__call__(model, x, x_adv, y)

    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    take = step(model, Large(), scaler=scaler, skip_nonfinite=skip)
    x, y = images(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    take(model, [(x, y)], rf.no_perturbation())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for _ in range(15):
        _, norm = take(model, [(x, y)], rf.no_perturbation())
    assert 1 < scaler.get_scale() < 2.0**127
    assert math.isfinite(float(norm))
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_scaled_step_is_the_plain_one() -> None:
    x, y = images(dtype=torch.float32)
    for weights in (rf.awp(0.1), rf.msam(rf.sam(0.1), 2)):
        plain, scaled = mlp(), mlp()
        step(plain)(plain, [(x, y)], weights)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        _, norm = step(scaled, scaler=scaler)(scaled, [(x, y)], weights)
        for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        grads = [p.grad for p in plain.parameters()]
        assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()))  # type: ignore[union-attr]


def test_step_at_perturbed_is_the_released_order() -> None:
    # AWP's code: add v, backward, optimizer.step, subtract v. So weight decay acts on w + v.
    x, y = images()
    ours, theirs = conv_bn(), conv_bn()
    for model, at in ((ours, "perturbed"), (theirs, "centre")):
        step(
            model, step_at=at, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
        )(model, [(x, y)], rf.awp(0.1))
    # By hand: the two differ by lr * decay * v.
    model = conv_bn()
    x_adv = pgd_by_hand(model, x, y)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    g = torch.autograd.grad(F.cross_entropy(model(x_adv), y), list(matrices.values()))
    moved = dict(zip(matrices, g, strict=True))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        expected = torch.zeros_like(a)
        if name in moved:
            v = 0.1 * matrices[name].norm() * moved[name] / moved[name].norm()
            expected = -0.1 * 0.5 * v
        torch.testing.assert_close(a - b, expected, rtol=1e-8, atol=1e-12)


# --- how often it attacks


class Counted:
    """An attack that counts its calls, and notes where the weights stood."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.at = model, []  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: Any = None) -> Tensor:
        self.at.append([p.detach().clone() for p in self.model.parameters()])
        return x + 0.01 * len(self.at)

    def moved(self, centre: list[Tensor]) -> list[bool]:
        return [
            not all(torch.equal(a, b) for a, b in zip(at, centre, strict=True)) for at in self.at
        ]


COUNTS: dict[str, tuple[Any, str, list[bool]]] = {
    # One attack at the centre; True where an attack stands at perturbed weights.
    "awp never": (rf.awp(0.1, steps=3), "never", [False]),
    "awp1 ascent": (rf.awp(0.1), "ascent", [False]),
    "awp3 ascent": (rf.awp(0.1, steps=3), "ascent", [False, True, True]),
    "awp1 descent": (rf.awp(0.1), "descent", [False, True]),
    "awp3 descent": (rf.awp(0.1, steps=3), "descent", [False, True, True, True]),
    "off descent": (rf.awp(0.0, steps=3), "descent", [False]),
    "none descent": (rf.no_perturbation(), "descent", [False]),
    "random ascent": (rf.random_weights(0.1), "ascent", [False]),
    "random descent": (rf.random_weights(0.1), "descent", [False, True]),
}


@pytest.mark.parametrize("case", COUNTS)
def test_attacks_are_counted(case: str) -> None:
    weights, reattack, expected = COUNTS[case]
    model = conv_bn()
    centre = [p.detach().clone() for p in model.parameters()]
    attack = Counted(model)
    x, y = images()
    seen = []

    class Objective(rf.adversarial):
        def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            seen.append(float((x_adv - x).mean()))
            return super().__call__(model, x, x_adv, y)

    take = TrainStep(
        attack=attack,  # type: ignore[arg-type]
        objective=Objective(),
        optimizer=sgd(model),
        reattack=reattack,  # type: ignore[arg-type]
    )
    take(model, [(x, y)], weights)
    assert attack.moved(centre) == expected
    # The descent is on the newest images.
    assert seen[-1] == pytest.approx(0.01 * len(expected))


def test_attack_and_weights_draw_from_generators_of_their_own() -> None:
    def taken(attack_seed: int, weights_seed: int) -> list[Tensor]:
        model = conv_bn()
        take = TrainStep(
            attack=rf.pgd("linf", 0.1, 1), objective=rf.adversarial(), optimizer=sgd(model)
        )
        seeds = (torch.Generator().manual_seed(s) for s in (attack_seed, weights_seed))
        take(model, [images(6, 0)], rf.random_weights(0.1), *seeds)
        return [p.detach() for p in model.parameters()]

    def differ(one: list[Tensor], two: list[Tensor]) -> bool:
        return not all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    assert not differ(taken(1, 2), taken(1, 2))
    assert differ(taken(1, 2), taken(3, 2))
    assert differ(taken(1, 2), taken(1, 3))


def test_logits_are_float32_whatever_computed_them() -> None:
    x, _ = images(2, 0, torch.float32)
    assert Autocast(conv_bn(dtype=torch.float32), torch.bfloat16)(x).dtype == torch.float32


def test_the_attack_is_made_once_for_every_batch_and_chunk() -> None:
    model = conv_bn()
    batches = [images(6, seed) for seed in range(3)]
    for weights, given, calls in (
        (rf.nsam(rf.sam(0.1), 3), batches, 3),
        (rf.msam(rf.sam(0.1), 2), batches[:1], 1),
    ):
        attack = Counted(model)
        take = TrainStep(attack=attack, objective=rf.adversarial(), optimizer=sgd(model))  # type: ignore[arg-type]
        take(model, given, weights)
        assert len(attack.at) == calls
    attack = Counted(model)
    take = TrainStep(attack=attack, objective=rf.standard(), optimizer=sgd(model))  # type: ignore[arg-type]
    take(model, batches[:1], rf.sam(0.1))
    assert attack.at == []


def test_chunks_have_their_own_perturbation_of_one_attacked_batch() -> None:
    x, y = images(6)
    ours, theirs = conv_bn(), conv_bn()
    step(ours)(ours, [(x, y)], rf.msam(rf.awp(0.1), 2))
    x_adv = pgd_by_hand(theirs, x, y)
    total = [torch.zeros_like(p) for p in theirs.parameters()]
    for at in (0, 2, 4):
        rows = slice(at, at + 2)
        awp_by_hand(theirs, lambda r=rows: F.cross_entropy(theirs(x_adv[r]), y[r]), 0.1)  # type: ignore[misc]
        for t, p in zip(total, theirs.parameters(), strict=True):
            t += p.grad / 3  # type: ignore[operator]
    for t, p in zip(total, ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, t, rtol=1e-9, atol=1e-12)


def test_batches_are_climbed_together_and_the_first_descended() -> None:
    batches = [images(6, seed) for seed in range(3)]
    ours, theirs = conv_bn(), conv_bn()
    step(ours)(ours, batches, rf.nsam(rf.sam(0.2), 3))
    attacked = [(pgd_by_hand(theirs, x, y), y) for x, y in batches]
    parameters = list(theirs.parameters())
    mean = sum(F.cross_entropy(theirs(x), y) for x, y in attacked) / 3
    gradients = torch.autograd.grad(mean, parameters)  # type: ignore[arg-type]
    length = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p.add_(0.2 * g / length)
    theirs.zero_grad()
    F.cross_entropy(theirs(attacked[0][0]), attacked[0][1]).backward()
    for p, q in zip(ours.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


# --- precision, device, statistics


@pytest.mark.parametrize("weights", [rf.awp(0.5), rf.sam(0.5), rf.msam(rf.sam(0.5), 3)])
def test_bf16_sees_the_perturbed_weights(weights: Any) -> None:
    x, y = images(dtype=torch.float32)
    grads = {}
    for name, method in (("perturbed", weights), ("plain", rf.no_perturbation())):
        for precision in (None, torch.bfloat16):
            model = mlp()
            step(model, precision=precision)(model, [(x, y)], method)
            found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            grads[name, precision] = torch.cat(found)
            assert all(p.dtype == torch.float32 for p in model.parameters())
    effect = grads["perturbed", None] - grads["plain", None]
    low = grads["perturbed", torch.bfloat16] - grads["plain", torch.bfloat16]
    assert float(effect.norm()) > 0.05 * float(grads["plain", None].norm())
    assert float((low - effect).norm()) < 0.2 * float(effect.norm())
    # And it really is of low precision.
    assert not torch.equal(grads["plain", None], grads["plain", torch.bfloat16])


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("reattack", ["never", "descent"])
@pytest.mark.parametrize("objective", [rf.standard(), rf.adversarial(), rf.trades(), rf.mart()])
def test_the_whole_step_runs_on_the_meta_device(objective: Any, reattack: Any, clip: Any) -> None:
    model = conv_bn(dtype=torch.float32).to("meta")
    x, y = (t.to("meta") for t in images(4, dtype=torch.float32))
    take = step(model, objective, clip=clip, reattack=reattack)
    for weights in (rf.no_perturbation(), rf.awp(), rf.gsam(0.1), rf.random_weights(0.1)):
        value, norm = take(model, [(x, y)], weights)
        assert value.is_meta
        assert norm.is_meta
    if reattack == "never":
        assert take(model, [(x, y)], rf.msam(rf.sam(0.1), 2))[0].is_meta
        assert take(model, [(x, y)] * 2, rf.nsam(rf.sam(0.1), 2))[0].is_meta
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    "said", [{}, {"clip": 0.1}, {"step_at": "perturbed"}, {"reattack": "descent"}]
)
def test_the_whole_step_never_waits_for_the_device(said: dict[str, Any]) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    take = step(model, rf.trades(), **said)
    with NoSync():
        take(model, [(x, y)], rf.awp(0.1, steps=2))


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        (rf.no_perturbation(), 1),
        (rf.awp(0.1, steps=3), 1),
        (rf.sam(0.1, steps=2), 1),
        (rf.asam(0.1), 2),
        (rf.random_weights(0.1), 1),
        (rf.nsam(rf.sam(0.1), 2), 1),
        (rf.msam(rf.awp(0.1), 2), 3),
    ],
)
@pytest.mark.parametrize("objective", [rf.adversarial(), rf.trades()])
def test_batch_norm_counts_the_outer_passes_alone(
    weights: Any, passes: int, objective: Any
) -> None:
    model = conv_bn()
    batches = [images(6, seed) for seed in range(getattr(weights, "batches", 1))]
    step(model, objective, reattack="never")(model, batches, weights)
    forwards = 2 if isinstance(objective, rf.trades) else 1
    assert int(model[1].num_batches_tracked) == passes * forwards  # type: ignore[index]
