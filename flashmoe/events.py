"""An event: the experts that one forward step needs at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LAYERS_BELOW = 4  # whose choices an event tells; 1 closed 0.7 points less of the gap, 6 as much
_UNKNOWN = np.empty(0, np.float32)
_NOTHING_BELOW = np.empty(0, np.int64)


class Event(NamedTuple):
    """Distinct keys of one layer and step, in the order of their last use within the step.

    A decoded token makes an event of top_k keys; a prefill of T tokens makes one event of
    the union of their experts. A key is requested once per event, however many tokens use it.
    """

    keys: np.ndarray  # [n] int64
    counts: np.ndarray  # [n] int64, tokens of the event that use the key
    last: np.ndarray  # [n] int64, index within the event of the last token that does
    weights: np.ndarray  # [n] float32, the key's share of that token's weights; empty: unknown
    tokens: int
    below: np.ndarray  # [m] int64, what the last token chose at the layers below; see `below`

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[Sequence[int]] | np.ndarray,
        offset: int = 0,
        weights: np.ndarray | None = None,
        below: np.ndarray = _NOTHING_BELOW,
    ) -> Event:
        """The event of `rows` [tokens, top_k] of expert indices, as keys `offset` + index.

        weights: [tokens, top_k], the router's, in any scale. They are rounded to float16, as
        a trace stores them, so that the engine and a replay see the same numbers.
        """
        chosen = np.asarray(rows, np.int64)
        if len(chosen) == 1 and len(set(chosen[0].tolist())) == chosen.shape[1]:
            ones, zeros = np.ones(chosen.shape[1], np.int64), np.zeros(chosen.shape[1], np.int64)
            shares = _UNKNOWN if weights is None else weight_shares(weights)[0]
            return cls(chosen[0] + offset, ones, zeros, shares, 1, below)
        flat = chosen.ravel()
        experts, backwards, counts = np.unique(flat[::-1], return_index=True, return_counts=True)
        final = flat.size - 1 - backwards  # where each expert is used last
        order = np.argsort(final)
        shares = _UNKNOWN if weights is None else weight_shares(weights).ravel()[final[order]]
        last = final[order] // chosen.shape[1]
        return cls(experts[order] + offset, counts[order], last, shares, len(chosen), below)


class Events(NamedTuple):
    """A sequence of events as flat arrays: event i holds keys[starts[i] : starts[i + 1]]."""

    keys: np.ndarray
    counts: np.ndarray
    last: np.ndarray
    weights: np.ndarray  # as long as keys, or empty
    starts: np.ndarray  # [events + 1] int64
    tokens: np.ndarray  # [events] int64
    below: np.ndarray  # [events, m] int64

    @classmethod
    def of(cls, events: Sequence[Event]) -> Events:
        def joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
            return np.concatenate(parts).astype(kind) if parts else np.empty(0, kind)

        return cls(
            joined([event.keys for event in events], np.int64),
            joined([event.counts for event in events], np.int64),
            joined([event.last for event in events], np.int64),
            joined([event.weights for event in events], np.float32),
            np.cumsum([0, *(len(event.keys) for event in events)], dtype=np.int64),
            np.array([event.tokens for event in events], np.int64),
            np.stack([event.below for event in events]) if events else np.empty((0, 0), np.int64),
        )

    @classmethod
    def of_tokens(cls, keys: np.ndarray, weights: np.ndarray | None, below: np.ndarray) -> Events:
        """One event a row of `keys` [events, top_k]; weights of the same shape, or None."""
        n, top_k = keys.shape
        flat = np.ascontiguousarray(keys, np.int64).ravel()
        shares = _UNKNOWN if weights is None else weight_shares(weights).ravel()
        zeros, ones = np.zeros(flat.size, np.int64), np.ones(flat.size, np.int64)
        starts = np.arange(0, flat.size + 1, top_k, dtype=np.int64)
        return cls(flat, ones, zeros, shares, starts, np.ones(n, np.int64), below)

    def __len__(self) -> int:  # of events; a NamedTuple would count its fields
        return len(self.tokens)


def weight_shares(weights: np.ndarray) -> np.ndarray:
    """Each row of router weights [tokens, top_k] divided by its sum, float32, contiguous."""
    rounded = np.asarray(weights, np.float16).astype(np.float32)
    total = rounded.sum(-1, keepdims=True)
    return np.ascontiguousarray(rounded / np.where(total > 0, total, 1))


def below(experts: np.ndarray, layer: int, n_experts: int) -> np.ndarray:
    """What the layers just below `layer` chose, of experts [..., layers, top_k].

    Returns int64 [..., LAYERS_BELOW * top_k], nearest layer first: distance * n_experts + expert
    with distance 0 for the nearest; -1 where there is no such layer.
    """
    top_k = experts.shape[-1]
    found = np.full((*experts.shape[:-2], LAYERS_BELOW, top_k), -1, np.int64)
    for distance in range(min(layer, LAYERS_BELOW)):
        found[..., distance, :] = experts[..., layer - 1 - distance, :]
        found[..., distance, :] += distance * n_experts
    return found.reshape(*experts.shape[:-2], LAYERS_BELOW * top_k)
