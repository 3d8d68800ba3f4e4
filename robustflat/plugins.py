"""What a user names as package.module:function: imported, and told of when it fails."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from robustflat.errors import UserError, nearest


def is_plugin(name: str) -> bool:
    """Whether ``name`` is of the form package.module:function."""
    module, colon, attribute = name.partition(":")
    identifiers = module.replace(".", "_").isidentifier() and bool(colon and attribute)
    return identifiers and module != "timm"  # timm:NAME is a model by timm's own names


def imported(name: str, what: str = "function") -> Callable[..., Any]:
    """What ``package.module:function`` names, with the current directory importable.

    Args:
        name: where it is; a dotted attribute may follow the colon.
        what: to call it in messages.

    Raises:
        UserError: if the module cannot be imported, lacks it, or it cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"A {what} of your own is written package.module:function, got {name!r}.")
    # Our own are asked for by the thousand, and forgetting what folders hold slows every import.
    found = sys.modules.get(module_name) or _imported(module_name, f"{what} {name}")
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(
                f"The module {module_name} has no {attribute!r}.{nearest(part, public, 3)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"The {what} {name} is not callable: {type(found).__name__}.")
    return found


def _imported(module: str, what: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module)
    except Exception as error:
        raise UserError(
            f"The {what} needs the module {module}, which could not be imported "
            f"({type(error).__name__}: {error}). It is looked for on the Python path and in {here}."
        ) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def origin(name: str) -> str:
    """The file that ``package.module:function`` stands in, as far as it can be told."""
    try:
        return inspect.getsourcefile(imported(name)) or "unknown"
    except (TypeError, OSError):
        return "unknown"
