"""The benchmark's peer makes the passes that it is charged with, and the table is printed."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from script_support import script
from torch import nn

benchmark = script("benchmark")


def _gradient(
    model: nn.Module, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Of the loss with respect to the first layer, this being its weight."""
    weight = weight.clone().requires_grad_()
    logits = torch.func.functional_call(model, {"1.weight": weight}, (x,))
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), weight)[0]


def test_the_released_loop_is_adversarial_weight_perturbation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.rand(8, 3, 2, 2), torch.randint(0, 3, (8,))
    start = copy.deepcopy(model)
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    reached: list[int] = []
    model.register_forward_hook(
        lambda m, i, o: passes.append((i[0].detach(), m[1].weight.detach().clone()))
    )
    model[1].weight.register_hook(lambda g: reached.append(1))
    centre = model[1].weight.detach().clone()
    benchmark._released_loop(model, x, y, 4)()
    # Four of the attack, one of its end, one at the perturbed weights, one of the log; and one of
    # the proxy, which is another module whose hooks were copied with it.
    attack, end, proxy, descent, log = passes[:4], *passes[4:]
    # Back to the weights: 4 + 1, the proxy's own weight has no hook.
    assert len(reached) == 5
    assert all(torch.equal(w, centre) for _, w in (*attack, end, proxy))
    for images, _ in (*attack, end, descent):
        assert 0 < (images - x).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(log[0], x)
    away = descent[1] - centre
    assert torch.isclose(away.norm(), 5e-3 * centre.norm(), rtol=1e-4)
    # Up the loss; and the optimizer's first step, weight decay at the perturbed weights too.
    uphill, there = (_gradient(start, w, descent[0], y) for w in (centre, descent[1]))
    assert (away * uphill).sum() > 0.9 * away.norm() * uphill.norm()
    moved = model[1].weight - centre
    assert torch.allclose(moved, -1e-3 * (there + 5e-4 * descent[1]), rtol=1e-2, atol=1e-6)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--width", "2", "--batch", "4", "--pgd-steps", "1", "--rounds", "1", "--only", "AT"]
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", *said, "AT + awp", "AT + sam, every 2nd step"]
    )
    benchmark.main()
    units = {
        cells[1].strip(): cells[2].strip()
        for cells in (line.split("│") for line in capsys.readouterr().out.splitlines())
        if len(cells) > 2
    }
    assert units == {
        "AT": "5",
        "AT + awp": "8",
        "AT + sam, every 2nd step": "6.5",
        "released loop": "11",
    }
