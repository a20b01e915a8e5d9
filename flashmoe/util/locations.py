"""Where FlashMoE keeps what it can make anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/flashmoe, by default ~/.cache/flashmoe.

    A relative $XDG_CACHE_HOME does not count, as its specification says. Raises RuntimeError where
    this user has no home.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = configured if configured.is_absolute() else Path.home() / ".cache"
    if not folder.is_absolute():
        raise RuntimeError(f"the home directory {Path.home()} is a relative path")
    return folder / "flashmoe"
