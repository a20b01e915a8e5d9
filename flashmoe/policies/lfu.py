"""Least frequently used."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class LFU(Policy):
    """Evicts the expert with the fewest uses since the cache was last cold.

    Counts outlive residency ("perfect" LFU, not the in-cache kind, which forgets an expert's
    past on eviction). Among equals the least recently used goes, then the longest resident.
    """

    name = "lfu"

    def __init__(self, n_keys: int, n_slots: int) -> None:
        super().__init__(n_keys, n_slots)
        self.rank = [(0, -1)] * n_keys  # (uses, last use)

    def touch(self, event: Event, now: int) -> None:
        for key, count, offset in zip(event.keys, event.counts, event.last, strict=True):
            self.rank[key] = (self.rank[key][0] + count, now + offset)

    def victim(self, candidates: Sequence[int]) -> int:
        return min(candidates, key=self.rank.__getitem__)
