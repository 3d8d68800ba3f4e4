"""Robust accuracy over several radii: closed forms, and falling by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from evaluate_support import held_out, linear, trained

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate import Work
from robustflat.evaluate.radii import over_radii
from robustflat.report import paper
from robustflat.report.radii import chart, radius_table

RADII = [0.03, 0.01, 0.06, 0.0]
WORK = Work(batch_size=16, sanity=0)


def test_it_is_the_share_that_is_further_away() -> None:
    model = linear(2, (1, 4, 4))
    x = 0.3 + 0.4 * torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    y[:3] = 1 - y[:3]
    w = (model[1].weight[0] - model[1].weight[1]).detach().double()
    ahead = model(x).detach().double() @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    far = torch.where(y == 0, ahead, -ahead) / w.abs().sum()
    found = over_radii(model, (x, y), RADII, ["pgd-10"], work=WORK)
    assert [point.eps for point in found.points] == [0.0, 0.01, 0.03, 0.06]
    assert (found.norm, found.count) == ("linf", 60)
    before = 60
    for point in found.points:
        standing = int((far > point.eps).sum())
        assert point.accuracy == standing / 60
        assert (point.attacked, point.broken) == (before, before - standing)
        assert point.interval[0] < point.accuracy < point.interval[1]
        before = standing
    assert before < 50
    assert found.to_dict()["points"][1]["eps"] == 0.01


ATTACKED: list[tuple[float, int]] = []


def weaker(model: Any, x: Any, y: Any, *, seed: int, eps: float) -> Any:
    """Gives up at larger radii."""
    ATTACKED.append((eps, len(x)))
    if eps > 0.1:
        return x
    made = rf.pgd(eps=eps, steps=5)
    return made(model, x, y, generator=torch.Generator().manual_seed(seed))


def test_what_a_smaller_radius_broke_stays_broken_and_is_not_attacked_again(
    tmp_path: Path,
) -> None:
    model, data = trained(), held_out(40)
    ATTACKED.clear()
    work = Work(batch_size=100, sanity=0)
    found = over_radii(model, data, [0.05, 0.1, 0.2], [weaker], store=tmp_path, work=work)
    shares = [point.accuracy for point in found.points]
    assert shares[0] > shares[1] > shares[2] == shares[3]
    # A trial on two images comes first.
    assert [pair for pair in ATTACKED if pair[1] > 2] == [
        (point.eps, point.attacked) for point in found.points[1:]
    ]
    ATTACKED.clear()
    again = over_radii(model, data, [0.05, 0.1], [weaker], store=tmp_path, work=work)
    assert again.points == found.points[:3]
    assert not ATTACKED
    # One more radius leaves others to those above it.
    more = over_radii(model, data, [0.05, 0.08, 0.1], [weaker], store=tmp_path, work=work)
    assert more.points[1] == found.points[1]
    assert more.points[3].accuracy <= found.points[2].accuracy
    assert {eps for eps, _ in ATTACKED} == {0.08, 0.1}
    with_norm = over_radii(model, data, [0.05], ["pgd-3"], "l2", work=work)
    assert with_norm.norm == "l2"
    assert with_norm.points[1].accuracy > shares[1]


def test_where_nothing_is_left_nothing_is_attacked() -> None:
    model, data = trained(), held_out(12)
    found = over_radii(model, data, [0.9, 1.0], ["pgd-20"], work=WORK)
    assert [point.accuracy for point in found.points[1:]] == [0, 0]
    assert (found.points[2].attacked, found.points[2].seconds) == (0, 0)


@pytest.mark.parametrize(
    ("radii", "attacks", "words"),
    [
        ([], ["fgsm"], "at least one radius above 0"),
        ([0.0], ["fgsm"], "at least one radius above 0"),
        ([-0.1], ["fgsm"], "finite number >= 0"),
        ([0.1, 0.2], [rf.pgd(eps=0.1)], "one in the linf ball of 0.1"),
        ([0.1], ["fgms"], "Did you mean 'fgsm'"),
    ],
)
def test_a_curve_that_cannot_be_is_refused_first(radii: Any, attacks: Any, words: str) -> None:
    ran: list[int] = []

    def other(model: Any, x: Any, y: Any, *, seed: int) -> Any:
        ran.append(1)
        return x

    with pytest.raises(UserError, match=words):
        over_radii(trained(), held_out(4), radii, [other, *attacks], work=WORK)
    assert not ran


def test_it_is_drawn_and_shown_as_it_is() -> None:
    found = over_radii(trained(), held_out(20), RADII, ["fgsm"], work=WORK)
    drawn = chart({"a": found, "b": found})
    assert [series.name for series in drawn.series] == ["a", "b"]
    assert drawn.series[0].low == [point.interval[0] for point in found.points]
    assert drawn.series[0].high == [point.interval[1] for point in found.points]
    (picture,) = paper.draw([drawn]).axes
    line = picture.get_lines()[0]
    assert list(line.get_xdata()) == [point.eps for point in found.points]
    assert list(line.get_ydata()) == pytest.approx([100 * p.accuracy for p in found.points])
    assert "eps, linf" in picture.get_xlabel()
    plt.close("all")
    table = radius_table("a", found)
    assert [*map(str, table.columns[0].cells)] == ["0", "0.01", "0.03", "0.06"]
    assert str(next(iter(table.columns[1].cells))) == f"{found.points[0].accuracy:.2%}"
