"""Owns the evaluation itself: which attack runs when, on what, saved as it goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate import doubts
from robustflat.evaluate.adversarial import Adversarial, Pictures, check_target
from robustflat.evaluate.attacks import Attack, Request, Suite, plan
from robustflat.evaluate.clean import classify
from robustflat.evaluate.examples import Data, Examples, choose
from robustflat.evaluate.fast import compiled
from robustflat.evaluate.frozen import Plain, device_of, held
from robustflat.evaluate.record import Entry, Record, digest_of, file_for, fingerprint_of, resumed
from robustflat.evaluate.result import Evaluation, from_record
from robustflat.evaluate.team import Team
from robustflat.evaluate.threat import Task, Threat
from robustflat.evaluate.verdict import judge
from robustflat.files import locked

Progress = Callable[[str, int, int, int], None]
T = TypeVar("T")

# Seconds between two lines on one attack.
_SILENCE = 60.0

_log = logging.getLogger("robustflat.evaluate")


class AttackError(UserError):
    """An attack failed; ``result`` is the evaluation by the attacks that had ended."""

    def __init__(self, sentence: str, result: Evaluation) -> None:
        super().__init__(sentence)
        self.result = result


@dataclass(frozen=True, kw_only=True)
class Work:
    """How an evaluation is done.

    Attributes:
        batch_size: Images at a time. Other sizes give other random starts.
        precision: "bf16" searches under autocast to bfloat16, verifies in float32, and marks the
            attacks' names with "@bf16". Such a search may find less: evaluate in fp32 before
            reporting.
        sanity: Examples on which the sanity checks are made; 0 leaves them out.
        compile: Search with the model compiled by torch.compile, once for batches of any size; the
            eager model judges. It pays for large networks and many images (docs/results.md). Where
            it cannot be compiled, the log says so, and the search is the eager one.
        save_adversarial: A new file ending in .npz for the adversarial examples (`Adversarial`).
            Attacks whose images a store has not kept are run again. All images are in memory once.
        team: The processes that share the batches, all of which call `evaluate` alike and get the
            same result, that of one process.
        on_progress: Called with the attack's name, batches done, batches in all, and how many
            examples withstand it so far.

    Raises:
        UserError: If a value cannot work.
    """

    batch_size: int = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    sanity: int = 32
    compile: bool = False
    save_adversarial: Path | None = None
    team: Team = field(default_factory=Team)
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"The precision must be 'fp32' or 'bf16', got {self.precision!r}.")
        whole_number("batch_size", self.batch_size, 1)
        whole_number("sanity", self.sanity, 0)
        if self.save_adversarial is not None:
            check_target(self.save_adversarial)


def evaluate(
    model: nn.Module,
    data: Data,
    attacks: Sequence[Request] | Request = ("autoattack",),
    norm: str | float = "linf",
    eps: float | None = None,
    seed: int = 0,
    *,
    store: str | Path | None = None,
    work: Work | None = None,
) -> Evaluation:
    """Robust accuracy of a model: the share of examples that no attack breaks.

    Every attack that is asked for runs on all examples that the model classifies, AutoAttack's
    components each on what those before them left, as in the official driver; so each figure is
    that of its attack alone, and the worst case is their intersection, example by example. Every
    adversarial example is judged here, in float32, by the plain model, whatever the attack says
    (`judge`). AutoAttack's components find bit for bit what the official driver finds for the
    same seed and batch size. The model is evaluated in eval mode and is as before afterwards:
    modes, buffers, requires_grad, gradients, and torch's random state too.

    Args:
        model: Takes images in [0, 1], normalisation inside; returns logits [N, C]. It computes
            where it is.
        data: `(x, y)`, a loader of such batches, or a split of a data set; a part of it, or a
            shard, is what `choose` returns. Images float [N, C, H, W] in [0, 1], labels whole
            numbers [N].
        attacks: Names, mappings with options, what `rf.pgd(...)` returns, or functions of your own
            `f(model, x, y, *, seed) -> x_adv`; see `plan`.
        norm: "linf", "l2" or "l1".
        eps: Radius of the ball, in image units; 8/255 for linf if None, and to be said for others.
        seed: Every batch of every attack is attacked with this seed, as AutoAttack does.
        store: A folder, or a file ending in .json, that keeps the outcome of every example. A
            killed evaluation, called again, goes on where it stood and ends with the same figure;
            one with further attacks runs only those. Attacks that the store has seen count in the
            result even if not asked for again. Another process that uses it is waited for. It can
            be that of all shards, which `merge` joins.
        work: How it is done.

    Returns:
        The evaluation.

    Raises:
        UserError: If anything given cannot work. `AttackError`, if an attack fails on its way.
    """
    threat = Threat.said(norm, eps)
    work = Work() if work is None else work
    whole_number("seed", seed, 0)
    if not isinstance(model, nn.Module):
        raise UserError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    chosen, team = choose(data), work.team
    path = None if store is None else file_for(store, chosen.shard)
    alone = locked(path) if path is not None and team.is_first else nullcontext()
    training = model.training
    with alone, held(model) as place, ExitStack() as stack:
        plain, fast = Plain(model), None
        classes, correct, predictions, digest = classify(
            plain, chosen, work.batch_size, place, team
        )
        task = Task(norm=threat.norm, eps=threat.eps, classes=classes, shape=chosen.shape)
        suites = plan(attacks, task, work.precision, chosen)
        if work.compile:
            fast = stack.enter_context(compiled(model, chosen.shape, place))
        settings: dict[str, Any] = {
            "norm": threat.norm_name,
            "eps": threat.eps,
            "seed": seed,
            "batch_size": work.batch_size,
            "samples": chosen.samples,
            "shard": chosen.shard,
            "data": None if store is None else digest,
            "labels": None if store is None else digest_of([chosen.all_labels]),
            "model": None if store is None else fingerprint_of(model),
            "classes": classes,
            "compiled": fast is not None,
        }
        fresh = Record(
            settings=settings,
            right=correct,
            positions=chosen.positions,
            labels=chosen.labels,
            predictions=predictions,
            path=path,
        )
        record = team.once(lambda: resumed(fresh))
        pictures = None
        if work.save_adversarial is not None:
            pictures = Pictures(chosen, record) if team.is_first else None
        run = _Run(
            record=record,
            plain=plain,
            searched=Plain(model if fast is None else fast, bf16=work.precision == "bf16"),
            examples=chosen,
            task=task,
            device=place,
            work=work,
            pictures=pictures,
        )
        run.suites(suites)
        if work.sanity:
            record.probes = team.once(
                lambda: doubts.probes(
                    plain, chosen, correct, task, sample=work.sanity, training=training
                )
            )
        if team.is_first:
            record.save()
        if pictures is not None and work.save_adversarial is not None:
            found = _saved(pictures, record, plain, fingerprint_of(model), threat, work.batch_size)
            found.save(work.save_adversarial)
    return from_record(record)


@dataclass(kw_only=True, eq=False)
class _Run:
    """What all attacks of one evaluation share."""

    record: Record
    plain: nn.Module
    searched: nn.Module
    examples: Examples
    task: Task
    device: torch.device
    work: Work
    pictures: Pictures | None

    def suites(self, suites: Sequence[Suite]) -> None:
        """Put all attacks on record, say what they cost, and run those that have not ended."""
        todo: dict[int, Attack] = {}
        for suite in suites:
            after = None
            places = []
            for attack in suite.attacks:
                after = self.record.add(
                    attack.name,
                    attack.identity,
                    after,
                    black_box=attack.black_box,
                    bounded=attack.bounded,
                )
                places.append(after)
                entry = self.record.entries[after]
                if self.work.save_adversarial is not None and not entry.pictured:
                    entry.pictured, entry.finished, entry.batches = True, False, 0
                    entry.broke, entry.taken, entry.outside, entry.seconds = [], [], 0, 0.0
                if not entry.finished:
                    todo.setdefault(after, attack)
            name = suite.name
            if len(places) == 1 and name == suite.attacks[0].name:
                name = self.record.entries[places[0]].name
            self.record.suites[name] = places
            self.record.notes[name] = list(suite.notes)
        for attack in todo.values():
            if attack.tried_first:
                self._tried(attack)
        if todo and self.work.team.is_first:
            _log.info("%s", _cost(list(todo.values()), int(self.record.right.sum())))
        for index, attack in todo.items():
            self._attack(index, attack)

    def _attack(self, index: int, attack: Attack) -> None:
        """Run one attack, or the rest of it, on what stood when it began; save as it goes."""
        record, entry, team = self.record, self.record.entries[index], self.work.team
        # What stands is counted once what it follows has ended.
        standing = record.standing(entry.after)
        entry.attacked = int(standing.sum())
        # Compacted once, at the attack's start, as the official driver does: so the batches, and
        # with them the random starts, do not depend on where a run was interrupted.
        batches = standing.nonzero().flatten().split(record.settings["batch_size"])
        began = time.perf_counter()

        def one(number: int) -> _Found:
            return self._batch(attack, batches[number], entry.pictured)

        count = len(batches) if entry.attacked else 0
        said = began
        for found in self._kept(team.each(one, range(entry.batches, count)), entry, count):
            for each in found:
                entry.broke += each.broke
                entry.taken += each.taken
                entry.outside += each.outside
                if self.pictures is not None and each.images is not None:
                    self.pictures.keep(index, batches[entry.batches], each.broke, each.images)
                entry.batches += 1
            entry.finished = entry.batches == count
            entry.seconds += time.perf_counter() - began
            began = time.perf_counter()
            if team.is_first:
                record.save()
                left = entry.attacked - len(entry.broke)
                if self.work.on_progress is not None:
                    self.work.on_progress(entry.name, entry.batches, count, left)
                if began - said > _SILENCE and not entry.finished:
                    said = began
                    _log.info(
                        "%s: batch %s of %s, %s of %s left after %.0f s", entry.name, entry.batches,
                        count, f"{left:,}", f"{entry.attacked:,}", entry.seconds,
                    )  # fmt: skip
        entry.finished = True
        if team.is_first:
            record.save()
            total = len(record.right)
            share = (entry.attacked - len(entry.broke)) / total
            _log.info(
                "%s: %.2f %% of %s left after %.0f s",
                entry.name, 100 * share, f"{total:,}", entry.seconds,
            )  # fmt: skip

    def _tried(self, attack: Attack) -> None:
        """Try an attack on two images, so that one that cannot work costs nothing."""
        some = self.record.right.nonzero().flatten()[:2]
        if len(some):
            self._batch(attack, some, False)

    def _kept(self, rounds: Iterator[T], entry: Entry, count: int) -> Iterator[T]:
        """The rounds of an attack; if it fails, the error also says what is not lost."""
        try:
            yield from rounds
        except UserError as error:
            ended = [other.name for _, other in self.record.finished()]
            done = [f"{entry.batches} of its {count} batches", *ended]
            path = self.record.path
            where = "the error's `result`" if path is None else f"{path}, and are not run again"
            raise AttackError(
                f"{error} What was done before is kept ({', '.join(done)}): it is in {where}.",
                from_record(self.record),
            ) from error

    def _batch(self, attack: Attack, places: Tensor, pictured: bool) -> _Found:
        """What the attack does to the examples at some places."""
        x = self.examples.images(places).to(self.device)
        y = self.examples.labels[places].to(self.device)
        try:
            if attack.stored is not None:
                found = attack.stored(places).to(self.device)
            else:
                seed = self.record.settings["seed"]
                found = attack.run(self.searched, x, y, seed) if self.task.eps else x
        except (RuntimeError, ArithmeticError, LookupError) as error:
            raise UserError(
                f"The attack {attack.name} failed on this model ({type(error).__name__}: {error})."
            ) from error
        verdict = judge(self.plain, x, found, y, norm=self.task.norm, eps=self.task.eps)
        return _Found(
            broke=places[verdict.broken].tolist(),
            taken=verdict.predictions[verdict.broken].tolist(),
            outside=int(verdict.outside.sum()),
            images=verdict.x_adv.cpu() if pictured else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """What an attack did to a batch: places broken, what for, images that do not count, images."""

    broke: list[int]
    taken: list[int]
    outside: int
    images: Tensor | None


def _saved(
    pictures: Pictures,
    record: Record,
    plain: nn.Module,
    model: str,
    threat: Threat,
    batch_size: int,
) -> Adversarial:
    """What was kept, and what the model takes it for."""
    x_adv, place = pictures.all(), device_of(plain, torch.device("cpu"))
    found = [plain(some.to(place)).argmax(1).cpu() for some in x_adv.split(batch_size)]
    return Adversarial(
        positions=record.positions,
        x_adv=x_adv,
        labels=record.labels,
        predictions=torch.cat(found),
        threat=threat,
        model=model,
    )


def whole_number(name: str, value: Any, least: int) -> None:
    """Refuse what is none, is less, or is more than generators take as a seed.

    Raises:
        UserError: Naming it.
    """
    if not isinstance(value, int) or not least <= value < 2**63:
        raise UserError(f"{name} must be a whole number >= {least} and below 2^63, got {value!r}.")


def _cost(attacks: Sequence[Attack], count: int) -> str:
    """What attacks take at most, in words."""
    known = {a.name: a.passes for a in attacks if a.passes is not None}
    unknown = ", ".join(a.name for a in attacks if a.passes is None)
    said = f"What {unknown} takes is not known." if unknown else ""
    if not known:
        return f"{count:,} images. {said}"
    each = ", ".join(f"{name} {passes:,}" for name, passes in known.items())
    words = f"At most {sum(known.values()):,} forward-pass equivalents for each of {count:,} images"
    return f"{words}: {each}. {said}".rstrip()
