"""Reads experts from a store into memory: direct, several at a time, checked."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.direct_io import drop_page_cache, open_direct

# In flight at once. An extent is megabytes, which the kernel splits for the drive: on a
# virtio NVMe 12 MiB reads reach the drive's limit at depth 1 to 4, and depth 16 only adds latency.
READERS = 4


class ExtentReader:
    """Fills caller-owned memory with experts of one open store. Thread-safe.

    The first read of each extent is checked against the manifest's checksum (xxh3-64, which
    hashes 25 GiB/s here, a hundredth of the read it checks); later reads of it are not.
    """

    def __init__(self, store: Path, manifest: manifests.Manifest, readers: int = READERS) -> None:
        self.store = store
        self.manifest = manifest
        self.bytes_read = 0
        self.busy_seconds = 0.0  # time with at least one read in flight
        self._descriptor, self.direct = open_direct(store / manifest.experts_file, os.O_RDONLY)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="flashmoe-read")
        self._checked = [[False] * layer.n_experts for layer in manifest.layers]
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_since = 0.0

    def submit(self, layer: int, expert: int, memory: memoryview) -> Future[None]:
        """Start reading an expert's extent into `memory`, page-aligned and extent-sized.

        The future's result raises FlashMoEError naming layer and expert when the drive
        fails, the file ends early, or the bytes are not those that were packed.
        """
        with self._lock:
            if not self._in_flight:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
        return self._pool.submit(self._read, layer, expert, memory)

    def _read(self, layer: int, expert: int, memory: memoryview) -> None:
        spec = self.manifest.layers[layer]
        try:
            offset, done = spec.extent_offset(expert), 0
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
        except OSError as error:
            raise self._error(layer, expert, f"the read failed ({error})") from None
        finally:
            with self._lock:
                self.bytes_read += done
                self._in_flight -= 1
                if not self._in_flight:
                    self.busy_seconds += time.perf_counter() - self._busy_since

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
