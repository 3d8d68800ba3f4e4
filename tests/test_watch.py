"""What a step shows of itself is what its formulas say, and showing it changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images
from test_weights import methods
from torch import Tensor, nn

import robustflat as rf
from robustflat.train.listeners import Listener, Outbox
from robustflat.train.step import TrainStep

CPU = torch.device("cpu")


def quadratic() -> tuple[nn.Module, Tensor]:
    """0.5 * w' H w with w = (3, 4): the gradient is H w."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    return model, torch.tensor([1.0, 2.0], dtype=torch.float64)


def test_a_sam_step_on_a_quadratic_shows_what_one_computes_by_hand() -> None:
    model, h = quadratic()
    watch = rf.Watch()
    with watch.step():
        rf.sam(0.5).backward(lambda: 0.5 * (h * model.weight**2).sum(), model)
    found = {name: float(value) for name, value in watch.values.items()}
    # Centre: (9 + 2 * 16) / 2; its gradient (3, 8); there w + 0.5 (3, 8) / sqrt(73).
    length = math.sqrt(73)
    w = (3 + 0.5 * 3 / length, 4 + 0.5 * 8 / length)
    there = (w[0] ** 2 + 2 * w[1] ** 2) / 2
    gradient = (w[0], 2 * w[1])
    size = math.hypot(*gradient)
    assert found == pytest.approx(
        {
            "loss/centre": 20.5,
            "loss/perturbed": there,
            "rise": there - 20.5,
            "gradient_norm/ascent": length,
            "gradient_norm/descent": size,
            "cosine/gradients": (3 * gradient[0] + 8 * gradient[1]) / (length * size),
            "perturbation": 0.1,
            "layers/weight": 0.1,
        },
        rel=1e-12,
    )


def test_successive_perturbations_are_compared() -> None:
    model, h = quadratic()
    watch, weights = rf.Watch(), rf.sam(0.5)

    def step(sign: float, **how: bool) -> dict[str, Tensor]:
        with watch.step(**how):
            weights.backward(lambda: sign * 0.5 * (h * model.weight**2).sum(), model)
        return watch.values

    assert "cosine/successive" not in step(1.0)
    assert float(step(1.0)["cosine/successive"]) == pytest.approx(1)
    # At -loss the ascent goes the opposite way.
    assert float(step(-1.0)["cosine/successive"]) == pytest.approx(-1)
    assert step(1.0, looks=False, keeps=False) == {}
    assert "cosine/successive" not in step(1.0, keeps=False)  # the step before kept nothing
    assert "cosine/successive" not in step(1.0)
    step(1.0, keeps=False)
    assert step(1.0, looks=False) == {}
    assert float(step(-1.0, keeps=False)["cosine/successive"]) == pytest.approx(-1)


def test_the_first_perturbation_and_the_first_ascent_gradient_of_a_step_are_compared() -> None:
    w, a, b = ([torch.tensor(v)] for v in ([3.0, 4.0], [1.0, 0.0], [0.0, 2.0]))
    watch = rf.Watch()
    for _ in range(2):
        with watch.step():
            for chunk in (a, b):  # as mSAM's chunks
                watch.perturbed(["w"], w, chunk)
    # Of the chunks of this step with the first one of the step before; sizes are means.
    assert float(watch.values["cosine/successive"]) == 1.0
    assert float(watch.values["perturbation"]) == pytest.approx((1 / 5 + 2 / 5) / 2)
    model, h = quadratic()
    with watch.step():
        rf.sam(0.5, steps=3).backward(lambda: 0.5 * (h * model.weight**2).sum(), model)
    assert float(watch.values["gradient_norm/ascent"]) == pytest.approx(math.sqrt(73))
    assert float(watch.values["loss/centre"]) == 20.5


def test_what_begins_elsewhere_does_not_see_the_centre() -> None:
    watch = rf.Watch()
    with watch.step():
        watch.ascended(torch.tensor(2.0), [torch.tensor([3.0, 4.0])], at_centre=False)
    assert {name: float(v) for name, v in watch.values.items()} == {"gradient_norm/ascent": 5.0}


def test_layers_are_tensors_of_two_dimensions() -> None:
    model = conv_bn(dtype=torch.float64)
    x, y = images(8)
    watch = rf.Watch()
    with watch.step():
        rf.sam(0.1).backward(lambda: F.cross_entropy(model(x), y), model)
    layers = {name for name in watch.values if name.startswith("layers/")}
    assert layers == {f"layers/{name}" for name, p in model.named_parameters() if p.ndim > 1}
    assert any(p.ndim == 1 for p in model.parameters())


def test_awp_shows_gamma_as_the_relative_size_of_every_matrix() -> None:
    model = conv_bn(dtype=torch.float64)
    x, y = images(8)
    watch = rf.Watch()
    with watch.step():
        rf.awp(0.03).backward(lambda: F.cross_entropy(model(x), y), model)
    layers = {n: float(v) for n, v in watch.values.items() if n.startswith("layers/")}
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    assert layers == pytest.approx({f"layers/{name}": 0.03 for name in matrices}, rel=1e-9)
    assert float(watch.values["perturbation"]) == pytest.approx(0.03, rel=1e-9)


def test_the_loss_at_the_centre_is_of_the_batch_that_is_descended() -> None:
    model = conv_bn(dtype=torch.float64)
    x, y = images(8)
    watch, weights = rf.Watch(), methods()["nsam"]
    with torch.no_grad():
        first = F.cross_entropy(model(x), y)
    with watch.step():
        weights.backward(lambda i=0: F.cross_entropy(model(x / (i + 1)), y), model)
    assert float(watch.values["loss/centre"]) == pytest.approx(float(first), rel=1e-12)


def test_without_a_weight_perturbation_there_is_one_loss_and_no_rise() -> None:
    model, h = quadratic()
    watch = rf.Watch()
    with watch.step():
        rf.no_perturbation().backward(lambda: 0.5 * (h * model.weight**2).sum(), model)
    assert set(watch.values) == {"loss/centre", "gradient_norm/descent"}
    assert float(watch.values["loss/centre"]) == 20.5


def test_a_random_perturbation_never_sees_the_centre() -> None:
    model = conv_bn(dtype=torch.float64)
    x, y = images(8)
    watch = rf.Watch()
    with watch.step():
        rf.random_weights(0.01).backward(lambda: F.cross_entropy(model(x), y), model)
    assert "loss/perturbed" in watch.values
    assert not {"rise", "loss/centre", "cosine/gradients"} & set(watch.values)


def test_a_scaler_does_not_scale_what_is_shown() -> None:
    shown = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=64.0)):
        for method in (rf.sam(0.1), rf.gsam(0.1, 0.4)):
            model = conv_bn(dtype=torch.float32)
            x, y = images(8, dtype=torch.float32)
            watch = rf.Watch()
            with watch.step():
                method.backward(
                    lambda m=model, x=x, y=y: F.cross_entropy(m(x), y), model, scaler=scaler
                )
            shown.append({name: float(value) for name, value in watch.values.items()})
    assert shown[2] == pytest.approx(shown[0], rel=1e-5)
    assert shown[3] == pytest.approx(shown[1], rel=1e-5)
    # GSAM's descent rewrites the gradient; what is compared is the one at the perturbed weights.
    assert shown[1]["cosine/gradients"] == pytest.approx(shown[0]["cosine/gradients"], rel=1e-5)


def test_the_attack_shows_its_losses_and_what_it_breaks() -> None:
    # A linear model of two classes; logits (0, 4 x - 2), so x > 0.5 is class 1.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [4.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -2.0]))
    x = torch.tensor([0.9, 0.6, 0.25, 0.1]).view(4, 1, 1, 1)
    y = torch.tensor([1, 1, 0, 0])
    step = TrainStep(
        attack=rf.pgd("linf", 0.2, 2, step_size=0.1, start="zero"),
        objective=rf.trades(),
        optimizer=torch.optim.SGD(model.parameters(), 0.0),
    )
    watch = rf.Watch()
    with watch.step():
        step(model, [(x, y)], rf.no_perturbation())
    found = watch.values
    # 0.6 -> 0.4 is broken, the three others are not.
    assert float(found["attack/broken"]) == 0.25
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(4, 1, 1, 1)
    for k in (1, 2):
        expected = F.cross_entropy(model(x + 0.1 * (k - 1) * sign), y).detach()
        assert float(found[f"attack/loss/{k}"]) == pytest.approx(expected.item(), rel=1e-5)
    assert "attack/loss/3" not in found
    with watch.step():
        step(model, [(x, F.one_hot(y, 2).float())], rf.no_perturbation())
    assert float(watch.values["attack/broken"]) == 0.25
    # The first pass counts: weights perturbed as much as this break the others.
    for weights in (rf.awp(3.0), rf.sam(30.0)):
        with watch.step():
            step(model, [(x, y)], weights)
        assert float(watch.values["attack/broken"]) == 0.25
        assert float(watch.values["rise"]) > 1
    with watch.step(looks=False):
        step(model, [(x, y)], rf.awp(3.0))
    assert watch.values == {}


@pytest.mark.parametrize("method", methods())
def test_watching_changes_no_bit(method: str) -> None:
    ends = []
    for watched in (False, True):
        model = conv_bn(dtype=torch.float32).train()
        x, y = images(8, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step = TrainStep(
            attack=rf.pgd("linf", 0.1, 2), objective=rf.adversarial(), optimizer=optimizer
        )
        weights, watch = methods()[method], rf.Watch()
        generator = torch.Generator().manual_seed(3)
        batches = [(x, y), (x.flip(0), y.flip(0)), (x, y), (x, y)][: max(1, weights.batches)]
        for _ in range(3):
            with watch.step(looks=watched, keeps=watched):
                step(model, batches, weights, generator)
        ends.append([t.clone() for t in (*model.parameters(), *model.buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_throughput_is_that_of_the_steps_since_the_last_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("robustflat.train.listeners.time.monotonic", lambda: now)
    told = Told()
    outbox = Outbox([told], CPU, 8)
    looked = ("a",), torch.tensor([1.0])
    outbox.post(0, 0)
    outbox.post(0, 1)
    now = 102.0
    outbox.post(0, 2, looked)  # 3 steps of 8 images in 2 s
    now = 106.0
    outbox.post(0, 3, looked)  # one in 4 s
    now = 200.0
    outbox.restart_clock()
    now = 201.0
    outbox.post(1, 0, looked)
    speeds = [v["images_per_second"] for *_, v in told.steps if v]
    assert speeds == pytest.approx([12.0, 2.0, 8.0])


class Told(Listener):
    def __init__(self) -> None:
        self.steps: list[Any] = []

    def on_step(self, epoch: int, step: int, values: Any) -> None:
        self.steps.append((epoch, step, dict(values)))


def test_the_outbox_tells_every_step_in_order_once_its_values_have_arrived() -> None:
    told = Told()
    outbox = Outbox([told], CPU, 8)
    outbox.post(0, 0, (("a", "b"), torch.tensor([1.0, 2.0])), {"lr": 0.5})
    outbox.post(0, 1)
    assert [(e, s) for e, s, _ in told.steps] == [(0, 0), (0, 1)]
    values = told.steps[0][2]
    assert (values["a"], values["b"], values["lr"]) == (1.0, 2.0, 0.5)
    assert values["images_per_second"] > 0
    assert values["memory"] > 10 * 2**20
    assert told.steps[1][2] == {}

    class Late:
        here = waited = False

        def query(self) -> bool:
            return self.here

        def synchronize(self) -> None:
            self.waited = True

    late = Late()
    outbox.post(1, 0, (("a",), torch.tensor([3.0])))
    letter = outbox._letters
    assert not letter
    from robustflat.train.listeners import _Letter

    letter.append(_Letter(1, 1, {}, ("a",), torch.tensor([4.0]), late))  # type: ignore[arg-type]
    outbox.post(1, 2)
    assert told.steps[-1][:2] == (1, 0)  # nothing overtakes what is on its way
    late.here = True
    outbox.deliver()
    assert [(e, s) for e, s, _ in told.steps[-2:]] == [(1, 1), (1, 2)]
    assert not late.waited
    late.here = False
    letter.append(_Letter(2, 0, {}, ("a",), torch.tensor([5.0]), late))  # type: ignore[arg-type]
    outbox.deliver()
    assert told.steps[-1][:2] == (1, 2)
    outbox.deliver(wait=True)
    assert told.steps[-1] == (2, 0, {"a": 5.0})
    assert late.waited
