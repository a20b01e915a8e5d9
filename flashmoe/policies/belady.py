"""Belady's optimum for demand fetching with forced admission: the offline ceiling."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event, Events
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.compiled import helper, kernel


def next_uses(events: Events, n_keys: int) -> np.ndarray:
    """For each of `events.keys`, the next event that has it again; their number if none."""
    found = np.empty(len(events.keys), np.int64)
    kernel(_next_uses, Belady)(events.keys, events.starts, n_keys, found)
    return found


@helper
def _next_uses(keys, starts, n_keys, out):  # type: ignore[no-untyped-def]
    following = np.full(n_keys, len(starts) - 1)
    for event in range(len(starts) - 2, -1, -1):
        for i in range(starts[event], starts[event + 1]):
            out[i] = following[keys[i]]
        for i in range(starts[event], starts[event + 1]):
            following[keys[i]] = event


class Belady(Policy):
    """Evicts the expert whose next use is farthest away (Belady, IBM Systems Journal 1966)."""

    name = "belady"
    offline = True

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.next_use = np.empty(0, np.int64)  # [requests], of each its key's next event
        self.position = np.zeros(1, np.int64)  # requests seen so far
        self.distance = np.full(self.n_keys, np.iinfo(np.int64).max)  # next event as of now

    def foresee(self, events: Events) -> None:
        self.next_use = next_uses(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        for key in event.keys:
            self.distance[key] = self.next_use[self.position[0]]
            self.position[0] += 1

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[np.argmax(self.distance[candidates])]
