"""Reads experts whose bytes have places of their own in memory, as whole ranges of a file."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from flashmoe.memory.arena import SlotMemory
from flashmoe.reading.backend import OpenExperts
from flashmoe.reading.base import READERS, Reader
from flashmoe.reading.pread import ENDED
from flashmoe.reading.range_queue import RangeQueue
from flashmoe.reading.range_work import BYTES, FAILURE
from flashmoe.reading.read_queue import Span


class PlacedExperts(OpenExperts):
    """Each expert is a few ranges of a file, which have their own places in memory.

    Experts are numbered through all layers.
    """

    ranges: np.ndarray  # [experts, most, 8] int64: each one's jobs, see `range_work`
    n_ranges: np.ndarray  # [experts] int64: how many of them count
    copies: np.ndarray | None = None  # [files, drives] int64: descriptors, see `range_work`
    places: Sequence[object] = ()  # what warnings call these drives
    pages: np.ndarray  # [experts, kinds, 2] int64: addresses, from and to, of pages of its own

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raises OSError when a file is another one than when it was opened."""


class RangeRead:
    """An expert on its way to its place."""

    def __init__(self, reader: RangeReader, layer: int, expert: int, ticket: int) -> None:
        self.layer = layer
        self.expert = expert
        self.ticket = ticket
        self._reader = reader
        self._counts = reader.queue.tickets[ticket]

    @property
    def bytes_read(self) -> int:
        return int(self._counts[BYTES])

    def done(self) -> bool:
        """Nothing is written to its place any more."""
        return self._reader.queue.is_done(self.ticket)

    def settle(self) -> None:
        """Wait until it is done."""
        self._reader.queue.wait(self.ticket)

    def exception(self) -> BaseException | None:
        """Why it failed, once it is done; None: it did not."""
        self.settle()
        match int(self._counts[FAILURE]):
            case 0:
                return None
            case number if number == ENDED:
                error: BaseException = EOFError()
            case number:
                error = OSError(number, os.strerror(number))
        return self._reader.backend.failure(self.layer, self.expert, error)

    def result(self) -> None:
        """Wait for all of its bytes. Raises FlashMoEError naming layer and expert."""
        if error := self.exception():
            raise error


class RangeReader(Reader):
    """Fills the places of experts of one open backend. Thread-safe.

    An expert is on its way once at a time.
    """

    backend: PlacedExperts

    def __init__(self, backend: PlacedExperts, readers: int = READERS) -> None:
        """The backend is closed with the reader."""
        self.backend = backend
        self.manifest = backend.manifest
        self._first_ticket = self.manifest.first_experts
        tickets, jobs_a_ticket = self._first_ticket[-1], backend.ranges.shape[1]
        if backend.copies is None:
            self.queue = RangeQueue(readers, tickets, jobs_a_ticket)
        else:
            self.queue = RangeQueue(readers, tickets, jobs_a_ticket, backend.copies, backend.places)

    @property
    def bytes_read(self) -> int:  # type: ignore[override]
        return self.queue.bytes_read

    @property
    def bytes_by_drive(self) -> list[int]:
        return self.queue.bytes_by_drive

    @property
    def busy_seconds(self) -> float:
        return self.queue.busy_seconds

    def reset_counts(self) -> None:
        self.queue.reset_counts()

    def record_spans(self, spans: list[Span]) -> None:
        """Its threads record none."""

    def submit(self, layer: int, loads: Sequence[tuple[int, SlotMemory]]) -> list[RangeRead]:
        """Each expert goes to its own place, and not to a slot.

        Raises FlashMoEError where no thread can be started.
        """
        reads = [self._read_of(layer, expert) for expert, _ in loads]
        for read in reads:
            ranges = self.backend.ranges[read.ticket]
            self.queue.demand(ranges[: self.backend.n_ranges[read.ticket]])
        return reads

    def error_of(self, layer: int, expert: int) -> BaseException | None:
        """Why its last read failed, once that is done; None: it did not."""
        return self._read_of(layer, expert).exception()

    def _read_of(self, layer: int, expert: int) -> RangeRead:
        return RangeRead(self, layer, expert, self._first_ticket[layer] + expert)

    def close(self) -> None:
        self.queue.close()
        self.backend.close()

    def stand_still(self) -> None:
        self.queue.settle()

    def go_on(self, *, in_child: bool) -> None:
        if in_child:
            self.queue.start_over()
