"""Evaluating a subject: attacks on its test images, and its robust-generalization gap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robustflat.errors import UserError
from robustflat.evaluate import Scores, evaluate, gap, merge, overfitting, scores
from robustflat.evaluate.record import fingerprint_of
from robustflat.files import write_json
from robustflat.perturb import pgd
from robustflat.subject import Network, Subject

GAP_STEPS = 20
Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an evaluation shall do; None is what the subject says.

    Attributes:
        attacks: As `robustflat.evaluate` takes them.
        checkpoints: Where the attacks are run: "best", "last" or both.
        weights: "raw", "average", or "auto": the average if there is one.
        samples: Evaluate a fixed class-balanced subset of the test images.
        gap_samples: Images of each split for the gap; 0 leaves the gap out.
        seed: Of the attacks.
        shard: "i/n" to attack every n-th example only. Nothing else is measured then, and
            ``evaluation.json`` is left alone: when all shards are done, call again with ``merge``.
        merge: Take the outcomes that all shards left instead of attacking.
        precision: "bf16" searches in bfloat16 and verifies in float32.
    """

    attacks: Sequence[Any] | None = None
    checkpoints: Sequence[str] | None = None
    weights: str | None = None
    samples: int | None = None
    gap_samples: int | None = None
    seed: int = 0
    shard: str | None = None
    merge: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"


def evaluate_subject(
    subject: Subject, wanted: Wanted | None = None, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Evaluate a subject and write its ``evaluation.json``.

    Attacks run on the test images. The gap of a run is measured at every checkpoint that it has,
    with PGD-20 from one uniform start, in eval mode at the centre weights, on the same
    un-augmented training images, the validation images and the test images. Per-example outcomes
    are kept under ``outcomes/``, so an interrupted evaluation goes on where it stood.

    Args:
        subject: What is evaluated.
        wanted: What is done.
        on_progress: Told the attack, batches done and in all, and how many still stand.

    Returns:
        What was written: keys ``run``, ``seed``, ``norm``, ``eps``, ``checkpoints`` (each with
        ``epoch``, ``weights``, ``test`` and ``gap``) and ``overfitting``; of a shard what was
        found, without a gap.

    Raises:
        UserError: If the subject cannot be evaluated as wanted.
    """
    wanted = Wanted() if wanted is None else wanted
    config, threat = subject.evaluation, subject.the_threat()
    attacked = _attacked_at(subject, wanted)
    networks = {
        name: subject.network(name, wanted.weights)
        for name in dict.fromkeys((*attacked, *subject.checkpoints))
    }
    found: dict[str, Any] = {}
    on_test: dict[str, Scores] = {}
    limit = config.samples if wanted.samples is None else wanted.samples
    gap_samples = _gap_samples(subject, wanted)
    splits = subject.splits(gap_samples) if gap_samples else {}
    for name in subject.checkpoints:
        network = networks[name]
        entry: dict[str, Any] = {"epoch": network.epoch, "weights": network.weights, "test": None}
        found[name] = entry
        if name in attacked:
            # Another evaluation, or another state of the subject, has a store of its own.
            kind = (fingerprint_of(network.model), str(threat), limit, wanted.seed)
            digest = hashlib.sha256(repr((*kind, config.batch_size)).encode()).hexdigest()[:12]
            store = subject.home.outcomes / f"{name}-{digest}"
            entry["test"] = _attacked(subject, network, wanted, limit, store, on_progress)
        if splits:
            attack = pgd(threat.norm, threat.eps, GAP_STEPS)
            by_split = {
                split: scores(
                    network.model,
                    images,
                    attack,
                    batch_size=config.batch_size,
                    device=subject.device,
                )
                for split, images in splits.items()
            }
            on_test[name] = by_split["test"]
            entry["gap"] = gap(by_split).to_dict()
    report = {
        "run": subject.name,
        "seed": subject.seed,
        "norm": threat.norm_name,
        "eps": threat.eps,
        "gap_attack": f"pgd-{GAP_STEPS}",
        "checkpoints": found,
        "overfitting": None,
    }
    if len(on_test) == 2:
        figures = overfitting(on_test["best"], on_test["last"])
        report["overfitting"] = {name: figure.to_dict() for name, figure in figures.items()}
    if wanted.shard is None:
        subject.home.evaluation.parent.mkdir(parents=True, exist_ok=True)
        write_json(subject.home.evaluation, report)
    return report


def check(subject: Subject, wanted: Wanted) -> None:
    """Refuse what cannot be evaluated, before anything else is paid for.

    Raises:
        UserError: If a checkpoint or the threat is missing, or an option does not fit.
    """
    subject.the_threat()
    for name in _attacked_at(subject, wanted):
        subject.network(name, wanted.weights)
    if wanted.merge and wanted.shard is not None:
        raise UserError("--merge joins all shards: leave --shard out.")
    for name, value, least in (
        ("samples", wanted.samples, 1),
        ("gap-samples", wanted.gap_samples, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}.")


def _gap_samples(subject: Subject, wanted: Wanted) -> int:
    """Images of each split: no more than were asked to be attacked, unless more are asked for."""
    if wanted.shard is not None:
        return 0
    if wanted.gap_samples is not None:
        return wanted.gap_samples
    # Of a model from elsewhere it is not known what it was trained on.
    most = subject.evaluation.gap_samples if subject.is_run else 0
    return most if wanted.samples is None else min(most, wanted.samples)


def _attacked_at(subject: Subject, wanted: Wanted) -> tuple[str, ...]:
    if wanted.checkpoints is not None:
        return tuple(wanted.checkpoints)
    return ("best",) if subject.is_run else subject.checkpoints


def _attacked(
    subject: Subject,
    network: Network,
    wanted: Wanted,
    limit: int | None,
    store: Path,
    on_progress: Progress | None,
) -> dict[str, Any]:
    if wanted.merge:
        return merge(store).to_dict()
    config, threat = subject.evaluation, subject.the_threat()
    result = evaluate(
        network.model,
        subject.images().test,
        config.attacks if wanted.attacks is None else wanted.attacks,
        threat.norm,
        threat.eps,
        wanted.seed,
        batch_size=config.batch_size,
        device=subject.device,
        store=store,
        samples=limit,
        shard=wanted.shard,
        precision=wanted.precision,
        on_progress=on_progress,
    )
    return result.to_dict()
