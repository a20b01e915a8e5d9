"""Progress bars, shown on standard error if that is a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar to update with (bytes done, total bytes)."""
    with tqdm(
        desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty()
    ) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def count_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar to update with the count done since the last update."""
    with tqdm(
        desc=title, total=total, unit=unit, unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:
        yield bar.update


@contextmanager
def status_line() -> Iterator[Callable[[str], object]]:
    """A line to replace by another one, cut to the terminal's width; it is gone at the end."""
    with tqdm(bar_format="{desc}", leave=False, disable=not sys.stderr.isatty()) as bar:

        def update(text: str) -> None:
            bar.set_description_str(text[: shutil.get_terminal_size().columns - 1])

        yield update
