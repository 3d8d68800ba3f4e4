"""What the package's names lead to: functions as users call them, and every module by its path."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import FunctionType, ModuleType

import robustflat

FUNCTIONS = {"robustflat.evaluate", "robustflat.flatness"}


def packages(package: ModuleType = robustflat) -> list[ModuleType]:
    found = [package]
    for one in pkgutil.iter_modules(package.__path__):
        if one.ispkg:
            found += packages(importlib.import_module(f"{package.__name__}.{one.name}"))
    return found


def test_no_name_in_a_package_hides_a_module_of_it():
    hidden = {
        f"{package.__name__}.{one.name}"
        for package in packages()
        for one in pkgutil.iter_modules(package.__path__)
        if one.name != "__main__"
        and not isinstance(
            getattr(importlib.import_module(package.__name__), one.name, robustflat), ModuleType
        )
    }
    assert hidden <= FUNCTIONS


def test_what_is_called_like_a_package_is_a_function_and_leads_to_its_modules():
    code = """
        import robustflat.evaluate.record as record, robustflat.flatness.spectrum as spectrum
        import inspect, robustflat as rf, sys
        assert record is sys.modules["robustflat.evaluate.record"]
        assert spectrum is sys.modules["robustflat.flatness.spectrum"]
        for name in ("evaluate", "flatness"):
            function = getattr(rf, name)
            assert inspect.isfunction(function) and function.__name__ == name
            assert next(iter(inspect.signature(function).parameters)) == "model"
            assert "Args:" in function.__doc__
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    subprocess.run([sys.executable, "-c", lines], check=True)
    assert all(isinstance(getattr(robustflat, n.split(".")[1]), FunctionType) for n in FUNCTIONS)
