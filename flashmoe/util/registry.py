"""Finds the classes that a package's modules define, so that a new file is all a new one takes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def discover(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Concrete subclasses of `base` defined in `package`'s modules, by their `name`, sorted."""
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            own = member.__module__ == module.__name__ and issubclass(member, base)
            if own and not inspect.isabstract(member):
                found[member.name] = member  # type: ignore[attr-defined,assignment]
    return dict(sorted(found.items()))
