"""The expert cache: which expert is in which slot, and who makes room for whom.

It moves no bytes. The engine and the simulator both drive this class, so a recorded run
replayed through the simulator gives the hits and misses that the engine counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class Wave(NamedTuple):
    """A part of an event that fits the slots: (key, slot) pairs resident, and to be read."""

    hits: list[tuple[int, int]]
    loads: list[tuple[int, int]]


class ExpertCache:
    """`policy.n_slots` slots under one policy; event-atomic (arXiv 2608.07911).

    Hits are counted against residency at the event's start, and no member of an event is
    evicted by it before it was served. An event with more members than slots (a prefill)
    comes as several waves; each member is served in exactly one of them.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.n_slots = policy.n_slots
        self.slot_of: dict[int, int] = {}  # in order of admission
        self.free = list(range(self.n_slots - 1, -1, -1))
        self.tokens = self.requests = self.hits = 0
        self.policy_seconds = 0.0

    def waves(self, event: Event) -> Iterator[Wave]:
        """Serve `event`: take a wave, make its loads resident, use its slots, take the next."""
        started = time.perf_counter()
        self.policy.touch(event, self.tokens)
        self.tokens += event.tokens
        hits = [(key, self.slot_of[key]) for key in event.keys if key in self.slot_of]
        misses = [key for key in event.keys if key not in self.slot_of]
        self.requests += len(event.keys)
        self.hits += len(hits)
        protected = set(event.keys)
        room = self.n_slots - len(hits)
        while True:
            loads = [(key, self._admit(key, protected)) for key in misses[:room]]
            self.policy_seconds += time.perf_counter() - started
            if hits or loads:
                yield Wave(hits, loads)
            misses = misses[room:]
            if not misses:
                return
            started = time.perf_counter()
            hits, room = [], self.n_slots
            protected = set(misses[:room])  # members already served may make room now

    def _admit(self, key: int, protected: set[int]) -> int:
        if self.free:
            slot = self.free.pop()
        else:
            candidates = [resident for resident in self.slot_of if resident not in protected]
            slot = self.slot_of.pop(self.policy.victim(candidates))
        self.slot_of[key] = slot
        return slot

    def forget(self, key: int) -> None:
        """Free the key's slot: its bytes never arrived."""
        self.free.append(self.slot_of.pop(key))

    @property
    def misses(self) -> int:
        return self.requests - self.hits
