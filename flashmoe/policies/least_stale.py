"""Least-Stale: what the current forward pass has not used goes first."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope


class LeastStale(Policy):
    """Evicts experts not used in the current forward pass first, the layer due last of them.

    SpecMD (arXiv 2602.03921). Its text was not at hand: the order among stale experts (the
    layer that runs again last, then first in, first out) and among fresh ones (the same) is
    our reading of 'temporal and spatial locality'. With a cache per layer it is FIFO.
    """

    name = "least-stale"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.n_experts = scope.n_experts
        self.n_layers = scope.n_layers
        self.last_pass = np.full(self.n_keys, -1)
        self.current = np.zeros(2, np.int64)  # forward passes so far, the layer running now

    def touch(self, event: Event, now: int) -> None:
        layer = event.keys[0] // self.n_experts
        if layer <= self.current[1]:
            self.current[0] += 1
        self.current[1] = layer
        self.last_pass[event.keys] = self.current[0]

    def victim(self, candidates: np.ndarray) -> int:
        best, worst = -1, candidates[0]
        for key in candidates:
            rank = (key // self.n_experts - self.current[1] - 1) % self.n_layers
            if self.last_pass[key] < self.current[0]:
                rank += self.n_layers
            if rank > best:
                best, worst = rank, key
        return worst
