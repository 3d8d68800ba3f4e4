"""Checkpoints: always whole, damage is noticed, and nothing in a file is ever run."""

from __future__ import annotations

import errno
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from train_support import differences

from robustflat.errors import UserError
from robustflat.train.checkpoint import load_checkpoint, save_checkpoint

CONTENT: dict[str, Any] = {
    "model": {
        "w": torch.arange(12.0).view(3, 4),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "n": torch.tensor(3),
    },
    "epoch": 7,
    "best": {"epoch": 3, "score": 0.25},
    "average": None,
    "names": ["a", "b"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONTENT)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_round_trip(path: Path) -> None:
    assert differences(load_checkpoint(path), {"format": 1, **CONTENT}) == []
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_missing(tmp_path: Path) -> None:
    assert "no checkpoint" in complaint(tmp_path / "none.pt")
    assert "no checkpoint" in complaint(tmp_path)


def test_every_truncation_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "damaged" in complaint(path), length


def test_every_flipped_bit_is_noticed_or_harmless(path: Path) -> None:
    whole = path.read_bytes()
    dice = random.Random(0)
    noticed = 0
    for _ in range(400):
        at = dice.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except UserError:
            noticed += 1
        else:
            assert differences(found, {"format": 1, **CONTENT}) == [], at
    # Most of so small a file is padding, which nobody reads.
    assert noticed > 50


def test_every_flipped_byte_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    marked = torch.full((64,), 1.2345678)
    save_checkpoint(path, {"model": {"w": marked}})
    whole = path.read_bytes()
    start = whole.index(marked.numpy().tobytes())
    for at in range(start, start + 256, 5):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        assert "damaged" in complaint(path)


FOREIGN: dict[str, Any] = {
    "a list": [1, 2],
    "a tensor": torch.ones(3),
    "a bare state": {"w": torch.ones(3)},
    "no format": {"model": {}},
    "another format": {"format": 2, "model": {}},
    "an odd format": {"format": "one", "model": {}},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_contents(path: Path, case: str) -> None:
    torch.save(FOREIGN[case], path)
    assert "no checkpoint" in complaint(path) or "format" in complaint(path)


def test_foreign_files(path: Path) -> None:
    for content in (
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n" * 50,
        b"PK\x03\x04" + b"\x00" * 90,
        b"\x80",
    ):
        path.write_bytes(content)
        complaint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    complaint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"hello")
        archive.writestr("archive/version", b"3")
    complaint(path)


class Hostile:
    """Touches a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy", "nested"])
def test_hostile_files_are_not_run(tmp_path: Path, kind: str, protocol: int) -> None:
    path, mark = tmp_path / "last.pt", tmp_path / "mark"
    hostile: Any = Hostile(mark)
    if kind == "nested":
        hostile = {"format": 1, "model": {"w": torch.ones(2), "x": hostile}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(hostile, protocol))
    else:
        torch.save(
            hostile, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind != "legacy"
        )
    complaint(path)
    assert not mark.exists()
    # It was a real one.
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists()


def fails(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("unexpected pos 64 vs 0"),
    ],
)
@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_older_one(
    path: Path, monkeypatch: Any, where: str, error: Exception
) -> None:
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, fails(error))
        with pytest.raises(UserError) as caught:
            save_checkpoint(path, {"model": {}, "epoch": 8})
    message = str(caught.value)
    assert str(error) in message
    assert "untouched" in message
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_half_written_file_is_not_the_checkpoint(path: Path, monkeypatch: Any) -> None:
    # Killed in the middle of a write: what stands under the name is the older one, whole.
    real = torch.save

    def dies(content: Any, file: Any) -> None:
        real({"half": 1}, file)
        raise SystemExit

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(SystemExit):
        save_checkpoint(path, {"model": {}, "epoch": 8})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 7
    save_checkpoint(path, {"model": {}, "epoch": 9})
    assert load_checkpoint(path)["epoch"] == 9


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint(tmp_path / "none" / "last.pt", CONTENT)
