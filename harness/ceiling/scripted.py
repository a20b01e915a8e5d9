"""Replays a sequence under a policy that is told, from outside, how long each expert will wait."""

from __future__ import annotations

import numpy as np

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from harness.ceiling.moments import Sequence


class Scripted(Policy):
    """Evicts the expert of the longest wait by a script [events, n_keys], a row an event."""

    name = "scripted"
    offline = True
    bypasses = True

    def __init__(self, scope: Scope, n_slots: int, waits: np.ndarray) -> None:
        super().__init__(scope, n_slots)
        self.waits = np.ascontiguousarray(waits, np.float32)
        self.served = np.zeros(1, np.int64)

    def touch(self, event: Event, now: int) -> None:
        self.served[0] += 1

    def victim(self, candidates: np.ndarray) -> int:
        row = self.waits[self.served[0] - 1]
        longest = candidates[0]
        for key in candidates:
            if row[key] > row[longest]:
                longest = key
        return longest


def hits(sequence: Sequence, layer: int, slots: int, waits: np.ndarray) -> int:
    """How many requests hit, from a cold start, with `waits` [T, E] as the script."""
    layers = range(layer, layer + 1)
    policy = Scripted(simulate.scope_of(sequence.trace, layers), slots, waits)
    cache = ExpertCache(policy)
    cache.replay(simulate.events_of(sequence.trace, sequence.tokens, layers))
    return cache.hits
