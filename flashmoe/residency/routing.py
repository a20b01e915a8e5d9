"""What the layers chose for the tokens at hand, as events for the caches."""

from __future__ import annotations

import numpy as np

from flashmoe.events import LAYERS_BELOW, Event, told
from flashmoe.residency.choice_log import ChoiceLog


class Routing:
    """Remembers the choices of lower layers, which the policies of higher ones look at.

    Of a layer with one token they lie in `last`, which machine code reads and writes too.
    """

    def __init__(self, top_k: int, n_layers: int) -> None:
        self._no_rows = np.empty((0, top_k), np.int64)
        self._rows = [self._no_rows] * n_layers  # by layer, [tokens, top_k]
        self.n_tokens = np.zeros(n_layers, np.int64)  # of each layer's last event
        self.last = np.zeros((n_layers, top_k), np.int64)  # where n_tokens is 1: what it chose
        self.log = ChoiceLog()  # gets the events that machine code served from whoever has them

    def event(
        self,
        layer: int,
        rows: np.ndarray,
        weights: np.ndarray | None,
        first_key: int,
        n_experts: int,
    ) -> Event:
        """The event of `rows` [tokens, top_k], the experts that `layer` chose.

        weights: the router's, [tokens, top_k], if they are known.
        first_key: the key of the layer's expert 0 in the cache that serves it.
        """
        self.log.keep(layer, rows, weights)
        lower_rows = self._note(layer, rows, n_experts)
        return Event.of_rows(rows, first_key, weights, lower_rows)

    def _note(self, layer: int, rows: np.ndarray, n_experts: int) -> np.ndarray:
        """Take in `rows`; what the layers below chose for the same tokens, as `events.told`."""
        self._rows[layer] = rows
        usual = rows.shape[1] == self.last.shape[1]
        self.n_tokens[layer] = len(rows) if usual else 0  # a warm-up may choose all experts
        if len(rows) == 1 and usual:
            self.last[layer] = rows[0]
        lowest = layer
        while lowest > max(0, layer - LAYERS_BELOW) and self.n_tokens[lowest - 1] == len(rows):
            lowest -= 1  # an encoder's layers, below a decoder's, are of other tokens
        lower = [self._lower(below) for below in range(layer - 1, lowest - 1, -1)]
        if layer > LAYERS_BELOW:  # no layer above looks so far down: a prompt's rows take megabytes
            self._rows[layer - LAYERS_BELOW - 1] = self._no_rows
            self.n_tokens[layer - LAYERS_BELOW - 1] = 0
        return told(lower, rows, n_experts)

    def _lower(self, layer: int) -> np.ndarray:
        """[tokens, top_k], of its last event."""
        return self.last[layer : layer + 1] if self.n_tokens[layer] == 1 else self._rows[layer]
