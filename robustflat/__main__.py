"""``python -m robustflat``: the command line, for torchrun and for environments without scripts."""

from robustflat.cli import main

main()
