"""Serves whole events to an engine whose kernels take all of a layer's experts together."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import numpy as np

from flashmoe.residency import warm_start
from flashmoe.residency.residency import Residency
from flashmoe.residency.warm_start import Place

Drop = Callable[[int, int], None]  # (layer, expert): its memory is given back


class AtOnce:
    """Experts that lie in places of their own, of which the cache says which are filled.

    An event may need more experts than a layer has slots: those beyond are transient, in memory
    until the next event begins. The budget has room for them (see `budget.divide`).
    """

    def __init__(self, residency: Residency, place: Place, drop: Drop) -> None:
        self.residency = residency
        self._place = place
        self._drop = drop
        self._present: list[set[int]] = [set() for _ in residency.manifest.layers]
        self._last_layer = 0  # where transient experts may be

    def make_ready(self, layer: int, rows: np.ndarray) -> None:
        """Fill the places of every expert that `rows` [tokens, top_k] name.

        They stay filled until the next call. Raises what a failed read raises; then no expert that
        was to be read counts as resident.
        """
        residency = self.residency
        with residency.lock:
            started = time.perf_counter()
            self._empty_but(self._last_layer, set())
            pool = residency.pools.of(layer)
            first_key = pool.first_key(layer)
            event = residency.routing.event(layer, rows, None, first_key, pool.n_experts)
            for _ in pool.cache.waves(event):  # which only decides
                pass
            needed = set((event.keys - first_key).tolist())
            present = self._present[layer]
            self._empty_but(layer, needed)
            self._read(layer, sorted(needed - present))
            present |= needed
            self._last_layer = layer
            residency.timings.total_seconds += residency.timings.since(started, "layer")

    def _resident(self, layer: int) -> set[int]:
        """The experts that the cache says are there."""
        return set(np.flatnonzero(self.residency.pools.of(layer).slot_of(layer) >= 0).tolist())

    def _read(self, layer: int, experts: list[int]) -> None:
        residency = self.residency
        started = time.perf_counter()
        loads = [(expert, self._place(layer, expert)) for expert in experts]
        reads = residency.reader.submit(layer, loads)
        try:
            for read in reads:
                read.result()
        except BaseException:
            wait(reads)
            self._forget(layer, experts)
            raise
        residency.timings.wait_seconds += time.perf_counter() - started

    def _forget(self, layer: int, experts: list[int]) -> None:
        """Empty the places that a failed read may have spoilt, with their neighbours' pages."""
        pool = self.residency.pools.of(layer)
        spoilt = {expert + step for expert in experts for step in (-1, 0, 1)}
        for expert in sorted(spoilt & set(range(pool.n_experts))):
            self._present[layer].discard(expert)
            self._drop(layer, expert)
            if pool.slot_of(layer)[expert] >= 0:
                pool.cache.forget(pool.first_key(layer) + expert)

    def _empty_but(self, layer: int, needed: set[int]) -> None:
        """Give back what is present, but neither resident nor `needed`."""
        for expert in self._present[layer] - self._resident(layer) - needed:
            self._present[layer].discard(expert)
            self._drop(layer, expert)

    def restore(self, path: Path) -> int:
        """As `warm_start.restore`, into the experts' own places."""
        count = warm_start.restore(self.residency, path, self._place)
        for layer, present in enumerate(self._present):
            present |= self._resident(layer)
        return count

    def empty_all(self) -> None:
        """Give back what is not resident any more, after a reset or a resize."""
        for layer in range(len(self._present)):
            self._empty_but(layer, set())
