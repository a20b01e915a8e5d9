"""Ways to hold experts in fewer bytes, one file each. `available()` lists them."""

from __future__ import annotations

import sys
from functools import cache

from flashmoe.errors import FlashMoEError
from flashmoe.quant.base import Parameters, Parts, Scheme, Weight, by_weight, part_name
from flashmoe.util.registry import discover

NONE = "none"
__all__ = [
    "NONE", "Parameters", "Parts", "Scheme", "Weight", "available", "by_weight", "get", "part_name",
]  # fmt: skip


@cache
def available() -> dict[str, type[Scheme]]:
    """Every scheme by name; `none` is not among them."""
    return discover(sys.modules[__name__], Scheme)  # type: ignore[type-abstract]


def get(name: str) -> Scheme | None:
    """The scheme called `name`; None for `none`. Raises FlashMoEError for an unknown name."""
    if name == NONE:
        return None
    if name not in available():
        choices = ", ".join((NONE, *available()))
        raise FlashMoEError(f"no quantisation is called {name!r}: choose from {choices}")
    return available()[name]()
