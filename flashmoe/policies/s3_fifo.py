"""S3-FIFO: three static queues."""

from __future__ import annotations

import numpy as np

from flashmoe.compiled import helper
from flashmoe.events import Event
from flashmoe.policies.arc import oldest
from flashmoe.policies.base import Policy, Scope

NOWHERE, SMALL, MAIN, GHOST = 0, 1, 2, 3


class S3FIFO(Policy):
    """Evicts from a small queue of newcomers first; what is used there moves to the main one.

    Yang, Zhang, Qiu, Yue, Rashmi, 'FIFO queues are all you need for cache eviction' (SOSP
    2023): 10 % of the slots for newcomers (at least one), a ghost queue as long as the main
    one, two bits of use. Experts that the event needs are passed over, in place.
    """

    name = "s3-fifo"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.small_slots = max(1, n_slots // 10)
        self.where = np.zeros(self.n_keys, np.int64)
        self.order = np.zeros(self.n_keys, np.int64)
        self.bits = np.zeros(self.n_keys, np.int64)
        self.sizes = np.zeros(4, np.int64)
        self.clock = np.zeros(1, np.int64)
        self.keys = np.arange(self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            if self.where[key] == SMALL or self.where[key] == MAIN:
                self.bits[key] = min(self.bits[key] + 1, 3)
            else:
                self.bits[key] = 0
                _push(self, key, MAIN if self.where[key] == GHOST else SMALL)

    def victim(self, candidates: np.ndarray) -> int:
        while True:
            newcomer = oldest(self.where, self.order, SMALL, candidates)
            veteran = oldest(self.where, self.order, MAIN, candidates)
            if newcomer >= 0 and (self.sizes[SMALL] >= self.small_slots or veteran < 0):
                if self.bits[newcomer] > 1:
                    self.bits[newcomer] = 0
                    _push(self, newcomer, MAIN)
                else:
                    _push(self, newcomer, GHOST)
                    if self.sizes[GHOST] > self.n_slots - self.small_slots:
                        _push(self, oldest(self.where, self.order, GHOST, self.keys), NOWHERE)
                    return newcomer
            elif self.bits[veteran] > 0:
                self.bits[veteran] -= 1
                _push(self, veteran, MAIN)
            else:
                _push(self, veteran, NOWHERE)
                return veteran


@helper
def _push(self, key, to):  # type: ignore[no-untyped-def]
    self.sizes[self.where[key]] -= 1
    self.sizes[to] += 1
    self.where[key] = to
    self.clock[0] += 1
    self.order[key] = self.clock[0]
