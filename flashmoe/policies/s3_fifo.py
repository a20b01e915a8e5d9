"""S3-FIFO: three static queues."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.queues import move, oldest

NOWHERE, SMALL, MAIN, GHOST = 0, 1, 2, 3  # lists


class S3FIFO(Policy):
    """Evicts from a small queue of newcomers first; an expert used there moves to the main queue.

    Yang, Zhang, Qiu, Yue, Rashmi, 'FIFO queues are all you need for cache eviction' (SOSP
    2023): 10 % of the slots are for newcomers (at least one), the ghost queue is as long as
    the main one, and uses are counted up to 3. Experts that the event needs are passed over and
    stay where they are.
    """

    name = "s3-fifo"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.small_slots = max(1, n_slots // 10)
        self.where = np.zeros(self.n_keys, np.int64)
        self.order = np.zeros(self.n_keys, np.int64)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.sizes = np.zeros(4, np.int64)
        self.clock = np.zeros(1, np.int64)
        self.keys = np.arange(self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            if self.where[key] == SMALL or self.where[key] == MAIN:
                self.uses[key] = min(self.uses[key] + 1, 3)
            else:
                self.uses[key] = 0
                move(self, key, MAIN if self.where[key] == GHOST else SMALL)

    def victim(self, candidates: np.ndarray) -> int:
        while True:
            newcomer = oldest(self.where, self.order, SMALL, candidates)
            veteran = oldest(self.where, self.order, MAIN, candidates)
            if newcomer >= 0 and (self.sizes[SMALL] >= self.small_slots or veteran < 0):
                if self.uses[newcomer] > 1:
                    self.uses[newcomer] = 0
                    move(self, newcomer, MAIN)
                else:
                    move(self, newcomer, GHOST)
                    if self.sizes[GHOST] > self.n_slots - self.small_slots:
                        move(self, oldest(self.where, self.order, GHOST, self.keys), NOWHERE)
                    return newcomer
            elif self.uses[veteran] > 0:
                self.uses[veteran] -= 1
                move(self, veteran, MAIN)
            else:
                move(self, veteran, NOWHERE)
                return veteran
