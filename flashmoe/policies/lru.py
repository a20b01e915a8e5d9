"""Least recently used."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope


class LRU(Policy):
    """Evicts the expert whose last use is the longest ago.

    Experts of one token were used at the same time; among equals the longest resident goes.
    """

    name = "lru"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.last_use = np.full(self.n_keys, -1)

    def touch(self, event: Event, now: int) -> None:
        for key, offset in zip(event.keys, event.last):
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[np.argmin(self.last_use[candidates])]
