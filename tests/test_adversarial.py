"""Adversarial examples: which image is saved, and saved ones and surrogates as attacks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_support import evaluate, held_out, linear, trained

import robustflat as rf
from robustflat.errors import UserError
from robustflat.evaluate import Adversarial, AttackError, merge

EPS = 0.1


def threshold(classes: int = 2) -> torch.nn.Module:
    """Images whose mean is above a half are of class 1."""
    model = linear(classes, (1, 2, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
        model[1].weight[1] = 1.0
        model[1].bias[1] = -2.0
        model[1].bias[2:] = -9.0
    return model


def graded(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Images each of one grey, from 0.405 to 0.595, of which the first two have a wrong label."""
    x = torch.linspace(0.405, 0.595, count).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    y = (x.mean((1, 2, 3)) > 0.5).long()
    y[:2] = 1
    return x, y


def shifts(by: float, rows: slice = slice(None)) -> Any:
    """An attack that moves all pixels of some images of a batch over the threshold, by so much."""

    def attack(model: Any, x: Any, y: Any, *, seed: int) -> Any:
        moved = x.clone()
        moved[rows] = (x + torch.where(y == 0, by, -by).view(-1, 1, 1, 1))[rows]
        return moved

    return attack


def test_of_each_example_the_first_image_that_broke_it_is_saved_or_the_last_tried(
    tmp_path: Path,
) -> None:
    model, (x, y) = threshold(), graded()
    file = tmp_path / "deep" / "adv.npz"
    attacks = [shifts(0.02), shifts(0.06, slice(None, None, 2)), shifts(0.06), shifts(0.01)]
    result = evaluate(model, (x, y), attacks, eps=EPS, sanity=0, batch_size=5,
                      save_adversarial=file)  # fmt: skip
    found = Adversarial.load(file)
    assert torch.equal(found.positions, torch.arange(20))
    assert torch.equal(found.labels, y)
    assert str(found.threat) == "linf 0.1"
    assert torch.equal(found.predictions, model(found.x_adv).argmax(1))
    moved = (found.x_adv - x).mean((1, 2, 3)).abs()
    far = (x.mean((1, 2, 3)) - 0.5).abs()
    wrong = y != (x.mean((1, 2, 3)) > 0.5).long()
    expected = torch.where(far < 0.02, 0.02, torch.where(far < 0.06, 0.06, 0.01))
    assert torch.allclose(moved, torch.where(wrong, torch.zeros(()), expected), atol=1e-6)
    broken = found.predictions != found.labels
    assert torch.equal(broken, (result.outcomes >= 0) | wrong)
    assert torch.equal(
        result.attacked, torch.where(result.outcomes >= 0, 1 - y, result.predictions)
    )
    with np.load(file) as content:
        assert content["x_adv"].dtype == np.float32
        assert len(str(content["model"])) == 64


def test_saved_images_do_not_depend_on_where_an_evaluation_was_interrupted(tmp_path: Path) -> None:
    model, data = trained(), held_out(40)
    healthy = [False]
    calls: list[int] = []

    def second(model: Any, x: Any, y: Any, *, seed: int) -> Any:
        if not healthy[0] and len(calls) > 2:
            raise RuntimeError("killed")
        calls.append(len(x))
        return rf.pgd(eps=EPS, steps=3, loss="margin")(
            model, x, y, generator=torch.Generator().manual_seed(seed)
        )

    common: dict[str, Any] = {"eps": EPS, "sanity": 0, "batch_size": 8}
    attacks = [{"name": "pgd", "steps": 2, "step_size": 0.01}, second]
    with pytest.raises(AttackError):
        evaluate(model, data, attacks, store=tmp_path / "s", save_adversarial=tmp_path / "a.npz",
                 **common)  # fmt: skip
    assert not (tmp_path / "a.npz").exists()
    healthy[0] = True
    for name, store in (("a", tmp_path / "s"), ("b", tmp_path / "t"), ("c", None)):
        file = tmp_path / f"{name}.npz"
        evaluate(model, data, attacks, store=store, save_adversarial=file, **common)
    saved = [Adversarial.load(tmp_path / f"{name}.npz") for name in "abc"]
    assert all(torch.equal(one.x_adv, saved[0].x_adv) for one in saved)
    # Whose images were not kept is run again; whose were, is not.
    evaluate(model, data, ["pgd-2"], store=tmp_path / "u", **common)
    ran: list[str] = []

    def progress(name: str, *_: int) -> None:
        ran.append(name)

    for name, expected in (("d", {"pgd-2", "pgd-3"}), ("e", set())):
        ran.clear()
        evaluate(model, data, ["pgd-2", "pgd-3"], store=tmp_path / "u", on_progress=progress,
                 save_adversarial=tmp_path / f"{name}.npz", **common)  # fmt: skip
        assert set(ran) == expected
    pair = [Adversarial.load(tmp_path / f"{name}.npz") for name in "de"]
    assert torch.equal(pair[0].x_adv, pair[1].x_adv)
    fresh = evaluate(model, data, ["pgd-2", "pgd-3"], **common)
    again = evaluate(model, data, [], store=tmp_path / "u", **common)
    assert torch.equal(fresh.outcomes, again.outcomes), "nothing is counted twice"
    assert again.attacks["pgd-2"].broken == fresh.attacks["pgd-2"].broken
    assert again.attacks["pgd-2"].outside == 0


@pytest.mark.parametrize("name", ["x.npy", "here.npz", "here.npz/x.npz"])
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "here.npz").write_text("mine")

    def never(model: Any, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> torch.Tensor:
        raise RuntimeError("paid before it was refused")

    with pytest.raises(UserError, match=r"ends in \.npz|exists: remove it|not be written"):
        evaluate(threshold(), graded(), [never], save_adversarial=tmp_path / name)
    assert (tmp_path / "here.npz").read_text() == "mine"


def saved(tmp_path: Path, name: str = "adv", **change: Any) -> str:
    """A file of examples that break all that EPS can, with parts of it changed."""
    path = tmp_path / f"{name}.npz"
    if not path.exists():
        evaluate(threshold(), graded(), [shifts(0.06)], eps=EPS, sanity=0, save_adversarial=path)
    with np.load(path) as content:
        arrays = {key: value for key, value in dict(content, **change).items() if value is not None}
    np.savez(path, **arrays)
    return f"transfer:{path}"


def test_saved_examples_are_an_attack_on_another_model(tmp_path: Path) -> None:
    x, y = graded()
    attack = saved(tmp_path)
    same = evaluate(threshold(), (x, y), [attack], eps=EPS, sanity=0, batch_size=7)
    direct = evaluate(threshold(), (x, y), [shifts(0.06)], eps=EPS, sanity=0)
    assert torch.equal(same.outcomes, direct.outcomes)
    assert not same.warnings
    other = threshold()
    with torch.no_grad():
        other[1].bias[1] = -1.85  # its threshold is at 0.4625
    moved = Adversarial.load(tmp_path / "adv.npz").x_adv.mean((1, 2, 3)) > 0.4625
    clean = (x.mean((1, 2, 3)) > 0.4625).long() == y
    found = evaluate(other, (x, y), [attack, "fgsm"], eps=EPS, sanity=0, batch_size=7)
    assert torch.equal(found.outcomes == 0, clean & (moved.long() != y))
    # Of a part of them, in another order of choosing, each example keeps its own.
    part = evaluate(other, (x, y), [attack], eps=EPS, sanity=0, samples=10)
    assert torch.equal(part.outcomes, torch.where(found.outcomes > 0, -1, found.outcomes)[
        part.positions
    ])  # fmt: skip


def test_examples_without_a_saved_image_are_left_as_they_are_and_told_of(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    evaluate(threshold(), graded(), [shifts(0.06)], eps=EPS, sanity=0, shard="2/2",
             save_adversarial=path)  # fmt: skip
    assert torch.equal(Adversarial.load(path).positions, torch.arange(1, 20, 2))
    found = evaluate(threshold(), graded(), [f"transfer:{path}"], eps=EPS, sanity=0)
    (said,) = found.warnings
    assert said.startswith(f"{path} holds images for 10 of the 20 examples: transfer:{path} leaves")
    assert not (found.outcomes[::2] >= 0).any()
    assert (found.outcomes[1::2] >= 0).any()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"eps": np.array(0.2)}, "made for linf 0.2, and the evaluation is for linf 0.1"),
    ({"norm": np.array("l2")}, "made for l2 0.1"),
    ({"norm": np.array("l7")}, "holds no adversarial examples"),
    ({"x_adv": np.zeros((20, 3, 2, 2), np.float32)}, "they are of another data set"),
    ({"x_adv": np.zeros((20, 1, 2, 2), np.float32)}, "are not within linf 0.1 of the images"),
    ({"x_adv": np.full((20, 1, 2, 2), np.nan, np.float32)}, "20 of 20 images"),
    ({"x_adv": np.zeros((19, 1, 2, 2), np.float32)}, "is damaged"),
    ({"labels": np.arange(20) % 2}, "labels of .* are not those of the images"),
    ({"positions": np.arange(20) + 20}, "none of the 20 that are evaluated"),
    ({"labels": None}, r"holds no adversarial examples \(KeyError: labels"),
    ({"labels": np.array([{}] * 20)}, "holds no adversarial examples"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_stored_examples_of_something_else_are_refused_before_anything_is_paid(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    ran: list[int] = []

    def other(model: Any, x: Any, y: Any, *, seed: int) -> Any:
        ran.append(len(x))
        return x

    attack = saved(tmp_path, **change)
    with pytest.raises(UserError, match=words):
        evaluate(threshold(), graded(), [other, attack], eps=EPS, sanity=0)
    assert not ran


def test_a_few_images_outside_are_the_judge_s_business(tmp_path: Path) -> None:
    attack = saved(tmp_path)
    images = Adversarial.load(tmp_path / "adv.npz").x_adv.numpy().copy()
    images[5] = 0
    saved(tmp_path, x_adv=images)
    result = evaluate(threshold(), graded(), [attack], eps=EPS, sanity=0)
    assert result.attacks[attack].outside == 1
    assert "1 images that transfer:" in result.warnings[0]


def test_no_file_and_what_is_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    for source, words in (
        ("nowhere.npz", "needs the examples or the model that it names"),
        ("text.npz", "holds no adversarial examples"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(threshold(), graded(), [f"transfer:{tmp_path / source}"], sanity=0)


def test_edited_examples_are_another_attack(tmp_path: Path) -> None:
    attack = saved(tmp_path)
    common: dict[str, Any] = {"eps": EPS, "sanity": 0, "store": tmp_path / "s"}
    assert len(evaluate(threshold(), graded(), [attack], **common).attacks) == 1
    assert len(evaluate(threshold(), graded(), [attack], **common).attacks) == 1
    x, _ = graded()
    saved(tmp_path, x_adv=x.numpy())
    assert len(evaluate(threshold(), graded(), [attack], **common).attacks) == 2


def test_another_model_is_a_surrogate() -> None:
    model, data = trained(), held_out(60)
    request = {"name": "transfer:itself", "model": trained(), "attack": "pgd-5"}
    common: dict[str, Any] = {"eps": EPS, "sanity": 0, "batch_size": 16, "seed": 3}
    # One step from a random start, of which much hangs on the seed.
    for seed in (3, 4):
        by_start = [{**request, "attack": "pgd-1"}, "pgd-1"]
        pair = evaluate(model, data, by_start, **{**common, "eps": 0.2, "seed": seed})
        first, second = pair.attacks.values()
        assert first.accuracy == second.accuracy == pair.robust_accuracy
    itself = evaluate(model, data, [request], **common)
    direct = evaluate(model, data, ["pgd-5"], **common)
    assert torch.equal(itself.outcomes, direct.outcomes)
    assert 0 < direct.robust_accuracy < direct.clean_accuracy
    weaker = trained(steps=3).train()
    before = [t.clone() for t in weaker.state_dict().values()]
    found = evaluate(model, data, [{**request, "model": weaker}, "pgd-5"], **common)
    assert found.attacks["transfer:itself"].accuracy > direct.robust_accuracy
    assert weaker.training
    assert all(map(torch.equal, before, weaker.state_dict().values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": linear(3, (1, 8, 8))}, r"into 10 classes, got 1, 3"),
        ({"model": linear(10, (1, 4, 4))}, r"images of the shape \[1, 8, 8\]"),
        ({"model": "wrn"}, r"must be a torch\.nn\.Module"),
        ({"attack": "apgd-ce"}, "is attacked by fgsm, pgd-STEPS"),
        ({"steps": 3}, "no option 'steps'"),
    ],
)
def test_a_surrogate_that_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    request = {"name": "transfer:x", "model": trained(), **change}
    with pytest.raises(UserError, match=words):
        evaluate(trained(), held_out(4), [request], eps=EPS, sanity=0)


def test_examples_know_their_place_label_and_predictions_also_when_merged(tmp_path: Path) -> None:
    model, (x, y) = trained(), held_out(50)
    run = functools.partial(evaluate, model, (x, y), ["pgd-3", "fgsm"], eps=EPS, sanity=0)
    whole = run(samples=40)
    shards = [run(samples=40, shard=f"{part}/3", store=tmp_path) for part in (1, 2, 3)]
    joined = merge(tmp_path)
    for part, shard in enumerate(shards):
        assert torch.equal(joined.attacked[part::3], shard.attacked)
        assert torch.equal(joined.positions[part::3], shard.positions)
    stored = run(samples=40, store=tmp_path / "w.json")
    loaded = run(samples=40, store=tmp_path / "w.json")
    for name in ("positions", "labels", "predictions"):
        for other in (joined, stored, loaded):
            assert torch.equal(getattr(whole, name), getattr(other, name))
    assert torch.equal(loaded.attacked, whole.attacked)
    assert torch.equal(whole.labels, y[whole.positions])
    assert torch.equal(whole.predictions, model(x).argmax(1)[whole.positions])
    assert torch.equal(whole.attacked != whole.labels, whole.outcomes != -1)
    assert torch.equal(joined.attacked != joined.labels, joined.outcomes != -1)


def test_an_example_is_taken_for_what_the_first_attack_made_of_it() -> None:
    model = linear(3, (1, 1, 3))  # the brightest of three pixels is the class
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
        model[1].bias.zero_()
    x = torch.tensor([[0.6, 0.5, 0.5], [0.9, 0.2, 0.2]]).view(2, 1, 1, 3)
    y = torch.zeros(2, dtype=torch.int64)

    def brightens(pixel: int) -> Any:
        def attack(model: Any, x: Any, y: Any, *, seed: int) -> Any:
            moved = x.clone()
            moved[..., pixel] += 0.2
            return moved

        return attack

    for first, second in ((1, 2), (2, 1)):
        attacks = [brightens(first), brightens(second)]
        found = evaluate(model, (x, y), attacks, eps=0.21, sanity=0)
        assert found.attacked.tolist() == [first, 0]
        assert found.confusion(attacked=True)[0].tolist()[first] == 1
