"""The experts of a packed store: one aligned extent each, so a miss is one read."""

from __future__ import annotations

import os
from pathlib import Path

from flashmoe.disk.direct_io import drop_page_cache, open_direct, read_all
from flashmoe.errors import FlashMoEError
from flashmoe.reading.backend import Backend
from flashmoe.store import manifest as manifests
from flashmoe.store.layout import config_digest
from flashmoe.store.manifest import Manifest


class PackedExperts(Backend):
    """What `flashmoe pack` writes."""

    remedy = "run `flashmoe verify`, and pack the store again if it fails"

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        """manifest: its table of contents, if that is known already.

        Raises FlashMoEError when the store is torn, foreign or belongs to another model.
        """
        self.path = path
        self.manifest = manifest or open_manifest(path)
        file = path / self.manifest.experts_file
        self._descriptor, self.direct = open_direct(file, os.O_RDONLY)

    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        offset = self.manifest.layers[layer].extent_offset(expert) + start
        if os.preadv(self._descriptor, (memory,), offset) < len(memory):
            read_all(self._descriptor, memory, len(memory), offset)
        if not self.direct:
            drop_page_cache(self._descriptor, offset, len(memory))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_manifest(store: Path) -> Manifest:
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
