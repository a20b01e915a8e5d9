"""Engines, one folder each: `accepts(path)` says what it runs, `load(path, ...)` runs it."""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType
from typing import Any

from flashmoe.errors import FlashMoEError


def available() -> dict[str, ModuleType]:
    """Every engine by name. None of them imports its libraries before it loads something."""
    return {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.ispkg
    }


def load(path: str | os.PathLike[str], *, memory: int | str, **options: Any) -> Any:
    """A model whose experts stay on the SSD, by the engine that takes what lies at `path`.

    path: a Hugging Face directory or a packed store (see `engines.transformers.loading.load`).
    memory: bytes, or a size such as "4GiB", that experts may occupy; "auto": what is free.
    options: the engine's own. What is returned is what the engine's users know, with
        `.flashmoe`, an `engines.base.Engine`, beside it.
    Raises FlashMoEError when no engine takes the path, and as the engine does.
    """
    for engine in available().values():
        if engine.accepts(path):
            return engine.load(path, memory=memory, **options)
    raise FlashMoEError(f"{path}: no engine runs such a file; give a Hugging Face model or a store")
