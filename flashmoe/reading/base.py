"""What every reader of experts offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from flashmoe.memory.arena import SlotMemory
from flashmoe.reading.backend import OpenExperts
from flashmoe.reading.read_queue import Span
from flashmoe.store.manifest import Manifest

READERS = 8  # threads, each with one read in flight
# Larger extents are read in pieces, all threads on one extent after the other, so that each arrives
# as early as it can (docs/speed.md#reads-in-2-mib-pieces).
PIECE_BYTES = 2 << 20


class Arriving(Protocol):
    """An expert that is being read."""

    def done(self) -> bool:
        """It was read, or cannot be."""

    def result(self) -> None:
        """Wait for it. Raises FlashMoEError where it cannot be read."""

    def exception(self) -> BaseException | None:
        """Wait for it; why it cannot be read."""


class Reader(ABC):
    """Brings experts of one open backend into memory. Thread-safe."""

    backend: OpenExperts
    manifest: Manifest

    bytes_read: int  # since the last reset

    @property
    @abstractmethod
    def bytes_by_drive(self) -> list[int]:
        """Bytes that came from each drive since it was opened; empty where there is but one."""

    @property
    @abstractmethod
    def busy_seconds(self) -> float:
        """Time with at least one read in flight, since the last reset."""

    @abstractmethod
    def submit(self, layer: int, loads: Sequence[tuple[int, SlotMemory]]) -> Sequence[Arriving]:
        """Start reading experts of a layer, each into an arena's slot (DRAM: page-aligned).

        Returns what tells of each, in order (small extents share some). Its result raises
        FlashMoEError naming layer and expert when the drive fails, the file ends early, or
        the bytes are not those that were packed.
        """

    @abstractmethod
    def reset_counts(self) -> None: ...

    @abstractmethod
    def record_spans(self, spans: list[Span]) -> None:
        """Append every read from now on, where this reader can."""

    @abstractmethod
    def close(self) -> None:
        """End the threads and close the file, once what was demanded is read."""

    @abstractmethod
    def stand_still(self) -> None:
        """End all reads and begin none until `go_on`, by the same thread (see `util.forks`)."""

    @abstractmethod
    def go_on(self, *, in_child: bool) -> None: ...
