"""Ours: one small network, for all experts, layers and models, says who is needed last."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from flashmoe.compiled import helper
from flashmoe.events import Event
from flashmoe.policies import policy_file
from flashmoe.policies.base import Policy, Scope, least
from flashmoe.policies.features import N_FEATURES, Memory, describe, recall, remember

SHIPPED = Path(__file__).with_suffix(".safetensors")
KIND = "learned"
HIDDEN = (64, 32)
# How many hits behind LRU it may fall before it does as LRU would: some, and a share of requests.
TRUST_EVENTS, TRUST_SHARE = 3, 0.003

Network = dict[str, np.ndarray]  # w1 [features, 64], b1, w2 [64, 32], b2, w3 [32]; float32


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
        network = network or load(SHIPPED)
        self.memory = Memory.empty(scope)
        self.layer_of = np.repeat(np.arange(scope.n_layers), scope.n_experts)
        self.gap = scope.n_experts / scope.top_k
        self.depths = np.arange(scope.first_layer, scope.first_layer + scope.n_layers) / max(
            1, scope.depth - 1
        )
        self.w1, self.b1 = network["w1"], network["b1"]
        self.w2, self.b2, self.w3 = network["w2"], network["b2"], network["w3"]
        self.features = np.zeros(N_FEATURES, np.float32)
        self.h1, self.h2 = np.zeros_like(self.b1), np.zeros_like(self.b2)
        self.due = np.zeros(self.n_keys)  # when each expert is expected, in tokens
        self.due_at = np.full(self.n_keys, -1)  # the token of its layer that `due` is from
        self.stale = np.zeros(scope.n_layers, np.bool_)  # scratch: layers to estimate anew
        self.resident = np.zeros(self.n_keys, np.bool_)
        self.last_use = np.full(self.n_keys, -1)
        self.zeros = np.zeros(self.n_keys, np.int64)
        self.score = np.zeros(4)  # tokens, requests, own hits, LRU's hits

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        return {"network": load(Path(argument))}

    def touch(self, event: Event, now: int) -> None:
        compare_with_lru(self, event)
        remember(self.memory, event)

    def victim(self, candidates: np.ndarray) -> int:
        if behind_lru(self):
            chosen = least(candidates, self.last_use, self.zeros)
        else:
            chosen = needed_last(self, candidates)
        self.resident[chosen] = False
        return chosen


@helper
def compare_with_lru(self, event):  # type: ignore[no-untyped-def]
    """Count the event's hits, here and of an LRU cache: it holds the n_slots last used.

    Of experts used last by one token, when not all of them fit, each counts for its chance. (As
    hits they would count for too much: with 8 slots for top-6 that cost 28 points of the gap.)
    """
    for key in event.keys:
        if self.resident[key]:
            self.score[2] += 1
        if self.last_use[key] >= 0:
            newer, equal = 0, 0
            for other in range(self.n_keys):
                if self.last_use[other] > self.last_use[key]:
                    newer += 1
                elif self.last_use[other] == self.last_use[key]:
                    equal += 1
            self.score[3] += min(1.0, max(0.0, (self.n_slots - newer) / equal))
    for key, offset in zip(event.keys, event.last):
        self.resident[key] = True
        self.last_use[key] = int(self.score[0]) + offset
    self.score[0] += len(event.rows)
    self.score[1] += len(event.keys)


@helper
def behind_lru(self):  # type: ignore[no-untyped-def]
    allowed = TRUST_EVENTS * self.memory.history.shape[2] + TRUST_SHARE * self.score[1]
    return self.score[3] - self.score[2] > allowed


@helper
def needed_last(self, candidates):  # type: ignore[no-untyped-def]
    """The candidate due last. Estimates are kept until the expert's layer runs again."""
    self.stale[:] = False
    for key in candidates:
        layer = self.layer_of[key]
        self.stale[layer] |= self.due_at[key] != self.memory.tokens[layer]
    for layer in np.flatnonzero(self.stale):
        estimate(self, layer, candidates)
    best, latest = candidates[0], -np.inf
    for key in candidates:
        if self.due[key] > latest:
            best, latest = key, self.due[key]
    return best


@helper
def estimate(self, layer, candidates):  # type: ignore[no-untyped-def]
    """When the candidates of `layer` are due, as far as that is not known."""
    similar, pairs = recall(self.memory, layer)
    now = self.memory.tokens[layer]
    for key in candidates:
        if self.layer_of[key] == layer and self.due_at[key] != now:
            describe(
                self.memory,
                layer,
                key,
                similar,
                pairs,
                self.n_slots,
                self.depths[layer],
                self.features,
            )
            wait = np.exp(log_distance(self)) * self.gap
            self.due[key] = now + layer / len(self.depths) + wait
            self.due_at[key] = now


@helper
def log_distance(self):  # type: ignore[no-untyped-def]
    """The network on self.features: the logarithm of the wait for the next use, in gaps.

    Loops over a hidden layer's units innermost, which vectorises without reordering a sum:
    the same bits in the engine and the simulator.
    """
    for j in range(len(self.h1)):
        self.h1[j] = self.b1[j]
    for i in range(len(self.features)):
        x = self.features[i]
        for j in range(len(self.h1)):
            self.h1[j] += x * self.w1[i, j]
    for j in range(len(self.h2)):
        self.h2[j] = self.b2[j]
    for i in range(len(self.h1)):
        if self.h1[i] > 0:
            x = self.h1[i]
            for j in range(len(self.h2)):
                self.h2[j] += x * self.w2[i, j]
    total = np.float32(0)
    for i in range(len(self.h2)):
        if self.h2[i] > 0:
            total += self.h2[i] * self.w3[i]
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
