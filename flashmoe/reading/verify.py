"""Checks every byte of a store against its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flashmoe.disk.direct_io import aligned_memory
from flashmoe.errors import FlashMoEError, reading
from flashmoe.reading.packed import PackedExperts
from flashmoe.reading.reader import ExtentReader
from flashmoe.store import manifest as manifests


def verify(
    store: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> manifests.Manifest:
    """Read every extent of a store and compare its checksum; check that the dense file parses.

    progress: called with the bytes of experts that were read, and with those in all.
    Raises FlashMoEError for the first extent that fails, naming layer and expert, and where
    `store` is no store that can be read.
    """
    with reading(store):
        backend = PackedExperts(store)
    manifest = backend.manifest
    try:
        with safe_open(store / manifest.dense_file, framework="pt", backend="pread"):
            pass
    except (SafetensorError, OSError) as error:
        backend.close()
        raise FlashMoEError(f"store {store}: {manifest.dense_file} is damaged ({error})") from None
    largest_bytes = max(layer.extent_bytes for layer in manifest.layers)
    reader = ExtentReader(backend)
    try:
        memory = memoryview(aligned_memory(largest_bytes * reader.readers))
        for number, layer in enumerate(manifest.layers):
            for first in range(0, layer.n_experts, reader.readers):
                experts = range(first, min(first + reader.readers, layer.n_experts))
                extents = [
                    memory[i * largest_bytes : i * largest_bytes + layer.extent_bytes]
                    for i in range(len(experts))
                ]
                for read in reader.submit(number, list(zip(experts, extents, strict=True))):
                    read.result()
                progress(layer.extent_offset(experts[-1] + 1), manifest.experts_bytes)
    finally:
        reader.close()
    return manifest
