"""Reads experts from a store into memory: direct, several at a time, checked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.direct_io import drop_page_cache, open_direct

READERS = 8  # threads, each with one read in flight
# Smaller extents are handed to the threads in groups: a task costs some 40 us, as much as
# half of a 48 KiB read.
GROUPED_BELOW_BYTES = 1 << 20
# Larger ones are read in pieces, all threads on one extent after the other, so that each arrives
# as early as it can. Random reads on a virtio NVMe, in whole extents of 12 MiB by 2 threads and
# in pieces by 8: 2.7 and 3.0 GB/s; with both cores computing, 2.3 and 2.5.
PIECE_BYTES = 1 << 20


@dataclass
class _Extent:
    """A large extent on its way, until its last piece is there."""

    layer: int
    expert: int
    memory: memoryview
    pieces_left: int
    arrived: Future[None] = field(default_factory=Future)
    error: BaseException | None = None


class ExtentReader:
    """Fills caller-owned memory with experts of one open store. Thread-safe.

    The first read of each extent is checked against the manifest's checksum (xxh3-64); later
    ones are not, since hashing every read took a fifth of the bandwidth beside computing cores.
    """

    def __init__(self, store: Path, manifest: manifests.Manifest, readers: int = READERS) -> None:
        self.store = store
        self.manifest = manifest
        self.readers = readers
        self.bytes_read = 0
        self.busy_seconds = 0.0  # time with at least one read in flight
        self._descriptor, self.direct = open_direct(store / manifest.experts_file, os.O_RDONLY)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="flashmoe-read")
        self._checked = [[False] * layer.n_experts for layer in manifest.layers]
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_since = 0.0

    def submit(self, layer: int, loads: Sequence[tuple[int, memoryview]]) -> list[Future[None]]:
        """Start reading experts of a layer, each into page-aligned, extent-sized memory.

        Returns a future for each, in order (small extents share some). Its result raises
        FlashMoEError naming layer and expert when the drive fails, the file ends early, or
        the bytes are not those that were packed.
        """
        extent_bytes = self.manifest.layers[layer].extent_bytes
        if extent_bytes >= GROUPED_BELOW_BYTES:
            return [self._submit_pieces(layer, expert, memory) for expert, memory in loads]
        size = max(1, -(-len(loads) // self.readers))
        groups = [loads[first : first + size] for first in range(0, len(loads), size)]
        self._begin(len(groups))
        tasks = [(self._pool.submit(self._read_group, layer, g), len(g)) for g in groups]
        return [future for future, count in tasks for _ in range(count)]

    def _submit_pieces(self, layer: int, expert: int, memory: memoryview) -> Future[None]:
        starts = range(0, len(memory), PIECE_BYTES)
        extent = _Extent(layer, expert, memory, len(starts))
        self._begin(len(starts))
        for start in starts:
            self._pool.submit(self._read_piece, extent, start)
        return extent.arrived

    def _begin(self, tasks: int) -> None:
        with self._lock:
            if tasks and not self._in_flight:
                self._busy_since = time.perf_counter()
            self._in_flight += tasks

    def _end(self, size_bytes: int) -> None:
        with self._lock:
            self.bytes_read += size_bytes
            self._in_flight -= 1
            if not self._in_flight:
                self.busy_seconds += time.perf_counter() - self._busy_since

    def _read_group(self, layer: int, group: Sequence[tuple[int, memoryview]]) -> None:
        spec, checked, direct = self.manifest.layers[layer], self._checked[layer], self.direct
        descriptor, preadv = self._descriptor, os.preadv
        start, extent_bytes = spec.offset_bytes, spec.extent_bytes
        done, expert = 0, -1
        try:
            for expert, memory in group:  # few steps: at 48 KiB each costs 1 % of the bandwidth
                count = preadv(descriptor, (memory,), start + expert * extent_bytes)
                if count != extent_bytes or not direct:
                    self._read_rest(layer, expert, memory, 0, count)
                if not checked[expert]:
                    self._check(layer, expert, memory)
                done += extent_bytes
        except OSError as error:
            raise self._error(layer, expert, f"the read failed ({error})") from None
        finally:
            self._end(done)

    def _read_piece(self, extent: _Extent, start: int) -> None:
        layer, expert = extent.layer, extent.expert
        piece, done = extent.memory[start : start + PIECE_BYTES], 0
        try:
            self._read_rest(layer, expert, piece, start, 0)
            done = len(piece)
        except OSError as error:
            extent.error = self._error(layer, expert, f"the read failed ({error})")
        except BaseException as error:  # whatever it is, its owner waits for it
            extent.error = error
        self._end(done)
        with self._lock:
            extent.pieces_left -= 1
            last = extent.pieces_left == 0
        if last:  # nothing writes to the memory any more: only now may its owner know
            try:
                if extent.error is None and not self._checked[layer][expert]:
                    self._check(layer, expert, extent.memory)
            except BaseException as error:
                extent.error = error
            if extent.error is None:
                extent.arrived.set_result(None)
            else:
                extent.arrived.set_exception(extent.error)

    def _read_rest(
        self, layer: int, expert: int, memory: memoryview, start: int, done: int
    ) -> None:
        """Fill `memory`, which begins `start` bytes into the extent and holds `done` bytes."""
        offset = self.manifest.layers[layer].extent_offset(expert) + start
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            if count == 0:
                raise self._error(layer, expert, "the file ends before it: it was cut short")
            done += count
        if not self.direct:
            drop_page_cache(self._descriptor, offset, len(memory))

    def _check(self, layer: int, expert: int, memory: memoryview) -> None:
        if xxhash.xxh3_64_hexdigest(memory) != self.manifest.layers[layer].checksums[expert]:
            raise self._error(layer, expert, "its bytes are not those that were packed")
        self._checked[layer][expert] = True

    def _error(self, layer: int, expert: int, what: str) -> FlashMoEError:
        module = self.manifest.layers[layer].module
        return FlashMoEError(
            f"store {self.store}: expert {expert} of {module} (MoE layer {layer}): {what}; "
            "run `flashmoe verify`, and pack the store again if it fails"
        )

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
