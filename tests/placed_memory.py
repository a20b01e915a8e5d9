"""Experts of a tiny model in a file, and a program's memory with a place for each."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np

from flashmoe.engines.llama.engine import LlamaEngine
from flashmoe.reading.pread import read_through
from flashmoe.reading.range_reader import PlacedExperts
from flashmoe.residency.place_work import LEAVING
from flashmoe.store.manifest import LayerSpec, Manifest

EXTENT_BYTES, EXPERTS, LAYERS, TOP_K = 4096, 8, 3, 2


class Memory(PlacedExperts):
    """Whoever closes it gives reading back to pread."""

    remedy = "none"
    path = Path("memory")
    direct = False

    def __init__(self) -> None:
        layers = tuple(LayerSpec(f"{n}", EXPERTS, 0, EXTENT_BYTES, ()) for n in range(LAYERS))
        self.manifest = Manifest("", "", TOP_K, "", "", 0, layers)
        count = LAYERS * EXPERTS
        memory = mmap.mmap(-1, count * EXTENT_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.places = np.frombuffer(memory, np.uint8).reshape(LAYERS, EXPERTS, EXTENT_BYTES)
        self.descriptor = os.memfd_create("experts")
        for number in range(count):
            os.write(self.descriptor, bytes([number + 1]) * EXTENT_BYTES)
        self.edge_bytes, self.files = 0, []
        self.changed = False
        self.broken: set[tuple[int, int]] = set()
        offsets = np.arange(count) * EXTENT_BYTES
        start = offsets + self.places.ctypes.data
        self.pages = np.stack([start, start + EXTENT_BYTES], 1)[:, None]
        self.n_ranges = np.full(count, 2)
        self.ranges = np.empty((count, 2, 8), np.int64)
        half = EXTENT_BYTES // 2
        for late in (0, 1):  # the second half of an expert is used last
            at = late * half
            columns = self.descriptor, offsets + at, start + at, half, half, 1, late
            for column, values in enumerate((*columns, np.arange(count))):
                self.ranges[:, late, column] = values
        read_through(self._read)

    def _read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if divmod(offset // EXTENT_BYTES, EXPERTS) in self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    def holds(self, layer: int, expert: int, part: int | None = None) -> bool:
        """The expert's own bytes are in its place; part: 0 or 1, of one half of it."""
        place = self.places[layer, expert]
        if part is not None:
            place = place.reshape(2, -1)[part]
        return bool((place == layer * EXPERTS + expert + 1).all())

    def settled_content(self, engine: LlamaEngine) -> dict[tuple[int, int], tuple[int, int]]:
        """Of each place, whose bytes lie in it, if anyone's, once no read is under way.

        A wrong guess may have come by half when the rest was taken back: its place is to be
        emptied before anybody uses it.
        """
        engine.residency.reader.queue.settle()
        found = {}
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            if self.places[layer, expert].any():
                number, *others = np.unique(self.places[layer, expert]).tolist()
                if others:
                    assert engine.at_once.places.marks[layer * EXPERTS + expert] & LEAVING
                    number = others[-1]
                found[layer, expert] = divmod(number - 1, EXPERTS)
        return found

    def check_unchanged(self) -> None:
        if self.changed:
            raise OSError("the file changed")

    def close(self) -> None:
        os.close(self.descriptor)
        read_through(None)
