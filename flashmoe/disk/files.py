"""Replaces files, whole or not at all, and keeps to the folder where it should."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import BinaryIO

from flashmoe.errors import FlashMoEError
from flashmoe.util.sizes import format_bytes

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_FREE_SHARE = 1.02  # of the bytes: headers, indices and the file system's own need some


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by a file with what `write` writes to it; atomic and durable.

    A symbolic link at `path` is replaced, not followed. Raises FlashMoEError when the file cannot
    be written; then, as when `write` raises, `path` stays as it was and nothing is left beside it.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:  # "x": a file or link of that name is not opened
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


def is_partial(path: Path) -> bool:
    """Is it by its name what a `replace` that was killed leaves?"""
    return bool(_PARTIAL.fullmatch(path.name))


def check_replaceable(path: Path) -> None:
    """Raise FlashMoEError where `replace` could not write `path`; call it before long work."""
    folder = path.absolute().parent
    obstacle = ""
    try:
        if not folder.is_dir():
            obstacle = "its directory does not exist; make it first"
        elif path.is_dir():
            obstacle = "it is a directory; name a file"
        elif not os.access(folder, os.W_OK | os.X_OK):
            obstacle = f"{folder} is not yours to write to"
    except OSError as error:  # the folder may not be searched, or the name is too long
        obstacle = error.strerror or str(error)
    if obstacle:
        raise FlashMoEError(f"{path} cannot be written: {obstacle}")


def check_room(path: Path, what: str, size_bytes: int) -> None:
    """Raises FlashMoEError where the disk that is to hold `path` is too small for `what`."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < size_bytes * _FREE_SHARE:
        raise FlashMoEError(
            f"{path}: {what} takes {format_bytes(size_bytes)} and the disk has "
            f"{format_bytes(free_bytes)} free"
        )


def is_inside(name: object, *, subfolders: bool) -> bool:
    """Is `name` the name of a file that cannot lie outside the folder to which it is relative?

    With `subfolders` the file may lie in one of these.
    """
    if not isinstance(name, str) or not name:
        return False
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    return subfolders or path.name == name


def _sync_directory(directory: Path) -> None:
    """Make a rename durable where the file system can; the file is whole in any case."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
