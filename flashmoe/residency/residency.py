"""Brings experts to whoever computes with them: from their slots, or from the drive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np

from flashmoe.cache.expert_cache import Wave
from flashmoe.cache.serving import is_long
from flashmoe.quant import Parameters
from flashmoe.reading.base import Arriving, Reader
from flashmoe.reading.read_queue import Span
from flashmoe.residency.pool import Pool
from flashmoe.residency.pools import NewArena, Pools
from flashmoe.residency.prefetch import Prefetcher
from flashmoe.residency.routing import Routing
from flashmoe.residency.timings import Timings
from flashmoe.util.native_lock import NativeLock

Group = list[tuple[int, Parameters]]  # experts, each with its parameters
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
            guesses = self.prefetcher.spares is not None
            if guesses:
                self.prefetcher.drop(layer, event.keys - first_key)
            for number, wave in enumerate(pool.cache.waves(event)):
                if number > 0:
                    # Later waves overwrite slots that the previous wave may still compute from.
                    pool.arena.synchronize()
                first = guesses and number == 0
                guess = partial(self._guess, layer + 1, likely) if first else None
                yield from self._serve_wave(layer, pool, wave, guess, ascending=is_long(event))

    def _serve_wave(
        self,
        layer: int,
        pool: Pool,
        wave: Wave,
        guess: Callable[[], None] | None,
        *,
        ascending: bool,
    ) -> Generator[Group, None, None]:
        """Resident experts first, while the others are read; or each in ascending order.

        Of a long event, an output that came before its turn in the sum would have to be kept.
        """
        first_key = pool.first_key(layer)
        loads = sorted(wave.loads) if ascending else wave.loads
        missing = dict(loads)  # slot by key, until its bytes are there
        reads: dict[int, Arriving] = {}  # by key
        try:
            self._start_reads(layer, pool, loads, reads)
            if guess:
                guess()  # now that the drive is busy with what is surely needed
            turns = wave.hits + [(key, missing[key]) for key in reads]
            turns = (sorted(turns) if ascending else turns)[::-1]
            while turns:
                group = [turns.pop()]
                self._wait_for(reads.get(group[0][0]))
                while turns and not ascending and self._is_there(reads.get(turns[-1][0])):
                    group.append(turns.pop())
                for key, _ in group:
                    missing.pop(key, None)
                started = time.perf_counter()
                yield [(key - first_key, pool.arena.parameters[slot]) for key, slot in group]
                self.timings.compute_seconds += self.timings.since(started, "experts")
                self._give_back(but=pool)
        except BaseException:  # a failed read, Ctrl-C, or a caller that stops early
            for read in reads.values():
                read.exception()  # waits for it
            for key in missing:
                pool.cache.forget(key)
            raise

    def _start_reads(
        self, layer: int, pool: Pool, loads: list[tuple[int, int]], reads: dict[int, Arriving]
    ) -> None:
        """Start reading `loads` (key, slot) into `reads`; first what a guess has begun with."""
        first_key = pool.first_key(layer)
        for key, slot in loads:
            if read := self.prefetcher.claim(layer, key - first_key, pool.arena, slot):
                reads[key] = read
        others = [(key, slot) for key, slot in loads if key not in reads]
        experts = [(key - first_key, slot) for key, slot in others]
        extents = [(e, pool.arena.memory_for(slot, layer, e)) for e, slot in experts]
        futures = self.reader.submit(layer, extents)
        reads.update(zip((key for key, _ in others), futures, strict=True))

    def _give_back(self, but: Pool) -> None:
        """Do not let whoever needs memory wait for the end of a prompt's layer."""
        if self.asked_bytes is not None:
            self.pools.shrink(self.asked_bytes, but)
            self.asked_bytes = None

    def _is_there(self, read: Arriving | None) -> bool:
        return read is None or (read.done() and read.exception() is None)

    def _wait_for(self, read: Arriving | None) -> None:
        if read:
            started = time.perf_counter()
            read.result()
            self.timings.wait_seconds += time.perf_counter() - started

    def _guess(self, layer: int, likely: Likely) -> None:
        if layer < len(self.manifest.layers):
            self.prefetcher.guess(layer, likely, self.pools.of(layer).slot_of(layer))

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
