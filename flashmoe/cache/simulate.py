"""Replays a trace against a policy and a capacity, through the engine's own cache code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import LAYERS_BELOW, Event, Events, below
from flashmoe.policies.base import Scope
from flashmoe.trace import Trace


@dataclass(frozen=True)
class Conditions:
    """What arXiv 2608.07911 asks every replayed figure to state."""

    warm: bool = False  # residency and statistics carry over from sequence to sequence
    shared: bool = False  # one budget for all layers instead of one cache each
    as_recorded: bool = False  # events are the recorded forward passes, not single tokens
    interleaved: int = 1  # sequences served in turn, token by token, by one cache
    bypass: bool = True  # a policy that bypasses has top_k slots for it, beside the others
    sequential: bool = False  # a token's experts are events of their own, and may evict each other
    decode_only: bool = False  # of a prompt, only the last token's experts stay, and none counts
    prompt_tokens: int | None = None  # of every sequence; None: the prompts that the trace records

    def __post_init__(self) -> None:
        """Raises FlashMoEError for conditions that exclude each other."""
        if self.sequential and self.as_recorded:
            raise FlashMoEError("a sequential replay has no recorded passes: choose one of both")
        if self.decode_only and (self.as_recorded or self.interleaved > 1):
            raise FlashMoEError(
                "decode only takes single tokens of one sequence after another: leave out as "
                "recorded and interleaved"
            )
        if self.prompt_tokens is not None and not self.decode_only:
            raise FlashMoEError("a number of prompt tokens is for decode only")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise FlashMoEError(f"a prompt has at least 1 token, not {self.prompt_tokens}")


@dataclass(frozen=True)
class Replay:
    """Outcome for one policy and capacity."""

    policy: str
    capacity: float  # fraction of a layer's experts
    slots: float  # per layer, those for bypass left out
    conditions: Conditions
    policy_seconds: float  # cache and policy together
    counted: np.ndarray  # [caches, streams, 2] int64: requests and hits

    @property
    def per_stream(self) -> np.ndarray:
        """[streams, 2]: requests and hits, for bootstrap intervals."""
        return self.counted.sum(axis=0)

    @property
    def requests(self) -> int:
        return int(self.counted[..., 0].sum())

    @property
    def hits(self) -> int:
        return int(self.counted[..., 1].sum())

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests

    def row(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "capacity": self.capacity,
            "slots": self.slots,
            "requests": self.requests,
            "hits": self.hits,
            "misses": self.requests - self.hits,
            "hit_rate": self.hit_rate,
            "policy_seconds": self.policy_seconds,
        }


def slots_for(trace: Trace, capacity: float) -> int:
    """round(capacity * experts), but at least top_k and at most all."""
    if not 0 < capacity <= 1:
        raise FlashMoEError(f"capacity {capacity} must be a fraction above 0 and at most 1")
    return min(max(round(capacity * trace.n_experts), trace.top_k), trace.n_experts)


def events_of(
    trace: Trace, tokens: np.ndarray, layers: range, conditions: Conditions | None = None
) -> Events:
    """Events of some tokens at some layers, in the order in which the model meets them.

    What a layer did not compute is no event, and no row of one. A sequential replay has an event
    of one row and one key for each request, and tells no router's weights.
    """
    if conditions is not None and conditions.as_recorded:
        return _recorded_events(trace, tokens, layers)
    offsets = np.arange(len(layers), dtype=np.int64) * trace.n_experts
    span = slice(layers.start, layers.stop)
    keys = trace.experts[tokens, span] + offsets[:, None]
    lowest = max(0, layers.start - LAYERS_BELOW)
    choices = trace.experts[tokens, lowest : layers.stop]
    lower = np.stack([below(choices, layer - lowest, trace.n_experts) for layer in layers], axis=1)
    parts = [keys, lower] if trace.weights is None else [keys, lower, trace.weights[tokens, span]]
    if trace.computed is None:
        parts = [part.reshape(-1, part.shape[-1]) for part in parts]
    else:
        parts = [part[trace.computed[tokens, span]] for part in parts]
    if conditions is not None and conditions.sequential:
        requests = parts[0].reshape(-1, 1)
        return Events.of_tokens(requests, None, np.repeat(parts[1], trace.top_k, axis=0))
    return Events.of_tokens(parts[0], parts[2] if len(parts) > 2 else None, parts[1])


def _recorded_events(trace: Trace, tokens: np.ndarray, layers: range) -> Events:
    """An event of each forward pass at each layer."""
    events = []
    for step in trace.steps(slice(tokens[0], tokens[-1] + 1)):
        computed = None if trace.computed is None else trace.computed[step]
        for layer in layers:
            rows: Any = slice(None)
            lowest = 0
            if computed is not None:
                rows, lowest = computed[:, layer], layer
                if not rows.any():
                    continue
                while lowest and (computed[:, lowest - 1] == rows).all():
                    lowest -= 1  # below are other tokens, whose choices the engine does not take
            experts = trace.experts[step][rows]
            shares = None if trace.weights is None else trace.weights[step, layer][rows]
            lower = below(experts[:, lowest:], layer - lowest, trace.n_experts)
            first_key = (layer - layers.start) * trace.n_experts
            events.append(Event.of_rows(experts[:, layer], first_key, shares, lower))
    return Events.of(events) if events else Events.none(trace.top_k)


def scope_of(trace: Trace, layers: range, conditions: Conditions | None = None) -> Scope:
    """What one cache for `layers` serves."""
    conditions = conditions or Conditions()
    top_k = 1 if conditions.sequential else trace.top_k
    bypass_slots = trace.top_k if conditions.bypass else 0
    return Scope(trace.n_experts, top_k, len(layers), layers.start, trace.n_layers, bypass_slots)


def prompt_length(trace: Trace, tokens: np.ndarray, conditions: Conditions) -> int:
    """How many of a sequence's `tokens` its prompt has: those before the first single-token pass.

    Raises FlashMoEError when neither the trace nor the conditions tell.
    """
    if conditions.prompt_tokens is not None:
        return min(conditions.prompt_tokens, len(tokens))
    if trace.step is None:
        raise FlashMoEError(
            "the trace does not say how long its prompts are: give a number of prompt tokens"
        )
    _, sizes = np.unique(trace.step[tokens], return_counts=True)
    singles = np.flatnonzero(sizes == 1)
    return int(sizes[: singles[0]].sum()) if len(singles) else len(tokens)


def streams(trace: Trace, interleaved: int = 1) -> list[np.ndarray]:
    """The tokens of each stream, in order: a sequence, or several taken token by token in turn."""
    runs = [np.arange(tokens.start, tokens.stop) for _, tokens in trace.sequences()]
    if interleaved == 1:
        return runs
    groups = []
    for first in range(0, len(runs), interleaved):
        group = runs[first : first + interleaved]
        turn = np.concatenate([np.arange(len(run)) for run in group])
        groups.append(np.concatenate(group)[np.argsort(turn, kind="stable")])
    return groups


def replay(
    trace: Trace,
    policy: str,
    capacity: float,
    conditions: Conditions | None = None,
    slots: float | None = None,
) -> Replay:
    """Replay every stream of `trace` at every layer.

    policy: a name, or `name:argument`. `slots` overrides the slots per layer that `capacity`
    gives; of a fraction the lowest layers have one slot more than the others, as in the engine. A
    request is one distinct expert of an event.
    """
    conditions = conditions or Conditions()
    choice = policies.get(policy)
    slots = slots or slots_for(trace, capacity)
    least, more = divmod(round(slots * trace.n_layers), trace.n_layers)
    width = trace.n_layers if conditions.shared else 1
    turns = streams(trace, conditions.interleaved)
    counted = np.zeros((trace.n_layers // width, len(turns), 2), np.int64)
    policy_seconds = 0.0
    for group, first in enumerate(range(0, trace.n_layers, width)):
        layers = range(first, first + width)
        scope = scope_of(trace, layers, conditions)
        n_slots = width * least + max(0, min(width, more - first))

        def new_cache(
            future: Events | None, scope: Scope = scope, n_slots: int = n_slots
        ) -> ExpertCache:
            eviction = choice(scope, n_slots)
            if eviction.offline and future is not None:
                eviction.foresee(future)
            return ExpertCache(eviction)

        if conditions.warm:
            offline = choice.policy_class.offline
            whole = np.concatenate(turns)
            cache = new_cache(events_of(trace, whole, layers, conditions) if offline else None)
        for number, tokens in enumerate(turns):
            events = events_of(trace, tokens, layers, conditions)
            if not conditions.warm:
                cache = new_cache(events)
            if conditions.decode_only:
                prompt = prompt_length(trace, tokens, conditions)
                _serve_prompt(cache, trace, tokens[:prompt], layers, conditions)
                events = events_of(trace, tokens[prompt:], layers, conditions)
            requests, hits, seconds = cache.requests, cache.hits, cache.policy_seconds
            cache.replay(events)
            counted[group, number] = cache.requests - requests, cache.hits - hits
            policy_seconds += cache.policy_seconds - seconds
    if not counted.any():
        raise FlashMoEError("nothing is counted: no sequence is longer than its prompt")
    return Replay(policy, capacity, slots, conditions, policy_seconds, counted)


def _serve_prompt(
    cache: ExpertCache, trace: Trace, prompt: np.ndarray, layers: range, conditions: Conditions
) -> None:
    """Serve a prompt token by token, after which only the last one's experts are resident."""
    if len(prompt):
        cache.replay(events_of(trace, prompt[:-1], layers, conditions))
        last = events_of(trace, prompt[-1:], layers, conditions)
        cache.evict_all_but(last.keys)
        cache.replay(last)
