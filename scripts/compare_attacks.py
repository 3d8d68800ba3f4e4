"""Compare attacks: robust accuracy and seconds of each, and of some one after another.

    python scripts/compare_attacks.py RUN RUN --samples 300 --out docs/results/attacks/attacks.csv
    python scripts/compare_attacks.py w.pt --model package.module:factory --normalise none \
        --data cifar10 --root data --norm linf --eps 8/255 --samples 500 --device cuda

Every line is measured by itself, on one thread, from the clean images on; of several attacks joined
by "then", each runs on what those before it left. "missed" counts the images that AutoAttack's
`standard` breaks and the line does not, "more" those that it breaks beyond `standard`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustflat.config.values import read_number
from robustflat.elsewhere import Elsewhere
from robustflat.errors import UserError
from robustflat.evaluate import Work, choose, evaluate
from robustflat.evaluate.examples import Examples
from robustflat.evaluate.intervals import wilson
from robustflat.files import write_text
from robustflat.subject import Network, Subject, open_subject

STANDARD = ("autoattack",)
LINES: tuple[tuple[str, ...], ...] = (
    STANDARD,
    ("autoattack:fast",),
    ("apgd-ce", "apgd-t"),
    ("apgd-ce",),
    ("apgd-t",),
    ("pgd-100:probability_margin",),
    ("apgd:probability_margin",),
    ("apgd:margin",),
    ("apgd:dlr:logits-1",),
    ("apgd:dlr:malt-1",),
    ("apgd:dlr:logits-3",),
    ("apgd:dlr:malt-3",),
    ("apgd:dlr:malt-9",),
    ("apgd:probability_margin:malt-3",),
    ("pgd-100:margin:malt-3",),
    ("apgd:probability_margin", "apgd:dlr:logits-3"),
    ("apgd:probability_margin", "apgd:dlr:malt-3"),
    ("apgd:probability_margin", "apgd:dlr:malt-9"),
    ("apgd-ce", "apgd:dlr:malt-9"),
)
HEADS = ("model", "attack", "robust", "low", "high", "missed", "more", "seconds", "of fast")


def one_after_another(
    network: Network, examples: Examples, attacks: Sequence[Any], norm: float, eps: float
) -> tuple[Tensor, float]:
    """Which examples (bool [N]) stand after all of some attacks, and the seconds that they took."""
    left = torch.arange(len(examples))
    # The processor's own time: others that work on it do not count. A GPU's is not in it.
    on_cpu = next(network.model.parameters()).device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    began = clock()
    for attack in attacks:
        if len(left):
            found = evaluate(
                network.model, examples.part(left), [attack], norm, eps,
                work=Work(batch_size=100, sanity=0),
            )  # fmt: skip
            left = left[found.outcomes == -1]
    seconds = clock() - began
    standing = torch.zeros(len(examples), dtype=torch.bool)
    standing[left] = True
    return standing, seconds


def rows(subject: Subject, samples: int, lines: Sequence[Sequence[str]] = LINES) -> list[list[Any]]:
    """A row of `HEADS` for every line; the last is seconds over those of the second line."""
    threat = subject.the_threat()
    checkpoint = "best" if "best" in subject.checkpoints else subject.checkpoints[-1]
    network = subject.network(checkpoint)
    examples = choose(subject.images().test, samples)
    measured = []
    for line in lines:
        standing, seconds = one_after_another(network, examples, line, threat.norm, threat.eps)
        sys.stderr.write(f"{subject.name} {' then '.join(line)}: {int(standing.sum())} of "
                         f"{len(standing)}, {seconds:.1f} s\n")  # fmt: skip
        measured.append((standing, seconds))
    reference, usual = measured[0][0], measured[1][1]
    found = []
    for line, (standing, seconds) in zip(lines, measured, strict=True):
        count, total = int(standing.sum()), len(standing)
        missed, more = int((standing & ~reference).sum()), int((~standing & reference).sum())
        figures = [count / total, *wilson(count, total), missed, more, seconds, seconds / usual]
        found.append([subject.name, " then ".join(line), *figures])
    return found


def table(found: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = ["| model | attack | robust | missed | more | seconds | of fast's time |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    lines += [
        f"| {name} | {attack} | {robust:.2%} | {missed} | {more} | {seconds:.1f} | {ratio:.2f} |"
        for name, attack, robust, _, _, missed, more, seconds, ratio in found
    ]
    return "\n".join(lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that say of which models and images."""
    found = argparse.ArgumentParser(description=description, allow_abbrev=False)
    found.add_argument("targets", nargs="+")
    found.add_argument("--samples", type=int, default=300)
    found.add_argument("--device", default="cpu")
    for name in ("norm", "eps", "model", "data", "normalise"):
        found.add_argument(f"--{name}")
    found.add_argument("--root", type=Path)
    return found


def opened(given: argparse.Namespace) -> Iterator[Subject]:
    """The subjects, on one thread.

    Raises:
        UserError: If one cannot be measured.
    """
    elsewhere = Elsewhere(
        model=given.model, data=given.data, root=given.root, normalise=given.normalise
    )
    eps = None if given.eps is None else float(read_number(given.eps))
    for target in given.targets:
        subject = open_subject(
            target, norm=given.norm, eps=eps, device=given.device, elsewhere=elsewhere
        )
        torch.set_num_threads(1)
        yield subject


def main() -> int:
    """Print the table, and write it where it is asked for."""
    options = parser(__doc__)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    try:
        found = [row for subject in opened(given) for row in rows(subject, given.samples)]
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print(table(found))
    if given.out is not None:
        lines = [HEADS, *found]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.out, "".join(",".join(map(str, line)) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
