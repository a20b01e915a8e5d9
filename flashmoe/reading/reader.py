"""Reads experts from a backend into memory: several at a time, what is needed first, checked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import TYPE_CHECKING, cast

import xxhash

from flashmoe.memory.arena import SlotMemory
from flashmoe.reading.backend import Backend, WrongBytesError
from flashmoe.reading.base import PIECE_BYTES, READERS, Reader
from flashmoe.reading.read_queue import Read, ReadQueue, Span

if TYPE_CHECKING:  # an engine without torch reads too
    import torch

    from flashmoe.reading.staging import Staging

# Smaller extents go to the threads in groups, since a task costs as much as half of such a read.
GROUPED_BELOW_BYTES = 1 << 20


class Extent:
    """An expert on its way into memory, piece by piece; `arrived` when no piece is left."""

    def __init__(self, layer: int, expert: int, memory: SlotMemory) -> None:
        self.layer = layer
        self.expert = expert
        self.memory = memory
        self.reads: list[Read] = []
        self.pieces_left = 0
        self.cancelled = False  # nobody looks at what arrives
        self.bytes_read = 0
        self.error: BaseException | None = None
        self.arrived: Future[None] = Future()


class ExtentReader(Reader):
    """Fills caller-owned memory with experts of one open backend. Thread-safe.

    Where the backend knows checksums (xxh3-64), the first read of each extent is checked, or with
    `check_all` every one (docs/speed.md#checksums).
    """

    backend: Backend

    def __init__(
        self, backend: Backend, readers: int = READERS, *, check_all: bool = False
    ) -> None:
        """The backend is closed with the reader."""
        self.backend = backend
        self.manifest = backend.manifest
        self.readers = readers
        self.check_all = check_all
        self.bytes_read = 0
        self._queue = ReadQueue(readers)
        self._checked = [[not layer.checksums] * layer.n_experts for layer in self.manifest.layers]
        self._lock = threading.Lock()

    @property
    def busy_seconds(self) -> float:
        return self._queue.busy_seconds

    def record_spans(self, spans: list[Span]) -> None:
        self._queue.spans = spans

    def reset_counts(self) -> None:
        with self._lock:
            self.bytes_read = 0
        self._queue.reset_counts()

    def submit(self, layer: int, loads: Sequence[tuple[int, SlotMemory]]) -> list[Future[None]]:
        extent_bytes = self.manifest.layers[layer].extent_bytes
        if extent_bytes >= GROUPED_BELOW_BYTES:
            extents = [self._in_pieces(layer, expert, memory) for expert, memory in loads]
            self._queue.demand(read for extent in extents for read in extent.reads)
            return [extent.arrived for extent in extents]
        size = max(1, -(-len(loads) // self.readers))
        groups = [loads[first : first + size] for first in range(0, len(loads), size)]
        arrivals: list[Future[None]] = [Future() for _ in groups]
        pairs = list(zip(groups, arrivals, strict=True))
        self._queue.demand(
            [partial(self._read_group, layer, group, future) for group, future in pairs]
        )
        return [future for group, future in pairs for _ in group]

    def extent_seconds(self, layer: int) -> float:
        """What an expert of a layer took of the drive, of late; 0 before the first."""
        extent_bytes = self.manifest.layers[layer].extent_bytes
        return self._queue.each_seconds * -(-extent_bytes // PIECE_BYTES)

    def guess(self, layer: int, expert: int, memory: SlotMemory) -> Extent:
        """Start reading an expert that may be needed, whenever no demand keeps the drive busy."""
        extent = self._in_pieces(layer, expert, memory)
        self._queue.guess(extent.reads)
        return extent

    def promote(self, extent: Extent) -> Future[None]:
        """The guess was right: read what is left of it as a demand."""
        self._queue.promote(extent.reads)
        return extent.arrived

    def cancel(self, extent: Extent) -> None:
        """The guess was wrong: read no more of it. Its memory is free once it has `arrived`."""
        extent.cancelled = True
        self._pieces_done(extent, len(self._queue.cancel(extent.reads)))

    def _in_pieces(self, layer: int, expert: int, memory: SlotMemory) -> Extent:
        extent = Extent(layer, expert, memory)
        starts = range(0, len(memory), PIECE_BYTES)
        extent.reads = [partial(self._read_piece, extent, start) for start in starts]
        extent.pieces_left = len(extent.reads)
        return extent

    def _read_group(
        self, layer: int, group: Sequence[tuple[int, SlotMemory]], arrived: Future[None]
    ) -> None:
        checked = self._checked[layer]
        done, expert = 0, -1
        error: BaseException | None = None
        try:
            for expert, memory in group:
                self._fill(layer, expert, 0, memory)
                if not checked[expert]:
                    self._check(layer, expert, memory)
                done += len(memory)
        except BaseException as failure:  # whatever it is, its owner waits for it
            error = self.backend.failure(layer, expert, failure)
        with self._lock:
            self.bytes_read += done
        _tell(arrived, error)

    def _read_piece(self, extent: Extent, start: int) -> None:
        piece, done = extent.memory[start : start + PIECE_BYTES], 0
        try:
            self._fill(extent.layer, extent.expert, start, piece)
            done = len(piece)
        except BaseException as error:  # whatever it is, its owner waits for it
            extent.error = self.backend.failure(extent.layer, extent.expert, error)
        with self._lock:
            self.bytes_read += done
            extent.bytes_read += done
        self._pieces_done(extent, 1)

    def _pieces_done(self, extent: Extent, pieces: int) -> None:
        """`pieces` more will not write to the memory; after the last its owner may know."""
        with self._lock:
            extent.pieces_left -= pieces
            if extent.pieces_left or not pieces:
                return
        try:
            layer, expert = extent.layer, extent.expert
            if not extent.cancelled and extent.error is None and not self._checked[layer][expert]:
                self._check(layer, expert, extent.memory)
        except BaseException as error:
            extent.error = self.backend.failure(layer, expert, error)
        _tell(extent.arrived, extent.error)

    def _fill(self, layer: int, expert: int, start: int, memory: SlotMemory) -> None:
        if isinstance(memory, memoryview):
            self.backend.read(layer, expert, start, memory)
        else:
            self._staging.read(layer, expert, start, memory)

    @cached_property
    def _staging(self) -> Staging:
        from flashmoe.reading.staging import Staging

        return Staging(self.backend)

    def _check(self, layer: int, expert: int, memory: SlotMemory) -> None:
        on_host = isinstance(memory, memoryview)
        content = memory if on_host else self._staging.bytes_of(cast("torch.Tensor", memory))
        digest = xxhash.xxh3_64_hexdigest(cast(memoryview, content))
        if digest != self.manifest.layers[layer].checksums[expert]:
            raise WrongBytesError
        self._checked[layer][expert] = not self.check_all

    def close(self) -> None:
        self._queue.close()
        self.backend.close()

    def stand_still(self) -> None:
        self._queue.stand_still()

    def go_on(self, *, in_child: bool) -> None:
        self._queue.go_on(in_child=in_child)


def _tell(arrived: Future[None], error: BaseException | None) -> None:
    if error is None:
        arrived.set_result(None)
    else:
        arrived.set_exception(error)
