"""Evaluating a subject: attacks on its test images, and its robust-generalization gap."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from robustflat.data import balanced
from robustflat.errors import UserError
from robustflat.evaluate import (
    Evaluation,
    Scores,
    Team,
    Work,
    evaluate,
    gap,
    merge,
    overfitting,
    scores,
)
from robustflat.evaluate.adversarial import check_target
from robustflat.evaluate.attacks import plan
from robustflat.evaluate.evaluation import classes_of, fingerprint_of_images
from robustflat.evaluate.examples import choose
from robustflat.evaluate.frozen import held
from robustflat.evaluate.record import fingerprint_of
from robustflat.evaluate.shown import show
from robustflat.evaluate.threat import Task
from robustflat.perturb import pgd
from robustflat.runs import records
from robustflat.runs.surrogates import with_surrogates
from robustflat.subject import Network, Subject
from robustflat.train.folder import environment

GAP_STEPS = 20
_SHOWN = 8  # images that are kept to be looked at
Progress = Callable[[str, int, int, int], None]

_UNLIKE = (
    "best - last is left out: the best checkpoint has {} weights and the last {} ones. Say "
    "--weights raw to compare the same kind."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an evaluation shall do; None is what the subject says.

    Attributes:
        attacks: As `robustflat.evaluate` takes them.
        checkpoints: Where the attacks are run: "best", "last" or both.
        weights: "raw", "average", or "auto": the average if there is one.
        samples: Evaluate a fixed class-balanced subset of the test images.
        gap_samples: Images of each split for the gap; 0 leaves the gap out. No more than `samples`
            if nothing is said; none for a model from elsewhere, of which it is not known what it
            was trained on.
        seed: Of the attacks.
        shard: "i/n" to attack every n-th example only. Nothing else is measured then, and
            ``evaluation.json`` is left alone: when all shards are done, call again with ``merge``.
        merge: Take the outcomes that all shards left instead of attacking.
        precision: "bf16" searches in bfloat16 and verifies in float32.
        compile: Search with the model compiled by torch.compile, where it can be.
        save_adversarial: A new .npz file for the adversarial examples.
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
    compile: bool = False
    save_adversarial: Path | None = None


def check(subject: Subject, wanted: Wanted) -> None:
    """Refuse what cannot be evaluated, before anything is paid for.

    Raises:
        UserError: If a checkpoint or the threat is missing, or an option does not fit.
    """
    threat = subject.the_threat()
    if wanted.merge and wanted.shard is not None:
        raise UserError("--merge joins all shards: leave --shard out.")
    if wanted.shard is not None and wanted.gap_samples:
        raise UserError("A shard has no gap: leave --gap-samples out, and say it with --merge.")
    if wanted.save_adversarial is not None:
        check_target(wanted.save_adversarial)
        if wanted.merge:
            raise UserError("--merge has no images: say --save-adversarial with every --shard.")
        if len(_attacked_at(subject, wanted)) > 1:
            raise UserError("--save-adversarial is one file: name one --checkpoint, best or last.")
    bounds = (("samples", wanted.samples, 1), ("gap-samples", wanted.gap_samples, 0),
              ("seed", wanted.seed, 0))  # fmt: skip
    for name, value, least in bounds:
        if value is not None and not least <= value < 2**63:
            raise UserError(f"--{name} must be at least {least} and below 2^63, got {value}.")
    records.read(subject.home.evaluation, "evaluate")
    chosen = choose(subject.images().test, _samples(subject, wanted), wanted.shard)
    for name in _attacked_at(subject, wanted):
        network = subject.network(name, wanted.weights)
        classes = classes_of(network.model, chosen)
        task = Task(norm=threat.norm, eps=threat.eps, classes=classes, shape=chosen.shape)
        plan(_requests(subject, wanted), task, wanted.precision, chosen)
        if wanted.merge:
            _merged(subject, network, wanted)


def evaluate_subject(
    subject: Subject,
    wanted: Wanted | None = None,
    on_progress: Progress | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Evaluate a subject and add what was found to its ``evaluation.json``.

    Attacks run on the test images. The gap is measured at every checkpoint, with PGD-20 from one
    uniform start, in eval mode at the centre weights, on the same un-augmented training images,
    the validation images and the test images. Outcomes and scores of every example are kept under
    ``outcomes/``, so an interrupted evaluation goes on where it stood; ``evaluate.log`` in the
    subject's home tells what was done when.

    Args:
        subject: What is evaluated.
        wanted: What is done.
        on_progress: Told the attack, batches done and in all, and how many still stand.
        team: The processes that share the work, all of which call this function alike.

    Returns:
        What was found now: keys ``run``, ``seed``, ``norm``, ``eps``, ``gap_attack``,
        ``checkpoints`` (each with ``epoch``, ``weights``, and ``test`` and ``gap`` or None),
        ``overfitting`` and ``notes``.

    Raises:
        UserError: If the subject cannot be evaluated as wanted.
    """
    wanted = Wanted() if wanted is None else wanted
    team = Team() if team is None else team
    check(subject, wanted)
    with _logged(subject.home.root / "evaluate.log", team):
        measured, notes = _measured(subject, wanted, on_progress, team)
    if wanted.shard is None and team.is_first:
        records.add(subject.home.evaluation, "evaluate", subject.name, measured)
    threat = subject.the_threat()
    return {
        "run": subject.name,
        "seed": subject.seed,
        "norm": threat.norm_name,
        "eps": threat.eps,
        "gap_attack": f"pgd-{GAP_STEPS}",
        "checkpoints": {},
        "overfitting": None,
        **(records.evaluation_of(measured) or {}),
        "notes": notes,
    }


def _measured(
    subject: Subject, wanted: Wanted, on_progress: Progress | None, team: Team
) -> tuple[list[records.Measurement], list[str]]:
    """The measurements, and sentences on what was left out."""
    config, threat = subject.evaluation, subject.the_threat()
    attacked = _attacked_at(subject, wanted)
    gap_samples = _gap_samples(subject, wanted)
    networks = {
        name: subject.network(name, wanted.weights)
        for name in dict.fromkeys((*attacked, *(subject.checkpoints if gap_samples else ())))
    }
    common = {
        "norm": threat.norm_name,
        "eps": threat.eps,
        "data": subject.data,
        "said": dict(subject.said),
        "batch_size": config.batch_size,
        "device": str(subject.device),
        "compiled": wanted.compile,
        "versions": environment([])["versions"],
    }
    if gap_samples and team.is_first:
        images = sum(map(len, subject.splits(gap_samples).values())) * len(subject.checkpoints)
        each = 2 * GAP_STEPS + 2
        _log.info("Gap: at most %s forward-pass equivalents for each of %s images.", each, images)
    measured = []
    for name in attacked:
        result = _attacked(subject, networks[name], wanted, on_progress, team)
        samples = _samples(subject, wanted)
        about = {**networks[name].state(), "samples": samples, "seed": wanted.seed}
        found = {**result.to_dict(), "classes": result.by_class(subject.images().classes)}
        if wanted.shard is None:
            found["examples"] = team.once(partial(_shown, subject, networks[name], samples))
        measured.append({"kind": "test", **about, **common, "result": found})
    if not gap_samples:
        return measured, []
    common |= {"samples": gap_samples, "seed": 0, "attack": f"pgd-{GAP_STEPS}"}
    found = _scores(subject, networks, gap_samples, wanted.compile, team)
    for name, by_split in found.items():
        about = {**networks[name].state(), **common}
        measured.append({"kind": "gap", **about, "result": gap(by_split).to_dict()})
    if not {"best", "last"} <= found.keys():
        return measured, []
    kinds = [networks[name].weights for name in ("best", "last")]
    if kinds[0] != kinds[1]:
        return measured, [_UNLIKE.format(*kinds)]
    figures = overfitting(found["best"]["test"], found["last"]["test"])
    about = {"checkpoint": "best - last", "weights": kinds[0], **common}
    about["count"] = len(found["last"]["test"].clean_loss)
    texts = {name: figure.to_dict() for name, figure in figures.items()}
    measured.append({"kind": "overfitting", **about, "figures": texts})
    return measured, []


def _samples(subject: Subject, wanted: Wanted) -> int | None:
    return subject.evaluation.samples if wanted.samples is None else wanted.samples


def _shown(subject: Subject, network: Network, samples: int | None) -> dict[str, Any]:
    """What a few test images are taken for, clean and under the gap's attack; the images' file."""
    threat, names = subject.the_threat(), subject.images().classes
    chosen = choose(subject.images().test, samples)
    some = balanced(chosen.labels, min(_SHOWN, len(chosen)), seed=0)
    with held(network.model):
        shown = show(
            network.model,
            chosen.images(some).to(subject.device),
            chosen.labels[some].to(subject.device),
            pgd(threat.norm, threat.eps, GAP_STEPS),
            seed=0,
            batch_size=_SHOWN,
        )
    digest = _digest(network, threat, "shown", samples)
    path = subject.home.outcomes / f"examples-{network.checkpoint}-{digest}.pt"
    shown.save(path)
    kinds = {"label": shown.y, "clean": shown.clean, "attacked": shown.attacked}

    def said(i: int) -> str:
        return str(names[i]) if i < len(names) else f"class {i}"

    return {
        "attack": f"pgd-{GAP_STEPS}",
        "file": path.name,
        "images": [
            {kind: said(int(found[i])) for kind, found in kinds.items()} for i in range(len(some))
        ],
    }


def _gap_samples(subject: Subject, wanted: Wanted) -> int:
    if wanted.shard is not None:
        return 0
    if wanted.gap_samples is not None:
        return wanted.gap_samples
    most = subject.evaluation.gap_samples if subject.is_run else 0
    return most if wanted.samples is None else min(most, wanted.samples)


def _requests(subject: Subject, wanted: Wanted) -> Sequence[Any]:
    asked = subject.evaluation.attacks if wanted.attacks is None else wanted.attacks
    return with_surrogates(asked, subject)


def _attacked_at(subject: Subject, wanted: Wanted) -> tuple[str, ...]:
    if wanted.checkpoints is not None:
        return tuple(wanted.checkpoints)
    return ("best",) if subject.is_run else subject.checkpoints


def _attacked(
    subject: Subject,
    network: Network,
    wanted: Wanted,
    on_progress: Progress | None,
    team: Team,
) -> Evaluation:
    """The attacks on the test images, with the outcomes in a store of their circumstances."""
    config, threat = subject.evaluation, subject.the_threat()
    if wanted.merge:
        return _merged(subject, network, wanted)
    result = evaluate(
        network.model,
        choose(subject.images().test, _samples(subject, wanted), wanted.shard),
        _requests(subject, wanted),
        threat.norm,
        threat.eps,
        wanted.seed,
        store=_store(subject, network, wanted),
        work=Work(
            batch_size=config.batch_size,
            precision=wanted.precision,
            compile=wanted.compile,
            save_adversarial=wanted.save_adversarial,
            team=team,
            on_progress=on_progress,
        ),
    )
    _log.info(
        "%s, %s, %s: %.2f %% of %s right, %.2f %% in the worst case",
        subject.name, network.checkpoint, threat, 100 * result.clean_accuracy,
        f"{result.count:,}", 100 * result.robust_accuracy,
    )  # fmt: skip
    return result


def _store(subject: Subject, network: Network, wanted: Wanted) -> Path:
    threat, batch_size = subject.the_threat(), subject.evaluation.batch_size
    compiled = ("compiled",) if wanted.compile else ()
    kind = (_samples(subject, wanted), wanted.seed, batch_size, *compiled)
    digest = _digest(network, threat, *kind)
    return subject.home.outcomes / f"{network.checkpoint}-{digest}"


def _merged(subject: Subject, network: Network, wanted: Wanted) -> Evaluation:
    chosen = choose(subject.images().test, _samples(subject, wanted))
    digest = fingerprint_of_images(chosen, subject.evaluation.batch_size)
    found = merge(_store(subject, network, wanted), digest)
    asked = [name for name in wanted.attacks or () if isinstance(name, str)]
    mark = "" if wanted.precision == "fp32" else f"@{wanted.precision}"
    lacking = [name for name in asked if name.removesuffix(":standard") + mark not in found.suites]
    if lacking:
        raise UserError(
            f"The shards were attacked with {', '.join(found.suites)}, not with "
            f"{', '.join(lacking)}{mark and f' in {wanted.precision}'}: run it on every one first."
        )
    return found


def _scores(
    subject: Subject, networks: dict[str, Network], limit: int, compiled: bool, team: Team
) -> dict[str, dict[str, Scores]]:
    """By checkpoint and split the scores of every example, computed or read from the home."""
    threat, batch_size = subject.the_threat(), subject.evaluation.batch_size
    attack = pgd(threat.norm, threat.eps, GAP_STEPS)
    splits = subject.splits(limit)
    jobs = [(name, split) for name in subject.checkpoints for split in splits]

    def one(number: int) -> tuple[Scores, float | None]:
        name, split = jobs[number]
        network, chosen = networks[name], splits[split]
        labels = hashlib.sha256(chosen.labels.cpu().numpy().tobytes()).hexdigest()
        kind = (split, len(chosen), labels, batch_size, *(("compiled",) if compiled else ()))
        digest = _digest(network, threat, GAP_STEPS, *kind)
        path = subject.home.outcomes / f"gap-{name}-{split}-{digest}.pt"
        found = Scores.load(path)
        if found is not None:
            return found, None
        began = time.perf_counter()
        found = scores(network.model, chosen, attack, batch_size=batch_size, compile=compiled)
        found.save(path)
        return found, time.perf_counter() - began

    by_state: dict[str, dict[str, Scores]] = {name: {} for name in subject.checkpoints}
    todo = iter(jobs)
    for together in team.each(one, range(len(jobs))):
        for (found, seconds), (name, split) in zip(together, todo, strict=False):
            by_state[name][split] = found
            if seconds is not None and team.is_first:
                _log.info(
                    "gap of %s, %s: %.2f %% of %s robust after %.0f s", name, split,
                    100 * found.robust_correct.float().mean(), f"{len(splits[split]):,}", seconds,
                )  # fmt: skip
    return by_state


def _digest(network: Network, *circumstances: object) -> str:
    """Another evaluation, or another state of the subject, has a store of its own."""
    kind = (fingerprint_of(network.model), *map(str, circumstances))
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:12]


@contextmanager
def _logged(path: Path, team: Team) -> Iterator[None]:
    """Have the first process say what it does, also in a file that is added to."""
    if not team.is_first:
        yield
        return
    logger = logging.getLogger("robustflat")
    level = logger.level
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error}. Free some space or choose another folder."
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
