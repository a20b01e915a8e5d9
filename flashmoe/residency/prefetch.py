"""Reads guessed experts into spare slots while the drive would stand idle."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
import torch

from flashmoe.engines.transformers.lookahead import Lookahead
from flashmoe.memory.arena import Arena
from flashmoe.reading.reader import Extent, ExtentReader

# Below, a read is over before the guess is made: see docs/speed.md.
PAYS_FROM_BYTES = 1 << 20
# A wrong guess delays the demand behind it by some 3 ms of the 5 that a right one saves. When
# fewer of the last 64 or so were right, only one layer in PROBES is guessed for.
RIGHT_ENOUGH, MEMORY, PROBES = 0.3, 64, 16


@dataclass
class Guesses:
    """What guesses were worth, since the last reset; engines keep it when they resize."""

    used: int = 0  # misses that a guess had begun to read
    wasted: int = 0  # guesses begun in vain
    wasted_bytes: int = 0

    def reset(self) -> None:
        self.used = self.wasted = self.wasted_bytes = 0


@dataclass(eq=False)
class _Guess:
    spare: int
    extent: Extent


class Prefetcher:
    """Guesses of one model, in spare slots that all its layers share.

    Neither the cache nor its policy hears of a guess. A right one spares its miss the read:
    the spare slot and the one that the cache gives the expert change places. A wrong one is
    overwritten by the next. So hits, misses and evictions are the same with and without, and
    a guess never costs a resident expert its slot.
    """

    def __init__(
        self, lookahead: Lookahead, spares: Arena, reader: ExtentReader, counts: Guesses
    ) -> None:
        self.lookahead = lookahead
        self.spares = spares
        self.reader = reader
        self.counts = counts
        self._right = 1.0  # the recent share of guesses begun that were needed
        self._calls = 0
        self._guesses: dict[tuple[int, int], _Guess] = {}  # by layer and expert
        self._free = list(range(spares.n_slots))
        self._leaving: list[_Guess] = []  # dropped, with a piece still being written

    def guess(self, layer: int, hidden: torch.Tensor, slot_of: np.ndarray) -> None:
        """Start on the experts that `layer` will need: hidden [tokens, width] is a lower one's.

        slot_of: by expert of `layer`, -1 for those that are not resident, which alone are read.
        Those that more of the tokens would choose come first, then the router's favourites.
        """
        self.collect()
        self._calls += 1
        if not self._free or (self._right < RIGHT_ENOUGH and self._calls % PROBES):
            return
        guess = self.lookahead.route(layer, hidden)
        if guess is None:
            return
        chosen = guess.experts[0].tolist() if len(hidden) == 1 else _by_votes(guess.experts)
        missing = [expert for expert in chosen if slot_of[expert] < 0]
        for expert in missing[: len(self._free)]:
            spare = self._free.pop()
            extent = self.reader.guess(layer, expert, self.spares.slots[spare])
            self._guesses[layer, expert] = _Guess(spare, extent)

    def claim(self, layer: int, expert: int, arena: Arena, slot: int) -> Future[None] | None:
        """Give a missing expert's `slot` the memory into which it was guessed, if it was."""
        guess = self._guesses.pop((layer, expert), None)
        if guess is None:
            return None
        if guess.extent.pieces_left < len(guess.extent.reads):
            self.counts.used += 1
            self._right += (1 - self._right) / MEMORY
        arena.exchange(slot, self.spares, guess.spare)
        self._free.append(guess.spare)  # it holds the memory of the slot now, which is free
        return self.reader.claim(guess.extent)

    def drop(self, layer: int, needed: Collection[int] = ()) -> None:
        """`layer` knows which experts are `needed`: what else was guessed for it was wrong."""
        for key in [k for k in self._guesses if k[0] == layer and k[1] not in needed]:
            guess = self._guesses.pop(key)
            self.reader.drop(guess.extent)
            self._leaving.append(guess)

    def collect(self) -> None:
        """Count the guesses that are known to be wrong by now, whose spare slots are free again."""
        for guess in [guess for guess in self._leaving if guess.extent.arrived.done()]:
            self._leaving.remove(guess)
            self._free.append(guess.spare)
            if guess.extent.bytes_read:
                self.counts.wasted += 1
                self.counts.wasted_bytes += guess.extent.bytes_read
                self._right -= self._right / MEMORY

    def clear(self) -> None:
        """Drop all guesses, and wait until nothing is written any more."""
        for layer in {layer for layer, _ in self._guesses}:
            self.drop(layer)
        wait([guess.extent.arrived for guess in self._leaving])
        self.collect()

    def close(self) -> None:
        """Free the spare slots, once the reader is closed."""
        self._guesses.clear()
        self._leaving.clear()
        self.spares.close()


def _by_votes(index: torch.Tensor) -> list[int]:
    votes = torch.bincount(index.reshape(-1))
    chosen: list[int] = votes.argsort(descending=True)[: int((votes > 0).sum())].tolist()
    return chosen
