"""The experts of a packed store: one aligned extent each, in files on one drive or on several."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from flashmoe.disk.direct_io import drop_page_cache, open_direct, read_all
from flashmoe.errors import FlashMoEError
from flashmoe.reading.backend import Backend
from flashmoe.reading.copies import Copies
from flashmoe.reading.drives import NONE
from flashmoe.store import folders, shares
from flashmoe.store import manifest as manifests
from flashmoe.store.layout import config_digest
from flashmoe.store.manifest import Manifest
from flashmoe.store.shares import Range, Shares

logger = logging.getLogger(__name__)


class PackedExperts(Backend):
    """What `flashmoe pack` writes."""

    remedy = "run `flashmoe verify`, and pack the store again if it fails"

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None = None,
        *,
        also: Sequence[Path] = (),
        files: list[list[Path]] | None = None,
    ) -> None:
        """manifest: its table of contents, if that is known already.

        also: folders with its copies or shares, besides those that it knows. files: in place of
        all that it knows, of each copy one a share.
        Raises FlashMoEError when the store is torn, foreign or belongs to another model, or a part
        of it is not there.
        """
        self.path = path
        self.manifest = manifest or open_manifest(path)
        self._shares = Shares(self.manifest.layers, self.manifest.shares)
        self._read_bytes = [0] * self.manifest.shares  # of each share
        self._lock = threading.Lock()
        self.files: list[list[Path]] = []
        self._descriptors: list[list[tuple[int, bool]]] = []
        try:
            self._open(files or folders.files_of(path, self.manifest, also), also)
        except BaseException:
            self.close()
            raise
        self.n_copies = len(self.files)
        self._copies = Copies([paths[0].parent for paths in self.files])
        self.direct = all(direct for copy in self._descriptors for _, direct in copy)

    def _open(self, files: list[list[Path]], also: Sequence[Path]) -> None:
        """All copies that can be read; one that cannot is told, and the others are read.

        Raises OSError where none can, or one of `also` cannot.
        """
        for number, paths in enumerate(files):
            self._descriptors.append([])
            try:
                for file in paths:
                    self._descriptors[-1].append(open_direct(file, os.O_RDONLY))
                self.files.append(paths)
            except OSError as error:
                others = len(self.files) + len(files) - number - 1
                if not others or paths[0].parent in also:
                    raise
                for descriptor, _ in self._descriptors.pop():
                    os.close(descriptor)
                logger.warning(
                    "%s cannot be read (%s): its copy is left out until the store is loaded again",
                    error.filename,
                    error.strerror or error,
                )

    def parts(self, layer: int) -> list[Range]:
        if self.manifest.shares > 1:
            return self._shares.parts[layer]
        return shares.parts(self.manifest.layers[layer].extent_bytes, self.n_copies)

    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        self.read_copy(layer, expert, start, memory)

    def read_copy(
        self, layer: int, expert: int, start: int, memory: memoryview, copy: int = NONE
    ) -> int:
        if self.n_copies == 1:
            self._read(layer, expert, start, memory, 0)
            return 0
        return self._copies.read(
            len(memory), lambda place: self._read(layer, expert, start, memory, place), copy
        )

    def choose_copy(self, size_bytes: int, among: int) -> int:
        return self._copies.choose(size_bytes, among)

    def note_wrong_bytes(self, copy: int) -> None:
        self._copies.note_failure(copy, "its bytes are not those that were packed")

    def _read(self, layer: int, expert: int, start: int, memory: memoryview, copy: int) -> None:
        for share, offset, first, last in self._shares.ranges(
            layer, expert, start, start + len(memory)
        ):
            descriptor, direct = self._descriptors[copy][share]
            part = memory[first - start : last - start]
            try:
                if os.preadv(descriptor, (part,), offset) < len(part):
                    read_all(descriptor, part, len(part), offset)
            except OSError as error:
                if self.manifest.shares > 1:  # it is not clear which drive this is
                    error.filename = str(self.files[copy][share])
                raise
            if not direct:
                drop_page_cache(descriptor, offset, len(part))
            if self.manifest.shares > 1:
                with self._lock:
                    self._read_bytes[share] += len(part)

    @property
    def bytes_by_drive(self) -> list[int]:
        if self.manifest.shares > 1:
            return list(self._read_bytes)
        return list(self._copies.drives.read_bytes) if self.n_copies > 1 else []

    def close(self) -> None:
        for descriptor, _ in (one for copy in self._descriptors for one in copy):
            os.close(descriptor)
        self._descriptors.clear()


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
