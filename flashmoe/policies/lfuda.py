"""Least frequently used, with dynamic ageing."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least


class LFUDA(Policy):
    """Evicts the lowest uses-while-resident plus age; the age grows to each victim's total.

    Arlitt, Cherkasova, Dilley, Friedrich, Jin, 'Evaluating content management techniques for
    Web proxy caches' (2000). An expert that comes back starts at one use and the current age.
    """

    name = "lfuda"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.total = np.full(self.n_keys, -1)  # uses plus age; -1: not resident
        self.last_use = np.full(self.n_keys, -1)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.age = np.zeros(1, np.int64)

    def touch(self, event: Event, now: int) -> None:
        for key, count, offset in zip(event.keys, event.counts, event.last):
            if self.total[key] < 0:
                self.uses[key] = 0
            self.uses[key] += count
            self.total[key] = self.uses[key] + self.age[0]
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        victim = least(candidates, self.total, self.last_use)
        self.age[0] = max(self.age[0], self.total[victim])
        self.total[victim] = -1
        return victim
