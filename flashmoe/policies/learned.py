"""Our policy: one small network, for all experts, layers and models, says who is needed last."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.features import N_FEATURES, RoutingHistory, describe, recall, remember
from flashmoe.util.machine_code import helper

SHIPPED = Path(__file__).with_suffix(".safetensors")
KIND = "learned"  # of files
HIDDEN = (64, 32)  # units of the hidden layers
# How many hits fewer than LRU are allowed before LRU chooses: as many as these events request,
# plus this share of all requests.
TRUST_EVENTS, TRUST_SHARE = 3, 0.003
TOKENS, REQUESTS, HITS, LRU_HITS = range(4)  # positions in `Shadow.counts`

Network = dict[str, np.ndarray]  # w1 [features, 64], b1, w2 [64, 32], b2, w3 [32]; float32


class Shadow(NamedTuple):
    """The hits that LRU would have had with as many slots, beside those of this cache."""

    resident: np.ndarray  # [n_keys] bool, in this cache
    last_use: np.ndarray  # [n_keys] int64, in tokens, -1 for never
    counts: np.ndarray  # [4] float64, by TOKENS, REQUESTS, HITS, LRU_HITS

    @classmethod
    def empty(cls, n_keys: int) -> Shadow:
        return cls(np.zeros(n_keys, np.bool_), np.full(n_keys, -1), np.zeros(4))


class Perceptron(NamedTuple):
    """The network's weights, and scratch for its input and hidden layers; float32.

    It is apart from the other arrays because a helper that takes fewer compiles faster.
    """

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    w3: np.ndarray
    features: np.ndarray  # [features]
    h1: np.ndarray
    h2: np.ndarray

    @classmethod
    def of(cls, network: Network) -> Perceptron:
        features = np.zeros(N_FEATURES, np.float32)
        h1, h2 = np.zeros_like(network["b1"]), np.zeros_like(network["b2"])
        return cls(**network, features=features, h1=h1, h2=h2)


class Learned(Policy):
    """Evicts the expert whose next use a small network expects last; no training needed.

    The network sees recency, frequencies and what followed earlier events like the current one
    (see parts/features.py). It was trained on the waits for next uses, at LRU's evictions.
    `learned:FILE` takes a network from `flashmoe train-policy`. The policy counts the hits that
    LRU would have had, and evicts as LRU does while it is behind.
    """

    name = "learned"
    pools = True
    bypasses = True
    parameter = "a file from `flashmoe train-policy`"

    def __init__(self, scope: Scope, n_slots: int, network: Network | None = None) -> None:
        super().__init__(scope, n_slots)
        self.history = RoutingHistory.empty(scope)
        self.shadow = Shadow.empty(self.n_keys)
        self.network = Perceptron.of(network or load(SHIPPED))
        self.layer_of = np.repeat(np.arange(scope.n_layers), scope.n_experts)
        self.top_k = scope.top_k
        self.turnover = n_slots / (scope.top_k * scope.n_layers)  # tokens
        self.depths = np.arange(scope.first_layer, scope.first_layer + scope.n_layers) / max(
            1, scope.depth - 1
        )
        self.due = np.zeros(self.n_keys)  # when each expert is expected, in its layer's tokens
        self.due_at = np.full(self.n_keys, -1)  # its layer's token at that estimate
        self.stale = np.zeros(scope.n_layers, np.bool_)  # scratch: layers with old estimates
        self.zeros = np.zeros(self.n_keys, np.int64)

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        return {"network": load(Path(argument))}

    def touch(self, event: Event, now: int) -> None:
        compare_with_lru(self.shadow, event, self.n_slots)
        remember(self.history, event)

    def victim(self, candidates: np.ndarray) -> int:
        if behind_lru(self.shadow, self.top_k):
            victim = least(candidates, self.shadow.last_use, self.zeros)
        else:
            victim = needed_last(self, candidates)
        self.shadow.resident[victim] = False
        return victim


@helper
def compare_with_lru(shadow, event, n_slots):
    """Count the event's hits in this cache, and in an LRU cache, which holds the n_slots last used.

    Where experts last used by the same token do not all fit, each counts as its chance of being
    resident, because whole hits would overrate LRU.
    """
    for key in event.keys:
        if shadow.resident[key]:
            shadow.counts[HITS] += 1
        if shadow.last_use[key] >= 0:
            newer, equal = 0, 0
            for other in range(len(shadow.last_use)):
                if shadow.last_use[other] > shadow.last_use[key]:
                    newer += 1
                elif shadow.last_use[other] == shadow.last_use[key]:
                    equal += 1
            shadow.counts[LRU_HITS] += min(1.0, max(0.0, (n_slots - newer) / equal))
    for key, offset in zip(event.keys, event.last):
        shadow.resident[key] = True
        shadow.last_use[key] = int(shadow.counts[TOKENS]) + offset
    shadow.counts[TOKENS] += len(event.rows)
    shadow.counts[REQUESTS] += len(event.keys)


@helper
def behind_lru(shadow, top_k):
    allowed = TRUST_EVENTS * top_k + TRUST_SHARE * shadow.counts[REQUESTS]
    return shadow.counts[LRU_HITS] - shadow.counts[HITS] > allowed


@helper
def needed_last(self, candidates):
    """The candidate due last. An estimate holds until the expert's layer runs again."""
    for layer in range(len(self.stale)):
        self.stale[layer] = False
    for key in candidates:
        layer = self.layer_of[key]
        self.stale[layer] |= self.due_at[key] != self.history.tokens[layer]
    for layer in range(len(self.stale)):
        if not self.stale[layer]:
            continue
        similar, pairs = recall(self.history, layer)
        now, depth = self.history.tokens[layer], self.depths[layer]
        for key in candidates:
            if self.layer_of[key] == layer and self.due_at[key] != now:
                features = self.network.features
                describe(self.history, layer, key, similar, pairs, self.n_slots, depth, features)
                wait = expected_wait(self.network) * self.turnover
                self.due[key] = now + layer / len(self.depths) + wait
                self.due_at[key] = now
    victim, latest = candidates[0], -np.inf
    for key in candidates:
        if self.due[key] > latest:
            victim, latest = key, self.due[key]
    return victim


@helper
def expected_wait(network):
    """The network on its features: the wait for the next use, in turnovers, but for a constant.

    The innermost loops run over a hidden layer's units, so that vectorising them reorders no sum:
    the engine and the simulator get the same bits.
    """
    h1, h2 = network.h1, network.h2
    for j in range(len(h1)):
        h1[j] = network.b1[j]
    for i in range(len(network.features)):
        x = network.features[i]
        for j in range(len(h1)):
            h1[j] += x * network.w1[i, j]
    for j in range(len(h2)):
        h2[j] = network.b2[j]
    for i in range(len(h1)):
        if h1[i] > 0:
            x = h1[i]
            for j in range(len(h2)):
                h2[j] += x * network.w2[i, j]
    total = np.float32(0)
    for i in range(len(h2)):
        if h2[i] > 0:
            total += h2[i] * network.w3[i]
    return total


@cache
def load(path: Path) -> Network:
    """The network of a policy file. Raises FlashMoEError when it is none."""
    first, second = HIDDEN
    shapes = {
        "w1": (N_FEATURES, first), "b1": (first,), "w2": (first, second), "b2": (second,),
        "w3": (second,),
    }  # fmt: skip
    return policy_file.read_tensors(path, KIND, shapes)
