"""What ``robustflat list`` says, remembered until any of the code that it is read from changes."""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import robustflat
from robustflat.errors import UserError
from robustflat.files import read_json, write_json
from robustflat.registry import KINDS

# By kind and name, the lines of Kind.describe.
Listed = dict[str, dict[str, list[str]]]


def listed() -> Listed:
    """Every name of every kind, and what is to be said of it.

    To find out, all that has a name is imported, and with it torch, which takes seconds. So the
    user's cache keeps it, with a digest of the code that it was found in.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustflat/list.json"
    code = _digest()
    try:
        saved = read_json(path)
        if saved is not None and saved["code"] == code:
            kept: Listed = saved["listed"]
            return kept
    except (UserError, KeyError, TypeError):
        pass  # damaged, or not ours: written anew
    found = {kind.name: {name: kind.describe(name) for name in kind} for kind in KINDS.values()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"code": code, "listed": found})
    except (UserError, OSError):
        pass  # nowhere to keep it
    return found


def _digest() -> str:
    """Changes with every file of this package, and with torch, whose optimizers have names."""
    files = sorted(Path(robustflat.__file__).parent.rglob("*.py"))
    torch = find_spec("torch")
    if torch is not None and torch.origin is not None:
        files.append(Path(torch.origin))
    states = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    return sha256(repr((sys.version, states)).encode()).hexdigest()
