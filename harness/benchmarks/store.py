"""Packing the demo model, and loading it from its store."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack


class Store:
    """The demo model, 55 MB; what a large one costs is in the packing table."""

    params = ("12MiB",)
    param_names = ("memory",)
    timeout = 300

    def setup(self, memory: str) -> None:
        self.folder = TemporaryDirectory(prefix="flashmoe-benchmark-")
        self.store = Path(self.folder.name) / "store"
        pack(flashmoe.demo_path(), self.store)

    def teardown(self, memory: str) -> None:
        self.folder.cleanup()

    def time_pack(self, memory: str) -> None:
        pack(flashmoe.demo_path(), self.store)

    def time_load(self, memory: str) -> None:
        flashmoe.load(self.store, memory=memory).flashmoe.close()

    def peakmem_pack(self, memory: str) -> None:
        pack(flashmoe.demo_path(), self.store)
