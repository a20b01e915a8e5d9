"""What this engine asks of a model on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from flashmoe.reading.backend import Backend


class ModelBackend(Backend):
    """A model on disk, open: its experts, extent by extent, and everything else.

    `path` is a directory, where config.json and the tokenizer lie.
    """

    name: ClassVar[str]  # by which `available` lists it

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Does this backend read what lies in the directory `path`?"""

    @abstractmethod
    def __init__(self, path: Path, *, also: Sequence[Path] = ()) -> None:
        """Open `path`. Raises FlashMoEError when it, or one of `also`, cannot be used.

        also: folders of its copies or shares, besides those that it knows.
        """

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """The model, with no weights yet: see `empty_model.build`."""

    @abstractmethod
    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that belongs to no expert, with its name in the model, one at a time."""
