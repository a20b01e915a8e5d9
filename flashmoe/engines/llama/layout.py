"""Where the experts of a model lie in its GGUF files, in pages, and what they take of memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flashmoe.engines.llama.expert_tensors import ExpertTensor, GGUFContents
from flashmoe.engines.llama.model_file import inner_pages, outer_pages
from flashmoe.errors import FlashMoEError
from flashmoe.residency import budget
from flashmoe.store.manifest import LayerSpec, Manifest, TensorSpec
from flashmoe.util.sizes import format_bytes, parse_bytes

Index = Any  # an int, or an int64 array of them


class PlacedTensor(NamedTuple):
    """A tensor of experts, and which of the model's files it lies in."""

    file: int
    tensor: ExpertTensor

    def outer(self, expert: Index) -> tuple[Index, Index]:
        """The pages that hold any of an expert's bytes, within its tensor's whole pages.

        The pages at a tensor's ends were read with the dense part.
        """
        tensor = self.tensor
        first, last = inner_pages(tensor.offset_bytes, tensor.size_bytes)
        start, end = outer_pages(
            tensor.offset_bytes + expert * tensor.expert_bytes, tensor.expert_bytes
        )
        return np.maximum(first, start), np.minimum(last, end)

    def inner(self, expert: Index) -> tuple[Index, Index]:
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


class Layout:
    """One model's experts, as the heads of its files describe them.

    The manifest's extents are what a place takes for itself; `edge_bytes` is what all places
    together share with their neighbours.
    """

    def __init__(self, path: Path, contents: Sequence[GGUFContents]) -> None:
        """path: of the first file. Raises FlashMoEError where they do not make whole layers."""
        by_layer: dict[int, list[PlacedTensor]] = {}
        for file, one in enumerate(contents):
            for tensor in one.tensors:
                by_layer.setdefault(tensor.layer, []).append(PlacedTensor(file, tensor))
        self.numbers = sorted(by_layer)  # of the files' layers, by ours
        self.tensors = [by_layer[number] for number in self.numbers]
        self.edge_bytes = sum(one.edge_bytes for tensors in self.tensors for one in tensors)
        self.manifest = Manifest(
            architecture=contents[0].architecture,
            config_sha256="",
            top_k=max(one.top_k for one in contents),
            experts_file="",
            dense_file="",
            dense_bytes=0,
            layers=tuple(_layer(path, number, by_layer[number]) for number in self.numbers),
        )


def _layer(path: Path, number: int, placed: list[PlacedTensor]) -> LayerSpec:
    counts = {one.tensor.n_experts for one in placed}
    kinds = [one.tensor.kind for one in placed]
    if len(counts) != 1 or len(set(kinds)) != len(kinds) or "down" not in kinds:
        raise FlashMoEError(
            f"{path}: the experts of layer {number} are not laid out as FlashMoE knows it"
        )
    tensors, offset = [], 0
    for one in placed:
        size = max(one.inner_bytes(expert) for expert in range(min(counts)))
        tensors.append(TensorSpec(one.tensor.kind, "uint8", (size,), offset))
        offset += size
    return LayerSpec(f"blk.{number}", min(counts), 0, offset, tuple(tensors))


def least_bytes(manifest: Manifest, edge_bytes: int) -> int:
    """The smallest budget: all experts of any one layer, and what all places share."""
    return edge_bytes + budget.least_bytes(manifest, whole_events=True)


def check_budget(memory: int | str, manifest: Manifest, edge_bytes: int) -> int:
    """The bytes of `memory`, which is not "auto". Raises FlashMoEError where they are too few."""
    memory_bytes, least = parse_bytes(memory), least_bytes(manifest, edge_bytes)
    if memory_bytes < least:
        given = memory if isinstance(memory, str) else format_bytes(memory)
        raise FlashMoEError(
            f"memory={given} is too small: a prompt may need all experts of a layer at once, which "
            f"takes {format_bytes(least)} ({least} bytes) at least"
        )
    return memory_bytes
