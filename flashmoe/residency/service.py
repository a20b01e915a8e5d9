"""Serves one event: its experts come wave after wave, each read as soon as its slot is free."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

from flashmoe.cache.expert_cache import Wave
from flashmoe.memory.arena import Arena
from flashmoe.quant import Parameters
from flashmoe.reading.base import Arriving, Reader
from flashmoe.residency.pool import Pool
from flashmoe.residency.prefetch import Prefetcher
from flashmoe.residency.timings import Timings

Group = list[tuple[int, Parameters]]  # experts, each with its parameters
_Turn = tuple[int, int]  # a key, and the slot that it is or will be in


class Service:
    """One event of a layer, from the cache's first decision to its last expert computed.

    The cache decides a wave ahead. So where one wave computes, the next is read already, into
    slots that were computed from; its decisions are the same as if it had been asked later.
    """

    def __init__(
        self,
        layer: int,
        pool: Pool,
        reader: Reader,
        prefetcher: Prefetcher,
        timings: Timings,
        bypass: Arena | None,
        *,
        ascending: bool,
    ) -> None:
        """bypass: the bypass slots, all free, of which a wave may speak.

        ascending: in this order only, since outputs that come before their turn in the sum would
        have to be kept, of a long event too many.
        """
        self._layer = layer
        self._pool = pool
        self._reader = reader
        self._prefetcher = prefetcher
        self._timings = timings
        self._bypass = bypass
        self._ascending = ascending
        self._first_key = pool.first_key(layer)
        self._reads: dict[int, Arriving] = {}  # by key, in the order in which they began
        self._missing: dict[int, int] = {}  # slot by key, until its bytes are there

    def groups(self, waves: Iterator[Wave], guess: Callable[[], None]) -> Generator[Group]:
        """As `Residency.serve`. guess: called when the last wave's reads have begun."""
        try:
            wave = self._decide(waves)
            self._begin(wave.loads if wave else [])
            while wave:
                following = self._decide(waves)
                if not following:
                    guess()  # now that the drive is busy with what is surely needed
                yield from self._compute(wave, following)
                wave = following
        except BaseException:  # a failed read, Ctrl-C, or a caller that stops early
            for read in self._reads.values():
                read.exception()  # waits for it
            for key, slot in self._missing.items():
                if self._pool.cache.residency.slot_of[key] == slot:  # not evicted since
                    self._pool.cache.forget(key)
            raise

    def _decide(self, waves: Iterator[Wave]) -> Wave | None:
        wave = next(waves, None)
        if wave:
            self._missing.update(wave.loads)
            for slot, outside in wave.moves:
                self._pool.arena.exchange(slot, *self._where(outside))
        return wave

    def _where(self, slot: int) -> tuple[Arena, int]:
        """The arena in which a slot of the cache's numbering lies, and its number there."""
        arena = self._pool.arena
        if slot < arena.n_slots:
            return arena, slot
        assert self._bypass, "a policy that bypasses has slots for it"
        return self._bypass, slot - arena.n_slots

    def _compute(self, wave: Wave, following: Wave | None) -> Generator[Group]:
        """Resident experts first, while others are read; or each in ascending order."""
        loads = dict(wave.loads)
        turns = wave.hits + [(key, loads[key]) for key in self._reads if key in loads]
        turns = (sorted(turns) if self._ascending else turns)[::-1]
        in_use = {slot for _, slot in turns}
        waiting = {slot: key for key, slot in following.loads} if following else {}
        self._begin([(key, slot) for slot, key in waiting.items() if slot not in in_use])
        while turns:
            group = self._next_group(turns, alone=bool(following))
            started = time.perf_counter()
            yield [(key - self._first_key, self._parameters(slot)) for key, slot in group]
            self._timings.compute_seconds += self._timings.since(started, "experts")
            if following and self._pool.arena.computes_at_once:
                self._begin([(waiting[s], s) for _, s in group if s in waiting])
        if following and not self._pool.arena.computes_at_once:
            self._pool.arena.synchronize()
            self._begin([(key, slot) for slot, key in waiting.items() if slot in in_use])

    def _next_group(self, turns: list[_Turn], *, alone: bool) -> list[_Turn]:
        """Take from the end of `turns` who is next, and who is there as well by then.

        alone: one at a time, because its slot is wanted.
        """
        group = [turns.pop()]
        self._wait_for(self._reads.get(group[0][0]))
        while turns and not (alone or self._ascending) and self._is_there(turns[-1][0]):
            group.append(turns.pop())
        for key, _ in group:
            self._missing.pop(key, None)
        return group

    def _begin(self, loads: Sequence[_Turn]) -> None:
        """Start reading `loads`; first what a guess has begun with."""
        if not loads:
            return
        layer = self._layer
        others = []
        for key, slot in loads:
            expert, (arena, number) = key - self._first_key, self._where(slot)
            if read := self._prefetcher.claim(layer, expert, arena, number):
                self._reads[key] = read
            else:
                others.append((key, expert, arena, number))
        for _, _, arena, number in others:
            self._prefetcher.leave(arena, number)
        memories = [(e, arena.memory_for(number, layer, e)) for _, e, arena, number in others]
        futures = self._reader.submit(layer, memories)
        self._reads.update(zip((key for key, *_ in others), futures, strict=True))

    def _parameters(self, slot: int) -> Parameters:
        arena, number = self._where(slot)
        return arena.parameters[number]

    def _is_there(self, key: int) -> bool:
        read = self._reads.get(key)
        return read is None or (read.done() and read.exception() is None)

    def _wait_for(self, read: Arriving | None) -> None:
        if read:
            started = time.perf_counter()
            read.result()
            self._timings.wait_seconds += time.perf_counter() - started
