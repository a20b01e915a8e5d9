"""Slots in an accelerator's memory."""

from __future__ import annotations

import torch

from flashmoe.errors import FlashMoEError
from flashmoe.memory.arena import Arena, Slot
from flashmoe.memory.host_arena import HostArena, views
from flashmoe.store.manifest import LayerSpec
from flashmoe.util.sizes import format_bytes


class DeviceArena(HostArena):
    """As `HostArena`; all slots are one allocation, since torch rounds each up to whole 2 MiB."""

    resizable = False
    computes_at_once = False

    def __init__(self, layer: LayerSpec, n_slots: int, device: torch.device) -> None:
        """Raises FlashMoEError where the device has not the room."""
        self.device = device
        self._module = torch.get_device_module(device)
        super().__init__(layer, n_slots)
        # work queued before torch freed this memory may still read it, and the stream of the
        # reads does not wait for that
        self.synchronize()

    def new_slots(self, n_slots: int) -> list[Slot]:
        size = self.extent_bytes
        try:
            whole = torch.empty(n_slots * size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            raise FlashMoEError(
                f"{self.device} has not the memory for {n_slots} experts of {self.layer.module} "
                f"({format_bytes(n_slots * size)}): give a smaller memory="
            ) from None
        extents = (whole[at : at + size] for at in range(0, n_slots * size, size))
        return [Slot(extent, views(extent, self.layer), _nothing) for extent in extents]

    def synchronize(self) -> None:
        self._module.synchronize(self.device)

    def close(self) -> None:
        self.synchronize()
        super().close()
        if hasattr(self._module, "empty_cache"):  # else torch keeps it for tensors to come
            self._module.empty_cache()


def _nothing() -> None:
    """The memory goes when the last tensor does."""


def arena_on(device: torch.device, layer: LayerSpec, n_slots: int) -> Arena:
    """Slots where the experts are to be computed."""
    return (
        HostArena(layer, n_slots) if device.type == "cpu" else DeviceArena(layer, n_slots, device)
    )
