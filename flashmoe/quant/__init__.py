"""Ways to hold experts in fewer bytes, one file each.

`quantisers()` lists those that a store can be packed with, `formats()` those in which others
publish checkpoints.
"""

from __future__ import annotations

import sys
from functools import cache

from flashmoe.errors import FlashMoEError
from flashmoe.quant.base import (
    Parameters,
    Parts,
    Quantiser,
    Scheme,
    Weight,
    by_weight,
    part_name,
)
from flashmoe.quant.published import Published
from flashmoe.util.registry import discover

NONE = "none"
__all__ = [
    "NONE", "Parameters", "Parts", "Published", "Quantiser", "Scheme", "Weight", "by_weight",
    "formats", "get", "part_name", "quantiser", "quantisers",
]  # fmt: skip


@cache
def quantisers() -> dict[str, type[Quantiser]]:
    """Every scheme that `flashmoe pack` quantises with, by name; `none` is not among them."""
    return discover(sys.modules[__name__], Quantiser)  # type: ignore[type-abstract]


@cache
def formats() -> dict[str, type[Published]]:
    """Every format of published checkpoints, by name."""
    return discover(sys.modules[__name__], Published)  # type: ignore[type-abstract]


def quantiser(name: str) -> Quantiser | None:
    """The quantiser called `name`; None for `none`. Raises FlashMoEError for an unknown name."""
    if name == NONE:
        return None
    if name not in quantisers():
        choices = ", ".join((NONE, *quantisers()))
        raise FlashMoEError(f"no quantisation is called {name!r}: choose from {choices}")
    return quantisers()[name]()


def get(name: str) -> Scheme | None:
    """The scheme called `name`, of either kind; None for `none`.

    Raises FlashMoEError for an unknown name.
    """
    if name == NONE:
        return None
    return formats()[name]() if name in formats() else quantiser(name)
