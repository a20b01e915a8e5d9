"""Records which experts a model chooses, from the events that llama.cpp's graphs make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from flashmoe.trace import Trace


class Recorder:
    """Collects the events of one model: a few hundred bytes a token.

    llama.cpp computes a prompt in ubatches, each through all layers: a forward pass of the trace.
    Its last layer computes only tokens whose output is wanted, and a pass that failed went only so
    far: `Trace.computed` tells. Of fewer rows than the pass has tokens it is not known whose they
    are; they are taken for the last tokens'.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.n_layers, self.top_k = len(manifest.layers), manifest.top_k
        self.n_experts = max(layer.n_experts for layer in manifest.layers)
        self._dtype = np.uint8 if self.n_experts <= 256 else np.uint16
        self._pass: dict[int, np.ndarray] = {}  # by layer, of the forward pass at hand
        self._experts = bytearray()  # [tokens, layers, top_k]
        self._computed = bytearray()  # [tokens, layers]
        self._tokens: list[int] = []  # of each forward pass
        self._first_passes: list[int] = []  # of each sequence
        self._complaint = ""

    def next_sequence(self) -> None:
        """What is recorded from now on belongs to another sequence; there is one to begin with."""
        self._end_pass()
        if len(self._tokens) > (self._first_passes[-1] if self._first_passes else 0):
            self._first_passes.append(len(self._tokens))

    def note(self, layer: int, rows: np.ndarray) -> None:
        """Take in an event: `rows` [tokens, top_k] int64, what the layer chose."""
        if rows.shape[1] != self.top_k:
            self._complaint = (
                f"a layer chose {rows.shape[1]} experts for a token where the model's file says "
                f"{self.top_k}, which a trace cannot hold"
            )
            return
        if self._pass and layer <= max(self._pass):
            self._end_pass()
        self._pass[layer] = rows.astype(self._dtype)

    def _end_pass(self) -> None:
        if not self._pass:
            return
        tokens = max(map(len, self._pass.values()))
        experts = np.empty((tokens, self.n_layers, self.top_k), self._dtype)
        experts[:] = np.arange(self.top_k)  # distinct, as in every trace, where nothing is known
        computed = np.zeros((tokens, self.n_layers), bool)
        for layer, rows in self._pass.items():
            experts[tokens - len(rows) :, layer] = rows
            computed[tokens - len(rows) :, layer] = True
        self._pass.clear()
        self._experts += experts.tobytes()
        self._computed += computed.tobytes()
        self._tokens.append(tokens)

    def trace(self, info: Mapping[str, Any]) -> Trace:
        """Everything that was recorded; info: what to say of it in the file.

        Raises FlashMoEError where there is nothing, or what a trace cannot hold.
        """
        self._end_pass()
        if self._complaint or not self._tokens:
            raise FlashMoEError(f"no trace: {self._complaint or 'no token was computed'}")
        shape = (sum(self._tokens), self.n_layers)
        experts = np.frombuffer(bytes(self._experts), self._dtype).reshape(*shape, self.top_k)
        computed = np.frombuffer(bytes(self._computed), bool).reshape(shape)
        steps = np.repeat(np.arange(len(self._tokens), dtype=np.int32), self._tokens)
        firsts = np.array([first for first in self._first_passes if first < len(self._tokens)])
        sequence = np.searchsorted(firsts, steps, side="right") if firsts.size else steps * 0
        return Trace(
            experts,
            sequence.astype(np.int32),
            self.n_experts,
            step=steps,
            computed=None if computed.all() else computed,
            info=dict(info),
        )
