"""Where FlashMoE keeps what it can make anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/flashmoe, by default ~/.cache/flashmoe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashmoe"
