"""A fixed ranking of experts by popularity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashmoe import trace
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event, Events
from flashmoe.policies.base import Policy, Scope


class Static(Policy):
    """Evicts the expert that a profile uses least, so that popular experts stay.

    `static:TRACE.npz` takes the profile from a recorded trace of the model. Without a trace the
    replayed events are the profile, so that it bounds every fixed choice.
    """

    name = "static"
    parameter = "a trace to take the profile from"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, profile: np.ndarray | None = None) -> None:
        super().__init__(scope, n_slots)
        self.popularity = np.zeros(self.n_keys, np.int64)
        if profile is not None:
            layers = profile[scope.first_layer : scope.first_layer + scope.n_layers]
            if layers.shape != (scope.n_layers, scope.n_experts):
                raise FlashMoEError(
                    f"policy static: the profile has {len(profile)} layers of {profile.shape[1]} "
                    f"experts, the model {scope.depth} of {scope.n_experts}; record one of it"
                )
            self.popularity[:] = layers.ravel()

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        return {"profile": trace.load(Path(argument)).uses()}

    def foresee(self, events: Events) -> None:
        if not self.popularity.any():
            self.popularity[:] = np.bincount(
                events.keys, weights=events.counts, minlength=self.n_keys
            )

    def touch(self, event: Event, now: int) -> None:
        pass

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[np.argmin(self.popularity[candidates])]
