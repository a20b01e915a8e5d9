"""Systems under test, one file each behind `System`. `available()` lists them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from baselines.base import System
from flashmoe.errors import FlashMoEError
from flashmoe.util.registry import discover


@dataclass(frozen=True)
class Choice:
    """A system and its argument; calling it makes one."""

    system_class: type[System]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> System:
        return self.system_class(**self.options)


@cache
def available() -> dict[str, type[System]]:
    """Every system by name."""
    return discover(sys.modules[__name__], System)  # type: ignore[type-abstract]


def get(label: str) -> Choice:
    """The system called `label`, a name or `name:argument`.

    Raises FlashMoEError when there is no such system, or its argument makes no sense.
    """
    name, colon, argument = label.partition(":")
    system = available().get(name)
    if system is None:
        raise FlashMoEError(f"no system is called {name!r}: choose from {', '.join(available())}")
    return Choice(system, system.options(argument) if colon else {})
