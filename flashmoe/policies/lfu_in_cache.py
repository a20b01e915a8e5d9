"""Least frequently used, of what the cache itself remembers."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least


class LFUInCache(Policy):
    """Evicts the expert with the fewest uses since it came in; eviction deletes its count.

    A newcomer has count 1, so that it goes before all that were used again. Among equals the
    least recently used goes, then the longest resident. `lfu` keeps the counts of the evicted.
    """

    name = "lfu-in-cache"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.last_use = np.full(self.n_keys, -1)

    def touch(self, event: Event, now: int) -> None:
        for key, count, offset in zip(event.keys, event.counts, event.last):
            self.uses[key] += count
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        victim = least(candidates, self.uses, self.last_use)
        self.uses[victim] = 0
        return victim
