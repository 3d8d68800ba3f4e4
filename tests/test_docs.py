"""The documentation: made pages are whole, snippets run, commands parse, configurations check."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from script_support import script
from torch import nn
from train_support import trained

import robustflat as rf
from robustflat import registry
from robustflat.cli import app
from robustflat.config import RunConfig, read_config
from robustflat.flatness import Options
from robustflat.runs.description import describe
from robustflat.study import read_study

ROOT = Path(__file__).parents[1]
WRITTEN = {p.relative_to(ROOT).as_posix(): p.read_text() for p in [
    ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))
]}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
GROUP = typer.main.get_command(app)


documentation = script("documentation")
MADE: dict[str, str] = documentation.pages()
ALL = {
    **WRITTEN,
    **{f"docs/{p}": t for p, t in MADE.items()},
    "docs/notebook.md": documentation.notebook()["notebook.md"],
}


def blocks(language: str, pages: dict[str, str]) -> list[Any]:
    """Every fenced block of a language, called by its page and number."""
    return [
        pytest.param(text, id=f"{page}-{i}")
        for page, content in pages.items()
        for i, (said, text) in enumerate(FENCE.findall(content))
        if said == language
    ]


# --- snippets of Python


class Loader:
    """Two batches of eight random images, each time in the same order."""

    def __init__(self, size: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.rand(8, 3, size, size, generator=g), torch.randint(10, (8,), generator=g))
            for _ in range(2)
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


def execute(text: str, size: int = 8) -> dict[str, Any]:
    """Run a snippet with what its page takes as given."""
    model = network()
    space: dict[str, Any] = {
        "model": model, "loader": Loader(size), "epochs": 1, "__name__": "snippet",
        "x": Loader(size).batches[0][0], "y": Loader(size).batches[0][1],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip
    exec(compile(text, "snippet", "exec"), space)
    return space


NEEDS = {
    "lightning": "import lightning",
    "timm": "import timm",
    "ddp": "torch.nn.parallel",
    "fsdp": "fully_shard",
}


@pytest.mark.parametrize(
    "text",
    blocks(
        "python", {k: v for k, v in ALL.items() if "/methods/" not in k and "notebook" not in k}
    ),
)
@pytest.mark.filterwarnings("ignore:::lightning", "ignore:::timm", "ignore:::pytorch_lightning")
def test_snippets_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'load_run\("runs/(\S+)"\)', text):
        trained(tmp_path / "runs", name=name)
    for package in ("lightning", "timm"):
        if NEEDS[package] in text:
            pytest.importorskip(package, reason=f"the snippet of {package} needs {package}")
    steps = "optimizer.step()" in text
    text = text.replace('"pgd-20", "autoattack"', '"pgd-2"').replace(
        '"worst_robust"', '"average_clean"'
    )
    if NEEDS["fsdp"] in text and not hasattr(torch.cpu.Stream(), "record_event"):
        pytest.skip("FSDP2 of this version of torch needs a GPU")
    together = NEEDS["ddp"] in text or NEEDS["fsdp"] in text
    if together:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
    try:
        space = execute(text, 32 if "timm" in text else 8)
    finally:
        if together:
            torch.distributed.destroy_process_group()
    if steps and "timm" not in text:  # it trains: the weights moved and are numbers
        moved = list(space["model"].parameters())
        moved = [p.to_local() if hasattr(p, "to_local") else p for p in moved]
        assert all(p.isfinite().all() for p in moved)
        assert any(
            not torch.equal(p, q) for p, q in zip(moved, network().parameters(), strict=True)
        )


def snippet(page: str, heading: str, number: int = 0) -> str:
    """A block of Python below a heading."""
    section = WRITTEN[page].split(f"## {heading}\n")[1].split("\n## ")[0]
    return [text for said, text in FENCE.findall(section) if said == "python"][number]


def test_accumulation_descends_the_mean_of_all_rows() -> None:
    text = snippet("docs/loops.md", "Gradient accumulation").replace(
        "rf.awp(gamma=5e-3)", "rf.awp(0)"
    )
    text = text.replace("for x, y in loader:", "for x, y in [next(iter(loader))]:")
    text = text.replace("    optimizer.step()", "")
    space = execute(text + "\ngrads = [p.grad.clone() for p in model.parameters()]")
    # Without the batch's statistics, which differ by part, the mean over parts is that of all rows.
    model = network().eval()
    text = text.replace("optimizer = ", "model.eval()\noptimizer = ")
    space = execute(text + "\ngrads = [p.grad.clone() for p in model.parameters()]")
    x, y = Loader(8).batches[0]
    nn.functional.cross_entropy(model(x), y).backward()
    for ours, p in zip(space["grads"], model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_the_perturbation_has_an_effect_under_autocast() -> None:
    text = snippet("docs/loops.md", "Mixed precision")
    text = text.replace("for x, y in loader:", "for x, y in [next(iter(loader))]:")
    with_it = execute(text)["model"].state_dict()
    without = execute(text.replace("rho=0.05", "rho=0.0"))["model"].state_dict()
    assert any((with_it[k] - without[k]).abs().max() > 1e-4 for k in with_it if "num" not in k)


def test_a_snippet_of_every_method_makes_it() -> None:
    for key, (kind, _, folder) in documentation.PAGED.items():
        for name in kind:
            texts = [
                t for said, t in FENCE.findall(MADE[f"{folder}/{name}.md"]) if said == "python"
            ]
            for text in texts:
                space = execute(text)
                made = space[key if key != "weights" else "weights"]
                built = kind.find(name)(**{
                    k: kind.find(v["name"])(rho=v["rho"]) if isinstance(v, dict) else v
                    for k, v in documentation.REQUIRED.get(name, {}).items()
                })  # fmt: skip
                assert type(made) is type(built)
                assert getattr(made, "name", None) == getattr(built, "name", None)


# --- configurations


@pytest.mark.parametrize("text", blocks("yaml", ALL))
def test_configurations_pass_check(text: str, tmp_path: Path) -> None:
    values = yaml.safe_load(text)
    path = tmp_path / "c.yaml"
    if "grid" in values:
        path.write_text(text)
        read_study(path)
        return
    if "name" not in values:
        text = f"name: snippet\n{text}"
    path.write_text(text)
    # As it stands it must be read; what it needs of data and weights is not here.
    config = read_config(path)
    small = ["data={name: digits, validation_samples: 50}", "device=cpu"]
    if config.model.name != "small_cnn":
        small.append("model={name: small_cnn, options: {width: 4}}")
    assert any(line.startswith("method") for line in describe(read_config(path, small)))


def test_keys_of_methods_in_yaml_and_python_agree() -> None:
    for key, (kind, base, folder) in documentation.PAGED.items():
        for name in kind:
            (text,) = [
                t for said, t in FENCE.findall(MADE[f"{folder}/{name}.md"]) if said == "yaml"
            ]
            section = yaml.safe_load(text)[key]
            assert section == {"name": name, **documentation.REQUIRED.get(name, {})}
            assert base.__name__


# --- command lines


def lines() -> list[Any]:
    """Every command of robustflat, python or make in a block that is no other language."""
    found = []
    for page, content in ALL.items():
        commands = [
            line.split("   ")[0].split("  #")[0].strip()
            for said, text in FENCE.findall(content)
            if said in ("", "bash", "console", "sh")
            for line in text.replace("\\\n", " ").splitlines()
        ]
        quoted = [c for c in re.findall(r"`([^`\n]+)`", FENCE.sub("", content)) if " " in c]
        for command in (*commands, *quoted):
            words = command.split()
            known = words[:1] in (["robustflat"], ["make"], ["torchrun"]) or (
                words[:1] == ["python"] and len(words) > 1 and words[1].startswith("scripts/")
            )
            if known and not re.search(r"\.\.\.|\b(COMMAND|ATTACK|RUN)\b|\{", command):
                found.append(pytest.param(command, id=f"{page}-{command[:50]}"))
    return found


@pytest.mark.parametrize("command", lines())
def test_command_lines_parse(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
        return
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
        return
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        assert words[0] == "robustflat"
    assert words[1] in GROUP.commands
    if len(words) == 2 and words[1] not in ("check", "list"):
        return  # a command is spoken of
    parsed = GROUP.commands[words[1]].make_context(words[1], list(words[2:]))
    config = parsed.params.get("config")
    if config is not None and Path(config).parts[0] == "configs":
        reader = read_study if words[1] == "study" else read_config
        reader(ROOT / config, parsed.params["overrides"] or [])
    option = parsed.params.get("option")
    if words[1] == "flatness" and option:
        from robustflat.cli.options import named
        from robustflat.flatness.asked import settle

        settle(parsed.params["measure"], None, "linf", None, named("--option", option))
    for measure in (parsed.params.get("measure") or []) if words[1] == "flatness" else []:
        registry.measures.find(measure)


# --- pages that are made


def test_every_name_has_a_page_that_tells_formula_cost_and_source() -> None:
    for key, kind, folder in [
        ("weights", registry.weights, "methods"),
        ("attack", registry.attacks, "attacks"),
        ("objective", registry.objectives, "objectives"),
    ]:
        for name in kind:
            page = MADE[f"{folder}/{name}.md"]
            assert page.startswith(f"# {name}\n")
            assert f"({name}.md)" in MADE[f"{folder}/index.md"]
            wanted = ["How to use", "Settings", "What it does", "What it costs"]
            for title in wanted + (["Source"] if key == "weights" else []):
                assert re.search(rf"^## {title}\n\n\S", page, re.M), (name, title)
            for argument in inspect.signature(kind.find(name)).parameters.values():
                if argument.name not in kind.offered and argument.kind is not argument.VAR_KEYWORD:
                    assert re.search(rf"^\| `{argument.name}` \|", page, re.M), (name, argument)


def test_what_a_method_page_says_of_awp() -> None:
    page = MADE["methods/awp.md"]
    assert "| `gamma` | number >= 0 | `0.005` | radius relative to each tensor's norm. |" in page
    assert "| `parameters` | text | `matrices` |" in page
    assert "`{name: awp, gamma: 0.01, step: {at: perturbed}}`" in page  # the paper's recipe
    assert "steps + 1" in page
    assert "so 26, which is 1.13 times the 23 without it" in page  # 2 * 10 + 3 * 2 over 2 * 10 + 3
    assert "v\\_l = gamma" in page
    assert "Wu, Xia & Wang 2020" in page.split("## Source")[1]
    # Measured: its own rows and those of none with as many passes and epochs, of one table alone.
    rows = re.findall(r"^\| ((?:none|[a-z_]+ [\d.]+) \| \d \| \d+) \|", page, re.M)
    assert rows == ["none | 1 | 30", "awp 0.005 | 2 | 24", "awp 0.02 | 2 | 24", "none | 1 | 24"]


def test_bounds_are_told_once() -> None:
    page = MADE["reference/yaml.md"]
    assert "| `fraction` | number > 0 < 1 | `0.5` |" in page
    assert "| `batch_size` | whole number >= 1 | `128` |" in page
    assert "| `gap_samples` | whole number >= 1 | `1000` |" in page
    assert "| `precision` | `fp32`, `tf32`, `bf16`, `fp16` | `fp32` |" in page
    assert "| `name` | text | must be given |" in page
    assert "| `train_samples` | whole number >= 1 or none | none |" in page
    assert "| `eps` | number >= 0 | `8/255` |" in MADE["attacks/pgd.md"]


def paths(schema: Any, at: str = "") -> Iterator[tuple[str, str]]:
    for key, field in schema.model_fields.items():
        yield at, key
        for inner in documentation._inside(field.annotation):
            yield from paths(inner, f"{at}.{key}" if at else key)


def test_every_key_of_the_schema_is_in_the_reference() -> None:
    page = MADE["reference/yaml.md"]
    sections = dict(re.findall(r"^## ([\w. ]+)\n(.*?)(?=^## |\Z)", page, re.S | re.M))
    found = list(paths(RunConfig))
    assert ("train.alarm", "drop") in found
    for at, key in found:
        assert re.search(rf"^\| `{key}` \|", sections[at or "The whole"], re.M), (at, key)
    for at, key in [("weights.when", "from_epoch"), ("weights.step", "reattack"),
                    ("attack.curriculum.stages", "eps"), ("optimizer", "clip"),
                    ("A study", "measures")]:  # fmt: skip
        assert re.search(rf"^\| `{key}` \|", sections[at], re.M), (at, key)


def test_every_option_of_the_command_line_is_in_the_reference() -> None:
    page = MADE["reference/commands.md"]
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.S | re.M))
    assert set(sections) == set(GROUP.commands)
    for name, command in GROUP.commands.items():
        for parameter in command.params:
            if parameter.name == "help" or getattr(parameter, "hidden", False):
                continue
            told = (
                parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
            )
            row = next((x for x in sections[name].splitlines() if x.startswith(f"| `{told}`")), "")
            assert row, (name, told)
            if told.startswith("-") and parameter.default not in (None, False, []):
                assert row.endswith(f"`{parameter.default}` |"), row
            assert len(row.split("|")[2].strip()) > 3, row  # it has a help


def test_every_option_and_measure_of_flatness_is_in_the_reference() -> None:
    page = MADE["reference/flatness.md"]
    for name in [*registry.measures, *(f for f in Options.__dataclass_fields__ if f != "attack")]:
        assert re.search(rf"^\| `{name}` \|", page, re.M), name
    assert "| `radius` | none |" in page


def test_every_public_name_is_in_the_reference() -> None:
    page = MADE["reference/api.md"]
    entries = [e.rpartition(".") for e in re.findall(r"^::: ([\w.]+)$", page, re.M)]
    found = [getattr(importlib.import_module(module), name) for module, _, name in entries]
    assert {id(value) for value in found} == {id(getattr(rf, name)) for name in rf.__all__}
    assert len(found) == len(rf.__all__)
    methods = page.split("## Attacks")[0]
    assert ".awp\n" in methods
    assert ".pgd\n" not in methods


def test_every_other_name_is_in_the_reference() -> None:
    page = MADE["reference/names.md"]
    for kind in registry.KINDS.values():
        if kind.name in documentation.PAGED or kind is registry.measures:
            continue
        section = page.split(f"## {kind.name}\n")[1].split("\n## ")[0]
        for name in itertools.chain(kind, (n for n, _ in kind.also)):
            assert f"**`{name}`**" in section, (kind.name, name)
    assert re.search(r"^\| `momentum` \|", page.split("**`sgd`**")[1].split("**`")[0], re.M)


def test_docstrings_become_markdown() -> None:
    assert documentation._markdown("a_b * ``x_y`` and :class:`robustflat.Ascent`") == (
        "a\\_b \\* `x_y` and `robustflat.Ascent`"
    )
    assert documentation._cell("a | b\n c") == "a \\| b c"

    def method() -> None:
        """Summary.

        Body with x_1.

        Passes: 2.
        Source: Somebody 2020,
        page 3.

        Args:
            one: first
                line.
            two: second.

        Raises:
            ValueError: never.
        """

    doc = documentation.read_doc(method)
    assert (doc.summary, doc.body) == ("Summary.", "Body with x\\_1.")
    assert (doc.passes, doc.source) == ("2.", "Somebody 2020, page 3.")
    assert doc.arguments == {"one": "first line.", "two": "second."}


# --- links


def slug(title: str) -> str:
    from markdown.extensions.toc import slugify

    return slugify(re.sub(r"[`*\\]", "", title), "-")


def test_links_lead_somewhere() -> None:
    """Relative links of the README and of every page: the file is there, and so is the heading."""
    anchors = {
        page: {slug(t) for t in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)}
        for page, text in ALL.items()
    }
    checked = 0
    for page, text in ALL.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            name = there.resolve().relative_to(ROOT).as_posix()
            generated = name.removeprefix("docs/") in documentation.notebook()
            assert name in ALL or there.is_file() or generated, (page, target)
            assert not anchor or anchor in anchors[name], (page, target)
            checked += 1
    assert checked > 200


def test_the_navigation_holds_every_page() -> None:
    entries = yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    config: Any = {"nav": entries}

    class Config(dict[str, Any]):
        nav = entries

    listed = json.dumps(documentation.on_config(Config(config)).nav)
    for page in ALL:
        if page != "README.md":
            assert json.dumps(page.removeprefix("docs/")) in listed, page


def test_the_readme_is_short() -> None:
    assert len(WRITTEN["README.md"].splitlines()) <= 150


# --- the notebook


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebook is run by nbclient")
    nbclient = pytest.importorskip("nbclient", reason="the notebook is run by nbclient")
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "docs/digits.ipynb", 4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    drawn = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(drawn) == 2
    assert re.search(r"^AT-AWP +\d", printed, re.M)
    assert "hessian_max_robust" in printed


def test_the_kept_notebook_holds_what_a_run_of_all_of_it_said() -> None:
    cells = json.loads((ROOT / "docs/digits.ipynb").read_text())["cells"]
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) == 2
    page = documentation.notebook()["notebook.md"]
    assert "![What the cell above draws](pictures/notebook-" in page
    assert re.search(r"^AT-AWP +\d", page, re.M)
