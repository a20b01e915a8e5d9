"""The experts of GGUF files as extents: an expert's pages in each of its layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe.engines.llama.expert_tensors import ExpertTensor, GGUFContents
from flashmoe.engines.llama.model_file import ModelFile, inner_pages, outer_pages
from flashmoe.engines.llama.moved_pages import move_pages
from flashmoe.errors import FlashMoEError
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading.base import PIECE_BYTES
from flashmoe.reading.range_reader import PlacedExperts
from flashmoe.residency.places import Expert, Places
from flashmoe.store.manifest import LayerSpec, Manifest, TensorSpec


class _Part(NamedTuple):
    """A tensor, and the file that it lies in."""

    file: ModelFile
    tensor: ExpertTensor

    def outer(self, expert: int) -> tuple[int, int]:
        """The pages that hold any of an expert's bytes, within its tensor's whole pages.

        The pages at a tensor's ends were read with the dense part.
        """
        tensor = self.tensor
        first, last = inner_pages(tensor.offset_bytes, tensor.size_bytes)
        start, end = outer_pages(
            tensor.offset_bytes + expert * tensor.expert_bytes, tensor.expert_bytes
        )
        return max(first, start), min(last, end)

    def inner(self, expert: int) -> tuple[int, int]:
        """The pages that hold this expert's bytes alone."""
        offset = self.tensor.offset_bytes + expert * self.tensor.expert_bytes
        return inner_pages(offset, self.tensor.expert_bytes)

    def inner_bytes(self, expert: int) -> int:
        start, end = self.inner(expert)
        return max(0, end - start)

    @property
    def edge_bytes(self) -> int:
        """Of pages that neighbours share, which stay filled once one of them was read."""
        first, last = inner_pages(self.tensor.offset_bytes, self.tensor.size_bytes)
        return max(0, last - first) - sum(map(self.inner_bytes, range(self.tensor.n_experts)))


class GGUFExperts(PlacedExperts, Places):
    """One model's experts, in one GGUF file or in the parts of a split one.

    Each is read to where the program expects it. The manifest's extents are what a place takes for
    itself; `edge_bytes` is what all places together share with their neighbours.
    """

    remedy = "fetch the file again if this lasts"

    def __init__(self, files: Sequence[tuple[ModelFile, GGUFContents]]) -> None:
        """Raises FlashMoEError where the files' experts do not make whole layers."""
        self.files = [file for file, _ in files]
        self.path = self.files[0].path
        self.direct = all(file.direct for file in self.files)
        by_layer: dict[int, list[_Part]] = {}
        for file, contents in files:
            for tensor in contents.tensors:
                by_layer.setdefault(tensor.layer, []).append(_Part(file, tensor))
        self.numbers = sorted(by_layer)  # of the file's layers, by ours
        self._parts = [by_layer[number] for number in self.numbers]
        self._kinds = sorted({part.tensor.kind for parts in self._parts for part in parts})
        self._pages: dict[Expert, np.ndarray] = {}
        self._move_pages: Any = kernel(move_pages, Policy)
        self.most_ranges = max(
            len(self.ranges(n, 0, 0)) + len(parts) for n, parts in enumerate(self._parts)
        )
        self.edge_bytes = sum(part.edge_bytes for parts in self._parts for part in parts)
        self.manifest = Manifest(
            architecture=files[0][1].architecture,
            config_sha256="",
            top_k=max(contents.top_k for _, contents in files),
            experts_file="",
            dense_file="",
            dense_bytes=sum(file.dense_bytes for file in self.files),
            layers=tuple(self._layer(n, p) for n, p in zip(self.numbers, self._parts, strict=True)),
        )

    def _layer(self, number: int, parts: list[_Part]) -> LayerSpec:
        counts = {part.tensor.n_experts for part in parts}
        kinds = [part.tensor.kind for part in parts]
        if len(counts) != 1 or len(set(kinds)) != len(kinds) or "down" not in kinds:
            raise FlashMoEError(
                f"{self.path}: the experts of layer {number} are not laid out as FlashMoE knows it"
            )
        tensors, offset = [], 0
        for part in parts:
            size = max(part.inner_bytes(expert) for expert in range(min(counts)))
            tensors.append(TensorSpec(part.tensor.kind, "uint8", (size,), offset))
            offset += size
        return LayerSpec(f"blk.{number}", min(counts), 0, offset, tuple(tensors))

    def ranges(self, layer: int, expert: int, ticket: int) -> np.ndarray:
        rows = []
        for part in self._parts[layer]:
            first, last = part.outer(expert)
            for start in range(first, last, PIECE_BYTES):
                rows.append((*part.file.job(start, min(start + PIECE_BYTES, last)), ticket))
        return np.array(rows, np.int64).reshape(-1, 7)

    def drop(self, layer: int, expert: int) -> None:
        for part in self._parts[layer]:  # the pages that it shares with its neighbours stay
            part.file.drop(*part.inner(expert))

    def move(self, source: Expert, target: Expert) -> None:
        self._move_pages(self._pages_of(source), self._pages_of(target))

    def _pages_of(self, expert: Expert) -> np.ndarray:
        """The pages of its own that an expert has of each kind of tensor, as addresses."""
        pages = self._pages.get(expert)
        if pages is None:
            pages = self._pages[expert] = np.zeros((len(self._kinds), 2), np.int64)
            for part in self._parts[expert[0]]:
                start, end = part.inner(expert[1])
                row = self._kinds.index(part.tensor.kind)
                pages[row] = part.file.base + start, part.file.base + max(start, end)
        return pages

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()
