"""Says whether the experts that a program is about to load all fit, so that it needs no cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flashmoe.engines.llama.expert_tensors import GGUFContents
from flashmoe.memory import free_memory
from flashmoe.util.sizes import parse_bytes

# memory="auto" holds all where so many times the file is free: its caches must fit beside it.
_FILES = 1.25


def all_fit(
    memory: int | str, contents: Callable[[Path, os.stat_result], GGUFContents | None]
) -> bool:
    """Do the experts fit of the GGUF files that this process has open, if any has experts?

    Also while the program copies the files' pages to a layout of its own.
    contents: what `contents_of` says of a file. Raises FlashMoEError or OSError where it does.
    """
    experts_bytes = file_bytes = 0
    for path in _open_files():
        status = path.stat()
        if found := contents(path, status):
            experts_bytes += sum(tensor.size_bytes for tensor in found.tensors)
            file_bytes += status.st_size
    if not experts_bytes:
        return False
    if memory == "auto":
        room_bytes = free_memory.available_bytes() - free_memory.RESERVE_BYTES
        return room_bytes > _FILES * file_bytes
    return parse_bytes(memory) >= 2 * experts_bytes


def _open_files() -> list[Path]:
    """The files that this process has open, GGUF or not."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if (path := entry.readlink()).is_file():
                found.append(path)
    return found
