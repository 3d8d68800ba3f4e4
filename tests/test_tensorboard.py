"""TensorBoard's files, read back, say what the run's own files say."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from test_tables import monitored, row
from torch import nn
from train_support import SMALL_CNN, config

import robustflat as rf
from robustflat.landscapes import Landscape
from robustflat.report.monitor_figures import confusion, examples, line
from robustflat.report.tensorboard import TensorBoard
from robustflat.train import Listener, train
from robustflat.train.folder import RunFolder
from robustflat.train.monitor import Monitor
from robustflat.train.pictures import Pictures, take

ACCURACY, GAP = "1-robust/accuracy", "1-robust/accuracy_gap"


def read(place: Path) -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(place), size_guidance=sizes).Reload()


def curve(place: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(place).Scalars(tag)]


def test_curves_of_splits_share_a_chart(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(3, 8, 0)
    board.on_epoch(row(1, monitor=monitored(0.75, 0.5)))
    board.on_epoch(row(2, train_loss=None, gradient_norm=None))
    averaged = {"monitor": monitored(1.0, 0.625), "monitor_average": monitored(0.875, 0.75)}
    board.on_epoch(row(3, **averaged, flatness={"worst": 0.125, "x": None}, best_minus_last=0.25))
    board.on_end()
    # Every number is exact in float32, which TensorBoard stores; the axis counts steps.
    assert curve(tmp_path / "train", ACCURACY) == [(8, 0.75), (24, 1.0)]
    assert curve(tmp_path / "validation", ACCURACY) == [(8, 0.5), (24, 0.625)]
    assert curve(tmp_path / "validation-average", ACCURACY) == [(24, 0.75)]
    assert curve(tmp_path / "train-average", "3-clean/loss") == [(24, 0.25)]
    assert curve(tmp_path, GAP) == [(8, 0.25), (24, 0.375)]
    assert curve(tmp_path, "1-robust/loss_gap") == [(8, 0.375), (24, 0.375)]
    assert curve(tmp_path / "average", GAP) == [(24, 0.125)]
    # The outcome is that of the averaged weights once there are any.
    assert curve(tmp_path, "9-outcome/robust_accuracy") == [(8, 0.5), (24, 0.75)]
    assert curve(tmp_path, "9-outcome/accuracy_gap") == [(8, 0.25), (24, 0.125)]
    assert curve(tmp_path, "9-outcome/robust_loss") == [(8, 0.875), (24, 0.875)]
    assert curve(tmp_path, "5-optimisation/epoch_loss") == [(8, 1.5), (24, 1.5)]
    assert curve(tmp_path, "6-flatness/worst") == [(24, 0.125)]
    assert curve(tmp_path, "1-robust/overfitting_best_minus_last") == [(24, 0.25)]
    assert "6-flatness/x" not in read(tmp_path).Tags()["scalars"]


def test_what_was_not_measured_has_no_curve(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "unused").on_end()
    assert not (tmp_path / "unused").exists()
    board = TensorBoard(tmp_path)
    board.on_start(1, 8, 0)
    clean = {"train": {"clean_accuracy": 0.5, "clean_loss": 1.0}}
    board.on_epoch(row(1, monitor=clean | {"validation": clean["train"]}))
    board.on_end()
    assert not [tag for tag in read(tmp_path).Tags()["scalars"] if "gap" in tag or "robust" in tag]
    assert read(tmp_path / "train").Tags()["scalars"] == ["3-clean/accuracy", "3-clean/loss"]


def test_values_of_steps_have_charts_and_ones_own_too(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(3, 8, 0)
    values = {"rise": 0.25, "cosine/successive": -0.5, "layers/a.weight": 0.125, "lr": 0.5}
    values |= {"attack/loss/2": 3.0, "attack/broken": 0.75, "lambda_max": 8.0}
    board.on_step(2, 3, values)
    board.on_end()
    found = {tag: curve(tmp_path, tag) for tag in read(tmp_path).Tags()["scalars"]}
    assert found == {
        "1-robust/increase_under_weights": [(20, 0.25)],
        "2-weights/cosine_of_successive": [(20, -0.5)],
        "9-layers/a.weight": [(20, 0.125)],
        "5-optimisation/lr": [(20, 0.5)],
        "4-attack/loss_at_step_2": [(20, 3.0)],
        "4-attack/share_broken": [(20, 0.75)],
        "7-own/lambda_max": [(20, 8.0)],
    }


def test_resuming_replaces_the_points_after_it_in_every_place(tmp_path: Path) -> None:
    for done, loss in ((0, 1.0), (12, 0.5)):
        board = TensorBoard(tmp_path)
        board.on_start(3, 8, done)  # at once after the other: files are ordered by the second
        for step in range(done, 24):
            board.on_step(step // 8, step % 8, {"lr": loss})
            if step % 8 == 7:
                board.on_epoch(row(step // 8 + 1, monitor=monitored(loss, loss)))
        board.on_end()
    expected = [(i, 1.0) for i in range(1, 13)] + [(i, 0.5) for i in range(13, 25)]
    assert curve(tmp_path, "5-optimisation/lr") == expected
    assert curve(tmp_path / "train", ACCURACY) == [(8, 1.0), (16, 0.5), (24, 0.5)]


def test_a_file_is_never_of_the_second_of_an_earlier_one(tmp_path: Path) -> None:
    second = int(time.time())
    (tmp_path / f"events.out.tfevents.{second}.host.0.0").touch()
    board = TensorBoard(tmp_path)
    board.on_start(3, 8, 0)
    board.on_end()
    found = RunFolder(tmp_path).event_files()
    assert max(int(path.name.split(".")[3]) for path in found) > second


def test_points_after_a_resumption_go_even_where_none_comes_again(tmp_path: Path) -> None:
    for done in (0, 8):
        board = TensorBoard(tmp_path)
        board.on_start(3, 8, done)
        if not done:
            for epoch in (1, 2):
                board.on_epoch(row(epoch, monitor=monitored(0.5, 0.5)))
        board.on_end()
    assert curve(tmp_path / "validation", ACCURACY) == [(8, 0.5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = config(
        tmp_path_factory.mktemp("told"),
        name="told",
        model=SMALL_CNN,
        train__average={"name": "swa", "start_epoch": 1},
        monitor__step_every=2,
        monitor__pictures_every=5,
    )
    folder, _ = train(settings, listeners=lambda f: [TensorBoard(f.root)])
    return folder


def test_a_run_says_what_its_metrics_say(run: RunFolder) -> None:
    told = [json.loads(text) for text in run.metrics_file.read_text().splitlines()]
    for key, suffix in (("monitor", ""), ("monitor_average", "-average")):
        for split in ("train", "validation"):
            for kind, number in (("robust", 1), ("clean", 3)):
                for what in ("accuracy", "loss"):
                    expected = [
                        (r["steps"], r[key][split][f"{kind}_{what}"]) for r in told if r[key]
                    ]
                    found = curve(run.root / (split + suffix), f"{number}-{kind}/{what}")
                    assert [s for s, _ in found] == [s for s, _ in expected]
                    assert [v for _, v in found] == pytest.approx([v for _, v in expected])
    last = told[-1]["monitor_average"]
    gap = last["train"]["robust_accuracy"] - last["validation"]["robust_accuracy"]
    assert curve(run.root / "average", GAP)[-1][1] == pytest.approx(gap)
    losses = curve(run.root, "5-optimisation/epoch_loss")
    assert [v for _, v in losses] == pytest.approx([r["train_loss"] for r in told])
    assert told[-1]["best_minus_last"] == pytest.approx(
        max(r["monitor_average"]["validation"]["robust_accuracy"] if r["monitor_average"] else
            r["monitor"]["validation"]["robust_accuracy"] for r in told)
        - last["validation"]["robust_accuracy"]
    )  # fmt: skip


def test_best_minus_last_is_what_was_lost_since_the_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter((0.25, 0.75, 0.5))
    monkeypatch.setattr(Monitor, "__call__", lambda *_: monitored(0.875, next(accuracies)))
    folder, _ = train(config(tmp_path, train__epochs=3), listeners=lambda f: [TensorBoard(f.root)])
    lost = [v for _, v in curve(folder.root, "1-robust/overfitting_best_minus_last")]
    assert lost == [0.0, 0.0, 0.25]
    assert [v for _, v in curve(folder.root, GAP)] == [0.625, 0.125, 0.375]


def test_a_run_shows_its_double_perturbation(run: RunFolder) -> None:
    steps = [1, 3, 5, 7]  # every second of 2 epochs of 4 steps, counted from 1
    for tag in ("1-robust/increase_under_weights", "4-attack/share_broken", "5-optimisation/lr"):
        assert [at for at, _ in curve(run.root, tag)] == steps
    # Successive perturbations: the first step has none before it.
    assert [at for at, _ in curve(run.root, "2-weights/cosine_of_successive")] == steps[1:]
    centre, worst = (
        np.array([v for _, v in curve(run.root, f"2-weights/loss_at_{where}")])
        for where in ("centre", "perturbed")
    )
    rise = [v for _, v in curve(run.root, "1-robust/increase_under_weights")]
    assert rise == pytest.approx(list(worst - centre), abs=1e-5)
    assert all(v > 0 for v in rise)  # AWP ascends
    layers = [tag for tag in read(run.root).Tags()["scalars"] if tag.startswith("9-layers/")]
    assert layers
    for tag in layers:  # gamma
        assert [v for _, v in curve(run.root, tag)] == pytest.approx([0.02] * 4, rel=1e-4)
    assert [v for _, v in curve(run.root, "5-optimisation/radius")] == pytest.approx([0.02] * 4)
    assert [v for _, v in curve(run.root, "5-optimisation/eps")] == pytest.approx([0.1] * 4)
    assert {at for at, _ in curve(run.root, "4-attack/loss_at_step_2")} == set(steps)


def test_a_run_has_pictures_text_settings_and_a_layout(run: RunFolder) -> None:
    events = read(run.root)
    pictures = events.Tags()["images"]
    assert pictures == [f"7-pictures/{name}" for name in ("1-examples", "2-confusion", "3-line")]
    # The alphabet shows the robust curves first, above the pictures.
    assert min([*events.Tags()["scalars"], *pictures]).startswith("1-robust/")
    scalars = {
        tag for part in ("", "validation") for tag in read(run.root / part).Tags()["scalars"]
    }
    assert sorted(scalars)[:3] == [
        f"1-robust/{name}" for name in ("accuracy", "accuracy_gap", "increase_under_weights")
    ]
    assert [image.step for image in events.Images(pictures[0])] == [8]  # the last epoch
    config_text, environment = (
        events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("configuration", "environment")
    )
    assert run.config_file.read_text().strip() in config_text
    assert '"versions"' in environment
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    shown = {c.title: list(c.multiline.tag) for c in layout.category[0].chart}
    assert shown["Robust accuracy"] == [ACCURACY + "$"]
    assert shown["Robust gap, train - validation"] == [GAP]
    assert list(shown).index("Robust gap, train - validation") == 1
    assert list(shown.values())[2] == ["1-robust/increase_under_weights"]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    said = data.session_start_info.hparams
    assert said["1-method"].string_value == "AT + awp(gamma=0.02)"
    assert said["2-radius"].number_value == 0.02
    assert said["2-attack.eps"].number_value == 0.1
    assert said["3-weights.gamma"].number_value == 0.02
    assert said["3-weights.name"].string_value == "awp"
    assert said["3-data.train_samples"].number_value == 60
    # The five columns that are shown at first.
    first = ["1-method", "2-attack.eps", "2-optimizer.lr", "2-radius", "2-seed"]
    assert sorted(said)[:5] == first
    assert data.session_start_info.group_name == "told"
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    # Each of them is a curve of the run or of one of its splits, or comes with an attack.
    for metric in metrics:
        assert curve(run.root / metric.name.group, metric.name.tag)
    assert [(m.display_name, m.name.group, m.name.tag) for m in metrics[:3]] == [
        ("robust accuracy", "", "9-outcome/robust_accuracy"),
        ("robust gap", "", "9-outcome/accuracy_gap"),
        ("best - last", "", "1-robust/overfitting_best_minus_last"),
    ]


def pictures() -> Pictures:
    x = torch.full((4, 1, 2, 2), 0.5)
    axis = [-1.0, 0.0, 1.0]
    return Pictures(
        split="validation",
        classes=("cat", "dog", "owl"),
        x=x,
        x_adv=x + torch.tensor([0.1, -0.2, 0.0, 0.1]).view(4, 1, 1, 1),
        y=torch.tensor([0, 1, 2, 0]),
        clean=torch.tensor([0, 1, 2, 0]),
        attacked=torch.tensor([2, 1, 2, 0]),
        line=Landscape(
            axes=(axis,),
            names=("d",),
            losses={
                "clean": np.array([[3.0, 1.0, 2.0]]),
                "robust_fixed": np.array([[5.0, 4.0, 6.0]]),
            },
            accuracies={},
            measured=3,
        ),
    )


def test_pictures_are_of_held_out_images_as_the_model_sees_them() -> None:
    # Of two classes; 4 x - 2 is the logit of the second: x > 0.5.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).train()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [4.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -2.0]))
    held_out = torch.tensor([0.9, 0.6, 0.45, 0.1]).view(4, 1, 1, 1), torch.tensor([1, 1, 0, 1])
    trained_on = torch.tensor([0.2, 0.3, 0.8]).view(3, 1, 1, 1), torch.tensor([0, 0, 1])
    attack = rf.pgd("linf", 0.2, 2, start="zero")

    def taken(splits: dict[str, Any]) -> Pictures:
        names = ("low", "high")
        return take(model, splits, names, attack, torch.device("cpu"), seed=0, batch_size=3)

    found = taken({"train": trained_on, "validation": held_out})
    assert found.split == "validation"
    order = [held_out[0].flatten().tolist().index(v) for v in found.x.flatten().tolist()]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(found.y, held_out[1][order])
    away = torch.where(found.y == 1, -0.2, 0.2).view(4, 1, 1, 1)
    assert torch.allclose(found.x_adv, (found.x + away).clamp(0, 1))
    assert torch.equal(found.clean, (found.x.flatten() > 0.5).long())
    assert torch.equal(found.attacked, (found.x_adv.flatten() > 0.5).long())
    assert int((found.clean != found.attacked).sum()) == 2
    assert model.training
    # The line is on training images.
    centre = found.line.losses["clean"][0][5]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(trained_on[0]), trained_on[1])
    assert centre == pytest.approx(float(expected))
    assert taken({"train": trained_on}).split == "train"


def test_coloured_images_stand_upright() -> None:
    x = torch.rand(1, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    shown = replace(pictures(), x=x, x_adv=x, y=torch.tensor([0]), clean=torch.tensor([0]),
                    attacked=torch.tensor([0]))  # fmt: skip
    (grid,) = examples(shown).axes
    assert np.allclose(grid.images[0].get_array(), x[0].permute(1, 2, 0))


def test_pictures_show_the_numbers_they_are_made_of() -> None:
    shown = pictures()
    assert shown.confusion().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    axes = confusion(shown).axes[0]
    texts = {(t.get_position(), t.get_text()) for t in axes.texts}
    # x is what it is taken for, y what it is.
    assert ((2, 0), "1") in texts
    assert ((0, 2), "1") not in texts
    assert axes.images[0].get_array()[0].tolist() == [0.5, 0.0, 0.5]
    (grid,) = examples(shown).axes
    # Over each image what it is taken for, at its column and above its row; y grows downwards.
    said = {(t.get_position()[0], round(t.get_position()[1] + 0.45)): t for t in grid.texts}
    assert [said[i, 0].get_text() for i in range(4)] == ["cat", "dog", "owl", "cat"]
    assert [said[i, 1].get_text() for i in range(4)] == ["✗ owl", "dog", "owl", "cat"]
    assert len(said) == 8
    assert said[0, 1].get_color() != said[1, 1].get_color()
    assert [t.get_text().partition("\n")[0] for t in grid.get_yticklabels()] == [
        "clean", "attacked", "difference",
    ]  # fmt: skip
    assert "±0.2)" in grid.get_yticklabels()[2].get_text()
    places = {(i, k): grid.images[4 * k + i] for k in range(3) for i in range(4)}
    for (i, k), image in places.items():
        left, right, low, high = image.get_extent()
        assert (left + right) / 2 == pytest.approx(i)
        assert (low + high) / 2 == pytest.approx(k)
        assert high < low  # upright where y grows downwards
    assert grid.get_ylim()[0] > grid.get_ylim()[1]
    pixel = {place: float(image.get_array()[0, 0]) for place, image in places.items()}
    assert [pixel[i, 0] for i in range(4)] == [0.5] * 4
    assert [pixel[i, 1] for i in range(4)] == pytest.approx([0.6, 0.3, 0.5, 0.6])
    assert [pixel[i, 2] for i in range(4)] == pytest.approx([0.75, 0.0, 0.5, 0.75])
    curves = {c.get_label(): list(c.get_ydata()) for c in line(shown).axes[0].lines[:2]}
    assert curves == {"clean": [3.0, 1.0, 2.0], "attacked at the centre": [5.0, 4.0, 6.0]}


def test_each_epoch_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    # A run killed later must not lose the curves of epochs that its checkpoint holds.
    seen: list[int] = []

    class Look(Listener):
        def __init__(self, folder: RunFolder) -> None:
            self.folder = folder

        def on_step(self, epoch: int, step: int, values: Any) -> None:
            if step == 0:
                events = read(self.folder.root)
                tags = events.Tags()["scalars"]
                found = "5-optimisation/skipped_steps"
                seen.append(len(events.Scalars(found)) if found in tags else 0)

    settings = config(tmp_path, train__epochs=3)
    train(settings, listeners=lambda f: [TensorBoard(f.root), Look(f)])
    assert seen == [0, 1, 2]


def test_overwriting_takes_the_files_of_all_splits(run: RunFolder) -> None:
    assert len(run.event_files()) == 6
    (run.root / "train" / "mine.txt").write_text("mine")
    run._clear()
    assert run.event_files() == []
    assert [p.name for p in run.root.iterdir()] == ["train"]
    assert (run.root / "train" / "mine.txt").is_file()
