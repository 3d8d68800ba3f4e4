"""Two processes that hold parts of the weights (FSDP2) take the step of one that holds them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import WORLD, of_group
from reference.nets import images
from torch import Tensor, nn

import robustflat as rf
from robustflat.perturb import Ascent, Ball, WeightPerturbation
from robustflat.perturb.parts import accumulated

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"),
    reason="FSDP2 of this version of torch needs a GPU",
)
ROWS, STEPS = 8, 2


METHODS: dict[str, Any] = {
    "none": rf.no_perturbation(),
    "stepped": rf.awp(0.1),  # the optimizer's step is taken at the perturbed weights
    "awp3": rf.awp(0.1, steps=3),
    "awp_global": rf.awp_global(0.1),
    "amp": rf.amp(0.1, 5.0),
    "sam": rf.sam(0.2),
    "sam_linf": rf.sam(0.01, "linf"),
    "sam_l3": rf.sam(0.2, 3),
    "asam": rf.asam(0.5),
    "gsam": rf.gsam(0.2, 0.4),
    "nsam": rf.nsam(rf.sam(0.2), 2),
    "random": rf.random_weights(0.2, "row"),
    "rwp_mix": rf.rwp_mix(0.05),
    "vasso": rf.vasso(0.2, 0.5),
    "momentum_sam": rf.momentum_sam(0.2),
    "looksam": rf.looksam(0.2, every=2),
    "lesam": rf.lesam(0.2, 0.1),
}


def searched(norm: float, group: Any) -> WeightPerturbation:
    ball = Ball(norm, 0.05 if norm == torch.inf else 0.4, group)
    ascent = Ascent(2, 0.6, "uniform", keep="best")
    return WeightPerturbation(name="searched", ball=ball, ascent=ascent)


METHODS |= {
    "searched_row": searched(torch.inf, "row"),
    "searched_tensor": searched(2, "tensor"),
    "searched_global": searched(2, "global"),
}


def net() -> nn.Module:
    """Layers whose rows (5, 3 and 1) do not go into two equal parts, one of them frozen."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.GroupNorm(1, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(80, 1),
        nn.Linear(1, 3),
    )
    made[5].bias.requires_grad_(False)
    return made.double()


def batch(number: int) -> tuple[Tensor, Tensor]:
    return images(ROWS, number)


def follow(model: nn.Module, name: str, rank: int = 0, world: int = 1) -> list[Tensor]:
    """A few steps with momentum; the weights after each, the losses and what was watched."""
    weights, found, seen = METHODS[name], [], []
    if world > 1:
        weights = weights.synchronised("global")
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9, weight_decay=1e-2
    )
    watch = rf.Watch()
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)

        def loss(at: int = 0, number: int = number) -> Tensor:
            x, y = (t[rank::world] for t in batch(number + 10 * at))
            return F.cross_entropy(model(x), y)

        optimizer.zero_grad()
        with watch.step():
            step = optimizer.step if name == "stepped" else None
            value = weights.backward(loss, model, generator=generator, step=step)
        if step is None:
            optimizer.step()
        found += [whole(p) for p in model.parameters()]
        looked = [v for n, v in watch.values.items() if not n.startswith("loss")]
        seen.append(torch.stack([value.detach(), *looked]))
    return [*found, *seen]


def whole(p: Any) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def sharded(
    model: nn.Module, *, reshard: bool = True, each: bool = True, shape: tuple[int, ...] = (WORLD,)
) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for layer in model if each else ():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return model


def restored(model: nn.Module, rank: int) -> dict[str, bool]:
    """Whether every bit comes back, however a perturbation is left."""
    x, y = (t[rank::WORLD] for t in batch(0))
    weights = rf.sam(0.2).synchronised("global")
    held = [p.to_local() for p in model.parameters()]  # before a pass puts them together
    with torch.no_grad():
        before, logits = [t.clone() for t in held], model(x).clone()
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    found: dict[str, bool] = {}

    def note(name: str) -> None:
        same = all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
        with torch.no_grad():
            found[name] = same and torch.equal(model(x), logits)

    note("untouched")
    with weights.perturbed(loss, model), torch.no_grad():
        found["moved"] = not torch.equal(model(x), logits)  # and its weights stay put together
    note("a forward pass alone")
    weights.backward(loss, model)
    note("a step")
    try:
        with weights.perturbed(loss, model):
            raise KeyError
    except KeyError:
        note("an exception")
    with torch.no_grad():
        model(x)  # the weights stand put together when the step begins
    weights.backward(loss, model)
    note("a step after a forward pass")
    return found


def refusals(model: nn.Module) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    loss = lambda: model(batch(0)[0]).sum()  # noqa: E731
    together = rf.awp(0.1).synchronised("global")
    alone = fully_shard(net(), mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names="ab")["b"])
    some = net()
    fully_shard(some[4], mesh=init_device_mesh("cpu", (WORLD,)))
    tried: dict[str, Any] = {
        "local": lambda: rf.awp(0.1).backward(loss, model),
        "chunks": lambda: rf.msam(rf.sam(0.1), 2).backward(lambda rows: loss(), model, rows=ROWS),
        "scaler": lambda: together.backward(loss, model, scaler=torch.amp.GradScaler("cpu")),
        "apart": lambda: together.backward(loss, alone),
        "some": lambda: together.backward(loss, some),
        "zsharp": lambda: rf.zsharp(0.2, 0.5).synchronised("global").backward(loss, model),
        "l1": lambda: searched(1, "row").synchronised("global").backward(loss, model),
        "parts": lambda: accumulated(lambda rows: loss(), [slice(0, 2), slice(2, 4)], model),
    }  # fmt: skip
    found = {}
    for name, call in tried.items():
        try:
            call()
            found[name] = "not refused"
        except ValueError as error:
            found[name] = str(error)
    return found


def process(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in METHODS:
        results[name] = follow(sharded(net()), name, rank, WORLD)
    results["kept whole"] = follow(sharded(net(), reshard=False), "awp3", rank, WORLD)
    results["at once"] = follow(sharded(net(), each=False), "awp3", rank, WORLD)
    results["replicated too"] = follow(sharded(net(), shape=(WORLD, 1)), "awp3", rank, WORLD)
    results["restored"] = restored(sharded(net()), rank)
    results["restored at once"] = restored(sharded(net(), each=False, reshard=False), rank)
    results["refused"] = refusals(sharded(net()))
    attacked = sharded(net())
    x, y = (t[rank::WORLD] for t in batch(0))
    results["attack"] = rf.pgd("l2", 0.5, 3, start="zero")(attacked, x, y)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_group(process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(ranks: list[dict[str, Any]], name: str) -> None:
    expected = follow(net(), name)
    plain = follow(net(), "none")
    pairs = zip(expected[:-STEPS], plain[:-STEPS], strict=True)
    moved = max(float((a - b).abs().max()) for a, b in pairs)
    assert (moved > 1e-6) == (name != "none"), "the premise"
    for found in ranks:
        for a, b in zip(found[name][:-STEPS], expected[:-STEPS], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    seen = [torch.cat(r[name][-STEPS:]) for r in ranks]
    # A loss is that of own rows; what is watched is the same in both.
    torch.testing.assert_close((seen[0] + seen[1]) / 2, torch.cat(expected[-STEPS:]))


@pytest.mark.parametrize("way", ["kept whole", "at once", "replicated too"])
def test_however_it_is_sharded(ranks: list[dict[str, Any]], way: str) -> None:
    for a, b in zip(ranks[0][way], ranks[0]["awp3"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["restored", "restored at once"])
def test_every_bit_of_every_part_comes_back(ranks: list[dict[str, Any]], way: str) -> None:
    for found in ranks:
        assert len(found[way]) == 6
        assert all(found[way].values()), found[way]


def test_images_are_attacked_through_parts(ranks: list[dict[str, Any]]) -> None:
    x, y = batch(0)
    expected = rf.pgd("l2", 0.5, 3, start="zero")(net(), x, y)
    for rank in range(WORLD):
        torch.testing.assert_close(ranks[rank]["attack"], expected[rank::WORLD])


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("local", 'Use .synchronised("global")'),
        ("chunks", "sync='local'"),
        ("scaler", "takes no gradient scaler"),
        ("zsharp", "sorts the entries"),
        ("apart", "all processes to hold parts of every parameter"),
        ("some", "needs all parameters sharded"),
        ("l1", "projected onto an l1 ball"),
        ("parts", "accumulate"),
    ],
)
def test_what_is_not_sound_is_refused(
    ranks: list[dict[str, Any]], what: str, sentence: str
) -> None:
    for found in ranks:
        assert sentence in found["refused"][what]
