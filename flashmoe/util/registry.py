"""Finds the classes that a package's modules define, so that a new file adds a new class."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def discover(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Concrete subclasses of `base` defined in `package`'s modules, by their `name`, sorted."""
    by_name: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            is_defined_here = member.__module__ == module.__name__
            if is_defined_here and issubclass(member, base) and not inspect.isabstract(member):
                by_name[member.name] = member  # type: ignore[attr-defined,assignment]
    return dict(sorted(by_name.items()))
