"""What an online policy may know of a sequence at each moment, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmoe import events
from flashmoe.cache import simulate
from flashmoe.events import event_at
from flashmoe.policies.parts import features
from flashmoe.policies.parts.features import (
    N_FEATURES,
    RoutingHistory,
    describe,
    recall,
    remember,
)
from flashmoe.trace import Trace
from flashmoe.util.machine_code import compiled

# Tokens until the next use, the least of each bucket; the last one has no use that comes.
EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
N_BUCKETS = len(EDGES) + 1
# The features tell how many slots there are; one predictor serves all sizes, so it sees one size.
SLOTS_ONE_IN = 4  # experts of a layer
_SOURCES = (*(Path(str(module.__file__)) for module in (events, features)), Path(__file__))


@dataclass(frozen=True, eq=False)
class Sequence:
    """One recorded sequence of T tokens, L layers, E experts, top_k of them a token."""

    trace: Trace
    tokens: np.ndarray  # [T] positions in the trace

    @property
    def experts(self) -> torch.Tensor:
        """[T, L, top_k] int64."""
        return torch.from_numpy(self.trace.experts[self.tokens].astype(np.int64))

    @property
    def shares(self) -> torch.Tensor:
        """[T, L, top_k] float32: the router's weights; equal ones where they are not known."""
        if self.trace.weights is None:
            return torch.full(self.experts.shape, 1 / self.trace.top_k)
        weights = torch.from_numpy(self.trace.weights[self.tokens].astype(np.float32))
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)

    def features(self, layer: int) -> torch.Tensor:
        """[T, E, N_FEATURES] float32: what `learned` sees of each expert after each event."""
        layers = range(layer, layer + 1)
        scope = simulate.scope_of(self.trace, layers)
        served = simulate.events_of(self.trace, self.tokens, layers)
        out = np.zeros((len(self.tokens), scope.n_experts, N_FEATURES), np.float32)
        depth = layer / max(1, scope.depth - 1)
        watch = compiled(_watch, "ceiling", _SOURCES)
        watch(RoutingHistory.empty(scope), served, scope.n_experts // SLOTS_ONE_IN, depth, out)
        return torch.from_numpy(out)

    def waits(self, layer: int) -> torch.Tensor:
        """[T, E] float32: tokens from an event to each expert's next use; inf where none comes."""
        due = np.full(self.trace.n_experts, np.inf, np.float32)
        out = np.empty((len(self.tokens), self.trace.n_experts), np.float32)
        for t in range(len(self.tokens) - 1, -1, -1):
            out[t] = due - t
            due[self.trace.experts[self.tokens[t], layer]] = t
        return torch.from_numpy(out)


def buckets(waits: torch.Tensor) -> torch.Tensor:
    """The bucket of each wait, int64."""
    edges = torch.tensor([*EDGES[1:], torch.inf])
    return torch.bucketize(waits, edges, right=True)


def expected_waits(chances: torch.Tensor, longest: float) -> torch.Tensor:
    """What waits are expected by `chances` [..., N_BUCKETS], none counted as more than `longest`.

    A policy does not keep an expert for longer, so that longer waits are alike to it.
    """
    ends = (*(after - 1 for after in EDGES[1:]), 2 * EDGES[-1])
    middles = [(first + last) / 2 for first, last in zip(EDGES, ends, strict=True)]
    return chances @ torch.tensor([*middles, torch.inf]).clamp(max=longest)


def _watch(history: Any, served: Any, n_slots: int, depth: float, out: Any) -> None:
    for i in range(len(served.starts) - 1):
        remember(history, event_at(served, i))
        similar, pairs = recall(history, 0)
        for key in range(out.shape[1]):
            describe(history, 0, key, similar, pairs, n_slots, depth, out[i, key])
