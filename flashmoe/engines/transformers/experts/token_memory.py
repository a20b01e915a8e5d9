"""Remembers which experts of the first MoE layer each token chose, to guess them next time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from flashmoe.engines.transformers.experts.votes import VOTING_TOKENS, in_order
from flashmoe.engines.transformers.model.streamed_parameter import refusal
from flashmoe.residency.residency import Residency


class TokenMemory:
    """For each token of the vocabulary, its last choice in the first MoE layer.

    So low in a model the choice depends on little but the token itself
    (docs/speed.md#the-first-layer). So it is guessed as soon as the token is known, while the
    layers below are computed. Threads that generate at once may spoil each other's guesses.
    """

    def __init__(self, vocabulary: int, n_experts: int, top_k: int) -> None:
        self._n_experts = n_experts
        self._chosen = np.full((vocabulary, top_k), -1, np.int16)  # -1: not seen yet
        self._tokens = np.empty(0, np.int64)  # of the step at hand

    def expect(self, tokens: np.ndarray) -> None:
        """A step begins with these tokens, [n] integers."""
        known = len(tokens) and tokens.min() >= 0 and tokens.max() < len(self._chosen)
        self._tokens = tokens if known else tokens[:0]

    def note(self, rows: np.ndarray) -> None:
        """What the tokens of the step at hand chose, [n, top_k]; of another step: ignored."""
        if rows.shape == (len(self._tokens), self._chosen.shape[1]):
            self._chosen[self._tokens] = rows

    def likely(self) -> list[int]:
        """The experts that the step at hand will probably choose, as `votes.in_order`."""
        chosen = self._chosen[self._tokens[-VOTING_TOKENS:]]
        return in_order(chosen, len(self._tokens), self._n_experts)


def watch(
    model: nn.Module, memory: TokenMemory, residency: Residency
) -> torch.utils.hooks.RemovableHandle:
    """From now on the first MoE layer is guessed whenever `model` is called with token ids."""
    return model.register_forward_pre_hook(_Watch(memory, residency), with_kwargs=True)


class _Watch:
    def __init__(self, memory: TokenMemory, residency: Residency) -> None:
        self._memory = memory
        self._residency = residency

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            self._memory.expect(ids.reshape(-1).cpu().numpy())
            self._residency.guess(0, self._memory.likely)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise refusal("pickling")  # of the model, which meets this before its experts
