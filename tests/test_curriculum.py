"""Attacks that grow over a run, and the alarm that answers a collapse of robust accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import inputs as ref
from reference.nets import images, mlp
from train_support import config, rows, same_run, saved, stopped, trained

import robustflat as rf
from robustflat.config.schema import AlarmConfig
from robustflat.errors import TrainingDivergedError, UserError
from robustflat.train import Trainer, train
from robustflat.train.alarm import Alarm
from robustflat.train.curriculum import Curriculum
from robustflat.train.folder import RunFolder
from robustflat.train.monitor import score

PGD = {"name": "pgd", "eps": 0.2, "steps": 4, "step_size": 0.05, "start": "zero"}


def curriculum(epochs: int = 10, **grow: Any) -> Curriculum:
    asked = config(attack={**PGD, "curriculum": grow}, train__epochs=epochs)
    return Curriculum(asked)


# --- N-FGSM ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "alpha"), [(2.0, None), (1.0, 0.15), (0.5, 0.0)])
def test_nfgsm_follows_the_released_code(noise: float, alpha: float | None) -> None:
    model = mlp(dtype=torch.float64)
    x, y = images(40)
    attack = rf.nfgsm(eps=0.1, noise=noise, step_size=alpha)
    found = attack(model, x, y, generator=torch.Generator().manual_seed(3))
    uniform = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    step = 0.1 if alpha is None else alpha
    theirs = ref.nfgsm(model, x, y, noise * 0.1 * uniform, step)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-12)
    reach = (found - x).abs().amax()
    assert reach <= noise * 0.1 + step + 1e-12
    if noise == 2.0:
        assert reach > 0.25  # it is not brought back into the ball of 0.1


def test_nfgsm_reduces_to_fgsm_and_to_nothing() -> None:
    model = mlp(dtype=torch.float64)
    x, y = images(9)
    alone, fgsm = rf.nfgsm(eps=0.1, noise=0.0), rf.fgsm(eps=0.1)
    assert torch.equal(alone(model, x, y), fgsm(model, x, y))
    assert torch.equal(rf.nfgsm(eps=0.0)(model, x, y), x)
    with pytest.raises(ValueError, match="cannot climb loss='kl' from start='zero'"):
        rf.nfgsm(noise=0.0, loss="kl")
    with pytest.raises(ValueError, match="noise must be finite and >= 0, got -1"):
        rf.nfgsm(noise=-1.0)


def test_a_start_is_as_wide_as_its_spread() -> None:
    ball, like = rf.Ball(2, 2.0, "row"), [torch.zeros(500, 3, dtype=torch.float64)]
    (u,) = rf.perturb.maximise(  # type: ignore[attr-defined]
        lambda u: (u[0].sum(), u), ball, rf.Ascent(0, start="sphere", spread=0.25), like
    )
    torch.testing.assert_close(u.norm(dim=1), torch.full((500,), 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"spread must be in \[0, 1\], got 1.5"):
        rf.Ascent(1, spread=1.5)


# --- curricula ------------------------------------------------------------------------------


def radius(attack: Any) -> float:
    return float(attack.ball.radius)


def test_eps_rises_by_the_step_and_the_steps_keep_their_share() -> None:
    grow = curriculum(warmup_epochs=2)
    for epoch, step, share in ((0, 0, 0.0), (0, 1, 0.125), (1, 2, 0.75), (2, 0, 1.0), (9, 3, 1.0)):
        attack = grow(epoch, step, 4)
        assert radius(attack) == pytest.approx(0.2 * share, rel=1e-12)
        assert attack.ascent.step_size == pytest.approx(0.25)
    # At the beginning eps is 0, and the images stay as they are.
    x, y = images(3)
    assert torch.equal(grow(0, 0, 4)(mlp(dtype=torch.float64), x, y), x)


def test_eps_rises_by_the_epoch_as_in_the_released_codes_that_count_from_one() -> None:
    grow = curriculum(epochs=5, warmup_epochs=5, by="epoch", start=0.3)
    found = [radius(grow(epoch, step, 4)) for epoch in range(5) for step in (0, 3)]
    assert found == pytest.approx([0.2 * s for s in (0.3, 0.3, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1, 1)])


def test_stages_replace_the_attacks_own_values() -> None:
    stages = [{"from_epoch": 3, "steps": 6, "step_size": 0.02}, {"from_epoch": 5, "eps": 0.4}]
    grow = curriculum(stages=stages, warmup_epochs=4)
    found = [grow(epoch, 0, 1) for epoch in range(6)]
    assert [a.ascent.steps for a in found] == [4, 4, 6, 6, 4, 4]
    assert [radius(a) for a in found] == pytest.approx([0, 0.05, 0.1, 0.15, 0.4, 0.4])
    assert found[3].ascent.step_size == pytest.approx(0.02 / 0.2)
    assert found[4].ascent.step_size == pytest.approx(0.05 / 0.4)


def test_without_a_curriculum_the_attack_is_the_attack() -> None:
    grow = curriculum()
    assert grow(0, 0, 1) is grow(9, 0, 1)
    assert radius(grow(0, 0, 1)) == 0.2
    standard = config(attack=PGD, objective={"name": "standard"}, weights="none")
    assert Curriculum(standard)(0, 0, 1) is None


def test_a_strengthened_curriculum_is_pgd_with_the_stages_eps() -> None:
    asked = {"name": "fgsm", "eps": 0.2, "mode": "batch", "curriculum": {"warmup_epochs": 2}}
    grow = Curriculum(config(attack=asked))
    grow.strengthen(7)
    attack = grow(1, 0, 1)
    assert attack is not None
    assert (attack.ascent.steps, attack.mode, attack.ascent.start) == (7, "batch", "uniform")
    assert radius(attack) == pytest.approx(0.1)
    grow.strengthen(None)
    again = grow(2, 0, 1)
    assert again is not None
    assert again.name == "fgsm"


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        ({"warmup_epochs": 11}, "warmup_epochs is 11 of train.epochs 10"),
        ({"stages": [{"from_epoch": 2}]}, "from epoch 2: it changes nothing"),
        ({"stages": [{"from_epoch": 11, "steps": 2}]}, "in epochs 2 to 10, got from_epoch 11"),
        (
            {"stages": [{"from_epoch": 4, "steps": 2}, {"from_epoch": 4, "steps": 3}]},
            "one after the other",
        ),
    ],
)
def test_impossible_curricula_are_refused(grow: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        curriculum(**grow)


def test_curricula_need_what_they_change() -> None:
    fgsm = {"name": "fgsm", "eps": 0.1, "curriculum": {"stages": [{"from_epoch": 2, "steps": 3}]}}
    with pytest.raises(UserError, match="attack fgsm has no steps"):
        config(attack=fgsm)
    none = {"name": "none", "curriculum": {"warmup_epochs": 1}}
    with pytest.raises(UserError, match="attack none has no eps that could grow"):
        config(attack=none, objective={"name": "standard"}, weights="none")


def test_a_run_with_a_curriculum_uses_and_resumes_it(tmp_path: Path) -> None:
    asked = {
        "attack": {
            **PGD,
            "curriculum": {"warmup_epochs": 2.5, "stages": [{"from_epoch": 3, "steps": 1}]},
        },
        "train__epochs": 4,
        "weights": "none",
    }
    whole = trained(tmp_path / "whole", **asked)
    plain = trained(tmp_path / "plain", **{**asked, "attack": PGD})
    assert rows(whole)[0]["train_loss"] < rows(plain)[0]["train_loss"]

    part = config(tmp_path / "part", **asked)
    folder, _ = train(part)
    for file in (folder.last, folder.best):
        file.unlink()
    assert stopped(part, folder, after=9).epoch == 2
    folder, finished = train(part, resume=True)
    assert finished
    same_run(whole, folder)


# --- the alarm ------------------------------------------------------------------------------


def test_the_alarm_tells_a_collapse_from_a_decline() -> None:
    alarm = Alarm(AlarmConfig(drop=0.5, then="restart", steps=3), 10)
    for epoch, robust in enumerate((0.19, 0.02, 0.4, 0.5, 0.4, 0.26), start=1):
        assert alarm.collapsed(robust, epoch) is None
    found = alarm.collapsed(0.24, 6)
    assert found == {"epoch": 6, "robust_accuracy": 0.24, "best": 0.5, "steps": 3}
    assert alarm.collapsed(0.25, 7) is None  # not more than half is lost
    assert (alarm.can_go_back, alarm.steps) == (True, None)
    alarm.raised = found
    assert (alarm.can_go_back, alarm.steps) == (False, 3)
    other = Alarm(AlarmConfig(drop=0.5, then="restart", steps=3), 10)
    other.load_state_dict(alarm.state_dict())
    assert other.collapsed(0.24, 6) == found
    assert other.steps == 3
    assert not Alarm(AlarmConfig(then="stop"), 10).can_go_back
    # With two classes, guessing is right half of the time.
    few = Alarm(AlarmConfig(), 2)
    assert few.collapsed(0.9, 1) is None
    assert few.collapsed(0.0, 2) is None


ALARMED = {
    "attack": {"name": "fgsm", "eps": 0.1},
    "weights": "none",
    "train__epochs": 6,
    "monitor__train_samples": 20,
}


def collapsing(monkeypatch: pytest.MonkeyPatch, *fatal: int) -> None:
    """Robust validation accuracy is .6, but 0 after the epochs ``fatal`` of FGSM (0: of PGD)."""
    real = Trainer._measure

    def measured(self: Trainer) -> dict[str, Any]:
        found = real(self)
        attack = self._curriculum(self.epoch - 1, 0, 1)
        assert attack is not None
        weak = attack.name == "fgsm"
        lost = (weak and self.epoch in fatal) or (not weak and 0 in fatal and self.epoch > 4)
        found["raw"]["validation"]["robust_accuracy"] = 0.0 if lost else 0.6
        return found

    monkeypatch.setattr(Trainer, "_measure", measured)


def test_a_collapse_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing(monkeypatch, 3)
    asked = config(tmp_path, **ALARMED, train__alarm={})
    with pytest.raises(
        TrainingDivergedError,
        match=r"fell from 60.0% to 0.0% by epoch 3: catastrophic overfitting. The best checkpoint "
        r"is .*best.pt.*more steps.*nfgsm.*restart",
    ):
        train(asked)
    folder = RunFolder(tmp_path / "run")
    assert saved(folder.last)["epoch"] == 2  # from before
    assert [row["epoch"] for row in rows(folder)] == [1, 2]
    assert not folder.good.exists()


def test_a_collapse_goes_back_and_on_with_more_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing(monkeypatch, 4, 5)
    alarm = {"then": "restart", "steps": 3}
    told: list[Any] = []

    class Told:
        def on_start(self, epochs: int, steps: int, done: int) -> None:
            told.append(("start", done))

        def on_step(self, epoch: int, step: int, values: Any) -> None: ...
        def on_epoch(self, row: dict[str, Any]) -> None:
            told.append((row["epoch"], bool(row["alarm"])))

        def on_end(self) -> None:
            told.append("end")

    asked = config(tmp_path, **ALARMED, train__alarm=alarm, monitor__every=2)
    folder, finished = train(asked, listeners=lambda f: [Told()])
    assert finished
    # Measured every second epoch: after the collapse by epoch 4 it goes back to the 8 steps of 2.
    assert told == [
        ("start", 0), (1, False), (2, False), (3, False), (4, True), "end",
        ("start", 8), (3, True), (4, True), (5, True), (6, True), "end",
    ]  # fmt: skip
    found = rows(folder)
    assert [row["epoch"] for row in found] == [1, 2, 3, 4, 5, 6]
    collapse = {"epoch": 4, "robust_accuracy": 0.0, "best": 0.6, "steps": 3}
    assert [row["alarm"] for row in found] == [None, None, *[collapse] * 4]
    # From there on it is the run that had PGD from the third epoch on.
    monkeypatch.undo()
    collapsing(monkeypatch)
    pgd = {"name": "pgd", "eps": 0.1, "steps": 3}
    other = config(tmp_path / "other", **{**ALARMED, "attack": pgd}, monitor__every=2)
    state = saved(folder.good)
    assert state["epoch"] == 2
    from robustflat.train.setup import load_data

    trainer = Trainer(other, load_data(other), torch.device("cpu"))
    trainer._restore(state)
    assert trainer.run()
    for a, b in zip(
        trainer.model.state_dict().values(), saved(folder.last)["model"].values(), strict=True
    ):
        assert torch.equal(a, b)


def test_going_back_is_resumed_exactly_and_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing(monkeypatch, 3)
    alarm = {"then": "restart", "steps": 3}
    whole = trained(tmp_path / "a", **ALARMED, train__alarm=alarm)
    part = config(tmp_path / "b", **ALARMED, train__alarm=alarm)
    folder = RunFolder(tmp_path / "b" / "run")
    folder.prepare(part, resume=False)
    assert stopped(part, folder, after=21).epoch == 4
    assert saved(folder.last)["alarm"]["raised"]["epoch"] == 3
    folder, finished = train(part, resume=True)
    assert finished
    same_run(whole, folder)

    collapsing(monkeypatch, 3, 0)
    with pytest.raises(TrainingDivergedError, match="by epoch 5, although the attack had 3 steps"):
        train(config(tmp_path / "c", **ALARMED, train__alarm=alarm))


def test_the_alarm_needs_what_it_watches() -> None:
    with pytest.raises(UserError, match="watches robust accuracy, and attack none"):
        config(attack="none", objective={"name": "standard"}, weights="none", train__alarm={})
    with pytest.raises(UserError, match="watches the validation split"):
        config(train__alarm={}, monitor__every=0)


def test_the_alarm_watches_the_raw_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The averaged ones lag behind, and choose the best checkpoint as always.
    collapsing(monkeypatch, 3)
    average = {"name": "ema", "decay": 0.5}
    with pytest.raises(TrainingDivergedError, match="by epoch 3"):
        train(config(tmp_path, **ALARMED, train__alarm={}, train__average=average))
    assert score({"validation": {"robust_accuracy": 0.3, "clean_accuracy": 1.0}}) == 0.3
