"""A checkpoint of the hub's cache whose disk space is given back while it is packed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from flashmoe.disk.direct_io import give_back
from flashmoe.disk.shards import FileRange
from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.errors import FlashMoEError


class GivenBack(Checkpoint):
    """As `Checkpoint`, each expert of which can be read once.

    The cache loses its weights when packing begins, so it never holds damaged ones: whoever wants
    them again fetches them. The files' bytes go as experts are packed, the rest when it is closed.
    is_in_cache: it has not begun.
    """

    gives_back = True

    def __init__(self, directory: Path, *, dequantise: bool = False) -> None:
        """Raises FlashMoEError as `Checkpoint` does, and where the disk cannot give back a part."""
        super().__init__(directory, dequantise=dequantise)
        self._descriptors: dict[Path, int] = {}
        self._packed: list[FileRange] = []
        self.is_in_cache = True
        try:
            self._try_it()
            for shard in self._shards:
                self._descriptors[shard.path] = os.open(shard.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise FlashMoEError(
                f"{directory}: what is packed cannot be given back ({error.strerror}): leave out "
                "--give-back"
            ) from None

    def _try_it(self) -> None:
        with tempfile.TemporaryFile(dir=self._shards[0].path.resolve().parent) as file:
            file.write(bytes(1 << 16))
            give_back(file.fileno(), 0, 1 << 16)

    def _leave_cache(self) -> None:
        """From now on only this object has the weights."""
        self.is_in_cache = False
        for shard in self._shards:
            blob = shard.path.resolve()
            shard.path.unlink()
            blob.unlink(missing_ok=True)

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        if self.is_in_cache:
            self._leave_cache()
        result = super().expert(module_name, expert)
        for name in result:
            self._packed += self.places(module_name, name, expert)
        return result

    def forget_pages(self) -> None:
        """Give back what was read of experts since the last time."""
        super().forget_pages()
        for file, offset_bytes, size_bytes in self._packed:
            give_back(self._descriptors[file], offset_bytes, size_bytes)
        self._packed.clear()

    def close(self) -> None:
        super().close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
