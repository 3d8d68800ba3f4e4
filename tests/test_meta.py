"""Nothing waits for the device: shown on one without data, and by forbidding it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.nets import conv_bn, images
from test_weights import methods
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import robustflat as rf
from robustflat import data
from robustflat.train.step import TrainStep

OLD = torch.__version__.startswith("2.6.")
ATTACKS = {
    f"{norm}-{start}-{keep}": rf.pgd(norm, 0.1, 2, start=start, keep=keep, mode=mode)  # type: ignore[arg-type]
    for norm, start, keep, mode in [
        ("linf", "uniform", "last", "eval"),
        ("linf", "zero", "best", "batch"),
        ("l2", "uniform", "best", "eval"),
        ("l2", "sphere", "last", "batch"),
        ("l1", "uniform", "last", "eval"),
        ("l1", "normal", "best", "eval"),
    ]
} | {
    "restarts": rf.pgd("linf", 0.1, 2, restarts=3),
    "kl": rf.pgd("linf", 0.1, 2, start="normal", loss="kl"),
    "margin": rf.pgd("l2", 0.1, 2, loss="margin"),
    "dlr": rf.pgd("l2", 0.1, 2, loss="dlr"),
    "fgsm-1.5": rf.fgsm(1.5, 0.1),
}


def closure(method: str, model: Any, x: Any, y: Any) -> Callable[..., Any]:
    if method == "msam":
        return lambda r: F.cross_entropy(model(x[r]), y[r])
    if method == "nsam":
        return lambda i: F.cross_entropy(model(x * (i + 1)), y)
    return lambda: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("statistics", ["perturbed", "both", "centre"])
@pytest.mark.parametrize("method", methods())
def test_weight_methods_run_on_the_meta_device(method: str, statistics: str) -> None:
    model = conv_bn(dtype=torch.float32).to("meta")
    x, y = (t.to("meta") for t in images(4, dtype=torch.float32))
    weights = methods()[method]
    if method == "msam":
        weights = rf.msam(replace(weights.inner, statistics=statistics), 2)
    elif method not in ("none", "random", "random_row", "custom"):
        weights = replace(weights, statistics=statistics)
    value = weights.backward(closure(method, model, x, y), model)
    assert value.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_run_on_the_meta_device(attack: str) -> None:
    if attack == "l1-uniform-last" and OLD:
        pytest.skip("This torch cannot draw a gamma variable on the meta device.")
    model = conv_bn(dtype=torch.float32).to("meta")
    x, y = (t.to("meta") for t in images(4, dtype=torch.float32))
    x_adv = ATTACKS[attack](model, x, y)
    assert x_adv.is_meta
    assert x_adv.shape == x.shape


def test_whole_steps_with_every_objective_run_on_the_meta_device() -> None:
    model = conv_bn(dtype=torch.float32).to("meta")
    x, y = (t.to("meta") for t in images(4, dtype=torch.float32))
    for objective in (rf.standard(), rf.adversarial(label_smoothing=0.1), rf.trades(), rf.mart()):
        attack = rf.pgd("linf", 0.1, 2, start="normal", loss=objective.attack_options["loss"])
        x_adv = attack(model, x, y)
        value = rf.awp().backward(lambda o=objective, a=x_adv: o(model, x, a, y), model)
        assert value.is_meta


class NoSync(TorchDispatchMode):
    """Fails on every operation that hands a tensor's content to Python or to its own shape."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")
    COPIES = ("_to_copy", "copy_")

    def __init__(self, device: str | None = None) -> None:
        """Watch all tensors, or those on ``device`` alone."""
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        devices.add(str((kwargs or {}).get("device")))
        if self.device is not None and self.device not in devices:
            return func(*args, **(kwargs or {}))
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        # So does a copy between devices, unless it is asked not to.
        if name in self.COPIES:
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else (kwargs or {}).get("device")
            if target is not None and torch.device(target).type != source.device.type:
                free = args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False)
                assert free, f"{func} from {source.device} to {target} waits"
        # Indexing with a mask does too.
        if name in ("index", "index_put", "index_put_"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1])
            # And with positions that lie elsewhere: they are copied, and waited for.
            assert all(t is None or t.device == args[0].device for t in args[1])
        return func(*args, **(kwargs or {}))


def test_the_watchdog_barks() -> None:
    t = torch.ones(2)
    meta = t.to("meta")
    for sync in (
        lambda: float(t.sum()),
        lambda: bool(t.sum() > 0),
        lambda: t[t > 0],
        lambda: t.to("meta"),
        lambda: meta.copy_(t),
    ):
        with pytest.raises(AssertionError), NoSync():
            sync()


@pytest.mark.parametrize("method", methods())
def test_weight_methods_never_wait_for_the_device(method: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    weights, loss = methods()[method], closure(method, model, x, y)
    with NoSync():
        weights.backward(loss, model)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_never_wait_for_the_device(attack: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    with NoSync():
        ATTACKS[attack](model, x, y)


@pytest.mark.parametrize("objective", [rf.standard(), rf.adversarial(), rf.trades(), rf.mart()])
def test_objectives_never_wait_for_the_device(objective: Any) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    with NoSync():
        objective(model, x, x * 0.5, y).backward()


def test_scaled_steps_never_wait_for_the_device() -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    with NoSync():
        rf.gsam(0.1, 0.4).backward(lambda: F.cross_entropy(model(x), y), model, scaler=scaler)


@pytest.mark.parametrize("extra", [None, "memory", "host"])
@pytest.mark.parametrize("on_device", [True, False])
def test_batches_are_made_without_waiting_for_the_device(on_device: bool, extra: Any) -> None:
    whole = data.load("digits", train_samples=50)
    images = whole.train.to("meta") if on_device else whole.train
    more = whole.test.to("meta") if extra == "memory" and on_device else whole.test
    batches = data.batches(
        images,
        16,
        device="meta",
        order=1,
        augment=data.Augment(crop=1, flip=True, cutout=2),
        extra=None if extra is None else data.Extra(images=more, fraction=0.5),
    )
    with NoSync("meta"):
        # The order of the epoch goes to the device once, without waiting either.
        found = list(batches)
    assert len(found) == 4
    assert all(x.is_meta and y.is_meta for x, y in found)
    x, y = found[0]
    with NoSync("meta"):
        for mix in (data.mixup, data.cutmix):
            mixed, soft = mix(x, y, alpha=0.5, num_classes=10, generator=data.generator_for(3))
            assert mixed.is_meta
            assert soft.is_meta


@pytest.mark.parametrize("method", methods())
def test_watched_steps_never_wait_for_the_device(method: str) -> None:
    model = conv_bn(dtype=torch.float32)
    x, y = images(4, dtype=torch.float32)
    for device in ("cpu", "meta"):
        watch = rf.Watch()
        model, x, y = model.to(device), x.to(device), y.to(device)
        weights, loss = methods()[method], closure(method, model, x, y)
        for _ in range(2):
            with NoSync(), watch.step():
                rf.pgd("linf", 0.1, 2)(model, x, y)
                weights.backward(loss, model)
                found = watch.values
        assert {t.device.type for t in found.values()} == {device}
        assert {t.shape for t in found.values()} == {torch.Size()}
        assert "attack/loss/2" in found


@pytest.mark.parametrize("objective", [rf.adversarial(), rf.trades(), rf.mart()])
def test_whole_watched_steps_never_wait_for_the_device(objective: Any) -> None:
    model = conv_bn(dtype=torch.float32).train()
    x, y = images(4, dtype=torch.float32)
    step = TrainStep(
        attack=rf.pgd("linf", 0.1, 2),
        objective=objective,
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    )
    watch = rf.Watch()
    step(model, [(x, y)], rf.awp(0.1))  # the optimizer's own buffers are made
    with NoSync(), watch.step():
        step(model, [(x, y)], rf.awp(0.1))
        assert "attack/broken" in watch.values
