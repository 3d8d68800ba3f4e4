"""Images that stay on disk: the right rows of the right shard, exact resuming, flat memory."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_support import python

import robustflat.data as rd
from robustflat.data import extra as extra_module
from robustflat.data.shards import ShardImages
from robustflat.errors import UserError

SHAPE = (3, 4, 5)
SIZES = (5, 1, 7)


def pixels(n: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def write(root: Path, kind: str) -> tuple[Any, Any]:
    """Three shards, and what they hold together; every label is its image's own number."""
    parts, labels, start = [], [], 0
    for k, n in enumerate(SIZES):
        parts.append(pixels(n, k))
        labels.append(np.arange(start, start + n))
        start += n
        if kind == "npz":
            # Another member, and one of another length before the images, to be stepped over.
            np.savez(root / f"part{k}.npz", label=labels[-1], more=np.zeros(k), image=parts[-1])
        else:
            np.save(root / f"image-{k}.npy", parts[-1])
            np.save(root / f"label-{k}.npy", labels[-1].astype(np.int16))
    return np.concatenate(parts), np.concatenate(labels)


def read(path: Path, **options: Any) -> rd.Images:
    return rd.load_extra(path, shape=SHAPE, num_classes=20, **options)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_every_row_of_every_shard_is_found(tmp_path: Path, kind: str) -> None:
    together, labels = write(tmp_path, kind)
    images = read(tmp_path)
    assert isinstance(images, ShardImages)
    assert (len(images), images.shape, images.streamed) == (13, SHAPE, True)
    assert images.labels.tolist() == labels.tolist()
    assert images.labels.dtype == torch.uint8
    order = torch.tensor([12, 0, 5, 4, 6, 5, 11])
    out = images.fetch(order)
    assert out.is_contiguous()
    assert np.array_equal(out.numpy(), together[order.numpy()].transpose(0, 3, 1, 2))
    x, y = images.tensors()
    assert y.dtype == torch.int64
    assert torch.equal(x, torch.from_numpy(together).permute(0, 3, 1, 2).float() / 255)


def test_parts_and_other_labels_read_nothing_and_stay_right(tmp_path: Path) -> None:
    together, labels = write(tmp_path, "npy")
    part = read(tmp_path).subset(torch.tensor([2, 12, 5, 7])).subset(torch.tensor([3, 1]))
    assert part.labels.tolist() == [7, 12]
    assert np.array_equal(part.fetch(torch.tensor([1])).numpy()[0], together[12].transpose(2, 0, 1))
    renamed = part.relabelled(torch.tensor([1, 0]))
    assert renamed.labels.tolist() == [1, 0]
    assert torch.equal(renamed.fetch(torch.tensor([0])), part.fetch(torch.tensor([0])))
    assert read(tmp_path).to("cpu").labels.tolist() == labels.tolist()
    with pytest.raises(UserError, match=r"2 images and labels of shape .3."):
        part.relabelled(torch.arange(3))
    some = read(tmp_path, samples=4, seed=1)
    assert len(set(some.labels.tolist())) == 4


def test_one_file_alone_stays_on_disk_too(tmp_path: Path) -> None:
    image = pixels(6, 0)
    np.savez(tmp_path / "a.npz", image=image, label=np.arange(6))
    images = read(tmp_path / "a.npz")
    assert isinstance(images, ShardImages)
    # The directory at the end of a zip file may tell of shorter fields than the members have.
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name in ("image", "label"):
            raw = zipfile.ZipFile(tmp_path / "a.npz").read(f"{name}.npy")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(raw)
    for path in ("a.npz", "b.npz"):
        out = read(tmp_path / path).fetch(torch.arange(6)).numpy()
        assert np.array_equal(out, image.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("world", [1, 2])
def test_batches_from_shards_are_those_from_memory_and_resume(tmp_path: Path, world: int) -> None:
    together, labels = write(tmp_path, "npy")
    images = rd.MemoryImages(torch.zeros(12, *SHAPE, dtype=torch.uint8), torch.full((12,), 19))
    inside = rd.MemoryImages(
        torch.from_numpy(together).permute(0, 3, 1, 2), torch.from_numpy(labels)
    )
    options = {"device": "cpu", "order": 3, "world": world, "rank": world - 1}
    disk = rd.Extra(images=read(tmp_path), fraction=0.75)
    memory = rd.Extra(images=inside, fraction=0.75)
    whole = list(rd.batches(images, 4, extra=disk, **options))
    for (x, y), (u, v) in zip(whole, rd.batches(images, 4, extra=memory, **options), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        assert y.dtype == torch.int64
        # One of four is labelled: the first process's.
        assert sum(y != 19) == (3 if world == 1 else 2)
    for skip in range(len(whole) + 1):
        rest = list(rd.batches(images, 4, extra=disk, skip=skip, **options))
        assert len(rest) == len(whole) - skip
        assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, whole[skip:], strict=True))


# --- what is refused ------------------------------------------------------------------------


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no extra data"):
        read(tmp_path)
    np.save(tmp_path / "image.npy", pixels(3, 0))
    with pytest.raises(UserError, match=r"no labels.*label.npy. Unlabelled.*pseudo-labels"):
        read(tmp_path)
    np.save(tmp_path / "label.npy", np.arange(2))
    with pytest.raises(UserError, match=r"image.npy has 3 images.*got int64 of shape .2"):
        read(tmp_path)
    np.save(tmp_path / "label.npy", np.array([0, 1, 20]))
    with pytest.raises(UserError, match=r"must lie in 0 to 19, got 0 to 20"):
        read(tmp_path)
    np.save(tmp_path / "label.npy", np.arange(3))
    np.save(tmp_path / "image.npy", pixels(3, 0).astype(np.float32))
    with pytest.raises(UserError, match=r"must be uint8 of shape .N, 4, 5, 3.*float32"):
        read(tmp_path)
    np.save(tmp_path / "image.npy", np.asfortranarray(pixels(3, 0)))
    with pytest.raises(UserError, match=r"could not be read.*Fortran"):
        read(tmp_path)
    np.save(tmp_path / "image.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"could not be read.*objects"):
        read(tmp_path)
    np.savez_compressed(tmp_path / "more.npz", image=pixels(3, 0), label=np.arange(3))
    with pytest.raises(UserError, match=r"compressed.*unzip .*more.npz -d FOLDER"):
        read(tmp_path)


def test_a_truncated_shard_is_refused_at_the_start_and_in_use(tmp_path: Path) -> None:
    write(tmp_path, "npy")
    images = read(tmp_path)
    file = tmp_path / "image-2.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"image-2.npy.*could not be read.*ends before"):
        read(tmp_path)
    assert images.fetch(torch.tensor([11])).shape == (1, *SHAPE)
    with pytest.raises(UserError, match=r"image-2.npy cannot be read any more.*shorter.*--resume"):
        images.fetch(torch.tensor([12]))
    file.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        images.fetch(torch.tensor([11]))
    np.savez(tmp_path / "a.npz", image=pixels(3, 0), label=np.arange(3))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[:4] = b"XXXX"
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(UserError, match=r"could not be read.*where the directory says"):
        read(tmp_path / "a.npz")


def test_what_must_be_unpacked_has_to_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", image=pixels(50, 0), label=np.arange(50) % 20)
    size = 50 * 60 + 128
    monkeypatch.setattr(extra_module, "physical_memory", lambda: 2 * size)
    assert isinstance(read(tmp_path / "a.npz"), rd.MemoryImages)
    monkeypatch.setattr(extra_module, "physical_memory", lambda: 2 * size - 1)
    with pytest.raises(UserError, match=r"compressed.*unzip"):
        read(tmp_path / "a.npz")


# --- memory ---------------------------------------------------------------------------------

_MEASURE = """
import sys, numpy as np, torch
from pathlib import Path
import robustflat.data as rd

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(("RssAnon", "RssFile"))) / 1024

root = Path(sys.argv[1])
images = rd.MemoryImages(torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), torch.zeros(2000).long())
plain = list(rd.batches(images, 512, device="cpu"))
del plain
before = resident()
extra = rd.Extra(images=rd.load_extra(root, shape=(3, 32, 32), num_classes=10), fraction=0.7)
for epoch in range(10):
    for x, y in rd.batches(images, 512, device="cpu", order=epoch, extra=extra):
        assert x.shape == (512, 3, 32, 32)
print(len(extra.images), resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_gigabytes_of_images_take_no_memory(tmp_path: Path) -> None:
    count = 700_000
    with (tmp_path / "image.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * 3072)  # sparse: it takes no room on the disk
    np.save(tmp_path / "label.npy", np.arange(count) % 10)
    process = python("-c", _MEASURE, str(tmp_path))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found, grown = out.split()
    assert int(found) == count
    # MiB, of 2,051 on disk: a few batches and the labels.
    assert float(grown) < 80
