"""Compare AutoAttack `standard`: the official driver, ours, and ours with the compiled model.

    python scripts/benchmark_autoattack.py RUN RUN RUN --samples 100

For every run, in one process and on one thread: the examples that withstand, whether they are the
same, and the processor's seconds (those of others do not count; compiling does). The official
driver comes first, on all runs, with the system's usual allocator; then ours, with freed memory
kept, as on the command line. A model from elsewhere takes the options --model, --data, --root,
--norm, --eps and --normalise; `--ways official compiled` leaves the eager search out.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from compare_attacks import opened, parser
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robustflat.allocator import keep_freed_memory
from robustflat.errors import UserError
from robustflat.evaluate import Work, choose, evaluate
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.frozen import held
from robustflat.evaluate.threat import Threat
from robustflat.subject import Subject

BATCH = 100


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it finds, and the seconds of this process and of those that it started."""

    def clock() -> float:
        return sum(os.times()[:4])

    began = clock()
    found = work()
    return found, clock() - began


def official(subject: Subject, samples: int) -> Tensor:
    """Which examples withstand the official driver."""
    threat, model, examples = opened_parts(subject, samples)
    x, y = examples.images(torch.arange(len(examples))), examples.labels
    with held(model):
        driver = AutoAttack(
            model, norm=threat.norm_name.capitalize(), eps=threat.eps, seed=0, device="cpu"
        )
        found, *_ = driver.run_standard_evaluation(x, y, batch_size=BATCH)
        standing: Tensor = model(found).argmax(1) == y
        return standing


def ours(subject: Subject, samples: int, compiled: bool = False) -> Tensor:
    """Which examples withstand here."""
    threat, model, examples = opened_parts(subject, samples)
    work = Work(batch_size=BATCH, sanity=0, compile=compiled)
    found = evaluate(model, examples, ["autoattack"], threat.norm, threat.eps, work=work)
    assert found.settings["compiled"] == compiled, "this machine cannot compile the model"
    return found.outcomes == -1


def opened_parts(subject: Subject, samples: int) -> tuple[Threat, nn.Module, Examples]:
    """The threat, the model of the best checkpoint, and the images."""
    checkpoint = "best" if "best" in subject.checkpoints else subject.checkpoints[-1]
    model = subject.network(checkpoint).model
    return subject.the_threat(), model, choose(subject.images().test, samples)


WAYS: dict[str, Callable[[Subject, int], Tensor]] = {
    "official": official,
    "ours": ours,
    "compiled": lambda subject, samples: ours(subject, samples, compiled=True),
}


def compared(subjects: list[Subject], samples: int, ways: list[str]) -> list[list[Any]]:
    """A row for every way and model: way, model, how many withstand and otherwise, s, ratio."""
    rows: list[list[Any]] = []
    usual: dict[str, tuple[Tensor, float]] = {}
    for way in ways:
        if way != "official":
            assert keep_freed_memory(), "this machine's allocator is another"
        for subject in subjects:
            found, seconds = timed(lambda: WAYS[way](subject, samples))  # noqa: B023
            standing, before = usual.setdefault(subject.name, (found, seconds))
            unlike = int((found != standing).sum())
            rows.append([way, subject.name, int(found.sum()), unlike, seconds, seconds / before])
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def main() -> int:
    """Print the table."""
    logging.disable(logging.INFO)
    options = parser(__doc__)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = options.parse_args()
    try:
        rows = compared(list(opened(given)), given.samples, given.ways)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print("| way | model | withstand | otherwise | seconds | of the official time |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for way, name, count, unlike, seconds, ratio in rows:
        print(f"| {way} | {name} | {count} of {given.samples} | {unlike} | {seconds:.1f} | "
              f"{ratio:.2f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
