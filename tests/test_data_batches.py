"""Batches: a partition of the epoch over batches and processes, exact resume, extra data."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import robustflat.data as rd
from robustflat.errors import UserError


def numbered(n: int, offset: int = 0) -> rd.MemoryImages:
    """Images whose label is their own number, and whose one pixel value is it too."""
    values = torch.arange(offset, offset + n)
    return rd.MemoryImages(
        (values % 256).to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).clone(), values
    )


def labels(images, batch_size, **options):
    return [y.tolist() for _, y in rd.batches(images, batch_size, device="cpu", **options)]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 50),
    size=st.integers(1, 9),
    world=st.integers(1, 5),
    drop=st.booleans(),
    order=st.sampled_from([None, 0, 7]),
)
def test_processes_partition_the_epoch(n, size, world, drop, order):
    images, size = numbered(n), size * world
    if drop and n < size:
        with pytest.raises(UserError, match="not one full batch"):
            rd.batch_count(n, size, drop_last=True, world=world)
        return
    per_rank = [
        labels(images, size, order=order, drop_last=drop, rank=r, world=world) for r in range(world)
    ]
    count = rd.batch_count(n, size, drop_last=drop, world=world)
    assert [len(batches) for batches in per_rank] == [count] * world
    for k in range(count):
        sizes = [len(batches[k]) for batches in per_rank]
        assert min(sizes) >= 1
        assert max(sizes) <= size // world
        assert max(sizes) - min(sizes) <= 1
        if k < count - 1 or drop:
            assert sizes == [size // world] * world
        shares = [rd.share(n, size, k, rank=r, world=world) for r in range(world)]
        assert shares == pytest.approx([world * s / sum(sizes) for s in sizes])
    seen = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(per_rank)))
    if drop:
        assert len(seen) == len(set(seen)) == n // size * size
    else:
        last = n - (count - 1) * size
        assert set(seen) == set(range(n))
        assert len(seen) - n == max(0, world - last)


def test_processes_together_see_the_batch_of_one():
    images = numbered(23)
    one = labels(images, 6, order=3)
    three = [labels(images, 6, order=3, rank=r, world=3) for r in range(3)]
    for k, batch in enumerate(one):
        assert sorted(batch) == sorted(itertools.chain.from_iterable(b[k] for b in three))


def test_a_batch_size_that_the_processes_cannot_share():
    with pytest.raises(UserError, match=r"batch size 10 .* 4 cannot .* such as 8"):
        rd.batch_count(50, 10, world=4)


def test_images_stay_with_their_labels():
    for x, y in rd.batches(numbered(50), 7, device="cpu", order=1):
        assert x.dtype == torch.float32
        assert torch.equal(x[:, 0, 0, 0], y.float() / 255)


def test_the_order_is_the_seeds_and_global_randomness_is_untouched():
    images = numbered(30)
    assert labels(images, 8) == [list(range(k, min(k + 8, 30))) for k in range(0, 30, 8)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = labels(images, 8, order=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert a == labels(images, 8, order=1)
    assert a != labels(images, 8, order=2)


def tree(folder: Path) -> rd.Images:
    for i in range(20):
        path = folder / "train" / f"c{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        (folder / "test" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "test" / f"c{i % 2}" / f"{i:02}.png")
    return rd.load("image_folder", root=folder, cache=False).train


@pytest.mark.parametrize("kind", ["memory", "files", "extra"])
@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_inside_an_epoch_continues_exactly(kind, rank, tmp_path):
    images = tree(tmp_path) if kind == "files" else rd.load("digits", train_samples=30).train
    options = {
        "device": "cpu",
        "order": 5,
        "augment": rd.Augment(crop=1, flip=True, cutout=2),
        "rank": rank,
        "world": 2,
    }
    if kind == "extra":
        options["extra"] = rd.Extra(images=images, fraction=0.5)
    whole = list(rd.batches(images, 4, **options))
    assert len(whole) >= 3
    for skip in range(len(whole) + 1):
        rest = list(rd.batches(images, 4, skip=skip, **options))
        assert len(rest) == len(whole) - skip
        for (x, y), (u, v) in zip(rest, whole[skip:], strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_skipped_batches_are_not_decoded(tmp_path):
    images = tree(tmp_path)
    order = [y for _, y in rd.batches(images, 5, device="cpu")]
    for i in range(10):
        images.path(i).unlink()
    rest = [y for _, y in rd.batches(images, 5, device="cpu", skip=2)]
    assert torch.equal(torch.cat(rest), torch.cat(order[2:]))
    with pytest.raises(UserError, match="could not be read"):
        list(rd.batches(images, 5, device="cpu", skip=1))


def test_streamed_and_cached_batches_are_equal(tmp_path):
    images = tree(tmp_path)
    cached = rd.load("image_folder", root=tmp_path).train
    options = {"device": "cpu", "order": 2, "augment": rd.Augment(crop=2, flip=True)}
    pairs = zip(rd.batches(images, 6, **options), rd.batches(cached, 6, **options), strict=True)
    for (x, y), (u, v) in pairs:
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_leaving_early_stops_the_reading(tmp_path):
    iterator = rd.batches(tree(tmp_path), 2, device="cpu")
    next(iterator)
    del iterator


def test_augmentation_differs_by_batch_rank_and_epoch():
    # The image is one gradient, so an offset shows in its values.
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(40, 1, 16, 16)
    images = rd.MemoryImages(pixels.clone(), torch.zeros(40, dtype=torch.int64))
    augment = rd.Augment(crop=4)

    def run(**options):
        made = rd.batches(images, 10, device="cpu", augment=augment, **options)
        return [x for x, _ in made]

    (a, b) = run(order=0)[:2]
    assert not torch.equal(a, b)
    assert not torch.equal(a, run(order=1)[0])
    assert not torch.equal(run(order=0, world=2)[0], run(order=0, world=2, rank=1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world": 2}, "between 0 and 1, got 2"),
        ({"skip": 4}, "skip 4 batches of an epoch of 3"),
        ({"skip": -1}, "skip"),
        ({"order": -1}, "negative"),
    ],
)
def test_impossible_numbers_are_refused_at_the_call(options, message):
    with pytest.raises(UserError, match=message):
        rd.batches(numbered(10), 4, device="cpu", **options)


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        rd.batches(numbered(10), 0, device="cpu")


# --- extra data -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "fraction", "more"), [(10, 0.7, 7), (8, 0.5, 4), (5, 0.3, 2)])
def test_each_batch_has_its_share_of_extra_images(size, fraction, more):
    (images, other) = (numbered(20), numbered(100, offset=1000))
    extra = rd.Extra(images=other, fraction=fraction)
    made = labels(images, size, order=0, extra=extra)
    # An epoch is as long as without extra data.
    assert len(made) == rd.batch_count(20, size, extra=extra) == -(-20 // size)
    for batch in made:
        assert len(batch) == size
        assert sum(y >= 1000 for y in batch) == more
    seen = [y for batch in made for y in batch if y < 1000]
    assert len(set(seen)) == len(seen) == (size - more) * len(made)


def test_other_labelled_images_come_each_epoch_and_all_equally_often():
    extra = rd.Extra(images=numbered(30, offset=1000), fraction=0.75)
    counts = torch.zeros(40)
    for epoch in range(200):
        y = torch.tensor([y for b in labels(numbered(40), 8, order=epoch, extra=extra) for y in b])
        counts[y[y < 1000]] += 1
    # A quarter of them each epoch: 50 of 200 expected, standard deviation 6.
    assert ((counts - 50).abs() < 30).all()


def test_a_batch_without_enough_labelled_images_is_filled_up():
    extra = rd.Extra(images=numbered(30, offset=1000), fraction=0.05)
    made = labels(numbered(21), 20, order=0, extra=extra)
    assert [len(batch) for batch in made] == [20, 20]
    assert [sum(y < 1000 for y in batch) for batch in made] == [19, 2]


def test_extra_images_are_drawn_uniformly_and_lie_anywhere_in_the_batch():
    (images, other) = (numbered(50), numbered(10, offset=1000))
    counts, places = torch.zeros(10), torch.zeros(10)
    for epoch in range(100):
        for batch in labels(images, 10, order=epoch, extra=rd.Extra(images=other, fraction=0.5)):
            y = torch.tensor(batch)
            counts += torch.bincount(y[y >= 1000] - 1000, minlength=10)
            places += y >= 1000
    # 100 epochs of 5 batches of 5: 250 per image and per place, standard deviation 15 and 11.
    assert ((counts - 250).abs() < 80).all()
    assert ((places - 250).abs() < 80).all()


def test_extra_images_stay_with_their_labels():
    images = numbered(20)
    extra = rd.Extra(images=numbered(50, offset=100), fraction=0.5)
    for x, y in rd.batches(images, 6, device="cpu", order=0, extra=extra):
        assert torch.equal(x[:, 0, 0, 0], y.float() / 255)


def test_extra_images_fill_each_process_s_own_share():
    extra = rd.Extra(images=numbered(30, offset=1000), fraction=0.5)
    own = [
        list(rd.batches(numbered(8), 4, device="cpu", extra=extra, rank=r, world=2)) for r in (0, 1)
    ]
    assert [[len(y) for _, y in of_rank] for of_rank in own] == [[2, 2], [2, 2]]


def test_impossible_extra_data_is_refused():
    with pytest.raises(UserError, match="no labelled image left"):
        rd.batches(numbered(3), 2, device="cpu", extra=rd.Extra(images=numbered(3), fraction=0.9))
    small = rd.MemoryImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.arange(2))
    extra = rd.Extra(images=small, fraction=0.5)
    with pytest.raises(UserError, match="extra images have shape"):
        rd.batches(numbered(3), 2, device="cpu", extra=extra)
