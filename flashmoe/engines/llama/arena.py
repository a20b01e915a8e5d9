"""Slots as numbers: each expert has its own place in the program's memory, filled or empty."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.memory.arena import Arena, Slot
from flashmoe.store.manifest import LayerSpec


class PlacedArena(Arena):
    """Counts slots; the bytes lie where the program expects them (see `model_file`)."""

    def __init__(self, layer: LayerSpec, n_slots: int) -> None:
        self.layer = layer
        self.parameters = []
        self._n_slots = n_slots

    @property
    def n_slots(self) -> int:
        return self._n_slots

    def memory_for(self, slot: int, layer: int, expert: int) -> memoryview:
        return memoryview(b"")  # a `RangeReader` knows the expert's place

    def new_slots(self, n_slots: int) -> list[Slot]:
        return []

    def lacks(self, n_slots: int) -> int:
        return 0

    def resize(self, kept: Sequence[int], n_slots: int, new: Sequence[Slot]) -> None:
        self._n_slots = n_slots

    def exchange(self, slot: int, other: Arena, other_slot: int) -> None:
        """Nothing lies in a slot."""

    def synchronize(self) -> None:
        """The program has computed when it asks for the next layer."""

    def close(self) -> None:
        """The memory is the program's."""
