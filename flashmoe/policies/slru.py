"""Segmented LRU."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least

ABSENT, PROBATION, PROTECTED = 0, 1, 2


class SLRU(Policy):
    """Evicts the least recent expert not used again since it came, else the least recent.

    Karedla, Love, Wherry, 'Caching strategies to improve disk system performance' (1994): a
    hit moves an expert to the protected segment (at most 80 % of the slots), from which the
    least recent falls back to probation.
    """

    name = "slru"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.segment = np.zeros(self.n_keys, np.int64)
        self.order = np.full(self.n_keys, -1)  # of arrival or use within the segment
        self.clock = np.zeros(2, np.int64)  # arrivals and uses so far; experts protected
        self.limit = int(n_slots * 0.8)

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            self.clock[0] += 1
            self.order[key] = self.clock[0]
            if self.segment[key] == ABSENT:
                self.segment[key] = PROBATION
            elif self.segment[key] == PROBATION and self.limit:
                if self.clock[1] == self.limit:
                    oldest = -1
                    for other in range(self.n_keys):
                        if self.segment[other] == PROTECTED and (
                            oldest < 0 or self.order[other] < self.order[oldest]
                        ):
                            oldest = other
                    self.segment[oldest] = PROBATION
                    self.clock[0] += 1
                    self.order[oldest] = self.clock[0]
                    self.clock[1] -= 1
                self.segment[key] = PROTECTED
                self.clock[1] += 1

    def victim(self, candidates: np.ndarray) -> int:
        chosen = least(candidates, self.segment, self.order)
        if self.segment[chosen] == PROTECTED:
            self.clock[1] -= 1
        self.segment[chosen] = ABSENT
        return chosen
