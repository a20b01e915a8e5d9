"""What the reader reads from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from flashmoe.errors import FlashMoEError
from flashmoe.reading.drives import NONE
from flashmoe.store.manifest import Manifest
from flashmoe.store.shares import Range


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
    """Each expert is one extent, wherever its bytes lie: on one drive or on several."""

    n_copies = 1  # that hold each extent whole, each on a drive of its own

    def parts(self, layer: int) -> list[Range]:
        """An extent's ranges that are best read by separate reads, each for a drive of its own."""
        return [(0, self.manifest.layers[layer].extent_bytes)]

    @abstractmethod
    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        """Fill `memory`, page-aligned, with an extent's bytes from `start` on. Thread-safe.

        Leaves nothing in the page cache. Raises OSError when the drive fails, EOFError when the
        file ends too early.
        """

    def read_copy(
        self, layer: int, expert: int, start: int, memory: memoryview, copy: int = NONE
    ) -> int:
        """As `read`, from this copy if it can be read; returns which one it was.

        copy: NONE leaves the choice.
        """
        self.read(layer, expert, start, memory)
        return 0

    def choose_copy(self, size_bytes: int, among: int) -> int:
        """The copy that would be the first to bring so much; NONE: only such as are left alone.

        among: a bit for each that may be chosen.
        """
        return 0

    def note_wrong_bytes(self, copy: int) -> None:
        """What came of this copy is not what was packed."""

    @property
    def bytes_by_drive(self) -> list[int]:
        """Bytes that each drive gave since it was opened; empty where there is but one."""
        return []
