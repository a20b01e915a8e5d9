"""An event: the experts that one forward step needs at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LAYERS_BELOW = 4  # whose choices an event tells; 1 closed 0.7 points less of the gap, 6 as much
_UNKNOWN = np.empty((0, 0), np.float32)


class Event(NamedTuple):
    """What the tokens of one layer and step chose: its distinct keys, and every token's row.

    `keys` are in the order of their last use within the step. A decoded token makes an event
    of one row, top_k keys; a prefill of T tokens makes one event of T rows and the union of
    their experts. A key is requested once per event, however many tokens use it.
    """

    keys: np.ndarray  # [n] int64
    counts: np.ndarray  # [n] int64, tokens of the event that use the key
    last: np.ndarray  # [n] int64, index within the event of the last token that does
    rows: np.ndarray  # [tokens, top_k] int64, the keys that each token uses
    weights: np.ndarray  # [tokens, top_k] float32, shares of a token's weights; [0, 0]: unknown
    below: np.ndarray  # [tokens, m] int64, what each chose at the layers below; see `below`

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[Sequence[int]] | np.ndarray,
        offset: int = 0,
        weights: np.ndarray | None = None,
        below: np.ndarray | None = None,
    ) -> Event:
        """The event of `rows` [tokens, top_k] of expert indices, as keys `offset` + index.

        weights: [tokens, top_k], the router's, in any scale. They are rounded to float16, as
        a trace stores them, so that the engine and a replay see the same numbers.
        """
        chosen = np.asarray(rows, np.int64) + offset
        tokens, top_k = chosen.shape
        shares = _UNKNOWN if weights is None else weight_shares(weights)
        known = np.empty((tokens, 0), np.int64) if below is None else below
        if tokens == 1 and len(set(chosen[0].tolist())) == top_k:
            ones, zeros = np.ones(top_k, np.int64), np.zeros(top_k, np.int64)
            return cls(chosen[0], ones, zeros, chosen, shares, known)
        flat = chosen.ravel()
        keys, backwards, counts = np.unique(flat[::-1], return_index=True, return_counts=True)
        final = flat.size - 1 - backwards  # where each key is used last
        order = np.argsort(final)
        return cls(keys[order], counts[order], final[order] // top_k, chosen, shares, known)


class Events(NamedTuple):
    """A sequence of events as flat arrays.

    Event i holds keys[starts[i] : starts[i + 1]] and rows[firsts[i] : firsts[i + 1]].
    """

    keys: np.ndarray
    counts: np.ndarray
    last: np.ndarray
    starts: np.ndarray  # [events + 1] int64
    rows: np.ndarray  # [tokens, top_k] of all events
    weights: np.ndarray  # [tokens, top_k], or [0, 0]
    below: np.ndarray  # [tokens, m]
    firsts: np.ndarray  # [events + 1] int64

    @classmethod
    def of(cls, events: Sequence[Event]) -> Events:
        """At least one event; all of one top_k, with or without weights."""
        keys, counts, last, rows, weights, below = map(np.concatenate, zip(*events, strict=True))
        starts = np.cumsum([0, *(len(event.keys) for event in events)], dtype=np.int64)
        firsts = np.cumsum([0, *(len(event.rows) for event in events)], dtype=np.int64)
        return cls(keys, counts, last, starts, rows, weights, below, firsts)

    @classmethod
    def of_tokens(cls, keys: np.ndarray, weights: np.ndarray | None, below: np.ndarray) -> Events:
        """One event a row of `keys` [events, top_k]; weights of the same shape, or None."""
        n, top_k = keys.shape
        rows = np.ascontiguousarray(keys, np.int64)
        shares = _UNKNOWN if weights is None else weight_shares(weights)
        zeros, ones = np.zeros(rows.size, np.int64), np.ones(rows.size, np.int64)
        starts = np.arange(0, rows.size + 1, top_k, dtype=np.int64)
        return cls(rows.ravel(), ones, zeros, starts, rows, shares, below, np.arange(n + 1))

    def __len__(self) -> int:  # of events; a NamedTuple would count its fields
        return len(self.starts) - 1


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
