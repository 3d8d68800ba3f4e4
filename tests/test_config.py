"""The configuration: every mistake is a placed sentence, and nothing in it is ever executed."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from train_support import BASE, values

from robustflat.config import ConfigError, RunConfig, check_config, read_config, write_config

MINIMAL = """\
name: a
attack: {name: pgd, eps: 8/255}
objective: {name: adversarial}
weights: {name: none}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def complaint(path: Path, text: str | None = None, *overrides: str) -> str:
    """The message that the configuration gets, its path shortened; it must get one."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path, overrides)
    message = str(caught.value)
    assert "Traceback" not in message
    assert message
    return message.replace(str(path), "FILE")


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        ("8 / 255", 8 / 255),
        ("2e-3", 0.002),
        ("2E-3", 0.002),
        ("1.5e+0/3", 0.5),
        ("'0.1'", 0.1),
        (".5", 0.5),
        ("1", 1.0),
        ("0", 0.0),
    ],
)
def test_numbers_in_all_their_spellings(file: Path, text: str, value: float) -> None:
    attack = read_config(file, [f"attack.eps={text}"]).attack
    assert attack.eps == value  # type: ignore[union-attr]
    assert isinstance(attack.eps, float)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "true",
        "yes",
        "'true'",
        "nan",
        ".nan",
        ".inf",
        "inf",
        "-.inf",
        "1e999",
        "1e999/1e999",
        "8/0",
        "8/255/2",
        "8//255",
        "eight",
        "''",
        "null",
        "[1]",
        "{a: 1}",
        "2020-01-01",
        "0x",
        "1 2",
        "__import__('os')",
        "1+1",
        "9" * 400,
        "-1",
        "-8/255",
    ],
)
def test_what_is_no_radius_is_refused(file: Path, text: str) -> None:
    message = complaint(file, None, f"attack.eps={text}")
    assert "1 problem" in message
    assert "attack.eps" in message


@pytest.mark.parametrize("key", ["train.epochs", "attack.steps", "seed", "data.augment.crop"])
@pytest.mark.parametrize("text", ["true", "2.5", "'3'", "-1", ".inf", ".nan", "8/4", "null", "[3]"])
def test_whole_numbers_are_whole(file: Path, key: str, text: str) -> None:
    assert key in complaint(file, None, f"{key}={text}")


@pytest.mark.parametrize(
    ("text", "value"),
    [("linf", "linf"), ("L2", "l2"), (".inf", "linf"), ("2", 2.0), ("1.5", 1.5), ("3/2", 1.5)],
)
def test_norms(file: Path, text: str, value: object) -> None:
    weights = read_config(file, [f"weights={{name: sam, rho: 0.1, norm: {text}}}"]).weights
    assert weights.norm == value  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["l3", "0.5", "-1", "true", ".nan", "null", "[2]", "9" * 400])
def test_what_is_no_norm_is_refused(file: Path, text: str) -> None:
    assert "norm" in complaint(file, None, f"weights={{name: sam, rho: 0.1, norm: {text}}}")


# --- mistakes, with their places

CHECKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": (
        MINIMAL + "train:\n  epoch: 3\n",
        ("FILE:6:3:", "train.epoch is not a known key (got 3)", "Did you mean 'epochs'"),
    ),
    "unknown key far from any": (MINIMAL + "zzz: 3\n", ("FILE:5:1:", "Valid keys:", "optimizer")),
    "unknown key of a method": (
        MINIMAL.replace("{name: none}", "{name: awp, gamma: 0.1, stepz: 2}"),
        ("FILE:4:34:", "weights.stepz", "Did you mean", "'steps'"),
    ),
    "gamma with none": (
        MINIMAL.replace("{name: none}", "{name: none, gamma: 0.1}"),
        ("FILE:4:23:", "weights.gamma is not a known key", "name"),
    ),
    "unknown method": (
        MINIMAL.replace("{name: none}", "{name: smm}"),
        ("FILE:4:11", "weights.name is unknown (got 'smm')", "Did you mean 'sam'"),
    ),
    "no method": (MINIMAL.replace("{name: none}", "{}"), ("weights.name is required",)),
    "method is no name": (MINIMAL.replace("{name: none}", "smm"), ("FILE:4:1", "weights", "'smm'")),
    "method is a number": (
        MINIMAL.replace("{name: none}", "3"),
        ("FILE:4:1", "weights must be", "3"),
    ),
    "method's name is a list": (
        MINIMAL.replace("{name: none}", "{name: [sam]}"),
        ("FILE:4:11", "weights.name must be a name"),
    ),
    "wrong type": (
        MINIMAL + "model:\n  name: 3\n  options: [1]\n",
        ("2 problems", "FILE:6:3:", "model.name", "string", "FILE:7:3:", "model.options"),
    ),
    "negative radius": (
        MINIMAL.replace("8/255", "-0.1"),
        ("FILE:2:21:", "attack.eps", "greater than or equal to 0", "-0.1"),
    ),
    "missing": ("seed: 1\n", ("1 problem", "name is required")),
    "missing in a method": (
        MINIMAL.replace("{name: none}", "{name: amp}"),
        ("FILE:4:1", "weights.epsilon is required"),
    ),
    "in a list": (
        MINIMAL + "schedule:\n  name: piecewise\n  milestones: [0.5, 2]\n",
        ("FILE:7:21:", "schedule.milestones.1"),
    ),
    "name with a path": (MINIMAL.replace("name: a\n", "name: ../a\n"), ("FILE:1:1:", "name")),
    "unknown in extra": (
        MINIMAL + "data:\n  extra: {path: x, fraction: 1}\n",
        ("FILE:6:20:", "data.extra.fraction"),
    ),
    "data that cannot be": (
        MINIMAL + "data:\n  augment: {crop: -1, cutout: true}\n  mix: {name: mixup, alpha: 0}\n"
        "  label_noise: {kind: random, rate: 1.1}\n",
        (
            "5 problems",
            "data.augment.crop",
            "data.augment.cutout must be a whole number",
            "data.mix.alpha",
            "data.label_noise.kind",
            "data.label_noise.rate",
        ),
    ),
    "warm-up as long as the run": (
        MINIMAL.replace("{name: none}", "{name: awp, gamma: 0.1, when: {from_epoch: 21}}"),
        ("FILE:4:41:", "weights.when.from_epoch is 21 of train.epochs 20", "never"),
    ),
    "a window that is empty": (
        MINIMAL.replace("{name: none}", "{name: awp, when: {from_epoch: 4, until_epoch: 3}}"),
        ("FILE:4:44:", "until_epoch", "never"),
    ),
    "schedule's warm-up as long as the run": (
        MINIMAL + "schedule: {name: cosine, warmup_epochs: 20}\n",
        ("schedule.warmup_epochs",),
    ),
    "chunk beyond the batch": (
        MINIMAL.replace("{name: none}", "{name: msam, chunk: 129, inner: {name: sam}}"),
        ("FILE:4:23:", "weights.chunk is 129", "128"),
    ),
    "mart of mixtures": (
        MINIMAL.replace("adversarial", "mart") + "data: {mix: {name: mixup}}\n",
        ("mart", "mixup"),
    ),
    "attack on mixtures with a loss of labels": (
        MINIMAL.replace("8/255", "8/255, loss: margin") + "data: {mix: {name: mixup}}\n",
        ("attack.loss", "margin", "mixup"),
    ),
    "no attack to train on": (
        MINIMAL.replace("{name: pgd, eps: 8/255}", "{name: none}"),
        ("adversarial", "attack is none"),
    ),
    "kl from zero": (
        MINIMAL.replace("adversarial", "trades").replace("8/255", "8/255, start: zero"),
        ("kl", "zero"),
    ),
    "reattack without attack": (
        (
            "name: a\nattack: {name: none}\nobjective: {name: standard}\n"
            "weights: {name: sam, rho: 0.1, step: {reattack: ascent}}\n"
        ),
        ("reattack", "nothing to attack"),
    ),
    "reattack of chunks": (
        MINIMAL.replace(
            "{name: none}", "{name: msam, chunk: 8, inner: sam, step: {reattack: descent}}"
        ),
        ("reattack", "msam"),
    ),
    "chunk and batches": (
        MINIMAL.replace(
            "{name: none}", "{name: msam, chunk: 8, inner: {name: nsam, batches: 2, inner: sam}}"
        ),
        ("weights", "contradict"),
    ),
    "chunk at perturbed": (
        MINIMAL.replace(
            "{name: none}", "{name: msam, chunk: 8, inner: sam, step: {at: perturbed}}"
        ),
        ("FILE:4:52:", "weights.step.at"),
    ),
    "examples of an objective without rows": (
        "name: a\nobjective: gkl\nweights: rwp\n",
        ("FILE:2:1:", "rwp chooses examples", "gkl is no mean of one loss a row"),
    ),
    "validation of nothing": (
        MINIMAL + "data: {validation_samples: 0}\n",
        ("validation_samples is 0", "monitor.every"),
    ),
    "a new head on new weights": (
        MINIMAL + "model: {head: new}\n",
        ("model.head is new", "no model.weights"),
    ),
    "patience without a look": (
        MINIMAL + "monitor: {every: 0}\ntrain: {patience: 3}\n",
        ("train.patience", "monitor.every is 0"),
    ),
    "patience without validation": (
        MINIMAL + "data: {validation_samples: 0}\ntrain: {patience: 3}\n",
        ("train.patience", "data.validation_samples"),
    ),
    "average that never starts": (
        MINIMAL + "train: {average: {name: swa, start_epoch: 20}}\n",
        ("train.average.start_epoch is 20",),
    ),
    "ema that never starts": (
        MINIMAL + "train: {average: {name: ema, start_epoch: 20}}\n",
        ("train.average.start_epoch is 20",),
    ),
    "nesterov without momentum": (
        MINIMAL + "optimizer: {name: sgd, momentum: 0, nesterov: true}\n",
        ("optimizer", "nesterov", "momentum"),
    ),
    "beta of one": (
        MINIMAL + "optimizer: {name: adamw, betas: [0.9, 1.0]}\n",
        ("optimizer.betas.1", "less than 1"),
    ),
    "smoothing of one": (
        MINIMAL.replace("{name: adversarial}", "{name: adversarial, label_smoothing: 1}"),
        ("label_smoothing",),
    ),
    "norm that the monitor cannot attack in": (
        MINIMAL.replace("{name: pgd, eps: 8/255}", "{name: fgsm, eps: 0.1, norm: 1.5}"),
        ("attack", "1.5"),
    ),
    "unknown scale": (
        MINIMAL.replace("{name: none}", "{name: custom, radius: 1, group: row, scale: two}"),
        ("weights", "scale", "'two'", "tensor_norm"),
    ),
    "pattern that is none": (
        MINIMAL.replace("{name: none}", "{name: sam, rho: 0.1, parameters: 're:['}"),
        ("weights", "re:["),
    ),
    "statistics that cannot be had": (
        MINIMAL.replace("{name: none}", "{name: random, gamma: 0.1, statistics: both}"),
        ("weights", "statistics"),
    ),
    "list": ("- a\n- b\n", ("FILE", "mapping", "a list")),
    "text": ("hello\n", ("mapping", "a str")),
    "empty": ("", ("mapping", "nothing")),
    "comment": ("# nothing\n", ("mapping", "nothing")),
    "syntax": ("a: b: c\n", ("FILE:1:5:", "not valid YAML")),
    "open bracket": ("a: [1,\n", ("FILE:2:1:", "not valid YAML")),
    "tab": ("a:\n\tb: 1\n", ("FILE:2:1:", "not valid YAML")),
    "null byte": ("\x00", ("FILE", "not valid YAML")),
    "two documents": (MINIMAL + "---\nb: 1\n", ("FILE", "not valid YAML", "document")),
    "duplicate": (MINIMAL + "seed: 1\nseed: 2\n", ("FILE:6:1:", "seed stands twice", "FILE:5:1")),
    "duplicate inside": (
        MINIMAL.replace("{name: pgd, eps: 8/255}", "{name: pgd, eps: 0.1, eps: 0.2}"),
        ("FILE:2:31:", "attack.eps stands twice"),
    ),
    "unhashable key": (MINIMAL + "? [1, 2]\n: 3\n", ("not valid YAML",)),
    "number as key": (MINIMAL + "1: 3\n", ("1",)),
    "nothing as key": (MINIMAL + "~: 3\n", ("FILE",)),
    "date as key": (MINIMAL + "2020-01-01: 3\n", ("FILE",)),
    # What YAML's own constructors stumble over, with errors of other kinds.
    "impossible date": (MINIMAL + "seed: 2020-13-45\n", ("FILE",)),
    "impossible whole number": (MINIMAL + "seed: !!int z\n", ("FILE",)),
    "impossible hexadecimal": (MINIMAL + "seed: 0x_\n", ("FILE",)),
    "impossible boolean": (MINIMAL + "seed: !!bool z\n", ("FILE",)),
    "impossible timestamp": (MINIMAL + "seed: !!timestamp z\n", ("FILE",)),
    "number of 5000 digits": (MINIMAL + f"seed: {'9' * 5000}\n", ("FILE",)),
    "deeply nested": ("[" * 1200, ("FILE", "nested too deeply")),
    "deeply nested mappings": (
        MINIMAL + "x:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 1100)),
        (),
    ),
    "contains itself": (MINIMAL + "data: &a {name: digits, augment: *a}\n", ("FILE",)),
    "list that contains itself": (MINIMAL + "data: &a [*a]\n", ("FILE",)),
}


@pytest.mark.parametrize("case", CHECKS)
def test_mistakes_are_told_with_their_place(file: Path, case: str) -> None:
    text, wanted = CHECKS[case]
    message = complaint(file, text)
    for part in wanted:
        assert part in message, message


def test_all_problems_of_a_file_are_told_together(file: Path) -> None:
    text = """\
name: a b
attack: {name: pgd, eps: -1, stepz: 3}
objective: {name: tradse}
weights: {name: awp, gamma: true}
train:
  epochs: 0
modle: {}
"""
    message = complaint(file, text)
    assert "7 problems" in message
    lines = message.splitlines()[1:]
    assert len(lines) == 7
    for place, key in [
        ("1:1", "name"),
        ("2:21", "attack.eps"),
        ("2:30", "attack.stepz"),
        ("3:13", "objective.name"),
        ("4:22", "weights.gamma"),
        ("6:3", "train.epochs"),
        ("7:1", "modle"),
    ]:
        assert any(f"FILE:{place}: {key}" in line for line in lines), (place, message)


def test_problems_between_sections_are_told_together(file: Path) -> None:
    message = complaint(
        file,
        MINIMAL.replace(
            "{name: none}", "{name: msam, chunk: 99, inner: sam, when: {from_epoch: 8}}"
        )
        + "train: {epochs: 5, batch_size: 8, average: {name: swa, start_epoch: 6}}\n"
        + "data: {validation_samples: 0}\n",
    )
    for part in ("FILE:4:23: weights.chunk", "from_epoch", "start_epoch", "validation_samples"):
        assert part in message


def test_a_duplicate_does_not_hide_another(file: Path) -> None:
    message = complaint(file, MINIMAL + "seed: 1\nseed: 2\nname: b\n")
    assert "seed stands twice" in message
    assert "name stands twice" in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no configuration file" in complaint(tmp_path / "none.yaml")
    assert "cannot be read" in complaint(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\x00\x01" * 50)
    assert "cannot be read" in complaint(binary)


def test_references_do_not_multiply(file: Path) -> None:
    # Seven lists, each of ten of the one before: ten million places if each were visited.
    lines = ["x0: &x0 [1, 2]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 8)]
    began = time.monotonic()
    message = complaint(file, MINIMAL + "\n".join(lines))
    assert "x7 is not a known key" in message
    assert time.monotonic() - began < 5


# --- nothing is executed

HOSTILE = [
    "!!python/object/apply:os.system ['touch {mark}']",
    "!!python/object/new:os.system ['touch {mark}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:builtins.open ['{mark}', 'w']",
    "!!python/tuple [1, 2]",
    "!unknown x",
]


@pytest.mark.parametrize("tag", HOSTILE)
def test_nothing_in_yaml_is_executed(file: Path, tmp_path: Path, tag: str) -> None:
    mark = tmp_path / "mark"
    hostile = tag.format(mark=mark)
    assert "not valid YAML" in complaint(file, MINIMAL + f"data: {hostile}\n")
    assert "not valid YAML" in complaint(file, MINIMAL, f"seed={hostile}")
    assert not mark.exists()


def test_texts_are_not_evaluated(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("executed"))
    for text in ("__import__('os').system('true')", "$(true)", "{{ 1 + 1 }}", "${HOME}"):
        assert read_config(file, [f'output="{text}"']).output == text
        complaint(file, None, f'attack.eps="{text}"')


# --- overrides


def test_overrides(file: Path) -> None:
    read = read_config(
        file,
        [
            "train.epochs=7",
            "weights={name: sam, rho: 0.1}",
            "weights.rho=0.2",
            "data.label_noise.rate=1/4",
            "output=a=b",
            "evaluate.attacks=[pgd-5]",
            "train.average={name: ema}",
        ],
    )
    assert read.train.epochs == 7
    assert read.weights.name == "sam"
    assert read.weights.rho == 0.2
    assert read.data.label_noise is not None
    assert read.data.label_noise.rate == 0.25
    assert read.output == "a=b"
    assert read.evaluate.attacks == ("pgd-5",)
    # The later one replaces the whole mapping, the former override within included.
    assert read_config(file, ["attack.steps=3", "attack={name: fgsm, eps: 0.1}"]).attack.name == (
        "fgsm"
    )


@pytest.mark.parametrize(
    "override",
    [
        "",
        "a",
        "=3",
        "a..b=3",
        ".a=3",
        "a.=3",
        "train.epochs",
        "attack={name: [",
        "a=\x00",
        "attack.eps.x=3",
        "name.x=3",
        "seed=2020-13-45",
        "seed=!!int z",
        "seed=" + "[" * 1200,
        "seed=!!bool z",
        "seed=0x_",
        "data=&a {augment: *a}",
        "weights={name: sam, rho: 1, rho: 2}",
    ],
)
def test_bad_overrides(file: Path, override: str) -> None:
    message = complaint(file, None, override)
    assert repr(override)[1:20] in message


def test_the_place_of_an_override_is_the_override(file: Path) -> None:
    message = complaint(file, MINIMAL + "train: {epochs: 3}\n", "train={epoch: 3}")
    assert "override train={epoch: 3}: train.epoch is not a known key" in message
    message = complaint(file, None, "train.batch_size=-1")
    assert "override train.batch_size=-1: train.batch_size" in message


def test_an_override_changes_one_place_only(file: Path) -> None:
    file.write_text(
        MINIMAL.replace("{name: pgd, eps: 8/255}", "{name: pgd, eps: 8/255}")
        + "model: {name: mlp, options: &o {hidden: 3}}\nflatness: {options: *o}\n"
    )
    read = read_config(file, ["flatness.options.hidden=5"])
    assert read.flatness.options == {"hidden": 5}
    assert read.model.options == {"hidden": 3}


def test_merge_keys_are_yaml(file: Path) -> None:
    text = MINIMAL.replace("{name: pgd, eps: 8/255}", "{<<: {eps: 0.1, steps: 3}, name: pgd}")
    file.write_text(text)
    read = read_config(file)
    assert (read.attack.eps, read.attack.steps) == (0.1, 3)  # type: ignore[union-attr]


# --- round trip


ROUND: dict[str, dict[str, Any]] = {
    "base": {},
    "amp": {"weights": {"name": "amp", "epsilon": "1/3", "steps": 2, "statistics": "both"}},
    "custom": {
        "weights": {"name": "custom", "norm": math.inf, "radius": 1e-5, "group": "row", "steps": 2}
    },
    "average": {"train__average": {"name": "swa", "start_epoch": 1}},
    "everything": {
        "data__augment": {"crop": 1, "flip": True, "cutout": 2},
        "data__label_noise": {"kind": "asymmetric", "rate": "1/7"},
        "data__extra": {"path": "ä ö/\u2028x.npz", "fraction": 0.3},
        "data__mix": {"name": "cutmix", "alpha": 1e20},
        "objective": {"name": "trades", "beta": 6},
        "optimizer": {"name": "adamw", "betas": [0.5, 0.25], "clip": 1e-300},
        "schedule": {"name": "one_cycle", "peak": "1/3"},
        "flatness__options": {"radius": 1e-7, "restarts": 3, "ball": "adaptive", "on": True},
    },
}


@pytest.mark.parametrize("case", ROUND)
def test_what_is_written_reads_the_same(tmp_path: Path, case: str) -> None:
    config = check_config(values(**ROUND[case]))
    path = tmp_path / "written.yaml"
    write_config(config, path)
    again = read_config(path)
    assert again == config
    assert again.model_dump_json() == config.model_dump_json()
    # Every key is said.
    assert set(yaml.safe_load(path.read_text())) == set(RunConfig.model_fields)


# --- anything at all

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["8/255", "sam", "awp", "pgd", "none", "2e-3", "linf", "re:[", "1/0", "٣"])
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | scalars, inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = sorted(RunConfig.model_fields)


def places_of(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return [at]
    return [at, *(found for k, v in tree.items() for found in places_of(v, (*at, str(k))))]


EVERYWHERE = [
    p for p in places_of(check_config(BASE).model_dump(mode="json")) if p and p[0] != "options"
]


def judged(given: dict[Any, Any]) -> RunConfig | None:
    try:
        return check_config(given)
    except ConfigError:
        return None


@given(st.dictionaries(st.sampled_from(KEYS) | scalars, anything, max_size=5))
def test_anything_as_a_configuration_is_judged(given: dict[Any, Any]) -> None:
    judged(given)


@given(st.lists(st.tuples(st.sampled_from(EVERYWHERE), anything), min_size=1, max_size=3))
def test_anything_anywhere_in_a_good_one_is_judged(
    changes: list[tuple[tuple[str, ...], Any]],
) -> None:
    tree = check_config(BASE).model_dump(mode="json")
    for path, value in changes:
        target: Any = tree
        for key in path[:-1]:
            target = target[key] if isinstance(target, dict) and key in target else None
        if isinstance(target, dict):
            target[path[-1]] = value
    judged(tree)


@given(st.text(alphabet="[]{}:,-?!&*#|>@`%'\"\\ \n\tax019./_~<=", max_size=60), st.booleans())
def test_any_text_is_judged(tmp_path_factory: Any, text: str, behind: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(MINIMAL + text if behind else text)
    for overrides in ((), (f"data={text}",)):
        with contextlib.suppress(ConfigError):
            read_config(path, overrides)
