"""Forward passes and layers, for policies of a cache that several layers share."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.util.machine_code import helper

PASS, LAYER = 0, 1  # positions in `ForwardPasses.current`


class ForwardPasses(Policy):
    """Counts forward passes: one begins when an event's layer is no higher than the last one's."""

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.n_experts = scope.n_experts
        self.n_layers = scope.n_layers
        self.last_pass = np.full(self.n_keys, -1)  # in which the key was used
        self.current = np.zeros(2, np.int64)  # forward passes so far and the layer running now

    def touch(self, event: Event, now: int) -> None:
        layer = event.keys[0] // self.n_experts
        if layer <= self.current[LAYER]:
            self.current[PASS] += 1
        self.current[LAYER] = layer
        self.last_pass[event.keys] = self.current[PASS]


@helper
def layers_until(policy, key):
    """How many layers run before the layer of `key` runs again; 0: it runs next."""
    return (key // policy.n_experts - policy.current[LAYER] - 1) % policy.n_layers
