"""The slots: memory that holds resident experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from flashmoe.quant import Parameters
from flashmoe.store.manifest import LayerSpec

if TYPE_CHECKING:  # an engine without torch has slots too
    import torch

# An extent's bytes: the host's, an accelerator's (uint8 [extent_bytes]), or which of them, where
# the backend itself knows the place.
SlotMemory: TypeAlias = "memoryview | torch.Tensor"


class Slot(NamedTuple):
    """Room for one extent."""

    memory: SlotMemory
    parameters: Parameters
    free: Callable[[], None]  # gives the memory back, which may be used again all the same


class Arena(ABC):
    """`n_slots` extents of one layer, each filled by one read.

    `parameters[slot]` are the expert's tensors as views of the slot's bytes (no copy), by
    the module's parameter names, where it is the engine that computes.
    """

    resizable: ClassVar[bool] = True
    computes_at_once: ClassVar[bool] = True  # else whoever computes from a slot may come later
    layer: LayerSpec
    parameters: list[Parameters]

    @property
    def extent_bytes(self) -> int:
        return self.layer.extent_bytes

    @property
    @abstractmethod
    def n_slots(self) -> int: ...

    @abstractmethod
    def memory_for(self, slot: int, layer: int, expert: int) -> SlotMemory:
        """Where the bytes of the expert that is given `slot` are read to."""

    @abstractmethod
    def new_slots(self, n_slots: int) -> list[Slot]:
        """Slots for this arena or its next `resize`. Raises FlashMoEError without the memory."""

    @abstractmethod
    def lacks(self, n_slots: int) -> int:
        """How many `new_slots` a `resize` to `n_slots` needs."""

    @abstractmethod
    def resize(self, kept: Sequence[int], n_slots: int, new: Sequence[Slot]) -> None:
        """Slots `kept` become 0, 1, ...; the others are empty. Memory of what is over is freed.

        new: as many as this arena `lacks`, so that nothing can fail here.
        """

    @abstractmethod
    def exchange(self, slot: int, other: Any, other_slot: int) -> None:
        """Two slots' memory changes places, of arenas of layers laid out alike."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until nothing that was asked for computes from the slots any more."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Tensors handed out must not be used afterwards."""
