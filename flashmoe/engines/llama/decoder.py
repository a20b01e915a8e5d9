"""Says when machine code serves an engine's events, and by which caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashmoe.engines.llama.decode_event import (
    APART,
    ARMED,
    GUESSES,
    LOGGED,
    LOGS,
    Decoding,
    compiled,
)
from flashmoe.util.by_address import words_of

if TYPE_CHECKING:
    from flashmoe.engines.llama.engine import LlamaEngine
    from flashmoe.engines.llama.ggml import GGML
    from flashmoe.engines.llama.lookahead import Lookahead


class Decoder:
    """The `decode` of one engine. Whoever changes what it goes by disarms it first."""

    def __init__(
        self, engine: LlamaEngine, ggml: GGML, lookahead: Lookahead, *, apart: bool
    ) -> None:
        """lookahead: of the same engine's layers.

        apart: an event may be left PART, since somebody awaits the rest before it is multiplied.
        """
        self._engine, self._lookahead = engine, lookahead
        at_once, routing = engine.at_once, engine.residency.routing
        self._state = Decoding.of(
            at_once.whole,
            engine.experts.numbers,
            routing.n_tokens,
            routing.last,
            [identity for file in engine.experts.files for identity in file.identities],
        )._replace(
            whole_words=at_once.words.ctypes.data,
            work=at_once.work.address,
            tensor_get=ggml.address_of("ggml_backend_tensor_get"),
            mutex=engine.lock.address,
        )
        self._state.state[APART] = apart
        self._state.offsets[:] = ggml.layout.shape, ggml.layout.sources
        self.words = words_of(self._state)
        self.code = compiled(self._state)
        self._tables: list[np.ndarray] = []  # of decisions

    @property
    def armed(self) -> bool:
        return bool(self._state.state[ARMED])

    def arm(self) -> None:
        """Serve tokens from now on. Not without the engine's lock."""
        s, pools = self._state, self._engine.residency.pools
        self._tables = []
        for layer in range(len(s.decisions)):
            pool = pools.of(layer)
            self._tables.append(words_of(pool.cache.decision(s.event)))
            s.decisions[layer] = self._tables[-1].ctypes.data
            s.first_keys[layer] = pool.first_key(layer)
        self._lookahead.tabulate(s.routers)
        s.state[GUESSES] = self._engine.residency.prefetcher.pays
        s.state[ARMED] = 1

    def disarm(self) -> None:
        """Leave all to Python."""
        self._state.state[ARMED] = 0

    def log(self, wanted: bool) -> None:
        """Keep the events for `take_log`, or do not."""
        self._state.state[LOGS] = wanted

    def take_log(self) -> np.ndarray:
        """[events, 1 + top_k]: layer and choice of those since the last call."""
        count = int(self._state.state[LOGGED])
        self._state.state[LOGGED] = 0
        return self._state.log[:count].copy()
