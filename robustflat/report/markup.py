"""Owns markup: elements of HTML and SVG whose text and attributes cannot be anything else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = frozenset({"input", "br"})


class Html(str):
    """Markup; every other text is escaped where it is put into an element."""

    __slots__ = ()


def node(tag: str, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """One element.

    Args:
        tag: its name.
        *children: elements and text, in order; None is left out.
        **attributes: ``class_`` stands for class and ``data_x`` for data-x; None and False are
            left out, True has no value.

    Returns:
        The markup, with everything but :class:`Html` escaped.
    """
    said = "".join(
        f" {_name(key)}" if value is True else f' {_name(key)}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Html(f"<{tag}{said}>")
    return Html(f"<{tag}{said}>{join(children)}</{tag}>")


def join(parts: Iterable[str | None]) -> Html:
    """Elements and text one after the other."""
    return Html("".join(p if isinstance(p, Html) else escape(p, quote=False) for p in parts if p))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
