"""Belady's optimum for demand fetching with forced admission: the offline ceiling."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event, Events
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.next_uses import Future, advance


class Belady(Policy):
    """Evicts the expert whose next use is farthest away (Belady, IBM Systems Journal 1966)."""

    name = "belady"
    offline = True

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.future = Future.unknown(self.n_keys)

    def foresee(self, events: Events) -> None:
        self.future = Future.of(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        advance(self.future, event.keys)

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[np.argmax(self.future.due[candidates])]
