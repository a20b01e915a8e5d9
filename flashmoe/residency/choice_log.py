"""What layers chose, kept while somebody looks on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Tokens times layers that are kept at most: a prompt's rows take megabytes.
_MOST_ROWS = 1 << 16


class Choice(NamedTuple):
    """An event as the engine met it."""

    layer: int
    rows: np.ndarray  # [tokens, top_k] integers: the experts
    weights: np.ndarray | None  # [tokens, top_k], the router's, if they are known


class ChoiceLog:
    """The latest choices of a model's layers, in order. Not thread-safe: see `Residency`."""

    def __init__(self) -> None:
        self.wanted = False
        self.lost = 0  # events for which there was no room
        self._kept: list[Choice] = []
        self._n_rows = 0

    def want(self, wanted: bool) -> None:
        """Keep events from now on, or none."""
        self.wanted = wanted
        self.take()

    def keep(self, layer: int, rows: np.ndarray, weights: np.ndarray | None) -> None:
        """Take in an event, if events are wanted."""
        if not self.wanted:
            return
        if self._n_rows + len(rows) > _MOST_ROWS:
            self.lost += 1
            return
        self._n_rows += len(rows)
        self._kept.append(Choice(layer, rows, weights))

    def take(self) -> list[Choice]:
        """Those since the last call."""
        kept, self._kept, self._n_rows = self._kept, [], 0
        return kept
