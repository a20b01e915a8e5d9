"""Where experts are read from, one file each behind `Backend`. `available()` lists them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from flashmoe.engines.transformers.backends.base import Backend
from flashmoe.errors import FlashMoEError, reading
from flashmoe.util.registry import discover

__all__ = ["Backend", "available", "backend_for", "open_path"]


@cache
def available() -> dict[str, type[Backend]]:
    """Every backend by name."""
    return discover(sys.modules[__name__], Backend)  # type: ignore[type-abstract]


def backend_for(path: Path) -> type[Backend]:
    """The backend for what lies at `path`, not opened yet. Raises FlashMoEError without one."""
    with reading(path):
        if not path.is_dir():
            raise FlashMoEError(f"{path}: no such directory; give a Hugging Face model or a store")
        for backend in available().values():
            if backend.accepts(path):
                return backend
    raise FlashMoEError(
        f"{path} holds no config.json and no manifest: give a Hugging Face model or a store"
    )


def open_path(path: Path) -> Backend:
    """The backend for what lies at `path`. Raises FlashMoEError when there is none."""
    backend = backend_for(path)
    with reading(path):
        return backend(path)
