"""Checks every byte of a store against its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from flashmoe.disk.direct_io import aligned_memory
from flashmoe.errors import FlashMoEError, reading
from flashmoe.reading.packed import PackedExperts, open_manifest
from flashmoe.reading.reader import ExtentReader
from flashmoe.store import folders
from flashmoe.store import manifest as manifests
from flashmoe.store.manifest import Manifest


class Verified(NamedTuple):
    """What was found right."""

    manifest: Manifest
    n_copies: int


def verify(
    store: Path,
    progress: Callable[[int, int], object] = lambda done, total: None,
    also: Sequence[Path] = (),
) -> Verified:
    """Read every extent of a store and compare its checksum; check that the dense file parses.

    Every copy is read, and every share. progress: called with the bytes of experts that were read,
    and with those in all. also: folders of copies or shares, besides those that the store knows.
    Raises FlashMoEError for the first extent that fails, naming layer and expert, where a copy or
    a share is not there, and where `store` is no store that can be read.
    """
    with reading(store):
        manifest = open_manifest(store)
        copies = folders.files_of(store, manifest, [*also, *folders.listed(store, manifest)])
    _check_dense(store, manifest)
    for mirror in (files[0].parent for files in copies[1:]):
        if manifests.is_store(mirror):  # that can be loaded where the others are gone
            with reading(mirror):
                _check_dense(mirror, open_manifest(mirror))
    total = manifest.experts_bytes * len(copies)
    for number, files in enumerate(copies):
        before = number * manifest.experts_bytes
        with reading(files[0].parent):
            backend = PackedExperts(files[0].parent, manifest, files=[files])
        reader = ExtentReader(backend)
        try:
            for done in _read_all(reader):
                progress(before + done, total)
        finally:
            reader.close()
    return Verified(manifest, len(copies))


def _check_dense(store: Path, manifest: Manifest) -> None:
    """Raises FlashMoEError where the rest of the model is not whole."""
    try:
        with safe_open(store / manifest.dense_file, framework="pt", backend="pread"):
            pass
    except (SafetensorError, OSError) as error:
        raise FlashMoEError(f"store {store}: {manifest.dense_file} is damaged ({error})") from None


def _read_all(reader: ExtentReader) -> Iterator[int]:
    """Read every extent once; bytes done so far. Raises FlashMoEError for one that fails."""
    layers = reader.manifest.layers
    largest_bytes = max(layer.extent_bytes for layer in layers)
    memory = memoryview(aligned_memory(largest_bytes * reader.readers))
    for number, layer in enumerate(layers):
        for first in range(0, layer.n_experts, reader.readers):
            experts = range(first, min(first + reader.readers, layer.n_experts))
            extents = [
                memory[i * largest_bytes : i * largest_bytes + layer.extent_bytes]
                for i in range(len(experts))
            ]
            for read in reader.submit(number, list(zip(experts, extents, strict=True))):
                read.result()
            yield layer.extent_offset(experts[-1] + 1)
