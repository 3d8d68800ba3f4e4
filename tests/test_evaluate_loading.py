"""Models from elsewhere: weights, factories, programs; and files that must never run code."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile

import pytest
import torch
from evaluate_support import evaluate, held_out, trained
from torch import nn

from robustflat import models
from robustflat.errors import UserError
from robustflat.models import load_model


def small():
    return models.build("small_cnn", num_classes=10, in_channels=1, mean=(0.3,), std=(0.4,))


NAMED = {"num_classes": 10, "in_channels": 1}


def test_weights_of_a_named_model_with_and_without_its_normalisation(tmp_path):
    x, _ = held_out(4)
    model = small().eval()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    torch.save({"state_dict": model.net.state_dict()}, tmp_path / "net.pt")
    whole = load_model("small_cnn", tmp_path / "whole.pt", **NAMED)
    assert torch.equal(whole(x), model(x))
    assert not whole.training
    with pytest.raises(UserError, match="holds its own normalisation"):
        load_model("small_cnn", tmp_path / "whole.pt", **NAMED, normalise="none")
    with pytest.raises(UserError, match=r"--normalise none if it does.*--normalise data"):
        load_model("small_cnn", tmp_path / "net.pt", **NAMED)
    net = load_model("small_cnn", tmp_path / "net.pt", **NAMED, normalise=((0.3,), (0.4,)))
    assert torch.equal(net(x), model(x))
    bare = load_model("small_cnn", tmp_path / "net.pt", **NAMED, normalise="none")
    assert torch.equal(bare(x), model.net(x))
    with pytest.raises(UserError, match="do not fit the model"):
        load_model("mlp", tmp_path / "whole.pt", **NAMED, image_size=(8, 8))
    with pytest.raises(UserError, match="has no weights"):
        load_model("small_cnn", **NAMED)
    with pytest.raises(UserError, match="needs num_classes"):
        load_model("small_cnn", tmp_path / "whole.pt")
    with pytest.raises(UserError, match="no file"):
        load_model("small_cnn", tmp_path / "absent.pt", **NAMED)
    with pytest.raises(UserError, match="no file"):
        load_model("absent.pt")


def test_a_factory_of_ones_own_as_robustbench_models_are(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\n"
        "def zoo(num_classes):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "    nn.init.eye_(net[1].weight), nn.init.zeros_(net[1].bias)\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model("mymodels:zoo", num_classes=10, normalise="none")
    result = evaluate(model, held_out(8), ["fgsm"], sanity=0)
    assert result.count == 8
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = load_model("mymodels:zoo", tmp_path / "w.pt", num_classes=10, normalise="none")
    x, _ = held_out(3)
    assert torch.equal(again(x), model(x))
    sys.modules.pop("mymodels", None)


def test_a_factory_keeps_the_normalisation_that_it_made(tmp_path, monkeypatch):
    (tmp_path / "behind.py").write_text(
        "import torch\n"
        "from robustflat import models\n"
        "def made():\n"
        "    torch.manual_seed(7)\n"
        "    known = {'num_classes': 10, 'in_channels': 1, 'mean': (0.3,), 'std': (0.4,)}\n"
        "    return models.build('small_cnn', **known)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = small().eval()
    x, _ = held_out(4)
    torch.save(model.net.state_dict(), tmp_path / "net.pt")
    for weights in (None, tmp_path / "net.pt"):
        assert torch.equal(load_model("behind:made", weights, **NAMED)(x), model(x))
        with pytest.raises(UserError, match="holds its own normalisation"):
            load_model("behind:made", weights, **NAMED, normalise="none")
    # What the option `normalize` puts in front is not the factory's.
    options = {"normalize": True}
    twice = load_model("behind:made", **NAMED, options=options)
    assert torch.equal(twice(x), model(x))
    sys.modules.pop("behind", None)


def test_timm_by_name(tmp_path):
    pytest.importorskip("timm")
    name = "timm:test_resnet"
    made = models.build(name, num_classes=3, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    torch.save(made.net.state_dict(), tmp_path / "w.pt")
    model = load_model(name, tmp_path / "w.pt", num_classes=3, normalise=((0.5,) * 3, (0.2,) * 3))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), made(x))


@pytest.mark.parametrize("kind", ["script", "trace", "export", "export-dynamic"])
def test_programs_are_evaluated_like_the_model_they_were_made_of(kind, tmp_path):
    model, (x, y) = trained(), held_out(7)
    path = tmp_path / "program.pt2"
    if kind.startswith("export"):
        shapes = ({0: torch.export.Dim("n", min=1)},) if kind.endswith("dynamic") else None
        torch.export.save(torch.export.export(model, (x[:4],), dynamic_shapes=shapes), path)
    else:
        program = _quiet(torch.jit.script, model) if kind == "script" else _traced(model, x[:4])
        _quiet(program.save, str(path))
    with pytest.raises(UserError, match="trust=True"):
        load_model(str(path))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="is a file; to load the weights"):
        load_model(str(path), tmp_path / "w.pt", trust=True, normalise="none")
    program = load_model(str(path), trust=True, normalise="none")
    torch.testing.assert_close(program(x), model(x))
    attacks = ["pgd-3", "torchattacks:FGSM"]
    wanted = evaluate(model, (x, y), attacks, eps=0.3, batch_size=6, sanity=0)
    found = evaluate(program, (x, y), attacks, eps=0.3, batch_size=6, sanity=2)
    assert found.robust_accuracy == wanted.robust_accuracy < wanted.clean_accuracy
    assert all(p.requires_grad for p in program.parameters())


def _traced(model, x):
    return _quiet(torch.jit.trace, model, x)


def _quiet(function, *arguments):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_hostile_damaged_and_foreign_files_are_one_sentence_and_run_nothing(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"state_dict": Hostile(trap)}, tmp_path / "hostile.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile(trap)))
    torch.save(small().state_dict(), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not weights\n")
    torch.save(small(), tmp_path / "whole_model.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("hostile", "pickle", "short", "empty", "text", "whole_model", "tensor"):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(UserError) as raised:
            load_model("small_cnn", path, **NAMED)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(UserError, match=r"is no program\. If it holds weights"):
            load_model(str(path), trust=True)
    assert not trap.exists()


def test_a_damaged_program_is_one_sentence(tmp_path):
    for name in ("code/__torch__.py", "models/model.json"):
        path = tmp_path / "program.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"program/{name}", "nonsense")
        with pytest.raises(UserError, match="cannot be loaded") as raised:
            load_model(str(path), trust=True)
        assert "\n" not in str(raised.value)
        with pytest.raises(UserError, match="is a program: mend the path"):
            load_model("small_cnn", path, **NAMED)


def test_a_program_for_one_batch_size_takes_any():
    from robustflat.models.loading import FixedBatch

    class OnlyFour(nn.Module):
        def forward(self, x):
            assert len(x) == 4
            return x.flatten(1) * 2

    model = FixedBatch(OnlyFour(), 4)
    for count in (1, 3, 4, 5, 8, 9):
        x = torch.rand(count, 1, 2, 2)
        assert torch.equal(model(x), x.flatten(1) * 2)
