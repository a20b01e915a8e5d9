"""W-TinyLFU."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.queues import move, oldest

NOWHERE, WINDOW, PROBATION, PROTECTED = 0, 1, 2, 3  # lists
USES_SINCE_HALVING = 1  # a position in `clock`, after MOVES


class WTinyLFU(Policy):
    """Evicts the less frequent of the window's and the main cache's least recent experts.

    Einziger, Friedman, Manes, 'TinyLFU: a highly efficient cache admission policy' (ACM TOS
    2017): a window of 1 % of the slots (at least one), a main SLRU of which 80 % is protected,
    counts halved every 10 x n_slots uses. Counts are exact: a layer has too few experts for
    a sketch to save anything.
    """

    name = "w-tinylfu"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.window_slots = max(1, n_slots // 100)
        self.protected_slots = int((n_slots - self.window_slots) * 0.8)
        self.where = np.zeros(self.n_keys, np.int64)
        self.order = np.zeros(self.n_keys, np.int64)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.sizes = np.zeros(4, np.int64)
        self.clock = np.zeros(2, np.int64)
        self.keys = np.arange(self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        for key, count in zip(event.keys, event.counts):
            self.uses[key] += count
            self.clock[USES_SINCE_HALVING] += count
            queue = self.where[key]
            if queue == NOWHERE:
                move(self, key, WINDOW)
            elif queue == PROBATION and self.protected_slots:
                move(self, key, PROTECTED)
                if self.sizes[PROTECTED] > self.protected_slots:
                    move(self, oldest(self.where, self.order, PROTECTED, self.keys), PROBATION)
            else:
                move(self, key, queue)
            if self.sizes[1:].sum() <= self.n_slots and self.sizes[WINDOW] > self.window_slots:
                move(self, oldest(self.where, self.order, WINDOW, self.keys), PROBATION)
        if self.clock[USES_SINCE_HALVING] >= 10 * self.n_slots:
            self.uses[:] //= 2
            self.clock[USES_SINCE_HALVING] = 0

    def victim(self, candidates: np.ndarray) -> int:
        newcomer = oldest(self.where, self.order, WINDOW, candidates)
        veteran = oldest(self.where, self.order, PROBATION, candidates)
        if veteran < 0:
            veteran = oldest(self.where, self.order, PROTECTED, candidates)
        if veteran < 0:
            victim = newcomer
        elif newcomer < 0 or self.sizes[WINDOW] <= self.window_slots:
            victim = veteran
        elif self.uses[newcomer] > self.uses[veteran]:
            move(self, newcomer, PROBATION)
            victim = veteran
        else:
            victim = newcomer
        move(self, victim, NOWHERE)
        return victim
