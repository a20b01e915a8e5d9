"""Least recently used."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class LRU(Policy):
    """Evicts the expert whose last use is the longest ago.

    Experts of one token were used at the same time; among equals the longest resident goes.
    """

    name = "lru"

    def __init__(self, n_keys: int, n_slots: int) -> None:
        super().__init__(n_keys, n_slots)
        self.last_use = [-1] * n_keys

    def touch(self, event: Event, now: int) -> None:
        for key, offset in zip(event.keys, event.last, strict=True):
            self.last_use[key] = now + offset

    def victim(self, candidates: Sequence[int]) -> int:
        return min(candidates, key=self.last_use.__getitem__)
