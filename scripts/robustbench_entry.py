"""Write the JSON that a RobustBench submission asks for, from an evaluation's JSON.

    python scripts/robustbench_entry.py evaluation.json --out model_info/cifar10/Linf/Me2025.json \
        --dataset cifar10 --name "Title of the paper" --authors "A. Author, B. Author" \
        --link https://arxiv.org/abs/0000.00000 --venue "arXiv, 2025" --architecture PreActResNet-18

The file is a run's evaluation.json (its best checkpoint, or --checkpoint last) or the result of
scripts/autoattack.py. It must be one of all test images with AutoAttack standard, without shards;
the fields are those of the files in RobustBench's model_info.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from robustflat.errors import UserError

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def entry(
    evaluation: dict[str, Any], about: dict[str, Any], reported: str | None
) -> dict[str, Any]:
    """The entry's fields.

    Args:
        evaluation: What `Evaluation.to_dict()` gives.
        about: The paper and the model: link, name, authors, ...
        reported: Robust accuracy in percent as the paper has it; AutoAttack's if None.

    Returns:
        The fields, accuracies in percent.

    Raises:
        UserError: If the evaluation is not one that RobustBench takes.
    """
    try:
        settings, attacks = evaluation["settings"], evaluation["attacks"]
        clean, robust = evaluation["clean_accuracy"], evaluation["robust_accuracy"]
        norm, eps = settings["norm"], float(settings["eps"])
        partial = settings["samples"] is not None or settings["shard"] is not None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"This is not the JSON of an evaluation: it lacks {error}.") from error
    missing = [name for name in STANDARD if name not in attacks]
    if missing:
        raise UserError(
            f"RobustBench asks for AutoAttack standard; {', '.join(missing)} did not run. Evaluate "
            "with attacks=['autoattack']."
        )
    if partial:
        raise UserError("RobustBench asks for all test images: evaluate without samples and shard.")
    if norm not in ("linf", "l2"):
        raise UserError(f"RobustBench has leaderboards for linf and l2, not for {norm}.")
    percent = f"{100 * robust:.2f}"
    return {
        **about,
        "eps": _fraction(eps),
        "clean_acc": f"{100 * clean:.2f}",
        "reported": reported or percent,
        "autoattack_acc": percent,
    }


def _fraction(eps: float) -> str:
    """8/255 rather than 0.03137, as the leaderboard writes it."""
    levels = eps * 255
    whole = round(levels)
    return f"{whole}/255" if whole and math.isclose(levels, whole, rel_tol=1e-6) else f"{eps:g}"


def main() -> int:
    """Read the evaluation, write the entry."""
    parser = argparse.ArgumentParser(description="A RobustBench entry from an evaluation.")
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", default="best", help="of a run's evaluation: best or last")
    parser.add_argument("--reported", help="percent, as in the paper; default AutoAttack's")
    for name in ("link", "name", "authors", "dataset", "venue", "architecture"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--additional-data", action="store_true", help="trained on more data")
    parser.add_argument("--forward-passes", type=int, default=1, help="passes per prediction")
    args = parser.parse_args()
    about = {
        "link": args.link,
        "name": args.name,
        "authors": args.authors,
        "additional_data": args.additional_data,
        "number_forward_passes": args.forward_passes,
        "dataset": args.dataset,
        "venue": args.venue,
        "architecture": args.architecture,
    }
    try:
        if args.out.exists():
            raise UserError(f"{args.out} exists; name another file.")
        try:
            evaluation = json.loads(args.evaluation.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{args.evaluation} cannot be read as JSON: {error}") from error
        if isinstance(evaluation, dict) and "checkpoints" in evaluation:
            evaluation = (evaluation["checkpoints"].get(args.checkpoint) or {}).get("test")
            if evaluation is None:
                raise UserError(
                    f"{args.evaluation} has no attacked test images of the checkpoint "
                    f"{args.checkpoint}. Evaluate it first."
                )
        fields = entry(evaluation, about, args.reported)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(fields, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for sentence in evaluation.get("warnings", []):
        print(f"warning: {sentence}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
