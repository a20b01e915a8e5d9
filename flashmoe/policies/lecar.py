"""LeCaR: learning which of LRU and LFU to trust."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.parts.random_numbers import uniform

LEARNING_RATE = 0.45
DISCOUNT = 0.005  # what is left of a regret after n_slots tokens
LRU, LFU = 0, 1  # who evicts: positions in `weight` and `victims`
NOBODY = -1


class LeCaR(Policy):
    """Evicts as LRU or as LFU does, at random, by weights that regret of past victims moves.

    Vietri et al., 'Driving cache replacement with ML-based LeCaR' (HotStorage 2018), with its
    constants. LRU and LFU each remember as many of their victims as there are slots; a victim
    that returns while it is remembered lowers the weight of the one that evicted it.
    """

    name = "lecar"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.uses = np.zeros(self.n_keys, np.int64)
        self.last_use = np.full(self.n_keys, -1)
        self.zeros = np.zeros(self.n_keys, np.int64)
        self.weight = np.full(2, 0.5)  # by who evicts
        self.evictor = np.full(self.n_keys, NOBODY)  # LRU or LFU of a victim that is remembered
        self.victim_number = np.zeros(self.n_keys, np.int64)  # among its evictor's
        self.evicted_at = np.zeros(self.n_keys, np.int64)
        self.victims = np.zeros(2, np.int64)  # so far, by who evicts
        self.random = np.array([20261124])
        self.clock = np.zeros(1, np.int64)  # tokens so far

    def touch(self, event: Event, now: int) -> None:
        self.clock[0] = now + len(event.rows)
        for key, count, offset in zip(event.keys, event.counts, event.last):
            evictor = self.evictor[key]
            if evictor != NOBODY:
                if self.victims[evictor] - self.victim_number[key] < self.n_slots:
                    elapsed = self.clock[0] - self.evicted_at[key]
                    regret = DISCOUNT ** (elapsed / self.n_slots)
                    other = LFU if evictor == LRU else LRU
                    self.weight[other] *= np.exp(LEARNING_RATE * regret)
                    both = self.weight[LRU] + self.weight[LFU]
                    self.weight[LRU] /= both
                    self.weight[LFU] /= both
                self.evictor[key] = NOBODY
            self.uses[key] += count
            self.last_use[key] = now + offset

    def victim(self, candidates: np.ndarray) -> int:
        oldest = least(candidates, self.last_use, self.zeros)
        rarest = least(candidates, self.uses, self.last_use)
        evictor = LRU if uniform(self.random) < self.weight[LRU] else LFU
        victim = oldest if evictor == LRU else rarest
        if oldest != rarest:  # as in the paper, no one regrets a victim that both agree on
            self.victims[evictor] += 1
            self.evictor[victim] = evictor
            self.victim_number[victim] = self.victims[evictor]
            self.evicted_at[victim] = self.clock[0]
        return victim
