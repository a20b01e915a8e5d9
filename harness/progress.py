"""Progress of long commands, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Say = Callable[[str], None]  # takes one line

_started = time.monotonic()


def say(text: str) -> None:
    """One line, with the minutes since the start."""
    print(f"[{(time.monotonic() - _started) / 60:4.1f} min] {text}", file=sys.stderr, flush=True)
