"""Reads experts that may be needed next into spare slots, while the drive would stand idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np

from flashmoe.memory.arena import Arena
from flashmoe.reading.base import Reader
from flashmoe.reading.reader import Extent, ExtentReader
from flashmoe.residency.guess_record import GuessRecord

# Smaller experts arrive before the guess is made (docs/speed.md#small-experts).
PREFETCH_FROM_BYTES = 1 << 20


@dataclass(eq=False)
class _PendingGuess:
    spare: int  # slot
    extent: Extent


class Prefetcher:
    """Guesses of one model, in spare slots that all its layers share.

    Neither the cache nor its policy hears of a guess. A right one spares its miss the read:
    the spare slot and the one that the cache gives the expert change places. A wrong one is
    overwritten by the next. So hits, misses and evictions are the same with and without, and
    a guess never costs a resident expert its slot. Without spare slots it does nothing.
    """

    def __init__(self, reader: Reader, *, enabled: bool = True) -> None:
        self._any_reader = reader
        self.pays = enabled and reader.manifest.layers[0].extent_bytes >= PREFETCH_FROM_BYTES
        self.record = GuessRecord()
        self.spares: Arena | None = None
        self.use(None)

    def use(self, spares: Arena | None) -> None:
        """Guess into these slots from now on; nothing may be on its way into the old ones."""
        if self.spares and self.spares is not spares:
            self.spares.close()
        self.spares = spares
        self._free = list(range(spares.n_slots)) if spares else []
        self._pending: dict[tuple[int, int], _PendingGuess] = {}  # by layer and expert
        self._leaving: list[_PendingGuess] = []  # dropped, with a piece still being written

    def guess(
        self, layer: int, likely: Callable[[], Sequence[int] | None], slot_of: np.ndarray
    ) -> None:
        """Start on the experts that `layer` will need.

        likely: its experts, the most probable first; asked only if there is room for them, and if
            a guess saves more time than it takes.
        slot_of: by expert of `layer`, -1 for those that are not resident, which alone are read.
        """
        self.collect()
        if not self._free or not self.record.saves_time(self._reader.extent_seconds(layer)):
            return
        started = time.perf_counter()
        missing = [expert for expert in likely() or () if slot_of[expert] < 0]
        self.record.add_guess(time.perf_counter() - started)
        for expert in missing[: len(self._free)]:
            spare = self._free.pop()
            memory = self._arena.memory_for(spare, layer, expert)
            extent = self._reader.guess(layer, expert, memory)
            self._pending[layer, expert] = _PendingGuess(spare, extent)

    @property
    def _reader(self) -> ExtentReader:
        assert isinstance(self._any_reader, ExtentReader), "guesses go into slots"
        return self._any_reader

    @property
    def _arena(self) -> Arena:
        assert self.spares, "a guess needs spare slots"
        return self.spares

    def claim(self, layer: int, expert: int, arena: Arena, slot: int) -> Future[None] | None:
        """Give a missing expert's `slot` the memory into which it was guessed, if it was."""
        guess = self._pending.pop((layer, expert), None)
        if guess is None:
            return None
        if guess.extent.pieces_left < len(guess.extent.reads):
            self.record.add_right()
        arena.exchange(slot, self._arena, guess.spare)
        self._free.append(guess.spare)  # it holds the memory of the slot now, which is free
        return self._reader.promote(guess.extent)

    def drop(self, layer: int, needed: Collection[int] = ()) -> None:
        """`layer` knows which experts are `needed`: what else was guessed for it was wrong."""
        for key in [k for k in self._pending if k[0] == layer and k[1] not in needed]:
            guess = self._pending.pop(key)
            self._reader.cancel(guess.extent)
            self._leaving.append(guess)

    def collect(self) -> None:
        """Count the guesses that are known to be wrong by now, whose spare slots are free again."""
        for guess in [guess for guess in self._leaving if guess.extent.arrived.done()]:
            self._leaving.remove(guess)
            self._free.append(guess.spare)
            if guess.extent.bytes_read:
                self.record.add_wrong(guess.extent.bytes_read)

    def clear(self) -> None:
        """Drop all guesses, and wait until nothing is written any more."""
        for layer in {layer for layer, _ in self._pending}:
            self.drop(layer)
        wait([guess.extent.arrived for guess in self._leaving])
        self.collect()

    def reset_counts(self) -> None:
        """What guesses were worth, since now."""
        self.collect()
        self.record.reset_counts()
