from __future__ import annotations

import pytest
import torch
from flatness_models import examples, mlp
from torch.utils.data import DataLoader, TensorDataset

import robustflat as rf
from robustflat.data import mixed
from robustflat.flatness import flatness
from robustflat.flatness.closure import Closure
from robustflat.flatness.examples import read_examples
from robustflat.flatness.subject import Subject, normal, signs
from robustflat.perturb import Ball

SORTED = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


@pytest.mark.parametrize("labels", [SORTED, SORTED.flip(0), torch.tensor([5, 5, 5, 9])])
def test_every_stretch_has_the_classes_in_their_shares(labels):
    order = mixed(labels, seed=0)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    assert torch.equal(order, mixed(labels, seed=0))
    found = labels[order]
    for length in (1, 4, 10, 25, 64, len(labels)):
        for start in range(len(labels) - length + 1):
            for c in labels.unique():
                share = (labels == c).float().mean() * length
                assert abs((found[start : start + length] == c).sum() - share) < 2.5


def test_which_members_of_a_class_come_first_is_drawn_and_depends_on_the_seed():
    first = [mixed(SORTED, seed=s)[:10].sort().values for s in range(3)]
    assert not torch.equal(first[0], first[1])
    assert len(mixed(SORTED, seed=0)[:50][SORTED[mixed(SORTED, seed=0)[:50]] == 0].unique()) > 20
    ranks = mixed(SORTED, seed=0)[:20]
    assert (ranks[SORTED[ranks] == 0] >= 30).any()  # not the first of the file


def test_examples_and_chunks_of_class_sorted_data_are_mixed(monkeypatch):
    x, y = torch.rand(100, 6, dtype=torch.float64), SORTED
    seen: list[torch.Tensor] = []
    original = Closure.losses

    def losses(self):
        seen.append(self.y)
        return original(self)

    monkeypatch.setattr(Closure, "losses", losses)
    flatness(mlp((6, 4, 3)), (x, y), ["ascent_clean"], m=10)
    assert [len(s) for s in seen] == [10] * 20
    assert all(torch.bincount(s, minlength=3)[0] >= 4 for s in seen)
    seen.clear()
    flatness(mlp((6, 4, 3)), (x, y), ["ascent_clean"], examples=20)
    assert (torch.bincount(seen[0], minlength=3) >= torch.tensor([10, 4, 1])).all()


def test_a_loader_gives_the_same_images_as_tensors_for_every_limit_and_batch():
    x, y = torch.rand(100, 6), SORTED
    soft = torch.nn.functional.one_hot(y, 3).float()
    for labels in (y, soft):
        for limit in (None, 7):
            expected = read_examples((x, labels), limit)
            for size in (100, 9):
                loader = DataLoader(TensorDataset(x, labels), batch_size=size)
                found = read_examples(loader, limit)
                assert found[2] == expected[2] == 100
                pairs = zip(found[:2], expected[:2], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
                assert [torch.equal(x[i], a) for i, a in zip(mixed(y, seed=0), found[0])]  # noqa: B905  # fmt: skip
    assert torch.equal(read_examples((x, y), 7)[0], x[mixed(y, seed=0)[:7]])
    assert torch.equal(read_examples((x, soft))[1], soft[mixed(y, seed=0)])


def test_random_tensors_are_drawn_on_the_cpu_whatever_the_device_and_memory_format():
    model, (x, y) = mlp(), examples(4, (6,), 4)
    subject = Subject(model, x, y, batch_size=4, seed=0)
    like = [torch.zeros(2, 3, 4, 5), torch.zeros(7)]
    for draw in (
        signs,
        normal,
        Ball(2.0, 0.1, "row").sample,
        Ball(float("inf"), 1.0, "row").sample,
    ):
        expected = subject.draw(draw, like, "direction", 0)
        last = [like[0].to(memory_format=torch.channels_last), like[1]]
        again = subject.draw(draw, last, "direction", 0)
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
        assert not torch.equal(expected[0], subject.draw(draw, like, "direction", 1)[0])
        asked: list[torch.device] = []

        def watched(blank, generator, draw=draw, asked=asked):
            asked.extend([t.device for t in blank] + [generator.device])
            return draw(blank, generator)

        there = subject.draw(watched, [t.to("meta") for t in like], "direction", 0)
        assert {d.type for d in asked} == {"cpu"}
        assert {t.device.type for t in there} == {"meta"}
    assert set(torch.cat([t.flatten() for t in subject.draw(signs, like)]).tolist()) == {-1.0, 1.0}


def test_soft_labels_are_probabilities_and_images_outside_of_the_box_are_told(caplog):
    x, y = torch.rand(6, 3), torch.full((6, 4), 0.25)
    assert torch.equal(read_examples((x, y))[1], y)
    assert not caplog.records
    for wrong in (y * 3, y + torch.tensor([-0.5, 0.5, 0, 0])):
        with pytest.raises(rf.UserError, match="Soft labels must be probabilities"):
            read_examples((x, wrong))
    for outside in (x * 255, x - 1):
        caplog.clear()
        read_examples((outside, y))
        assert "The images are in [" in caplog.text
