"""Serves whole events to an engine whose kernels take all of a layer's experts together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

import numpy as np

from flashmoe.cache.serving import decide
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading.range_reader import RangeReader
from flashmoe.reading.range_work import BYTES, FAILURE
from flashmoe.residency import at_once_work, place_work
from flashmoe.residency.at_once_work import (
    AWAITED,
    BEGIN,
    FINISH,
    GUESS,
    N_GUESSED,
    N_KEYS,
    N_LEAVING,
    N_LIKELY,
    N_NEEDED,
    N_SLOTS,
    NOTE,
    READS,
    READY,
    SPOILT,
    TOTAL,
    Whole,
)
from flashmoe.residency.place_work import BYTES as HELD_BYTES
from flashmoe.residency.place_work import (
    FILLED,
    GUESSED,
    KEPT_BYTES,
    LEAVING,
    LIMIT_BYTES,
    NEEDED,
    Places,
)
from flashmoe.residency.residency import Residency
from flashmoe.util.by_address import words_of

Likely = Callable[[], Sequence[int]]  # experts of the next layer, most probable first


class AtOnce:
    """Fills the places of an event's experts before its layer is computed.

    The cache decides who is resident, as for every engine, and the places say whose bytes are
    there. A prompt's event may need more experts than its layer has slots: it borrows the room of
    residents of layers just passed, whose bytes are read again when they are needed. Guesses fill
    places of the next layer while this one is computed.
    """

    def __init__(self, residency: Residency, reader: RangeReader) -> None:
        self.residency = residency
        self._reader = reader
        manifest, backend = residency.manifest, reader.backend
        extent_bytes = [layer.extent_bytes for layer in manifest.layers]
        self.places = Places.empty(extent_bytes, manifest.first_experts, backend.pages)
        self.places.sizes[LIMIT_BYTES] = residency.pools.memory_bytes
        record = residency.prefetcher.record
        self.whole = Whole.empty(
            self.places, reader.queue.shared, backend.ranges, backend.n_ranges, record.array
        )
        self.words = words_of(self.whole)
        self.work = at_once_work.compiled(self.whole)
        self._empty: Any = kernel(place_work.empty, Policy)
        self.use_caches()

    def use_caches(self) -> None:
        """Go by the pools' caches, which may be others than before."""
        pools = self.residency.pools
        largest_bytes = int(self.places.extent_bytes.max())
        self.places.sizes[KEPT_BYTES] = pools.slots.bypass * largest_bytes
        for layer, row in enumerate(self.whole.pools):
            pool = pools.of(layer)
            cache = pool.cache
            first = self.places.first[pool.first_layer]
            slot_of = cache.residency.slot_of
            row[:] = first, len(slot_of), cache.n_slots, slot_of.ctypes.data
            if layer == pool.first_layer:
                self._step(NOTE, layer)
        cache = pools.all[0].cache
        event = Event.of_rows(np.zeros((1, self.residency.manifest.top_k), np.int64))
        self._decide = decide(cache.decision(event), type(cache.policy))
        self.whole.decide[0] = self._decide.address

    def make_ready(self, layer: int, rows: np.ndarray, likely: Likely | None = None) -> None:
        """Fill the places of every expert that `rows` [tokens, top_k] name.

        They stay filled until the next call. likely: what the layer above will probably need.
        Raises what a failed read raises; then that expert does not count as resident.
        """
        residency = self.residency
        with residency.lock:
            started = perf_counter()
            self._reader.queue.start_threads()
            self.end_abandoned()
            pool = residency.pools.of(layer)
            first_key = pool.first_key(layer)
            event = residency.routing.event(layer, rows, None, first_key, pool.n_experts)
            self._list(layer, (event.keys - first_key).tolist(), self.whole.needed, N_NEEDED)
            decision = words_of(pool.cache.decision(event))
            try:
                while (answer := self._step(BEGIN, layer, decision)) == SPOILT:
                    self._forget_spoilt()
                if answer == READY:
                    if likely and residency.prefetcher.pays:
                        self._guess(layer, likely)
                    answer = self._step(FINISH, layer)
                self.end(layer, answer)
            except BaseException:  # a failed read, Ctrl-C, or a guess that raised
                self._give_up(layer)
                raise
            self.whole.seconds[TOTAL] += perf_counter() - started

    def await_late(self) -> None:
        """Wait for late reads of the event at hand, if any are on their way; raises as `end`."""
        with self.residency.lock:
            if awaited := int(self.whole.counts[AWAITED]):
                self.end(awaited - 1, self._step(FINISH, awaited - 1))

    def end_abandoned(self) -> None:
        """End an event whose late reads the program never came to need; no error is told.

        Nothing is multiplied by its experts any more.
        """
        with suppress(FlashMoEError, OSError):
            self.await_late()
        self.whole.counts[N_NEEDED] = 0

    def end(self, layer: int, answer: int) -> None:
        """What is left to be done of an event for which `work` gave such an answer.

        Raises FlashMoEError where the layer cannot be computed, OSError where the file changed.
        """
        if answer == SPOILT:
            self._forget_spoilt()
            answer = self._step(FINISH, layer)
        if answer == READY:
            self._check_unchanged(layer)
            return
        for error in self._give_up(layer):
            raise error
        raise FlashMoEError(
            f"{self._reader.backend.path}: a read ahead failed, beside experts that MoE layer "
            f"{layer} needs now"
        )

    def _give_up(self, layer: int) -> list[BaseException]:
        """Wait for what the event at hand reads; forget what failed, and say why."""
        failed = {}
        for number, expert in self._needed(layer):
            self.places.marks[number] &= ~np.uint8(NEEDED)
            self._reader.queue.wait(number)
            error = self._reader.error_of(layer, expert)
            if error and self.places.marks[number] & FILLED:
                failed[expert] = error
        self._forget(layer, failed)
        self._forget_spoilt()
        return list(failed.values())

    def _needed(self, layer: int) -> list[tuple[int, int]]:
        """What the event at hand needs: numbers through all layers, and within this one."""
        needed = self.whole.needed[: self.whole.counts[N_NEEDED]]
        within = needed - self.places.first[layer]
        return list(zip(needed.tolist(), within.tolist(), strict=True))

    def _check_unchanged(self, layer: int) -> None:
        """After reads: whether the file was another one by then."""
        if self.whole.counts[READS]:
            try:
                self._reader.backend.check_unchanged()
            except OSError:
                self._forget(layer, [expert for _, expert in self._needed(layer)])
                raise

    def _step(self, step: int, layer: int, decision: np.ndarray | None = None) -> int:
        address = 0 if decision is None else decision.ctypes.data
        answer: int = self.work(self.words.ctypes.data, step, layer, address)
        return answer

    def _list(self, layer: int, experts: Sequence[int], into: np.ndarray, count: int) -> None:
        into[: len(experts)] = experts
        into[: len(experts)] += self.places.first[layer]
        self.whole.counts[count] = len(experts)

    def _guess(self, layer: int, likely: Likely) -> None:
        """Begin to read what the next layer will probably need, where there is room for it."""
        above = layer + 1
        if above == len(self.places.extent_bytes):
            return
        if not self.residency.prefetcher.record.is_worth_a_call():
            return
        first, end = self.places.first[above : above + 2]
        if not (self.places.marks[first:end] & FILLED).all():
            self._list(above, likely(), self.whole.likely, N_LIKELY)
            self._step(GUESS, layer)

    def _forget_spoilt(self) -> None:
        """Empty places of wrong guesses that have ended, and what failed ones have spoilt."""
        counts, first = self.whole.counts, self.places.first
        leaving = self.whole.leaving[: counts[N_LEAVING]].tolist()
        kept = []
        for number in leaving:
            if not self._reader.queue.is_done(number):
                kept.append(number)
                continue
            self.places.marks[number] &= ~np.uint8(LEAVING)
            layer = int(np.searchsorted(first, number, "right")) - 1
            self._empty(self.places, layer, number)
            if bytes_read := int(self._reader.queue.tickets[number, BYTES]):
                self.residency.prefetcher.record.add_wrong(bytes_read)
            if self._reader.queue.tickets[number, FAILURE]:
                self._forget(layer, [number - int(first[layer])])
        self.whole.leaving[: len(kept)] = kept
        counts[N_LEAVING] = len(kept)

    def _forget(self, layer: int, experts: Iterable[int]) -> None:
        """Empty the places that a failed read may have spoilt: its own, and its neighbours'."""
        pool = self.residency.pools.of(layer)
        spoilt = {expert + step for expert in experts for step in (-1, 0, 1)}
        for expert in sorted(spoilt.intersection(range(pool.n_experts))):
            number = int(self.places.first[layer]) + expert
            self._reader.queue.cancel(number)  # a guess of a neighbour may be on its way
            self._reader.queue.wait(number)
            self._empty(self.places, layer, number)
            if pool.slot_of(layer)[expert] >= 0:
                pool.cache.forget(pool.first_key(layer) + expert)
        self._step(NOTE, layer)

    def read_all(self) -> int:
        """Read every expert whose place is empty, where all have room; how many there were.

        The caches hear of none before it is chosen, so they count as ever. Raises FlashMoEError
        for the first read that fails.
        """
        places, pools = self.places, self.whole.pools
        if (pools[:, N_SLOTS] < pools[:, N_KEYS]).any():
            return 0
        take = kernel(place_work.take, Policy)
        with self.residency.lock:
            reads = []
            for layer, (first, end) in enumerate(itertools.pairwise(places.first.tolist())):
                absent = np.flatnonzero(places.marks[first:end] & FILLED == 0).tolist()
                for expert in absent:
                    take(places, layer, first + expert)
                memory_for = self.residency.pools.of(layer).arena.memory_for
                loads = [(expert, memory_for(expert, layer, expert)) for expert in absent]
                reads += self._reader.submit(layer, loads)
            failed = [(read, error) for read in reads if (error := read.exception())]  # waits
            for read, _ in failed:
                self._forget(read.layer, [read.expert])
            if failed:
                raise failed[0][1]
        return len(reads)

    def take_restored(self) -> None:
        """Every resident was just read into its place."""
        self.use_caches()
        take = kernel(place_work.take, Policy)
        for layer in range(len(self.places.extent_bytes)):
            slot_of = self.residency.pools.of(layer).slot_of(layer)
            for expert in np.flatnonzero(slot_of >= 0).tolist():
                take(self.places, layer, int(self.places.first[layer]) + expert)

    def trim(self) -> None:
        """After a reset or a resize: empty the places of all that is not resident any more.

        A resident whose room was lent stays absent, and is read when it is needed. What the event
        at hand needs stays where it is, if that was not ended: the program multiplies by it.
        """
        with self.residency.lock:
            self.use_caches()
            places, counts = self.places, self.whole.counts
            for number in self.whole.guessed[: counts[N_GUESSED]].tolist():
                self._reader.queue.cancel(number)
                places.marks[number] ^= GUESSED | LEAVING
                self.whole.leaving[counts[N_LEAVING]] = number
                counts[N_LEAVING] += 1
            counts[N_GUESSED] = 0
            for number in self.whole.leaving[: counts[N_LEAVING]].tolist():
                self._reader.queue.wait(number)
            self._forget_spoilt()
            places.sizes[LIMIT_BYTES] = self.residency.pools.memory_bytes
            in_use = set(self.whole.needed[: counts[N_NEEDED]].tolist())
            for layer in range(len(places.extent_bytes)):
                first = int(places.first[layer])
                for expert in np.flatnonzero(self.residency.pools.of(layer).slot_of(layer) < 0):
                    if first + int(expert) not in in_use:
                        self._empty(places, layer, first + int(expert))
            if in_use and places.sizes[HELD_BYTES] > places.sizes[LIMIT_BYTES]:
                self._make_room(list(in_use))

    def _make_room(self, in_use: list[int]) -> None:
        """Keep the limit all the same: residents of other layers lend their room."""
        places = self.places
        marked = places.marks[in_use]
        places.marks[in_use] |= NEEDED
        layer = int(np.searchsorted(places.first, in_use[0], "right")) - 1
        kernel(place_work.keep_limit, Policy)(places, layer)
        places.marks[in_use] = marked
