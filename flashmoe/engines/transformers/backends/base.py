"""What a storage backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from flashmoe.store.manifest import Manifest


class Backend(ABC):
    """An open model on disk: its experts, extent by extent, and everything else."""

    name: ClassVar[str]
    remedy: ClassVar[str]  # what to do when an expert cannot be read
    path: Path  # config.json and the tokenizer lie there
    manifest: Manifest  # how an expert lies in its extent; checksums only where they are known
    direct: bool  # reads bypass the page cache

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Does this backend read what lies in the directory `path`?"""

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open `path`. Raises FlashMoEError when it cannot be used."""

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """The model, with no weights yet: see `skeleton.build`."""

    @abstractmethod
    def read(self, layer: int, expert: int, start: int, memory: memoryview) -> None:
        """Fill `memory`, page-aligned, with an extent's bytes from `start` on. Thread-safe.

        Leaves nothing in the page cache. Raises OSError when the drive fails, EOFError when the
        file ends too early.
        """

    @abstractmethod
    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that belongs to no expert, with its name in the model, one at a time."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""
