"""The logic around CUDA graphs, with a recorder that treats memory as they do; see test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images
from torch import Tensor, nn
from train_support import config

import robustflat as rf
from robustflat.errors import UserError
from robustflat.perturb.modes import attack_mode
from robustflat.train.graphed import Graphed
from robustflat.train.setup import build_step
from robustflat.train.step import Autocast

Pass = Callable[[Tensor], Tensor]


class Recorder:
    """As CUDA graphs: frozen weights while recording, one memory for all that comes out."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.thawed = model, 0
        self.samples: list[Tensor] = []

    def __call__(self, function: Pass, x: Tensor) -> Pass:
        self.thawed += sum(p.requires_grad for p in self.model.parameters())
        self.samples.append(x)
        held, into, out = torch.empty_like(x), torch.empty_like(x), torch.empty(0)

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, images: Tensor) -> Tensor:
                nonlocal out
                logits = function(held.copy_(images.detach()))
                out = out.copy_(logits) if out.numel() else logits.clone()
                return out.detach()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                with torch.enable_grad():
                    again = held.clone().requires_grad_()
                    (found,) = torch.autograd.grad(function(again), again, grads[0])
                return into.copy_(found).detach()

        return lambda images: Replay.apply(images)  # type: ignore[no-any-return]


def graphed() -> tuple[nn.Module, Graphed, Recorder]:
    model = conv_bn().train()
    recorder = Recorder(model)
    return model, Graphed(model, recorder), recorder


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y), x)[0]


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_attacks_are_the_eager_ones_wherever_the_weights_stand(mode: Any) -> None:
    model, ours, recorder = graphed()
    attack, (x, y) = rf.pgd("l2", 0.5, 3, mode=mode, loss="kl", start="normal"), images(6)

    def agree() -> Tensor:
        found = [attack(m, x, y, generator=torch.Generator().manual_seed(1)) for m in (model, ours)]
        assert torch.equal(*found)
        return found[0]

    first = agree()
    with rf.awp(0.5).perturbed(lambda: F.cross_entropy(model(x), y), model):
        assert not torch.equal(agree(), first)
    assert torch.equal(agree(), first)
    assert len(recorder.samples) == 1
    assert recorder.thawed == 0
    assert all(p.requires_grad for p in model.parameters())


def test_what_it_returns_outlives_the_next_pass() -> None:
    model, ours, _ = graphed()
    x, y = images(6)
    kept = gradient(ours, x, y)
    gradient(ours, 1 - x, y)
    for got, expected in zip(kept, gradient(model, x, y), strict=True):
        assert torch.equal(got, expected)


def test_what_cannot_share_a_graph_has_its_own() -> None:
    model, ours, recorder = graphed()
    x, y = images(6)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    counted = []
    for shown, mode in ((x, "eval"), (x[:4], "eval"), (turned, "eval"), (x, "batch"), (x, "eval")):
        with attack_mode(model, mode):  # type: ignore[arg-type]
            gradient(ours, shown, y[: len(shown)])
        counted.append(len(recorder.samples))
    for module in model.modules():  # as in mode "batch", but the running statistics move
        module.train(isinstance(module, nn.BatchNorm2d))
    gradient(ours, x, y)
    counted.append(len(recorder.samples))
    assert counted == [1, 2, 3, 4, 4, 5]
    model.float()
    for dtype in (None, torch.bfloat16, torch.float16, None):
        gradient(Autocast(ours, dtype), x.float(), y)
        counted.append(len(recorder.samples))
    assert counted[6:] == [6, 7, 8, 8]


def test_weights_in_another_place_are_recorded_anew() -> None:
    model, ours, recorder = graphed()
    x, y = images(6)
    gradient(ours, x, y)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # in place
    gradient(ours, x, y)
    assert len(recorder.samples) == 1
    next(model.parameters()).data = next(model.parameters()).data.clone()
    gradient(ours, x, y)
    assert len(recorder.samples) == 2
    next(model.buffers()).data = next(model.buffers()).data.clone()
    gradient(ours, x, y)
    assert len(recorder.samples) == 3


def test_passes_without_a_gradient_of_the_images_are_the_models_own() -> None:
    model, ours, recorder = graphed()
    x, _ = images(6)
    with torch.no_grad():
        assert torch.equal(ours(x.requires_grad_()), model(x))
    assert ours(x.detach()).requires_grad  # of the weights
    assert not recorder.samples


def test_passes_that_overlap_are_refused() -> None:
    _, ours, _ = graphed()
    x, y = images(6)
    x = x.requires_grad_()
    first, second = ours(x), ours(x + 1)
    torch.autograd.grad(F.cross_entropy(second, y), x, retain_graph=True)
    with pytest.raises(UserError, match="before it has taken the gradient of the last"):
        torch.autograd.grad(F.cross_entropy(first, y), x)


def test_what_cannot_be_recorded_is_said() -> None:
    def fails(*_: Any) -> Pass:
        raise RuntimeError("\nCUDA error: operation not permitted\nmore")

    ours = Graphed(conv_bn(), fails)
    x, y = images(2)
    with pytest.raises(UserError, match=r"recorded: CUDA error: operation not permitted\. A"):
        gradient(ours, x, y)
    assert all(p.requires_grad for p in ours.parameters())

    def silent(*_: Any) -> Pass:
        raise RuntimeError

    with pytest.raises(UserError, match=r"recorded: RuntimeError\. A"):
        gradient(Graphed(conv_bn(), silent), x, y)


def test_the_setting_is_checked() -> None:
    settings = config(train__cuda_graphs=True)
    with pytest.raises(UserError, match=r"cuda_graphs is true, but device is cpu.*Leave"):
        build_step(settings, conv_bn(), torch.device("cpu"), (1, 8, 8))
    step = build_step(settings, conv_bn(), torch.device("cuda"), (1, 8, 8))
    assert isinstance(step.attacked, Graphed)
    for said, sentence in (
        ({"objective": {"name": "standard"}}, "trains on the images as they are"),
        ({"train__compile": "attack"}, "two ways to make the same passes faster"),
        ({"train__sync_batchnorm": True}, "lets processes talk within one"),
    ):
        with pytest.raises(UserError, match=f"train\\.cuda_graphs.*{sentence}"):
            config(train__cuda_graphs=True, **said)
