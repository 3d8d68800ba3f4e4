"""Owns runs as surrogates of a transfer attack: `transfer:RUN` becomes the model of that run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustflat.errors import UserError
from robustflat.subject import Subject, open_subject


def with_surrogates(requests: Sequence[Any], subject: Subject) -> list[Any]:
    """Requests of attacks, in which every run that is named as a surrogate has been opened.

    Its best checkpoint is taken, or its last if it has no best.

    Raises:
        UserError: If it has none, or was trained on another data set than the subject is tested on.
    """
    return [_opened(request, subject) for request in requests]


def _opened(request: Any, subject: Subject) -> Any:
    kind, _, source = request.partition(":") if isinstance(request, str) else ("", "", "")
    if kind != "transfer" or not Path(source).is_dir():
        return request
    other = open_subject(source, device=str(subject.device))
    if other.data != subject.data:
        raise UserError(
            f"The surrogate {source} was trained on {other.data}, and {subject.name} is tested on "
            f"{subject.data}: name a run on the same data set."
        )
    checkpoint = "best" if "best" in other.checkpoints else "last"
    return {"name": request, "model": other.network(checkpoint).model}
