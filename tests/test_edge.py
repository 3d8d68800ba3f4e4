"""The watch at the edge of stability: against quadratics, the full Hessian, and itself left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flatness_models import conv_net, examples, flat_gradient, full_hessian, mlp
from test_flatness_state import Everything
from torch import nn
from train_support import SMALL_CNN, config, differences

import robustflat as rf
from robustflat.flatness.examples import read_examples
from robustflat.report.curves import of_step
from robustflat.train.edge import Edge, radius_of_sam, sam_edge, stable
from robustflat.train.loop import Trainer
from robustflat.train.setup import load_data


def grows(settings: dict[str, Any], eigenvalue: float) -> bool:
    """Whether torch's SGD grows on a quadratic of that curvature."""
    w = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([w], **settings)
    for _ in range(1000):
        w.grad = eigenvalue * w.detach()
        optimizer.step()
    return float(w.detach().abs()) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.5},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1.0},
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
    ],
    ids=str,
)
def test_the_optimizers_edge_is_where_it_begins_to_grow_on_a_quadratic(settings):
    edge = stable(torch.optim.SGD([nn.Parameter(torch.ones(()))], **settings))
    assert not grows(settings, 0.99 * edge)
    assert grows(settings, 1.01 * edge)


def test_sams_edge_is_where_its_step_begins_to_overshoot():
    lr, rho, w0 = 0.1, 0.3, 0.7

    def moved(eigenvalue):
        w = nn.Module()
        w.w = nn.Parameter(torch.tensor([w0], dtype=torch.float64))
        rf.sam(rho).backward(lambda: (eigenvalue * w.w.square() / 2).sum(), w)
        return abs(w0 - lr * float(w.w.grad))

    # The gradient's norm, eigenvalue * w0, is that of the eigenvalue at the edge.
    low, high = 0.1, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) < w0 else (low, middle)
    assert sam_edge(2 / lr, rho, low * w0) == pytest.approx(low, rel=1e-9)
    assert sam_edge(2 / lr, 1e-9, 1.0) == pytest.approx(2 / lr), "without a radius it is the other"


def test_only_plain_sam_has_sams_edge():
    assert radius_of_sam(rf.sam(0.2)) == 0.2
    others = (
        rf.sam(0.0), rf.sam(0.2, norm="linf"), rf.sam(0.2, steps=2), rf.asam(0.2), rf.awp(0.01),
        rf.sam(0.2, parameters="norm"), rf.gsam(0.2, 0.1), rf.no_perturbation(),
        rf.msam(rf.sam(0.2), chunk=2), rf.random_weights(0.1),
    )  # fmt: skip
    assert [radius_of_sam(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("attacked", [False, True])
def test_eigenvalue_and_alignment_are_those_of_the_full_hessian(attacked):
    model, data = mlp((6, 10, 4)), examples(20, (6,), 4)
    attack = rf.pgd(eps=0.1, steps=3, start="zero") if attacked else None
    look = Edge(data, 12, attack, 5, 0, 60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    found = look(model, optimizer, rf.sam(0.2))
    x, y, _ = read_examples(data, 12)
    x = attack(model, x, y) if attack else x
    values, vectors = torch.linalg.eigh(full_hessian(model, x, y))
    gradient = flat_gradient(model, x, y)
    assert found["edge/lambda_1"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert found["edge/converged"] == 1
    assert found["edge/gradient_norm"] == pytest.approx(float(gradient.norm()))
    cosine = abs(float(gradient @ vectors[:, -1])) / float(gradient.norm())
    assert found["edge/alignment"] == pytest.approx(cosine, abs=0.02)
    assert (found["edge/2_over_lr"], found["edge/optimizer"]) == pytest.approx((20, 30))
    expected = sam_edge(30, 0.2, float(gradient.norm()))
    assert found["edge/sam"] == pytest.approx(expected, rel=1e-5)
    assert found["edge/reached"] == pytest.approx(float(values[-1]) / expected, rel=1e-3)
    plain = Edge(data, 12, attack, 5, 0, 60)(model, optimizer, rf.no_perturbation())
    assert plain["edge/reached"] == pytest.approx(float(values[-1]) / 30, rel=1e-3)
    # Looked at again, the old eigenvector is where it starts.
    again = look(model, torch.optim.Adam(model.parameters(), lr=0.1), rf.sam(0.2))
    assert again["edge/products"] < found["edge/products"]
    assert again["edge/lambda_1"] == pytest.approx(float(values[-1]), rel=1e-3)
    ours = {"edge/optimizer", "edge/sam", "edge/reached"}
    assert ours.isdisjoint(again), "these are of SGD alone"
    assert Edge(data, 12, attack, 5, 0, 2)(model, optimizer, rf.sam(0.2))["edge/converged"] == 0
    optimizer.param_groups[0]["lr"] = 0.0  # as warm-up begins
    assert "edge/2_over_lr" not in look(model, optimizer, rf.sam(0.2))


def test_a_look_leaves_no_trace():
    model = conv_net().train()
    model[3].eval()
    model[5].weight.grad = torch.randn_like(model[5].weight)
    x, y = examples(9, (1, 4, 4), 3)
    before = Everything(model)
    Edge((x.float(), y), 9, rf.pgd(eps=0.1, steps=2), 4, 0, 5)(
        model, torch.optim.SGD(model.parameters(), lr=0.1), rf.sam(0.1)
    )
    before.check()


class Told:
    def __init__(self) -> None:
        self.values: dict[tuple[int, int], dict[str, float]] = {}

    def on_start(self, epochs: int, steps: int, done: int) -> None: ...
    def on_step(self, epoch: int, step: int, values: Any) -> None:
        if "edge/lambda_1" in values:
            self.values[epoch, step] = dict(values)

    def on_epoch(self, row: dict[str, Any]) -> None: ...
    def on_end(self) -> None: ...


@pytest.mark.parametrize(
    ("edge", "looked"),
    [
        ({"every": 3, "unit": "steps"}, [(0, 0), (0, 3), (1, 2), (2, 1)]),
        ({"every": 2}, [(0, 0), (2, 0)]),
    ],
)
def test_the_training_is_the_same_to_the_last_bit(tmp_path: Path, edge, looked):
    def run(**more: Any) -> tuple[Trainer, Told]:
        asked = config(
            tmp_path, model=SMALL_CNN, train__epochs=3, weights={"name": "sam", "rho": 0.1},
            monitor__step_every=0,
            optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.5}, **more,
        )  # fmt: skip
        told = Told()
        data = load_data(asked)
        trainer = Trainer(asked, data, torch.device("cpu"), listeners=[told])
        assert trainer.steps_per_epoch == 4
        trainer.run()
        return trainer, told

    plain, watched = run(), run(monitor__edge={**edge, "samples": 20, "max_hvps": 4})
    for part in plain[0]._parts:
        states = [
            one._parts[part] and one._parts[part].state_dict() for one in (plain[0], watched[0])
        ]
        assert differences(*states) == [], part
    assert not plain[1].values
    assert list(watched[1].values) == looked
    for values in watched[1].values.values():
        assert values["edge/2_over_lr"] == pytest.approx(2 / values["lr"])
        assert {"edge/sam", "edge/alignment", "edge/seconds"} <= set(values)
    assert of_step({"edge/sam": 3.0}) == {("", "6-flatness/edge_sam"): 3.0}
    assert of_step({"edge/seconds": 3.0}) == {("", "8-machine/edge_seconds"): 3.0}
