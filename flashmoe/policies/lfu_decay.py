"""Least frequently used, with uses that fade."""

from __future__ import annotations

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least


class LFUDecay(Policy):
    """Evicts the expert with the fewest uses; a use counts half after `half-life` tokens.

    The strongest untrained policy of arXiv 2608.07911, with the half-life of 16 tokens used there;
    `lfu-decay:64` sets another.
    """

    name = "lfu-decay"
    parameter = "half-life in tokens"

    def __init__(self, scope: Scope, n_slots: int, half_life: float = 16.0) -> None:
        super().__init__(scope, n_slots)
        self.log_keep = -np.log(2.0) / (half_life * scope.n_layers)  # a token is n_layers events
        self.uses = np.zeros(self.n_keys)
        self.last_use = np.full(self.n_keys, -1)

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        try:
            half_life = float(argument)
        except ValueError:
            half_life = 0.0
        if not 0 < half_life < float("inf"):
            raise FlashMoEError(
                f"policy lfu-decay: {argument!r} is no half-life; write lfu-decay:64"
            )
        return {"half_life": half_life}

    def touch(self, event: Event, now: int) -> None:
        self.uses[:] *= np.exp(self.log_keep * len(event.rows))
        for key, count, offset in zip(event.keys, event.counts, event.last):
            self.uses[key] += count
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        return least(candidates, self.uses, self.last_use)
