"""Least frequently and recently used."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope


class LFRU(Policy):
    """Evicts the expert with the fewest uses per token since its last use.

    From arXiv 2608.07911, the best causal policy there at batch 8. Uses are counted since the
    cache was last cold and outlive residency.
    """

    name = "lfru"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.last_use = np.full(self.n_keys, -1)
        self.clock = np.zeros(1, np.int64)  # tokens so far

    def touch(self, event: Event, now: int) -> None:
        for key, count, offset in zip(event.keys, event.counts, event.last):
            self.uses[key] += count
            self.last_use[key] = now + offset
        self.clock[0] = now + len(event.rows)

    def victim(self, candidates: np.ndarray) -> int:
        age = self.clock[0] - self.last_use[candidates]
        return candidates[np.argmin(self.uses[candidates] / age)]
