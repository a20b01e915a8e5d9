"""Where models are read from, one file each behind `ModelBackend`; `available()` lists them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from flashmoe.engines.transformers.checkpoints.backends.base import ModelBackend
from flashmoe.errors import FlashMoEError, reading
from flashmoe.util.registry import discover

__all__ = ["ModelBackend", "available", "backend_for", "open_path"]


@cache
def available() -> dict[str, type[ModelBackend]]:
    """Every backend by name."""
    return discover(sys.modules[__name__], ModelBackend)  # type: ignore[type-abstract]


def backend_for(path: Path) -> type[ModelBackend]:
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


def open_path(path: Path) -> ModelBackend:
    """The backend for what lies at `path`. Raises FlashMoEError when there is none."""
    backend = backend_for(path)
    with reading(path):
        return backend(path)
