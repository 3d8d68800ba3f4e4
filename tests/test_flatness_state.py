from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import socket

import numpy as np
import pytest
import torch
from flatness_models import conv_net, examples, mlp
from torch.utils.data import DataLoader, TensorDataset

import robustflat as rf
from robustflat.evaluate import Team
from robustflat.flatness import MEASURES, flatness
from robustflat.flatness.closure import Closure
from robustflat.flatness.store import Identity
from robustflat.landscapes import between, landscape

torch.set_num_threads(1)
QUICK = {
    "steps": 2, "samples": 2, "probes": 2, "restarts": 2, "lanczos_steps": 4, "lanczos_runs": 1,
}  # fmt: skip
MEASURED = [n for n in MEASURES if not n.startswith(("stutz", "andri"))]


class Everything:
    """All state that a measurement could disturb, to be compared bit for bit."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
        self.grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.requires = [p.requires_grad for p in model.parameters()]
        self.modes = [m.training for m in model.modules()]
        self.momenta = [getattr(m, "momentum", None) for m in model.modules()]
        self.rng = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())

    def check(self) -> None:
        now = Everything(self.model)
        assert all(torch.equal(a, b) for a, b in zip(self.tensors, now.tensors, strict=True))
        for before, after in zip(self.grads, now.grads, strict=True):
            assert (before is None) == (after is None)
            assert before is None or torch.equal(before, after)
        assert (self.requires, self.modes, self.momenta) == (now.requires, now.modes, now.momenta)
        assert torch.equal(self.rng[0], now.rng[0])
        assert np.array_equal(self.rng[1], now.rng[1])
        assert self.rng[2] == now.rng[2]


@pytest.fixture
def model():
    net = conv_net()
    net[0].bias.requires_grad_(False)
    net[5].weight.grad = torch.randn_like(net[5].weight)
    return net


DATA = (examples(7, (1, 4, 4), 3)[0].float(), examples(7, (1, 4, 4), 3)[1])

HOLED = DATA[0].clone()
HOLED[6, 0, 0, 0] = torch.nan


class Stop(BaseException):
    pass


def stopping(after: int):
    calls = 0

    def on_progress(progress) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop

    return on_progress


@pytest.mark.parametrize("name", MEASURED)
def test_a_measurement_leaves_no_trace_even_when_interrupted(model, name):
    before = Everything(model)
    given = {"initial": {k: v + 1 for k, v in model.state_dict().items()}, **QUICK}
    flatness(model, DATA, [name], eps=0.05, batch_size=3, **given)
    before.check()
    for after in (0, 1, 4, 9):
        with contextlib.suppress(Stop):  # some end before
            flatness(
                model, DATA, [name], eps=0.05, batch_size=3, on_progress=stopping(after), **given
            )
        before.check()


@pytest.mark.parametrize("draw", ["filter", "eigenvectors", "between"])
def test_a_landscape_leaves_no_trace_even_when_interrupted(model, draw):
    other = conv_net(1)

    def measure(**options: object) -> None:
        options |= {"eps": 0.05, "batch_size": 3, "points": 3, "batchnorm": "refresh"}
        if draw == "between":
            between(model, {"a": model, "b": other}, DATA, **options)
        else:
            landscape(model, DATA, directions=draw, **options)

    before = Everything(model)
    measure()
    before.check()
    for after in (0, 2, 7, 20):
        with pytest.raises(Stop):
            measure(on_progress=stopping(after))
        before.check()


def test_sharpness_is_measured_in_eval_mode_and_flags_come_back_one_by_one(model):
    expected = flatness(model, DATA, ["ascent_clean"])["ascent_clean"].value
    model.train()
    model[1].eval()  # a frozen BatchNorm
    before = Everything(model)
    assert flatness(model, DATA, ["ascent_clean"])["ascent_clean"].value == expected
    before.check()


@pytest.mark.parametrize("name", ["hessian_max", "hessian_trace_robust", "fisher_trace"])
def test_curvature_refuses_train_mode(model, name):
    model[3].train()
    with pytest.raises(rf.UserError, match=r"train mode.*Call model\.eval\(\)"):
        flatness(model, DATA, [name])


def test_the_same_seed_gives_the_same_figures_whatever_the_global_state(model):
    names = ["average_robust", "hessian_trace", "hessian_density", "fisher_trace"]
    first = flatness(model, DATA, names, seed=3, **QUICK)
    torch.manual_seed(99)
    again = flatness(model, DATA, names[::-1], seed=3, **QUICK)
    other = flatness(model, DATA, names, seed=4, **QUICK)
    for name in names:
        assert first[name].value == again[name].value != other[name].value


def test_a_random_model_is_refused():
    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) + torch.randn(3)

    with pytest.raises(rf.UserError, match="two different outputs"):
        flatness(Noisy(16, 3).eval(), DATA, ["ascent_clean"])


def test_a_loader_equals_its_tensors_and_shuffling_is_refused(model):
    data = TensorDataset(*DATA)
    expected = flatness(model, DATA, ["worst_robust"], **QUICK)["worst_robust"].value
    loader = DataLoader(data, batch_size=2)
    iterator = iter(loader)
    before = Everything(model)
    assert flatness(model, loader, ["worst_robust"], **QUICK)["worst_robust"].value == expected
    with pytest.raises(rf.UserError, match="shuffles or augments"):
        flatness(model, DataLoader(data, batch_size=7, shuffle=True), ["ascent_clean"])
    with pytest.raises(rf.UserError, match="only once"):
        flatness(model, iterator, ["ascent_clean"])
    before.check()
    first = flatness(model, loader, ["ascent_clean"], examples=3)["ascent_clean"]
    alone = flatness(model, DATA, ["ascent_clean"], examples=3)["ascent_clean"]
    assert first.value == alone.value
    assert first.details["examples"] == 3


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Did you mean 'hessian_max'", {"measures": ["hessian_mx"]}),
        ("Did you mean 'radius'", {"radus": 1}),
        ("radius: Input should be greater than or equal to 0", {"radius": -1.0}),
        ("radius: Input should be a finite number", {"radius": float("nan")}),
        ("steps: Input should be a valid integer", {"steps": 1.5}),
        ("steps must be a whole number", {"steps": True}),
        ("probes: Input should be greater than or equal to 1", {"probes": 0}),
        ("ball: Input should be 'global', .*'adaptive' \\(got 'cube'\\)", {"ball": "cube"}),
        ("weight_norm must be", {"weight_norm": True}),
        ("weight_norm must be", {"weight_norm": 3}),
        ("confidence: Input should be less than 1", {"confidence": 1.0}),
        ("xtrace needs probes >= 3, got 2", {"estimator": "xtrace", "probes": 2}),
        ("radius: .*\n.*steps: ", {"steps": 0, "radius": -1}),
        ("norm must be", {"norm": "l7x"}),
        ("eps must be a finite number", {"eps": -1.0}),
        ("batch_size must be at least 1", {"batch_size": 0}),
        ("selection 're:nothing' fits none", {"parameters": "re:nothing"}),
        ("Labels must be one whole number in 0..2", {"data": (DATA[0], DATA[1] + 1)}),
        ("Soft labels must be", {"data": (DATA[0], torch.rand(7, 5))}),
        ("as many labels as images", {"data": (DATA[0], DATA[1][:3])}),
        ("at least one of each", {"data": (DATA[0][:0], DATA[1][:0])}),
        ("floating-point numbers", {"data": ((DATA[0] * 255).byte(), DATA[1])}),
        ("radius must be a number", {"radius": "much"}),
        ("radius must be a number", {"radius": True}),
        ("step_size must be a number", {"step_size": "x"}),
        ("normalise_logits: Input should be a valid boolean", {"normalise_logits": "no"}),
        ("parameters: Input should be a valid string", {"parameters": 3}),
        ("selection must be 'all', 'matrices'", {"parameters": "some"}),
        ("max_hvps must be at least k", {"k": 5, "max_hvps": 4}),
        ("swept over no value", {"radius": []}),
        ("No flatness measure was asked for", {"measures": []}),
        (
            "pixels of the images are not finite",
            {"data": (HOLED, DATA[1]), "batch_size": 2},
        ),
    ],
)
def test_bad_input_is_a_sentence(model, message, arguments):
    arguments = {"data": DATA, "measures": ["ascent_robust"], **arguments}
    with pytest.raises(rf.UserError, match=message):
        flatness(model, **arguments)


def test_half_precision_is_refused(model):
    with pytest.raises(rf.UserError, match=r"bfloat16.*Measure model\.float"):
        flatness(model.bfloat16(), DATA, ["ascent_clean"])


def test_weights_that_are_not_finite_are_a_sentence(model):
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(rf.UserError, match="not finite at its own weights"):
        flatness(model, DATA, ["ascent_clean"])


@pytest.mark.parametrize("name", ["worst_robust", "average_clean", "hessian_trace", "pac_bayes"])
def test_an_interrupted_measurement_goes_on_and_ends_with_the_same_values(tmp_path, name):
    model, data = mlp(), examples(7, (6,), 4)
    options = {"steps": 2, "samples": 4, "probes": 24, "restarts": 3, "batch_size": 3}
    seen: list[object] = []
    whole = flatness(model, data, [name], on_progress=seen.append, **options)[name]
    store, half = tmp_path / "parts.json", stopping(int(0.6 * len(seen)))
    with pytest.raises(Stop):
        flatness(model, data, [name], store=store, on_progress=half, **options)
    assert len(store.read_text().splitlines()) > 0
    with store.open("a") as file:  # killed while it wrote
        file.write(store.read_text().splitlines()[0][:60])
    resumed = flatness(model, data, [name], store=store, **options)[name]
    assert resumed.value == whole.value
    assert resumed.standard_error == whole.standard_error
    assert resumed.details["passes"]["units"] < whole.details["passes"]["units"]
    # All is in the store now, and more parts may be asked for.
    again = flatness(model, data, [name], store=store, **options)[name]
    assert again.value == whole.value
    more = flatness(model, data, [name], store=store, **{**options, "samples": 6, "probes": 30})
    assert more[name].details["passes"]["units"] <= 6 * 11


def test_a_store_serves_several_measurements_and_never_one_anothers_values(tmp_path):
    model, (x, y) = mlp(), examples(7, (6,), 4)
    store = tmp_path / "parts.jsonl"
    cases = [
        {}, {"model": mlp(seed=1)}, {"data": (x + 0.1, y)}, {"data": (x, (y + 1) % 4)}, {"seed": 1},
        {"radius": 0.3}, {"examples": 3}, {"eps": 0.2}, {"parameters": "all"},
    ]  # fmt: skip
    common = {"model": model, "data": (x, y), "measures": ["average_robust"], "samples": 2}
    for case in cases:
        alone = flatness(**{**common, **case})["average_robust"]
        first = flatness(**{**common, **case}, store=store)["average_robust"]
        assert first.details["passes"]["units"] > 0
        assert first.value == alone.value
    for case in cases:
        again = flatness(**{**common, **case}, store=store)["average_robust"]
        assert again.details["passes"]["units"] == 0
        assert again.value == flatness(**{**common, **case})["average_robust"].value
    # One line a part, added at the end: what was there is not written again.
    kept = store.read_text()
    flatness(**common, radius=0.7, store=store)
    assert store.read_text().startswith(kept)
    assert len(store.read_text().splitlines()) == len(kept.splitlines()) + 2
    store.write_text(kept[: len(kept) // 2])  # a cut line is left out
    assert flatness(**common, store=store)["average_robust"].value > 0
    assert flatness(**common, store=store)["average_robust"].details["passes"]["units"] == 0
    for other in ('{"format": "robustflat-flatness-parts/1"}', "no JSON", "[1, 2]"):
        store.write_text(other)
        with pytest.raises(rf.UserError, match="does not hold the parts"):
            flatness(**common, store=store)
        assert store.read_text() == other


@pytest.mark.parametrize("name", ["pac_bayes_sigma", "pac_bayes_magnitude"])
def test_a_store_knows_over_how_many_directions_a_noise_was_sought(tmp_path, name):
    model, (x, _), store = mlp(), examples(40, (6,), 4), tmp_path / "parts.jsonl"
    data, values = (x, model(x).argmax(1)), []
    for samples in (1, 12, 1):
        kept = flatness(model, data, [name], samples=samples, store=store)[name].value
        assert kept == flatness(model, data, [name], samples=samples)[name].value
        values.append(kept)
    assert values[0] == values[2] != values[1]


class Shaped(torch.nn.Module):
    """Of equal weights, whatever its code."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.inner, self.shape = mlp(), shape

    def forward(self, x):
        return self.inner[3](self.shape(self.inner[1](x)))


def test_a_network_is_its_weights_and_its_function(tmp_path):
    data, store = examples(9, (6,), 4), tmp_path / "parts.jsonl"
    shapes = [torch.relu, torch.nn.functional.softplus, lambda z: torch.relu(z) * (1 + 1e-12)]
    found, drawn = [], []
    for shape in shapes:
        model = Shaped(shape)
        figure = flatness(model, data, ["worst_clean"], store=store)["worst_clean"]
        found.append(figure)
        ask = {"losses": ["clean"], "points": 3}
        drawn.append(landscape(model, data, store=tmp_path, **ask))
        assert drawn[-1].losses["clean"] == pytest.approx(
            landscape(model, data, **ask).losses["clean"], rel=1e-9
        )
    alone = [flatness(Shaped(s), data, ["worst_clean"])["worst_clean"].value for s in shapes]
    assert found[0].value == alone[0]
    assert found[1].value == alone[1] != alone[0]
    # As from another number of threads: the same network, whose parts are there.
    assert found[2].value == alone[0]
    assert found[2].details["passes"]["units"] == 0
    assert (
        flatness(Shaped(shapes[1]), data, ["worst_clean"], store=store)["worst_clean"].details[
            "passes"
        ]["units"]
        == 0
    )
    # The landscape of the other network took the place of the first.
    assert [len(list(tmp_path.glob("line-*.json"))), drawn[2].measured] == [1, 3]


def test_logits_are_compared_whole_and_what_is_none_is_another_network():
    mine = Identity(mark="", logits=[[1.0, -2.0]], tolerance=1e-3)
    assert mine.has([[1.0, -2.0]])
    assert mine.has([[1.0019, -2.0019]])
    for other in (
        [[1.0, -1.9]],
        [[1.1, -2.0]],
        [[0.9, -2.0]],
        [[1.0]],
        [[1.0, -2.0]] * 2,
        [],
        None,
        "x",
    ):
        assert not mine.has(other)


def test_a_measure_of_one_s_own_may_keep_all_its_parts_under_one_key(tmp_path, monkeypatch):
    """With other numbers of samples, probes, restarts or runs they are others."""
    (tmp_path / "own_parts.py").write_text(
        "from robustflat.flatness import measure\n"
        "@measure()\n"
        "def count(subject, options, loss, name):\n"
        "    return subject.part(name, lambda: options.samples + options.probes\n"
        "                        + options.restarts + options.lanczos_runs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, data, names = mlp(), examples(6, (6,), 4), ["own_parts:count"]
    for changes in ({}, {"samples": 11}, {"probes": 31}, {"restarts": 3}, {"lanczos_runs": 4}):
        for _ in range(2):
            (figure,) = flatness(model, data, names, store=tmp_path / "p", **changes).values()
            assert figure.value == 45 + len(changes)


def test_a_loss_that_needs_three_classes_is_refused_for_two():
    model, data = mlp((6, 8, 2)), examples(6, (6,), 2)
    for draw in (
        lambda **more: flatness(model, data, ["worst_robust"], **more),
        lambda **more: landscape(model, data, points=3, **more),
    ):
        with pytest.raises(rf.UserError, match="third largest logit, and the model has 2 classes"):
            draw(attack="pgd-2:dlr")
    # Nobody asks for it where nothing is attacked.
    assert flatness(model, data, ["average_clean"], attack="pgd-2:dlr")
    assert landscape(model, data, points=3, losses=["clean"], attack="pgd-2:dlr").complete


@pytest.mark.parametrize("loss", ["clean", "robust", "robust_fixed"])
def test_where_the_loss_overflows_the_worst_direction_is_not_finite(tmp_path, loss):
    model, data = mlp((6, 8, 8, 8, 4), relu=True).float(), examples(7, (6,), 4)
    ask = {"measures": [f"worst_{loss}"], "radius": 1e14, "m": 3, "store": tmp_path / "parts"}
    for _ in range(2):
        figure = flatness(model, data, **ask)[f"worst_{loss}"]
        assert figure.value == float("inf")
        assert figure.to_dict()["value"] is None
    assert math.isfinite(flatness(model, data, **{**ask, "radius": 10.0})[f"worst_{loss}"].value)
    with pytest.raises(rf.UserError, match=r"lengths overflow torch.float32 .* radius 1e\+38"):
        flatness(model, data, **{**ask, "radius": 1e38})


def test_a_sharpness_that_is_not_finite_is_a_figure_and_is_resumed(tmp_path):
    model, data = mlp(), examples(7, (6,), 4)
    deep = mlp((6, 8, 8, 8, 8, 4), relu=True).float()
    ask = {"measures": ["average_clean"], "radius": 1e12, "samples": 2}
    for _ in range(2):
        figure = flatness(deep, data, **ask, store=tmp_path / "parts.jsonl")["average_clean"]
        assert not math.isfinite(figure.standard_error)
        assert figure.to_dict()["standard_error"] is None
    store = tmp_path / "other.jsonl"
    flatness(model, data, ["average_clean"], store=store, samples=2)
    store.write_text(re.sub(r'"increase": [^,]*,', '"increase": Infinity,', store.read_text()))
    figure = flatness(model, data, ["average_clean"], store=store, samples=2)["average_clean"]
    assert figure.value == float("inf")
    assert figure.to_dict()["value"] is None


def test_labels_beyond_the_first_batch_are_checked(model):
    x, y = DATA[0].repeat(4, 1, 1, 1), DATA[1].repeat(4)
    for wrong in (3, -1):
        y[-1] = wrong
        with pytest.raises(rf.UserError, match=r"Labels must be one whole number in 0\.\.2"):
            flatness(model, (x, y), ["ascent_clean"], batch_size=2)


def test_progress_rises_to_what_was_stated():
    seen = []
    figures = flatness(
        mlp(), examples(7, (6,), 4), ["worst_robust", "hessian_max", "hessian_trace"], probes=3,
        on_progress=seen.append, batch_size=3,
    )  # fmt: skip
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == pytest.approx(seen[-1].total)
    assert {p.measure for p in seen} == set(figures)


def test_figures_are_json_without_nan():
    names = ["worst_robust", "hessian_max", "hessian_trace", "pac_bayes", "alignment"]
    figures = flatness(mlp(), examples(7, (6,), 4), names, rho=0.0, probes=1, steps=1)
    text = json.dumps({k: f.to_dict() for k, f in figures.items()}, allow_nan=False)
    read = json.loads(text)
    assert set(read["worst_robust"]) == {"value", "standard_error", "details"}
    assert read["pac_bayes"]["value"] is None  # a radius of 0 bounds nothing
    assert read["hessian_max"]["details"]["eigenvalues"] == [read["hessian_max"]["value"]]


# --- processes

SHARED = [
    "worst_robust", "average_clean with m=3", "ascent_robust_fixed with m=2", "hessian_max",
    "hessian_trace", "gradient_norm_robust", "fisher_trace", "input_gradient_norm",
    "local_linearity", "logit_margin_robust", "boundary_thickness", "local_lipschitz",
    "fisher_rao_robust", "relative_flatness", "kl_robust",
]  # fmt: skip


def _measured(store, seen=None, **more):
    return flatness(
        conv_net(), examples(7, (1, 4, 4), 3), SHARED, 0.1, batch_size=2, attack="pgd-2-2",
        store=store, on_progress=seen, **QUICK, **more,
    )  # fmt: skip


def _as_one_of_two(rank, port, store, found):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    team, made = Team.of_torchrun(), 0
    look = Closure._losses

    def counted(self, logits, y):
        nonlocal made
        made += len(y)
        return look(self, logits, y)

    Closure._losses = counted
    figures = {n: f.to_dict() for n, f in _measured(store, team=team).items()}
    found.put((rank, made, json.dumps(figures)))


def test_processes_share_the_passes_and_find_what_one_finds(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    team = [
        context.Process(target=_as_one_of_two, args=(rank, port, tmp_path / "parts", found))
        for rank in (0, 1)
    ]
    for process in team:
        process.start()
    results = [found.get() for _ in team]
    for process in team:
        process.join(60)
    assert [process.exitcode for process in team] == [0, 0]
    alone = {n: f.to_dict() for n, f in _measured(tmp_path / "alone").items()}
    for _, _, figures in results:  # passes included
        assert json.loads(figures) == json.loads(json.dumps(alone))
    # Neither did all of it: of 4 batches each has 2, of 3 or 4 chunks one at most one more.
    made = {rank: number for rank, number, _ in results}
    assert 0.3 < made[1] / (made[0] + made[1]) < 0.5
    # The file has what a single process writes, each part once.
    kept = [sorted((tmp_path / name).read_text().splitlines()) for name in ("parts", "alone")]
    assert kept[0] == kept[1]
