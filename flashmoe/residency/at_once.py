"""Serves whole events to an engine whose kernels take all of a layer's experts together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flashmoe.errors import FlashMoEError
from flashmoe.reading.range_reader import RangeRead, RangeReader
from flashmoe.residency.places import Expert, FilledPlaces, Places
from flashmoe.residency.residency import Residency

Likely = Callable[[], Sequence[int]]  # experts of the next layer, most probable first


class AtOnce:
    """Fills the places of an event's experts before its layer is computed.

    The cache decides who is resident, as for every engine, and the places say whose bytes are
    there. A prompt's event may need more experts than its layer has slots: it borrows the room of
    residents of layers just passed, whose bytes are read again when they are needed. Guesses fill
    places of the next layer while this one is computed.
    """

    def __init__(self, residency: Residency, places: Places, reader: RangeReader) -> None:
        self.residency = residency
        self.filled = FilledPlaces(residency.manifest, places, residency.pools.memory_bytes)
        self._reader = reader
        self._guesses: dict[Expert, RangeRead] = {}  # on their way, or there and not asked for yet
        self._leaving: dict[Expert, RangeRead] = {}  # wrong ones, of which bytes may still come

    def make_ready(self, layer: int, rows: np.ndarray, likely: Likely | None = None) -> None:
        """Fill the places of every expert that `rows` [tokens, top_k] name.

        They stay filled until the next call. likely: what the layer above will probably need.
        Raises what a failed read raises; then no expert that was to be read counts as resident.
        """
        residency = self.residency
        with residency.lock:
            started = time.perf_counter()
            pool = residency.pools.of(layer)
            first_key = pool.first_key(layer)
            event = residency.routing.event(layer, rows, None, first_key, pool.n_experts)
            needed = (event.keys - first_key).tolist()
            keep = {(layer, expert) for expert in needed}
            reads = self._end_guesses(layer, needed)
            try:
                self._start_reads(layer, needed, keep, reads, lend=False)
                pool.cache.serve(event)  # while the drive is busy
                self._start_reads(layer, needed, keep, reads, lend=True)
                if likely and residency.prefetcher.pays:
                    self._guess(layer, keep, likely, lend=len(needed) > pool.cache.n_slots)
                self._wait_for(reads)
            except BaseException:  # a failed read, or Ctrl-C
                for read in reads.values():
                    read.settle()
                self._forget(layer, reads)
                raise
            self._collect(layer)  # nothing is written to this layer's pages while it computes
            if any(expert not in self.filled.of[layer] for expert in needed):
                raise FlashMoEError(
                    f"{self._reader.backend.path}: a read ahead failed, beside experts that "
                    f"MoE layer {layer} needs now"
                )
            residency.timings.total_seconds += residency.timings.since(started, "layer")

    def _start_reads(
        self,
        layer: int,
        needed: list[int],
        keep: set[Expert],
        reads: dict[int, RangeRead],
        *,
        lend: bool,
    ) -> None:
        """Begin to read what is missing of `needed` into `reads`: what there is room for.

        lend: make room for all. There is room for any layer's experts, but for what wrong guesses
        still take.
        """
        missing = [expert for expert in needed if expert not in self.filled.of[layer]]
        if not missing:
            return
        experts = self.filled.fill(layer, missing, self._victims(layer, keep, lend=lend))
        rest = missing[len(experts) :]
        if lend and rest:
            for leaving in self._leaving.values():
                leaving.settle()
            self._collect()
            experts += self.filled.fill(layer, rest, self._victims(layer, keep, lend=True))
        reads.update((read.expert, read) for read in self._reader.demand(layer, experts))

    def _victims(self, layer: int, keep: set[Expert], *, lend: bool) -> Iterator[Expert]:
        """Whose places may be emptied: of experts that are not resident; to `lend`, of any.

        This layer and those just passed come first, since they are wanted again last.
        """
        keep = keep.union(self._guesses, self._leaving)  # something is written to these
        n_layers = len(self.residency.manifest.layers)
        for residents_too in (False, True) if lend else (False,):
            for back in range(n_layers):
                lender = (layer - back) % n_layers
                slot_of = self.residency.pools.of(lender).slot_of(lender).tolist()
                for expert in list(self.filled.of[lender]):
                    may_go = residents_too or slot_of[expert] < 0
                    if may_go and (lender, expert) not in keep:
                        yield lender, expert

    def _guess(self, layer: int, keep: set[Expert], likely: Likely, *, lend: bool) -> None:
        """Begin to read what the next layer will probably need, where there is room for it."""
        record = self.residency.prefetcher.record
        above = layer + 1
        if above == len(self.filled.of) or not record.is_worth_a_call():
            return
        filled = self.filled.of[above]
        if len(filled) == self.residency.manifest.layers[above].n_experts:
            return
        guesses = likely()
        missing = [expert for expert in guesses if expert not in filled]
        keep = keep.union((above, expert) for expert in guesses)
        victims = self._victims(layer, keep, lend=lend)
        for read in self._reader.guess(above, self.filled.fill(above, missing, victims)):
            self._guesses[above, read.expert] = read

    def _end_guesses(self, layer: int, needed: list[int]) -> dict[int, RangeRead]:
        """What was guessed and is needed, on its way; what was wrong is cancelled."""
        self._collect(layer)
        reads = {}
        record = self.residency.prefetcher.record
        for key, read in self._guesses.items():
            if key[0] == layer and key[1] in needed:
                if read.has_begun:
                    record.add_right()
                self._reader.promote(read)
                reads[key[1]] = read
            elif read.done() and read.exception() is None:
                record.add_wrong(read.bytes_read)  # but the layer's next token may need it
            else:
                self._reader.cancel(read)
                self._leaving[key] = read
        self._guesses.clear()
        return reads

    def _collect(self, layer: int | None = None) -> None:
        """Empty the places of wrong guesses that nothing is written to any more.

        Waits for those of `layer`, of which somebody may read again.
        """
        for key, read in list(self._leaving.items()):
            if key[0] == layer:
                read.settle()
            if read.done():
                del self._leaving[key]
                self.filled.empty(*key)
                if read.exception():
                    self._forget(key[0], [key[1]])
                if read.bytes_read:
                    self.residency.prefetcher.record.add_wrong(read.bytes_read)

    def _wait_for(self, reads: dict[int, RangeRead]) -> None:
        started = time.perf_counter()
        for read in reads.values():
            read.result()
        if reads:
            self._reader.backend.check_unchanged()
        self.residency.timings.wait_seconds += time.perf_counter() - started

    def _forget(self, layer: int, experts: Iterable[int]) -> None:
        """Empty the places that a failed read may have spoilt: its own, and its neighbours'."""
        pool = self.residency.pools.of(layer)
        spoilt = {expert + step for expert in experts for step in (-1, 0, 1)}
        for expert in sorted(spoilt.intersection(range(pool.n_experts))):
            self.filled.empty(layer, expert)
            if pool.slot_of(layer)[expert] >= 0:
                pool.cache.forget(pool.first_key(layer) + expert)

    def take_restored(self) -> None:
        """Every resident was just read into its place."""
        for layer in range(len(self.filled.of)):
            slot_of = self.residency.pools.of(layer).slot_of(layer)
            self.filled.take(layer, np.flatnonzero(slot_of >= 0).tolist())

    def trim(self) -> None:
        """After a reset or a resize: empty the places of all that is not resident any more.

        A resident whose room was lent stays absent, and is read when it is needed.
        """
        with self.residency.lock:
            for key, read in self._guesses.items():
                self._reader.cancel(read)
                self._leaving[key] = read
            self._guesses.clear()
            for layer, filled in enumerate(self.filled.of):
                self._collect(layer)
                slot_of = self.residency.pools.of(layer).slot_of(layer)
                for expert in [expert for expert in filled if slot_of[expert] < 0]:
                    self.filled.empty(layer, expert)
            self.filled.limit_bytes = self.residency.pools.memory_bytes
