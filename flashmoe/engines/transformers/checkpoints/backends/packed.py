"""A packed store as a model: `PackedExperts` reads its experts, this the other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flashmoe.disk.shards import Shard
from flashmoe.engines.transformers.checkpoints.backends.base import ModelBackend
from flashmoe.engines.transformers.model import empty_model
from flashmoe.errors import FlashMoEError
from flashmoe.reading.packed import PackedExperts
from flashmoe.store import manifest as manifests


class PackedModel(PackedExperts, ModelBackend):
    """What `flashmoe pack` writes."""

    name = "packed"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return manifests.is_store(path)

    def build(self) -> PreTrainedModel:
        dtype = getattr(torch, self.manifest.dtype) if self.manifest.dtype else None
        return empty_model.build(empty_model.read_config(self.path), dtype)

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            shard = Shard(self.path / self.manifest.dense_file)
        except FlashMoEError as error:
            raise FlashMoEError(f"store {self.path}: {error}; {self.remedy}") from None
        try:
            for name in shard.tensors:
                yield name, shard.read(name)
        finally:
            shard.forget_pages()
            shard.close()
