"""Compiles a policy before anybody waits for it."""

from __future__ import annotations

import numpy as np

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.policies.base import Scope
from flashmoe.residency.routing import Routing

_EXPERTS, _TOP_K, _LAYERS, _SLOTS = 8, 2, 2, 4


def compile_policy(policy: str) -> None:
    """Serve two events of a small model, so that machine code is there for large ones.

    Raises FlashMoEError where there is no such policy.
    """
    scope = Scope(_EXPERTS, _TOP_K, 1, 0, _LAYERS)
    cache = ExpertCache(policies.get(policy, online=True)(scope, _SLOTS))
    routing = Routing(_TOP_K, _LAYERS)
    for experts in ([[0, 1]], [[2, 3]], [[4, 5]]):
        cache.serve(routing.event(0, np.array(experts), None, 0, _EXPERTS))
