"""Least recently used by the second-last use."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least


class LRUK(Policy):
    """Evicts the expert whose second-last use is the longest ago (LRU-2).

    O'Neil, O'Neil, Weikum (SIGMOD 1993), K = 2, no correlated-reference period. History
    outlives residency. Experts used only once go first, by their last use.
    """

    name = "lru-k"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.last_use = np.full(self.n_keys, -1)
        self.second_last = np.full(self.n_keys, -1)

    def touch(self, event: Event, now: int) -> None:
        for key, count, offset in zip(event.keys, event.counts, event.last):
            # An event tells only the last use of each key: the use before it counts as that one.
            self.second_last[key] = self.last_use[key] if count == 1 else now + offset
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        return least(candidates, self.second_last, self.last_use)
