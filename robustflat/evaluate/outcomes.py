"""Owns the record of which attack broke which example: saved batch by batch, resumed, merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.gather import parse_shard
from robustflat.files import write_whole

STANDING, MISCLASSIFIED = -1, -2
FORMAT = "robustflat-outcomes-1"
_MOST_ATTACKS = 127

_Settings = dict[str, Any]


@dataclass(kw_only=True)
class Entry:
    """One attack of a record.

    Attributes:
        name: Unique in the record.
        identity: What tells this attack from every other: its parameters.
        attacked: Number of examples that stood when it began, all of which it attacks.
        batches: How many batches of those are done.
        finished: Whether all are.
        outside: How many of its images were outside the ball or the box, and were not counted.
        seconds: Time spent.
        black_box: Whether it only looked at outputs.
        bounded: Whether it keeps to the ball by itself.
    """

    name: str
    identity: dict[str, Any]
    attacked: int
    batches: int = 0
    finished: bool = False
    outside: int = 0
    seconds: float = 0.0
    black_box: bool = False
    bounded: bool = True


@dataclass(kw_only=True)
class Record:
    """Per-example outcomes of an evaluation, and the attacks that it has seen.

    Attributes:
        settings: What the outcomes depend on besides the attacks; a record is only ever continued
            with equal settings.
        outcomes: int8 [N]: the position in `entries` of the attack that broke the example, -1 if
            it still stands, -2 if it was misclassified without any attack.
        entries: The attacks in the order they ran; only the last can be unfinished.
        warnings: Sentences on the evaluation so far.
        path: Where it is saved, or None.
    """

    settings: _Settings
    outcomes: Tensor
    entries: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    path: Path | None = None

    def standing_at(self, index: int) -> Tensor:
        """Positions that stood when the attack at `index` began (ascending)."""
        stood = (self.outcomes == STANDING) | (self.outcomes >= index)
        return stood.nonzero().flatten()

    def add(
        self, name: str, identity: dict[str, Any], *, black_box: bool = False, bounded: bool = True
    ) -> Entry:
        """Append an attack, under `name` or, where another has that name, `name#2` and so on."""
        if len(self.entries) == _MOST_ATTACKS:
            raise UserError(f"A record holds at most {_MOST_ATTACKS} attacks.")
        taken = {entry.name for entry in self.entries}
        count, unique = 1, name
        while unique in taken:
            count += 1
            unique = f"{name}#{count}"
        attacked = int((self.outcomes == STANDING).sum())
        entry = Entry(
            name=unique,
            identity=identity,
            attacked=attacked,
            black_box=black_box,
            bounded=bounded,
        )
        self.entries.append(entry)
        return entry

    def find(self, identity: Mapping[str, Any]) -> Entry | None:
        """The attack with these parameters, if the record has it."""
        return next((entry for entry in self.entries if entry.identity == identity), None)

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
            "attacks": [asdict(entry) for entry in self.entries],
            "warnings": self.warnings,
            "outcomes": self.outcomes.tolist(),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(content, allow_nan=False))
        except OSError as error:
            raise UserError(
                f"The outcomes cannot be saved to {self.path}: {error.strerror}. What was saved "
                "before is intact; run the same command again when that is mended."
            ) from error


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: If the file is not one, or is damaged.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        names = {f.name for f in fields(Entry)}
        entries = [Entry(**{k: v for k, v in e.items() if k in names}) for e in content["attacks"]]
        outcomes = torch.tensor(content["outcomes"], dtype=torch.int8)
        low, high = int(outcomes.min()), int(outcomes.max())
        if outcomes.ndim != 1 or low < MISCLASSIFIED or high >= len(entries):
            raise ValueError(f"an outcome is out of the range [-2, {len(entries) - 1}]")
        return Record(
            settings=dict(content["settings"]),
            outcomes=outcomes,
            entries=entries,
            warnings=[str(sentence) for sentence in content["warnings"]],
        )
    except OSError as error:
        raise UserError(f"The outcomes file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not an outcomes file that can be continued ({type(error).__name__}: "
            f"{error}). Name another file or folder, or move this one away."
        ) from error


def resume(path: Path, settings: _Settings) -> Record | None:
    """Read a record to go on with it.

    Args:
        path: Its file.
        settings: Those of the evaluation that wants to go on.

    Returns:
        The record, or None if there is no file.

    Raises:
        UserError: If the file is damaged or belongs to another evaluation.
    """
    if not path.exists():
        return None
    record = load(path)
    differing = [
        key
        for key in sorted(settings.keys() | record.settings.keys())
        if settings.get(key) != record.settings.get(key)
    ]
    if differing:
        what = "; ".join(
            f"{key}: there {record.settings.get(key)!r}, here {settings.get(key)!r}"
            for key in differing
        )
        hint = " (does the loader shuffle?)" if "data" in differing else ""
        raise UserError(
            f"{path} holds the outcomes of another evaluation: {what}{hint}. Name another file or "
            "folder for this one."
        )
    record.path = path
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
    if not records:
        raise UserError("There is no shard to merge.")
    # Each shard knows only its own images; the labels are those of all.
    own = ("shard", "data")
    shared = [{k: v for k, v in r.settings.items() if k not in own} for r in records]
    shards = [str(r.settings.get("shard")) for r in records]
    if any(settings != shared[0] for settings in shared):
        raise UserError(
            f"The shards {', '.join(shards)} come from different evaluations: model, data and "
            "settings must be the same."
        )
    parts = len(records)
    wanted = [f"{part}/{parts}" for part in range(1, parts + 1)]
    if sorted(shards) != sorted(wanted):
        raise UserError(
            f"To merge {parts} shards there must be {', '.join(wanted)}, got {', '.join(shards)}."
        )
    attacks = [[(e.name, e.identity) for e in r.entries] for r in records]
    if any(found != attacks[0] for found in attacks) or not all(
        entry.finished for record in records for entry in record.entries
    ):
        raise UserError(
            f"The shards {', '.join(shards)} have not all finished the same attacks. Run the same "
            "attacks to the end on each."
        )
    outcomes = torch.empty(sum(len(r.outcomes) for r in records), dtype=torch.int8)
    for record, shard in zip(records, shards, strict=True):
        outcomes[parse_shard(shard)[0] - 1 :: parts] = record.outcomes
    entries = [
        Entry(
            name=first.name,
            identity=first.identity,
            attacked=sum(r.entries[i].attacked for r in records),
            batches=sum(r.entries[i].batches for r in records),
            finished=True,
            outside=sum(r.entries[i].outside for r in records),
            seconds=sum(r.entries[i].seconds for r in records),
            black_box=first.black_box,
            bounded=first.bounded,
        )
        for i, first in enumerate(records[0].entries)
    ]
    return Record(
        settings={**shared[0], "shard": None, "data": None},
        outcomes=outcomes,
        entries=entries,
        warnings=list(dict.fromkeys(sentence for r in records for sentence in r.warnings)),
    )


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of tensors: their types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {fingerprint([value])} ".encode())
    return digest.hexdigest()
