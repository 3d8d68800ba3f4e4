"""The documentation's pages that are made from the code, so that none is missing or out of date.

MkDocs calls `on_config` and `on_files` (see mkdocs.yml): a page for every weight perturbation,
attack and objective of the registry; every key of the YAML from the schema; every option of the
command line; the options of the flatness measures; the public names.

    python scripts/documentation.py methods/awp.md          prints a page
"""

from __future__ import annotations

import base64
import dataclasses
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import robustflat as rf
from robustflat import registry
from robustflat.cli import app
from robustflat.config.choice import Built, Choice, choice_of, section
from robustflat.config.schema import (
    AttackSection,
    ObjectiveSection,
    OptimizerSection,
    RunConfig,
    WeightsSection,
)
from robustflat.config.values import Section
from robustflat.flatness.options import Options
from robustflat.registry import Kind
from robustflat.study.schema import StudyConfig

if TYPE_CHECKING:  # so that the pages can be made where MkDocs is not installed
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]

# The kinds whose every name has a page, the base of their sections, and the folder of the pages.
PAGED: dict[str, tuple[Kind, type[Built], str]] = {
    "weights": (registry.weights, WeightsSection, "methods"),
    "attack": (registry.attacks, AttackSection, "attacks"),
    "objective": (registry.objectives, ObjectiveSection, "objectives"),
}
# Values for what has no default, from the sources that the docstrings name.
REQUIRED: dict[str, dict[str, Any]] = {
    "amp": {"epsilon": 0.5},
    "random": {"gamma": 0.01},
    "custom": {"radius": 0.005, "scale": "tensor_norm", "parameters": "matrices"},
    "msam": {"inner": {"name": "sam", "rho": 0.05}, "chunk": 32},
    "nsam": {"inner": {"name": "sam", "rho": 0.05}, "batches": 4},
}
TABLE = ROOT / "docs" / "results" / "methods" / "README.md"
NOTEBOOK = ROOT / "docs" / "digits.ipynb"
SHIPPED = sorted((ROOT / "configs").glob("*/*.yaml"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made into the navigation, where mkdocs.yml names their folder."""

    def listed(entry: Any) -> Any:
        if isinstance(entry, dict):
            ((title, inside),) = entry.items()
            if isinstance(inside, list):
                return {title: [listed(one) for one in inside]}
            if inside.endswith("/"):
                return {title: sorted(p for p in pages() if p.startswith(inside))}
        return entry

    config.nav = [listed(entry) for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    made: dict[str, str | bytes] = {**pages(), **notebook()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


@cache
def pages() -> dict[str, str]:
    """Every page that is made, by its path below docs/."""
    made: dict[str, str] = {}
    for key, (kind, base, folder) in PAGED.items():
        made[f"{folder}/index.md"] = _overview(key, kind, folder)
        for name in kind:
            made[f"{folder}/{name}.md"] = _method(key, kind, base, name)
    made["reference/yaml.md"] = _yaml_page()
    made["reference/commands.md"] = _commands_page()
    made["reference/flatness.md"] = _flatness_page()
    made["reference/names.md"] = _names_page()
    made["reference/api.md"] = _api_page()
    return made


@cache
def notebook() -> dict[str, str | bytes]:
    """The notebook as a page, with the outputs that are kept in its file, and their pictures."""
    made: dict[str, str | bytes] = {}
    parts = []
    for i, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else _fenced("python", text))
        if cell["cell_type"] == "markdown" and len(parts) == 1:
            parts.append(f"This page is the notebook [{NOTEBOOK.name}]({NOTEBOOK.name}).")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"pictures/notebook-{i}.png"
                made[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            elif said := "".join(output.get("text", data.get("text/plain", []))):
                parts.append(_fenced("text", said.rstrip()))
    return {"notebook.md": "\n\n".join(parts) + "\n", **made}


# --- one page a method


@dataclasses.dataclass(frozen=True)
class Doc:
    """A docstring in Google's style, taken apart.

    Attributes:
        summary: Its first line.
        body: The paragraphs that say what is done.
        passes: What follows "Passes:", if anything does.
        source: What follows "Source:", if anything does.
        arguments: What is said of each argument.
    """

    summary: str
    body: str
    passes: str
    source: str
    arguments: Mapping[str, str]


def read_doc(found: Callable[..., Any]) -> Doc:
    """Take a docstring apart."""
    text = getattr(found, "summary", None) or inspect.getdoc(found) or ""
    plain, *_ = re.split(r"\n\n(?:Args|Attributes|Returns|Raises):\n", text, maxsplit=1)
    summary, _, rest = plain.partition("\n")
    said = {"Passes": "", "Source": ""}
    body = []
    for paragraph in rest.strip().split("\n\n"):
        parts = re.split(r"^(Passes|Source): ", paragraph, flags=re.M)
        body.append(parts[0])
        for name, what in zip(parts[1::2], parts[2::2], strict=True):
            said[name] = " ".join(what.split())
    return Doc(
        summary=_markdown(summary),
        body=_markdown("\n\n".join(filter(None, map(str.rstrip, body)))),
        passes=_markdown(said["Passes"]),
        source=_markdown(said["Source"]),
        arguments=_arguments(text),
    )


def _arguments(text: str) -> dict[str, str]:
    found = re.search(r"^(?:Args|Attributes):\n(.*?)(?:\n\S|\Z)", text, re.S | re.M)
    if found is None:
        return {}
    entries = re.split(r"^ {4}(\w+): ", found[1], flags=re.M)[1:]
    return {
        name: _markdown(" ".join(what.split()))
        for name, what in zip(entries[::2], entries[1::2], strict=True)
    }


def _method(key: str, kind: Kind, base: type[Built], name: str) -> str:
    found = kind.find(name)
    doc = read_doc(found)
    made = section(found, name, kind, base)
    given = REQUIRED.get(name, {})
    parts = [f"# {name}", doc.summary, "## How to use"]
    if name != "none" or key == "weights":
        parts += [
            "In a loop of your own (see [its page](../loops.md)):",
            _python(kind, found, given),
        ]
    # The default objective is one on adversarial images.
    beside = "\nobjective: {name: standard}" if (key, name) == ("attack", "none") else ""
    text = f"{key}: {_flow({'name': name, **given})}{beside}"
    parts += ["In a configuration:", _fenced("yaml", text)]
    parts += ["## Settings", _keys(made, doc.arguments, base)]
    own = [k for k in base.model_fields if k != "name"]
    if own:
        links = " and ".join(f"[`{k}`](../reference/yaml.md#{key}{k})" for k in own)
        parts.append(f"In a configuration it also takes {links}, as all of its kind do.")
    used = _used(key, name)
    if used:
        parts += ["What the configurations that ship set:", used]
    parts += ["## What it does", doc.body or doc.summary]
    parts += ["## What it costs", *_cost(key, name, doc, made, given)]
    if doc.source:
        parts += ["## Source", doc.source]
    return "\n\n".join(parts) + "\n"


def _python(kind: Kind, found: Callable[..., Any], given: Mapping[str, Any]) -> str:
    name = found.__name__
    where = "rf" if getattr(rf, name, None) is found else found.__module__
    arguments = ", ".join(f"{k}={_call(v)}" for k, v in given.items())
    variable = {"attack": "attack", "objective": "objective"}.get(kind.name, "weights")
    if where == "rf":
        return _fenced("python", f"import robustflat as rf\n\n{variable} = rf.{name}({arguments})")
    package = ".".join(where.split(".")[:2])
    return _fenced("python", f"from {package} import {name}\n\n{variable} = {name}({arguments})")


def _call(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    rest = ", ".join(f"{k}={v!r}" for k, v in value.items() if k != "name")
    return f"rf.{value['name']}({rest})"


def _cost(
    key: str, name: str, doc: Doc, made: type[Built], given: Mapping[str, Any]
) -> Iterator[str]:
    if key == "attack":
        yield (
            "A step of an attack is one forward pass and one backward pass down to the images: 2 "
            "units, where a forward pass is 1. A descent is 3."
        )
        return
    if key == "objective":
        yield "Where clean and adversarial images both go through the network, a pass is two."
        return
    yield f"Forward and backward passes over the weights in a step: {doc.passes}"
    passes = made.model_validate({"name": name, **given}).build().passes
    plain, units = 20 + 3, 20 + 3 * passes
    yield (
        f"With its defaults, {passes}. Counted in forward passes of a step of adversarial training "
        f"with PGD-10: 20 for the attack and three times {passes}, so {units}, which is "
        f"{units / plain:.2f} times the {plain} without it."
        + (" (An average over steps: the next step is counted.)" if name == "looksam" else "")
    )
    # The first of its tables: before overfitting.
    table = TABLE.read_text().split("\n| method |")[1].split("\n\n")[0].splitlines()
    own = [line for line in table if line.startswith(f"| {name} ")]
    if own:
        epochs = {line.split("|")[3] for line in own}
        others = [] if name == "none" else [x for x in table if x.startswith("| none ")]
        # As many passes (the first), and as many epochs.
        rows = others[:1] + own + [x for x in others[1:] if x.split("|")[3] in epochs]
        yield (
            "What came of it on 8x8 digits at equal cost, with untuned strengths and before "
            "overfitting ([circumstances and columns](../results/methods/README.md)):"
        )
        yield "\n".join([f"| method |{table[0]}", table[1], *rows])


def _used(key: str, name: str) -> str:
    """Where configurations that ship name it with settings of their own."""
    found = []
    for path in SHIPPED:
        values = yaml.safe_load(path.read_text())
        value = values.get(key)
        if isinstance(value, dict) and value.get("name") == name and len(value) > 1:
            found.append(f"- `configs/{path.parent.name}/{path.name}`: `{_flow(value)}`")
    papers = [line for line in found if "/papers/" in line]
    return "\n".join(papers or found[:5])


def _overview(key: str, kind: Kind, folder: str) -> str:
    title = {"weights": "Weight perturbations", "attack": "Attacks", "objective": "Objectives"}[key]
    lines = [f"# {title}", "", f"Every name that `{key}:` takes in a configuration.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    lines += [f"| [{n}]({n}.md) | {_cell(read_doc(kind.find(n)).summary)} |" for n in kind]
    lines += [f"| `{n}` | {_cell(meaning)} |" for n, meaning in kind.also]
    return "\n".join(lines) + "\n"


# --- the YAML


def _yaml_page() -> str:
    parts = [
        "# Every key of the YAML",
        (
            "A configuration is what `robustflat train` and `check` read. What is left out takes "
            "its default; `8/255` is a fraction; any key can be given on the command line as "
            "`train.epochs=10`. Unknown keys, wrong types and impossible values are told of all at "
            "once, each with its line and the nearest valid key."
        ),
        *_sections(RunConfig, ""),
        "## A study",
        "What `robustflat study` reads; see [studies](../studies.md).",
        _markdown(_prose(StudyConfig)),
        _keys(StudyConfig, {}),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(schema: type[BaseModel], at: str) -> Iterator[str]:
    yield f"## {at or 'The whole'}"
    yield _markdown(_prose(schema))
    yield _keys(schema, {})
    for key, field in schema.model_fields.items():
        path = f"{at}.{key}" if at else key
        choice = choice_of(field, in_lists=True)
        if choice is not None:
            yield f"## {path}"
            yield from _choice_section(key, choice)
        for inner in _inside(field.annotation):
            yield from _sections(inner, path)


def _choice_section(key: str, choice: Choice) -> Iterator[str]:
    kind, base = choice.kind, choice.base
    if base is not Built:
        yield _markdown(_prose(base))
    if key in PAGED:
        folder = PAGED[key][2]
        names = ", ".join(f"[{n}](../{folder}/{n}.md)" for n in kind)
        yield f"`name` is one of {names}; each has a page with its keys."
    else:
        names = ", ".join(f"`{n}`" for n in kind)
        yield f"`name` is one of {names}; their keys are in [Names](names.md)."
    if kind.also:
        yield "Or " + "; ".join(f"`{n}`: {_markdown(text)}" for n, text in kind.also)
    own = {k: f for k, f in base.model_fields.items() if k != "name"}
    if own:
        yield "Beside its own keys each takes:"
        yield _rows((k, f.annotation, f.metadata, f.default, "") for k, f in own.items())
        for k, f in own.items():
            for inner in _inside(f.annotation):
                yield from _sections(inner, f"{key}.{k}")


def _prose(schema: type[BaseModel]) -> str:
    return re.split(r"\n\n(?:Args|Attributes):", inspect.getdoc(schema) or "")[0]


def _keys(
    schema: type[BaseModel], said: Mapping[str, str], without: type[BaseModel] | None = None
) -> str:
    """The table of a section's keys."""
    skipped = set(without.model_fields) if without is not None else set()
    fields = {k: f for k, f in schema.model_fields.items() if k not in skipped}
    if not fields:
        return "It has no keys."
    default = {
        k: f.default if f.default_factory is None else f.get_default(call_default_factory=True)
        for k, f in fields.items()
    }
    return _rows(
        (k, f.annotation, f.metadata, default[k], said.get(k, "")) for k, f in fields.items()
    )


def _rows(fields: Any) -> str:
    listed = list(fields)
    told = any(said for *_, said in listed)
    lines = ["| key | takes | default |" + (" meaning |" if told else "")]
    lines += ["|---|---|---|" + ("---|" if told else "")]
    for key, annotation, metadata, default, said in listed:
        row = f"| `{key}` | {_cell(_type(annotation, metadata))} | {_default(default)} |"
        lines.append(row + (f" {_cell(said)} |" if told else ""))
    return "\n".join(lines)


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is ...:
        return "must be given"
    if isinstance(value, Built):
        return f"`{value.name}`"
    if isinstance(value, Section):
        return "see below"
    if value is None:
        return "none"
    return f"`{_cell(_flow(value))}`"


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        over = round(value * 255)
        return f"{over}/255" if 0 < value < 0.25 and value == over / 255 else f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation holds, also in lists and where they may be left out."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not issubclass(annotation, Built):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _inside(argument)


_PLAIN = {float: "number", int: "whole number", str: "text", bool: "true or false"}


def _type(annotation: Any, metadata: list[Any]) -> str:
    """What a key takes, in words."""
    choice = next((m for m in metadata if isinstance(m, Choice)), None)
    if choice is not None:
        return f"a name or section of {choice.kind.name}"
    strict: set[Any] = {m.gt for m in metadata if isinstance(m, Gt)} | {
        m.lt for m in metadata if isinstance(m, Lt)
    }
    bounds = " ".join(
        _bound(m)
        for m in metadata
        if isinstance(m, (Gt, Lt))
        or (isinstance(m, Ge) and m.ge not in strict)
        or (isinstance(m, Le) and m.le not in strict)
    )
    return _bare(annotation) + (f" {bounds}" if bounds else "")


def _bound(bound: Any) -> str:
    for kind, sign in ((Ge, ">="), (Gt, ">"), (Le, "<="), (Lt, "<")):
        if isinstance(bound, kind):
            value = getattr(bound, kind.__name__.lower())
            return f"{sign} {value:g}" if isinstance(value, (int, float)) else ""
    return ""


def _bare(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *metadata = arguments
        return _type(inner, list(metadata))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _bare(a) for a in arguments)
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (tuple, list):
        return f"list of {_bare(arguments[0])}"
    if origin is dict:
        return f"mapping to {_bare(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section, see below"
    return _PLAIN.get(annotation, "anything")


# --- the command line


def _commands_page() -> str:
    parts = ["# Every command and option", _markdown(str(app.info.help))]
    parts.append(
        "With several GPUs or hosts: `torchrun --nproc-per-node=4 -m robustflat COMMAND ...`."
    )
    for name, callback in commands().items():
        doc = inspect.getdoc(callback) or ""
        arguments = [p for p in options(callback) if not p.flags]
        flags = [p for p in options(callback) if p.flags]
        usage = " ".join(a.name.upper() + (" ..." if a.several else "") for a in arguments)
        parts += [f"## {name}", _markdown(doc)]
        parts.append(_fenced("text", f"robustflat {name} {usage} [options]".replace("  ", " ")))
        lines = ["| | | default |", "|---|---|---|"]
        lines += [f"| `{a.name.upper()}` | {_cell(a.help)} | |" for a in arguments]
        lines += [
            f"| `{f.flags}` | {_cell(f.help)}{' May be given several times.' if f.several else ''} "
            f"| {'' if f.default in (None, False) else f'`{f.default}`'} |"
            for f in flags
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def commands() -> dict[str, Callable[..., Any]]:
    """Every command of the command line, by its name."""
    return {
        (c.name or c.callback.__name__): c.callback
        for c in app.registered_commands
        if c.callback is not None
    }


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An argument or option of a command.

    Attributes:
        name: Of the argument.
        flags: As they are typed, None of an argument.
        help: What is said of it.
        several: Whether it may be given several times.
        default: Of an option.
    """

    name: str
    flags: str | None
    help: str
    several: bool
    default: Any


def options(callback: Callable[..., Any]) -> list[Parameter]:
    """What a command takes."""
    hints = get_type_hints(callback, include_extras=True)
    found = []
    for parameter in inspect.signature(callback).parameters.values():
        plain, info = get_args(hints[parameter.name])[:2]
        if getattr(info, "hidden", False):  # says only how it is written now
            continue
        is_option = type(info).__name__ == "OptionInfo"
        # typer takes what stands first in Annotated for a default.
        decls = (info.default, *(info.param_decls or ()))
        told = [d for d in decls if isinstance(d, str) and d.startswith("-")]
        flags = ", ".join(told) or f"--{parameter.name.replace('_', '-')}"
        found.append(
            Parameter(
                name=parameter.name,
                flags=flags if is_option else None,
                help=_markdown(info.help or ""),
                several="list" in str(plain),
                default=None if parameter.default is parameter.empty else parameter.default,
            )
        )
    return found


# --- measures, names, the public names


def _flatness_page() -> str:
    doc = read_doc(Options)
    fields = {f.name: f for f in dataclasses.fields(Options)}
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, said in doc.arguments.items():
        default = fields[name].default
        shown = "" if default is dataclasses.MISSING else _default(default)
        lines.append(f"| `{name}` | {shown} | {_cell(said)} |")
    measures = ["| measure | what it is |", "|---|---|"]
    for name in registry.measures:
        summary = registry.measures.describe(name)[0]
        measures.append(f"| `{name}` | {_cell(_markdown(summary))} |")
    parts = [
        "# What flatness and landscape accept",
        "What they mean is told in [Flatness](../flatness.md).",
        "## Measures",
        (
            "`robustflat flatness RUN --measure NAME`, `flatness.measures` in YAML, "
            "`rf.flatness(model, data, measures=[...])`; or `package.module:function` of your own."
        ),
        "\n".join(measures),
        "## Options of the measures",
        "`--option name=value`, `flatness.options` in YAML, keywords of `rf.flatness`.",
        "\n".join(lines),
        "## Options of the commands",
        (
            "See [flatness](commands.md#flatness) and [landscape](commands.md#landscape) among the "
            "commands."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _names_page() -> str:
    parts = [
        "# Names",
        (
            "Whatever a configuration can name, beside [weights](../methods/index.md), "
            "[attacks](../attacks/index.md), [objectives](../objectives/index.md) and "
            "[measures](flatness.md). `robustflat list` prints the same."
        ),
    ]
    bases: dict[str, type[Built]] = {"optimizer": OptimizerSection}
    for kind in registry.KINDS.values():
        if kind.name in PAGED or kind is registry.measures:
            continue
        parts.append(f"## {kind.name}")
        for name in kind:
            summary, *more = kind.describe(name)
            parts.append(f"**`{name}`**: {_markdown(summary)}")
            if kind in (registry.optimizers, registry.schedules, registry.averages) or (
                kind in (registry.augmentations, registry.listeners)
            ):
                found = kind.find(name)
                made = section(found, name, kind, bases.get(kind.name, Built))
                parts.append(_keys(made, read_doc(found).arguments, bases.get(kind.name, Built)))
            elif more and kind is not registry.scales:
                parts.append(f"`{more[0]}`")
        parts += [f"**`{n}`**: {_markdown(text)}" for n, text in kind.also]
    return "\n\n".join(parts) + "\n"


def _api_page() -> str:
    groups: dict[str, list[str]] = {
        "Weight perturbations": [], "Attacks": [], "Objectives": [], "Measuring": [],
        "Building blocks": [],
    }  # fmt: skip
    kinds = {"Weight perturbations": registry.weights, "Attacks": registry.attacks,
             "Objectives": registry.objectives}  # fmt: skip
    for name in rf.__all__:
        value = getattr(rf, name)
        at = next((g for g, k in kinds.items() if any(k.find(n) is value for n in k)), None)
        if at is None:
            at = "Building blocks" if inspect.isclass(value) else "Measuring"
        groups[at].append(name)
    parts = ["# Public names", "`import robustflat as rf`; these are promised to stay."]
    for title, names in groups.items():
        parts.append(f"## {title}")
        # Where they are defined: robustflat.evaluate is a package, too.
        found = [getattr(rf, name) for name in names]
        parts += [f"::: {value.__module__}.{value.__qualname__}" for value in found]
    return "\n\n".join(parts) + "\n"


# --- Markdown


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _cell(text: str) -> str:
    """Text that can stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _markdown(text: str) -> str:
    """Docstrings' double backticks and roles as Markdown; what looks like markup is escaped."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text)
    pieces = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.S)
    for i, piece in enumerate(pieces):
        if piece.startswith("``"):
            pieces[i] = piece[1:-1]
        elif not piece.startswith("`"):
            pieces[i] = re.sub(r"([*_<\[\]])", r"\\\1", piece)
    return "".join(pieces)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or pages():
        print(pages()[wanted] if sys.argv[1:] else wanted)
