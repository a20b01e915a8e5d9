"""What an eviction policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.events import Event, Events
from flashmoe.policies.parts.compiled import helper


@helper
def least(candidates, value, tie):  # type: ignore[no-untyped-def]
    """The candidate of the least `value`, then the least `tie`, then the longest resident."""
    best = candidates[0]
    for key in candidates:
        if value[key] < value[best] or (value[key] == value[best] and tie[key] < tie[best]):
            best = key
    return best


class Scope(NamedTuple):
    """Which part of a model one cache serves: one layer, or several that share its slots."""

    n_experts: int  # of each layer
    top_k: int = 1
    n_layers: int = 1  # that this cache serves
    first_layer: int = 0
    depth: int = 1  # MoE layers of the whole model

    @property
    def n_keys(self) -> int:
        """Keys 0..n_keys-1: layer within the scope times n_experts, plus the expert."""
        return self.n_experts * self.n_layers


class Policy(ABC):
    """Decides which resident expert makes room. One instance serves one cache.

    The cache calls `touch` once per event, before it asks for any victim, and `victim` once
    per eviction. A policy keeps its own statistics and never learns what the engine does with
    the slots. Both methods are compiled by numba: all that they change lies in NumPy arrays
    made by __init__, everything else that __init__ sets is a constant to them.
    """

    name: ClassVar[str]
    offline: ClassVar[bool] = False  # True: needs `foresee`, so it runs in the simulator only
    pools: ClassVar[bool] = False  # True: knows the layers, so one cache for all of them suits it
    parameter: ClassVar[str] = ""  # what may follow the name after a colon, in a few words

    def __init__(self, scope: Scope, n_slots: int) -> None:
        self.n_keys = scope.n_keys
        self.n_slots = n_slots
        self.bypasses = False  # True: may evict what was just served, or not admit it at all

    @abstractmethod
    def touch(self, event: Event, now: int) -> None:
        """Take note of `event`; `now` is the number of tokens the cache served before it."""

    @abstractmethod
    def victim(self, candidates: np.ndarray) -> int:
        """The key to evict, one of `candidates` (int64, never empty; longest resident first)."""

    def foresee(self, events: Events) -> None:  # noqa: B027  (online policies ignore it)
        """Learn all events to come, in order. Called for offline policies before the replay."""

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        """Keyword arguments of __init__ from what followed the name: `lfu-decay:64`.

        Raises FlashMoEError when the argument makes no sense, which it never does here.
        """
        raise FlashMoEError(f"policy {cls.name!r} takes no argument, so leave out ':{argument}'")
