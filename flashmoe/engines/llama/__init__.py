"""Models that llama.cpp computes, in its own programs and with its own kernels: GGUF files."""

from __future__ import annotations

import os
from typing import Any

from flashmoe.errors import FlashMoEError


def accepts(path: str | os.PathLike[str]) -> bool:
    return str(path).endswith(".gguf")


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    raise FlashMoEError(
        f"{path} runs in a program of llama.cpp: flashmoe run --memory 4GiB llama-server -m {path}"
    )
