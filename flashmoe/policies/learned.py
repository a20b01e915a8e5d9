"""Ours: one small network, for all experts, layers and models, says who is needed last."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.compiled import helper
from flashmoe.policies.parts.features import N_FEATURES, Memory, describe, recall, remember

SHIPPED = Path(__file__).with_suffix(".safetensors")
KIND = "learned"
HIDDEN = (64, 32)
# How many hits behind LRU it may fall before it does as LRU would: some, and a share of requests.
TRUST_EVENTS, TRUST_SHARE = 3, 0.003

Network = dict[str, np.ndarray]  # w1 [features, 64], b1, w2 [64, 32], b2, w3 [32]; float32


class Shadow(NamedTuple):
    """What an LRU cache of as many slots would have hit, beside the hits here."""

    resident: np.ndarray  # [n_keys] bool, here
    last_use: np.ndarray  # [n_keys] in tokens, -1 for never
    score: np.ndarray  # [4]: tokens, requests, own hits, LRU's hits

    @classmethod
    def empty(cls, n_keys: int) -> Shadow:
        return cls(np.zeros(n_keys, np.bool_), np.full(n_keys, -1), np.zeros(4))


class Perceptron(NamedTuple):
    """The network's weights, and scratch for its input and hidden layers; float32.

    What helpers get is small: compiling takes twice as long where each is given all arrays.
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

    The network sees recency, frequencies and what followed earlier events like the present
    one (see features.py) and was trained on Belady's distances, at LRU's evictions.
    `learned:FILE` takes a network from `flashmoe train-policy`. It keeps count of the hits
    that LRU would have had, and follows LRU while it is behind.
    """

    name = "learned"
    pools = True
    parameter = "a file from `flashmoe train-policy`"

    def __init__(self, scope: Scope, n_slots: int, network: Network | None = None) -> None:
        super().__init__(scope, n_slots)
        self.memory = Memory.empty(scope)
        self.shadow = Shadow.empty(self.n_keys)
        self.network = Perceptron.of(network or load(SHIPPED))
        self.layer_of = np.repeat(np.arange(scope.n_layers), scope.n_experts)
        self.top_k = scope.top_k
        self.gap = scope.n_experts / scope.top_k
        self.depths = np.arange(scope.first_layer, scope.first_layer + scope.n_layers) / max(
            1, scope.depth - 1
        )
        self.due = np.zeros(self.n_keys)  # when each expert is expected, in tokens
        self.due_at = np.full(self.n_keys, -1)  # the token of its layer that `due` is from
        self.stale = np.zeros(scope.n_layers, np.bool_)  # scratch: layers to estimate anew
        self.zeros = np.zeros(self.n_keys, np.int64)

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        return {"network": load(Path(argument))}

    def touch(self, event: Event, now: int) -> None:
        compare_with_lru(self.shadow, event, self.n_slots)
        remember(self.memory, event)

    def victim(self, candidates: np.ndarray) -> int:
        if behind_lru(self.shadow, self.top_k):
            chosen = least(candidates, self.shadow.last_use, self.zeros)
        else:
            chosen = needed_last(self, candidates)
        self.shadow.resident[chosen] = False
        return chosen


@helper
def compare_with_lru(shadow, event, n_slots):  # type: ignore[no-untyped-def]
    """Count the event's hits, here and of an LRU cache: it holds the n_slots last used.

    Of experts used last by one token, when not all of them fit, each counts for its chance. (As
    hits they would count for too much: with 8 slots for top-6 that cost 28 points of the gap.)
    """
    for key in event.keys:
        if shadow.resident[key]:
            shadow.score[2] += 1
        if shadow.last_use[key] >= 0:
            newer, equal = 0, 0
            for other in range(len(shadow.last_use)):
                if shadow.last_use[other] > shadow.last_use[key]:
                    newer += 1
                elif shadow.last_use[other] == shadow.last_use[key]:
                    equal += 1
            shadow.score[3] += min(1.0, max(0.0, (n_slots - newer) / equal))
    for key, offset in zip(event.keys, event.last):
        shadow.resident[key] = True
        shadow.last_use[key] = int(shadow.score[0]) + offset
    shadow.score[0] += len(event.rows)
    shadow.score[1] += len(event.keys)


@helper
def behind_lru(shadow, top_k):  # type: ignore[no-untyped-def]
    allowed = TRUST_EVENTS * top_k + TRUST_SHARE * shadow.score[1]
    return shadow.score[3] - shadow.score[2] > allowed


@helper
def needed_last(self, candidates):  # type: ignore[no-untyped-def]
    """The candidate due last. Estimates are kept until the expert's layer runs again."""
    for layer in range(len(self.stale)):
        self.stale[layer] = False
    for key in candidates:
        layer = self.layer_of[key]
        self.stale[layer] |= self.due_at[key] != self.memory.tokens[layer]
    for layer in range(len(self.stale)):
        if not self.stale[layer]:
            continue
        similar, pairs = recall(self.memory, layer)
        now, depth = self.memory.tokens[layer], self.depths[layer]
        for key in candidates:
            if self.layer_of[key] == layer and self.due_at[key] != now:
                features = self.network.features
                describe(self.memory, layer, key, similar, pairs, self.n_slots, depth, features)
                wait = np.exp(log_distance(self.network)) * self.gap
                self.due[key] = now + layer / len(self.depths) + wait
                self.due_at[key] = now
    best, latest = candidates[0], -np.inf
    for key in candidates:
        if self.due[key] > latest:
            best, latest = key, self.due[key]
    return best


@helper
def log_distance(network):  # type: ignore[no-untyped-def]
    """The network on its features: the logarithm of the wait for the next use, in gaps.

    Loops over a hidden layer's units innermost, which vectorises without reordering a sum:
    the same bits in the engine and the simulator.
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
    return policy_file.load(path, KIND, shapes)
