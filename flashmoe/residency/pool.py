"""One expert cache with the slots that it decides about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.memory.arena import Arena, Slot
from flashmoe.policies.base import Policy


@dataclass(eq=False)
class Pool:
    """A cache and its arena, which serve one layer, or all layers of a model together.

    The cache knows experts by key: layer within the pool times n_experts, plus the expert.
    """

    cache: ExpertCache
    arena: Arena
    first_layer: int
    n_experts: int  # of each layer

    def first_key(self, layer: int) -> int:
        """The key of the layer's expert 0."""
        return (layer - self.first_layer) * self.n_experts

    def layer_and_expert(self, key: int) -> tuple[int, int]:
        """Whom a key stands for."""
        layer, expert = divmod(key, self.n_experts)
        return self.first_layer + layer, expert

    def slot_of(self, layer: int) -> np.ndarray:
        """By expert of the layer, [n_experts] int64: its slot, or -1 when it is not resident."""
        first = self.first_key(layer)
        return self.cache.residency.slot_of[first : first + self.n_experts]

    def resize(self, policy: Policy, new: Sequence[Slot]) -> None:
        """To a fresh policy's slots; as many experts stay as fit, as it chooses.

        new: as many as the arena lacks.
        """
        self.cache, kept_slots = self.cache.resized(policy)
        self.arena.resize(kept_slots, self.cache.n_slots, new)

    @property
    def resident_bytes(self) -> int:
        return self.cache.n_resident * self.arena.extent_bytes

    @property
    def most_resident_bytes(self) -> int:
        """The most that `resident_bytes` was since the last reset."""
        return self.cache.most_resident * self.arena.extent_bytes
