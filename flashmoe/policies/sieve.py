"""SIEVE."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.util.machine_code import helper

ARRIVALS, HAND = 0, 1  # positions in `clock`


class SIEVE(Policy):
    """Evicts the first expert not used since a hand, moving from old to new, last passed it.

    Zhang, Yang, Yue, Vigfusson, Rashmi, 'SIEVE is simpler than LRU' (NSDI 2024). Experts that
    the event needs are passed over and keep their mark.
    """

    name = "sieve"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.arrival = np.full(self.n_keys, -1)  # number of its arrival; -1: not resident
        self.used = np.zeros(self.n_keys, np.bool_)
        self.clock = np.zeros(2, np.int64)  # arrivals so far and the arrival that the hand is at

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            if self.arrival[key] >= 0:
                self.used[key] = True
            else:
                self.clock[ARRIVALS] += 1
                self.arrival[key] = self.clock[ARRIVALS]
                self.used[key] = False

    def victim(self, candidates: np.ndarray) -> int:
        while True:
            key = next_from(self.clock[HAND], self.arrival, candidates)
            self.clock[HAND] = self.arrival[key]
            if not self.used[key]:
                self.arrival[key] = -1
                return key
            self.used[key] = False
            self.clock[HAND] += 1


@helper
def next_from(hand, arrival, candidates):
    """The first candidate that arrived at the hand or later; if there is none, the oldest."""
    first, oldest = -1, candidates[0]
    for key in candidates:
        if arrival[key] >= hand and (first < 0 or arrival[key] < arrival[first]):
            first = key
        if arrival[key] < arrival[oldest]:
            oldest = key
    return first if first >= 0 else oldest
