"""The compiled attack: as eager, weights shared and frozen, compiled once for each shape."""

from __future__ import annotations

import copy
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.parallel import DistributedDataParallel
from train_support import config, same_run, saved, stopped, trained

import robustflat as rf
from robustflat import models
from robustflat.errors import UserError
from robustflat.perturb.compiled import Compiled, check_compiled, check_compiler
from robustflat.runs.description import describe
from robustflat.train.folder import RunFolder
from robustflat.train.step import Autocast, TrainStep

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile's own backend needs a C++ compiler, and there is none",
)


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    """Nothing compiled by another test is used, and the counts begin at zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How much was compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def network(kind: str = "small_cnn", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = options or {"width": 4, "depth": 2}
    with torch.no_grad():
        made = models.build(
            kind,
            num_classes=3,
            in_channels=1,
            mean=(0.5,),
            std=(0.25,),
            image_size=(8, 8),
            options=options,
        ).train()
        made(torch.rand(16, 1, 8, 8))  # running statistics that are not those of the batch
    return made


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(rows, 1, 8, 8, generator=g), torch.randint(0, 3, (rows,), generator=g)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def traced(model: nn.Module) -> Compiled:
    """Compiled by all of torch.compile but the last stage, which needs a compiler and seconds."""
    return Compiled(model, backend="aot_eager")


def gradient(model: nn.Module) -> Tensor:
    x, y = batch()
    x.requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_the_gradient_is_that_of_the_weights_as_they_are(mode: Any) -> None:
    # After every kind of change in place that training makes, and without compiling anew.
    model = network()
    compiled, x_y = traced(model), batch()
    attack = rf.pgd("l2", 0.5, 2, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    compiled_once = []

    def agrees() -> None:
        ours = attack(compiled, *x_y, generator=seed())
        theirs = attack(model, *x_y, generator=seed())
        assert (ours - theirs).abs().max() < 1e-6
        seen.append(ours)
        compiled_once.append(graphs())

    seen: list[Tensor] = []
    agrees()
    loss = lambda: F.cross_entropy(model(x_y[0]), x_y[1])  # noqa: E731
    with rf.awp(0.3).perturbed(loss, model):
        agrees()
    agrees()
    assert torch.equal(seen[0], seen[2])
    loss().backward()  # also moves BatchNorm's running statistics
    optimizer.step()
    agrees()
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    agrees()
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    assert compiled_once == [1] * 5


def test_running_statistics_are_seen_and_not_moved() -> None:
    model = network()
    compiled = traced(model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    first = rf.pgd("l2", 0.5, 1)(compiled, *batch(), generator=seed())
    rf.pgd("l2", 0.5, 1, mode="batch")(compiled, *batch(), generator=seed())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.add_(1.0)
    second = rf.pgd("l2", 0.5, 1)(compiled, *batch(), generator=seed())
    assert not torch.equal(first, second)
    assert graphs() == 2


def test_the_weights_are_frozen_while_a_pass_is_recorded_and_never_after() -> None:
    model = network()
    still = next(model.parameters()).requires_grad_(False)
    seen: list[bool] = []
    model.register_forward_pre_hook(
        lambda *_: seen.extend(p.requires_grad for p in model.parameters())
    )
    compiled = Compiled(model, backend="eager")
    gradient(compiled)
    assert seen
    assert not any(seen)
    assert [p for p in model.parameters() if not p.requires_grad] == [still]
    assert all(p.grad is None for p in model.parameters())


def test_the_compiled_backward_computes_no_gradient_of_weights() -> None:
    asked: list[list[bool]] = []  # by each convolution: of its input, weight and bias

    def look(graph: Any, inputs: Any) -> Any:
        asked.extend(n.args[-1] for n in graph.graph.nodes if "convolution_backward" in n.name)
        return make_boxed_func(graph.forward)

    gradient(Compiled(network(), backend=aot_autograd(fw_compiler=look, bw_compiler=look)))
    assert asked == [[True, False, False]] * 2


def test_one_compilation_for_each_shape_and_none_for_a_shape_seen_before() -> None:
    compiled = traced(network())
    attack, counted = rf.pgd("l2", 0.5, 3), []
    for rows in (6, 4, 6, 5, 4, 6):
        attack(compiled, *batch(rows), generator=seed())
        counted.append(graphs())
    assert counted == [1, 2, 2, 3, 3, 3]


def test_many_networks_are_compiled_in_one_process() -> None:
    # torch allows eight compilations of one function, and then refuses.
    for _ in range(10):
        rf.pgd("l2", 0.5, 1)(Compiled(network(), backend="eager"), *batch())
    assert graphs() == 10


def test_channels_last_is_compiled_once() -> None:
    model = network().to(memory_format=torch.channels_last)
    compiled, (x, y) = traced(model), batch()
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        ours = rf.pgd("l2", 0.5, 3)(compiled, x, y, generator=seed())
        assert (ours - rf.pgd("l2", 0.5, 3)(model, x, y, generator=seed())).abs().max() < 1e-6
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model = network()
    compiled = traced(model)
    plain, half = gradient(Autocast(model, None)), gradient(Autocast(model, dtype))
    ours = gradient(Autocast(compiled, dtype))
    assert (ours - half).norm() < 0.2 * (half - plain).norm()
    with torch.no_grad():  # no cast of the weights is kept beyond a pass
        for p in model.parameters():
            p.mul_(1.5)
    moved = gradient(Autocast(compiled, dtype))
    assert (moved - gradient(Autocast(model, dtype))).norm() < 0.01 * (moved - ours).norm()
    assert graphs() == 1


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("weights", [rf.awp(0.1), rf.no_perturbation()], ids=["awp", "none"])
def test_a_trajectory_is_the_eager_one(weights: Any, loss: Any) -> None:
    ends = []
    for wrap in (None, traced):
        model = network().double()
        step = TrainStep(
            attack=rf.pgd("l2", 0.5, 3, start="normal", loss=loss, mode="batch"),
            objective=rf.trades(6.0) if loss == "kl" else rf.adversarial(),
            optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
            attacked=wrap(model) if wrap else None,
        )
        x, y = batch()
        for _ in range(4):
            step(model, [(x.double(), y)], weights, seed())
        ends.append(copy.deepcopy(model.state_dict()))
    assert graphs() in (1, 2)  # "kl" also looks at the clean images, without gradient
    for name, end in ends[0].items():
        assert torch.allclose(end, ends[1][name], rtol=1e-9, atol=1e-12), name


def test_beside_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    ends = []
    try:
        for wrap in (None, traced):
            model = network().double()
            step = TrainStep(
                attack=rf.pgd("l2", 0.5, 2),
                objective=rf.adversarial(),
                optimizer=torch.optim.SGD(model.parameters(), 0.1),
                attacked=wrap(model) if wrap else None,
            )
            around = DistributedDataParallel(model)
            x, y = batch()
            for _ in range(2):
                step(around, [(x.double(), y)], rf.awp(0.1), seed())
            ends.append(copy.deepcopy(model.state_dict()))
            del around
    finally:
        torch.distributed.destroy_process_group()
    assert graphs() == 1
    assert all(torch.allclose(end, ends[1][name], rtol=1e-9) for name, end in ends[0].items())


def test_what_cannot_be_compiled_is_said_and_leaves_the_weights_free() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * (2 if self.scale.item() > 0 else 1)

    model = Asks()
    with pytest.raises(UserError, match=r"cannot compile this model as a whole: \w.*Leave"):
        traced(model)(torch.ones(1, 1, 8, 8))
    assert model.scale.requires_grad


class Unrecorded(nn.Module):
    """What a pass does hangs on a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.bn = nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(1))[:, :10] * (2 if self.scale.item() > 0 else 1)


@needs_compiler
@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_a_run_of_what_cannot_be_compiled_is_refused_before_anything_is_written(
    tmp_path: Path, mode: str
) -> None:
    said = {
        "model": {"name": f"{__name__}:Unrecorded"},
        "weights": {"name": "none"},
        "train__compile": "attack",
        "attack": {"name": "pgd", "eps": 0.1, "steps": 1, "mode": mode},
    }
    with pytest.raises(UserError, match="cannot compile this model as a whole"):
        trained(tmp_path, **said)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="cannot compile this model as a whole"):
        describe(config(tmp_path, **said))


def test_trying_a_model_leaves_it_as_it_is() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    check_compiled(model, (1, 8, 8), torch.device("cpu"), "batch")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert graphs() == 1


@needs_compiler
def test_a_whole_run_is_the_eager_one_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    # float32 and all stages of torch.compile: sums are taken in another order, and no more.
    asked: dict[str, Any] = {
        "attack": {"name": "pgd", "eps": 0.1, "norm": "l2", "steps": 2},
        "train__epochs": 2,
        "train__batch_size": 20,
        "monitor": {"every": 0},
    }
    eager = trained(tmp_path / "eager", **asked)
    whole = trained(tmp_path / "whole", **asked, train__compile="attack")
    for name, weight in saved(eager.last)["model"].items():
        assert torch.allclose(weight, saved(whole.last)["model"][name], rtol=1e-4, atol=1e-6), name
    assert graphs() == 3  # the trials of compiler and network, and the network
    half = config(tmp_path / "half", **asked, train__compile="attack")
    folder = RunFolder(tmp_path / "half" / "run")
    folder.prepare(half, resume=False, machines=[])
    stopped(half, folder, after=3)
    torch._dynamo.reset()  # as another process would have to
    resumed = trained(tmp_path / "half", resume=True, **asked, train__compile="attack")
    same_run(whole, resumed)


def test_nothing_is_compiled_unless_asked_and_nothing_that_is_not_attacked() -> None:
    assert config().train.compile is None
    with pytest.raises(
        UserError, match=r"train\.compile makes .* trains on the images as they are"
    ):
        config(objective={"name": "standard"}, train__compile="attack")
    with pytest.raises(
        UserError, match=r"train\.compile takes passes as a whole, and train\.sync_batchnorm"
    ):
        config(train__compile="attack", train__sync_batchnorm=True)
    for wrong in (True, "all"):
        with pytest.raises(UserError, match=r"train\.compile.*'attack'"):
            config(train__compile=wrong)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Tensor] = []

    def lazy(function: Any, **_: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            tried.append(x)
            raise RuntimeError("\nFailed to find C++ compiler.\n\nmore")

        return run

    monkeypatch.setattr(torch, "compile", lazy)
    with pytest.raises(UserError, match=r"not work on meta: Failed to find C\+\+ compiler\. It"):
        check_compiler(torch.device("meta"))
    assert [x.device.type for x in tried] == ["meta"]


def test_the_step_attacks_in_its_precision() -> None:
    seen: list[torch.dtype] = []

    class Attacked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            )
            return x.flatten(1)[:, :3]

    model = network()
    step = TrainStep(
        attack=rf.pgd(steps=1),
        objective=rf.adversarial(),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        precision=torch.bfloat16,
        attacked=Attacked(),
    )
    step(model, [batch()], rf.no_perturbation(), seed())
    assert seen == [torch.bfloat16]
