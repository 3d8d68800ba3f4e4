"""Public networks: their names, wrappers and logits; and what is said of those that do not fit."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from reference import zoo
from torch import nn

from robustflat import models
from robustflat.elsewhere import Elsewhere
from robustflat.errors import UserError
from robustflat.models import load_model
from robustflat.models.likely import likely
from robustflat.subject import open_subject

BLOCKS = (2, 1)
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
CASES = {
    "resnet18": (
        zoo.resnet_state(4, BLOCKS, 2, 7),
        lambda p, x: zoo.resnet(p, x, BLOCKS, 2),
    ),
    "resnet50": (
        zoo.resnet_state(4, BLOCKS, 3, 7),
        lambda p, x: zoo.resnet(p, x, BLOCKS, 3),
    ),
    "preact_resnet18_silu": (
        zoo.gowal_preact_state(4, BLOCKS, 7),
        lambda p, x: zoo.gowal_preact(p, x, BLOCKS),
    ),
}


def built(name, classes=7, channels=3, **options):
    return models.build(name, num_classes=classes, in_channels=channels, mean=(0.0,) * channels,
                        std=(1.0,) * channels, options=options).eval()  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_public_state_dicts_compute_what_their_network_did(name):
    state, forward = CASES[name]
    model = built(name, width=4, blocks=list(BLOCKS)).double()
    assert models.load_state(model, state) == "net"
    x = torch.rand(3, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(model.net(x), forward(state, x), rtol=1e-10, atol=1e-10)


def test_full_sizes_are_the_published_ones():
    for name, count in (("resnet18", 11_173_962), ("resnet50", 23_520_842),
                        ("preact_resnet18_silu", 12_548_426)):  # fmt: skip
        with torch.device("meta"):
            model = built(name, 10)
        assert sum(p.numel() for p in model.parameters()) == count


def wrapped(state, kind):
    """The same weights and normalisation as each publisher saves them."""

    def under(prefix, **statistics):
        return {prefix + key: value for key, value in state.items()} | statistics

    column = {"mean": MEAN.view(1, 3, 1, 1), "std": STD.view(3, 1, 1)}
    return {
        "robustbench": lambda: {"state_dict": under(
            "module.model.", **{f"module.normalize.{k}": v for k, v in column.items()})},
        "robustbench-mu": lambda: under("", mu=column["mean"], sigma=column["std"]),
        "sequential": lambda: {"net": under("module.1.", **{
            "module.0.mean": MEAN, "module.0.std": STD})},
        "mair": lambda: {"rmodel": under(
            "model.", mean=MEAN, std=STD, n_classes=torch.tensor(7)), "curr_epoch": 3},
        "mair-inside": lambda: {"rmodel": under("model.module.1.", **{
            "model.module.0.mean": MEAN, "model.module.0.std": STD,
            "n_classes": torch.tensor(7)})},
        "madry": lambda: {"model": under("module.model.")
                          | {"module.attacker.model." + k: v + 1 for k, v in state.items()}
                          | {"module.normalizer.new_mean": MEAN.view(3, 1, 1),
                             "module.normalizer.new_std": STD.view(3, 1, 1),
                             "module.attacker.normalize.new_mean": MEAN + 1}, "epoch": 7},
        "ours": lambda: under("net.", **{"normalize.mean": column["std"] * 0 + MEAN.view(3, 1, 1),
                                         "normalize.std": column["std"]}),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["robustbench", "robustbench-mu", "sequential", "mair", "mair-inside", "madry", "ours"]
)
def test_every_wrapper_brings_its_normalisation(kind, tmp_path):
    state, forward = CASES["resnet18"]
    torch.save(wrapped(state, kind), tmp_path / "w.pt")
    options = {"width": 4, "blocks": list(BLOCKS)}
    model = load_model("resnet18", tmp_path / "w.pt", num_classes=7, options=options)
    x = torch.rand(3, 3, 8, 8)
    theirs = forward(state, (x.double() - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    torch.testing.assert_close(model(x).double(), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="holds its own normalisation"):
        load_model("resnet18", tmp_path / "w.pt", num_classes=7, options=options, normalise="none")


def test_a_wrapper_without_normalisation_leaves_it_to_be_said(tmp_path):
    state, _ = CASES["resnet18"]
    torch.save({"state_dict": {"module.0." + k: v for k, v in state.items()}}, tmp_path / "w.pt")
    options = {"width": 4, "blocks": list(BLOCKS)}
    with pytest.raises(UserError, match="say --normalise none"):
        load_model("resnet18", tmp_path / "w.pt", num_classes=7, options=options)
    assert load_model("resnet18", tmp_path / "w.pt", num_classes=7, options=options,
                      normalise="none")  # fmt: skip


def test_a_network_of_ones_own_keeps_its_mean_and_std():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("std", torch.ones(3))
            self.linear = nn.Linear(2, 2)

    saved = Own()
    saved.mean += 0.25
    for own in (Own(), models.Normalized(Own(), (0.0,) * 3, (1.0,) * 3)):
        models.load_state(own, {"module." + k: v for k, v in saved.state_dict().items()})
        assert float(getattr(own, "net", own).mean[0]) == 0.25


def test_statistics_of_other_images_are_refused_and_nothing_is_loaded():
    state, _ = CASES["resnet18"]
    model = built("resnet18", width=4, blocks=list(BLOCKS))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="normalisation of 1 channels, and the images have 3"):
        models.load_state(model, state | {"mean": MEAN[:1], "std": STD[:1]})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


LIKELY = ("preact_resnet18", "resnet18", "resnet50", "wrn-28-10", "wrn-34-20", "wrn-70-16")


@pytest.mark.parametrize("name", LIKELY)
def test_the_likely_network_is_recognised_by_its_parameters(name):
    with torch.device("meta"):
        state = built(name, 100).net.state_dict()
        assert likely({"state_dict": {"module." + k: v for k, v in state.items()}}) == name
        assert likely({k: v for k, v in state.items() if "layer" not in k}) is None
        assert likely({**state, "more.weight": torch.zeros(1)}) is None


def test_a_network_of_another_width_is_not_taken_for_the_public_one():
    assert likely(built("resnet18", width=4).net.state_dict()) is None


def test_public_names_of_gowal_are_recognised_too():
    names = {
        r"^conv1\.": "init_conv.",
        r"^block(\d)\.layer": r"block\1.block",
        r"^bn1": "batchnorm",
        "^fc": "logits",
        r"\.bn(\d)": r".batchnorm_\1",
        r"\.conv(\d)": r".conv_\1",
        "convShortcut": "shortcut",
    }
    with torch.device("meta"):
        state = built("wrn-16-2-silu").net.state_dict()
    for ours, public in names.items():
        state = {re.sub(ours, public, key): value for key, value in state.items()}
    # They count from 0.
    less = lambda found: found[1] + str(int(found[2]) - 1)  # noqa: E731
    for numbered in (r"^(block)(\d)", r"(batchnorm_)(\d)", r"(conv_)(\d)"):
        state = {re.sub(numbered, less, key): value for key, value in state.items()}
    state = {re.sub(r"^block(\d)", r"layer.\1", key): value for key, value in state.items()}
    assert "layer.2.block.1.batchnorm_0.weight" in state
    assert likely(state) == "wrn-16-2-silu"


def test_what_does_not_fit_is_told_with_its_first_names_and_the_likely_network(tmp_path):
    state = built("wrn-10-1", 7).net.state_dict()
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    for wrong in ("resnet18", "wrn-16-1"):
        with pytest.raises(UserError) as raised:
            load_model(wrong, tmp_path / "w.pt", num_classes=7, normalise="none")
        text = str(raised.value)
        assert "missing (first " in text
        assert text.endswith("They look like the weights of wrn-10-1.")
        assert "\n" not in text
    with pytest.raises(UserError) as raised:
        load_model("wrn-10-1", tmp_path / "w.pt", num_classes=10, normalise="none")
    assert "2 of another shape (first fc.weight: the file has [7, 64]" in str(raised.value)
    assert "look like" not in str(raised.value)
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(UserError) as raised:
        load_model("wrn-10-1", tmp_path / "w.pt", num_classes=10, normalise="none")
    assert "1 unexpected (first other.weight)" in str(raised.value)
    assert "look like" not in str(raised.value)


# --- RobustBench, whose package is stood in for


@pytest.fixture
def bench(monkeypatch, tmp_path):
    asked = []

    def load(model_name, model_dir, dataset, threat_model):
        asked.append((model_name, model_dir, dataset, threat_model))
        if model_name == "Unknown":
            raise KeyError(model_name)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()

    package, utils = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils")
    utils.load_model = load
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    monkeypatch.chdir(tmp_path)
    held = {
        "models/cifar10/Linf": ["Some2024", "Many2020_m0", "Unknown"],
        "elsewhere/cifar100/L2": ["Some2024"],
    }
    for folder, names in held.items():
        Path(folder).mkdir(parents=True)
        for name in names:
            Path(folder, f"{name}.pt").touch()
    return asked


def test_robustbench_by_name(bench):
    model = load_model("robustbench:Some2024", num_classes=10)
    assert bench == [("Some2024", "models", "cifar10", "Linf")]
    assert not any(module.training for module in model.modules())
    load_model("robustbench:Many2020", num_classes=10, normalise="none")
    options = {"model_dir": "elsewhere", "dataset": "cifar100", "threat_model": "L2"}
    load_model("robustbench:Some2024", options=options)
    assert bench[1:] == [("Many2020", "models", "cifar10", "Linf"),
                         ("Some2024", "elsewhere", "cifar100", "L2")]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("Absent", {}, "models/cifar10/Linf/Absent.pt, and nothing is downloaded unasked"),
        ("Some2024", {"options": {"dataset": "cifar100"}}, "models/cifar100/Linf/Some2024.pt"),
        ("Some2024", {"options": {"norm": "L2"}}, "no option 'norm'.*threat_model"),
        ("Some2024", {"normalise": ((0.5,) * 3, (0.5,) * 3)}, "brings its own weights and norm"),
        ("Some2024", {"weights": "models/cifar10/Linf/Some2024.pt"}, "name neither a file of"),
        ("Unknown", {}, "Is it a model of cifar10 and Linf"),
    ],
)
def test_what_robustbench_has_not_is_a_sentence(bench, name, arguments, words):
    with pytest.raises(UserError, match=words):
        load_model(f"robustbench:{name}", **arguments)
    assert [one[0] for one in bench] == (["Unknown"] if name == "Unknown" else [])


def test_robustbench_missing_is_a_sentence(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(UserError, match=r"could not be imported.*with their architecture as --mod"):
        load_model("robustbench:Some2024")


def test_robustbench_that_wants_old_setuptools_says_so(bench, monkeypatch, tmp_path):
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").touch()
    (tmp_path / "robustbench" / "utils.py").write_text("import pkg_resources")
    for name in ("robustbench", "robustbench.utils"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    with pytest.raises(UserError, match=r"pip install 'setuptools<81'; or name the file"):
        load_model("robustbench:Some2024")


def test_robustbench_is_a_subject(bench):
    said = Elsewhere(data="digits")
    subject = open_subject("robustbench:Some2024", norm="linf", eps=0.1, device="cpu",
                           elsewhere=said)  # fmt: skip
    x, _ = subject.tensors("test", 3)
    assert subject.network().model(x).shape == (3, 10)
    assert subject.home.root == Path("evaluations/robustbench-Some2024")
