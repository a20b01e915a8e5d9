"""Least frequently used, of what the cache itself remembers."""

from __future__ import annotations

import numpy as np

from flashmoe.policies.base import least
from flashmoe.policies.lfu import LFU


class LFUInCache(LFU):
    """Evicts the expert with the fewest uses since it came in; eviction deletes its count.

    A newcomer has count 1, so that it goes before all that were used again. Among equals the
    least recently used goes, then the longest resident. `lfu` keeps the counts of the evicted.
    """

    name = "lfu-in-cache"

    def victim(self, candidates: np.ndarray) -> int:
        victim = least(candidates, self.uses, self.last_use)
        self.uses[victim] = 0
        return victim
