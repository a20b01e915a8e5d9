"""What an eviction policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from flashmoe.events import Event


class Policy(ABC):
    """Decides which resident expert makes room. One instance serves one cache.

    The cache calls `touch` once per event, before it asks for any victim, and `victim` once
    per eviction. Experts are keys 0..n_keys-1 (with a cache per layer: the expert's index).
    A policy keeps its own statistics and never learns what the engine does with the slots.
    """

    name: ClassVar[str]
    offline: ClassVar[bool] = False  # True: needs `foresee`, so it runs in the simulator only

    def __init__(self, n_keys: int, n_slots: int) -> None:
        self.n_keys = n_keys
        self.n_slots = n_slots

    @abstractmethod
    def touch(self, event: Event, now: int) -> None:
        """Take note of `event`; `now` is the number of tokens the cache served before it."""

    @abstractmethod
    def victim(self, candidates: Sequence[int]) -> int:
        """The key to evict, one of `candidates` (never empty; longest resident first)."""

    def foresee(self, events: Sequence[Event]) -> None:  # noqa: B027  (online policies ignore it)
        """Learn all events to come, in order. Called for offline policies before the replay."""
