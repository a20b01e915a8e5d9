"""Brings experts to whoever computes with them: from their slots, or from the drive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from flashmoe.cache.serving import is_long
from flashmoe.reading.base import Reader
from flashmoe.reading.read_queue import Span
from flashmoe.residency.pool import Pool
from flashmoe.residency.pools import NewArena, Pools
from flashmoe.residency.prefetch import Prefetcher
from flashmoe.residency.routing import Routing
from flashmoe.residency.service import Group, Service
from flashmoe.residency.timings import Timings
from flashmoe.util.native_lock import NativeLock

Likely = Callable[[], Sequence[int] | None]  # experts of the next layer, most probable first


class Residency:
    """The experts of one loaded model: which are in memory, and how the others get there.

    One rule of locking: whoever serves a layer or changes anything here holds `lock`, so threads
    that generate at once are served in turn, layer by layer. Pools, caches and prefetcher have no
    lock of their own; reader and read queue do, because their threads fill the slots meanwhile.
    """

    def __init__(
        self,
        reader: Reader,
        memory_bytes: int,
        policy: str,
        new_arena: NewArena,
        *,
        prefetch: bool,
        whole_events: bool = False,
    ) -> None:
        """Raises FlashMoEError as `Pools` does; the reader stays open then."""
        self.reader = reader
        self.manifest = reader.manifest
        # machine code serves whole events too
        self.lock: Any = NativeLock() if whole_events else threading.RLock()
        self.timings = Timings()
        self.routing = Routing(self.manifest.top_k, len(self.manifest.layers))
        self.prefetcher = Prefetcher(self.reader, enabled=prefetch)
        self.asked_bytes: int | None = None  # a smaller budget, for which somebody waits
        self.pools = Pools(
            self.manifest,
            policy,
            memory_bytes,
            self.prefetcher,
            new_arena,
            whole_events=whole_events,
        )

    def serve(
        self, layer: int, rows: np.ndarray, weights: np.ndarray, likely: Likely
    ) -> Generator[Group, None, None]:
        """Each expert that `rows` [tokens, top_k] name, once, with its parameters when it is there.

        They come in groups of those that are there by then, such as all that were resident.
        weights: the router's, [tokens, top_k]. likely: what the layer above will probably need.
        The parameters may be used until the next group is asked for. Raises FlashMoEError when a
        read fails; then, and when the caller stops early, nothing half-read stays resident.
        """
        with self.lock:
            pool = self.pools.of(layer)
            first_key = pool.first_key(layer)
            event = self.routing.event(layer, rows, weights, first_key, pool.n_experts)
            self.prefetcher.drop(layer, event.keys - first_key)
            service = Service(
                layer,
                pool,
                self.reader,
                self.prefetcher,
                self.timings,
                self.pools.bypass,
                ascending=is_long(event),
            )
            missing = pool.cache.residency.slot_of[event.keys] < 0
            self.prefetcher.record.add_event(int(missing.sum()))
            guess = partial(self.guess, layer + 1, likely)
            with closing(service.groups(pool.cache.waves(event), guess)) as groups:
                for group in groups:
                    yield group
                    self._give_back(but=pool)

    def _give_back(self, but: Pool) -> None:
        """Do not let whoever needs memory wait for the end of a prompt's layer."""
        if self.asked_bytes is not None:
            self.pools.shrink(self.asked_bytes, but)
            self.asked_bytes = None

    def guess(self, layer: int, likely: Likely) -> None:
        """Begin to read what `layer` will probably need, if there is such a layer.

        likely: its experts, the most probable first; asked only if that may save time.
        """
        with self.lock:
            if self.prefetcher.pays and layer < len(self.manifest.layers):
                self.prefetcher.guess(layer, likely, self.pools.of(layer))
                self.pools.note_guesses()

    def reset(self) -> None:
        """Start cold: empty slots, fresh policies, counts at zero."""
        with self.lock:
            self.prefetcher.clear()
            self.pools.restart()
            self.reset_counts()

    def reset_counts(self) -> None:
        """Counts at zero; residency and the policies' statistics stay as they are."""
        with self.lock:
            self.timings.reset()
            self.reader.reset_counts()
            self.prefetcher.reset_counts()
            self.pools.reset_counts()

    def record_spans(self) -> list[Span]:
        """A list that from now on gets every read and computation: (what, start, end) in seconds.

        demand and guess are pieces read, experts is arithmetic, layer an experts module's time.
        """
        spans: list[Span] = []
        with self.lock:
            self.timings.spans = spans
            self.reader.record_spans(spans)
        return spans

    def stand_still(self) -> None:
        """Let the layer at hand end, and begin none until `go_on` (see `util.forks`)."""
        self.lock.acquire()
        self.reader.stand_still()

    def go_on(self, *, in_child: bool) -> None:
        self.reader.go_on(in_child=in_child)
        self.lock.release()
