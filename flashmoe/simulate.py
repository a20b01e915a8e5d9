"""Replays a trace against a policy and a capacity, through the engine's own cache code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flashmoe import policies
from flashmoe.cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.trace import Trace


@dataclass(frozen=True)
class Conditions:
    """What arXiv 2608.07911 asks every replayed figure to state."""

    warm: bool = False  # residency and statistics carry over from sequence to sequence
    shared: bool = False  # one budget for all layers instead of one cache each
    as_recorded: bool = False  # events are the recorded forward passes, not single tokens


@dataclass(frozen=True)
class Replay:
    """Outcome for one policy and capacity."""

    policy: str
    capacity: float  # fraction of a layer's experts
    slots: int  # per layer
    requests: int
    hits: int
    policy_seconds: float
    per_sequence: tuple[tuple[int, int], ...]  # (requests, hits), for bootstrap intervals

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests

    def row(self) -> dict[str, Any]:
        row = asdict(self) | {"hit_rate": self.hit_rate, "misses": self.requests - self.hits}
        del row["per_sequence"]
        return row


def slots_for(trace: Trace, capacity: float) -> int:
    """round(capacity * experts), but at least top_k and at most all."""
    if not 0 < capacity <= 1:
        raise FlashMoEError(f"capacity {capacity} must be a fraction above 0 and at most 1")
    return min(max(round(capacity * trace.n_experts), trace.top_k), trace.n_experts)


def _events(trace: Trace, tokens: slice, layers: range, conditions: Conditions) -> Iterator[Event]:
    """Events of a range of tokens at some layers, in the order in which the model meets them."""
    keyed = conditions.shared
    if not conditions.as_recorded and not keyed:
        (layer,) = layers
        chosen = trace.experts[tokens, layer].tolist()
        ones, zeros = (1,) * trace.top_k, (0,) * trace.top_k
        yield from (Event(tuple(row), ones, zeros, 1) for row in chosen)
        return
    steps = (
        trace.steps(tokens)
        if conditions.as_recorded
        else (slice(t, t + 1) for t in range(tokens.start, tokens.stop))
    )
    for step in steps:
        for layer in layers:
            rows = trace.experts[step, layer].tolist()
            yield Event.of_rows(rows, layer * trace.n_experts if keyed else 0)


def replay(
    trace: Trace,
    policy_name: str,
    capacity: float,
    conditions: Conditions | None = None,
    *,
    slots: int | None = None,
    progress: Callable[[int], object] = lambda events: None,
) -> Replay:
    """Replay every sequence of `trace` at every layer.

    `slots` overrides the slots per layer that `capacity` gives. `progress` is told the number
    of token-layers done since its last call. A request is one distinct expert of an event.
    """
    conditions = conditions or Conditions()
    policy_class = policies.get(policy_name)
    slots = slots or slots_for(trace, capacity)
    width = trace.n_layers if conditions.shared else 1
    groups = [range(first, first + width) for first in range(0, trace.n_layers, width)]
    sequences = [tokens for _, tokens in trace.sequences()]
    counted = [[0, 0] for _ in sequences]
    policy_seconds = 0.0

    def new_cache() -> ExpertCache:
        return ExpertCache(policy_class(trace.n_experts * width, slots * width))

    for layers in groups:
        cache = new_cache()
        if policy_class.offline and conditions.warm:
            whole = [e for tokens in sequences for e in _events(trace, tokens, layers, conditions)]
            cache.policy.foresee(whole)
        for number, tokens in enumerate(sequences):
            if not conditions.warm:
                cache = new_cache()
                if policy_class.offline:
                    cache.policy.foresee(list(_events(trace, tokens, layers, conditions)))
            requests, hits, seconds = cache.requests, cache.hits, cache.policy_seconds
            for event in _events(trace, tokens, layers, conditions):
                for _ in cache.waves(event):
                    pass
            counted[number][0] += cache.requests - requests
            counted[number][1] += cache.hits - hits
            policy_seconds += cache.policy_seconds - seconds
            progress((tokens.stop - tokens.start) * width)
    return Replay(
        policy_name,
        capacity,
        slots,
        sum(requests for requests, _ in counted),
        sum(hits for _, hits in counted),
        policy_seconds,
        tuple((requests, hits) for requests, hits in counted),
    )
