"""Reads experts that may be needed next into slots that nobody uses, while the drive is idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from flashmoe.memory.arena import Arena
from flashmoe.reading.base import Reader
from flashmoe.reading.reader import Extent, ExtentReader
from flashmoe.residency.guess_record import GuessRecord
from flashmoe.residency.pool import Pool

# Smaller experts arrive before the guess is made (docs/speed.md#small-experts).
PREFETCH_FROM_BYTES = 1 << 20
_Place = tuple[Arena, int]  # an arena, and a slot of it


@dataclass(eq=False)
class _Guess:
    place: _Place
    extent: Extent


class Prefetcher:
    """Guesses of one model, in empty slots of a layer's own and in spare slots that all share.

    Neither a cache nor its policy hears of a guess. A right one spares its miss the read: the
    slot that the cache gives the expert and the guess's change places. A wrong one is
    overwritten by the next. So hits, misses and evictions are the same with and without, and
    a guess never costs a resident expert its slot.
    """

    def __init__(self, reader: Reader, *, enabled: bool = True) -> None:
        self._any_reader = reader
        self.pays = enabled and reader.manifest.layers[0].extent_bytes >= PREFETCH_FROM_BYTES
        self.record = GuessRecord()
        self.spares: Arena | None = None
        self.use(None)

    def use(self, spares: Arena | None) -> None:
        """Guess into these slots too from now on; no guess may be left of earlier ones."""
        if self.spares and self.spares is not spares:
            self.spares.close()
        self.spares = spares
        self._pending: dict[tuple[int, int], _Guess] = {}  # by layer and expert
        self._leaving: list[_Guess] = []  # dropped, with a piece still being written
        self._guess_at: dict[_Place, _Guess] = {}  # all of both

    def guess(self, layer: int, likely: Callable[[], Sequence[int] | None], pool: Pool) -> None:
        """Start on the experts that `layer`, which `pool` serves, will need.

        likely: its experts, in the order in which they are to be read; asked only if there is room
            for them, and if a guess saves more time than it takes.
        """
        self.collect()
        room = self._free_spares() + self._free_slots(pool)
        if not room or not self.record.saves_time(self._reader.extent_seconds(layer)):
            return
        started = time.perf_counter()
        slot_of = pool.slot_of(layer)
        missing = [expert for expert in likely() or () if slot_of[expert] < 0]
        self.record.add_guess(time.perf_counter() - started)
        for expert in missing:
            if room and (layer, expert) not in self._pending:
                arena, slot = place = room.pop()
                memory = arena.memory_for(slot, layer, expert)
                guess = _Guess(place, self._reader.guess(layer, expert, memory))
                self._pending[layer, expert] = self._guess_at[place] = guess

    @property
    def _reader(self) -> ExtentReader:
        assert isinstance(self._any_reader, ExtentReader), "guesses go into slots"
        return self._any_reader

    def _free_spares(self) -> list[_Place]:
        places = [(self.spares, slot) for slot in range(self.spares.n_slots)] if self.spares else []
        return [place for place in places if place not in self._guess_at]

    def _free_slots(self, pool: Pool) -> list[_Place]:
        """Of the pool's own, which its cache fills from the end."""
        places = [(pool.arena, slot) for slot in pool.cache.free]
        return [place for place in places if place not in self._guess_at]

    @property
    def bytes_in_slots(self) -> int:
        """Of guesses in slots of which caches know as empty."""
        return sum(arena.extent_bytes for arena, _ in self._guess_at if arena is not self.spares)

    def claim(self, layer: int, expert: int, arena: Arena, slot: int) -> Future[None] | None:
        """Give a missing expert's `slot` the memory into which it was guessed, if it was."""
        guess = self._pending.pop((layer, expert), None)
        if guess is None:
            return None
        if guess.extent.pieces_left < len(guess.extent.reads):
            self.record.add_right()
        self._exchange(guess.place, (arena, slot))
        del self._guess_at[guess.place]
        return self._reader.promote(guess.extent)

    def leave(self, arena: Arena, slot: int) -> None:
        """`slot` gets another expert than was guessed into it, which no guess may spoil."""
        guess = self._guess_at.get((arena, slot))
        if guess is None:
            return
        spares = self._free_spares()
        self._exchange(guess.place, spares[0] if spares else self._give_up_for(guess))

    def _give_up_for(self, guess: _Guess) -> _Place:
        """Free the place of the same layer's last guess, of which the least was read."""
        last = guess
        if not guess.extent.cancelled:
            of_layer = [key for key in self._pending if key[0] == guess.extent.layer]
            last = self._pending[of_layer[-1]]
            self._drop(last)
        wait([last.extent.arrived])
        self.collect()
        return last.place

    def _exchange(self, one: _Place, other: _Place) -> None:
        """Two places' memory, and the guesses that are read into it."""
        if one == other:
            return
        (arena, slot), (other_arena, other_slot) = one, other
        arena.exchange(slot, other_arena, other_slot)
        guesses = self._guess_at.pop(one, None), self._guess_at.pop(other, None)
        for guess, place in zip(guesses, (other, one), strict=True):
            if guess:
                guess.place, self._guess_at[place] = place, guess

    def drop(self, layer: int, needed: Collection[int] = ()) -> None:
        """`layer` knows which experts are `needed`: what else was guessed for it was wrong."""
        for key in [k for k in self._pending if k[0] == layer and k[1] not in needed]:
            self._drop(self._pending[key])

    def _drop(self, guess: _Guess) -> None:
        del self._pending[guess.extent.layer, guess.extent.expert]
        self._reader.cancel(guess.extent)
        self._leaving.append(guess)

    def collect(self) -> None:
        """Count the guesses that are known to be wrong by now, whose places are free again."""
        for guess in [guess for guess in self._leaving if guess.extent.arrived.done()]:
            self._leaving.remove(guess)
            del self._guess_at[guess.place]
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
