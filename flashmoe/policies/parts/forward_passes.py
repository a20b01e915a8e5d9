"""Which forward pass an expert was last used in, and how far ahead its layer is.

What policies need that know the layers of a cache which several layers share.
"""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.compiled import helper


class ForwardPasses(Policy):
    """Counts forward passes: one begins when an event's layer is not above the one before."""

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


@helper
def layers_until(policy, key):  # type: ignore[no-untyped-def]
    """Layers that run before the key's own does again, 0 for the next one."""
    return (key // policy.n_experts - policy.current[1] - 1) % policy.n_layers
