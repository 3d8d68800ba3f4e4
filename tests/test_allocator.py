"""Freed memory is kept: no page faults from the second time on, and off where it is to be off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustflat import cli
from robustflat.study import row

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names,
    reason="glibc's allocator",
)

# Blocks of 48 MB, more than glibc keeps by itself, written to and freed.
PROBE = """
import ctypes, resource, sys
from robustflat.allocator import keep_freed_memory
kept = keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def once(size):
    block = c.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    c.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
once(48_000_000)
before = faults()
for _ in range(5):
    once(48_000_000)
print(kept, faults() - before)
"""


def probed(**environment: str) -> tuple[str, int]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=plain | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_what_is_freed_is_used_again_without_a_fault() -> None:
    kept, faults = probed()
    assert kept == "True"
    assert faults < 100


@pytest.mark.parametrize(
    "environment",
    [
        {"ROBUSTFLAT_KEEP_MEMORY": "0"},
        {"MALLOC_ARENA_MAX": "4"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"},
        {"LD_PRELOAD": ""},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_it_is_off_where_the_environment_chooses(environment: dict[str, str]) -> None:
    kept, faults = probed(**environment)
    assert kept == "False"
    assert faults > 5 * 48_000_000 / 4096 / 2


def test_the_command_line_and_a_study_s_runs_keep_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called = []
    for module in (cli, row):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: called.append(1))
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert len(called) == 1
    row.work(tmp_path / "none.job.json")
    assert len(called) == 2
