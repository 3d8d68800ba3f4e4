"""Sections made from signatures: every key reaches what is built; one list of names."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command, forked
from train_support import config, rows, saved, trained, write

import robustflat as rf
from robustflat import registry
from robustflat.config import ConfigError, check_config, read_config
from robustflat.config.choice import Built, Choice, choices, section
from robustflat.config.schema import (
    Attack,
    Augment,
    Average,
    Objectives,
    Optimizer,
    RunConfig,
    Schedule,
    Weights,
)
from robustflat.errors import UserError, nearest
from robustflat.registry import KINDS, Kind


def choice(alias: Any) -> Choice:
    return next(m for m in alias.__metadata__ if isinstance(m, Choice))


CHOICES = [choice(a) for a in (Weights, Attack, Objectives, Optimizer, Schedule, Average, Augment)]
# What is required, and what only works together.
NEEDED: dict[str, dict[str, Any]] = {
    "amp": {"epsilon": 0.5},
    "random": {"gamma": 0.3},
    "custom": {"radius": 0.4},
    "msam": {"inner": "sam", "chunk": 3},
    "nsam": {"inner": "sam", "batches": 3},
    "swa": {"start_epoch": 1},
    "muon": {},
}
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("custom", "onto"): {"onto": "sphere"},
    ("custom", "statistics"): {"statistics": "centre"},
    ("custom", "norm"): {"norm": "linf"},
    ("pgd", "loss"): {"loss": "margin"},
    ("fgsm", "loss"): {"loss": "margin"},
    ("adafactor", "beta2_decay"): {"beta2_decay": -0.5},
    ("adafactor", "eps"): {"eps": [0.5, 0.25]},
    ("adafactor", "d"): {"d": 2.0},
    ("muon", "adjust_lr_fn"): {"adjust_lr_fn": "match_rms_adamw"},
    ("rprop", "etas"): {"etas": [0.25, 3.0]},
    ("torchvision", "transforms"): {"transforms": [{"name": "RandomHorizontalFlip"}]},
    ("sgd", "nesterov"): {"nesterov": True, "momentum": 0.5},
}
# statistics="perturbed" is all that a method without a pass at the centre can do.
ONLY_VALUE = {("random", "statistics")}


def sections() -> list[Any]:
    found = []
    for c in CHOICES:
        for name in c.kind:
            made = section(c.kind.find(name), name, c.kind, c.base)
            found += [pytest.param(c, name, key, id=f"{name}.{key}") for key in made.own]
    return found


def changed(of: Choice, name: str, key: str) -> dict[str, Any]:
    """Valid keys among which ``key`` has not its default."""
    if (name, key) in TOGETHER:
        return TOGETHER[name, key]
    info = section(of.kind.find(name), name, of.kind, of.base).model_fields[key]
    default, annotation = info.default, info.annotation
    text = f"{annotation} {info.metadata}"  # with bounds and readers
    known = {"parameters": "re:weight", "scale": "magnitude", "inner": {"name": "awp", "steps": 2}}
    if key in known:
        return {key: known[key]}
    if typing.get_origin(annotation) is typing.Literal:
        return {key: next(a for a in typing.get_args(annotation) if a != default)}
    if isinstance(default, bool):
        return {key: not default}
    if isinstance(default, tuple):
        return {key: [v / 2 for v in default]}
    if "read_norm" in text:
        return {key: "l1" if default == "linf" else "linf"}
    if "read_number" in text:
        return {key: 0.375 if default != 0.375 else 0.25}
    assert "int" in text, text
    return {key: (default if isinstance(default, int) else 6) + 1}


@pytest.mark.parametrize(("of", "name", "key"), sections())
def test_every_key_reaches_the_call(
    of: Choice, name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = of.kind.find(name)
    made = section(real, name, of.kind, of.base)
    calls: list[dict[str, Any]] = []

    @functools.wraps(real)
    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    if (name, key) in ONLY_VALUE:
        return
    said = NEEDED.get(name, {}) | changed(of, name, key)
    built_from = of.read({"name": name, **said})
    monkeypatch.setattr(
        Kind, "find", lambda kind, asked: spy if asked == name else real_find(kind, asked)
    )
    needs = {"optimizer": {"params": [torch.nn.Parameter(torch.zeros(2, 2))]}}
    built_from.build(**needs.get(of.kind.name, {}))
    (call,) = [c for c in calls if key in c]
    wanted = tuple(said[key]) if isinstance(said[key], list) else said[key]
    if key == "inner":
        wanted = rf.awp(steps=2)
    assert call[key] == wanted
    assert call[key] != made.model_fields[key].default


real_find = Kind.find


# Rules are functions, which cannot be compared; that they obey their keys is shown by trajectories.
COMPARED = {
    "awp": ("ball", "ascent", "parameters", "statistics"),
    "amp": ("ball", "ascent", "parameters", "statistics"),
    "sam": ("ball", "ascent", "parameters", "statistics"),
    "random": ("ball", "scale", "parameters", "statistics"),
    "custom": ("ball", "ascent", "scale", "parameters", "statistics"),
}


@pytest.mark.parametrize(("of", "name", "key"), [p for p in sections() if p.values[1] in COMPARED])
def test_every_key_changes_what_is_built(of: Choice, name: str, key: str) -> None:
    if (name, key) in ONLY_VALUE:
        return
    said = changed(of, name, key)
    one = of.read({"name": name, **NEEDED.get(name, {})}).build()
    two = of.read({"name": name, **NEEDED.get(name, {}), **said}).build()
    assert any(getattr(one, a) != getattr(two, a) for a in COMPARED[name])


@pytest.mark.parametrize(
    "key", ["norm", "eps", "steps", "step_size", "start", "loss", "restarts", "mode", "keep"]
)
def test_every_key_changes_the_attack(key: str) -> None:
    of = choice(Attack)
    values = {"norm": "l2", "eps": 0.5, "steps": 3, "step_size": 0.1, "start": "sphere"}
    values |= {"loss": "dlr", "restarts": 2, "mode": "batch", "keep": "best"}
    assert of.read({"name": "pgd", key: values[key]}).build() != of.read("pgd").build()


@pytest.mark.parametrize("key", ["norm", "eps", "loss", "mode"])
def test_every_key_changes_the_one_step_attack(key: str) -> None:
    of = choice(Attack)
    values = {"norm": "l2", "eps": 0.5, "loss": "dlr", "mode": "batch"}
    assert of.read({"name": "fgsm", key: values[key]}).build() != of.read("fgsm").build()


# --- defaults


def test_the_names_most_like_one_that_is_none_are_told_as_many_as_are_asked_for() -> None:
    known = ("radius", "radii", "steps")
    assert nearest("radus", known) == " Did you mean 'radius' or 'radii'?"
    assert nearest("radus", known, 1) == " Did you mean 'radius'?"
    assert nearest("zzz", known) == ""


def test_the_library_and_yaml_have_the_same_defaults() -> None:
    for kind, of in (("weights", Weights), ("attack", Attack), ("objective", Objectives)):
        for name in KINDS[kind]:
            if name in NEEDED:
                continue
            factory = KINDS[kind].find(name)
            mine, theirs = choice(of).read(name).build(), factory()
            assert type(mine) is type(theirs)
            if kind != "weights":
                assert mine == theirs
                continue
            for attribute in (
                "name",
                "ball",
                "ascent",
                "scale",
                "parameters",
                "statistics",
                "every",
            ):
                if attribute != "scale" or name != "asam":  # made anew by each call
                    assert getattr(mine, attribute) == getattr(theirs, attribute), (name, attribute)
    assert (
        choice(Weights).read("awp").gamma == inspect.signature(rf.awp).parameters["gamma"].default
    )


def test_left_out_sections_take_their_defaults() -> None:
    plain = check_config({"name": "a"})
    assert (plain.weights.name, plain.objective.name, plain.attack.name) == (
        "none",
        "adversarial",
        "pgd",
    )
    assert plain.weights.build().is_off
    assert plain.threat == ("linf", 8 / 255)
    assert [one.name for one in plain.listeners] == ["tensorboard"]
    assert (
        check_config({"name": "a", "weights": "awp"}).weights
        == check_config({"name": "a", "weights": {"name": "awp"}}).weights
    )


def test_an_attack_takes_what_is_left_out_from_the_objective_s_paper() -> None:
    def attack(**said: Any) -> Any:
        return check_config({"name": "a", **said}).attack

    assert (attack().loss, attack().start) == ("ce", "uniform")
    trades = attack(objective="trades")
    assert (trades.loss, trades.start) == ("kl", "normal")
    assert attack(objective="mart").start == "normal"
    said = attack(objective="trades", attack={"start": "uniform", "eps": 0.1})
    assert (said.loss, said.start, said.eps) == ("kl", "uniform", 0.1)
    # The resolved configuration says all, so that reading it again changes nothing.
    whole = check_config(
        {"name": "a", "objective": "trades", "attack": {"loss": "ce", "start": "zero"}}
    )
    again = check_config(whole.model_dump(mode="json"))
    assert again == whole
    assert (again.attack.loss, again.attack.start) == ("ce", "zero")


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("data",)])
def test_every_name_is_found_and_told_of(kind: str) -> None:
    for name in KINDS[kind]:
        lines = KINDS[kind].describe(name)
        assert len(lines[0]) > 10
        assert lines[0].endswith(".") or kind in ("measures", "listeners")


def test_every_weight_perturbation_says_its_source_its_cost_and_its_defaults() -> None:
    for name in registry.weights:
        text = inspect.getdoc(registry.weights.find(name)) or ""
        call, source = registry.weights.describe(name)[1:3]
        assert source.startswith("Source: ")
        assert call.startswith(f"{name}(")
        assert re.search(r"^Passes: ", text, re.M), name


def test_where_sections_are_chosen_by_name() -> None:
    found = dict(choices(RunConfig))
    assert {("weights",), ("attack",), ("train", "average"), ("data", "augment")} <= set(found)
    assert found[("weights",)].kind is registry.weights
    assert ("data",) not in found


def test_another_name_replaces_the_section(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", weights={"name": "awp", "gamma": 0.5, "when": {"every": 3}})
    plain = read_config(path, ["weights.name=none"])
    assert plain.weights.name == "none"
    assert plain.weights.when.every == 3  # which belongs to no name
    other = read_config(path, ["weights.name=sam", "weights.rho=0.25"])
    assert (other.weights.name, other.weights.rho) == ("sam", 0.25)
    # The same name changes nothing, and a key may come before it.
    assert read_config(path, ["weights.name=awp"]).weights.gamma == 0.5
    other = read_config(path, ["weights.rho=0.25", "weights.name=sam"])
    assert (other.weights.name, other.weights.rho) == ("sam", 0.25)
    path = write(tmp_path / "d.yaml", weights="sam")
    assert read_config(path, ["weights.rho=0.25"]).weights.rho == 0.25
    # But not where a name is only a name.
    assert read_config(path, ["data.name=mnist5k"]).data.train_samples == 60


# --- one's own, by package.module:function

OWN = '''
"""All kinds of things of one's own."""
from typing import Any
import torch
import torch.nn.functional as F
import robustflat as rf
import robustflat.train
from robustflat.flatness import Figure, Passes, measure

def weights(rho: float = 0.25, parameters: str = "matrices"):
    """A method of one's own."""
    return rf.sam(rho, parameters=parameters)

def attack(shift: float = 0.125):
    """Shift every pixel."""
    return lambda model, x, y, *, generator=None: (x + shift).clamp(0, 1)

def objective(weight: float = 2.0):
    return lambda model, x, x_adv, y: weight * F.cross_entropy(model(x_adv), y)

def optimizer(params, lr: float = 0.05):
    return torch.optim.SGD(params, lr)

def schedule(share: float = 0.5):
    return lambda epoch, epochs, step: share

def augment(by: int = 1):
    return lambda x, generator: x.roll(by, -1)

class Listener(robustflat.train.Listener):
    def __init__(self, folder, text: str = "told"):
        self.path, self.text = folder / "own.txt", text
    def on_epoch(self, row): self.path.open("a").write(f"{self.text} {row['epoch']}\\n")

@measure(loss="clean", cost=Passes(forward=1))
def mean_weight(subject, options, loss, name):
    """Mean of all weights."""
    flat = torch.cat([p.detach().flatten() for p in subject.model.parameters()])
    return Figure(value=float(flat.mean()))

def broken(x: int = 1): raise RuntimeError("on purpose")
def nothing(): return 3
def reserved(step: int = 1): return rf.sam()
def called_name(name: str = "x"): return rf.sam()
def unsayable(f=print): return rf.sam()
def no_generator(): return lambda model, x, y: x
def without_lr(params):
    groups = list(params)
    groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
    return torch.optim.SGD([{**group, "lr": 0.25} for group in groups], lr=0.5)

class Bare(rf.Perturbation):
    """The least that a perturbation of one's own is."""
    name = "bare"
    def backward(self, loss, model, *, rows=None, generator=None, scaler=None, step=None):
        value = loss()
        value.backward()
        return value.detach()
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    module = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return module


def test_one_s_own_of_every_kind_trains_and_is_named(own: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "weights": {"name": f"{own}:weights", "rho": 0.5},
        "attack": {"name": f"{own}:attack"},
        "objective": {"name": f"{own}:objective", "weight": 3},
        "optimizer": {"name": f"{own}:optimizer", "clip": 1.0},
        "schedule": f"{own}:schedule",
        "data__augment": {"name": f"{own}:augment", "by": 2},
        "listeners": [{"name": f"{own}:Listener", "text": "heard"}],
        "monitor__flatness": [f"{own}:mean_weight"],
        "monitor__flatness_every": 1,
    }
    path = write(tmp_path / "c.yaml", **said)
    process = forked(command, "train", str(path), said=tmp_path / "said")
    process.join()
    out = (tmp_path / "said").read_text()
    assert process.exitcode == 0, out
    folder = tmp_path / "run"
    named = json.loads((folder / "environment.json").read_text())["plugins"]
    expected = {"weights": "weights", "attack": "attack", "objective": "objective"}
    expected |= {"optimizer": "optimizer", "schedule": "schedule", "data.augment": "augment"}
    expected |= {"listeners.0": "Listener", "monitor.flatness.0": "mean_weight"}
    assert {k: v.split(" ")[0] for k, v in named.items()} == {
        k: f"{own}:{v}" for k, v in expected.items()
    }
    assert all(f"{own}.py" in v for v in named.values())
    for where in expected:
        assert f"{where}: {own}:" in out
    assert (folder / "own.txt").read_text() == "heard 1\nheard 2\n"
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    weights = torch.cat(
        [p.flatten() for p in saved(folder / "checkpoints" / "last.pt")["model"].values()]
    )
    found = row["flatness"][f"{own}:mean_weight"]
    assert math.isclose(found, float(weights.mean()), rel_tol=0.2, abs_tol=1e-3)
    assert row["lr"] == pytest.approx(0.025)


def test_one_s_own_perturbation_is_sam(own: str, tmp_path: Path) -> None:
    mine = trained(tmp_path, name="mine", weights={"name": f"{own}:weights"})
    sam = {"name": "sam", "rho": 0.25, "parameters": "matrices"}
    theirs = trained(tmp_path, name="theirs", weights=sam)
    for a, b in zip(
        saved(mine.last)["model"].values(), saved(theirs.last)["model"].values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{own}:wieghts", ("has no 'wieghts'", "Did you mean 'weights'")),
        ("no_such_module:f", ("could not be imported",)),
        ("{own}:nothing", ("must return weight perturbations", "got int")),
        ("avp", ("Did you mean 'awp'",)),
        ("os:getcwd", ("must return weight perturbations",)),
        ("{own}:broken", ("could not be made: RuntimeError: on purpose",)),
        ("{own}:reserved", ("argument called step", "Rename it")),
        ("{own}:called_name", ("argument called name", "Rename it")),
        ("{own}:unsayable", ("default <built-in function print>", "YAML cannot say")),
    ],
)
def test_what_is_no_perturbation_is_told(own: str, name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(weights={"name": name.format(own=own)})
    assert "weights" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_least_perturbation_of_one_s_own_is_sgd(own: str, tmp_path: Path) -> None:
    mine = trained(tmp_path, name="mine", weights=f"{own}:Bare")
    plain = trained(tmp_path, name="plain", weights="none")
    for a, b in zip(
        saved(mine.last)["model"].values(), saved(plain.last)["model"].values(), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="climbs in each process by itself"):
        config(weights={"name": f"{own}:Bare", "step": {"sync": "global"}})


def test_others_of_one_s_own_that_cannot_work_are_told(own: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must return listeners"):
        config(listeners=[f"{own}:nothing"]).listeners[0].build()
    with pytest.raises(ConfigError, match="must return optimizers"):
        config(optimizer=f"{own}:nothing")
    with pytest.raises(ConfigError, match="must return schedules"):
        config(schedule=f"{own}:nothing")
    with pytest.raises(ConfigError, match="is unknown"):
        config(train__average=f"{own}:nothing")
    for said, words in (
        ({"attack": f"{own}:no_generator"}, "take a random generator by name"),
        ({"optimizer": "muon"}, "muon cannot train this model"),
        ({"optimizer": {"name": "torch.optim:LBFGS"}}, "evaluates the loss by itself"),
    ):
        if said["optimizer" if "optimizer" in said else "attack"] == "muon" and not hasattr(
            torch.optim, "Muon"
        ):
            continue
        with pytest.raises(UserError, match=words):
            trained(tmp_path, **said)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_s_own_rates_are_what_the_schedule_multiplies(
    own: str, tmp_path: Path
) -> None:
    folder = trained(tmp_path, optimizer=f"{own}:without_lr", schedule=f"{own}:schedule")
    assert rows(folder)[-1]["lr"] == 0.125


def test_keys_of_one_s_own_are_checked_too(own: str) -> None:
    with pytest.raises(ConfigError, match=r"weights\.rhoo is not a known key.*'rho'"):
        config(weights={"name": f"{own}:weights", "rhoo": 1})
    with pytest.raises(ConfigError, match=r"weights\.rho must be a number"):
        config(weights={"name": f"{own}:weights", "rho": "much"})


MOVED = {
    "weights.warmup_epochs": ("from_epoch", 3),
    "weights.last_epoch": ("until_epoch", 3),
    "weights.every": ("when: {every", 2),
    "weights.radius_schedule": ("when: {radius: lr}", "lr"),
    "weights.chunk": ("name: msam", 8),
    "weights.batches": ("name: nsam", 2),
    "weights.reattack": ("step: {reattack", "ascent"),
    "weights.step_at": ("step: {at: perturbed}", "perturbed"),
    "train.tensorboard": ("listeners: [tensorboard]", True),
}


@pytest.mark.parametrize("key", MOVED)
def test_old_keys_name_their_new_spelling(key: str, tmp_path: Path) -> None:
    words, value = MOVED[key]
    path = write(tmp_path / "c.yaml")
    with pytest.raises(ConfigError) as caught:
        read_config(path, [f"{key}={value}"])
    assert f"override {key}={value}: {key} has moved" in str(caught.value)
    assert words in str(caught.value)


def test_a_section_builds_only_what_it_says() -> None:
    built = choice(Weights).read({"name": "msam", "chunk": 4, "inner": {"name": "awp", "steps": 2}})
    assert isinstance(built, Built)
    method = built.build()
    assert isinstance(method, rf.msam)
    assert method.chunk == 4
    assert method.inner == rf.awp(steps=2)
    with pytest.raises(ConfigError, match=r"weights\.inner\.stepz"):
        config(weights={"name": "msam", "chunk": 4, "inner": {"name": "awp", "stepz": 2}})
    with pytest.raises(ConfigError, match=r"weights\.inner\.when is not a known key"):
        config(weights={"name": "msam", "chunk": 4, "inner": {"name": "awp", "when": {}}})


def test_synchronising_reaches_the_perturbation() -> None:
    assert config(weights={"name": "sam"}).weights.build().sync == "local"
    step = {"sync": "global"}
    assert config(weights={"name": "sam", "step": step}).weights.build().sync == "global"
    with pytest.raises(ConfigError, match="sync"):
        config(weights={"name": "esam", "step": step})


@pytest.mark.parametrize(
    "key",
    ["train.fsdp", "train.parallel", "train.strategy", "train.sharding", "train.distributed",
     "fsdp", "parallel", "strategy"],
)  # fmt: skip
def test_who_asks_for_sharded_weights_is_told_where_they_are(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path / "c.yaml"), [f"{key}=fsdp2"])
    text = str(caught.value)
    assert f"{key} is no setting" in text
    assert "every process of `train` holds the whole network" in text
    assert "weights.backward(loss, fully_sharded_model)" in text
    assert "torchrun" in text


def test_what_is_loaded_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS["weights"].find("awp")
    monkeypatch.setattr("importlib.invalidate_caches", lambda: pytest.fail("looked for"))
    assert KINDS["weights"].find("awp") is rf.awp
