"""What the reader reads from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest


class WrongBytesError(Exception):
    """A checksum does not match."""


class OpenExperts(ABC):
    """A model's experts on disk, open."""

    remedy: ClassVar[str]  # what to do when an expert cannot be read
    path: Path  # what messages name
    manifest: Manifest  # how an expert lies in its extent; checksums only where they are known
    direct: bool  # reads bypass the page cache

    def failure(self, layer: int, expert: int, error: BaseException) -> BaseException:
        """A sentence that names layer and expert; what is no fault of the drive as it came."""
        match error:
            case WrongBytesError():
                what = "its bytes are not those that were packed"
            case EOFError():
                what = "the file ends before it: it was cut short"
            case OSError():
                what = f"the read failed ({error})"
            case _:
                return error
        module = self.manifest.layers[layer].module
        return FlashMoEError(
            f"{self.path}: expert {expert} of {module} (MoE layer {layer}): {what}; {self.remedy}"
        )

    @abstractmethod
    def close(self) -> None:
        """Close the files."""


class Backend(OpenExperts):
    """Each expert is one extent, wherever its bytes lie."""

    @abstractmethod
    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        """Fill `memory`, page-aligned, with an extent's bytes from `start` on. Thread-safe.

        Leaves nothing in the page cache. Raises OSError when the drive fails, EOFError when the
        file ends too early.
        """
