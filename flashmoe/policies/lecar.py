"""LeCaR: learning which of LRU and LFU to trust."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.parts.compiled import helper

LEARNING_RATE = 0.45
DISCOUNT = 0.005  # to the power of 1 / n_slots, a token


class LeCaR(Policy):
    """Evicts as LRU or as LFU does, at random, by weights that regret of past victims moves.

    Vietri et al., 'Driving cache replacement with ML-based LeCaR' (HotStorage 2018), with its
    constants. Each expert keeps the ghost history: an expert that returns while its evictor's
    history (as many victims as slots) still remembers it lowers that evictor's weight.
    """

    name = "lecar"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.last_use = np.full(self.n_keys, -1)
        self.zeros = np.zeros(self.n_keys, np.int64)
        self.weight = np.full(2, 0.5)  # of LRU, of LFU
        self.evictor = np.full(self.n_keys, -1)  # 0 or 1 while a history remembers the expert
        self.victim_number = np.zeros(self.n_keys, np.int64)  # of its evictor
        self.evicted_at = np.zeros(self.n_keys, np.int64)
        self.victims = np.zeros(2, np.int64)  # of each evictor so far
        self.random = np.array([20261124])
        self.clock = np.zeros(1, np.int64)

    def touch(self, event: Event, now: int) -> None:
        self.clock[0] = now + len(event.rows)
        for key, count, offset in zip(event.keys, event.counts, event.last):
            who = self.evictor[key]
            if who >= 0:
                if self.victims[who] - self.victim_number[key] < self.n_slots:
                    elapsed = self.clock[0] - self.evicted_at[key]
                    regret = DISCOUNT ** (elapsed / self.n_slots)
                    self.weight[1 - who] *= np.exp(LEARNING_RATE * regret)
                    both = self.weight[0] + self.weight[1]
                    self.weight[0] /= both
                    self.weight[1] /= both
                self.evictor[key] = -1
            self.uses[key] += count
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        oldest = least(candidates, self.last_use, self.zeros)
        rarest = least(candidates, self.uses, self.last_use)
        who = 0 if uniform(self.random) < self.weight[0] else 1
        chosen = oldest if who == 0 else rarest
        if oldest != rarest:  # the original keeps no history of what both would have chosen
            self.victims[who] += 1
            self.evictor[chosen] = who
            self.victim_number[chosen] = self.victims[who]
            self.evicted_at[chosen] = self.clock[0]
        return chosen


@helper
def uniform(state):  # type: ignore[no-untyped-def]
    """A number in [0, 1) from a linear congruential generator, so that replays repeat."""
    state[0] = (state[0] * 1103515245 + 12345) % 2147483648
    return state[0] / 2147483648
