"""Owns the page to explore landscapes in, complete in itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path

from robustflat.errors import UserError
from robustflat.files import json_safe
from robustflat.landscapes import Landscape


def save_html(
    landscapes: Mapping[str, Landscape],
    path: str | os.PathLike[str],
    *,
    title: str = "Weight-loss landscape",
) -> Path:
    """Write a page in which the landscapes can be read off and compared; it loads nothing.

    Of several random directions it shows the mean.

    Args:
        landscapes: by the models' names; all lines or all planes.
        path: the file.
        title: of the page.

    Raises:
        UserError: if there is none, they are mixed, or the file cannot be written.
    """
    if len({len(landscape.axes) for landscape in landscapes.values()}) != 1:
        raise UserError("A page shows landscapes that are all lines or all planes, at least one.")
    data = {
        name: {
            **found.to_dict(),
            **{
                q: {k: v.tolist() for k, v in found.mean(q).items()}
                for q in ("losses", "accuracies")
            },
        }
        for name, found in landscapes.items()
    }
    # Inside a script element only "</" and "<!--" could end or change its parsing.
    text = json.dumps(json_safe(data), allow_nan=False).replace("<", "\\u003c")
    page = resources.files("robustflat.report").joinpath("landscape.html").read_text("utf-8")
    page = page.replace("@TITLE@", escape(title)).replace("@DATA@", text)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, "utf-8")
    except OSError as error:
        raise UserError(f"The page cannot be written to {target}: {error}.") from error
    return target
