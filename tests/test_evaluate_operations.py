"""Unusual operations: each kind of defence is found, and no ordinary network is suspected."""

from __future__ import annotations

import copy

import pytest
import torch
from evaluate_support import held_out, linear, trained
from torch import nn

from robustflat import models
from robustflat.evaluate import operations
from robustflat.evaluate.frozen import Plain, held


class Steps(torch.autograd.Function):
    """Eight levels, with the gradient of the identity: a straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


class Bytes(torch.autograd.Function):
    """The 256 levels of image files, likewise: attacks succeed there."""

    @staticmethod
    def forward(ctx, x):
        return (255 * x).round() / 255

    @staticmethod
    def backward(ctx, g):
        return g


class Swish(torch.autograd.Function):
    """x sigmoid(x), with its own right gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def before(function):
    """The trained network behind a function of the image."""
    return nn.Sequential(Layer(function), trained()).eval()


def inside(layer):
    """The trained network with another activation after its first convolution."""
    net = copy.deepcopy(trained())
    net[2] = layer
    return net.eval()


def strongest(x):
    """The tenth of the activations that are largest, as in k-winners-take-all."""
    least = x.flatten(1).topk(x[0].numel() // 10, 1).values[:, -1]
    return x * (x >= least.view(-1, 1, 1, 1))


def found(model, x=None, **kwargs):
    with held(model):
        return operations.of_operations(Plain(model), held_out(9)[0] if x is None else x, **kwargs)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: before(lambda x: (x > 0.5).float()), ["(gt)"]),
        (lambda: before(lambda x: 0.5 * x + 0.5 * (x > 0.5)), ["(gt)"]),
        (lambda: before(lambda x: (8 * x).round() / 8), ["(round)"]),
        (lambda: before(lambda x: (8 * x).to(torch.uint8).float() / 8), ["(_to_copy)"]),
        (lambda: before(Steps.apply), ["by hand (Steps)", "(round)"]),
        (lambda: before(lambda x: x + ((8 * x).round() / 8 - x).detach()), ["(round)"]),
        (lambda: before(lambda x: 0.5 * x + 0.5 * x.detach()), ["The model: its gradient"]),
        (lambda: inside(Layer(torch.sign)), ["(sign)"]),
        (lambda: inside(nn.Threshold(0.1, -1.0)), ["(threshold)"]),
        (lambda: inside(Layer(strongest)), ["(ge)"]),
    ],
    ids=["threshold", "half", "round", "bytes", "straight-through", "detached-round", "detached",
         "sign", "jump", "top-k"],
)  # fmt: skip
def test_defences_whose_gradient_misleads(model, names):
    (sentence,) = found(model())
    for name in names:
        assert name in sentence
    assert "margins unexplained" in sentence


@pytest.mark.parametrize(
    "model",
    [
        trained,
        lambda: trained(12),
        lambda: before(lambda x: x.clamp(0, 1)),
        lambda: before(Swish.apply),
        lambda: before(Bytes.apply),
        lambda: inside(Layer(lambda x: torch.where(x > 0, x, torch.zeros_like(x)))),
        lambda: inside(nn.SiLU()),
        lambda: inside(nn.Threshold(0.0, 0.0)),
        lambda: inside(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1))),
        lambda: inside(nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.RReLU())),
        lambda: linear(10, (1, 8, 8)),
    ],
    ids=["sound", "little", "clamped", "own-gradient", "bytes",
         "comparison", "silu", "threshold-relu",
         "max-pool", "dropout-in-eval", "linear"],
)  # fmt: skip
def test_ordinary_networks_are_not_suspected(model):
    assert found(model()) == []


def test_a_small_vision_transformer_and_residual_networks_are_not_suspected():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 32, 32)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
    vit = nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), Layer(lambda h: h.mT), layer,
        Layer(lambda h: h.mean(1)), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    assert found(vit, x) == []
    for name in ("wrn-10-1", "wrn-10-1-silu"):
        statistics = ((0.5,) * 3, (0.25,) * 3)
        model = models.build(name, num_classes=10, in_channels=3, mean=statistics[0],
                             std=statistics[1])  # fmt: skip
        assert found(model.eval(), x) == []


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_networks_of_timm_are_not_suspected(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    assert found(model, torch.rand(4, 3, *model.pretrained_cfg["input_size"][1:])) == []


def test_random_numbers_are_named_even_where_a_seed_hides_them():
    def seeded(x):
        generator = torch.Generator().manual_seed(0)
        return x + 0.1 * torch.empty_like(x).normal_(generator=generator)

    (sentence,) = found(before(seeded))
    assert "draws random numbers while it classifies (normal)" in sentence
    noisy = before(lambda x: x + 0.1 * torch.randn_like(x))
    (sentence,) = found(noisy, random=True)
    assert "gave different outputs (randn_like): for a randomised model" in sentence
    # Of numbers that another library draws only the outputs tell.
    (sentence,) = found(trained(), random=True)
    assert "gave different outputs: for a randomised model" in sentence


def test_what_does_not_reach_the_logits_is_not_named():
    def looks(x):
        assert bool((x >= 0).all())
        torch.rand(3)
        return (8 * x.round()) * 0 + x

    assert found(before(lambda x: looks(x) * 1.0)) == []

    class Counts(nn.Module):
        def forward(self, x):
            self.bright = (x > 0.5).sum()
            return x + (8 * x.detach()).sign().mean() * 0.3 * (x > 0.5)

    (sentence,) = found(nn.Sequential(Counts(), trained()).eval())
    assert "(gt, sign)" in sentence


def test_steps_of_constants_are_not_named():
    def masked(x):
        left = torch.arange(8) < 6
        return ((8 * x).round() / 8) * left

    (sentence,) = found(before(masked))
    assert "choose (round), and" in sentence


def test_checkpointing_is_torchs_own():
    from torch.utils.checkpoint import checkpoint

    net = trained()
    inner = Layer(lambda x: checkpoint(net, x, use_reentrant=True))
    assert not any(
        operations._is_own(node)
        for node in operations._nodes(inner(torch.rand(2, 1, 8, 8, requires_grad=True)).grad_fn)
    )
    applied = Steps.apply(torch.rand(2, requires_grad=True))
    assert any(operations._is_own(node) for node in operations._nodes(applied.grad_fn))


def test_the_check_leaves_nothing_behind():
    model = before(lambda x: (8 * x).round() / 8)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = held_out(3)[0]
    kept, seed = x.clone(), torch.get_rng_state()
    assert found(model, x)
    assert torch.equal(x, kept)
    assert torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
