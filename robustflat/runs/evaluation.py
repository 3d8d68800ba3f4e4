"""Evaluating a subject: attacks on its test images, and its robust-generalization gap."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from robustflat.data import balanced
from robustflat.errors import UserError
from robustflat.evaluate import Evaluation, Scores, Team, Work, choose, evaluate, gaps, merge
from robustflat.evaluate.adversarial import check_target
from robustflat.evaluate.attacks import plan
from robustflat.evaluate.clean import classes_of, fingerprint_of_images
from robustflat.evaluate.evaluation import Progress, whole_number
from robustflat.evaluate.frozen import held
from robustflat.evaluate.shown import show
from robustflat.evaluate.threat import Task
from robustflat.files import writing
from robustflat.perturb import pgd
from robustflat.runs import records
from robustflat.runs.surrogates import with_surrogates
from robustflat.subject import Network, Subject

GAP_STEPS = 20
_SHOWN = 8  # images that are kept to be looked at

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

    def of(self, subject: Subject) -> Wanted:
        """The same of a subject, which says what is None.

        Raises:
            UserError: If an option does not fit.
        """
        if self.merge and self.shard is not None:
            raise UserError("--merge joins all shards: leave --shard out.")
        if self.shard is not None and self.gap_samples:
            raise UserError("A shard has no gap: leave --gap-samples out, and say it with --merge.")
        if self.gap_samples and subject.is_run and subject.said:
            raise UserError(
                f"The gap is that between the images of {subject.name}'s training and its test: "
                "leave --gap-samples out, or --data."
            )
        usual = subject.evaluation
        attacks = () if self.merge else usual.attacks
        usual_states = ("best",) if subject.is_run else subject.checkpoints
        samples = usual.samples if self.samples is None else self.samples
        few = 0 if self.shard or not subject.is_run else usual.gap_samples
        few = min(few, few if self.samples is None else self.samples)
        gap_samples = few if self.gap_samples is None else self.gap_samples
        for name, value, least in (("samples", samples, 1), ("gap-samples", gap_samples, 0),
                                   ("seed", self.seed, 0)):  # fmt: skip
            if value is not None:
                whole_number(f"--{name}", value, least)
        return replace(
            self,
            attacks=attacks if self.attacks is None else self.attacks,
            checkpoints=usual_states if self.checkpoints is None else self.checkpoints,
            samples=samples,
            gap_samples=gap_samples,
        )


class Job:
    """An evaluation of a subject. It is refused, if it must be, when it is made: nothing is paid.

    Args:
        subject: What is evaluated.
        wanted: What is done.

    Raises:
        UserError: If a checkpoint or the threat is missing, or something does not fit.
    """

    def __init__(self, subject: Subject, wanted: Wanted | None = None) -> None:
        self._subject, self._threat = subject, subject.the_threat()
        self._wanted = wanted = (wanted or Wanted()).of(subject)
        self._batch_size = subject.evaluation.batch_size
        self._attacks = with_surrogates(wanted.attacks or (), subject)
        self._states = tuple(wanted.checkpoints or ())
        if wanted.save_adversarial is not None:
            check_target(wanted.save_adversarial)
            if wanted.merge:
                raise UserError("--merge has no images: say --save-adversarial with every --shard.")
            if len(self._states) > 1:
                raise UserError("--save-adversarial is one file: name one --checkpoint.")
        records.read(subject.home.evaluation, "evaluate")
        self._images = choose(subject.images().test, wanted.samples, wanted.shard)
        every = (*self._states, *(subject.checkpoints if wanted.gap_samples else ()))
        self._networks = {name: subject.network(name, wanted.weights) for name in every}
        self._joined: dict[str, Evaluation] = {}
        for name in self._states:
            classes = classes_of(self._networks[name].model, self._images)
            task = Task(**vars(self._threat), classes=classes, shape=self._images.shape)
            plan(self._attacks, task, wanted.precision, self._images)
            if wanted.merge:
                self._joined[name] = self._merged(self._networks[name])

    def run(self, on_progress: Progress | None = None, team: Team | None = None) -> dict[str, Any]:
        """Evaluate the subject and add what was found to its ``evaluation.json``.

        Attacks run on the test images. The gap is measured at every checkpoint, with PGD-20 from
        one uniform start, in eval mode at the centre weights, on the same un-augmented training
        images, the validation images and the test images. Outcomes and scores of every example are
        kept under ``outcomes/``, so an interrupted evaluation goes on where it stood;
        ``evaluate.log`` in the subject's home tells what was done when.

        Args:
            on_progress: Told the attack, batches done and in all, and how many still stand.
            team: The processes that share the work, all of which call this alike.

        Returns:
            What was found now: keys ``run``, ``seed``, ``notes``, and those of
            `robustflat.runs.records.evaluation_of`, of a shard without figures.

        Raises:
            UserError: If an attack fails, or something cannot be written.
        """
        subject, wanted, team = self._subject, self._wanted, team or Team()
        work = Work(
            batch_size=self._batch_size, precision=wanted.precision, compile=wanted.compile,
            save_adversarial=wanted.save_adversarial, team=team, on_progress=on_progress,
        )  # fmt: skip
        measured: list[records.Measurement] = []
        with _logged(subject.home.root / "evaluate.log", team):
            if wanted.gap_samples and team.is_first:
                images = sum(map(len, subject.splits(wanted.gap_samples).values()))
                _log.info(
                    "Gap: at most %s forward-pass equivalents for each of %s images.",
                    2 * GAP_STEPS + 2, images * len(subject.checkpoints),
                )  # fmt: skip
            for name in self._states:
                result = self._joined.get(name) or self._attacked(self._networks[name], work)
                if wanted.shard is None:
                    measured.append(self._tested(self._networks[name], result, team))
            found, notes = self._gaps(team) if wanted.gap_samples else ([], [])
        measured += found
        if wanted.shard is None and team.is_first:
            records.add(subject.home.evaluation, "evaluate", subject.name, measured)
        return {
            "run": subject.name,
            "seed": subject.seed,
            "notes": notes,
            **(records.evaluation_of(measured) or {"checkpoints": {}}),
        }

    def _measurement(self, kind: str, state: dict[str, Any], **own: Any) -> records.Measurement:
        about = {"batch_size": self._batch_size, "compiled": self._wanted.compile, **own}
        norm, eps = self._threat.norm_name, self._threat.eps
        return records.measurement(self._subject, kind, state, norm=norm, eps=eps, **about)

    def _attacked(self, network: Network, work: Work) -> Evaluation:
        """The attacks on the test images, with the outcomes in a store of their circumstances."""
        wanted, threat = self._wanted, self._threat
        return evaluate(
            network.model, self._images, self._attacks, threat.norm, threat.eps, wanted.seed,
            store=self._store(network), work=work,
        )  # fmt: skip

    def _merged(self, network: Network) -> Evaluation:
        """What all shards found, if they were attacked with what is asked for."""
        wanted = self._wanted
        found = merge(self._store(network), fingerprint_of_images(self._images, self._batch_size))
        mark = "" if wanted.precision == "fp32" else f"@{wanted.precision}"
        asked = [name for name in self._attacks if isinstance(name, str)]
        lacking = [n for n in asked if n.removesuffix(":standard") + mark not in found.suites]
        if lacking:
            raise UserError(
                f"The shards were attacked with {', '.join(found.suites)}, not with "
                f"{', '.join(lacking)}{mark and f' in {wanted.precision}'}: run it on every one "
                "first."
            )
        return found

    def _store(self, network: Network) -> Path:
        wanted = self._wanted
        digest = self._digest(network, self._images.samples, wanted.seed, self._batch_size)
        return self._subject.home.outcomes / f"{network.checkpoint}-{digest}"

    def _digest(self, network: Network, *circumstances: object) -> str:
        """Another evaluation, or another state of the subject, has a store of its own."""
        # A run's data set by its name is all of it, its own images may be a part.
        data = (self._subject.data, self._subject.said.get("data"))
        compiled = ("compiled",) if self._wanted.compile else ()
        kind = (network.digest, str(self._threat), data, *map(str, circumstances), *compiled)
        return hashlib.sha256(repr(kind).encode()).hexdigest()[:12]

    def _tested(self, network: Network, result: Evaluation, team: Team) -> records.Measurement:
        found = {
            **result.to_dict(),
            "classes": result.by_class(self._subject.images().classes),
            "examples": team.once(lambda: self._shown(network)),
        }
        asked = {"samples": self._images.samples, "seed": self._wanted.seed}
        asked["compiled"] = result.settings["compiled"]
        return self._measurement("test", network.state(), **asked, result=found)

    def _shown(self, network: Network) -> dict[str, Any]:
        """What a few test images are taken for, clean and under the gap's attack; their file."""
        images, names = self._images, self._subject.images().classes
        some = balanced(images.labels, min(_SHOWN, len(images)), seed=0)
        with held(network.model) as device:
            x, y = images.images(some).to(device), images.labels[some].to(device)
            attack = pgd(self._threat.norm, self._threat.eps, GAP_STEPS)
            shown = show(network.model, x, y, attack, seed=0, batch_size=_SHOWN)
        digest = self._digest(network, "shown", self._images.samples)
        path = self._subject.home.outcomes / f"examples-{network.checkpoint}-{digest}.pt"
        shown.save(path)
        kinds = {"label": shown.y, "clean": shown.clean, "attacked": shown.attacked}

        def said(i: int) -> str:
            return str(names[i]) if i < len(names) else f"class {i}"

        return {
            "attack": f"pgd-{GAP_STEPS}",
            "file": path.name,
            "images": [
                {kind: said(int(found[i])) for kind, found in kinds.items()}
                for i in range(len(some))
            ],
        }

    def _gaps(self, team: Team) -> tuple[list[records.Measurement], list[str]]:
        """The gaps, robust overfitting, and sentences on what was left out."""
        asked = {"samples": self._wanted.gap_samples, "seed": 0, "attack": f"pgd-{GAP_STEPS}"}
        found = self._scores(team)
        measured = [
            self._measurement(
                "gap", self._networks[name].state(), **asked, result=gaps.gap(by_split).to_dict()
            )
            for name, by_split in found.items()
        ]
        if not {"best", "last"} <= found.keys():
            return measured, []
        kinds = [self._networks[name].weights for name in ("best", "last")]
        if kinds[0] != kinds[1]:
            return measured, [_UNLIKE.format(*kinds)]
        best, last = (found[name]["test"] for name in ("best", "last"))
        state = {"checkpoint": "best - last", "weights": kinds[0]}
        figures = {name: figure.to_dict() for name, figure in gaps.overfitting(best, last).items()}
        about = self._measurement("overfitting", state, **asked, count=len(last.clean_loss))
        return [*measured, {**about, "figures": figures}], []

    def _scores(self, team: Team) -> dict[str, dict[str, Scores]]:
        """By checkpoint and split the scores of every example, computed or read from the home."""
        attack = pgd(self._threat.norm, self._threat.eps, GAP_STEPS)
        splits = self._subject.splits(self._wanted.gap_samples)
        jobs = [(name, split) for name in self._subject.checkpoints for split in splits]

        def one(number: int) -> tuple[Scores, float | None]:
            name, split = jobs[number]
            network, chosen = self._networks[name], splits[split]
            labels = hashlib.sha256(chosen.labels.cpu().numpy().tobytes()).hexdigest()
            about = (GAP_STEPS, split, len(chosen), labels, self._batch_size)
            digest = self._digest(network, *about)
            path = self._subject.home.outcomes / f"gap-{name}-{split}-{digest}.pt"
            found = Scores.load(path)
            if found is not None:
                return found, None
            began = time.perf_counter()
            found = gaps.scores(
                network.model, chosen, attack, batch_size=self._batch_size,
                fast=self._wanted.compile,
            )  # fmt: skip
            found.save(path)
            return found, time.perf_counter() - began

        by_state: dict[str, dict[str, Scores]] = {name: {} for name in self._subject.checkpoints}
        todo = iter(jobs)
        for together in team.each(one, range(len(jobs))):
            for (found, seconds), (name, split) in zip(together, todo, strict=False):
                by_state[name][split] = found
                if seconds is not None and team.is_first:
                    count = f"{len(splits[split]):,}"
                    _log.info("gap of %s, %s: %s images, %.0f s", name, split, count, seconds)
        return by_state


@contextmanager
def _logged(path: Path, team: Team) -> Iterator[None]:
    """Have the first process say what it does, also in a file that is added to."""
    if not team.is_first:
        yield
        return
    logger = logging.getLogger("robustflat")
    level = logger.level
    with writing(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
