"""Gathers what the paper's networks learn from: Belady's evictions, or every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.simulate import Conditions
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope
from flashmoe.policies.flashmoe_paper import (
    FlashMoEPaper,
    Networks,
    inputs_of,
    leave,
    observe,
    see_layer,
    shapes,
)
from flashmoe.policies.parts.next_uses import Future, advance
from flashmoe.trace import Trace

GRID = 512  # a scorer's inputs, from 0 to 1, are rounded to one in so many, that more are equal
HORIZON_SHARE = 0.75  # of the experts: farther next uses count as so many tokens away (CECAR)


@dataclass
class Rows:
    """What the networks of all layers learn from; a row is what a network sees at once.

    Where rows were joined, `target` is their mean, and `spread` their mean squared distance to it,
    which no network can learn.
    """

    x: torch.Tensor  # [layers, n, inputs] float32
    target: torch.Tensor  # [layers, n, outputs] float32
    weight: torch.Tensor  # [layers, n, outputs] float32; 0: does not count
    spread: float = 0.0
    n_watched: int = 0  # evictions or steps a layer, in the mean, that they were made of


class Pupil(FlashMoEPaper):
    """Evicts as Belady does, and writes down what the networks would see."""

    name = "pupil"
    offline = True

    def __init__(self, scope: Scope, n_slots: int, rows: int) -> None:
        super().__init__(scope, n_slots, Networks("scorer", {n_slots: empty(1, 2, 1)}))
        self.future = Future.unknown(self.n_keys)
        self.written = np.zeros(1, np.int64)
        self.inputs = np.zeros((rows, n_slots, 2), np.float32)  # by slot; 0 where no candidate is
        self.candidate = np.zeros((rows, n_slots), np.bool_)  # by slot
        self.evicted = np.zeros(rows, np.int64)  # the victim's slot

    def foresee(self, events: Events) -> None:
        self.future = Future.of(events, self.n_keys)

    def touch(self, event: Event, now: int) -> None:
        observe(self, event)
        advance(self.future, event.keys)

    def victim(self, candidates: np.ndarray) -> int:
        victim = candidates[np.argmax(self.future.due[candidates])]
        row = self.written[0]
        for key in candidates:
            slot = self.slot[key]
            self.candidate[row, slot] = True
            self.inputs[row, slot, 0], self.inputs[row, slot, 1] = inputs_of(self, key)
        self.evicted[row] = self.slot[victim]
        self.written[0] += 1
        leave(self, victim)
        return victim


class Onlooker(FlashMoEPaper):
    """Has a slot for every expert, and writes down what the network would see after each event."""

    name = "onlooker"
    offline = True

    def __init__(self, scope: Scope, rows: int, horizon: int) -> None:
        nothing = Networks("scorer", {scope.n_experts: empty(1, 2, 1)})
        super().__init__(scope, scope.n_experts, nothing)
        self.future = Future.unknown(self.n_keys)
        self.horizon = horizon
        self.written = np.zeros(1, np.int64)
        self.inputs = np.zeros((rows, 2 * scope.n_experts), np.float32)
        self.distance = np.zeros((rows, scope.n_experts), np.float32)  # from 0 to 1, the horizon

    def foresee(self, events: Events) -> None:
        self.future = Future.of(events, self.n_keys)
        keys, first = np.unique(events.keys, return_index=True)
        self.future.due[keys] = np.searchsorted(events.starts, first, side="right") - 1
        never = np.iinfo(np.int64).max
        self.future.next_use[self.future.next_use == len(events)] = never

    def touch(self, event: Event, now: int) -> None:
        observe(self, event)
        advance(self.future, event.keys)
        row = self.written[0]
        see_layer(self, 0, self.inputs[row])
        for expert in range(self.n_experts):
            distance = min(self.future.due[expert] - row, self.horizon)
            self.distance[row, expert] = (distance - 1) / (self.horizon - 1)
        self.written[0] += 1

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[0]


def of_scorer(
    trace: Trace, sequences: Sequence[np.ndarray], slots: int, most: int, conditions: Conditions
) -> Rows:
    """A row a different input of a candidate: equal ones are joined, which changes no gradient."""
    layers = []
    spread, n_watched = 0.0, 0
    for inputs, candidate, evicted in _evictions(trace, sequences, slots, most, conditions):
        target = np.zeros(candidate.shape, np.float32)
        target[np.arange(len(evicted)), evicted] = 1
        recency, frequency = np.rint(inputs[candidate] * GRID).astype(np.int64).T
        pairs, of_pair = np.unique(recency * (GRID + 1) + frequency, return_inverse=True)
        count = np.bincount(of_pair)
        mean = np.bincount(of_pair, target[candidate]) / count
        x = np.stack(np.divmod(pairs, GRID + 1), axis=1) / GRID
        layers.append((x, mean[:, None], count[:, None]))
        spread += float((count * mean * (1 - mean)).sum())  # of targets that are 0 or 1
        n_watched += len(evicted)
    rows = _stacked(layers)
    rows.spread = spread / max(1.0, float(rows.weight.sum()))
    rows.n_watched = n_watched // trace.n_layers
    return rows


def of_vector(
    trace: Trace, sequences: Sequence[np.ndarray], slots: int, most: int, conditions: Conditions
) -> Rows:
    """A row an eviction, with all slots."""
    layers = []
    for inputs, candidate, evicted in _evictions(trace, sequences, slots, most, conditions):
        target = np.eye(slots)[evicted]
        layers.append((inputs.reshape(len(inputs), 2 * slots), target, candidate))
    rows = _stacked(layers)
    rows.n_watched = sum(len(target) for _, target, _ in layers) // trace.n_layers
    return rows


def of_experts(
    trace: Trace, sequences: Sequence[np.ndarray], slots: int, most: int, conditions: Conditions
) -> Rows:
    """A row a step, with all experts; `slots` do not matter to it."""
    steps = trace.top_k if conditions.sequential else 1  # a token
    horizon = round(HORIZON_SHARE * trace.n_experts) * steps

    def watch(scope: Scope, events: Events) -> tuple[np.ndarray, ...]:
        onlooker = Onlooker(scope, len(events), horizon)
        onlooker.foresee(events)
        ExpertCache(onlooker).replay(events)
        return onlooker.inputs, onlooker.distance

    layers = list(_watched(trace, sequences, most, conditions, watch))
    x, target = (torch.from_numpy(np.stack([layer[i] for layer in layers])) for i in range(2))
    return Rows(x, target, torch.ones(()).expand(target.shape), n_watched=x.shape[1])


def _stacked(layers: Sequence[tuple[np.ndarray, ...]]) -> Rows:
    """(x, target, weight) of each layer, those of fewer rows filled up with rows of no weight."""
    longest = max(len(x) for x, *_ in layers)
    stacked = []
    for parts in zip(*layers, strict=True):
        tensor = torch.zeros(len(layers), longest, parts[0].shape[1])
        for layer, part in enumerate(parts):
            tensor[layer, : len(part)] = torch.from_numpy(part)
        stacked.append(tensor)
    x, target, weight = stacked
    return Rows(x, target, weight)


def _evictions(
    trace: Trace, sequences: Sequence[np.ndarray], slots: int, most: int, conditions: Conditions
) -> list[tuple[np.ndarray, ...]]:
    """Of each layer (inputs, candidate, evicted) of Belady's evictions; see `Pupil`."""

    def watch(scope: Scope, events: Events) -> tuple[np.ndarray, ...]:
        pupil = Pupil(scope, slots, len(events.keys))
        pupil.foresee(events)
        ExpertCache(pupil).replay(events)
        n = pupil.written[0]
        return pupil.inputs[:n], pupil.candidate[:n], pupil.evicted[:n]

    return _watched(trace, sequences, most, conditions, watch)


def _watched(
    trace: Trace,
    sequences: Sequence[np.ndarray],
    most: int,
    conditions: Conditions,
    watch: Callable[[Scope, Events], tuple[np.ndarray, ...]],
) -> list[tuple[np.ndarray, ...]]:
    """What `watch` gives of each layer: at most `most` rows, an equal share of every sequence."""
    share = -(-most // len(sequences))
    layers = []
    for layer in range(trace.n_layers):
        rng = np.random.default_rng(layer)
        scope = simulate.scope_of(trace, range(layer, layer + 1), conditions)
        parts = []
        for tokens in sequences:
            events = simulate.events_of(trace, tokens, range(layer, layer + 1), conditions)
            arrays = watch(scope, events)
            n = len(arrays[0])
            picks = np.sort(rng.permutation(n)[:share])
            parts.append([array[picks] for array in arrays])
        layers.append(tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return layers


def empty(layers: int, inputs: int, hidden: int) -> dict[str, np.ndarray]:
    """Networks of zeros."""
    return {
        name: np.zeros(shape, np.float32) for name, shape in shapes(layers, inputs, hidden).items()
    }
