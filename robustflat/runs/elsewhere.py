"""Evaluating a model that no run of robustflat made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import robustflat.data as data
from robustflat.errors import UserError
from robustflat.evaluate import evaluate, load_model
from robustflat.files import write_json
from robustflat.train.setup import resolve_device


def evaluate_elsewhere(
    target: str,
    output: Path,
    *,
    architecture: str | None,
    options: dict[str, Any],
    data_name: str | None,
    data_root: Path,
    trust: bool,
    attacks: Sequence[Any] | None,
    samples: int | None,
    shard: str | None,
    norm: str | None,
    eps: float | None,
    seed: int,
    device: str,
    on_progress: Callable[[str, int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Attack a model on the test images of a data set and write the result.

    Args:
        target: a model's name, the file of a program, or, with ``architecture``, of a state_dict.
        output: the JSON file; per-example outcomes go to ``output`` without its ending, so that an
            interrupted evaluation goes on.
        architecture: the model's name, if ``target`` holds only weights.
        options: of the model.
        data_name: a data set's name.
        data_root: where its files are.
        trust: whether a program may be loaded.
        attacks: as :func:`robustflat.evaluate` takes them; AutoAttack if None.
        samples: evaluate a fixed class-balanced subset.
        shard: "i/n" to evaluate every n-th example only.
        norm: threat norm, needed.
        eps: threat radius in image units, needed.
        seed: of the attacks.
        device: where to compute.
        on_progress: told how far the attacks have come.

    Raises:
        UserError: if anything is missing or cannot be used.
    """
    missing = [
        name for name, value in (("data", data_name), ("norm", norm), ("eps", eps)) if value is None
    ]
    if missing or data_name is None or norm is None or eps is None:
        raise UserError(
            f"To evaluate the model {target}, say also {', '.join('--' + name for name in missing)}"
            ": a model alone names no images and no threat. For example: --data cifar10 --norm "
            "linf --eps 8/255."
        )
    place = resolve_device(device)
    images = data.load(data_name, root=data_root)
    model = load_model(
        target if architecture is None else architecture,
        None if architecture is None else target,
        num_classes=len(images.classes),
        in_channels=images.shape[0],
        image_size=images.shape[1:],
        mean=images.mean,
        std=images.std,
        trust=trust,
        device=place,
        **options,
    )
    result = evaluate(
        model,
        images.test,
        ["autoattack"] if attacks is None else attacks,
        norm,
        eps,
        seed,
        device=place,
        store=output.with_suffix(""),
        samples=samples,
        shard=shard,
        on_progress=on_progress,
    )
    report = result.to_dict()
    write_json(output, {"model": target, "data": data_name, **report})
    return report
