"""MoE-Infinity's activation-aware replacement."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope


class ActivationAware(Policy):
    """Evicts the least (share of its layer's activations) x (1 - layer / layers).

    Xue et al., 'MoE-Infinity' (arXiv 2401.14361): later layers go first, since there is
    more time to fetch them. The paper counts the current sequence; this counts since the cache
    was last cold, because a cache is not told where a sequence begins. With a cache per layer
    it is LFU without LFU's tie-break by recency.
    """

    name = "activation-aware"
    pools = True

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.n_experts = scope.n_experts
        self.n_layers = scope.n_layers
        self.uses = np.zeros(self.n_keys)
        self.layer_uses = np.zeros(self.n_layers)

    def touch(self, event: Event, now: int) -> None:
        for key, count in zip(event.keys, event.counts):
            self.uses[key] += count
            self.layer_uses[key // self.n_experts] += count

    def victim(self, candidates: np.ndarray) -> int:
        lowest, victim = np.inf, candidates[0]
        for key in candidates:
            layer = key // self.n_experts
            share = (self.uses[key] + 1e-6) / (self.layer_uses[layer] + 1e-6)
            priority = share * (1 - layer / self.n_layers)
            if priority < lowest:
                lowest, victim = priority, key
        return victim
