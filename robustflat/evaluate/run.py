"""Owns the evaluation itself: which attack runs when, on what still stands, saved as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate import sanity as checks
from robustflat.evaluate.accuracy import right
from robustflat.evaluate.attacks import Attack, Plan, Request, Threat, norm_name, plan, threat_norm
from robustflat.evaluate.gather import Examples, prepared
from robustflat.evaluate.hold import Plain, device_of, held
from robustflat.evaluate.outcomes import (
    MISCLASSIFIED,
    STANDING,
    Record,
    file_for,
    fingerprint,
    fingerprint_of,
    resume,
)
from robustflat.evaluate.result import Evaluation, from_record
from robustflat.evaluate.verify import judge

Progress = Callable[[str, int, int, int], None]


def evaluate(
    model: nn.Module,
    data: Examples,
    attacks: Sequence[Request] | Request = ("autoattack",),
    norm: str | float = "linf",
    eps: float = 8 / 255,
    seed: int = 0,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    store: str | Path | None = None,
    samples: int | None = None,
    shard: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    sanity: int = 32,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Robust accuracy of a model: the share of examples that no attack breaks.

    Attacks run in the order given, each on what still stands, so put cheap ones first. Every
    example is judged here, in float32, by the plain model, whatever the attack says (`judge`).
    AutoAttack's components find bit for bit what the official driver finds for the same seed and
    batch size. The model is evaluated in eval mode and is as before afterwards: modes, buffers,
    requires_grad, gradients, and torch's random state too.

    Args:
        model: Takes images in [0, 1], normalisation inside; returns logits [N, C].
        data: `(x, y)`, a loader of such batches, or a split of a data set. Images float
            [N, C, H, W] in [0, 1], labels whole numbers [N].
        attacks: Names, mappings with options, or what `rf.pgd(...)` returns; see `plan`.
        norm: "linf", "l2" or "l1".
        eps: Radius of the ball, in image units.
        seed: Every batch of every attack is attacked with this seed, as AutoAttack does.
        batch_size: Images at a time. Other sizes give other random starts.
        device: Where to compute; the model is brought back. None: where it is.
        store: A folder, or a file ending in .json, that keeps the outcome of every example. A
            killed evaluation, called again, goes on where it stood and ends with the same figure;
            one with further attacks runs only those, on what still stands. Attacks that the
            store has seen count in the result even if not asked for again.
        samples: Evaluate a fixed class-balanced subset of this size (`chosen`).
        shard: "i/n": evaluate every n-th example, from the i-th; `merge` joins the shards.
        precision: "bf16" searches under autocast to bfloat16, verifies in float32, and marks the
            attacks' names with "@bf16". Such a search may find less: run again in fp32 with the
            same store, which attacks what still stands, before reporting.
        sanity: Examples on which the sanity checks are made; 0 leaves them out.
        on_progress: Called with the attack's name, batches done, batches in all, and how many
            examples still stand.

    Returns:
        The evaluation.

    Raises:
        UserError: If anything given cannot work.
    """
    p = threat_norm(norm)
    _check(model, eps, batch_size, precision, seed, sanity)
    x, y, labels = prepared(data, samples, shard)
    place = device_of(model, torch.device("cpu")) if device is None else torch.device(device)
    settings: dict[str, Any] = {
        "norm": norm_name(p),
        "eps": float(eps),
        "seed": seed,
        "batch_size": batch_size,
        "samples": samples,
        "shard": shard,
        "data": None if store is None else fingerprint([x, y]),
        "labels": None if store is None else fingerprint([labels]),
        "model": None if store is None else fingerprint_of(model),
    }
    was_training = model.training
    with held(model, place):
        plain = Plain(model)
        classes, correct = _clean(plain, x, y, batch_size, place)
        settings["classes"] = classes
        threat = Threat(norm=p, eps=float(eps), classes=classes, shape=_shape(x))
        made = _in_precision(plan(attacks, threat), precision)
        record = _opened(store, shard, settings, correct)
        searched = Plain(model, bf16=precision == "bf16")
        for attack in _ordered(made, record):
            _attack(attack, searched, plain, x, y, threat, record, place, on_progress)
        record.warnings = [*made.notes, *checks.from_record(record)]
        if sanity:
            record.warnings += checks.run(
                plain, x, y, correct, threat, examples=sanity, training=was_training, device=place
            )
        record.save()
    return from_record(record)


def _check(
    model: nn.Module, eps: float, batch_size: int, precision: str, seed: int, sanity: int
) -> None:
    """Refuse arguments that cannot work."""
    if not isinstance(model, nn.Module):
        raise UserError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    if not (isinstance(eps, (int, float)) and 0 <= eps < math.inf):
        raise UserError(f"eps must be a finite number >= 0, in image units, got {eps!r}.")
    if precision not in ("fp32", "bf16"):
        raise UserError(f"The precision must be 'fp32' or 'bf16', got {precision!r}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("sanity", sanity, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be a whole number >= {least}, got {value!r}.")


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[1], x.shape[2], x.shape[3]


def _clean(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int, device: torch.device
) -> tuple[int, Tensor]:
    """Number of classes, and which examples (bool [N]) the model classifies correctly."""
    correct, classes = [], 0
    for start in range(0, len(x), batch_size):
        batch, labels = x[start : start + batch_size], y[start : start + batch_size]
        try:
            logits = model(batch.to(device))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise UserError(
                f"The model cannot classify images of the shape {list(batch.shape)}: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            ) from error
        if logits.ndim != 2 or len(logits) != len(batch) or logits.shape[1] < 2:
            raise UserError(
                f"The model must return logits of the shape [{len(batch)}, classes] with at least "
                f"two classes, got {list(logits.shape)}."
            )
        classes = logits.shape[1]
        if int(labels.max()) >= classes:
            raise UserError(
                f"The model has {classes} classes, numbered from 0, but there is the label "
                f"{int(labels.max())}."
            )
        bad = logits.isnan().any(1).cpu()
        if bool(bad.any()):
            raise UserError(
                f"The model returns NaN for {int(bad.sum())} of {len(batch)} images (first: number "
                f"{start + int(bad.nonzero()[0])}), without any attack. It has diverged, or its "
                "weights are damaged."
            )
        correct.append(right(logits, labels.to(device)).cpu())
    return classes, torch.cat(correct)


def _opened(
    store: str | Path | None, shard: str | None, settings: dict[str, Any], correct: Tensor
) -> Record:
    """The record to go on with: the one in the store, or a new one."""
    path = None if store is None else file_for(store, shard)
    record = None if path is None else resume(path, settings)
    if record is None:
        outcomes = torch.full((len(correct),), MISCLASSIFIED, dtype=torch.int8)
        outcomes[correct] = STANDING
        record = Record(settings=settings, outcomes=outcomes, path=path)
        record.save()
    elif len(record.outcomes) != len(correct):
        raise UserError(
            f"{path} has {len(record.outcomes)} outcomes for {len(correct)} examples: it is "
            "damaged. Name another file or folder."
        )
    return record


def _in_precision(made: Plan, precision: str) -> Plan:
    """The attacks under the names and identities of their precision."""
    if precision == "fp32":
        return made
    named = [
        Attack(
            name=f"{a.name}@{precision}",
            identity={**a.identity, "precision": precision},
            run=a.run,
            black_box=a.black_box,
            bounded=a.bounded,
        )
        for a in made.attacks
    ]
    note = (
        "The attacks searched in bfloat16 and may have found less than in float32: run again in "
        "fp32 with the same store before reporting."
    )
    return Plan(attacks=named, notes=[*made.notes, note])


def _ordered(made: Plan, record: Record) -> list[Attack]:
    """The attacks still to run: the one that was interrupted first, then the new ones."""
    unfinished = [entry for entry in record.entries if not entry.finished]
    again = [a for a in made.attacks if unfinished and a.identity == unfinished[0].identity]
    if unfinished and not again:
        raise UserError(
            f"{record.path} holds the attack {unfinished[0].name}, which was interrupted. Ask for "
            "it again, so that it can end, or name another file or folder."
        )
    return again + [a for a in made.attacks if record.find(a.identity) is None]


def _attack(
    attack: Attack,
    searched: nn.Module,
    plain: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    record: Record,
    device: torch.device,
    on_progress: Progress | None,
) -> None:
    """Run one attack, or the rest of it, on what stood when it began; save after every batch."""
    entry = record.find(attack.identity) or record.add(
        attack.name, attack.identity, black_box=attack.black_box, bounded=attack.bounded
    )
    index = record.entries.index(entry)
    batch_size = record.settings["batch_size"]
    # Compacted once, at the attack's start, as the official driver does: so the batches, and
    # with them the random starts, do not depend on where a run was interrupted.
    batches = record.standing_at(index).split(batch_size) if entry.attacked else ()
    for number, positions in enumerate(batches):
        if number < entry.batches:
            continue
        began = time.perf_counter()
        images, labels = x[positions].to(device), y[positions].to(device)
        seed = record.settings["seed"]
        try:
            found = attack.run(searched, images, labels, seed) if threat.eps else images
        except (RuntimeError, ArithmeticError, LookupError) as error:
            raise UserError(
                f"The attack {attack.name} failed on this model ({type(error).__name__}: {error})."
            ) from error
        verdict = judge(plain, images, found, labels, norm=threat.norm, eps=threat.eps)
        record.outcomes[positions[verdict.broken]] = index
        entry.outside += int(verdict.outside.sum())
        entry.batches = number + 1
        entry.finished = entry.batches == len(batches)
        entry.seconds += time.perf_counter() - began
        record.save()
        if on_progress is not None:
            standing = int((record.outcomes == STANDING).sum())
            on_progress(entry.name, entry.batches, len(batches), standing)
    entry.finished = True
    record.save()
