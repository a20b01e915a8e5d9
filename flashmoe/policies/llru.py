"""Layer-aware least recently used."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope


class LLRU(Policy):
    """Evicts the expert last used the most forward passes ago; of those, the layer due last.

    After Angelopoulos, Marchal, Obrecht, Simon, 'Cache Management for Mixture-of-Experts
    LLMs' (arXiv 2509.02408): on a cache that all layers share, plain LRU evicts the very
    layer that runs next. Its abstract and summaries were at hand, not its pseudocode; the
    ranking by (pass, layer) is our reading. With a cache per layer it is LRU.
    """

    name = "llru"

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
            ahead = (key // self.n_experts - self.current[1] - 1) % self.n_layers
            rank = (self.current[0] - self.last_pass[key]) * self.n_layers + ahead
            if rank > best:
                best, worst = rank, key
        return worst
