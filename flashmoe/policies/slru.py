"""Segmented LRU."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.parts.queues import move, oldest

ABSENT, PROBATION, PROTECTED = 0, 1, 2  # lists


class SLRU(Policy):
    """Evicts the least recently used expert of those used only once, else of those used again.

    Karedla, Love, Wherry, 'Caching strategies to improve disk system performance' (1994): a
    hit moves an expert to the protected segment (at most 80 % of the slots), from which the
    least recent falls back to probation.
    """

    name = "slru"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.where = np.zeros(self.n_keys, np.int64)
        self.order = np.zeros(self.n_keys, np.int64)
        self.sizes = np.zeros(3, np.int64)
        self.clock = np.zeros(1, np.int64)
        self.protected_slots = int(n_slots * 0.8)
        self.keys = np.arange(self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            if self.where[key] == ABSENT:
                move(self, key, PROBATION)
            elif self.where[key] == PROBATION and self.protected_slots:
                move(self, key, PROTECTED)
                if self.sizes[PROTECTED] > self.protected_slots:
                    move(self, oldest(self.where, self.order, PROTECTED, self.keys), PROBATION)
            else:
                move(self, key, self.where[key])

    def victim(self, candidates: np.ndarray) -> int:
        victim = least(candidates, self.where, self.order)
        move(self, victim, ABSENT)
        return victim
