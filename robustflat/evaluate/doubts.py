"""Owns the reasons to doubt a robust accuracy: sentences that stand beside it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.data import balanced
from robustflat.evaluate.accuracy import right
from robustflat.evaluate.attacks.autoattack import square, square_fits
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.frozen import Plain, device_of
from robustflat.evaluate.operations import of_operations
from robustflat.evaluate.record import Entry, Record
from robustflat.evaluate.threat import Task
from robustflat.models import Normalized
from robustflat.perturb import InputPerturbation, fgsm, pgd

# Examples for the probe of the input range, which costs a few forward passes only.
_PROBE = 256
_QUERIES = 200
# AutoAttack's own threshold: Square takes more than this share from what white-box attacks left.
_SQUARE_SHARE = 0.002
# How many examples more one attack must break on the sample before it is called stronger.
_MORE = 2
# The kind of a finding that other attacks can withdraw.
MASKING = "masking"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def probes(
    model: Plain,
    examples: Examples,
    correct: Tensor,
    task: Task,
    *,
    sample: int,
    training: bool,
) -> list[list[str]]:
    """All checks that look at the model, on a fixed class-balanced choice of examples.

    Costs three forward passes and about a dozen more on up to 256 examples, on `sample` of
    those classified correctly at most 81 forward and backward passes and 200 queries, and what
    `of_operations` does.

    Args:
        model: The plain model in eval mode.
        examples: N images and labels.
        correct: bool [N]: which ones the model classifies.
        task: The task.
        sample: How many to attack.
        training: Whether the model was given in train mode.

    Returns:
        For every finding its kind, `MASKING` or "", and a sentence.
    """
    y, device = examples.labels, device_of(model, torch.device("cpu"))
    pick = balanced(y, min(_PROBE, len(y)), seed=0)
    some, labels = examples.images(pick).to(device), y[pick].to(device)
    found, masking = [], []
    if training:
        found.append(
            "The model was given in train mode; it was evaluated in eval mode. If you also use it "
            "elsewhere, call model.eval() first."
        )
    found += _outputs(model, some[:sample])
    found += _input_range(model, some, labels)
    right_ones = correct.nonzero().flatten()
    if len(right_ones):
        chosen = right_ones[balanced(y[right_ones], min(sample, len(right_ones)), seed=0)]
        victims, classes = examples.images(chosen).to(device), y[chosen].to(device)
        found += _zero_gradients(model, victims, classes)
        if task.eps:
            masking = _ladder(model, victims, classes, task)
            masking += _saturated(model, victims, classes)
    return [["", sentence] for sentence in found] + [[MASKING, sentence] for sentence in masking]


def of_record(record: Record) -> list[str]:
    """All that keeps the figures of a record from being taken at their word.

    A suspicion that gradients are masked, raised by a probe on a few examples, is withdrawn where
    Square, which needs no gradients, was run on all that white-box attacks left, and broke no
    more of it than AutoAttack's own threshold.
    """
    found = [sentence for notes in record.notes.values() for sentence in notes]
    found += _of_precision(record) + _of_outcomes(record)
    cleared = any(
        entry.identity.get("attack") == "autoattack:square" and not _is_much(more, record)
        for entry, more in _black_box(record)
    )
    found += [text for kind, text in record.probes if kind != MASKING or not cleared]
    return list(dict.fromkeys(found))


def _black_box(record: Record) -> list[tuple[Entry, int]]:
    """Black-box attacks, and how many examples each broke that no white-box one had broken."""
    white = [entry for _, entry in record.finished() if not entry.black_box]
    left = record.right.clone()
    for entry in white:
        left[entry.broke] = False
    black = [entry for _, entry in record.finished() if entry.black_box]
    return [(entry, int(left[entry.broke].sum())) for entry in black] if white else []


def _is_much(broken: int, record: Record) -> bool:
    return broken > _SQUARE_SHARE * len(record.right)


def _of_precision(record: Record) -> list[str]:
    """Attacks that searched in low precision and did not run in full precision too."""
    full = [entry.identity for _, entry in record.finished()]
    names = []
    for _, entry in record.finished():
        same = {key: value for key, value in entry.identity.items() if key != "precision"}
        if "precision" in entry.identity and same not in full:
            names.append(entry.name)
    if not names:
        return []
    what = f"{', '.join(names)} searched in bfloat16 and may have found less than in float32"
    return [f"{what}: run again in fp32 before reporting."]


def _of_outcomes(record: Record) -> list[str]:
    """What the outcomes themselves tell: black-box attacks, stray images, interrupted attacks."""
    found = []
    for entry, more in _black_box(record):
        if _is_much(more, record):
            found.append(
                f"The black-box attack {entry.name} broke {more} of {len(record.right)} examples "
                "that white-box attacks had left standing: gradients are probably masked, and the "
                "true robust accuracy lower. Try more steps and restarts, or an adaptive attack."
            )
    for _, entry in record.finished():
        if entry.outside and entry.bounded:
            found.append(
                f"{entry.outside} images that {entry.name} returned lay outside the ball or "
                "[0, 1], or were not finite, and were not counted; the "
                f"{len(entry.broke)} that it broke are. Check its options."
            )
    begun = [entry.name for entry in record.entries if entry.batches and not entry.finished]
    if begun:
        found.append(
            f"{', '.join(begun)} was interrupted and does not count: ask for it again, and it "
            "goes on where it stood."
        )
    return found


def _outputs(model: nn.Module, x: Tensor) -> list[str]:
    """Probabilities instead of logits, unusual operations, and defences that optimise."""
    found = []
    logits = model(x)
    sums = (logits.sum(1) - 1).abs()
    if bool(((logits >= -1e-5) & (logits <= 1 + 1e-5)).all() & (sums < 1e-4).all()):
        found.append(
            "The outputs look like probabilities (rows sum to one): gradients vanish where the "
            "model is sure. Evaluate the logits, without the softmax."
        )
    unit = F.normalize(logits, dim=1)
    random = any(
        bool(((F.normalize(model(x), dim=1) - unit).norm(dim=1) > 1e-4).any()) for _ in "12"
    )
    found += of_operations(model, x, random)
    calls = _calls(lambda: model(x), {"grad", "backward"})
    if calls:
        found.append(
            "The model computes gradients while it classifies, as defences that optimise at test "
            "time do: AutoAttack's attacks are not adapted to it, and the figures may be too high."
        )
    return found


def _calls(action: Callable[[], object], names: set[str]) -> int:
    """How often functions of torch.autograd with these names are called during `action`."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_name in names:
            count += frame.f_globals.get("__name__", "").startswith("torch.autograd")

    # Not sys.settrace, as AutoAttack does: that is where debuggers and coverage live.
    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return count


def _input_range(model: Plain, x: Tensor, y: Tensor) -> list[str]:
    """Whether the model does better on images that are normalised more, or less."""
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), correction=0, keepdim=True)
    inside = "Put the normalisation inside the model (robustflat.models.Normalized; "
    ways = {
        "standardised with the data's mean and std": (
            (x - mean) / std.clamp_min(1e-3),
            f"{inside}--normalise data)",
        ),
        "scaled to [-1, 1]": (
            2 * x - 1,
            f"{inside}--normalise MEAN/STD with 0.5 for every number)",
        ),
        "scaled to [0, 255]": (
            255 * x,
            f"{inside}--normalise MEAN/STD with 0 and 0.00392157 = 1/255)",
        ),
    }
    if x.shape[1] == 3:
        imagenet = [torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in _IMAGENET]
        text = "/".join(",".join(map(str, numbers)) for numbers in _IMAGENET)
        ways["normalised with ImageNet's mean and std"] = (
            (x - imagenet[0]) / imagenet[1],
            f"{inside}--normalise {text})",
        )
    if isinstance(model.net, Normalized):
        layer = model.net.normalize
        ways["not normalised by the layer in front of it"] = (
            x * layer.std + layer.mean,
            "Take that layer away (--normalise none), if the network normalises itself",
        )
    count = len(x)
    given = right(model(x), y)
    answers = {way: right(model(images), y) for way, (images, _) in ways.items()}
    way, there = max(answers.items(), key=lambda pair: int(pair[1].sum()))
    gained, lost = int((there & ~given).sum()), int((given & ~there).sum())
    # The sign test on the images that the two ways classify differently.
    chance = sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1))
    if gained - lost < 0.03 * count or chance > 1e-3 * 2 ** (gained + lost):
        return []
    return [
        (
            "The model does not seem to take images in [0, 1]: it classifies "
            f"{int(there.sum())} of {count} images when they are {way}, but {int(given.sum())} "
            f"as they are. {ways[way][1]}, or every eps has another meaning."
        )
    ]


def _zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        loss = F.cross_entropy(model(inputs), y, reduction="sum")
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, inputs, allow_unused=True)
    zero = len(x) if gradient is None else int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if not zero:
        return []
    return [
        (
            f"The gradient of the cross-entropy is exactly zero at {zero} of {len(x)} images: "
            "gradient-based attacks see nothing there, and the figures may be too high (saturated "
            "outputs, or an operation that cannot be differentiated)."
        )
    ]


def _saturated(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Where probabilities round to one: the gradient of the cross-entropy lacks its main term."""
    zero = int((F.cross_entropy(model(x), y, reduction="none") == 0).sum())
    if 2 * zero < len(x):
        return []
    what = f"At {zero} of {len(x)} images the model is so sure that the cross-entropy is zero in "
    what += "float32, and its gradient has lost its main term: gradients vanish numerically, and "
    return [f"{what}attacks on it may find too little. Attack the margin too (apgd-t)."]


def _ladder(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> list[str]:
    """A stronger attack must break no less: more steps, larger eps, any image, white box."""
    larger = 2 * task.eps

    def broken(attack: InputPerturbation) -> int:
        generator = torch.Generator(x.device).manual_seed(0)
        try:
            x_adv = attack(model, x, y, generator=generator)
        except RuntimeError:
            # No gradient at all: that has been reported by itself.
            return 0
        return int((~right(model(x_adv), y)).sum())

    count = len(x)
    by_one = broken(fgsm(task.norm, task.eps))
    by_many = broken(pgd(task.norm, task.eps, 20))
    # Cross-entropy is a poor guide where outputs are small, as those of networks trained little.
    by_margin = broken(pgd(task.norm, task.eps, 20, loss="margin"))
    by_larger = broken(pgd(task.norm, larger, 20))
    # The box itself, whatever the norm.
    by_all = broken(pgd("linf", 1.0, 20))
    found = []
    if by_one >= by_many + _MORE:
        found.append(
            f"One gradient step breaks {by_one} of {count} images, twenty break {by_many}: more "
            "steps are not stronger, so gradients are probably masked."
        )
    if by_many >= by_larger + _MORE:
        found.append(
            f"PGD breaks {by_many} of {count} images with eps = {task.eps:.4g} and {by_larger} "
            f"with {larger:.4g}: a larger eps is not stronger, so gradients are probably masked."
        )
    if by_all < 0.9 * count:
        found.append(
            f"With every image allowed (linf, eps = 1), PGD breaks only {by_all} of {count}: "
            "accuracy should go to 0, so gradients are probably masked."
        )
    # Not for l1, where a step of PGD moves one pixel and is no match for Square anyway.
    if task.norm > 1 and square_fits(task):
        x_adv = square(model, x, y, task, _QUERIES)
        by_square = int((~right(model(x_adv), y)).sum())
        if by_square >= max(by_many, by_margin) + _MORE:
            found.append(
                f"The black-box attack Square breaks {by_square} of {count} images with "
                f"{_QUERIES} queries, PGD with gradients {max(by_many, by_margin)}: gradients are "
                "probably masked."
            )
    return found
