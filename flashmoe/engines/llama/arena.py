"""Slots as numbers: each expert has its own place in the program's memory, filled or empty."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.memory.arena import Arena, Slot
from flashmoe.store.manifest import LayerSpec


class PlacedArena(Arena):
    """Counts slots; the bytes lie where the program expects them (see `model_file`)."""

    def __init__(self, layer: LayerSpec, n_slots: int) -> None:
        self._count = n_slots
        super().__init__(layer, 0)

    @property
    def n_slots(self) -> int:
        return self._count

    def lacks(self, n_slots: int) -> int:
        return 0

    def resize(self, kept: Sequence[int], n_slots: int, new: Sequence[Slot]) -> None:
        self._count = n_slots
