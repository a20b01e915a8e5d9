"""How a store's experts are shared among several drives: of each extent every drive has a part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from flashmoe.disk.direct_io import ALIGNMENT_BYTES

Range = tuple[int, int]  # from, to


def parts(extent_bytes: int, count: int) -> list[Range]:
    """An extent in `count` parts, equal but for the last ones, which may be smaller or empty.

    Each begins where a block begins.
    """
    size = -(-extent_bytes // (count * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
    ends = [min(number * size, extent_bytes) for number in range(count + 1)]
    return list(itertools.pairwise(ends))


class Shares:
    """Where each part of each extent lies in the file of its share.

    A share's file has that share's parts of all extents, in the order of layers and experts.
    """

    def __init__(self, layers: Sequence[Any], count: int) -> None:
        """layers: a manifest's. count: 1 is one file with whole extents."""
        self.count = count
        self.parts = [parts(layer.extent_bytes, count) for layer in layers]
        self._starts: list[list[int]] = [[0] * count]
        for layer, ranges in zip(layers, self.parts, strict=True):
            last = self._starts[-1]
            sizes = [(end - start) * layer.n_experts for start, end in ranges]
            self._starts.append([a + b for a, b in zip(last, sizes, strict=True)])

    def file_bytes(self, share: int) -> int:
        return self._starts[-1][share]

    def ranges(
        self, layer: int, expert: int, start: int, end: int
    ) -> list[tuple[int, int, int, int]]:
        """Bytes `start` to `end` of an extent: (share, offset in its file, from, to) of each."""
        found = []
        for share, (first, last) in enumerate(self.parts[layer]):
            begin, stop = max(first, start), min(last, end)
            if begin < stop:
                at = self._starts[layer][share] + expert * (last - first) + begin - first
                found.append((share, at, begin, stop))
        return found
