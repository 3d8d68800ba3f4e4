"""What float32, deterministic and bfloat16 mean while something is computed, and afterwards."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.nets import conv_bn, images
from torch import Tensor, nn
from train_support import SMALL_CNN, config

import robustflat as rf
from robustflat import numerics
from robustflat.train import Trainer
from robustflat.train.setup import load_data

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user who allows TF32 everywhere; and nothing is left behind for other tests."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    assert now() == ("high", True)
    torch.set_float32_matmul_precision("highest")


def now() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


class Spy(nn.Module):
    """A network that notes how its products are computed."""

    def __init__(self, seen: set[tuple[str, bool]]) -> None:
        super().__init__()
        self.net, self.seen = conv_bn(dtype=torch.float32), seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(now())
        logits: Tensor = self.net(x)
        return logits


def test_what_verifies_and_measures_is_full_float32() -> None:
    seen: set[tuple[str, bool]] = set()
    model = Spy(seen).eval()
    x, y = images(8, dtype=torch.float32)
    rf.evaluate(model, (x, y), attacks=["pgd-2"], norm="linf", eps=0.1)
    rf.flatness(model, (x, y), measures=["ascent_clean", "worst_robust"], eps=0.1)
    assert seen == {("highest", False)}


class Watch:
    """A listener that notes the settings of every step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, epochs: int, steps: int, done: int) -> None: ...
    def on_epoch(self, row: dict[str, Any]) -> None: ...
    def on_end(self) -> None: ...

    def on_step(self, epoch: int, step: int, values: Any) -> None:
        self.seen.append(
            (
                now(),
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cudnn.benchmark,
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )


@pytest.mark.parametrize(("exact", "precision"), [(False, "fp32"), (True, "fp32"), (False, "tf32")])
def test_training_is_as_precise_and_deterministic_as_it_says(exact: bool, precision: str) -> None:
    settings = config(
        train__deterministic=exact,
        train__precision=precision,
        train__epochs=1,
        monitor__every=0,
    )
    watch = Watch()
    before = exact  # the other way round than it must be meanwhile
    torch.backends.cudnn.benchmark = before
    trainer = Trainer(settings, load_data(settings), CPU, listeners=[watch])
    try:
        assert trainer.run()
        assert torch.backends.cudnn.benchmark == before
    finally:
        torch.backends.cudnn.benchmark = False
    assert not torch.are_deterministic_algorithms_enabled()
    full = ("high", True) if precision == "tf32" else ("highest", False)
    expected = (full, exact, not exact, ":4096:8" if exact else None)
    assert set(watch.seen) == {expected}


def test_a_workspace_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with numerics.deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_tf32_is_had_by_asking() -> None:
    with numerics.float32():
        with numerics.float32(tf32=True):
            assert now() == ("high", True)
        assert now() == ("highest", False)


def test_channels_last_is_the_layout_of_weights_and_images(tmp_path: Path) -> None:
    settings = config(train__channels_last=True, model=SMALL_CNN)
    trainer = Trainer(settings, load_data(settings), CPU)
    kernels = [p for p in trainer.model.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    x, _ = trainer._feed._finished(torch.rand(4, 3, 8, 8), torch.arange(4), (0, 0, 0))
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_emulated_bf16_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, has: bool, precision: str
) -> None:
    monkeypatch.setattr(numerics, "_cpu_has_bfloat16", lambda: has)
    settings = config(train__precision=precision)
    with caplog.at_level(logging.WARNING):
        Trainer(settings, load_data(settings), CPU)
    warned = "only emulates it" in caplog.text
    assert warned == (precision == "bf16" and not has)
