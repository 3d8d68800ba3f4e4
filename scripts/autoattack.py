"""Evaluate any model with AutoAttack, on the library alone.

    python scripts/autoattack.py small_cnn --weights model.pt --data mnist5k --eps 0.3
    python scripts/autoattack.py my.models:make --data cifar10 --version fast --samples 1000
    python scripts/autoattack.py program.pt2 --trust --data cifar10 --norm l2 --eps 0.5

With --store, an interrupted evaluation goes on where it stood when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

import robustflat.data
from robustflat.errors import UserError
from robustflat.evaluate import evaluate, load_model


def main() -> int:
    """Load the data and the model, evaluate, print a table and, with --out, write JSON."""
    parser = argparse.ArgumentParser(description="Robust accuracy by AutoAttack.")
    parser.add_argument("model", help="a model's name, package.module:factory, or a program's file")
    parser.add_argument("--weights", type=Path, help="state dict for a model given by name")
    parser.add_argument("--data", default="cifar10", help=", ".join(robustflat.data.NAMES))
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data lie")
    parser.add_argument("--download", action="store_true", help="fetch data that are missing")
    parser.add_argument("--norm", default="linf", choices=["linf", "l2", "l1"])
    parser.add_argument("--eps", type=Fraction, default=Fraction(8, 255), help="such as 8/255")
    parser.add_argument("--version", default="standard", help="standard, plus, rand, fast, custom=")
    parser.add_argument("--samples", type=int, help="a fixed class-balanced subset of this size")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, help="folder for the outcome of every example")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--trust", action="store_true", help="load a program: it may run any code")
    args = parser.parse_args()
    try:
        if args.out is not None and args.out.exists():
            raise UserError(f"{args.out} exists; name another file.")
        data = robustflat.data.load(args.data, root=args.root, download=args.download)
        model = load_model(
            args.model,
            args.weights,
            num_classes=len(data.classes),
            in_channels=data.shape[0],
            image_size=data.shape[1:],
            mean=data.mean,
            std=data.std,
            trust=args.trust,
            device=args.device,
        )
        result = evaluate(
            model,
            data.test,
            [f"autoattack:{args.version}"],
            args.norm,
            float(args.eps),
            args.seed,
            batch_size=args.batch_size,
            samples=args.samples,
            store=args.store,
            on_progress=lambda name, done, total, standing: print(
                f"  {name}: batch {done}/{total}, {standing} standing", file=sys.stderr
            ),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'clean':<10}{result.clean_accuracy:7.2%}")
    for name, attack in result.attacks.items():
        print(f"{name:<10}{attack.accuracy:7.2%}")
    low, high = result.robust_interval
    print(f"{'robust':<10}{result.robust_accuracy:7.2%}  ({low:.2%} to {high:.2%}, 95 %)")
    for sentence in result.warnings:
        print(f"warning: {sentence}", file=sys.stderr)
    if args.out is not None:
        args.out.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
