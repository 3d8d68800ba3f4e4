"""Freed memory is kept for the next tensor of the process, in place of being given back each time.

A pass on the CPU allocates and frees a tensor an operation. glibc maps each large one anew, gives
it back, and the system fills every page of the next with zeros first: a third of the time of a
forward pass over a hundred CIFAR images. What is computed is the same, bit for bit.
"""

from __future__ import annotations

import ctypes
import os
import sys

SWITCH = "ROBUSTFLAT_KEEP_MEMORY"
# <malloc.h>; its thresholds are of type int.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
# Tensors beyond this, such as a whole data set, are mapped and given back as before.
_LARGE = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, up to 2 GiB, for what it allocates next.

    For a program's start: the command line calls it, and each process of a study. Nothing is done
    without glibc, with ``ROBUSTFLAT_KEEP_MEMORY=0``, or where the environment chooses already
    (``LD_PRELOAD``, ``MALLOC_...``, ``GLIBC_TUNABLES``).

    Returns:
        Whether it was done.
    """
    said = os.environ
    chosen = "LD_PRELOAD" in said or any(key.startswith("MALLOC_") for key in said)
    if chosen or "glibc.malloc" in said.get("GLIBC_TUNABLES", "") or said.get(SWITCH) == "0":
        return False
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Either alone would also end glibc's own fitting of both to what is freed. Old versions
    # refuse more than 32 MiB.
    mapped = any(library.mallopt(_M_MMAP_THRESHOLD, size) for size in (_LARGE, 2**25))
    return bool(mapped and library.mallopt(_M_TRIM_THRESHOLD, _MOST))
