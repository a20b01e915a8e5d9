"""Checks every byte of a store against its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.direct_io import aligned_memory
from flashmoe.store.pack import config_digest
from flashmoe.store.reader import ExtentReader


def open_manifest(store: Path) -> manifests.Manifest:
    """The manifest, checked against the files beside it but not against every byte.

    Raises FlashMoEError when the store is torn, foreign or belongs to another model.
    """
    manifest = manifests.load(store)
    if config_digest(store) != manifest.config_sha256:
        raise FlashMoEError(
            f"store {store}: its config.json is not the one it was packed with, so it would be "
            "a store of another model; pack it again with `flashmoe pack`"
        )
    return manifest


def verify(
    store: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> manifests.Manifest:
    """Read every extent and compare its checksum; check that the dense file parses.

    Raises FlashMoEError for the first that fails, naming layer and expert.
    """
    manifest = open_manifest(store)
    try:
        with safe_open(store / manifest.dense_file, framework="pt", backend="pread"):
            pass
    except (SafetensorError, OSError) as error:
        raise FlashMoEError(f"store {store}: {manifest.dense_file} is damaged ({error})") from None
    largest = max(layer.extent_bytes for layer in manifest.layers)
    reader = ExtentReader(store, manifest)
    try:
        view = memoryview(aligned_memory(largest * reader.readers))
        for number, layer in enumerate(manifest.layers):
            for first in range(0, layer.n_experts, reader.readers):
                experts = range(first, min(first + reader.readers, layer.n_experts))
                pieces = [
                    view[i * largest : i * largest + layer.extent_bytes]
                    for i in range(len(experts))
                ]
                for read in reader.submit(number, list(zip(experts, pieces, strict=True))):
                    read.result()
                progress(layer.extent_offset(experts[-1] + 1), manifest.experts_bytes)
    finally:
        reader.close()
    return manifest
