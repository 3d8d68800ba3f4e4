"""What a GPU makes of robustflat, as one JSON: cost of a step over its bare passes, AutoAttack.

    PYTHONPATH=. python scripts/gpu_report.py --output gpu.json

It needs no network and no data, and runs from a checkout on any torch from 2.6 on; of robustflat's
other packages only NumPy, SciPy and, for AutoAttack, pyautoattack must be there. A row is one
network in one setting: seconds of a step with and without AWP, and how much longer each takes than
the passes it consists of, timed alone and eager in the same setting (those with gradients of the
images, those with gradients of the weights). ``--device cpu`` with small ``--width``, ``--batch``
and ``--images`` tries it out where there is no GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustflat as rf
from robustflat import models
from robustflat.evaluate import Work
from robustflat.files import write_json
from robustflat.numerics import float32
from robustflat.perturb.compiled import Compiled
from robustflat.train.graphed import Graphed
from robustflat.train.step import Autocast, TrainStep

NETWORKS: dict[str, dict[str, Any]] = {
    "preact_resnet18": {"name": "preact_resnet18", "width": 64},
    "wrn-34-10": {"name": "wide_resnet", "widen": 10, "depth": 34},
}
SETTINGS = (
    "fp32",
    "tf32",
    "bf16",
    "channels_last",
    "bf16+channels_last",
    "bf16+compiled",
    # train.compile: attack
    "fp32+compiled_attack",
    "tf32+compiled_attack",
    "bf16+channels_last+compiled_attack",
    # train.cuda_graphs: true
    "fp32+cuda_graphs",
    "tf32+cuda_graphs",
    "bf16+channels_last+cuda_graphs",
)
PGD_STEPS = 10


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=512, help="images that AutoAttack attacks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, help="another width of the networks")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "batch": args.batch,
        "pgd_steps": PGD_STEPS,
        "steps": [],
        "autoattack": None,
    }
    for name in args.networks:
        for setting in args.settings:
            row: dict[str, Any] = {"network": name, "setting": setting}
            try:
                row |= step_times(network(name, args.width), setting, device, args)
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
            report["steps"].append(row)
            print(row, flush=True)
            write_json(args.output, report)
    try:
        report["autoattack"] = autoattack_speed(args, device)
    except (ImportError, torch.OutOfMemoryError) as error:
        report["autoattack"] = {"error": str(error).splitlines()[0]}
    write_json(args.output, report)
    print(f"written: {args.output}")


def network(name: str, width: int | None) -> nn.Module:
    """A network for 32x32 images of ten classes, with weights of its own."""
    torch.manual_seed(0)
    options = dict(NETWORKS[name])
    if width is not None:
        options["widen" if "widen" in options else "width"] = width
    mean, std = (0.5,) * 3, (0.25,) * 3
    return models.build(
        options.pop("name"), num_classes=10, in_channels=3, mean=mean, std=std, options=options
    )


def step_times(
    model: nn.Module, setting: str, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step and of its bare passes, medians over rounds."""
    x = torch.rand(args.batch, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (args.batch,), device=device)
    model = model.to(device).train()
    if "channels_last" in setting:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    precision = torch.bfloat16 if "bf16" in setting else None
    used: Any = torch.compile(model) if setting.endswith("+compiled") else model
    attacked: nn.Module | None = None
    if setting.endswith("compiled_attack"):
        attacked = Compiled(model)
    elif setting.endswith("cuda_graphs"):
        attacked = Graphed(model)
    seen = Autocast(used, precision)
    step = TrainStep(
        attack=rf.pgd("linf", 8 / 255, PGD_STEPS, mode="batch"),
        objective=rf.adversarial(),
        optimizer=torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9),
        precision=precision,
        attacked=attacked,
    )

    def to_images() -> None:
        moved = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(seen(moved), y), moved)

    def to_weights() -> None:
        model.zero_grad()
        F.cross_entropy(seen(x), y).backward()

    parts: dict[str, Callable[[], object]] = {
        "to_images": to_images,
        "to_weights": to_weights,
        "step": lambda: step(used, [(x, y)], rf.no_perturbation()),
        "step_awp": lambda: step(used, [(x, y)], rf.awp(5e-3)),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: dict[str, list[float]] = {name: [] for name in parts}
    with float32(tf32=setting.startswith("tf32")):
        for part in parts.values():  # compiling, tuning, allocating
            part()
        for _ in range(args.rounds):
            for name, part in parts.items():
                times[name].append(seconds(part, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    bare = PGD_STEPS * median["to_images"] + median["to_weights"]
    return {
        "seconds": median,
        "over": median["step"] / bare - 1,
        "over_awp": median["step_awp"] / (bare + median["to_weights"]) - 1,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def autoattack_speed(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images a second that AutoAttack's fast version gets through, none of them broken early.

    A network of random weights is wrong on most labels, so the labels are its own answers.
    """
    model = network(args.networks[0], args.width).to(device).eval()
    x = torch.rand(args.images, 3, 32, 32)
    with torch.no_grad():
        answers = [model(part.to(device)).argmax(1).cpu() for part in x.split(args.batch)]
    y: Tensor = torch.cat(answers)
    began = time.perf_counter()
    # So small a radius breaks next to nothing: every attack runs on nearly every image.
    result = rf.evaluate(
        model,
        (x, y),
        attacks=["autoattack:fast"],
        norm="linf",
        eps=1e-4,
        work=Work(batch_size=args.batch),
    )
    took = time.perf_counter() - began
    return {
        "network": args.networks[0],
        "version": "fast",
        "images": args.images,
        "seconds": took,
        "images_per_second": args.images / took,
        "robust_accuracy": result.robust_accuracy,
    }


def seconds(part: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
