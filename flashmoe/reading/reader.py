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
from flashmoe.reading.drives import NONE
from flashmoe.reading.read_queue import Read, ReadQueue, Span

if TYPE_CHECKING:  # an engine without torch reads too
    import torch

    from flashmoe.reading.staging import Staging

# Smaller extents go to the threads in groups, since a task costs as much as half of such a read.
GROUPED_BELOW_BYTES = 1 << 20
UNDECIDED = -2


class Extent:
    """An expert on its way into memory, piece by piece; `arrived` when no piece is left."""

    def __init__(self, layer: int, expert: int, memory: SlotMemory) -> None:
        self.layer = layer
        self.expert = expert
        self.memory = memory
        self.reads: list[Read] = []
        self.pieces_left = 0
        self.cancelled = False  # nobody looks at what arrives
        self.copy = UNDECIDED  # which all of it is to be read from; NONE: any
        self.copies: set[int] = set()  # which it came from
        self.bytes_read = 0
        self.error: BaseException | None = None
        self.arrived: Future[None] = Future()


class ExtentReader(Reader):
    """Fills caller-owned memory with experts of one open backend. Thread-safe.

    Where the backend knows checksums (xxh3-64), the first read of each extent from each copy is
    checked, or with `check_all` every one (docs/speed.md#checksums). Such a first read comes whole
    from one copy; later ones are spread over all copies' drives. Wrong bytes are read again from
    another copy.
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
        every_copy = (1 << backend.n_copies) - 1
        # of each expert, a bit for each copy of which no read was checked yet
        self._unchecked = [
            [every_copy if layer.checksums else 0] * layer.n_experts
            for layer in self.manifest.layers
        ]
        self._pieces = [self._pieces_of(layer) for layer in range(len(self.manifest.layers))]
        self._lock = threading.Lock()

    def _pieces_of(self, layer: int) -> list[tuple[int, int]]:
        """An extent's pieces, from and to, in such an order that all drives begin at once."""
        pieces = [
            (first - start, first, min(first + PIECE_BYTES, end))
            for start, end in self.backend.parts(layer)
            for first in range(start, end, PIECE_BYTES)
        ]
        return [(first, last) for _, first, last in sorted(pieces)]

    @property
    def bytes_by_drive(self) -> list[int]:
        return self.backend.bytes_by_drive

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
        return self._queue.each_seconds * len(self._pieces[layer])

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
        extent.reads = [partial(self._read_piece, extent, *piece) for piece in self._pieces[layer]]
        extent.pieces_left = len(extent.reads)
        return extent

    def _read_group(
        self, layer: int, group: Sequence[tuple[int, SlotMemory]], arrived: Future[None]
    ) -> None:
        done, expert = 0, -1
        error: BaseException | None = None
        try:
            for expert, memory in group:
                copy = self._fill(layer, expert, 0, memory, self._copy_for(layer, expert))
                self._check(layer, expert, memory, copy)
                done += len(memory)
        except BaseException as failure:  # whatever it is, its owner waits for it
            error = self.backend.failure(layer, expert, failure)
        with self._lock:
            self.bytes_read += done
        _tell(arrived, error)

    def _copy_for(self, layer: int, expert: int) -> int:
        """Which copy to read all of this expert from, so that it is checked; NONE: any."""
        unchecked = self._unchecked[layer][expert]
        if not unchecked or self.backend.n_copies == 1:
            return NONE
        return self.backend.choose_copy(self.manifest.layers[layer].extent_bytes, unchecked)

    def _read_piece(self, extent: Extent, start: int, end: int) -> None:
        piece, done, copy = extent.memory[start:end], 0, NONE
        try:
            if self.backend.n_copies > 1:
                with self._lock:
                    if extent.copy == UNDECIDED:  # now that earlier reads are under way
                        extent.copy = self._copy_for(extent.layer, extent.expert)
            else:
                extent.copy = NONE
            copy = self._fill(extent.layer, extent.expert, start, piece, extent.copy)
            done = len(piece)
        except BaseException as error:  # whatever it is, its owner waits for it
            extent.error = self.backend.failure(extent.layer, extent.expert, error)
        with self._lock:
            self.bytes_read += done
            extent.bytes_read += done
            extent.copies.add(copy)
        self._pieces_done(extent, 1)

    def _pieces_done(self, extent: Extent, pieces: int) -> None:
        """`pieces` more will not write to the memory; after the last its owner may know."""
        with self._lock:
            extent.pieces_left -= pieces
            if extent.pieces_left or not pieces:
                return
        try:
            layer, expert = extent.layer, extent.expert
            if not extent.cancelled and extent.error is None:
                copy = extent.copies.pop() if len(extent.copies) == 1 else NONE
                self._check(layer, expert, extent.memory, copy)
        except BaseException as error:
            extent.error = self.backend.failure(layer, expert, error)
        _tell(extent.arrived, extent.error)

    def _fill(
        self, layer: int, expert: int, start: int, memory: SlotMemory, copy: int = NONE
    ) -> int:
        """Read from this copy if it can be; which one it was, NONE: several."""
        if isinstance(memory, memoryview):
            return self.backend.read_copy(layer, expert, start, memory, copy)
        return self._staging.read(layer, expert, start, memory, copy)

    @cached_property
    def _staging(self) -> Staging:
        from flashmoe.reading.staging import Staging

        return Staging(self.backend)

    def _check(self, layer: int, expert: int, memory: SlotMemory, copy: int) -> None:
        """Compare the checksum where that is due; wrong bytes are read from another copy.

        copy: what all of it came from; NONE: several. Raises WrongBytesError where none is right.
        """
        unchecked = self._unchecked[layer]
        if not (unchecked[expert] or (self.check_all and self.manifest.layers[layer].checksums)):
            return
        if self._is_right(layer, expert, memory):
            if copy != NONE:
                with self._lock:
                    unchecked[expert] &= ~(1 << copy)
            return
        if copy != NONE:
            self.backend.note_wrong_bytes(copy)
        for other in range(self.backend.n_copies):
            if other != copy and self.backend.n_copies > 1:
                came_from = self._fill(layer, expert, 0, memory, other)
                if self._is_right(layer, expert, memory):
                    return
                if came_from == other:
                    self.backend.note_wrong_bytes(other)
        raise WrongBytesError

    def _is_right(self, layer: int, expert: int, memory: SlotMemory) -> bool:
        on_host = isinstance(memory, memoryview)
        content = memory if on_host else self._staging.bytes_of(cast("torch.Tensor", memory))
        digest = xxhash.xxh3_64_hexdigest(cast(memoryview, content))
        return digest == self.manifest.layers[layer].checksums[expert]

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
