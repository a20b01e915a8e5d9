"""Reads experts from a store into memory: direct, several at a time, checked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.direct_io import drop_page_cache, open_direct

# In flight at once. Extents of megabytes are split by the kernel and keep the drive busy alone:
# with both cores computing, fio read 12 MiB blocks at 2.4, 2.2 and 1.8 GB/s at depths of 1, 2 and
# 4. Two let one be checked and computed on while the next is read. Small ones want company.
READERS_LARGE, READERS_SMALL = 2, 4
# Smaller extents are handed to the threads in groups: a task costs some 40 us, as much as
# half of a 48 KiB read. Larger ones go one by one, so that each is computed on as it arrives.
GROUPED_BELOW_BYTES = 1 << 20


class ExtentReader:
    """Fills caller-owned memory with experts of one open store. Thread-safe.

    The first read of each extent is checked against the manifest's checksum (xxh3-64, which
    hashes 25 GiB/s here, a hundredth of the read it checks); later reads of it are not.
    """

    def __init__(
        self, store: Path, manifest: manifests.Manifest, readers: int | None = None
    ) -> None:
        if readers is None:
            largest = max(layer.extent_bytes for layer in manifest.layers)
            readers = READERS_SMALL if largest < GROUPED_BELOW_BYTES else READERS_LARGE
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
        if not loads:
            return []
        size = 1
        if self.manifest.layers[layer].extent_bytes < GROUPED_BELOW_BYTES:
            size = -(-len(loads) // self.readers)
        groups = [loads[first : first + size] for first in range(0, len(loads), size)]
        with self._lock:
            if not self._in_flight:
                self._busy_since = time.perf_counter()
            self._in_flight += len(groups)
        tasks = [(self._pool.submit(self._read, layer, group), len(group)) for group in groups]
        return [future for future, count in tasks for _ in range(count)]

    def _read(self, layer: int, group: Sequence[tuple[int, memoryview]]) -> None:
        spec, checked, direct = self.manifest.layers[layer], self._checked[layer], self.direct
        descriptor, preadv = self._descriptor, os.preadv
        start, extent_bytes = spec.offset_bytes, spec.extent_bytes
        done, expert = 0, -1
        try:
            for expert, memory in group:  # few steps: at 48 KiB each costs 1 % of the bandwidth
                count = preadv(descriptor, (memory,), start + expert * extent_bytes)
                if count != extent_bytes or not checked[expert] or not direct:
                    self._finish(layer, expert, memory, count)
                done += extent_bytes
        except OSError as error:
            raise self._error(layer, expert, f"the read failed ({error})") from None
        finally:
            with self._lock:
                self.bytes_read += done
                self._in_flight -= 1
                if not self._in_flight:
                    self.busy_seconds += time.perf_counter() - self._busy_since

    def _finish(self, layer: int, expert: int, memory: memoryview, done: int) -> None:
        """Read what a short read left, drop the pages of a buffered one, check a first one."""
        spec = self.manifest.layers[layer]
        offset = spec.extent_offset(expert)
        while done < spec.extent_bytes:
            count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            if count == 0:
                raise self._error(layer, expert, "the file ends before it: it was cut short")
            done += count
        if not self.direct:
            drop_page_cache(self._descriptor, offset, spec.extent_bytes)
        if not self._checked[layer][expert]:
            if xxhash.xxh3_64_hexdigest(memory) != spec.checksums[expert]:
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
