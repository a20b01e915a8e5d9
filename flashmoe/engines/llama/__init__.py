"""Models that llama.cpp computes, in its own programs and with its own kernels: GGUF files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashmoe.errors import FlashMoEError


def accepts(path: str | os.PathLike[str]) -> bool:
    return str(path).endswith(".gguf")


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """As `hosts.llama_cpp.load`: a `llama_cpp.Llama`, or whatever a package of its kind has."""
    if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises without permission)
        raise FlashMoEError(f"no file {path}")
    try:
        from flashmoe.engines.llama.hosts import llama_cpp
    except ImportError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[llama]'"
        ) from None
    return llama_cpp.load(Path(path), **options)
