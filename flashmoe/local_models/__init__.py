"""Models that other programs keep on this disk, one file for each program.

Each module here defines `PROGRAM`, its name, and `find(name)`: the GGUF file that the program
knows by a name; None where it has no such model. Raises FlashMoEError where it has one that
cannot be used.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType


def programs() -> list[ModuleType]:
    """Every program that is known here."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def find(name: str) -> Path | None:
    """The GGUF file that a program on this machine knows by `name`, or None.

    Raises FlashMoEError where a program has such a model in a form that cannot be used.
    """
    return next(filter(None, (program.find(name) for program in programs())), None)
