"""Caches of other sizes, which replay what the engine's layers chose."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.serving import FREE
from flashmoe.cache.simulate import Conditions, events_of
from flashmoe.engines.base import Engine
from flashmoe.errors import FlashMoEError
from flashmoe.events import Events
from flashmoe.monitor.passes import Pass, n_tokens, traces

FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the budget
MOST_LAYERS = 3  # whose caches are replayed, where each has its own
# A turn of replaying takes so long at most, and so small a share of the time.
TURN_SECONDS, SHARE, EVERY_SECONDS = 0.05, 0.005, 2.0
_MOST_TOKENS = 1024  # that wait to be replayed
_KEPT_SECONDS = 300.0  # hits are counted over the last minutes
_RUN = 8  # tokens between two looks at the clock


@dataclass
class Shadow:
    """What one budget would give: caches like the engine's, and their hits of late."""

    memory_bytes: int
    caches: list[ExpertCache]
    turns: deque[tuple[float, int, int]] = field(default_factory=deque)  # when, requests, hits

    def count(self) -> tuple[int, int]:
        """Requests and hits since the caches began."""
        return sum(c.requests for c in self.caches), sum(c.hits for c in self.caches)

    def as_dict(self) -> dict[str, object]:
        """hit_rate: None before the first request. filling: slots are still empty."""
        requests, hits = (sum(turn[i] for turn in self.turns) for i in (1, 2))
        return {
            "memory_bytes": self.memory_bytes,
            "slots": sum(cache.n_slots for cache in self.caches),
            "hit_rate": hits / requests if requests else None,
            "filling": any(int(cache.residency.sizes[FREE]) for cache in self.caches),
        }


class Shadows:
    """Replays, from now on, for the budget that an engine has and for others.

    They begin with what is resident, as far as it fits. Of layers with a cache each only a few
    are replayed. Where a turn's time is not enough, what waits is left out.
    """

    def __init__(self, engine: Engine) -> None:
        manifest, pools = engine.manifest, engine.residency.pools
        self._n_layers = len(manifest.layers)
        self._n_experts = max(layer.n_experts for layer in manifest.layers)
        self.memory_bytes = pools.memory_bytes
        if pools.slots.shared:
            numbers, self._spans = [0], [range(self._n_layers)]
        else:
            numbers = _evenly(self._n_layers, MOST_LAYERS)
            self._spans = [range(number, number + 1) for number in numbers]
        with engine.lock:
            residents = [pools.all[number].cache.resident for number in numbers]
        self.all: list[Shadow] = []
        everything = sum(layer.n_experts * layer.extent_bytes for layer in manifest.layers)
        for memory_bytes in sorted({min(int(f * self.memory_bytes), everything) for f in FACTORS}):
            try:
                caches = pools.caches_at(memory_bytes, numbers)
            except FlashMoEError:  # too small
                continue
            if caches:
                for cache, keys in zip(caches, residents, strict=True):
                    cache.fill_with(keys[-cache.n_slots :])
                self.all.append(Shadow(memory_bytes, caches))
        self._waiting: list[Pass] = []
        self._n_waiting = 0
        self._next_turn = time.monotonic() + EVERY_SECONDS
        self.replayed_tokens = self.left_out_tokens = 0

    def add(self, passes: Sequence[Pass]) -> None:
        """Passes to be replayed at the next turn, as far as there is room for them."""
        for one in passes:
            tokens = n_tokens(one)
            if self._n_waiting + tokens > _MOST_TOKENS:
                self.left_out_tokens += tokens
            else:
                self._waiting.append(one)
                self._n_waiting += tokens

    def take_turn(self) -> None:
        """Replay what waits, if it is time."""
        if time.monotonic() >= self._next_turn and self._waiting:
            started = time.thread_time()
            self.replay(lambda: time.thread_time() - started < TURN_SECONDS)
            spent = time.thread_time() - started
            self._next_turn = time.monotonic() + max(EVERY_SECONDS, spent / SHARE)

    def replay(self, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Replay what waits for as long as `may_go_on`; the rest is left out."""
        before = [shadow.count() for shadow in self.all]
        waiting, self._waiting, self._n_waiting = self._waiting, [], 0
        for first in range(0, len(waiting), _RUN):
            run = waiting[first : first + _RUN]
            tokens = sum(map(n_tokens, run))
            if may_go_on():
                self._replay(run)
                self.replayed_tokens += tokens
            else:
                self.left_out_tokens += tokens
        now = time.monotonic()
        for shadow, (requests, hits) in zip(self.all, before, strict=True):
            requests_now, hits_now = shadow.count()
            shadow.turns.append((now, requests_now - requests, hits_now - hits))
            while shadow.turns[0][0] < now - _KEPT_SECONDS:
                shadow.turns.popleft()

    def _replay(self, run: Sequence[Pass]) -> None:
        for trace in traces(run, self._n_layers, self._n_experts):
            tokens = np.arange(len(trace.experts))
            conditions = Conditions(as_recorded=trace.step is not None)
            for number, span in enumerate(self._spans):
                events = events_of(trace, tokens, span, conditions)
                if len(events):
                    for shadow in self.all:
                        shadow.caches[number].replay(events)

    def as_dict(self) -> dict[str, object]:
        """For the page. share: of the tokens that are not waiting any more."""
        tokens = self.replayed_tokens + self.left_out_tokens
        return {
            "memory_bytes": self.memory_bytes,
            "layers": sum(map(len, self._spans)),
            "share": self.replayed_tokens / tokens if tokens else None,
            "budgets": [shadow.as_dict() for shadow in self.all],
        }


def rehearse(engine: Engine) -> None:
    """Compile what replays, which takes seconds the first time, before anybody waits for it."""
    pools = engine.residency.pools
    for cache in pools.caches_at(pools.memory_bytes, [0]) or ():
        cache.replay(Events.none(engine.manifest.top_k))


def _evenly(n: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `n`, spread over them."""
    if n <= most:
        return list(range(n))
    return [(2 * i + 1) * n // (2 * most) for i in range(most)]
