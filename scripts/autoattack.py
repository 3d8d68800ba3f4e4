"""Evaluate a run or any model with AutoAttack: `robustflat evaluate --attack autoattack`.

    python scripts/autoattack.py w.pt --model small_cnn --data mnist5k --norm linf --eps 0.3
    python scripts/autoattack.py runs/my-run --version fast --samples 1000

All options but --version (standard, plus, rand, fast, custom=ATTACK,ATTACK) are those of
`robustflat evaluate`; the command that this one equals is said first.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from robustflat.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--version", default="standard")
    own, others = parser.parse_known_args()
    sys.argv[:] = ["robustflat", "evaluate", "--attack", f"autoattack:{own.version}", *others]
    sys.stderr.write(f"{shlex.join(sys.argv)}\n")
    main()
