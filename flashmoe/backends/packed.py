"""A packed store: an expert is one aligned extent, so a miss is one read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flashmoe.backends.base import Backend
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from flashmoe.store.direct_io import drop_page_cache, open_direct, read_all
from flashmoe.store.manifest import Manifest
from flashmoe.store.pack import config_digest


class PackedStore(Backend):
    """What `flashmoe pack` writes."""

    name = "packed"
    remedy = "run `flashmoe verify`, and pack the store again if it fails"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return manifests.is_store(path)

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        """manifest: its table of contents, if that is known already."""
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

    def dense(self) -> dict[str, torch.Tensor]:
        name = self.manifest.dense_file
        try:
            # pread, not a mapping: whose pages would be this process's and the cache's
            with safe_open(self.path / name, framework="pt", backend="pread") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            with open(self.path / name, "rb") as read:
                drop_page_cache(read.fileno())
        except (SafetensorError, OSError) as error:
            raise FlashMoEError(
                f"store {self.path}: {name} is damaged ({error}); pack it again"
            ) from None
        return tensors

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
