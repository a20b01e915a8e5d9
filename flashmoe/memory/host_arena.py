"""Slots in DRAM, seen as the parameters that the modules expect."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch

from flashmoe import quant
from flashmoe.disk.direct_io import aligned_memory
from flashmoe.errors import FlashMoEError
from flashmoe.memory.arena import Arena, Slot, SlotMemory
from flashmoe.quant import Parameters
from flashmoe.store.manifest import LayerSpec
from flashmoe.util.sizes import format_bytes


class HostArena(Arena):
    """As `Arena`. Memory is resident only where a slot was filled."""

    resizable: ClassVar[bool] = True

    def __init__(self, layer: LayerSpec, n_slots: int) -> None:
        self.layer = layer
        self._slots = self.new_slots(n_slots)
        self._unused: list[Slot] = []  # address space without memory, to be used again
        self._refresh_views()

    def new_slots(self, n_slots: int) -> list[Slot]:
        """Slots side by side. Raises FlashMoEError where this process may not have the memory."""
        if n_slots <= 0:
            return []
        size = self.extent_bytes
        try:
            memory = aligned_memory(n_slots * size)
        except OSError as error:
            raise FlashMoEError(
                f"no memory for {n_slots} experts of {self.layer.module} "
                f"({format_bytes(n_slots * size)}): {error.strerror or error}; give a smaller "
                "memory=, or raise the limit (`ulimit -v`, vm.overcommit_memory)"
            ) from None
        whole, view = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)
        return [
            Slot(
                view[at : at + size],
                views(whole[at : at + size], self.layer),
                partial(memory.madvise, mmap.MADV_DONTNEED, at, size),
            )
            for at in range(0, n_slots * size, size)
        ]

    def _refresh_views(self) -> None:
        self.slots = [slot.memory for slot in self._slots]
        self.parameters = [slot.parameters for slot in self._slots]

    @property
    def n_slots(self) -> int:
        return len(self._slots)

    def memory_for(self, slot: int, layer: int, expert: int) -> SlotMemory:
        return self.slots[slot]

    def exchange(self, slot: int, other: Arena, other_slot: int) -> None:
        assert isinstance(other, HostArena)
        self._slots[slot], other._slots[other_slot] = other._slots[other_slot], self._slots[slot]
        for arena, number in ((self, slot), (other, other_slot)):
            arena.slots[number] = arena._slots[number].memory
            arena.parameters[number] = arena._slots[number].parameters

    def lacks(self, n_slots: int) -> int:
        return max(0, n_slots - self.n_slots - len(self._unused))

    def resize(self, kept: Sequence[int], n_slots: int, new: Sequence[Slot]) -> None:
        kept_numbers = set(kept)
        rest = [slot for number, slot in enumerate(self._slots) if number not in kept_numbers]
        slots = [self._slots[number] for number in kept] + rest
        for slot in slots[n_slots:]:
            slot.free()
        self._unused += [*slots[n_slots:], *new]
        slots = slots[:n_slots]
        while len(slots) < n_slots:
            slots.append(self._unused.pop())
        self._slots = slots
        self._refresh_views()

    def synchronize(self) -> None:
        """The host computes at once."""

    def close(self) -> None:
        self.parameters.clear()
        self.slots.clear()
        for slot in (*self._slots, *self._unused):
            # exchanged slots may lie in memory that another arena goes on using
            slot.free()
            if isinstance(slot.memory, memoryview):
                slot.memory.release()
        self._slots.clear()  # unmapped when the last tensor view goes
        self._unused.clear()


def views(extent: torch.Tensor, layer: LayerSpec) -> Parameters:
    """An expert's tensors, by the module's parameter names, as views of its bytes (uint8)."""
    tensors = {
        spec.name: extent[spec.offset_bytes : spec.offset_bytes + spec.size_bytes]
        .view(getattr(torch, spec.dtype))
        .view(spec.shape)
        for spec in layer.tensors
    }
    plain, weights = quant.by_weight(tensors)
    scheme = quant.get(layer.quantisation)
    if scheme is None:
        return dict(plain)
    return plain | {name: quant.Weight(scheme, parts) for name, parts in weights.items()}
