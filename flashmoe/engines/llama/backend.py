"""The experts of GGUF files as extents: an expert's pages in each of its layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flashmoe.engines.llama.expert_tensors import GGUFContents
from flashmoe.engines.llama.layout import Layout, PlacedTensor
from flashmoe.engines.llama.model_file import ModelFile
from flashmoe.engines.llama.moved_pages import move_pages
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading.base import PIECE_BYTES
from flashmoe.reading.range_reader import PlacedExperts
from flashmoe.residency.places import Expert, Places


class _Part(NamedTuple):
    """A tensor of experts, and the file that it lies in."""

    file: ModelFile
    placed: PlacedTensor


class GGUFExperts(PlacedExperts, Places):
    """One model's experts, in one GGUF file or in the parts of a split one.

    Each is read to where the program expects it. manifest, edge_bytes: as `Layout` has them.
    """

    remedy = "fetch the file again if this lasts"

    def __init__(self, files: Sequence[tuple[ModelFile, GGUFContents]]) -> None:
        """Raises FlashMoEError where the files' experts do not make whole layers."""
        self.files = [file for file, _ in files]
        self.path = self.files[0].path
        self.direct = all(file.direct for file in self.files)
        layout = Layout(self.path, [contents for _, contents in files])
        self.numbers, self.edge_bytes = layout.numbers, layout.edge_bytes
        self._parts = [
            [_Part(self.files[one.file], one) for one in tensors] for tensors in layout.tensors
        ]
        dense_bytes = sum(file.dense_bytes for file in self.files)
        self.manifest = replace(layout.manifest, dense_bytes=dense_bytes)

        self._kinds = sorted({p.placed.tensor.kind for parts in self._parts for p in parts})
        self._pages: dict[Expert, np.ndarray] = {}
        self._move_pages: Any = kernel(move_pages, Policy)
        self.most_ranges = max(
            len(self.ranges(n, 0, 0)) + len(parts) for n, parts in enumerate(self._parts)
        )

    def ranges(self, layer: int, expert: int, ticket: int) -> np.ndarray:
        rows = []
        for part in self._parts[layer]:
            first, last = part.placed.outer(expert)
            for start in range(first, last, PIECE_BYTES):
                rows.append((*part.file.job(start, min(start + PIECE_BYTES, last)), ticket))
        return np.array(rows, np.int64).reshape(-1, 7)

    def drop(self, layer: int, expert: int) -> None:
        for part in self._parts[layer]:  # the pages that it shares with its neighbours stay
            part.file.drop(*part.placed.inner(expert))

    def move(self, source: Expert, target: Expert) -> None:
        self._move_pages(self._pages_of(source), self._pages_of(target))

    def _pages_of(self, expert: Expert) -> np.ndarray:
        """The pages of its own that an expert has of each kind of tensor, as addresses."""
        pages = self._pages.get(expert)
        if pages is None:
            pages = self._pages[expert] = np.zeros((len(self._kinds), 2), np.int64)
            for part in self._parts[expert[0]]:
                start, end = part.placed.inner(expert[1])
                row = self._kinds.index(part.placed.tensor.kind)
                pages[row] = part.file.base + start, part.file.base + max(start, end)
        return pages

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()
