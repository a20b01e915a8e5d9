"""The experts of GGUF files as extents: an expert's pages in each of its layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flashmoe.engines.llama.expert_tensors import GGUFContents
from flashmoe.engines.llama.layout import Layout
from flashmoe.engines.llama.model_file import PAGE_BYTES, ModelFile
from flashmoe.reading.base import PIECE_BYTES
from flashmoe.reading.range_reader import PlacedExperts
from flashmoe.reading.range_work import COLUMNS

# Smaller reads take a drive longer than they save where two drives share them.
_LEAST_PIECE_BYTES = 256 << 10


class GGUFExperts(PlacedExperts):
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
        dense_bytes = sum(file.dense_bytes for file in self.files)
        self.manifest = replace(layout.manifest, dense_bytes=dense_bytes)
        self.places = self.files[0].places
        if len(self.places) > 1:
            self.copies = np.array([file.descriptors for file in self.files], np.int64)
        self._tabulate(layout)

    def _tabulate(self, layout: Layout) -> None:
        """Every expert's jobs and pages, of all experts of a tensor at once."""
        kinds = sorted({one.tensor.kind for tensors in layout.tensors for one in tensors})
        first = self.manifest.first_experts
        jobs: list[tuple[np.ndarray, list[Any], bool]] = []  # of some experts, one each
        self.pages = np.zeros((first[-1], len(kinds), 2), np.int64)
        for layer, tensors in enumerate(layout.tensors):
            experts = np.arange(first[layer + 1] - first[layer])
            for placed in tensors:
                file = self.files[placed.file]
                start, end = placed.inner(experts)
                numbers, kind = experts + first[layer], kinds.index(placed.tensor.kind)
                self.pages[numbers, kind, 0] = file.base + start
                self.pages[numbers, kind, 1] = file.base + np.maximum(start, end)
                start, end = placed.outer(experts)
                step = self._piece_bytes(int(end[0] - start[0]))
                is_late = placed.tensor.kind == "down"  # it is multiplied last
                while len(numbers):
                    job = file.job(start, np.minimum(start + step, end))
                    jobs.append((numbers, job, is_late))
                    start = start + step
                    more = start < end
                    numbers, start, end = numbers[more], start[more], end[more]
        self.n_ranges = np.bincount(np.concatenate([n for n, _, _ in jobs]), minlength=first[-1])
        self.ranges = np.zeros((first[-1], self.n_ranges.max(), COLUMNS), np.int64)
        count = np.zeros(first[-1], np.int64)
        for numbers, columns, is_late in jobs:
            for column, values in enumerate((*columns, is_late, numbers)):
                self.ranges[numbers, count[numbers], column] = values
            count[numbers] += 1

    def _piece_bytes(self, range_bytes: int) -> int:
        """What one read brings: so that a single range gives each drive something to do."""
        share = -(-range_bytes // (len(self.places) * PAGE_BYTES)) * PAGE_BYTES
        return min(max(share, _LEAST_PIECE_BYTES), PIECE_BYTES)

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()
