"""Replaces files: whole or not at all, and never somebody else's."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from flashmoe.errors import FlashMoEError


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make `path` what `write` puts into the file that it is given: atomic and durable.

    A symbolic link at `path` is replaced, not followed. Raises FlashMoEError when the file cannot
    be written; then, as when `write` raises, `path` stays as it was and nothing is left beside it.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:  # exclusive: a file or link of that name is not opened
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise FlashMoEError(
            f"{path} cannot be written ({error.strerror or error}); what was there before is "
            "unchanged"
        ) from None
    _sync_directory(path.parent)


def check_replaceable(path: Path) -> None:
    """Raises FlashMoEError when `replace` could not write `path`: asked before a long work."""
    folder = path.absolute().parent
    obstacle = ""
    try:
        if not folder.is_dir():
            obstacle = "its directory does not exist; make it first"
        elif path.is_dir():
            obstacle = "it is a directory; name a file"
        elif not os.access(folder, os.W_OK | os.X_OK):
            obstacle = f"{folder} is not yours to write to"
    except OSError as error:  # a folder that may not be searched, a name too long
        obstacle = error.strerror or str(error)
    if obstacle:
        raise FlashMoEError(f"{path} cannot be written: {obstacle}")


def _sync_directory(directory: Path) -> None:
    """Make a rename durable, where the file system can: the file is whole without it too."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
