"""Compare AutoAttack `standard`: the official driver, ours, and ours with the compiled model.

    python scripts/benchmark_autoattack.py RUN RUN RUN --samples 100

For every run, in one process and on one thread: the examples that withstand, whether they are the
same, and the processor's seconds (those of others do not count; compiling does). A model from
elsewhere takes the options --model, --data, --root, --norm, --eps and --normalise.
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
from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluate import Work, choose, evaluate
from robustflat.evaluate.frozen import held
from robustflat.subject import Subject

BATCH = 100


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it finds, and the seconds of this process and of those that it started."""

    def clock() -> float:
        return sum(os.times()[:4])

    began = clock()
    found = work()
    return found, clock() - began


def compared(subject: Subject, samples: int) -> list[list[Any]]:
    """A row for every way: model, way, how many withstand, how many otherwise, seconds, ratio."""
    threat = subject.the_threat()
    checkpoint = "best" if "best" in subject.checkpoints else subject.checkpoints[-1]
    model = subject.network(checkpoint).model
    examples = choose(subject.images().test, samples)
    x, y = examples.images(torch.arange(len(examples))), examples.labels

    def official() -> Tensor:
        with held(model):
            driver = AutoAttack(
                model, norm=threat.norm_name.capitalize(), eps=threat.eps, seed=0, device="cpu"
            )
            found, *_ = driver.run_standard_evaluation(x, y, batch_size=BATCH)
            return model(found).argmax(1) == y

    def ours(fast: bool) -> Tensor:
        work = Work(batch_size=BATCH, sanity=0, compile=fast)
        found = evaluate(model, examples, ["autoattack"], threat.norm, threat.eps, work=work)
        assert found.settings["compiled"] == fast, "this machine cannot compile the model"
        return found.outcomes == -1

    ways = {"official": official, "ours": lambda: ours(False), "compiled": lambda: ours(True)}
    rows: list[list[Any]] = []
    standing, usual = torch.empty(0), 0.0
    for way, run in ways.items():
        found, seconds = timed(run)
        if way == "official":
            standing, usual = found, seconds
        unlike = int((found != standing).sum())
        rows.append([subject.name, way, int(found.sum()), unlike, seconds, seconds / usual])
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def main() -> int:
    """Print the table."""
    logging.disable(logging.INFO)
    given = parser(__doc__).parse_args()
    try:
        rows = [row for subject in opened(given) for row in compared(subject, given.samples)]
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print("| model | way | withstand | otherwise | seconds | of the official time |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, way, count, unlike, seconds, ratio in rows:
        print(f"| {name} | {way} | {count} of {given.samples} | {unlike} | {seconds:.1f} | "
              f"{ratio:.2f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
