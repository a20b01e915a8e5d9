"""Compiles what serves whole events before anybody waits for it."""

from __future__ import annotations

import numpy as np

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.serving import decide
from flashmoe.policies.base import Policy, Scope
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading.range_queue import RangeQueue
from flashmoe.reading.range_work import COLUMNS
from flashmoe.residency import at_once_work, place_work
from flashmoe.residency.at_once_work import Whole
from flashmoe.residency.guess_record import GuessRecord
from flashmoe.residency.place_work import Places
from flashmoe.residency.routing import Routing
from flashmoe.util.by_address import words_of

_EXPERTS, _TOP_K, _LAYERS, _SLOTS = 8, 2, 2, 4


def compile_policy(policy: str) -> None:
    """Serve a few events of a small model, so that machine code is there for large ones.

    Raises FlashMoEError where there is no such policy.
    """
    cache, routing = _cache(policy, _SLOTS), Routing(_TOP_K, _LAYERS)
    for experts in ([[0, 1]], [[2, 3]], [[4, 5]]):
        decision = cache.decision(routing.event(0, np.array(experts), None, 0, _EXPERTS))
        decide(decision, type(cache.policy))(words_of(decision).ctypes.data)


def compile_resize(policy: str) -> None:
    """Shrink a small cache. Raises FlashMoEError where there is no such policy."""
    cache, routing = _cache(policy, _SLOTS), Routing(_TOP_K, _LAYERS)
    list(cache.waves(routing.event(0, np.arange(_SLOTS).reshape(-1, _TOP_K), None, 0, _EXPERTS)))
    cache.resized(_cache(policy, _TOP_K).policy)


def _cache(policy: str, n_slots: int) -> ExpertCache:
    scope = Scope(_EXPERTS, _TOP_K, 1, 0, _LAYERS)
    return ExpertCache(policies.get(policy, online=True)(scope, n_slots))


def compile_reading() -> None:
    """Read nothing."""
    queue = RangeQueue(1, 1, 1)
    queue.demand(np.empty((0, COLUMNS), np.int64))
    queue.cancel(0)
    queue.wait(0)
    queue.close()


def compile_events() -> Whole:
    """What fills places; the result is the state of one that has no experts to fill."""
    places = Places.empty([1], [0, 1], np.zeros((1, 1, 2)))
    ranges, n_ranges = np.zeros((1, 1, COLUMNS), np.int64), np.zeros(1, np.int64)
    whole = Whole.empty(places, RangeQueue(1, 1, 1).shared, ranges, n_ranges, GuessRecord().array)
    at_once_work.compiled(whole)
    for function in (place_work.take, place_work.empty):
        kernel(function, Policy)(places, 0, 0)
    kernel(place_work.keep_limit, Policy)(places, 0)
    return whole
