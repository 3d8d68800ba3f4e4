"""Owns what may stand side by side: figures of runs in rows, apart where circumstances differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from robustflat.errors import UserError
from robustflat.landscapes import Landscape, drawn_in
from robustflat.runs import records
from robustflat.runs.description import method_of, plain, setting_of
from robustflat.runs.records import Measurement
from robustflat.subject import distinct_names
from robustflat.train.folder import RunFolder

Circumstances = dict[str, Any]
# Of a figure: none, a share that is shown in percent, a difference of shares in points.
Unit = Literal["", "%", "pp"]
T = TypeVar("T")
# Circumstances that are a network's own.
_OF_NETWORK = ("weights", "model")
# Settings of a measure that are the images', the attack's or the run's own.
_ELSEWHERE_SAID = ("attack", "examples", "seed", "train_size")


@dataclass(frozen=True)
class Cell:
    """A figure, its interval or standard error (of directions and images), and its unit.

    ``metric`` is what was measured, whatever the circumstances; ``deviation`` that over so many
    (``count``) seeds.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    unit: Unit = "%"
    metric: str = ""
    deviation: float | None = None
    count: int = 1


@dataclass(frozen=True)
class Row:
    """One run, or the home of a model, of which neither method nor seed is known.

    ``setting`` is the same of runs that differ in their seed alone, and empty of a model.
    """

    run: str
    method: str
    seeds: tuple[int, ...]
    cells: dict[str, Cell]
    weights: str = ""
    setting: str = ""


def compare(folders: Sequence[RunFolder]) -> list[Row]:
    """One row for every run, or home of a model, with every figure of its record.

    Clean and robust accuracy on test images (``AutoAttack`` is AutoAttack standard, ``worst case``
    the intersection of all attacks, ``over radii`` each point of a curve), ``robust gap`` (train
    minus test robust accuracy at the last checkpoint), ``best - last`` (robust test accuracy),
    ``corrupted`` (mean accuracy over corruptions) and ``mCE``, and the flatness measures. Two are
    in one column only if threat, images, attack with its options, checkpoint and ball are the
    same; else the columns' names say what differs.

    Raises:
        UserError: if a run has not been measured, or its files are damaged.
    """
    names = distinct_names([folder.root for folder in folders])
    found = [_figures(folder) for folder in folders]
    differing = _differing([figure for figures in found for figure in figures])
    rows = []
    for name, folder, figures in zip(names, folders, found, strict=True):
        config = folder.read_config() if folder.config_file.is_file() else None
        method, setting = "-", ""
        seeds: tuple[int, ...] = ()
        if config is not None:
            method, seeds, setting = method_of(config), (config.seed,), setting_of(config)
        kinds = dict.fromkeys(about["weights"] for about, _ in figures)
        mixed = _differing(figures, _OF_NETWORK)
        cells: dict[str, Cell] = {}
        for about, cell in figures:
            keys = [*differing.get(cell.metric, ()), *mixed.get(cell.metric, ())]
            said = ", ".join(_in_words(key, about.get(key)) for key in keys)
            cells[f"{cell.metric} [{said}]" if said else cell.metric] = cell
        rows.append(Row(name, method, seeds, cells, " and ".join(kinds), setting))
    return rows


def limits(folders: Sequence[RunFolder]) -> list[str]:
    """What keeps figures of runs, or models, from being compared: a sentence a circumstance.

    These are the circumstances by which `compare` gives figures columns of their own, of metrics
    that have no column which all runs share; and those of landscapes, which share an axis.

    Raises:
        UserError: if files are damaged.
    """
    names = distinct_names([folder.root for folder in folders])
    found = {
        name: _figures(folder)
        for name, folder in zip(names, folders, strict=True)
        if folder.records
    }
    unlike: dict[str, dict[str, dict[str, None]]] = {}
    for metric, keys in _differing([one for figures in found.values() for one in figures]).items():
        each = {
            name: [[_in_words(key, about.get(key)) for key in keys]
                   for about, cell in one if cell.metric == metric]
            for name, one in found.items()
        }  # fmt: skip
        each = {name: columns for name, columns in each.items() if columns}
        if not each or set.intersection(*(set(map(tuple, c)) for c in each.values())):
            continue
        for place, key in enumerate(keys):
            words = {name: dict.fromkeys(c[place] for c in each[name]) for name in each}
            if len({tuple(sorted(w)) for w in words.values()}) > 1:
                said = "; ".join(f"{name}: {' and '.join(w)}" for name, w in words.items())
                unlike.setdefault(key, {}).setdefault(said, {})[metric] = None
    sentences = [
        f"Not of the same {key.replace('_', ' ')} ({said}), so not to be compared: "
        f"{_several(map(label, metrics))}."
        for key, cases in unlike.items()
        for said, metrics in cases.items()
    ]
    for kind in ("line", "plane"):
        last = [[one for one in drawn_in(f.landscapes) if one.kind == kind][-1:] for f in folders]
        if len({_drawn(one) for (one,) in filter(None, last)}) > 1:
            sentences.append(
                f"Not to be compared: the landscapes ({kind}) were drawn in different ways "
                "(directions, seed, images or attack), so their shapes are not on one scale."
            )
    return sentences


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns of the rows, those of one metric together, in the order of first appearance."""
    metrics: dict[str, list[str]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            group = metrics.setdefault(cell.metric or name, [])
            if name not in group:
                group.append(name)
    return [name for group in metrics.values() for name in group]


def label(metric: str) -> str:
    """A metric's name as people read it."""
    return metric.replace("_", " ")


def whole(root: Any, make: Callable[[], T]) -> T:
    """What ``make`` makes of a run's files.

    Raises:
        UserError: if one of them is JSON but does not hold what it should.
    """
    try:
        return make()
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"The files of the run {root} are damaged or of another version of robustflat: "
            f"{type(error).__name__} {error} while reading them. Run `robustflat evaluate` and "
            "`robustflat flatness` on it again."
        ) from error


def _differing(
    figures: Sequence[tuple[Circumstances, Cell]], among: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """For each metric, the circumstances that are not the same in all its figures.

    The weights, raw or averaged, belong to a run's method, and a model is its own home's: they are
    told apart within a run, or a home, only.
    """
    found: dict[str, list[str]] = {}
    for metric in dict.fromkeys(cell.metric for _, cell in figures):
        abouts = [about for about, cell in figures if cell.metric == metric]
        every = dict.fromkeys(key for about in abouts for key in about)
        keys = among or [key for key in every if key not in _OF_NETWORK]

        def kinds(*keys: str, abouts: Sequence[Circumstances] = abouts) -> int:
            return len({tuple(str(about.get(key)) for key in keys) for about in abouts})

        found[metric] = [key for key in keys if kinds(key) > 1]
        # A mark that tells no more than the words do is left out.
        if "fingerprint" in found[metric] and kinds("images") == kinds("images", "fingerprint"):
            found[metric].remove("fingerprint")
    return found


def _few(names: Sequence[str], most: int = 4) -> str:
    """Names joined; beyond some, how many more, and a mark by which two such lists differ."""
    if len(names) <= most:
        return " and ".join(names)
    mark = hashlib.sha256(repr(sorted(names)).encode()).hexdigest()[:6]
    return f"{', '.join(names[:most])} and {len(names) - most} more ({mark})"


def _several(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _drawn(found: Landscape) -> str:
    """What was asked for, but for whose landscape it is."""
    own = ("subject", "checkpoint", "weights", "epoch", "device", "versions")
    return str((found.axes, {k: v for k, v in found.about.items() if k not in own}))


def _in_words(key: str, value: Any) -> str:
    if key in ("threat", "checkpoint", "images", "attacks", "weights"):
        return str(value)
    return f"{label(key)} {plain(value)}"


def _figures(folder: RunFolder) -> list[tuple[Circumstances, Cell]]:
    """Every figure of a run's, or a model's, records, with its circumstances."""
    if not folder.records:
        folder.read_config()
    found = records.all_of(folder)
    if not found:
        raise UserError(
            f"Nothing was measured of the run {folder.root}, so there is nothing to compare. Run "
            f"`robustflat evaluate {folder.root}` first."
        )
    kinds = {
        "test": _tested, "curve": _curve, "corruptions": _corrupted, "gap": _gaps,
        "overfitting": _gaps, "flatness": _flat,
    }  # fmt: skip

    def read() -> list[tuple[Circumstances, Cell]]:
        measured = sorted(found, key=lambda one: [*kinds].index(one["kind"]))
        return [
            ({**about, **_model(one)}, cell)
            for one in measured
            for about, cell in kinds[one["kind"]](one)
        ]

    return whole(folder.root, read)


def _model(one: Measurement) -> Circumstances:
    """Which of the models of a home: what was said of it, else a mark of its weights."""
    if one["checkpoint"] != "given":
        return {}
    said = ", ".join(f"{key} {value}" for key, value in one.get("said", {}).items())
    return {"model": f"{str(one.get('model'))[:6]}{said and f' ({said})'}"}


def _tested(one: Measurement) -> Iterator[tuple[Circumstances, Cell]]:
    test = one["result"]
    images = f"{test['count']} images of {one['data']}"
    about = {"checkpoint": one["checkpoint"], "weights": one["weights"], "images": images}
    prints = (test["settings"].get(key) for key in ("data", "labels"))
    about["fingerprint"] = "-".join((mark or "")[:6] for mark in prints)
    yield dict(about), _share(test["clean_accuracy"], test["clean_interval"], "clean")
    about |= {"threat": records.threat_of(one), "seed": one["seed"]}
    for name, suite in test["suites"].items():
        metric = name.partition("#")[0].replace("autoattack", "AutoAttack")
        attacks = [attack.partition("#")[0] for attack in suite["attacks"]]
        options: Circumstances = {"attacks": " + ".join(attacks)}
        if len(attacks) == 1:
            options |= test["attacks"][suite["attacks"][0]]["options"]
        cell = _share(suite["accuracy"], suite["interval"], metric)
        yield {**about, **{k: v for k, v in options.items() if k != "norm"}}, cell
    if len(test["suites"]) > 1:
        over = {"attacks": f"over {_few(list(test['suites']))}"}
        cell = _share(test["robust_accuracy"], test["robust_interval"], "worst case")
        yield {**about, **over}, cell


def _curve(one: Measurement) -> Iterator[tuple[Circumstances, Cell]]:
    about = {
        "checkpoint": one["checkpoint"], "weights": one["weights"], "attacks": one["attack"],
        "images": f"{one['result']['count']} images of {one['data']}", "seed": one["seed"],
    }  # fmt: skip
    for point in one["result"]["points"]:
        cell = _share(point["accuracy"], point["interval"], "over radii")
        yield {**about, "threat": records.threat_of({**one, "eps": point["eps"]})}, cell


def _corrupted(one: Measurement) -> Iterator[tuple[Circumstances, Cell]]:
    found = one["result"]
    about = {
        "checkpoint": one["checkpoint"], "weights": one["weights"],
        "images": f"{found['count']} images of each set of {one['options']['folder']}",
        "corruptions": ", ".join(one["options"]["corruptions"]),
    }  # fmt: skip
    yield about, Cell(1 - found["mean_error"], metric="corrupted")
    if found["mce"] is not None:
        yield about, Cell(found["mce"], metric="mCE")


def _gaps(one: Measurement) -> Iterator[tuple[Circumstances, Cell]]:
    """The gap, or best - last."""
    keys = {"threat": records.threat_of(one), "attacks": one["attack"]}
    about = {**keys, "weights": one["weights"], "seed": one["seed"]}
    if one["kind"] == "overfitting":
        about["images"] = f"{one['count']} images of {one['data']}"
        yield about, _cell(one["figures"]["robust_accuracy"], "best - last")
    elif one["checkpoint"] != "best":  # how far the training went is the last one's matter
        counts, gaps = one["result"]["counts"], one["result"]["gaps"]["train-test"]
        about["images"] = f"{counts['train']} and {counts['test']} images of {one['data']}"
        yield about, _cell(gaps["robust_accuracy"], "robust gap")
        if gaps["robust_loss"]["value"] is not None:  # infinite
            yield about, _cell(gaps["robust_loss"], "loss gap", "")


def _flat(one: Measurement) -> Iterator[tuple[Circumstances, Cell]]:
    for name, figure in one["measures"].items():
        details = figure.get("details") or {}
        about = {"checkpoint": one["checkpoint"], "weights": one["weights"]}
        about["images"] = f"{one['samples']} {one['split']} images of {one['data']}"
        settings = details.get("settings", {})
        if details.get("loss") != "clean" or "attack" in settings:
            about |= {
                "threat": records.threat_of(one),
                "attacks": one["attack"] or "of the measure",
            }
        about |= {key: value for key, value in settings.items() if key not in _ELSEWHERE_SAID}
        keys = ("ball", "weight_norm", "radius", "parameters", "m")
        about |= {key: details[key] for key in keys if key in details}
        if details.get("converged") is False:
            about["found"] = "not converged"
        value = figure["value"]
        errors = (figure["standard_error"], details.get("example_standard_error"))
        known = [error for error in errors if error is not None]
        spread = math.hypot(*known) if known and value is not None else None
        low, high = (None, None) if spread is None else (value - spread, value + spread)
        yield about, Cell(value, low, high, "", metric=name)


def _cell(figure: dict[str, Any], metric: str, unit: Unit = "pp") -> Cell:
    return Cell(figure["value"], figure["low"], figure["high"], unit, metric)


def _share(value: float, interval: Sequence[float], metric: str) -> Cell:
    low, high = interval
    return Cell(value, low, high, metric=metric)
