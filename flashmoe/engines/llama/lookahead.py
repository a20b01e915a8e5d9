"""Guesses which experts a layer will choose, with its router and the hidden state below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from flashmoe.engines.llama.ggml import GGML
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.util.machine_code import helper

# Only so many of a prompt's last tokens vote, because more would change no guess.
_VOTING_TOKENS = 64
_STEPS = 8  # from a layer's choice back to the product with its router, at most


@dataclass(frozen=True)
class _Router:
    """What a layer scores its experts by, in the program's own memory."""

    weights: np.ndarray  # [n_experts, width] float32
    norm: np.ndarray  # [width] float32, by which its input was multiplied; ones if unknown
    bias: np.ndarray  # [n_experts] float32, added to the scores
    share_bias: np.ndarray  # [n_experts] float32, added to the scores' sigmoids; empty: none
    steps: int  # from the layer's choice back to the product with its router


class Lookahead:
    """Asks a layer's own router about the hidden state of the layer below.

    Residual connections change the hidden state little from one layer to the next, so the guess is
    mostly right (as mixtral-offloading, DAOP and Fate found). The routers are learnt from the
    first graph, so layers are guessed from the second one on.
    """

    def __init__(self, ggml: GGML, is_ours: Callable[[int], bool]) -> None:
        """is_ours: does an address lie in memory of ours, in which the model's weights stay?"""
        self._ggml = ggml
        self._is_ours = is_ours
        self._routers: dict[int, _Router | None] = {}  # by layer; None: it cannot be asked
        self._scales: dict[int, np.ndarray] = {}  # by layer: from its norm to that above
        self._rank: Any = kernel(rank, Policy)

    @property
    def layers(self) -> int:
        """How many layers' routers can be asked by now."""
        return sum(router is not None for router in self._routers.values())

    def learn(self, layer: int, choice: int) -> None:
        """Find a layer's router, once. choice: the tensor of its chosen experts."""
        if layer not in self._routers:
            product, added = self._find_product(choice)
            self._routers[layer] = self._router(product, added) if product else None

    def likely(self, layer: int, choice: int, rows: np.ndarray) -> list[int]:
        """The experts that `layer` + 1 will probably need, the likeliest first.

        choice: the address of the tensor of `layer`'s chosen experts, which was just computed.
        rows: its content, [tokens, top_k].
        """
        below, above = self._routers.get(layer), self._routers.get(layer + 1)
        if below and above:
            return self._by_router(layer, below, above, choice, rows.shape[1])
        used = np.unique(rows)
        if len(used) > used[-1] / 2:
            return list(range(used[-1] + 1))  # a first prompt that needs most experts of a layer
        return []

    def _by_router(
        self, layer: int, below: _Router, above: _Router, choice: int, top_k: int
    ) -> list[int]:
        ggml, product = self._ggml, choice
        for _ in range(below.steps):
            product = ggml.source_of(product, 0)
        rows = ggml.float_rows(ggml.source_of(product, 1), _VOTING_TOKENS)
        scale = self._scale(layer, below, above)
        experts = self._rank(above.weights, rows, scale, above.bias, above.share_bias, top_k)
        likely: list[int] = experts.tolist()
        return likely

    def _scale(self, layer: int, below: _Router, above: _Router) -> np.ndarray:
        if layer not in self._scales:
            self._scales[layer] = above.norm / below.norm
        return self._scales[layer]

    def has_learnt(self, n_layers: int) -> bool:
        """Every layer's graph was looked at."""
        return len(self._routers) == n_layers

    def tabulate(self, rows: np.ndarray) -> None:
        """Write where each layer's router lies to `rows` [layers, 7] int64 (see `decode_event`).

        Zeros where a layer cannot be asked. The last layer has no scale.
        """
        for layer, row in enumerate(rows):
            if router := self._routers.get(layer):
                above = self._routers.get(layer + 1)
                scale = self._scale(layer, router, above) if above else router.norm
                arrays = router.weights, scale, router.bias, router.share_bias
                row[:4] = [_address(array) for array in arrays]
                row[4:] = *router.weights.shape, router.steps

    def _find_product(self, choice: int) -> tuple[int, list[int]]:
        """The product of a layer's router with its input, and what is added on the way; 0: none."""
        tensor, added = choice, []
        for _ in range(_STEPS):
            if not (source := self._ggml.source_of(tensor, 0)):
                break
            if self._ggml.name_of(source).endswith("ffn_gate_inp.weight"):
                return tensor, added
            added.append(self._ggml.source_of(tensor, 1))
            tensor = source
        return 0, []

    def _router(self, product: int, added: list[int]) -> _Router | None:
        ggml, hidden = self._ggml, self._ggml.source_of(product, 1)
        source = ggml.source_of(product, 0)
        weights = ggml.floats(source, copy=not self._is_ours(ggml.data_of(source)))
        if weights is None:
            return None
        n_experts, width = weights.shape
        norm, bias = np.ones(width, np.float32), np.zeros(n_experts, np.float32)
        share_bias = np.empty(0, np.float32)
        factor = ggml.source_of(hidden, 1)
        if factor and "norm" in ggml.name_of(factor):
            values = ggml.floats(factor)
            if values is not None and values.shape == (1, width) and values.all():
                norm = values[0]
        for tensor in filter(None, added):
            name, values = ggml.name_of(tensor), ggml.floats(tensor)
            if values is not None and values.shape == (1, n_experts):
                if name.endswith("exp_probs_b.bias"):
                    share_bias = values[0]
                elif name.endswith("ffn_gate_inp.bias"):
                    bias = values[0]
        return _Router(weights, norm, bias, share_bias, len(added))


def _address(array: np.ndarray) -> int:
    return array.ctypes.data if array.size else 0


@numba.njit(fastmath={"reassoc", "contract", "nsz"})  # else it adds one after the other
def _product(weights, x):
    total = np.float32(0)
    for i in range(len(x)):
        total += weights[i] * x[i]
    return total


@helper
def rank(weights, rows, scale, bias, share_bias, top_k):
    """The experts that `rows` vote for, most votes first.

    One row gives each expert its rank for votes; of several, each gives one to each of its top_k.
    """
    n_experts, width = weights.shape
    x = np.empty(width, np.float32)
    scores = np.empty(n_experts, np.float32)
    votes = np.zeros(n_experts, np.int64)
    for row in rows:
        for i in range(width):
            x[i] = row[i] * scale[i]
        for expert in range(n_experts):
            score = _product(weights[expert], x) + bias[expert]
            if len(share_bias):
                score = 1 / (1 + np.exp(-score)) + share_bias[expert]
            scores[expert] = score
        for rank in range(min(top_k, n_experts)):
            best = 0
            for expert in range(n_experts):
                if scores[expert] > scores[best]:
                    best = expert
            scores[best] = -np.inf
            votes[best] += top_k - rank if len(rows) == 1 else 1
    order = np.argsort(-votes, kind="mergesort")
    return order[: np.count_nonzero(votes)]
