"""Owns the finding of measures by name: all that are registered, the literature's presets too."""

from __future__ import annotations

from dataclasses import replace

from robustflat.errors import UserError, nearest

# Whose functions are the measures.
from robustflat.flatness import curvature, inputs, mechanism, sharpness  # noqa: F401
from robustflat.flatness.complexity import bayes, margins, norms  # noqa: F401
from robustflat.flatness.decorator import MEASURES, Measure
from robustflat.flatness.presets import PRESETS
from robustflat.plugins import imported, is_plugin

MEASURES.update(
    {
        name: replace(
            MEASURES[f"{row.kind}_{row.loss}"], name=name, summary=row.summary,
            changes=row.options, attack=row.attack, split=row.split, preset=True,
        )
        for name, row in PRESETS.items()
    }
)  # fmt: skip


def find(name: str) -> Measure:
    """The measure of that name, or of the decorated function ``package.module:function``.

    Settings that follow the name ("worst_clean with radius=0.1") are left out of account.

    Raises:
        UserError: if there is none.
    """
    name = name.partition(" with ")[0]
    if is_plugin(name):
        own = getattr(imported(name, "flatness measure"), "measure", None)
        if not isinstance(own, Measure):
            raise UserError(
                f"{name} is no flatness measure. Put @robustflat.flatness.measure(...) above it."
            )
        return replace(own, name=name)
    if name not in MEASURES:
        raise UserError(
            f"There is no flatness measure {name!r}.{nearest(name, MEASURES, 3)} Measures: "
            f"{', '.join(MEASURES)}."
        )
    return MEASURES[name]
