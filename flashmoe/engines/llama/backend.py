"""The experts of GGUF files as extents: an expert's pages in each of its layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from flashmoe.engines.llama.expert_tensors import GGUFContents
from flashmoe.engines.llama.layout import Layout, PlacedTensor
from flashmoe.engines.llama.model_file import ModelFile, move
from flashmoe.reading.backend import Backend
from flashmoe.residency.places import Expert, Places


class _Part(NamedTuple):
    """A tensor of experts, and the file that it lies in."""

    file: ModelFile
    placed: PlacedTensor


class GGUFExperts(Backend, Places):
    """One model's experts, in one GGUF file or in the parts of a split one.

    An extent is read to where the program expects the expert, so `memory` is a `range` of the
    extent's bytes: the backend knows the addresses. manifest, edge_bytes: as `Layout` has them.
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

    def extent(self, layer: int, expert: int) -> range:
        ranges = [part.placed.outer(expert) for part in self._parts[layer]]
        return range(sum(end - start for start, end in ranges))

    def read(self, layer: int, expert: int, start: int, memory: range) -> None:  # type: ignore[override]
        """Read these bytes of the extent to where the program expects them. Thread-safe."""
        end = start + len(memory)
        before = 0
        for part in self._parts[layer]:
            first, last = part.placed.outer(expert)
            size = last - first
            begin, stop = max(start - before, 0), min(end - before, size)
            if begin < stop:
                part.file.read(first + begin, first + stop)
            before += size

    def drop(self, layer: int, expert: int) -> None:
        for part in self._parts[layer]:  # the pages that it shares with its neighbours stay
            part.file.drop(*part.placed.inner(expert))

    def move(self, source: Expert, target: Expert) -> None:
        givers = {part.placed.tensor.kind: part for part in self._parts[source[0]]}
        for part in self._parts[target[0]]:
            if giver := givers.pop(part.placed.tensor.kind, None):
                move(
                    giver.file,
                    giver.placed.inner(source[1]),
                    part.file,
                    part.placed.inner(target[1]),
                )
        for giver in givers.values():
            giver.file.drop(*giver.placed.inner(source[1]))

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()
