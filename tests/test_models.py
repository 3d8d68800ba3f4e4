"""Models: published sizes and names, normalisation, loading of foreign weights, refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import robustflat.models as rm
from robustflat.errors import UserError

STATS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def make(name, num_classes=10, channels=3, image_size=None, **options):
    return rm.build(
        name,
        num_classes=num_classes,
        in_channels=channels,
        mean=STATS["mean"][:channels],
        std=STATS["std"][:channels],
        image_size=image_size,
        options=options,
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


TINY = [
    ("small_cnn", {"width": 4}),
    ("small_cnn", {"width": 4, "depth": 2, "batch_norm": False}),
    ("mlp", {"image_size": (8, 8), "hidden": [6]}),
    ("preact_resnet18", {"width": 4, "blocks": [1, 1]}),
    ("preact_resnet18", {"width": 2}),
    ("wide_resnet", {"depth": 10, "widen": 1, "dropout": 0.3}),
    ("wide_resnet_silu", {"depth": 10, "widen": 1}),
    ("wide_resnet_silu", {"depth": 10, "widen": 1}),
    ("wrn-16-2-silu", {"widen": 1}),
]


@pytest.mark.parametrize(
    ("name", "options", "classes", "expected"),
    [
        # WRN-34-10, without the unused stage of TRADES' code: 46.16 million in the literature.
        ("wide_resnet", {}, 10, 46_160_474),
        # WRN-28-10: 36.48 million at 10 classes in Zagoruyko & Komodakis (36.5M, table 5).
        ("wide_resnet", {"depth": 28}, 10, 36_479_194),
        ("wide_resnet", {"depth": 16, "widen": 4}, 10, 2_748_890),
        ("wrn-34-10", {}, 10, 46_160_474),
        ("wrn-16-4", {}, 10, 2_748_890),
        ("wrn-34-10", {"depth": 16, "widen": 4}, 10, 2_748_890),
        ("wide_resnet_silu", {}, 10, 36_479_194),
        ("wrn-28-10-silu", {}, 10, 36_479_194),
        # Gowal et al. 2020 give 267 million for WRN-70-16.
        ("wrn-70-16-silu", {}, 10, 266_796_506),
        # kuangliu's PreActResNet18 has 11,171,146; Rice et al. add a last BatchNorm of 2 x 512.
        ("preact_resnet18", {}, 10, 11_171_146 + 2 * 512),
        ("preact_resnet18", {}, 100, 11_171_146 + 2 * 512 + 90 * 513),
    ],
)
def test_published_sizes(name, options, classes, expected):
    with torch.device("meta"):
        assert count(make(name, classes, **options)) == expected


def test_every_built_in_model_is_had_by_its_name_without_normalisation():
    for name, factory in rm.MODELS.items():
        assert getattr(rm, name) is factory


def test_public_parameter_names():
    with torch.device("meta"):
        preact = set(make("preact_resnet18").net.state_dict())
        wide = set(make("wide_resnet").net.state_dict())
    for layer in range(1, 5):
        for block in range(2):
            for part in ("bn1", "conv1", "bn2", "conv2"):
                assert f"layer{layer}.{block}.{part}.weight" in preact
    shortcuts = {key for key in preact if "shortcut" in key}
    assert shortcuts == {f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)}
    assert {"conv1.weight", "bn.running_mean", "linear.bias"} <= preact
    assert {"conv1.weight", "bn1.running_mean", "fc.bias"} <= wide
    shortcuts = {key for key in wide if "Shortcut" in key}
    assert shortcuts == {f"block{i}.layer.0.convShortcut.weight" for i in (1, 2, 3)}
    assert "block3.layer.4.conv2.weight" in wide
    assert "block3.layer.5.conv2.weight" not in wide


@pytest.mark.parametrize(("name", "options"), TINY)
@pytest.mark.parametrize("channels", [1, 3])
def test_models_take_any_size_and_train(name, options, channels):
    for side in (8, 28, 32):
        if name == "mlp":
            options = options | {"image_size": (side, side)}
        model = make(name, 7, channels, **options)
        logits = model(torch.rand(3, channels, side, side))
        assert logits.shape == (3, 7)
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), TINY)
def test_models_run_on_meta_under_autocast_and_in_other_types(name, options):
    with torch.device("meta"):
        model = make(name, **options)
    assert model(torch.empty(2, 3, 8, 8, device="meta")).device.type == "meta"

    model = make(name, **options).eval()
    x = torch.rand(2, 3, 8, 8)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), plain, atol=0.1)
    double = model.double()
    assert double(x).dtype == torch.float64
    assert torch.allclose(double(x).float(), plain, atol=1e-4)
    assert model.bfloat16()(x).dtype == torch.bfloat16


def test_normalisation_is_the_first_layer_and_per_channel():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)

    model = rm.Normalized(Probe(), STATS["mean"], STATS["std"])
    x = torch.rand(2, 3, 4, 4)
    model(x)
    for c in range(3):
        expected = (x[:, c] - STATS["mean"][c]) / STATS["std"][c]
        assert torch.allclose(seen[0][:, c], expected)
    assert set(model.state_dict()) == {"normalize.mean", "normalize.std"}
    assert list(model.parameters()) == []


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.0,), "must be positive"),
        ((0.5,), (float("nan"),), "must be positive"),
        ((float("inf"),), (1.0,), "finite"),
        ((0.5, 0.5), (1.0,), "2 means and 1 stds"),
        ((), (), "one mean"),
    ],
)
def test_impossible_statistics_are_refused(mean, std, message):
    with pytest.raises(UserError, match=message):
        rm.Normalize(mean, std)


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (7, 7), (5, 2), (3, 8)])
def test_the_2x2_pooling_is_the_adaptive_one(size):
    model = rm.MODELS["small_cnn"](num_classes=8, in_channels=2, width=1, depth=2, batch_norm=False)
    model.features = nn.Identity()
    model.linear = nn.Identity()
    x = torch.rand(3, 2, *size)
    expected = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_blocks_follow_their_formula():
    # He et al. 2016: y = W2 relu(bn2(W1 relu(bn1(x)))) + shortcut, written out with functions.
    torch.manual_seed(0)
    functional = nn.functional

    def norm(bn, h):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (h - bn.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)

    for name, options, stages, last, short in (
        ("preact_resnet18", {"width": 3, "blocks": [2, 1]}, ("layer1", "layer2"), "bn", "shortcut"),
        (
            "wide_resnet",
            {"depth": 10, "widen": 2},
            ("block1.layer", "block2.layer", "block3.layer"),
            "bn1",
            "convShortcut",
        ),
    ):
        net = make(name, **options).net.double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.running_mean, module.running_var, module.weight, module.bias):
                    nn.init.uniform_(value, 0.5, 1.5)
        x = torch.rand(2, 3, 8, 8).double()
        h = functional.conv2d(x, net.conv1.weight, padding=1)
        for level, stage in enumerate(stages):
            for i, block in enumerate(net.get_submodule(stage)):
                stride = 2 if level > 0 and i == 0 else 1
                a = norm(block.bn1, h).relu()
                weight = [v for k, v in block.named_parameters() if k.startswith(short)]
                side = functional.conv2d(a, weight[0], stride=stride) if weight else h
                a = functional.conv2d(a, block.conv1.weight, stride=stride, padding=1)
                a = norm(block.bn2, a).relu()
                h = functional.conv2d(a, block.conv2.weight, padding=1) + side
        h = norm(getattr(net, last), h).relu().mean((2, 3))
        head = net.linear if last == "bn" else net.fc
        assert torch.allclose(net(x), h @ head.weight.T + head.bias, atol=1e-10)


def gowal_state(seed: int) -> dict[str, torch.Tensor]:
    """A WRN-16-2 under the names of the public checkpoints of Gowal et al. and their successors."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.rand(channels, generator=g) + 0.5

    def conv(name: str, *shape: int) -> None:
        # So small that no activation is in the tail where SiLU is ReLU.
        scale = torch.tensor(shape[1:]).prod().sqrt()
        state[f"{name}.weight"] = torch.randn(shape, generator=g) / scale

    conv("init_conv", 16, 3, 3, 3)
    channels = 16
    for group, out in enumerate((32, 64, 128)):
        for block in range(2):
            at = f"layer.{group}.block.{block}"
            norm(f"{at}.batchnorm_0", channels)
            conv(f"{at}.conv_0", out, channels, 3, 3)
            norm(f"{at}.batchnorm_1", out)
            conv(f"{at}.conv_1", out, out, 3, 3)
            if channels != out:
                conv(f"{at}.shortcut", out, channels, 1, 1)
            channels = out
    norm("batchnorm", channels)
    state["logits.weight"] = torch.randn(10, channels, generator=g)
    state["logits.bias"] = torch.randn(10, generator=g)
    return state


def gowal_forward(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Their forward pass, written with functions: "SAME" padding pads after where it must."""
    functional = nn.functional

    def norm(name, h):
        mean, var, w, b = (
            p[f"{name}.{k}"][:, None, None]
            for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / (var + 1e-5).sqrt() * w + b

    def swish(h):
        return h * torch.sigmoid(h)

    h = functional.conv2d(x, p["init_conv.weight"], padding=1)
    for group in range(3):
        for block in range(2):
            at = f"layer.{group}.block.{block}"
            a = swish(norm(f"{at}.batchnorm_0", h))
            stride = 2 if group and not block else 1
            side = h
            if f"{at}.shortcut.weight" in p:
                side = functional.conv2d(a, p[f"{at}.shortcut.weight"], stride=stride)
            a = functional.pad(a, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            a = functional.conv2d(a, p[f"{at}.conv_0.weight"], stride=stride)
            a = swish(norm(f"{at}.batchnorm_1", a))
            h = functional.conv2d(a, p[f"{at}.conv_1.weight"], padding=1) + side
    h = swish(norm("batchnorm", h)).mean((2, 3))
    return h @ p["logits.weight"].T + p["logits.bias"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_public_silu_networks_are_loaded_and_computed_alike(prefix):
    state = gowal_state(0)
    saved = {prefix + k: v for k, v in state.items()}
    model = make("wrn-16-2-silu")
    assert rm.load_state(model, {"model_state_dict": saved, "unaveraged_model_state_dict": {}})
    model.double().eval()
    x = torch.rand(3, 3, 16, 16).double()
    normalised = (x - model.normalize.mean) / model.normalize.std
    theirs = gowal_forward({k: v.double() for k, v in state.items()}, normalised)
    torch.testing.assert_close(model(x), theirs, rtol=1e-10, atol=1e-10)
    # With ReLU it is another function of the same parameters.
    other = make("wrn-16-2")
    rm.load_state(other, saved)
    assert not torch.allclose(other.double().eval()(x), theirs, atol=1e-3)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}
    assert {m.momentum for m in other.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_silu_is_trained_through():
    model = make("wrn-10-1-silu")
    x = torch.rand(2, 3, 8, 8)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dropout_acts_in_training_only():
    model = make("wide_resnet", depth=10, widen=1, dropout=0.5)
    x = torch.rand(4, 3, 8, 8)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wide_resnt", {}, "Did you mean 'wide_resnet'"),
        ("small_cnn", {"witdh": 3}, "no option 'witdh'.*batch_norm, depth, width"),
        ("small_cnn", {"width": 0}, "width must be a whole number of at least 1, got 0"),
        ("small_cnn", {"width": True}, "width"),
        ("small_cnn", {"depth": 4}, "depth must be 2 or 3"),
        ("small_cnn", {"batch_norm": "no"}, "true or false"),
        ("mlp", {}, "needs the option image_size"),
        ("mlp", {"image_size": (8, 8), "hidden": [0]}, "hidden"),
        ("preact_resnet18", {"blocks": 3}, "list the number of blocks"),
        ("preact_resnet18", {"blocks": []}, "list the number of blocks"),
        ("wide_resnet", {"depth": 30}, "6 n \\+ 4"),
        ("wide_resnet", {"dropout": 1.0}, "below 1"),
        ("wide_resnet", {"activation": "silu"}, "no option 'activation'"),
        ("wrn-27-10", {}, "wide_resnet: the option depth must be 6 n"),
        ("wrn-27-10-silu", {}, "wide_resnet_silu: the option depth must be 6 n"),
        ("wide_resnet_silu", {"widen": 0}, "wide_resnet_silu.*widen"),
        ("wrn-28-10-swish", {}, "Unknown model 'wrn-28-10-swish'"),
        (":factory", {}, "package.module:f"),
        ("no_such_module:factory", {}, "no_such_module, which could not be imported"),
        ("torch.nn:Linea", {}, "no 'Linea'. Did you mean.*Linear"),
        ("math:pi", {}, "not callable"),
        ("builtins:dict", {}, "cannot be called|must return a torch.nn.Module, got dict"),
    ],
)
def test_bad_names_and_options_get_a_sentence(name, options, message):
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="at least 2 classes"):
        make("small_cnn", 1)
    with pytest.raises(UserError, match="1 channels but the images have 3"):
        rm.build("small_cnn", num_classes=2, in_channels=3, mean=(0.5,), std=(0.5,))


def test_a_factory_in_the_current_directory_gets_what_it_accepts(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def plain(num_classes, hidden=3):\n"
        "    net = nn.Linear(hidden, num_classes); return net\n"
        "def both(*, num_classes, in_channels):\n"
        "    return nn.Conv2d(in_channels, num_classes, 1)\n"
        "def everything(**options):\n"
        "    net = nn.Identity(); net.options = options; return net\n"
        "def broken(num_classes):\n"
        "    raise RuntimeError('no weights here')\n"
        "def none(num_classes):\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    plain = make("my_models:plain", 4, hidden=5)
    assert isinstance(plain, nn.Linear)
    assert plain.weight.shape == (4, 5)
    wrapped = make("my_models:both", 4, normalize=True)
    assert isinstance(wrapped, rm.Normalized)
    assert wrapped.net.weight.shape == (4, 3, 1, 1)
    # What **options would take is not known: torchvision's fail on in_channels.
    everything = make("my_models:everything", 4, extra=1)
    assert everything.options == {"extra": 1}
    told = {"num_classes": 7}
    given = {"num_classes": 4, "in_channels": 1, "mean": (0.5,), "std": (0.5,), "options": told}
    assert rm.build("my_models:everything", **given).options == told
    assert rm.build("my_models:plain", **given).weight.shape == (7, 3)
    # Of the package's own models the images decide that; no key may end in a traceback.
    for key in ("num_classes", "in_channels", "image_size", "mean", "std", "name", "options"):
        for name in ("small_cnn", "mlp", "preact_resnet18", "wide_resnet"):
            with pytest.raises(UserError, match=f"no option '{key}'"):
                rm.build(name, **given | {"options": {key: 0}})
    for name, options, message in (
        ("my_models:plain", {"hiden": 5}, "no option 'hiden'.*hidden"),
        ("my_models:broken", {}, "RuntimeError: no weights here"),
        ("my_models:none", {}, "must return a torch.nn.Module, got int"),
        ("my_models:plan", {}, "Did you mean 'plain'"),
    ):
        with pytest.raises(UserError, match=message):
            make(name, **options)
    assert sys.path == before
    monkeypatch.delitem(sys.modules, "my_models")


def test_timm_models():
    pytest.importorskip("timm")
    model = make("timm:resnet10t", 5, 1)
    assert isinstance(model, rm.Normalized)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(UserError, match=r"timm has no model 'resnet10tt'.*'resnet10t'"):
        make("timm:resnet10tt")
    with pytest.raises(UserError, match="timm:resnet10t could not be made"):
        make("timm:resnet10t", no_such_option=3)
    for key in ("num_classes", "in_chans", "model_name"):
        with pytest.raises(UserError, match=r"no option|could not be made"):
            rm.build(
                "timm:resnet10t",
                num_classes=5,
                in_channels=1,
                mean=(0.5,),
                std=(0.5,),
                options={key: 3},
            )


@pytest.mark.parametrize(
    ("pretrained", "channels", "ours"), [(True, 3, False), (True, 1, True), (False, 3, True)]
)
def test_a_pretrained_network_keeps_the_normalisation_it_was_trained_with(
    tmp_path, pretrained, channels, ours
):
    timm = pytest.importorskip("timm")
    published = timm.create_model("test_resnet")
    torch.save(published.state_dict(), tmp_path / "published.pt")
    own = {"mean": (0.6, 0.5, 0.4), "std": (0.3, 0.2, 0.1)}
    where = {"file": str(tmp_path / "published.pt"), **own}
    model = make(
        "timm:test_resnet", 10, channels, pretrained=pretrained, pretrained_cfg_overlay=where
    )
    # What three channels were normalised by says nothing of one.
    expected = {k: torch.tensor(v[:channels]) for k, v in (STATS if ours else own).items()}
    assert torch.equal(model.normalize.mean.flatten(), expected["mean"])
    assert torch.equal(model.normalize.std.flatten(), expected["std"])
    same = torch.equal(model.net.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    assert same == pretrained


def test_timm_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"robustflat\[timm\]"):
        make("timm:resnet18")


# --- loading --------------------------------------------------------------------------------


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    (left, right) = (a.state_dict(), b.state_dict())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("part", ["whole", "net"])
def test_weights_from_elsewhere_are_loaded(wrapper, prefix, part):
    (source, target) = (make("preact_resnet18", width=2, blocks=[1, 1]) for _ in range(2))
    source.normalize.mean.fill_(0.123)
    state = (source if part == "whole" else source.net).state_dict()
    state = {prefix + key: value for key, value in state.items()}
    given = state if wrapper is None else {wrapper: state, "epoch": 3}
    assert rm.load_state(target, given) == part
    assert equal_states(source.net, target.net)
    loaded = target.normalize.mean[0, 0, 0].item()
    assert loaded == pytest.approx(0.123 if part == "whole" else STATS["mean"][0])


def test_models_without_normalisation_are_loaded_too():
    (source, target) = (nn.Linear(2, 3) for _ in range(2))
    assert rm.load_state(target, {"module.weight": source.weight, "module.bias": source.bias})
    assert equal_states(source, target)


def test_trades_unused_stage_and_absent_counters_are_no_obstacle():
    (source, target) = (make("wide_resnet", depth=10, widen=1) for _ in range(2))
    state = dict(source.net.state_dict())
    state |= {k.replace("block1", "sub_block1"): v for k, v in state.items() if "block1" in k}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert rm.load_state(target, state) == "net"
    assert equal_states(source, target)


def test_what_does_not_fit_is_named_and_nothing_is_loaded():
    model = make("preact_resnet18", width=2, blocks=[1, 1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = dict(make("preact_resnet18", width=2, blocks=[1, 1]).net.state_dict())

    def refuse(state, message):
        with pytest.raises(UserError, match=message):
            rm.load_state(model, state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    renamed = {k.replace("linear", "fc"): v for k, v in good.items()}
    refuse(renamed, r"2 missing \(first linear.weight\b.*2 unexpected \(first fc.weight\)")
    refuse(good | {"linear.weight": torch.zeros(5, 4)}, r"linear.weight: the file has \[5, 4\]")
    refuse({k: v for k, v in good.items() if k != "bn.weight"}, r"1 missing \(first bn.weight")
    refuse(good | {"epoch": 3}, "also holds 'epoch'")
    refuse({}, "it is empty")
    refuse({"model": nn.Linear(1, 1)}, "also holds 'model'")
    refuse([1], "got list")


@pytest.mark.parametrize(
    ("name", "options"), [*TINY, ("timm:test_resnet", {}), ("timm:test_vit", {})]
)
@pytest.mark.parametrize("classes", [3, 10])
def test_a_new_head_keeps_its_own_weights_and_loads_all_others(name, options, classes):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    source = make(name, 10, **options)
    torch.manual_seed(1)
    model = make(name, classes, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saved = {k: v + 1 for k, v in source.state_dict().items()}
    assert rm.load_state(model, {"model": saved}, new_head=True) == "whole"
    after = model.state_dict()
    kept = [k for k in after if torch.equal(after[k], before[k])]
    head = [k for k in after if k in kept and not k.endswith("num_batches_tracked")]
    assert [k.rpartition(".")[2] for k in head] == ["weight", "bias"]
    assert all(after[k].shape[0] == classes for k in head)
    assert all(torch.equal(after[k], saved[k]) for k in after if k not in kept)
    # What else is missing is told as ever, and the head's own absence is none.
    for key in head:
        del saved[key]
    rm.load_state(model, saved, new_head=True)
    with pytest.raises(UserError, match="2 missing"):
        rm.load_state(model, saved)
    del saved[next(k for k in saved if k.endswith("weight"))]
    with pytest.raises(UserError, match="1 missing"):
        rm.load_state(model, saved, new_head=True)


def test_a_network_s_own_word_for_its_head_counts():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.after = nn.Linear(3, 2), nn.Linear(2, 2)

        def get_classifier(self):
            return self.head

    model, saved = Headed(), {k: v + 1 for k, v in Headed().state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rm.load_state(model, saved, new_head=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name.startswith("head") else saved)[name])
