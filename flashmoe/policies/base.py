"""What an eviction policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.events import Event, Events
from flashmoe.util.machine_code import helper


@helper
def least(candidates, value, tie):
    """The candidate with the least `value`; of those, the least `tie`; of those, the first."""
    best = candidates[0]
    for key in candidates:
        if value[key] < value[best] or (value[key] == value[best] and tie[key] < tie[best]):
            best = key
    return best


class Scope(NamedTuple):
    """Which part of a model one cache serves: one layer, or several that share its slots."""

    n_experts: int  # in each layer
    top_k: int = 1  # experts that a token uses in each layer
    n_layers: int = 1  # MoE layers that this cache serves
    first_layer: int = 0  # the lowest of them, counted from 0
    depth: int = 1  # MoE layers of the whole model
    bypass_slots: int = 0  # experts of one event that may be computed without a slot of this cache

    @property
    def n_keys(self) -> int:
        """How many keys there are; a key is layer within the scope * n_experts + expert."""
        return self.n_experts * self.n_layers


class Policy(ABC):
    """Decides which resident expert makes room. One instance serves one cache.

    The cache calls `touch` once per event, before it asks for any victim, and `victim` once
    per missing expert that finds no slot empty. A policy keeps statistics of its own and never
    learns what the engine does with the slots. numba compiles both methods: everything that they
    change lies in NumPy arrays that __init__ makes, and anything else that __init__ sets is a
    constant to them.
    """

    name: ClassVar[str]
    offline: ClassVar[bool] = False  # True: needs `foresee`, so only the simulator can run it
    pools: ClassVar[bool] = False  # True: suits one cache that all layers share
    bypasses: ClassVar[bool] = False  # True: need not keep what it reads (see `bypass_slots`)
    parameter: ClassVar[str] = ""  # describes what may follow the name after a colon

    def __init__(self, scope: Scope, n_slots: int) -> None:
        self.n_keys = scope.n_keys
        self.n_slots = n_slots
        # An event of so many experts or fewer may leave some of them without a slot: then the
        # missing one is among the candidates, and so are the event's own experts.
        self.bypass_slots = scope.bypass_slots if self.bypasses else 0

    @abstractmethod
    def touch(self, event: Event, now: int) -> None:
        """Take note of `event`; `now` is how many tokens the cache served before it."""

    @abstractmethod
    def victim(self, candidates: np.ndarray) -> int:
        """The key to evict, one of `candidates` (int64, never empty, longest resident first)."""

    def foresee(self, events: Events) -> None:  # noqa: B027  (online policies ignore it)
        """Learn all events to come, in order. Called for offline policies before the replay."""

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        """Keyword arguments of __init__, from what follows the name: the 64 of `lfu-decay:64`.

        Raises FlashMoEError when the argument makes no sense; a policy without this method takes
        none.
        """
        raise FlashMoEError(f"policy {cls.name!r} takes no argument, so leave out ':{argument}'")
