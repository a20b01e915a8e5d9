"""The one exception that users see: a sentence that says what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FlashMoEError(Exception):
    """Anything the user can act on. The command line prints it and exits with status 1."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses at `path`, or below, becomes a FlashMoEError."""
    try:
        yield
    except OSError as error:
        raise FlashMoEError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): "
            "see that this user may read it, and that the drive is sound"
        ) from None
