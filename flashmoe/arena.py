"""The slots: DRAM that holds resident experts, seen as the parameters that the modules expect."""

from __future__ import annotations

from collections import defaultdict

import torch

from flashmoe import quant
from flashmoe.arithmetic import Parameters
from flashmoe.store.direct_io import aligned_memory
from flashmoe.store.manifest import DTYPES, LayerSpec


class Arena:
    """`n_slots` extents of one layer, side by side, each filled by one read.

    `parameters[slot]` are the expert's tensors as views of the slot's bytes (no copy), by
    the module's parameter names. Memory is resident only where a slot was filled.
    """

    def __init__(self, layer: LayerSpec, n_slots: int) -> None:
        self.n_slots = n_slots
        self.extent_bytes = layer.extent_bytes
        self.memory = aligned_memory(n_slots * layer.extent_bytes)
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        size = layer.extent_bytes
        ends = [(slot * size, (slot + 1) * size) for slot in range(n_slots)]
        self.slots = [memoryview(self.memory)[start:end] for start, end in ends]
        self.parameters = [views(whole[start:end], layer) for start, end in ends]

    def exchange(self, slot: int, other: Arena, other_slot: int) -> None:
        """Two slots' memory changes places, of arenas of layers laid out alike."""
        mine, theirs = self.slots, other.slots
        mine[slot], theirs[other_slot] = theirs[other_slot], mine[slot]
        own, others = self.parameters, other.parameters
        own[slot], others[other_slot] = others[other_slot], own[slot]

    def close(self) -> None:
        """Give the memory back. Tensors handed out must not be used afterwards."""
        self.parameters.clear()
        for view in self.slots:
            view.release()
        self.slots.clear()
        del self.memory  # unmapped when the last tensor view goes


def views(extent: torch.Tensor, layer: LayerSpec) -> Parameters:
    """An expert's tensors, by the module's parameter names, as views of its bytes (uint8)."""
    tensors = {
        spec.name: extent[spec.offset_bytes : spec.offset_bytes + spec.size_bytes]
        .view(DTYPES[spec.dtype])
        .view(spec.shape)
        for spec in layer.tensors
    }
    scheme = quant.get(layer.quantisation)
    if scheme is None:
        return dict(tensors)
    parts: dict[str, quant.Parts] = defaultdict(dict)
    plain: Parameters = {}
    for stored, tensor in tensors.items():
        name, slash, part = stored.partition("/")
        if slash:
            parts[name][part] = tensor
        else:
            plain[name] = tensor
    return plain | {name: quant.Weight(scheme, held) for name, held in parts.items()}
