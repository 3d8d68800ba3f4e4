"""`robustflat list` says the same from memory, without torch, and forgets when code changes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from train_support import python

from robustflat.cli import listing
from robustflat.registry import KINDS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "robustflat" / "list.json"


def test_remembered_it_is_the_same_and_needs_no_torch(cache: Path) -> None:
    first = listing.listed()
    assert list(first) == list(KINDS)
    assert all(
        first[kind.name][name] == kind.describe(name) for kind in KINDS.values() for name in kind
    )
    told = python(
        "-c",
        "import json, sys; from robustflat.cli.listing import listed; found = listed()\n"
        "print(json.dumps(found)); sys.exit('torch' in sys.modules)",
    )
    out, err = told.communicate(timeout=60)
    assert told.returncode == 0, err
    assert json.loads(out) == first
    again = python("-m", "robustflat", "list", "weights")
    assert "awp(gamma=0.005" in again.communicate(timeout=60)[0]


def test_it_is_found_anew_when_code_changed_or_the_file_is_damaged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Kind:
        name = "weights"

        def __iter__(self) -> Iterator[str]:
            return iter(["awp"])

        def describe(self, name: str) -> list[str]:
            calls.append(1)
            return [f"{name}, the {len(calls)}th time"]

    monkeypatch.setattr(listing, "KINDS", {"weights": Kind()})
    package = cache.parent.parent / "code"
    (package / "deep").mkdir(parents=True)
    source = package / "deep" / "a.py"
    for file in (package / "__init__.py", source):
        file.write_text("one = 1\n")
    monkeypatch.setattr(listing.robustflat, "__file__", str(package / "__init__.py"))

    def said() -> str:
        return listing.listed()["weights"]["awp"][0]

    assert [said(), said()] == ["awp, the 1th time"] * 2
    os.utime(source, (1, 1))
    assert [said(), said()] == ["awp, the 2th time"] * 2
    (package / "new.py").touch()
    assert said() == "awp, the 3th time"
    source.write_text("two = 22\n")
    os.utime(source, (1, 1))
    assert [said(), said()] == ["awp, the 4th time"] * 2  # of another size
    monkeypatch.setattr(
        listing, "find_spec", lambda _: ModuleSpec("torch", None, origin=str(source))
    )
    assert [said(), said()] == ["awp, the 5th time"] * 2
    monkeypatch.setattr(listing.sys, "version", "another")
    assert said() == "awp, the 6th time"
    (package / "new.py").rename(package / "other.py")
    assert said() == "awp, the 7th time"
    for damaged in ("{", "[]", "{}", "null"):
        cache.write_text(damaged)
        before = len(calls)
        assert said() == said() == f"awp, the {before + 1}th time"


def test_it_is_listed_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(listing, "KINDS", {"data": KINDS["data"]})
    assert "digits" in listing.listed()["data"]
