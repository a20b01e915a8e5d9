"""Least frequently used."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least


class LFU(Policy):
    """Evicts the expert with the fewest uses since the cache was last cold.

    Counts outlive residency: it is "perfect" LFU, where in-cache LFU forgets an expert's uses on
    eviction. Among equals the least recently used goes, then the longest resident.
    """

    name = "lfu"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.last_use = np.full(self.n_keys, -1)

    def touch(self, event: Event, now: int) -> None:
        for key, count, offset in zip(event.keys, event.counts, event.last):
            self.uses[key] += count
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        return least(candidates, self.uses, self.last_use)
