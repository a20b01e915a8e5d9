"""Systems under test, one file each behind `System`. `available()` lists them."""

from __future__ import annotations

import sys
from functools import cache

from baselines.base import System
from flashmoe.errors import FlashMoEError
from flashmoe.util.registry import discover


@cache
def available() -> dict[str, type[System]]:
    """Every system by name."""
    return discover(sys.modules[__name__], System)  # type: ignore[type-abstract]


def get(name: str) -> type[System]:
    """The system called `name`. Raises FlashMoEError when there is none."""
    if name not in available():
        raise FlashMoEError(f"no system is called {name!r}: choose from {', '.join(available())}")
    return available()[name]
