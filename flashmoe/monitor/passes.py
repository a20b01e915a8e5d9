"""The choices that an engine kept, as traces that a cache can replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from flashmoe.residency.choice_log import Choice
from flashmoe.trace import Trace

Pass = dict[int, Choice]  # by layer, of one forward pass


class Passes:
    """Sorts choices into forward passes, of which each goes up through the layers."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._open: Pass = {}

    def add(self, choices: Iterable[Choice]) -> list[Pass]:
        """Those that ended by now. Choices of other than top_k experts are left out."""
        ended = []
        for choice in choices:
            if choice.rows.shape[1] != self._top_k:
                continue
            if self._open and choice.layer <= next(reversed(self._open)):
                ended.append(self._open)
                self._open = {}
            self._open[choice.layer] = choice
        return ended


def n_tokens(one: Pass) -> int:
    """Of a forward pass: the last layers of llama.cpp compute only some of them."""
    return max(len(choice.rows) for choice in one.values())


def traces(passes: Iterable[Pass], n_layers: int, n_experts: int) -> Iterator[Trace]:
    """In order: runs of single tokens that went through all layers, and each other pass alone."""

    def is_plain(one: Pass) -> bool:
        return len(one) == n_layers and n_tokens(one) == 1

    for plain, run in groupby(passes, is_plain):
        if plain:
            yield _of_tokens(list(run), n_layers, n_experts)
        else:
            yield from (_of_pass(one, n_layers, n_experts) for one in run)


def _of_tokens(run: Sequence[Pass], n_layers: int, n_experts: int) -> Trace:
    choices = [one[layer] for one in run for layer in range(n_layers)]
    shape = len(run), n_layers, choices[0].rows.shape[1]
    known = [choice.weights for choice in choices if choice.weights is not None]
    return Trace(
        np.concatenate([choice.rows for choice in choices]).reshape(shape),
        np.zeros(len(run), np.int32),
        n_experts,
        weights=np.concatenate(known).reshape(shape) if len(known) == len(choices) else None,
    )


def _of_pass(one: Pass, n_layers: int, n_experts: int) -> Trace:
    """Where a layer has fewer rows, they are taken for the last tokens'."""
    tokens, top_k = n_tokens(one), next(iter(one.values())).rows.shape[1]
    experts = np.empty((tokens, n_layers, top_k), np.int64)
    experts[:] = np.arange(top_k)  # where nothing is known
    weights = np.zeros((tokens, n_layers, top_k), np.float32)
    computed = np.zeros((tokens, n_layers), bool)
    for layer, choice in one.items():
        first = tokens - len(choice.rows)
        experts[first:, layer], computed[first:, layer] = choice.rows, True
        if choice.weights is not None:
            weights[first:, layer] = choice.weights
    known = all(choice.weights is not None for choice in one.values())
    step = np.zeros(tokens, np.int32)
    return Trace(
        experts, step, n_experts, weights if known else None, step=step,
        computed=None if computed.all() else computed,
    )  # fmt: skip
