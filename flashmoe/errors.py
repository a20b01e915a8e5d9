"""The exception that users see: one sentence that says what failed, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FlashMoEError(Exception):
    """An error that the user can act on. The command line prints it and exits with status 1."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError at `path`, or at a file below it, into a FlashMoEError."""
    try:
        yield
    except OSError as error:
        raise FlashMoEError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): "
            "see that this user may read it, and that the drive is sound"
        ) from None
