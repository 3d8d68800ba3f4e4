"""Owns curves of subjects over several radii, and the file curves.json in which they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from robustflat.errors import UserError
from robustflat.evaluate import Team, Work, choose
from robustflat.evaluate.evaluation import Progress
from robustflat.evaluate.radii import RadiusCurve, over_radii
from robustflat.runs import records
from robustflat.runs.evaluation import Wanted
from robustflat.runs.surrogates import with_surrogates
from robustflat.subject import Subject


def measure_radii(
    subject: Subject,
    wanted: Wanted,
    radii: Sequence[float],
    on_progress: Progress | None = None,
    team: Team | None = None,
) -> RadiusCurve:
    """Robust accuracy over several radii, in the norm of the subject's threat, added to its file.

    Args:
        subject: What is attacked.
        wanted: With what, and how; one checkpoint, and neither a gap nor shards nor images.
        radii: In image units.
        on_progress: Told the attack, batches done and in all, and how many still stand.
        team: The processes that share the work.

    Raises:
        UserError: If an option does not fit a curve, or anything cannot work.
    """
    refused = {
        "--shard": wanted.shard, "--merge": wanted.merge, "--gap-samples": wanted.gap_samples,
        "--save-adversarial": wanted.save_adversarial,
    }  # fmt: skip
    said = [name for name, value in refused.items() if value]
    if said:
        raise UserError(f"A curve over --radii has no place for {', '.join(said)}: leave it out.")
    wanted, threat, team = wanted.of(subject), subject.the_threat(), team or Team()
    states, attacks = tuple(wanted.checkpoints or ()), tuple(wanted.attacks or ())
    if len(states) != 1:
        raise UserError("A curve over --radii is one of one checkpoint: name best or last.")
    network = subject.network(states[0], wanted.weights)
    images = choose(subject.images().test, wanted.samples)
    batch_size = subject.evaluation.batch_size
    kind = (network.digest, threat.norm_name, wanted.samples, wanted.seed, batch_size)
    digest = hashlib.sha256(repr((*kind, attacks, wanted.compile)).encode()).hexdigest()[:12]
    records.read(subject.home.curves, "evaluate")
    found = over_radii(
        network.model, images, radii, with_surrogates(attacks, subject), threat.norm, wanted.seed,
        store=subject.home.outcomes / f"curve-{network.checkpoint}-{digest}",
        work=Work(
            batch_size=batch_size, precision=wanted.precision, compile=wanted.compile, sanity=0,
            team=team, on_progress=on_progress,
        ),
    )  # fmt: skip
    if team.is_first:
        largest = found.points[-1].eps
        measured = records.measurement(
            subject, "curve", network.state(), norm=found.norm, eps=largest,
            samples=wanted.samples, seed=wanted.seed, batch_size=batch_size,
            attack=", ".join(map(str, attacks)),
            options={"radii": [point.eps for point in found.points]},
            precision=wanted.precision, compiled=wanted.compile, result=found.to_dict(),
        )  # fmt: skip
        records.add(subject.home.curves, "evaluate", subject.name, [measured])
    return found
