"""Adaptive replacement cache."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.queues import move, oldest

NOWHERE, T1, T2, B1, B2 = 0, 1, 2, 3, 4  # lists, by the paper's names


class ARC(Policy):
    """Evicts from the experts used once or from those used again; it learns which to cut.

    Megiddo, Modha, 'ARC: a self-tuning, low overhead replacement cache' (FAST 2003): T1 and T2
    hold residents used once and more often, B1 and B2 remember the victims of each. A return
    from B1 lets T1 grow, a return from B2 shrinks it. Only experts that the event does not need
    can be evicted; if the list to cut has none of those, the other list gives one.
    """

    name = "arc"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.where = np.zeros(self.n_keys, np.int64)
        self.order = np.zeros(self.n_keys, np.int64)
        self.sizes = np.zeros(5, np.int64)
        self.clock = np.zeros(1, np.int64)
        self.target = np.zeros(1)  # how many slots T1 should have
        self.from_b2 = np.zeros(1, np.bool_)  # the last miss came from B2
        self.keys = np.arange(self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            queue = self.where[key]
            self.from_b2[0] = queue == B2
            if queue == B1:
                step = max(self.sizes[B2] / self.sizes[B1], 1.0)
                self.target[0] = min(self.target[0] + step, float(self.n_slots))
            elif queue == B2:
                step = max(self.sizes[B1] / self.sizes[B2], 1.0)
                self.target[0] = max(self.target[0] - step, 0.0)
            elif queue == NOWHERE:
                if self.sizes[T1] + self.sizes[B1] >= self.n_slots and self.sizes[B1]:
                    move(self, oldest(self.where, self.order, B1, self.keys), NOWHERE)
                elif self.sizes[1:].sum() >= 2 * self.n_slots and self.sizes[B2]:
                    move(self, oldest(self.where, self.order, B2, self.keys), NOWHERE)
            move(self, key, T1 if queue == NOWHERE else T2)

    def victim(self, candidates: np.ndarray) -> int:
        first = oldest(self.where, self.order, T1, candidates)
        second = oldest(self.where, self.order, T2, candidates)
        above = self.sizes[T1] > self.target[0]
        level = self.from_b2[0] and self.sizes[T1] == self.target[0]
        if second < 0 or (first >= 0 and (above or level)):
            victim, ghosts = first, B1
        else:
            victim, ghosts = second, B2
        move(self, victim, ghosts)
        return victim
