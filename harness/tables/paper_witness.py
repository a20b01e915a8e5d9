"""What the paper's motivation counts at evictions: soon used again, and who was right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.simulate import Conditions
from flashmoe.events import Event, Events
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.parts.next_uses import Future, advance
from flashmoe.trace import Trace

SOON_TOKENS = 5
EVENTS, EVICTIONS, SOON, DISAGREED, LRU_RIGHT = range(5)  # positions in `Witness.counts`


class Witness(Policy):
    """Evicts as LRU does, or as Belady does if it is `farsighted`, and counts what came of it."""

    name = "witness"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, farsighted: bool, soon_events: int) -> None:
        super().__init__(scope, n_slots)
        self.farsighted = farsighted
        self.soon_events = soon_events
        self.future = Future.unknown(self.n_keys)
        self.last_use = np.full(self.n_keys, -1)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.zeros = np.zeros(self.n_keys, np.int64)
        self.counts = np.zeros(5, np.int64)

    def foresee(self, events: Events) -> None:
        self.future = Future.of(events, self.n_keys)
        never = self.future.next_use == len(events)
        self.future.next_use[never] = np.iinfo(np.int64).max

    def touch(self, event: Event, now: int) -> None:
        advance(self.future, event.keys)
        for i, key in enumerate(event.keys):
            self.uses[key] += event.counts[i]
            self.last_use[key] = now + event.last[i]
        self.counts[EVENTS] += 1

    def victim(self, candidates: np.ndarray) -> int:
        due = self.future.due
        oldest = least(candidates, self.last_use, self.zeros)
        rarest = least(candidates, self.uses, self.last_use)
        if due[oldest] != due[rarest]:
            self.counts[DISAGREED] += 1
            self.counts[LRU_RIGHT] += due[oldest] > due[rarest]
        victim = candidates[np.argmax(due[candidates])] if self.farsighted else oldest
        self.counts[EVICTIONS] += 1
        self.counts[SOON] += due[victim] - (self.counts[EVENTS] - 1) <= self.soon_events
        return victim


class Seen(NamedTuple):
    """Shares of evictions."""

    soon: float  # whose expert was used again within SOON_TOKENS
    lru_right: float  # of those where LRU and LFU differ: LRU's victim was used again later


def watch(trace: Trace, slots: int, farsighted: bool, conditions: Conditions) -> Seen:
    """All evictions of LRU, or of Belady, on `trace`, every sequence cold."""
    counts = np.zeros(5, np.int64)
    for layer in range(trace.n_layers):
        layers = range(layer, layer + 1)
        scope = simulate.scope_of(trace, layers, conditions)
        soon = SOON_TOKENS * (trace.top_k // scope.top_k)  # events of a sequential replay
        for tokens in simulate.streams(trace):
            events = simulate.events_of(trace, tokens, layers, conditions)
            witness = Witness(scope, slots, farsighted, soon)
            witness.foresee(events)
            ExpertCache(witness).replay(events)
            counts += witness.counts
    return Seen(
        counts[SOON] / max(1, counts[EVICTIONS]), counts[LRU_RIGHT] / max(1, counts[DISAGREED])
    )
