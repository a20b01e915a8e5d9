"""Which places of experts are filled, and who makes room for whom, in machine code.

An expert's place lies in somebody else's memory, and takes memory once it was filled. Experts are
numbered through all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from mmap import MADV_DONTNEED
from typing import NamedTuple

import numpy as np

from flashmoe.util import libc
from flashmoe.util.machine_code import helper

# What is known of a place. FILLED: or about to be. RESIDENT: the cache's decision. NEEDED: by the
# event at hand. GUESSED, LEAVING: bytes may come, of a guess or of a wrong one. LIKELY: scratch.
FILLED, RESIDENT, NEEDED, GUESSED, LEAVING, LIKELY = (1 << bit for bit in range(6))
# Positions in `Places.sizes`. KEPT_BYTES: of the limit, what guesses leave to a token's experts
# that the cache does not keep, so that these never take a resident's room.
BYTES, MOST_BYTES, LIMIT_BYTES, CLOCK, KEPT_BYTES = range(5)
_STAYS = RESIDENT | GUESSED | LEAVING  # whose room the next event does not get
AROUND, BACK, PASS, LAST_PASS = range(4)  # positions in a search for victims
_MOVE = 1 | 2 | 4  # MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP (Linux 5.7)


class Places(NamedTuple):
    """All places of a model, within a budget of bytes."""

    first: np.ndarray  # [layers + 1] int64: the number of each layer's first expert
    extent_bytes: np.ndarray  # [layers] int64
    pages: np.ndarray  # [experts, kinds, 2] int64: addresses, from and to, of pages of its own
    marks: np.ndarray  # [experts] uint8
    since: np.ndarray  # [experts] int64: by CLOCK, when it was filled
    sizes: np.ndarray  # [5] int64

    @classmethod
    def empty(cls, extent_bytes: Sequence[int], first: Sequence[int], pages: np.ndarray):
        """Of layers with such experts."""
        return cls(
            np.array(first, np.int64),
            np.array(extent_bytes, np.int64),
            np.ascontiguousarray(pages, np.int64),
            np.zeros(first[-1], np.uint8),
            np.zeros(first[-1], np.int64),
            np.zeros(5, np.int64),
        )


@helper
def seek(around, lend):
    """A search for places that may be emptied, of experts that are not resident; `lend`: of any.

    The layer and those just passed come first, since they are wanted again last.
    """
    return np.array([around, 0, 0, int(lend)])


@helper
def next_victim(places, search):
    """The number of the next one, the longest filled of its layer, or -1."""
    n_layers = len(places.extent_bytes)
    while search[PASS] <= search[LAST_PASS]:
        taboo = NEEDED | GUESSED | LEAVING | LIKELY | (0 if search[PASS] else RESIDENT)
        while search[BACK] < n_layers:
            layer = (search[AROUND] - search[BACK]) % n_layers
            oldest = -1
            for number in range(places.first[layer], places.first[layer + 1]):
                if places.marks[number] & (taboo | FILLED) == FILLED and (
                    oldest < 0 or places.since[number] < places.since[oldest]
                ):
                    oldest = number
            if oldest >= 0:
                return oldest
            search[BACK] += 1
        search[BACK] = 0
        search[PASS] += 1
    return -1


@helper
def fill(places, layer, number, search):
    """Make room for one place of a layer and count it as filled; whether there was room.

    The first victim hands its memory on, so that no page has to be freed and cleared again.
    """
    sizes, extent_bytes = places.sizes, places.extent_bytes
    giver = -1
    while sizes[BYTES] + extent_bytes[layer] > sizes[LIMIT_BYTES]:
        victim = next_victim(places, search)
        if victim < 0:
            if giver >= 0:  # too small alone
                _drop(places.pages[giver])
            return False
        lender = (search[AROUND] - search[BACK]) % len(extent_bytes)
        places.marks[victim] &= ~np.uint8(FILLED)
        sizes[BYTES] -= extent_bytes[lender]
        if giver < 0:
            giver = victim
        else:
            _drop(places.pages[victim])
    if giver >= 0:
        _move(places.pages[giver], places.pages[number])
    take(places, layer, number)
    return True


@helper
def room_to_guess(places):
    """Bytes that guesses may still take, where they take no resident's room."""
    marks, first, extent_bytes = places.marks, places.first, places.extent_bytes
    room = places.sizes[LIMIT_BYTES] - places.sizes[KEPT_BYTES]
    for layer in range(len(extent_bytes)):
        held = 0
        for number in range(first[layer], first[layer + 1]):
            held += (marks[number] & FILLED != 0) & (marks[number] & _STAYS != 0)
        room -= held * extent_bytes[layer]
    return room


@helper
def take(places, layer, number):
    """Count a place as filled; whatever the budget."""
    if not places.marks[number] & FILLED:
        places.marks[number] |= FILLED
        places.sizes[CLOCK] += 1
        places.since[number] = places.sizes[CLOCK]
        places.sizes[BYTES] += places.extent_bytes[layer]
        places.sizes[MOST_BYTES] = max(places.sizes[MOST_BYTES], places.sizes[BYTES])


@helper
def empty(places, layer, number):
    """Give back a place's memory, if it is filled; it reads as zeros."""
    if places.marks[number] & FILLED:
        places.marks[number] &= ~np.uint8(FILLED)
        places.sizes[BYTES] -= places.extent_bytes[layer]
        _drop(places.pages[number])


@helper
def keep_limit(places, around):
    """Empty places until the budget is kept: those that a prompt would borrow at `around`."""
    search = seek(around, True)
    while places.sizes[BYTES] > places.sizes[LIMIT_BYTES]:
        victim = next_victim(places, search)
        if victim < 0:
            break
        empty(places, (around - search[BACK]) % len(places.extent_bytes), victim)


@helper
def _drop(pages):
    for i in range(len(pages)):
        if pages[i, 1] > pages[i, 0]:
            libc.advise_pages(pages[i, 0], pages[i, 1] - pages[i, 0], MADV_DONTNEED)


@helper
def _move(given, wanted):
    """Move what `wanted` needs of `given`, tensors of the same kinds, and give back the rest.

    Where the kernel cannot do that, or has no more maps, all is given back.
    """
    for i in range(len(given)):
        start, end = given[i]
        size = min(end - start, wanted[i, 1] - wanted[i, 0])
        if size > 0 and libc.move_pages(start, size, size, _MOVE, wanted[i, 0]) != -1:
            start += size
        if end > start:
            libc.advise_pages(start, end - start, MADV_DONTNEED)
