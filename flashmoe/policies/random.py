"""Random replacement."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.random_numbers import uniform


class Random(Policy):
    """Evicts any expert with equal chance; the same ones in every replay."""

    name = "random"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.state = np.array([20261124 + scope.first_layer])

    def touch(self, event: Event, now: int) -> None:
        pass

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[int(uniform(self.state) * len(candidates))]
