"""Owns the record of which attack broke which example: saved batch by batch, resumed, merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.examples import parse_shard
from robustflat.files import write_whole, writing

FORMAT = "robustflat-outcomes-3"


@dataclass(kw_only=True)
class Entry:
    """One attack of a record.

    Attributes:
        name: Unique in the record.
        identity: What tells this attack from every other: its parameters.
        after: The position of the entry on whose survivors it runs; None if it runs on all that
            the model classifies.
        attacked: Number of examples that stood when it began, all of which it attacks.
        broke: The places in the record of the examples that it broke, ascending.
        taken: What the model takes each of those for, attacked.
        batches: How many batches are done.
        finished: Whether all are.
        outside: How many of its images were outside the ball or the box, and were not counted.
        pictured: Whether its images are kept, where adversarial examples are to be saved.
        seconds: Time spent.
        black_box: Whether it only looked at outputs.
        bounded: Whether it keeps to the ball by itself.
    """

    name: str
    identity: dict[str, Any]
    after: int | None
    attacked: int
    broke: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    batches: int = 0
    finished: bool = False
    outside: int = 0
    pictured: bool = False
    seconds: float = 0.0
    black_box: bool = False
    bounded: bool = True


@dataclass(kw_only=True)
class Record:
    """Per-example outcomes of an evaluation, and the attacks that it has seen.

    Attributes:
        settings: What the outcomes depend on besides the attacks; a record is only ever continued
            with equal settings.
        right: bool [N]: which examples the model classifies without any attack.
        positions: int64 [N]: where each example stands in the data.
        labels: int64 [N].
        predictions: int64 [N]: what the model takes each for, without any attack.
        entries: The attacks in the order in which they were first asked for.
        suites: By name, the positions in `entries` of the attacks that were asked for together.
        notes: By suite, sentences on how its attacks differ from what its name says.
        probes: What looking at the model found; [kind, sentence] each.
        path: Where it is saved, or None.
    """

    settings: dict[str, Any]
    right: Tensor
    positions: Tensor
    labels: Tensor
    predictions: Tensor
    entries: list[Entry] = field(default_factory=list)
    suites: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    probes: list[list[str]] = field(default_factory=list)
    path: Path | None = None

    def standing(self, after: int | None) -> Tensor:
        """Which examples (bool [N]) stand when the entry at `after`, and what it follows, is done.

        None: those that the model classifies.
        """
        standing = self.right.clone()
        while after is not None:
            standing[self.entries[after].broke] = False
            after = self.entries[after].after
        return standing

    def finished(self) -> list[tuple[int, Entry]]:
        """Positions and entries of the attacks that have ended."""
        return [(i, entry) for i, entry in enumerate(self.entries) if entry.finished]

    def outcomes(self) -> Tensor:
        """int16 [N]: the place among the finished attacks of the first that broke the example.

        -1 if it still stands, -2 if it was misclassified without any attack.
        """
        outcomes = torch.where(self.right, -1, -2).to(torch.int16)
        for place, (_, entry) in reversed(list(enumerate(self.finished()))):
            outcomes[entry.broke] = place
        return outcomes

    def attacked(self) -> Tensor:
        """int64 [N]: what the model takes each example for in the worst case: as broken first."""
        taken = self.predictions.clone()
        for _, entry in reversed(self.finished()):
            taken[entry.broke] = torch.tensor(entry.taken, dtype=torch.int64)
        return taken

    def add(
        self,
        name: str,
        identity: dict[str, Any],
        after: int | None = None,
        *,
        black_box: bool = False,
        bounded: bool = True,
    ) -> int:
        """The position of an attack on what `after` left, appended if it is not on record.

        A name that another attack has already becomes `name#2` and so on.
        """
        for index, entry in enumerate(self.entries):
            if entry.identity == identity and entry.after == after:
                return index
        taken = {entry.name for entry in self.entries}
        count, unique = 1, name
        while unique in taken:
            count += 1
            unique = f"{name}#{count}"
        self.entries.append(
            Entry(
                name=unique,
                identity=identity,
                after=after,
                attacked=int(self.standing(after).sum()),
                black_box=black_box,
                bounded=bounded,
            )
        )
        return len(self.entries) - 1

    def take(self, other: Record) -> None:
        """Take the attacks of another record of the same examples that have not ended here."""
        places: list[int] = []
        for entry in other.entries:
            after = None if entry.after is None else places[entry.after]
            at = self.add(entry.name.partition("#")[0], entry.identity, after)
            places.append(at)
            if entry.finished and not self.entries[at].finished:
                name = self.entries[at].name
                self.entries[at] = replace(entry, name=name, after=after)
        for name, which in other.suites.items():
            self.suites[name] = [places[i] for i in which]
        self.notes |= other.notes
        self.probes = self.probes or other.probes

    def save(self) -> None:
        """Write the record aside, then put it in place in one step: a kill leaves old or new.

        Raises:
            UserError: If it cannot be written.
        """
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "right": self.right.int().tolist(),
            "positions": self.positions.tolist(),
            "labels": self.labels.tolist(),
            "predictions": self.predictions.tolist(),
            "attacks": [asdict(entry) for entry in self.entries],
            "suites": self.suites,
            "notes": self.notes,
            "probes": self.probes,
        }
        with writing(self.path):
            write_whole(self.path, json.dumps(content, allow_nan=False))


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: If the file is not one, or is damaged.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        entries = [Entry(**entry) for entry in content["attacks"]]
        record = Record(
            settings=dict(content["settings"]),
            right=torch.tensor(content["right"], dtype=torch.int8).bool(),
            positions=torch.tensor(content["positions"], dtype=torch.int64),
            labels=torch.tensor(content["labels"], dtype=torch.int64),
            predictions=torch.tensor(content["predictions"], dtype=torch.int64),
            entries=entries,
            suites={name: list(map(int, which)) for name, which in content["suites"].items()},
            notes={name: list(map(str, said)) for name, said in content["notes"].items()},
            probes=[[str(kind), str(sentence)] for kind, sentence in content["probes"]],
            path=path,
        )
        record.outcomes(), record.attacked()
        for index, entry in enumerate(entries):
            if entry.after is not None and not 0 <= entry.after < index:
                raise ValueError(f"the attack {entry.name} follows none that is there")
        return record
    except OSError as error:
        raise UserError(f"The outcomes file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not an outcomes file that can be continued ({type(error).__name__}: "
            f"{error}). Name another file or folder, or move this one away."
        ) from error


def resumed(fresh: Record) -> Record:
    """The record of an evaluation to go on with: the one in its file, or the fresh one, saved.

    Raises:
        UserError: If the file is damaged or belongs to another evaluation.
    """
    if fresh.path is None or not fresh.path.exists():
        fresh.save()
        return fresh
    record = load(fresh.path)
    there, here = record.settings, fresh.settings
    keys = sorted(there.keys() | here.keys())
    differing = [key for key in keys if there.get(key) != here.get(key)]
    if differing:
        what = "; ".join(f"{k}: there {there.get(k)!r}, here {here.get(k)!r}" for k in differing)
        hint = " (does the loader shuffle?)" if "data" in differing else ""
        raise UserError(
            f"{fresh.path} holds the outcomes of another evaluation: {what}{hint}. Name another "
            "file or folder for this one."
        )
    if len(record.right) != len(fresh.right):
        raise UserError(
            f"{fresh.path} has {len(record.right)} outcomes for {len(fresh.right)} examples: it is "
            "damaged. Name another file or folder."
        )
    return record


def file_for(store: str | Path, shard: str | None) -> Path:
    """The file of a record in `store`: that itself if it ends in .json, else one in the folder."""
    path = Path(store)
    if path.suffix == ".json":
        return path
    if shard is None:
        return path / "outcomes.json"
    part, parts = parse_shard(shard)
    return path / f"outcomes-{part}-of-{parts}.json"


def merged(records: Sequence[Record]) -> Record:
    """The record of a whole from the records of all its shards, example by example.

    Raises:
        UserError: If the shards are not those of one evaluation, or one is missing or unfinished.
    """
    records = sorted(records, key=lambda r: parse_shard(str(r.settings.get("shard"))))
    # Each shard knows only its own images; the labels are those of all.
    own = ("shard", "data")
    shared = [{k: v for k, v in r.settings.items() if k not in own} for r in records]
    shards = [str(r.settings["shard"]) for r in records]
    if any(settings != shared[0] for settings in shared):
        raise UserError(
            f"The shards {', '.join(shards)} come from different evaluations: model, data and "
            "settings must be the same."
        )
    parts = parse_shard(shards[-1])[1]
    wanted = [f"{part}/{parts}" for part in range(1, parts + 1)]
    if shards != wanted:
        missing = [shard for shard in wanted if shard not in shards]
        what = f"missing: {', '.join(missing)}" if missing else f"got {', '.join(shards)}"
        raise UserError(
            f"To merge {parts} shards each of 1/{parts} to {parts}/{parts} must be there; {what}."
        )
    attacks = [[(e.name, e.identity, e.after) for e in r.entries] for r in records]
    if any(found != attacks[0] for found in attacks) or not all(
        entry.finished for record in records for entry in record.entries
    ):
        raise UserError(
            f"The shards {', '.join(shards)} have not all finished the same attacks. Run the same "
            "attacks to the end on each."
        )

    def joined(name: str) -> Tensor:
        each = [getattr(record, name) for record in records]
        whole = each[0].new_empty(sum(map(len, each)))
        for part, of_shard in enumerate(each):
            whole[part::parts] = of_shard
        return whole

    whole = Record(
        settings={**shared[0], "shard": None, "data": None},
        right=joined("right"),
        positions=joined("positions"),
        labels=joined("labels"),
        predictions=joined("predictions"),
        suites=records[0].suites,
        notes=records[0].notes,
        probes=[list(p) for p in dict.fromkeys(tuple(p) for r in records for p in r.probes)],
    )
    for i, first in enumerate(records[0].entries):
        each = [record.entries[i] for record in records]
        found = sorted(
            (parts * at + part, taken)
            for part, entry in enumerate(each)
            for at, taken in zip(entry.broke, entry.taken, strict=True)
        )
        entry = replace(first, broke=[at for at, _ in found], taken=[taken for _, taken in found])
        for name in ("attacked", "batches", "outside", "seconds"):
            setattr(entry, name, sum(getattr(one, name) for one in each))
        whole.entries.append(entry)
    return whole


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors: their types, shapes and bytes, one after the other."""
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint_of(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by name."""
    return fingerprint_of_state(model.state_dict())


def fingerprint_of_state(state: Mapping[str, Any]) -> str:
    """The same of a state_dict."""
    return digest_of(
        tensor
        for name, value in sorted(state.items())
        if isinstance(value, Tensor)
        for tensor in (torch.tensor(list(name.encode()), dtype=torch.uint8), value)
    )
