"""Owns the colours of every figure: told apart by colour-blind readers, on white and on black."""

from __future__ import annotations

# One colour for each run: blue, orange, green, purple, red, grey, on both pages. Found by search:
# every two are at least 32 apart in CIE Lab, also as seen with protanopia, deuteranopia and
# tritanopia (Machado et al. 2009), and each has at least the contrast of 3 to 1 with its page that
# WCAG 2.1 asks of graphics.
LIGHT = ("#1238c8", "#d77903", "#31a371", "#a253a8", "#9d0000", "#413238")
DARK = ("#697dfb", "#f8992d", "#95efbc", "#ecabf3", "#c24029", "#6d7173")
# Roles of a page, by theme.
ROLES = {
    "light": {"ink": "#1c1c1e", "soft": "#5f5f66", "line": "#dcdce0", "page": "#ffffff"},
    "dark": {"ink": "#e8e8ea", "soft": "#a8a8ae", "line": "#3c3c42", "page": "#17171a"},
}
# Of planes: light is high; orderly in lightness, so readable in grey and without red or green.
SCALE = "viridis"


def colour(run: int) -> str:
    """A run's colour on white."""
    return LIGHT[run % len(LIGHT)]


def themes() -> dict[str, dict[str, str]]:
    """For both themes what each name of a colour ("0", "1", ..., "ink", ...) stands for."""
    runs = {"light": LIGHT, "dark": DARK}
    return {
        theme: {**{str(i): c for i, c in enumerate(runs[theme])}, **roles}
        for theme, roles in ROLES.items()
    }
