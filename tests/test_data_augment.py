"""Augmentation and mixing against brute force and label algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import robustflat.data as rd
from robustflat.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def indexed(n: int, height: int, width: int) -> torch.Tensor:
    """n times the image whose pixels are their own numbers, from 1 (0 is padding)."""
    image = torch.arange(1, height * width + 1, dtype=torch.int64).view(1, 1, height, width)
    return image.expand(n, 2, height, width).clone()


def test_every_crop_is_a_window_and_every_offset_equally_likely():
    (n, height, width, pad) = (20000, 4, 5, 2)
    x = indexed(n, height, width)
    out = rd.Augment(crop=pad)(x, generator())
    padded = np.pad(x[0, 0].numpy(), pad)
    windows = {
        padded[t : t + height, s : s + width].tobytes(): (t, s)
        for t in range(2 * pad + 1)
        for s in range(2 * pad + 1)
    }
    assert len(windows) == 25
    counts = np.zeros((5, 5))
    for image in out.numpy():
        assert np.array_equal(image[0], image[1])
        counts[windows[np.ascontiguousarray(image[0]).tobytes()]] += 1
    # 800 expected, standard deviation 27.7.
    assert np.abs(counts - 800).max() < 140


def test_flips_mirror_half_of_the_images_each_on_its_own():
    x = indexed(4000, 3, 4)
    out = rd.Augment(flip=True)(x, generator(1))
    same = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    # 2000 expected, standard deviation 31.6; neighbours agree half of the time.
    assert abs(int(mirrored.sum()) - 2000) < 160
    assert abs(int((mirrored[1:] == mirrored[:-1]).sum()) - 2000) < 160


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_cutout_is_a_clipped_square_about_a_uniform_centre(side):
    (n, height, width) = (6000, 4, 5)
    x = indexed(n, height, width)
    out = rd.Augment(cutout=side)(x, generator(2))
    assert torch.equal(out[out != 0], x[out != 0])
    holes = (out == 0).all(1)
    assert torch.equal(holes, (out == 0).any(1))
    expected: dict[bytes, int] = {}
    for row in range(height):
        for col in range(width):
            mask = np.zeros((height, width), bool)
            (top, left) = (row - side // 2, col - side // 2)
            mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
            expected[mask.tobytes()] = expected.get(mask.tobytes(), 0) + 1
    counts = dict.fromkeys(expected, 0)
    for hole in holes.numpy():
        counts[hole.tobytes()] += 1
    for mask, ways in expected.items():
        mean = n * ways / (height * width)
        assert abs(counts[mask] - mean) < 5 * mean**0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_type_and_input_are_kept_and_draws_do_not_depend_on_the_type(dtype):
    x = indexed(50, 6, 6).to(dtype)
    before = x.clone()
    augment = rd.Augment(crop=2, flip=True, cutout=3)
    out = augment(x, generator(3))
    assert out.dtype == dtype
    assert torch.equal(x, before)
    assert torch.equal(out.to(torch.int64), augment(before.to(torch.int64), generator(3)))


def test_augmentation_runs_on_the_meta_device_with_a_generator_of_the_host():
    x = torch.empty(5, 3, 8, 8, dtype=torch.uint8, device="meta")
    out = rd.Augment(crop=2, flip=True, cutout=3)(x, generator())
    assert (out.device.type, out.shape, out.dtype) == ("meta", x.shape, x.dtype)


def test_no_augmentation_is_the_identity():
    x = indexed(3, 4, 4)
    assert torch.equal(rd.Augment()(x, generator()), x)


def test_impossible_augmentation_is_refused():
    with pytest.raises(UserError, match="cutout is 9 but the images are 8x8"):
        rd.Augment(cutout=9)(indexed(1, 8, 8), generator())


def one_hot_batch(n: int = 6, side: int = 8):
    """Images that carry their own number in every pixel; labels likewise."""
    y = torch.arange(n)
    return y.double().view(n, 1, 1, 1).expand(n, 3, side, side).clone(), y


def test_mixup_mixes_images_and_labels_alike():
    (x, y) = one_hot_batch()
    levels = torch.arange(6, dtype=torch.float64)
    for seed in range(20):
        (mixed, soft) = rd.mixup(x, y, alpha=1.0, num_classes=6, generator=generator(seed))
        assert torch.allclose(soft.sum(1), torch.ones(6).double(), atol=1e-12)
        assert (soft >= 0).all()
        # The images are linear in the labels, so the label's mean is the pixel.
        expected = (soft @ levels).view(6, 1, 1, 1).expand_as(mixed)
        assert torch.allclose(mixed, expected, atol=1e-12)
        # One lambda for the batch: each row is (lam, 1 - lam) or 1.
        lam = {round(v, 9) for v in soft.flatten().tolist()} - {0.0, 1.0}
        assert len(lam) <= 2
        # Every image is used once as a partner.
        assert torch.allclose(soft.sum(0), torch.ones(6).double(), atol=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixups_share_has_the_beta_distribution(alpha):
    x, y = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    shares = []
    for seed in range(1500):
        (_, soft) = rd.mixup(x.double(), y, alpha=alpha, num_classes=2, generator=generator(seed))
        if soft[0, 0] != 1.0:
            shares.append(soft[0, 0].item())
    values = np.array(shares)
    assert len(values) > 650
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(values.mean() - 0.5) < 5 * (variance / len(values)) ** 0.5
    assert values.var() == pytest.approx(variance, rel=0.15)


def test_cutmix_labels_are_the_pasted_area():
    (x, y) = one_hot_batch()
    areas = set()
    for seed in range(40):
        (mixed, soft) = rd.cutmix(x, y, alpha=1.0, num_classes=6, generator=generator(seed))
        for i in range(6):
            values = mixed[i, 0].flatten().long()
            assert torch.equal(mixed[i, 0], mixed[i, 2])
            share = torch.bincount(values, minlength=6) / 64
            assert torch.allclose(soft[i].float(), share.float(), atol=1e-6)
            pasted = mixed[i, 0] != i
            if pasted.any():
                # A box: as many pixels as its rows times its columns.
                assert int(pasted.sum()) == int(pasted.any(0).sum() * pasted.any(1).sum())
                areas.add(int(pasted.sum()))
    assert len(areas) > 5


def test_cutmix_pastes_as_much_as_the_paper_says():
    # Alpha 1: 1 - lam = u is uniform, the box has side s = sqrt(u) of a unit square, and a centre
    # uniform over it loses s^2 / 4 of each side to the border on average. So the pasted area is
    # E[(s - s^2/4)^2] = 1/2 - 1/5 + 1/48 = 0.321 (0.221 were the side u).
    (x, y) = (torch.zeros(2, 1, 64, 64), torch.tensor([0, 1]))
    areas = []
    for seed in range(1500):
        (_, soft) = rd.cutmix(x, y, alpha=1.0, num_classes=2, generator=generator(seed))
        if soft[0, 1] > 0:
            areas.append(soft[0, 1].item())
    assert len(areas) > 650
    assert abs(np.mean(areas) - 0.321) < 0.045


def test_mixing_takes_soft_labels_and_leaves_its_input():
    (x, _) = one_hot_batch()
    soft = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    before = x.clone()
    for mix in (rd.mixup, rd.cutmix):
        (_, out) = mix(x, soft, alpha=1.0, num_classes=6, generator=generator())
        assert torch.allclose(out, soft)
        assert torch.equal(x, before)
