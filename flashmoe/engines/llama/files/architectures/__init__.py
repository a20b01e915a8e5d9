"""Families that can be written as GGUF files, one file each. `available()` lists them."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from flashmoe.engines.llama.files.architecture import Architecture
from flashmoe.errors import FlashMoEError
from flashmoe.util.registry import discover


@cache
def available() -> dict[str, type[Architecture]]:
    """Every family by transformers' name for it."""
    return discover(sys.modules[__name__], Architecture)  # type: ignore[type-abstract]


def of(config: dict[str, Any]) -> Architecture:
    """The family of a configuration of transformers. Raises FlashMoEError for an unknown one."""
    name = config["model_type"]
    if name not in available():
        raise FlashMoEError(
            f"models of the family {name} are not written as GGUF: choose from those of "
            f"{', '.join(available())}"
        )
    return available()[name](config)
