"""Gathers the evictions that `learned` is trained on: features, and the waits for next uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope
from flashmoe.policies.lru import LRU
from flashmoe.policies.parts.features import (
    N_FEATURES,
    REMEMBERED_EVENTS,
    RoutingHistory,
    describe,
    recall,
    remember,
)
from flashmoe.policies.parts.next_uses import Future, advance
from flashmoe.policies.parts.random_numbers import draw
from flashmoe.trace import Trace
from flashmoe.util import many_jobs
from flashmoe.util.machine_code import helper

CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # shares of a layer's experts
MIXED_SEQUENCES = 8  # how many sequences a mixed stream serves, in turn or one after the other
MIXED_SHARE = 0.12  # mixed streams of either kind, as a share of the single sequences
EVENTS, ROWS = 0, 1  # positions in `Teacher.counts`
PROBE_ONE_IN, PROBE_SKIP = 10, 8  # the probe that sets the sampling: of streams, of evictions


@dataclass
class Decisions:
    """Evictions of one trace. A row is a candidate; the candidates of an eviction are adjacent.

    A turnover is slots / top_k tokens: a cache of which nothing hit would be another one by then.
    """

    features: np.ndarray  # [rows, N_FEATURES] float32
    waits: np.ndarray  # [rows] float32, turnovers until the next use, inf where none comes


class Teacher(LRU):
    """Evicts as LRU does, and writes down features and waits at one in `skip` evictions.

    It evicts as LRU because the evictions of other policies trained no better network
    (docs/policy.md).
    """

    name = "teacher"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, rows: int, skip: int, seed: int) -> None:
        super().__init__(scope, n_slots)
        self.history = RoutingHistory.empty(scope)
        self.turnover = n_slots / scope.top_k  # tokens
        self.depth = scope.first_layer / max(1, scope.depth - 1)
        self.skip = skip
        self.future = Future.unknown(self.n_keys)
        self.random = np.array([seed])
        self.counts = np.zeros(2, np.int64)  # by EVENTS, ROWS
        self.features = np.zeros((rows, N_FEATURES), np.float32)
        self.waits = np.full(rows, np.inf, np.float32)
        self.n_events = 0

    def foresee(self, events: Events) -> None:
        self.n_events = len(events)
        self.future = Future.of(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        remember(self.history, event)
        for key, offset in zip(event.keys, event.last):
            self.last_use[key] = now + offset
        advance(self.future, event.keys)
        self.counts[EVENTS] += 1

    def victim(self, candidates: np.ndarray) -> int:
        if (draw(self.random) >> 8) % self.skip == 0:  # the lowest bits are hardly random
            write_down(self, candidates)
        return candidates[np.argmin(self.last_use[candidates])]


@helper
def write_down(self, candidates):
    """Write the features and the wait of every candidate, in a cache of one layer.

    The present event's experts are candidates too, because a cache that bypasses asks about them.
    """
    served = self.history.events[0][(self.history.tokens[0] - 1) % REMEMBERED_EVENTS]
    if self.counts[ROWS] + len(candidates) + len(served) > len(self.waits):
        return
    similar, pairs = recall(self.history, 0)
    for keys in (candidates, served):
        for key in keys:
            if key >= 0:
                row = self.counts[ROWS]
                features = self.features[row]
                describe(self.history, 0, key, similar, pairs, self.n_slots, self.depth, features)
                if self.future.due[key] < self.n_events:
                    self.waits[row] = (
                        self.future.due[key] - self.counts[EVENTS] + 1
                    ) / self.turnover
                self.counts[ROWS] += 1


def gather(trace: Trace, rows: int, seed: int) -> Decisions:
    """About `rows` rows of the evictions that LRU makes on `trace`.

    They come from single sequences that start cold and from mixed streams, which serve several
    sequences in turn or one after the other. The capacity changes from stream to stream.
    """
    rng = np.random.default_rng(seed)
    streams = simulate.streams(trace)
    mixtures = (simulate.streams(trace, MIXED_SEQUENCES), _chained(streams))
    for mixed in mixtures:
        streams += mixed * max(1, round(MIXED_SHARE * len(streams) / len(mixed)))
    pairs = [(layer, number) for layer in range(trace.n_layers) for number in range(len(streams))]
    rng.shuffle(pairs)
    pairs = pairs[: max(200, rows // 300)]

    room = 4 * rows // len(pairs)

    def watch(some: Sequence[tuple[int, tuple[int, int]]], skip: int) -> list[Decisions]:
        jobs = []
        for number, (layer, stream) in some:
            capacity = CAPACITIES[number % len(CAPACITIES)]
            jobs.append((trace, streams[stream], layer, capacity, room, skip, seed + number))
        return list(many_jobs.outcomes(_watch, jobs, threads=True))

    probe = watch(list(enumerate(pairs[::PROBE_ONE_IN])), PROBE_SKIP)
    expected = PROBE_SKIP * PROBE_ONE_IN * sum(len(part.features) for part in probe)
    skip = max(1, round(expected / rows))
    parts = watch(list(enumerate(pairs)), skip)
    return Decisions(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.waits for part in parts]),
    )


def _watch(
    trace: Trace, tokens: np.ndarray, layer: int, capacity: float, room: int, skip: int, seed: int
) -> Decisions:
    """Those of one stream at one layer, about `room` rows at most, of one in `skip` evictions."""
    layers = range(layer, layer + 1)
    slots = simulate.slots_for(trace, capacity)
    events = simulate.events_of(trace, tokens, layers)
    teacher = Teacher(simulate.scope_of(trace, layers), slots, room + slots, skip, seed)
    teacher.foresee(events)
    ExpertCache(teacher).replay(events)
    written = teacher.counts[ROWS]
    return Decisions(teacher.features[:written], teacher.waits[:written])


def _chained(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Streams that serve several sequences one after the other."""
    return [
        np.concatenate(sequences[first : first + MIXED_SEQUENCES])
        for first in range(0, len(sequences), MIXED_SEQUENCES)
    ]
