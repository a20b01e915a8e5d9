"""Where the experts of the DRAM baselines are: pinned in memory, or in the memory-mapped store.

Without a GPU the pinned tier, which the papers have in VRAM, is an arena in DRAM that counts
towards the cap, and the mapped tier is what the cap leaves to the page cache. Both have whole
extents of the same store, so that an expert comes from the drive in one sequential stretch, as
well as any layout allows.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from flashmoe.memory.arena import SlotMemory
from flashmoe.memory.host_arena import HostArena, views
from flashmoe.quant import Parameters
from flashmoe.reading.packed import PackedExperts
from flashmoe.reading.reader import ExtentReader
from flashmoe.store.manifest import Manifest


class MappedTier:
    """The experts of a store as a memory mapping; the page cache decides what is in DRAM."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        descriptor = os.open(store / manifest.experts_file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        with warnings.catch_warnings():  # that torch could write to what is mapped for reading
            warnings.simplefilter("ignore")
            self._bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)
        self._parameters: dict[tuple[int, int], Parameters] = {}

    def extent(self, layer: int, expert: int) -> torch.Tensor:
        """The expert's bytes, uint8 [extent_bytes]; reading them may wait for the drive."""
        spec = self.manifest.layers[layer]
        start = spec.extent_offset(expert)
        return self._bytes[start : start + spec.extent_bytes]

    def parameters(self, layer: int, expert: int) -> Parameters:
        key = layer, expert
        if key not in self._parameters:
            self._parameters[key] = views(self.extent(layer, expert), self.manifest.layers[layer])
        return self._parameters[key]

    def copy(self, layer: int, expert: int, slot: SlotMemory) -> None:
        """Copy the expert's bytes into an arena's slot."""
        if not isinstance(slot, torch.Tensor):
            slot = torch.frombuffer(slot, dtype=torch.uint8)
        slot.copy_(self.extent(layer, expert))

    def advise(self, advice: int, layer: int | None = None, expert: int = 0) -> None:
        """madvise on one expert, or on all of them."""
        if layer is None:
            self.mapping.madvise(advice)
        else:
            spec = self.manifest.layers[layer]
            self.mapping.madvise(advice, spec.extent_offset(expert), spec.extent_bytes)


class PinnedTier:
    """Popular experts in anonymous memory, each layer's in an arena of its own."""

    def __init__(self, store: Path, manifest: Manifest, experts: Sequence[Sequence[int]]) -> None:
        """experts: of each layer, those to pin; they are read past the page cache."""
        self.arenas = [
            HostArena(spec, len(pinned))
            for spec, pinned in zip(manifest.layers, experts, strict=True)
        ]
        self.slot_of = [{expert: slot for slot, expert in enumerate(pinned)} for pinned in experts]
        reader = ExtentReader(PackedExperts(store, manifest))
        try:
            for layer, slots in enumerate(self.slot_of):
                memory = self.arenas[layer].slots
                loads = [(expert, memory[slot]) for expert, slot in slots.items()]
                for read in reader.submit(layer, loads):
                    read.result()
        finally:
            reader.close()

    def holds(self, layer: int, expert: int) -> bool:
        return expert in self.slot_of[layer]

    def parameters(self, layer: int, expert: int) -> Parameters:
        return self.arenas[layer].parameters[self.slot_of[layer][expert]]

    def replace(self, layer: int, old: int, new: int, mapped: MappedTier) -> None:
        """Copy `new` over `old`, which stays in the mapping."""
        slot = self.slot_of[layer].pop(old)
        self.slot_of[layer][new] = slot
        mapped.copy(layer, new, self.arenas[layer].slots[slot])

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
