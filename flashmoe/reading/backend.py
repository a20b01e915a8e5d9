"""What the reader reads from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from flashmoe.store.manifest import Manifest


class Backend(ABC):
    """A model's experts on disk, open: each is one extent, wherever its bytes lie."""

    remedy: ClassVar[str]  # what to do when an expert cannot be read
    path: Path  # what messages name
    manifest: Manifest  # how an expert lies in its extent; checksums only where they are known
    direct: bool  # reads bypass the page cache

    @abstractmethod
    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        """Fill `memory`, page-aligned, with an extent's bytes from `start` on. Thread-safe.

        Leaves nothing in the page cache. Raises OSError when the drive fails, EOFError when the
        file ends too early.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""
