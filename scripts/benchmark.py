"""What a training step costs, in passes and in time, as ratios taken in one run.

    python scripts/benchmark.py
    python scripts/benchmark.py --model preact_resnet18 --option width=16 --batch 64 --device cuda

A forward pass counts 1, a pass that also reaches the images 2, one that also reaches the weights 3.
Adversarial training with K-step PGD then needs at least 2 K + 3 units, and 2 K + 6 with a weight
perturbation of one ascent step. The units are timed as bare passes of the same network on the same
batch; ``over`` says how much longer a step takes than its units. Rounds are interleaved, so that a
machine whose speed drifts slows all of them alike; ratios are taken within a round, and their
medians shown.

The released loop is that of AWP's code (3 K + 8 units): every pass of the attack goes back to the
weights too, a pass forward looks at the attack's end and one at the clean images for the log, and
the ascent is made by a proxy of the model. ``--only`` picks rows, such as "AT + awp" "AT + awp,
compiled" for a large network; the released loop and the bare passes are always timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import robustflat as rf
from robustflat import models
from robustflat.allocator import keep_freed_memory
from robustflat.perturb.compiled import Compiled
from robustflat.perturb.modes import Mode, attack_mode
from robustflat.train.step import TrainStep

Job = Callable[[], object]
SETTINGS: dict[str, dict[str, Any]] = {
    "AT + awp, compiled": {"compiled": True},
    "AT + awp, channels_last": {"channels_last": True},
    "AT + awp, compiled, channels_last": {"compiled": True, "channels_last": True},
    "AT + awp, bf16, channels_last": {"precision": torch.bfloat16, "channels_last": True},
}
ALTERNATING = "AT + sam, every 2nd step"


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(description="Cost of a training step, as ratios.")
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--width", type=int, default=16, help="the model's width")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pgd-steps", type=int, default=10)
    parser.add_argument("--mode", default="batch", choices=("batch", "eval"), help="of the attack")
    parser.add_argument("--only", nargs="+", help="rows to time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does, for the released loop too
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

    # Units beside those of AT, and what takes the step.
    rows: dict[str, tuple[float, Job]] = {}
    methods = {
        "AT": (0.0, rf.no_perturbation()),
        "AT + awp": (3.0, rf.awp(5e-3)),
        "AT + awp, 3 steps": (9.0, rf.awp(5e-3, 3)),
        "AT + amp": (3.0, rf.amp(0.1)),
        "AT + sam": (3.0, rf.sam(0.05)),
        "AT + asam": (3.0, rf.asam(0.5)),
        "AT + gsam": (3.0, rf.gsam(0.05, 0.4)),
        "AT + random": (0.0, rf.random_weights(5e-3)),
        "AT + sam, half the weights": (3.0, rf.sam(0.05, parameters="re:layer[34]")),
    }
    attack = rf.pgd(steps=args.pgd_steps, mode=args.mode)
    wanted = set(args.only or [*methods, *SETTINGS, ALTERNATING])
    for name, (extra, weights) in methods.items():
        if name in wanted:
            rows[name] = extra, _step(network(), x, y, attack, weights)
    for name, setting in SETTINGS.items():
        if name in wanted:
            rows[name] = 3.0, _step(network(), x, y, attack, rf.awp(5e-3), **setting)
    if ALTERNATING in wanted:
        both = [_step(network(), x, y, attack, w) for w in (rf.sam(0.05), rf.no_perturbation())]
        rows[ALTERNATING] = 1.5, lambda: [step() for step in both]
    base = network().train()
    jobs: dict[str, Job] = {
        "input pass": partial(_input_pass, base, x, y, args.mode),
        "full pass": partial(_full_pass, base, x, y),
        "released loop": _released_loop(network().train(), x, y, args.pgd_steps),
        **{name: job for name, (_, job) in rows.items()},
    }
    times, first = _interleaved(jobs, args.rounds, device)
    if ALTERNATING in times:
        times[ALTERNATING] = [t / 2 for t in times[ALTERNATING]]
    rows["released loop"] = args.pgd_steps + 5, jobs["released loop"]

    console = Console(width=120)
    console.print(
        f"{args.model} (width {args.width}), batch {args.batch}, PGD-{args.pgd_steps} in "
        f"{args.mode} mode, {device}, {torch.get_num_threads()} threads, median of {args.rounds} "
        "rounds"
    )
    table = Table()
    columns = ("step", "units", "seconds", "first", "over bare passes", "over AT", "over released")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, (extra, _) in rows.items():
        full = (3 + extra) / 3
        passes = [
            args.pgd_steps * attack + full * descent
            for attack, descent in zip(times["input pass"], times["full pass"], strict=True)
        ]
        # The passes that it must make, whatever the released loop wastes.
        least = passes if name != "released loop" else None
        table.add_row(
            name,
            f"{2 * args.pgd_steps + 3 + extra:g}",
            f"{statistics.median(times[name]):.3f}",
            f"{first[name]:.1f}",
            f"{_ratio(times[name], least):.3f}" if least else "",
            f"{_ratio(times[name], times['AT']):.3f}" if "AT" in times else "",
            f"{_ratio(times[name], times['released loop']):.3f}",
        )
    console.print(table)


def _step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: rf.InputPerturbation,
    weights: rf.Perturbation,
    *,
    channels_last: bool = False,
    precision: torch.dtype | None = None,
    compiled: bool = False,
) -> Job:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, x = model.to(memory_format=layout).train(), x.contiguous(memory_format=layout)
    step = TrainStep(
        attack=attack,
        objective=rf.adversarial(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4),
        precision=precision,
        attacked=Compiled(model) if compiled else None,
    )
    return lambda: step(model, [(x, y)], weights)


def _released_loop(model: nn.Module, x: Tensor, y: Tensor, pgd_steps: int) -> Job:
    """A step of AT-AWP as its authors' code takes it (train_cifar10.py and utils_awp.py)."""
    eps, gamma = 8 / 255, 5e-3
    proxy = copy.deepcopy(model)
    proxy_optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        delta = torch.empty_like(x).uniform_(-eps, eps)
        delta = torch.clamp(delta, -x, 1 - x).requires_grad_()
        for _ in range(pgd_steps):
            F.cross_entropy(model(x + delta), y).backward()
            assert delta.grad is not None
            with torch.no_grad():
                moved = (delta + eps / 4 * delta.grad.sign()).clamp(-eps, eps)
                delta.copy_(torch.clamp(moved, -x, 1 - x))
            delta.grad.zero_()
        F.cross_entropy(model(x + delta), y, reduction="none").detach()
        x_adv = (x + delta.detach()).clamp(0, 1)

        proxy.load_state_dict(model.state_dict())
        proxy_optimizer.zero_grad()
        (-F.cross_entropy(proxy(x_adv), y)).backward()
        proxy_optimizer.step()
        away = {}
        with torch.no_grad():
            for (name, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
                if old.ndim > 1:
                    moved = new - old
                    away[name] = gamma * old.norm() / (moved.norm() + 1e-20) * moved
                    old.add_(away[name])
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in away:
                    parameter.sub_(away[name])
        F.cross_entropy(model(x), y).item()  # the log

    return step


def _input_pass(model: nn.Module, x: Tensor, y: Tensor, mode: Mode) -> None:
    """Forward, and backward to the images; an attack step without its arithmetic."""
    images = x.detach().requires_grad_()
    with attack_mode(model, mode):
        torch.autograd.grad(F.cross_entropy(model(images), y), images)


def _full_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward, and backward to the weights."""
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def _interleaved(
    jobs: dict[str, Job], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each job in every round, and of a first time, in which some are compiled.

    Every other round runs backwards, so that no job always follows the same one. With one CPU
    thread they are the process's own, which other processes do not lengthen.
    """
    own = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own else time.perf_counter
    first: dict[str, float] = {}
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in list(jobs.items())[:: 1 if number % 2 else -1]:
            began = clock()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = clock() - began
            if number:
                taken[name].append(took)
            else:
                first[name] = took
    return taken, first


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of the ratio within a round, so that drift cancels."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
