"""Extra data files: the two published formats, and every file that is not one."""

from __future__ import annotations

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch

import robustflat.data as rd
from robustflat.errors import UserError

SHAPE = (3, 4, 5)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 4, 5, 3), dtype=np.uint8), np.arange(12) % 3


def read(path, **options):
    return rd.load_extra(path, shape=SHAPE, num_classes=3, **options)


def check(images, pixels, labels):
    assert images.labels.tolist() == labels.tolist()
    out = images.fetch(torch.tensor([3, 1]))
    assert np.array_equal(out.numpy(), pixels[[3, 1]].transpose(0, 3, 1, 2))
    assert out.is_contiguous()


def test_npz_files_are_read(tmp_path, arrays):
    (pixels, labels) = arrays
    np.savez(tmp_path / "a.npz", image=pixels, label=labels.astype(np.int32))
    check(read(tmp_path / "a.npz"), pixels, labels)
    np.savez_compressed(tmp_path / "b.npz", image=pixels, label=labels.astype(np.int32))
    check(read(tmp_path / "b.npz"), pixels, labels)
    some = read(tmp_path / "a.npz", samples=6, seed=1)
    assert torch.bincount(some.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_are_read(tmp_path, arrays, protocol):
    (pixels, labels) = arrays
    content = {"data": pixels, "extrapolated_targets": labels}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content, protocol))
    check(read(tmp_path / "a.pickle"), pixels, labels)


def test_arrays_that_were_read_only_are_read(tmp_path, arrays):
    (pixels, labels) = arrays
    pixels.flags.writeable = False
    content = {"data": pixels, "extrapolated_targets": labels}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content, 5))
    check(read(tmp_path / "a.pickle"), pixels, labels)


def test_pickles_of_old_numpy_are_read(tmp_path, arrays):
    # numpy 1 wrote the same calls under numpy.core.
    (pixels, labels) = arrays
    content = {"data": pixels, "extrapolated_targets": list(labels)}
    raw = pickle.dumps(content, 0).replace(b"numpy._core", b"numpy.core")
    assert b"numpy._core" not in raw
    (tmp_path / "a.pkl").write_bytes(raw)
    check(read(tmp_path / "a.pkl"), pixels, labels)


class Hostile:
    """Runs a function of the attacker's choice when unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["system", "eval", "import", "nested", "other class"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, arrays, kind):
    (pixels, labels) = arrays
    marker = tmp_path / "ran"
    payloads = {
        "system": Hostile(os.system, f"touch {marker}"),
        "eval": Hostile(eval, f"open({str(marker)!r}, 'w')"),
        "import": Hostile(__import__, "os"),
        "nested": np.array([Hostile(os.mkdir, str(marker))], dtype=object),
        "other class": collections.OrderedDict(),
    }
    content = {"data": pixels, "extrapolated_targets": labels, "more": payloads[kind]}
    raw = pickle.dumps(content)
    (tmp_path / "a.pickle").write_bytes(raw)
    with pytest.raises(UserError, match=r"was refused.*it asks for"):
        read(tmp_path / "a.pickle")
    assert not marker.exists()
    if kind == "nested":
        # The payload is live: the ordinary unpickler runs it.
        pickle.load(io.BytesIO(raw))
        assert marker.exists()


def test_a_hostile_npz_is_refused(tmp_path, arrays):
    marker = tmp_path / "ran"
    bomb = np.array([Hostile(os.mkdir, str(marker))], dtype=object)
    np.savez(tmp_path / "a.npz", image=bomb, label=arrays[1])
    with pytest.raises(UserError, match="could not be read"):
        read(tmp_path / "a.npz")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", ["npz", "pickle"])
def test_truncated_and_foreign_files_get_a_sentence(tmp_path, arrays, suffix):
    (pixels, labels) = arrays
    path = tmp_path / f"a.{suffix}"
    if suffix == "npz":
        np.savez(path, image=pixels, label=labels)
    else:
        path.write_bytes(pickle.dumps({"data": pixels, "extrapolated_targets": labels}))
    whole = path.read_bytes()
    for raw in (whole[:-20], whole[:10], b"", b"hello"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"could not be read|was refused"):
            read(path)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.zeros((2, 4, 5, 3)), [0, 1], "must be uint8 of shape .N, 4, 5, 3.*float64"),
        (np.zeros((2, 3, 4, 5), np.uint8), [0, 1], "must be uint8 of shape"),
        (np.zeros((2, 4, 5, 3), np.uint8), [0], "2 images"),
        (np.zeros((2, 4, 5, 3), np.uint8), [0.0, 1.0], "whole-number labels"),
        (np.zeros((2, 4, 5, 3), np.uint8), [0, 3], "must lie in 0 to 2, got 0 to 3"),
        (np.zeros((2, 4, 5, 3), np.uint8), [-1, 0], "must lie in 0 to 2, got -1"),
        (np.zeros((0, 4, 5, 3), np.uint8), np.zeros(0, int), "got none"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, image, label, message):
    np.savez(tmp_path / "a.npz", image=image, label=np.asarray(label))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.npz")


def test_missing_files_keys_and_other_suffixes(tmp_path, arrays):
    with pytest.raises(UserError, match="no extra data file"):
        read(tmp_path / "none.npz")
    np.savez(tmp_path / "a.npz", x=arrays[0])
    with pytest.raises(UserError, match=r"'image' and 'label', it has .'x'"):
        read(tmp_path / "a.npz")
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(UserError, match=r"'data' and 'extrapolated_targets', it has .'x'"):
        read(tmp_path / "a.pickle")
    (tmp_path / "b.pickle").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="dictionary, got list"):
        read(tmp_path / "b.pickle")
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(UserError, match=r"must be an .npz"):
        read(tmp_path / "a.csv")
