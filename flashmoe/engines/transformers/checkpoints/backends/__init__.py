"""Opens the model at a path: one file for each kind of directory; `available()` lists them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    """The backend that reads `path`, not opened yet. Raises FlashMoEError where none does."""
    with reading(path):
        if not path.is_dir():
            raise FlashMoEError(f"{path}: no such directory; give a Hugging Face model or a store")
        for backend in available().values():
            if backend.accepts(path):
                return backend
    raise FlashMoEError(
        f"{path} holds no config.json and no manifest: give a Hugging Face model or a store"
    )


def open_path(path: Path, also: Sequence[Path] = ()) -> ModelBackend:
    """The model at `path`, open.

    also: folders of its copies or shares, besides those that it knows.
    Raises FlashMoEError where no backend reads it, or the one that does cannot.
    """
    backend = backend_for(path)
    with reading(path):
        return backend(path, also=also)
