"""What a training step costs, in passes and in time, as ratios taken in one run.

    python scripts/benchmark.py
    python scripts/benchmark.py --model preact_resnet18 --option width=16 --batch 64 --device cuda

A forward pass counts 1, a pass that also reaches the images 2, one that also reaches the weights 3.
Adversarial training with K-step PGD then needs at least 2 K + 3 units, and 2 K + 6 with a weight
perturbation of one ascent step. The units are timed as bare passes of the same network on the same
batch; ``over`` says how much longer a step takes than its units. Rounds are interleaved, so that a
machine whose speed drifts slows all of them alike; ratios are taken within a round, and their
medians shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import robustflat as rf
from robustflat import models
from robustflat.perturb import WeightPerturbation
from robustflat.train.step import Autocast, TrainStep


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(description="Cost of a training step, as ratios.")
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--width", type=int, default=16, help="the model's width")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pgd-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    x = torch.rand(args.batch, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (args.batch,), device=device)

    def network() -> nn.Module:
        torch.manual_seed(0)
        mean, std = (0.5,) * 3, (0.25,) * 3
        made = models.build(
            args.model,
            num_classes=10,
            in_channels=3,
            mean=mean,
            std=std,
            options={"width": args.width},
        )
        return made.to(device)

    methods = {
        "AT": (rf.no_perturbation(), 0.0),
        "AT + awp": (rf.awp(5e-3), 3.0),
        "AT + awp, 3 steps": (rf.awp(5e-3, 3), 9.0),
        "AT + amp": (rf.amp(0.1), 3.0),
        "AT + sam": (rf.sam(0.05), 3.0),
        "AT + asam": (rf.asam(0.5), 3.0),
        "AT + gsam": (rf.gsam(0.05, 0.4), 3.0),
        "AT + random": (rf.random_weights(5e-3), 0.0),
        "AT + sam, half the weights": (rf.sam(0.05, parameters="re:layer[34]"), 3.0),
    }
    steps: dict[str, Callable[[], object]] = {
        name: _step(network(), x, y, args.pgd_steps, weights)
        for name, (weights, _) in methods.items()
    }
    steps["AT + sam, every 2nd step"] = _alternating(
        _step(network(), x, y, args.pgd_steps, rf.sam(0.05)),
        _step(network(), x, y, args.pgd_steps, rf.no_perturbation()),
    )
    base = network()
    base.train()
    bare: dict[str, Callable[[], object]] = {
        "input pass": partial(_input_pass, base, x, y),
        "full pass": partial(_full_pass, base, x, y),
    }
    layouts: dict[str, Callable[[], object]] = {
        "AT + awp, channels_last": _step(
            network().to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
            y,
            args.pgd_steps,
            rf.awp(5e-3),
        ),
        "AT + awp, bf16, channels_last": _step(
            network().to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
            y,
            args.pgd_steps,
            rf.awp(5e-3),
            torch.bfloat16,
        ),
    }
    times = _interleaved({**bare, **steps, **layouts}, args.rounds, device)
    times["AT + sam, every 2nd step"] = [t / 2 for t in times["AT + sam, every 2nd step"]]

    console = Console()
    console.print(
        f"{args.model} (width {args.width}), batch {args.batch}, PGD-{args.pgd_steps}, {device}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds} rounds"
    )
    table = Table()
    for heading in ("step", "units", "seconds", "over bare passes", "over AT"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name in [*steps, *layouts]:
        extra = 1.5 if name.endswith("2nd step") else methods.get(name, (None, 3.0))[1]
        units = 2 * args.pgd_steps + 3 + extra
        full = (3 + extra) / 3
        bare_passes = [
            args.pgd_steps * attack + full * descent
            for attack, descent in zip(times["input pass"], times["full pass"], strict=True)
        ]
        table.add_row(
            name,
            f"{units:g}",
            f"{statistics.median(times[name]):.3f}",
            f"{_ratio(times[name], bare_passes) - 1:+.1%}",
            f"{_ratio(times[name], times['AT']):.3f}",
        )
    console.print(table)


def _step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    pgd_steps: int,
    weights: WeightPerturbation,
    precision: torch.dtype | None = None,
) -> Callable[[], object]:
    model.train()
    step = TrainStep(
        attack=rf.pgd(steps=pgd_steps, mode="batch"),
        objective=rf.adversarial(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4),
        precision=precision,
    )
    return lambda: step(model, [(x, y)], weights)


def _alternating(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    """Two steps, one of each kind."""

    def both() -> None:
        first()
        second()

    return both


def _input_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward, and backward to the images; an attack step without its arithmetic."""
    images = x.detach().requires_grad_()
    torch.autograd.grad(F.cross_entropy(Autocast(model, None)(images), y), images)


def _full_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward, and backward to the weights."""
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def _interleaved(
    jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each job in every round; a round runs each once, after one of warm-up.

    Every other round runs backwards, so that no job always follows the same one.
    """
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        order = list(jobs.items())[:: 1 if number % 2 else -1]
        for name, job in order:
            began = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                taken[name].append(time.perf_counter() - began)
    return taken


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of the ratio within a round, so that drift cancels."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
