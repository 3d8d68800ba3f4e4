"""On a GPU, what the CPU does: `make test-gpu` runs these, and nothing else needs one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference.nets import conv_bn, images
from test_meta import closure
from test_weights import methods
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import robustflat as rf
from robustflat import models, numerics
from robustflat.errors import UserError
from robustflat.perturb.compiled import Compiled
from robustflat.train.averaging import Average, ema
from robustflat.train.graphed import Graphed
from robustflat.train.step import Autocast, TrainStep

# A machine with a GPU may have little else: what only some tests need, they import themselves.
# With ROBUSTFLAT_GPU=cpu the tests that can run on the CPU do: it keeps this file honest.
NAME = os.environ.get("ROBUSTFLAT_GPU", "cuda")
DEVICE = torch.device(NAME)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        NAME == "cuda" and not torch.cuda.is_available(),
        reason="There is no GPU here; on a machine that has one, run `make test-gpu`.",
    ),
]
needs_cuda = pytest.mark.skipif(
    NAME != "cuda", reason="CUDA alone tells: set no ROBUSTFLAT_GPU, on a machine with a GPU."
)
# Relative difference of the weights' change over three steps from float32 on the CPU.
TOLERANCE = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 2e-1, "fp16": 5e-2}
# A sign flips where a gradient is nearly 0.
SIGNS, SIGNS_TOLERANCE = ("sam_linf",), 0.2
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Their random numbers are drawn where the weights are, so they are others on a GPU.
RANDOM = ("random", "random_row", "custom")


def network() -> nn.Module:
    """With matrices large enough for tensor cores."""
    torch.manual_seed(0)
    return models.build(
        "small_cnn",
        num_classes=10,
        in_channels=3,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        options={"width": 16, "depth": 2},
    ).train()


def follow(
    weights: Any, device: torch.device, precision: str, *, compiled: bool = False, parts: int = 1
) -> Tensor:
    """How far three steps move the weights; each takes its batch in so many parts."""
    model = network().to(device)
    before = [p.detach().clone() for p in model.parameters()]
    half = precision == "fp16"
    step = TrainStep(
        # An l2 attack has no signs, which flip where a gradient is nearly 0.
        attack=rf.pgd("l2", 0.5, 2, start="zero"),
        objective=rf.adversarial(),
        optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        precision=DTYPES[precision],
        scaler=torch.amp.GradScaler(device.type, init_scale=256.0) if half else None,
        attacked=Compiled(model) if compiled else None,
        accumulate=parts,
    )
    drawn = torch.Generator().manual_seed(1)
    for _ in range(3):
        batches = []
        for _ in range(getattr(weights, "batches", 1)):
            x = torch.rand(16, 3, 16, 16, generator=drawn)
            y = torch.randint(10, (16,), generator=drawn)
            batches.append((x.to(device), y.to(device)))
        with numerics.float32(tf32=precision == "tf32"):
            step(model, batches, weights)
    moved = [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    return torch.cat(moved).cpu()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("method", [m for m in methods() if m not in RANDOM])
def test_steps_are_those_of_the_cpu(method: str, precision: str) -> None:
    weights = methods()[method]
    expected = follow(weights, torch.device("cpu"), "fp32")
    got = follow(weights, DEVICE, precision)
    assert got.isfinite().all()
    allowed = SIGNS_TOLERANCE if method in SIGNS else TOLERANCE[precision]
    assert float((got - expected).norm() / expected.norm()) < allowed


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("said", [{"compiled": True}, {"parts": 4}], ids=["compiled", "in parts"])
def test_compiled_and_accumulated_steps_are_those_of_the_cpu(
    said: dict[str, Any], precision: str
) -> None:
    weights = rf.awp(0.05)
    expected = follow(weights, torch.device("cpu"), "fp32", parts=said.get("parts", 1))
    got = follow(weights, DEVICE, precision, **said)
    assert float((got - expected).norm() / expected.norm()) < TOLERANCE[precision]


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_take_a_step(method: str) -> None:
    assert follow(methods()[method], DEVICE, "fp32").isfinite().all()


def test_autoattack_and_flatness_find_what_the_cpu_finds() -> None:
    pytest.importorskip("pyautoattack")
    model = conv_bn(dtype=torch.float32).eval()
    x, y = images(32, dtype=torch.float32)
    with torch.no_grad():
        y = model(x).argmax(1)  # all right, so that there is something to attack
    found: dict[str, Any] = {}
    for device in ("cpu", NAME):
        there = deepcopy(model).to(device)
        result = rf.evaluate(there, (x, y), attacks=["autoattack:fast"], norm="linf", eps=0.03)
        figures = rf.flatness(
            there, (x.to(device), y.to(device)), measures=["hessian_max", "ascent_robust"]
        )
        found[device] = (result.robust_accuracy, {k: f.value for k, f in figures.items()})
    assert found[NAME][0] == found["cpu"][0]
    assert found[NAME][1] == pytest.approx(found["cpu"][1], rel=1e-3)


@pytest.fixture
def strict() -> Iterator[None]:
    """Every wait for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("method", methods())
def test_nothing_inside_a_step_waits_for_the_gpu(
    method: str, request: pytest.FixtureRequest
) -> None:
    model = conv_bn(dtype=torch.float32).to(DEVICE)
    x, y = (t.to(DEVICE) for t in images(4, dtype=torch.float32))
    weights, attack = methods()[method], rf.pgd("linf", 0.1, 2)
    average, generator = Average(ema(), model), torch.Generator(DEVICE)
    for seed in range(2):
        if seed:  # the first step makes what is made once
            request.getfixturevalue("strict")
        attack(model, x, y, generator=generator)
        weights.backward(closure(method, model, x, y), model, rows=4, generator=generator)
        average.after_step(model, 0)


@needs_cuda
@pytest.mark.parametrize("host", [False, True])
def test_feeding_does_not_wait_for_the_gpu(host: bool, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("pydantic")
    from train_support import config

    from robustflat.train import Trainer
    from robustflat.train.setup import load_data

    settings = config(
        device=NAME, data__augment={"crop": 1, "flip": True}, data__mix={"name": "mixup"}
    )
    data = load_data(settings)
    feed = Trainer(settings, data, DEVICE)._feed
    if host:
        feed._images = data.train
    batches = feed.batches(0, 0)
    next(batches)
    request.getfixturevalue("strict")
    next(batches)


@needs_cuda
def test_nccl_with_one_process(tmp_path: Path) -> None:
    torch.cuda.set_device(0)
    place = torch.device("cuda:0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{tmp_path}/meet",
        rank=0,
        world_size=1,
        device_id=place,
    )
    try:
        weights = rf.gsam(0.2, 0.4)
        plain = conv_bn().to(place)
        wrapped = DistributedDataParallel(conv_bn().to(place), device_ids=[0])
        x, y = (t.to(place) for t in images(8))
        weights.backward(lambda: F.cross_entropy(plain(x), y), plain)
        weights.backward(lambda: F.cross_entropy(wrapped(x), y), wrapped)
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    finally:
        dist.destroy_process_group()


@needs_cuda
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_graphs_replay_the_eager_attack_bit_for_bit(mode: Any, precision: str) -> None:
    drawn = torch.Generator(DEVICE).manual_seed(3)
    model = network().to(DEVICE)
    graphed, weights = Graphed(model), rf.awp(0.3)
    attack = rf.pgd("linf", 0.1, 3, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def agree(rows: int) -> Tensor:
        x = torch.rand(rows, 3, 16, 16, device=DEVICE, generator=drawn)
        y = torch.randint(10, (rows,), device=DEVICE, generator=drawn)
        found = [
            attack(Autocast(seen, DTYPES[precision]), x, y, generator=torch.Generator(DEVICE))
            for seen in (model, graphed)
        ]
        assert torch.equal(*found)
        return x

    with numerics.float32(tf32=precision == "tf32"), numerics.deterministic():
        before = torch.cuda.get_rng_state(DEVICE)
        for rows in (16, 6, 16):
            x = agree(rows)
        assert torch.equal(torch.cuda.get_rng_state(DEVICE), before)
        loss = lambda: F.cross_entropy(model(x), x.new_zeros(16, dtype=torch.long))  # noqa: E731
        with weights.perturbed(loss, model):
            agree(16)
        loss().backward()
        optimizer.step()
        agree(16)
        recorded = dict(graphed._passes)
        assert len(recorded) == 2
        for p in model.parameters():
            p.data = p.data * 2
        agree(16)
    assert all(graphed._passes[key] is not recorded[key] for key in graphed._passes)
    assert all(p.requires_grad for p in model.parameters())


@needs_cuda
def test_a_pass_that_waits_for_the_gpu_is_refused_with_a_sentence() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * x.sum().item()

    x, y = torch.rand(4, 3, 4, 4, device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)
    with pytest.raises(UserError, match=r"train\.cuda_graphs is true, but .* Leave"):
        rf.pgd(steps=1)(Graphed(Waits()), x, y)


FASTER: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"train__compile": "attack"},
    "graphs": {"train__cuda_graphs": True},
}


@pytest.mark.parametrize("faster", FASTER)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, precision: str, faster: str) -> None:
    if faster == "graphs" and NAME != "cuda":
        pytest.skip("CUDA graphs need CUDA.")
    pytest.importorskip("pydantic")
    from test_resume import stopped
    from train_support import SMALL_CNN, same_run, trained

    said: dict[str, Any] = {
        "device": NAME,
        "model": SMALL_CNN,
        "data__augment": {"crop": 1},
        "train__deterministic": True,
        "train__precision": precision,
        "train__epochs": 3,
    }
    plain, said = said, said | FASTER[faster]
    one = trained(tmp_path / "one", **said)
    if faster == "graphs":
        same_run(one, trained(tmp_path / "eager", **plain))
    stopped(tmp_path / "two", 1, 1, **said)
    same_run(one, trained(tmp_path / "two", resume=True, **said))
