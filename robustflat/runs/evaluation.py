"""Evaluating a run: attacks on its test images, and its robust-generalization gap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from robustflat.errors import UserError
from robustflat.evaluate import Scores, evaluate, gap, merge, overfitting, scores
from robustflat.evaluate.outcomes import fingerprint_of
from robustflat.files import write_json
from robustflat.perturb import pgd
from robustflat.runs.restore import CheckpointName, Run, WeightsName

GAP_STEPS = 20
Progress = Callable[[str, int, int, int], None]


def evaluate_run(
    run: Run,
    attacks: Sequence[Any] | None = None,
    *,
    checkpoints: Sequence[CheckpointName] = ("best",),
    weights: WeightsName = "auto",
    samples: int | None = None,
    seed: int = 0,
    shard: str | None = None,
    merged: bool = False,
    norm: str | float | None = None,
    eps: float | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a run and write its ``evaluation.json``.

    Attacks run on the test images at ``checkpoints``. The gap is measured at every checkpoint that
    the run has, with PGD-20 from one uniform start, in eval mode at the centre weights, on the
    same un-augmented training images, the validation images and the test images. Per-example
    outcomes are kept under ``outcomes/``, so an interrupted evaluation goes on where it stood and
    a further attack only attacks what still stands.

    Args:
        run: the run.
        attacks: as :func:`robustflat.evaluate` takes them; the configuration's if None.
        checkpoints: where the attacks are run.
        weights: raw, averaged, or the average if there is one.
        samples: evaluate a fixed class-balanced subset of the test images.
        seed: of the attacks.
        shard: "i/n" to attack every n-th example only. Nothing else is measured then, and
            ``evaluation.json`` is left alone: when all shards are done, call again with ``merged``.
        merged: take the outcomes that all shards left instead of attacking.
        norm: threat norm; the training attack's if None.
        eps: threat radius in image units; the training attack's if None.
        precision: "bf16" searches in bfloat16 and verifies in float32.
        on_progress: told the attack, batches done and in all, and how many still stand.

    Returns:
        What was written: keys ``run``, ``seed``, ``norm``, ``eps``, ``checkpoints`` (each with
        ``epoch``, ``weights``, ``test`` and ``gap``) and ``overfitting``; of a shard what was
        found, without a gap.
    """
    config = run.config.evaluate
    if norm is None or eps is None:
        trained = run.threat()
        norm, eps = norm or trained[0], trained[1] if eps is None else eps
    limit = config.samples if samples is None else samples
    try:
        attack = pgd(norm, eps, GAP_STEPS)
    except ValueError as error:
        raise UserError(f"Norm {norm} and eps {eps} are no threat: {error}") from None
    missing = [name for name in checkpoints if name not in run.checkpoints()]
    if missing:
        use = " or ".join(f"--checkpoint {name}" for name in run.checkpoints())
        raise UserError(
            f"The run {run.folder.root} has no {missing[0]} checkpoint: it was trained without "
            f"validation, or not to the end of an epoch. {f'Use {use}' if use else 'Train it'}."
        )
    test = run.test_tensors(None)
    splits = {"train": run.train_tensors(config.gap_samples)}
    if run.data.validation is not None:
        splits["validation"] = run.data.validation.tensors()
    splits["test"] = run.test_tensors(config.gap_samples)

    found: dict[str, Any] = {}
    on_test: dict[str, Scores] = {}
    for name in run.checkpoints():
        network = run.network(name, weights)
        entry: dict[str, Any] = {"epoch": network.epoch, "weights": network.weights, "test": None}
        # Another evaluation, or another state of the run, has a store of its own.
        kind = (fingerprint_of(network.model), norm, eps, limit, seed, config.batch_size)
        digest = hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
        store = run.folder.outcomes / f"{name}-{digest}"
        if name in checkpoints and merged:
            entry["test"] = merge(store).to_dict()
        elif name in checkpoints:
            result = evaluate(
                network.model,
                test,
                config.attacks if attacks is None else attacks,
                norm,
                eps,
                seed,
                batch_size=config.batch_size,
                device=run.device,
                store=store,
                samples=limit,
                shard=shard,
                precision=precision,
                on_progress=on_progress,
            )
            entry["test"] = result.to_dict()
        found[name] = entry
        if shard is not None:
            continue
        by_split = {
            split: scores(
                network.model, part, attack, batch_size=config.batch_size, device=run.device
            )
            for split, part in splits.items()
        }
        on_test[name] = by_split["test"]
        entry["gap"] = gap(by_split).to_dict()
    report = {
        "run": run.name,
        "seed": run.config.seed,
        "norm": norm,
        "eps": eps,
        "gap_attack": f"pgd-{GAP_STEPS}",
        "checkpoints": found,
        "overfitting": None,
    }
    if len(on_test) == 2:
        figures = overfitting(on_test["best"], on_test["last"])
        report["overfitting"] = {name: figure.to_dict() for name, figure in figures.items()}
    if shard is None:
        write_json(run.folder.evaluation, report)
    return report
