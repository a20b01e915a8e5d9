"""Gathers what `learned` is trained on: evictions, what was known then, and what came after."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope
from flashmoe.policies.belady import next_uses
from flashmoe.policies.lru import LRU
from flashmoe.policies.parts.compiled import helper
from flashmoe.policies.parts.features import N_FEATURES, Memory, describe, recall, remember
from flashmoe.trace import Trace

CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
INTERLEAVED = 8  # sequences served in turn, or one after the other, in what is mixed in
MIXED_SHARE = 0.12  # of streams of either kind, which are INTERLEAVED times as long
NEVER_GAPS = 8  # a use that never came counts as this many gaps after the sequence's end


@dataclass
class Decisions:
    """Evictions of one trace: every row one candidate, all candidates of one eviction together."""

    features: np.ndarray  # [rows, N_FEATURES] float32
    distance_gaps: np.ndarray  # [rows] float32, to the next use


class Teacher(LRU):
    """Evicts as LRU does and keeps a sample of what could be known, and of what came after.

    LRU's states are what `learned` is trained on: neither two more rounds at the network's own
    states (as DAgger takes them) nor half of the states from fading counts did better.
    """

    name = "teacher"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, rows: int, skip: int, seed: int) -> None:
        super().__init__(scope, n_slots)
        self.memory = Memory.empty(scope)
        self.gap = scope.n_experts / scope.top_k
        self.depth = scope.first_layer / max(1, scope.depth - 1)
        self.skip = skip
        self.next_use = np.empty(0, np.int64)
        self.distance = np.zeros(self.n_keys, np.int64)  # the next event that has the key
        self.place = np.array([0, 0, 0, seed])  # requests, events, rows written, random state
        self.rows = np.zeros((rows, N_FEATURES), np.float32)
        self.waits = np.zeros(rows, np.float32)
        self.n_events = 0

    def foresee(self, events: Events) -> None:
        self.n_events = len(events)
        self.next_use = next_uses(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        remember(self.memory, event)
        for key, offset in zip(event.keys, event.last):
            self.last_use[key] = now + offset
            self.distance[key] = self.next_use[self.place[0]]
            self.place[0] += 1
        self.place[1] += 1

    def victim(self, candidates: np.ndarray) -> int:
        self.place[3] = (self.place[3] * 1103515245 + 12345) % 2147483648
        if (self.place[3] >> 8) % self.skip == 0:
            take_down(self, candidates)
        return candidates[np.argmin(self.last_use[candidates])]


@helper
def take_down(self, candidates):  # type: ignore[no-untyped-def]
    """Write the features and the wait of every candidate, of a cache of one layer."""
    if self.place[2] + len(candidates) > len(self.rows):
        return
    similar, pairs = recall(self.memory, 0)
    for key in candidates:
        row = self.place[2]
        describe(self.memory, 0, key, similar, pairs, self.n_slots, self.depth, self.rows[row])
        wait = self.distance[key] - self.place[1] + 1
        if self.distance[key] == self.n_events:
            wait += NEVER_GAPS * self.gap
        self.waits[row] = wait / self.gap
        self.place[2] += 1


def gather(trace: Trace, rows: int, seed: int) -> Decisions:
    """About `rows` rows of the evictions that LRU makes on `trace`.

    Half from sequences that start cold, the rest from several in turn and one after the other.

    Every stream is replayed at every layer at one capacity, which change from stream to stream.
    """
    rng = np.random.default_rng(seed)
    turns = simulate.streams(trace)
    mixtures = (simulate.streams(trace, INTERLEAVED), _chained(turns))
    for mixed in mixtures:
        turns += mixed * max(1, round(MIXED_SHARE * len(turns) / len(mixed)))
    pairs = [(layer, number) for layer in range(trace.n_layers) for number in range(len(turns))]
    rng.shuffle(pairs)
    pairs = pairs[: max(200, rows // 300)]

    def one(job: tuple[int, tuple[int, int]], skip: int) -> Decisions:
        number, (layer, stream) = job
        scope = Scope(trace.n_experts, trace.top_k, 1, layer, trace.n_layers)
        slots = simulate.slots_for(trace, CAPACITIES[number % len(CAPACITIES)])
        events = simulate.events_of(trace, turns[stream], range(layer, layer + 1))
        room = 4 * rows // len(pairs) + slots
        teacher = Teacher(scope, slots, room, skip, seed + number)
        teacher.foresee(events)
        ExpertCache(teacher).replay(events)
        written = teacher.place[2]
        return Decisions(teacher.rows[:written], teacher.waits[:written])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        probe = list(threads.map(one, enumerate(pairs[::10]), repeat(8)))
        found = 8 * 10 * sum(len(part.features) for part in probe)
        skip = max(1, round(found / rows))
        parts = list(threads.map(one, enumerate(pairs), repeat(skip)))
    return Decisions(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.distance_gaps for part in parts]),
    )


def _chained(turns: list[np.ndarray]) -> list[np.ndarray]:
    return [
        np.concatenate(turns[first : first + INTERLEAVED])
        for first in range(0, len(turns), INTERLEAVED)
    ]
