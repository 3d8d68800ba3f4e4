"""Images streamed from files by worker processes: who makes a batch does not show in it."""

from __future__ import annotations

import gzip
import os
import pickle
import signal
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from train_support import config, same_run, stopped, trained

import robustflat.data as rd
from robustflat.config import read_config
from robustflat.data.epochs import Augmentation
from robustflat.data.transforms import torchvision
from robustflat.data.workers import in_workers
from robustflat.errors import UserError
from robustflat.train import Trainer
from robustflat.train.folder import RunFolder
from robustflat.train.setup import load_data

ROOT = Path(__file__).parents[1]
CROP = {"name": "RandomResizedCrop", "size": 8, "scale": [0.5, 1]}
AUGMENT = (CROP, {"name": "RandomHorizontalFlip"}, {"name": "RandAugment", "num_ops": 1})


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEG files to train on, of several sizes, 12 under `val`, in three classes."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 24), ("val", 12)):
        for i in range(count):
            folder = root / split / f"n{i % 3:08}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (10 + i % 3, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03}.JPEG")
    return root


def images(tree: Path) -> rd.Images:
    return rd.load("image_folder", root=tree, image_size=8, cache=False).train


def made(data: rd.Images, **said: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    given = {"device": "cpu", "order": 3, "augment": torchvision(transforms=AUGMENT)} | said
    return list(rd.batches(data, 6, **given))


def same(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True)
    )


def test_batches_do_not_depend_on_workers_processes_or_interruptions(tree: Path) -> None:
    data, state = images(tree), torch.get_rng_state()
    alone = made(data)
    assert same(alone, made(data, workers=3))
    assert same(alone[2:], made(data, workers=1, skip=2))
    assert torch.equal(torch.get_rng_state(), state)
    ranks = [made(data, rank=r, world=2) for r in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for all_rows, *mine in zip(whole, *parts, strict=True):
            assert torch.equal(all_rows, torch.stack(mine, 1).flatten(0, 1))


def test_every_image_and_epoch_is_augmented_differently(tree: Path) -> None:
    data = images(tree)
    one_image = data.subset(torch.zeros(12, dtype=torch.int64))
    colours = {"name": "ColorJitter", "brightness": 0.9, "contrast": 0.9}
    crop: Augmentation = torchvision(transforms=(CROP, colours))
    first, again = (made(one_image, augment=crop, order=o) for o in (1, 2))
    seen = torch.cat([x for x, _ in first + again])
    assert len(torch.unique(seen, dim=0)) == 24


def test_transforms_are_those_of_torchvision_on_the_whole_file(tree: Path) -> None:
    data = images(tree)
    with Image.open(data.path(5)) as file:  # type: ignore[attr-defined]
        pixels = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    augment = torchvision(
        transforms=(
            {"name": "RandomResizedCrop", "size": 8, "interpolation": "bicubic"},
            {
                "name": "RandomApply",
                "transforms": [{"name": "ColorJitter", "brightness": 0.5}],
                "p": 1.0,
            },
        )
    )
    torch.manual_seed(11)
    jitter = v2.RandomApply([v2.ColorJitter(brightness=0.5)], p=1.0)
    crop = v2.RandomResizedCrop(8, interpolation=v2.InterpolationMode.BICUBIC)
    expected = jitter(crop(pixels))
    assert torch.equal(augment.of_image(data.raw(5), 11, (3, 8, 8)), expected)


def test_a_batch_is_made_of_whole_files(tree: Path) -> None:
    data = images(tree)
    centre = torchvision(transforms=({"name": "CenterCrop", "size": 8},))
    x, _ = made(data, augment=centre, order=None)[0]
    expected = torch.stack([v2.CenterCrop(8)(data.raw(i)) for i in range(6)])
    assert torch.equal(x, expected / 255)
    assert not torch.equal(expected, data.fetch(torch.arange(6)))


def test_images_in_memory_are_transformed_too() -> None:
    digits = rd.load("digits", train_samples=20).train
    augment = torchvision(transforms=({"name": "RandomAffine", "degrees": 30},))
    one, two = (made(digits, augment=augment, workers=w) for w in (0, 2))
    assert same(one, two)
    plain = made(digits, augment=None)
    assert not torch.equal(one[0][0], plain[0][0])
    assert torch.equal(one[0][1], plain[0][1])
    x = digits.fetch(torch.arange(4))
    whole = augment(x, torch.Generator().manual_seed(0))
    assert torch.equal(whole, augment(x, torch.Generator().manual_seed(0)))
    assert (whole.shape, whole.dtype) == (x.shape, torch.uint8)
    alike = augment(x[:1].expand(4, -1, -1, -1), torch.Generator().manual_seed(0))
    assert len(torch.unique(alike, dim=0)) == 4


def test_extra_images_are_transformed_each_differently(tree: Path) -> None:
    data = images(tree).subset(torch.zeros(12, dtype=torch.int64))  # one image, 12 times
    extra = rd.Extra(images=data, fraction=0.5)
    colours = {"name": "ColorJitter", "brightness": 0.9, "contrast": 0.9}
    augment = torchvision(transforms=(CROP, colours))
    one = made(data, extra=extra, augment=augment)
    assert same(one, made(data, extra=extra, augment=augment, workers=2))
    x = torch.cat([x for x, _ in one])
    assert len(torch.unique(x, dim=0)) == len(x)


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        (({"name": "RandomResizedCrops", "size": 8},), "Did you mean 'RandomResizedCrop'"),
        (({"size": 8},), "each needs the name"),
        (({"name": "RandomResizedCrop"},), "Its arguments: size, scale"),
        (({"name": "Resize", "size": 8, "interpolation": "best"},), "bilinear"),
    ],
)
def test_wrong_transforms_are_told(transforms: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config(data__augment={"name": "torchvision", "transforms": list(transforms)})
    assert "data.augment" in str(caught.value)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        ({"name": "RandomResizedCrop", "size": 9}, r"End with a crop of data.image_size"),
        ({"name": "ConvertImageDtype"}, "leave normalisation to the model"),
        ({"name": "Pad", "padding": -9}, "cannot be applied"),
        ({"name": "Normalize", "mean": [0.5], "std": [0.5]}, "cannot be applied"),
    ],
)
def test_transforms_that_do_not_fit_are_told_before_the_training(transform: Any, said: str) -> None:
    asked = config(data__augment={"name": "torchvision", "transforms": [transform]})
    with pytest.raises(UserError, match=said):
        Trainer(asked, load_data(asked), torch.device("cpu"))


def test_an_unreadable_file_is_told_by_whoever_reads_it(tree: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    data = rd.FileImages([bad] * 4, torch.zeros(4, dtype=torch.int64), 8)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^The image .*bad.jpg could not be read"):
            made(data, workers=workers)


def _ended(k: int) -> torch.Tensor:
    if k == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor(k)


def test_a_worker_that_dies_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"set data\.workers lower"):
        list(in_workers(_ended, range(4), 1))


def _signalled(k: int) -> tuple[int, int]:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    return k, os.getpid()


def test_workers_leave_signals_to_the_training() -> None:
    found = list(in_workers(_signalled, range(4), 2))
    assert [k for k, _ in found] == [0, 1, 2, 3]
    assert len({pid for _, pid in found} - {os.getpid()}) == 2


def _fails(k: int) -> int:
    raise RuntimeError("of another kind")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_is_not_taken_for_a_dead_worker(workers: int) -> None:
    told: Exception | None = None
    try:
        list(in_workers(_fails, range(2), workers))
    except RuntimeError as error:  # a traceback that is kept holds the worker
        told = error.with_traceback(None)
    assert "of another kind" in str(told)
    assert not isinstance(told, UserError)


def test_leaving_early_ends_the_workers(tree: Path) -> None:
    running = rd.batches(images(tree), 2, device="cpu", workers=1)
    next(running)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()
    assert before
    del running
    assert len(children.read_text().split()) < len(before)


def test_files_go_to_other_processes_in_one_block(tree: Path) -> None:
    data = images(tree)
    assert isinstance(data, rd.FileImages)
    copy = pickle.loads(pickle.dumps(data))
    assert [copy.path(i) for i in range(24)] == [data.path(i) for i in range(24)]
    assert data._names.dtype.kind == "S"
    assert torch.equal(copy.fetch(torch.arange(3)), data.fetch(torch.arange(3)))


def test_the_shorter_side_is_resized_and_the_centre_cut(tmp_path: Path) -> None:
    """A ramp along the width of 40 keeps its slope: 16 / 10 of it, cut from column 28 on."""
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (10, 40, 3))
    file = tmp_path / "ramp.png"
    Image.fromarray(ramp.copy()).save(file)
    label = torch.zeros(1, dtype=torch.int64)
    (found,) = rd.FileImages([file], label, 8, 16).fetch(torch.tensor([0]))
    # A pixel at x of the resized image lies at (x + 1/2) * 10 / 16 - 1/2 of the file.
    expected = ((torch.arange(28, 36) + 0.5) * 10 / 16 - 0.5) * 6
    assert found.shape == (3, 8, 8)
    assert (found[0, 4].float() - expected).abs().max() <= 1
    (all_of_it,) = rd.FileImages([file], label, 8).fetch(torch.tensor([0]))
    assert not torch.equal(found, all_of_it)


@pytest.mark.parametrize("said", [{"resize": 4, "image_size": 8}, {"resize": 8}])
def test_a_resize_that_cannot_be_is_told(tree: Path, said: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"data.resize"):
        rd.load("image_folder", root=tree, cache=False, **said)
    with pytest.raises(UserError, match="for image_folder"):
        rd.load("digits", resize=9)


def test_a_cache_keeps_pixels_apart_by_their_size(tree: Path) -> None:
    for resize in (None, 9):
        kept, read = (
            rd.load("image_folder", root=tree, image_size=8, resize=resize, cache=c)
            for c in (True, False)
        )
        assert torch.equal(kept.test.fetch(torch.arange(12)), read.test.fetch(torch.arange(12)))


RUN: dict[str, Any] = {
    "data": {
        "name": "image_folder",
        "image_size": 8,
        "resize": 9,
        "cache": False,
        "validation_samples": 3,
        "workers": 0,
        "augment": {"name": "torchvision", "transforms": list(AUGMENT)},
    },
    "train__batch_size": 5,
    "monitor": {"steps": 1, "train_samples": 6, "pictures_every": 0},
}


def test_a_run_is_resumed_bit_for_bit_by_other_workers(tree: Path, tmp_path: Path) -> None:
    said = RUN | {"data": RUN["data"] | {"root": str(tree)}}
    whole = trained(tmp_path / "whole", **said)
    asked = config(tmp_path / "again", **said)
    folder = RunFolder(tmp_path / "again" / "run")
    folder.prepare(asked, resume=False, machines=[])
    stopped(asked, folder, 2)
    resumed = trained(tmp_path / "again", resume=True, **(said | {"data__workers": 2}))
    same_run(whole, resumed)


def test_a_cache_and_transforms_contradict_each_other(tree: Path) -> None:
    with pytest.raises(UserError, match=r"Set data.cache: false"):
        config(**RUN | {"data": RUN["data"] | {"cache": True, "root": str(tree)}})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/papers").glob("imagenet-*.yaml")), ids=str)
def test_a_recipe_of_imagenet_takes_a_step_on_such_a_folder(
    path: Path, tree: Path, tmp_path: Path
) -> None:
    """Attack, weights, optimizer and images are as they are, the network is tiny."""
    asked = read_config(
        path,
        [
            f"data.root={tree}",
            f"output={tmp_path}",
            "device=cpu",
            "data.validation_samples=3",
            "data.workers=1",
            "train.batch_size=4",
            "train.precision=fp32",
            "monitor.train_samples=3",
            "model={name: small_cnn, options: {width: 2}}",
        ],
    )
    folder = RunFolder(tmp_path / asked.name)
    folder.prepare(asked, resume=False, machines=[])
    trainer = stopped(asked, folder, 1)
    assert trainer.step == 1
    assert trainer.average is not None
    x, y = next(trainer._feed.batches(0, 0))[0]
    assert x.shape == (4, 3, 224, 224)
    assert y.is_floating_point()


@pytest.mark.parametrize("name", ["digits", "image_folder"])
def test_a_run_asks_for_the_workers_it_was_told_of(
    name: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For files, and for single images that are transformed, wherever they are kept."""
    asked: list[int] = []

    def spy(make: Any, numbers: range, workers: int, **said: Any) -> Any:
        asked.append(workers)
        return map(make, numbers)

    monkeypatch.setattr(sys.modules["robustflat.data.epochs"], "in_workers", spy)
    flip = {"name": "torchvision", "transforms": [{"name": "RandomHorizontalFlip"}]}
    said = {"data__workers": 3, "data__augment": flip}
    if name == "image_folder":
        said = RUN | {"data": RUN["data"] | {"root": str(tree), "workers": 3}}
    wanted = config(**said)
    data = load_data(wanted)
    if isinstance(data.test, rd.FileImages):
        assert (data.test.image_size, data.test.resize) == (8, 9)
    next(Trainer(wanted, data, torch.device("cpu"))._feed.batches(0, 0))
    assert asked == [3]


def test_a_test_folder_comes_before_val(tree: Path, tmp_path: Path) -> None:
    for split, of in (("train", "train"), ("val", "val"), ("test", "train")):
        (tmp_path / split).symlink_to(tree / of)
    assert len(rd.load("image_folder", root=tmp_path, image_size=8, cache=False).test) == 24


# WebDataset's shards


def shards(tree: Path, root: Path, **changed: Any) -> Path:
    """The files of a tree in its order, ten in a shard; ``changed`` members, or None without."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        files = sorted((tree / split).rglob("*.JPEG"))
        for start in range(0, len(files), 10):
            with tarfile.open(root / split / f"{start:06}.tar", "w") as tar:
                for file in files[start : start + 10]:
                    label = str(int(file.parent.name[1:])).encode()
                    for kind, content in (
                        ("cls", label),
                        ("mask.png", b"-"),
                        ("JPEG", file.read_bytes()),
                    ):
                        name = f"some.where/{file.stem}.{kind}"
                        content = changed.get(name, content)
                        if content is not None:
                            info = tarfile.TarInfo(name)
                            info.size = len(content)
                            tar.addfile(info, BytesIO(content))
    return root


def every_image(root: Path, **said: Any) -> torch.Tensor:
    train = rd.load("webdataset", root=root, **said).train
    return train.fetch(torch.arange(len(train)))


def test_shards_are_the_images_of_a_folder_bit_for_bit(tree: Path, tmp_path: Path) -> None:
    root = shards(tree, tmp_path / "shards")
    said: dict[str, Any] = {"image_size": 8, "resize": 9, "validation_samples": 6, "seed": 3}
    ours = rd.load("webdataset", root=root, **said)
    theirs = rd.load("image_folder", root=tree, cache=False, **said)
    assert ours.classes == ("0", "1", "2")
    for split in ("train", "validation", "test"):
        one, two = getattr(ours, split), getattr(theirs, split)
        assert one.streamed
        assert torch.equal(one.labels, two.labels)
        every = torch.arange(len(two)).flip(0)
        assert torch.equal(one.fetch(every), two.fetch(every))
        assert all(torch.equal(one.raw(i), two.raw(i)) for i in range(len(two)))
    for workers in (0, 2):
        for skip in (0, 2):
            assert same(made(ours.train, workers=workers, skip=skip), made(theirs.train)[skip:])


def test_a_run_on_shards_is_that_on_the_folder_and_is_resumed(tree: Path, tmp_path: Path) -> None:
    root = shards(tree, tmp_path / "shards")
    folder = trained(tmp_path / "tree", **RUN | {"data": RUN["data"] | {"root": str(tree)}})
    data = RUN["data"] | {"root": str(root), "name": "webdataset"}
    said = RUN | {"data": {k: v for k, v in data.items() if k != "cache"}}
    same_run(folder, trained(tmp_path / "whole", **said))
    asked = config(tmp_path / "again", **said)
    stopped_in = RunFolder(tmp_path / "again" / "run")
    stopped_in.prepare(asked, resume=False, machines=[])
    stopped(asked, stopped_in, 2)
    same_run(folder, trained(tmp_path / "again", resume=True, **(said | {"data__workers": 2})))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"some.where/000.cls": None}, "'some.where/000' without"),
        ({"some.where/000.JPEG": None}, "'some.where/000' without"),
        ({"some.where/000.cls": b"cat"}, "a whole number"),
        ({"some.where/000.JPEG": b"no image"}, r"000000\.tar \(at byte \d+\) could not be read"),
    ],
)
def test_wrong_shards_are_told(
    tree: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    root = shards(tree, tmp_path / "shards", **changed)
    with pytest.raises(UserError, match=said):
        every_image(root, image_size=8)


def test_what_are_no_shards_is_told(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shards .*train/\*\.tar"):
        rd.load("webdataset", root=tree, image_size=8)
    root = shards(tree, tmp_path / "shards")
    with pytest.raises(UserError, match=r"000000\.tar \(at byte \d+\) is 11x14"):
        every_image(root)
    shard = root / "train" / "000000.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UserError, match="plain tar file, not compressed"):
        rd.load("webdataset", root=root, image_size=8)
    shard.unlink()
    with tarfile.open(shard, "w"):
        pass
    with pytest.raises(UserError, match="has nothing"):
        rd.load("webdataset", root=root, image_size=8)


def test_a_key_has_one_image(tree: Path, tmp_path: Path) -> None:
    root = shards(tree, tmp_path / "shards")
    with tarfile.open(root / "train" / "000000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("some.where/000.png"))
    with pytest.raises(UserError, match=r"several images 'some\.where/000'"):
        every_image(root, image_size=8)


def test_splits_of_different_sizes_are_told(tmp_path: Path) -> None:
    for split, side in (("train", 8), ("test", 9)):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (side, 8)).save(folder / "1.png")
    with pytest.raises(UserError, match=r"different sizes \(8x8 and 8x9\)"):
        rd.load("image_folder", root=tmp_path, cache=False, validation_samples=0)
