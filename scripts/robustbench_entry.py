"""Write the JSON that a RobustBench submission asks for, from a subject's evaluation.json.

    python scripts/robustbench_entry.py runs/x/evaluation.json --out cifar10/Linf/X.json \
        --dataset cifar10 --name "Title of the paper" --authors "A. Author, B. Author" \
        --link https://arxiv.org/abs/0000.00000 --venue "arXiv, 2025" --architecture PreActResNet-18

Its AutoAttack must be `standard`, on all test images of the data set, under a threat that
RobustBench ranks; the fields are those of the files in RobustBench's model_info.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from robustflat.errors import UserError
from robustflat.evaluate.threat import radius
from robustflat.runs import records

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]
# Of every leaderboard the number of test images and the threats.
BOARDS = {
    "cifar10": (10_000, {("linf", 8 / 255), ("l2", 0.5)}),
    "cifar100": (10_000, {("linf", 8 / 255)}),
    "imagenet": (5_000, {("linf", 4 / 255)}),
}
ABOUT = ("link", "name", "authors", "dataset", "venue", "architecture")


def chosen(path: Path, dataset: str, checkpoint: str | None) -> dict[str, Any]:
    """The evaluation that RobustBench takes.

    Args:
        path: A subject's evaluation.json.
        dataset: The leaderboard's.
        checkpoint: "best", "last" or "given"; None if there is one.

    Raises:
        UserError: If there is none, naming what each lacks, or more than one.
    """
    if dataset not in BOARDS:
        raise UserError(f"RobustBench ranks {', '.join(BOARDS)}, not {dataset!r}.")
    found = [one for one in records.read(path, "evaluate") if one["kind"] == "test"]
    lacks = {i: _lacks(one, dataset, checkpoint) for i, one in enumerate(found)}
    fitting = [one for i, one in enumerate(found) if not lacks[i]]
    if not fitting:
        why = "; ".join(dict.fromkeys(text for text in lacks.values() if text))
        raise UserError(f"{path} has no evaluation for {dataset}: {why or 'nothing was attacked'}.")
    if len(fitting) > 1:
        raise UserError(f"{path} has {len(fitting)} such evaluations: choose by --checkpoint.")
    return fitting[0]


def _lacks(one: dict[str, Any], dataset: str, checkpoint: str | None) -> str:
    """Why an evaluation does not fit; empty if it does."""
    result = one["result"]
    suite = result["suites"].get("autoattack")
    count, threats = BOARDS[dataset]
    if checkpoint not in (None, one["checkpoint"]):
        return f"one is of the checkpoint {one['checkpoint']}"
    if dataset != "imagenet" and one["data"] != dataset:
        return f"one is of {one['data']}"
    if result["settings"]["samples"] is not None or result["count"] != count:
        return f"one is of {result['count']} images, and all {count:,} test images are asked for"
    if (one["norm"], one["eps"]) not in threats:
        return f"one is under {one['norm']} {radius(one['eps'])}"
    if suite is None or [name.partition("#")[0] for name in suite["attacks"]] != STANDARD:
        return "AutoAttack standard did not run (--attack autoattack)"
    return ""


def main() -> int:
    """Read the evaluation, write the entry."""
    parser = argparse.ArgumentParser(description="A RobustBench entry from an evaluation.")
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", help="best, last or given, if several were attacked")
    parser.add_argument("--reported", help="percent, as in the paper; default AutoAttack's")
    for name in ABOUT:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--additional-data", action="store_true", help="trained on more data")
    parser.add_argument("--forward-passes", type=int, default=1, help="passes per prediction")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise UserError(f"{args.out} exists; name another file.")
        one = chosen(args.evaluation, args.dataset, args.checkpoint)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    percent = f"{100 * one['result']['suites']['autoattack']['accuracy']:.2f}"
    fields = {
        **{name: getattr(args, name) for name in ABOUT},
        "additional_data": args.additional_data,
        "number_forward_passes": args.forward_passes,
        "eps": radius(one["eps"]),
        "clean_acc": f"{100 * one['result']['clean_accuracy']:.2f}",
        "reported": args.reported or percent,
        "autoattack_acc": percent,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(fields, indent=2) + "\n")
    for sentence in one["result"]["warnings"]:
        sys.stderr.write(f"warning: {sentence}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
