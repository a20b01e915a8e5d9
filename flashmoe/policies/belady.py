"""Belady's optimum for demand fetching with forced admission: the offline ceiling."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class Belady(Policy):
    """Evicts the expert whose next use is farthest away (Belady, IBM Systems Journal 1966)."""

    name = "belady"
    offline = True

    def foresee(self, events: Sequence[Event]) -> None:
        never = len(events)
        following = [never] * self.n_keys
        self.next_use: list[list[int]] = []  # for each event, its members' next events
        for position in range(never - 1, -1, -1):
            keys = events[position].keys
            self.next_use.append([following[key] for key in keys])
            for key in keys:
                following[key] = position
        self.next_use.reverse()
        self.position = 0
        self.distance = [never] * self.n_keys  # of every key, its next event as of now

    def touch(self, event: Event, now: int) -> None:
        for key, following in zip(event.keys, self.next_use[self.position], strict=True):
            self.distance[key] = following
        self.position += 1

    def victim(self, candidates: Sequence[int]) -> int:
        return max(candidates, key=self.distance.__getitem__)
