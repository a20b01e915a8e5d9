"""An event: the experts that one forward step needs at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flashmoe.util.machine_code import helper

LAYERS_BELOW = 4  # how many lower layers' choices an event tells (docs/policy.md says why)
_NO_WEIGHTS = np.empty((0, 0), np.float32)


class Event(NamedTuple):
    """The experts that one step uses at one layer: its distinct keys, and each token's row.

    `keys` are in the order of their last use within the step. A decoded token makes an event
    of one row and top_k keys; a prefill of T tokens makes one event of T rows, whose keys are
    the union of their experts. A key is requested once per event, however many tokens use it.
    """

    keys: np.ndarray  # [n] int64
    counts: np.ndarray  # [n] int64, tokens of the event that use the key
    last: np.ndarray  # [n] int64, which token of the event uses the key last
    rows: np.ndarray  # [tokens, top_k] int64, the keys that each token uses
    weights: np.ndarray  # [tokens, top_k] float32, each row sums to 1; [0, 0]: unknown
    below: np.ndarray  # [tokens, m] int64, each token's experts at lower layers; see `told`

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
        row_keys = np.asarray(rows, np.int64) + offset
        tokens, top_k = row_keys.shape
        shares = _NO_WEIGHTS if weights is None else weight_shares(weights)
        lower = np.empty((tokens, 0), np.int64) if below is None else below
        if tokens == 1 and len(set(row_keys[0].tolist())) == top_k:
            ones, zeros = np.ones(top_k, np.int64), np.zeros(top_k, np.int64)
            return cls(row_keys[0], ones, zeros, row_keys, shares, lower)
        flat = row_keys.ravel()
        keys, backwards, counts = np.unique(flat[::-1], return_index=True, return_counts=True)
        last_position = flat.size - 1 - backwards
        order = np.argsort(last_position)
        last = last_position[order] // top_k
        return cls(keys[order], counts[order], last, row_keys, shares, lower)


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
        """One or more events, all with the same top_k, and either all with weights or none."""
        keys, counts, last, rows, weights, below = map(np.concatenate, zip(*events, strict=True))
        starts = np.cumsum([0, *(len(event.keys) for event in events)], dtype=np.int64)
        firsts = np.cumsum([0, *(len(event.rows) for event in events)], dtype=np.int64)
        return cls(keys, counts, last, starts, rows, weights, below, firsts)

    @classmethod
    def of_tokens(cls, keys: np.ndarray, weights: np.ndarray | None, below: np.ndarray) -> Events:
        """One event per row of `keys` [events, top_k]; weights of the same shape, or None."""
        n, top_k = keys.shape
        rows = np.ascontiguousarray(keys, np.int64)
        shares = _NO_WEIGHTS if weights is None else weight_shares(weights)
        zeros, ones = np.zeros(rows.size, np.int64), np.ones(rows.size, np.int64)
        starts = np.arange(0, rows.size + 1, top_k, dtype=np.int64)
        return cls(rows.ravel(), ones, zeros, starts, rows, shares, below, np.arange(n + 1))

    @classmethod
    def none(cls, top_k: int) -> Events:
        """No event at all."""
        rows = np.empty((0, top_k), np.int64)
        return cls.of_tokens(rows, None, np.empty((0, LAYERS_BELOW * top_k), np.int64))

    def __len__(self) -> int:  # of events; a NamedTuple would count its fields
        return len(self.starts) - 1


@helper
def event_at(events: Events, i: int) -> Event:
    """Event `i` of `events`; its arrays are parts of theirs."""
    start, end = events.starts[i], events.starts[i + 1]
    first, until = events.firsts[i], events.firsts[i + 1]
    return Event(
        events.keys[start:end],
        events.counts[start:end],
        events.last[start:end],
        events.rows[first:until],
        events.weights[first:until],  # of none: still none
        events.below[first:until],
    )


def weight_shares(weights: np.ndarray) -> np.ndarray:
    """Each row of router weights [tokens, top_k] divided by its sum, float32, contiguous."""
    rounded = np.asarray(weights, np.float16).astype(np.float32)
    total = rounded.sum(-1, keepdims=True)
    return np.ascontiguousarray(rounded / np.where(total > 0, total, 1))


def below(experts: np.ndarray, layer: int, n_experts: int) -> np.ndarray:
    """The experts of the layers just below `layer`, of experts [..., layers, top_k]: see `told`."""
    lower = [experts[..., layer - 1 - n, :] for n in range(min(layer, LAYERS_BELOW))]
    return told(lower, experts[..., 0, :], n_experts)


def told(lower: Sequence[np.ndarray], like: np.ndarray, n_experts: int) -> np.ndarray:
    """What an event tells of the layers below it, of which `lower` has the choices, nearest first.

    Each is shaped as `like` [..., top_k]. Returns int64 [..., LAYERS_BELOW * top_k], nearest layer
    first, each as distance * n_experts + expert, where the nearest layer has distance 0; -1 where
    there is no such layer. In few calls, since every token pays for them at every layer.
    """
    parts = [np.add(rows, n * n_experts, dtype=np.int64) for n, rows in enumerate(lower)]
    parts += [np.full(like.shape, -1, np.int64)] * (LAYERS_BELOW - len(parts))
    return np.concatenate(parts, axis=-1)
