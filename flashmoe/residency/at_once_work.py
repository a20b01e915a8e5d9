"""What `AtOnce` does for an event, in machine code: callable without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import c_kernel
from flashmoe.reading import range_work
from flashmoe.reading.range_work import (
    BYTES,
    EARLY_LEFT,
    FAILURE,
    LEFT,
    Queue,
    is_done,
    seconds_now,
    start,
    take_back,
)
from flashmoe.residency import guess_record, place_work
from flashmoe.residency.guess_record import add_right, add_wrong
from flashmoe.residency.place_work import (
    FILLED,
    GUESSED,
    LEAVING,
    LIKELY,
    NEEDED,
    RESIDENT,
    Places,
    empty,
    fill,
    room_to_guess,
    seek,
)
from flashmoe.util.by_address import call, pointer, view
from flashmoe.util.machine_code import helper

_FILES = __file__, guess_record.__file__, place_work.__file__
SOURCES = (*map(Path, _FILES), *range_work.SOURCES)
BEGIN, GUESS, EARLY, FINISH, NOTE = range(5)  # what `work` is asked for
# What it answers. SPOILT: a wrong guess failed, which may have spoilt its neighbours' pages.
# PART: late reads are on their way still.
READY, SPOILT, FAILED, NO_ROOM, PART = range(5)
# Positions in `Whole.counts`. READS: that the event at hand began. AWAITED: 1 + its layer, while
# late reads are on their way.
N_NEEDED, N_LIKELY, N_GUESSED, N_LEAVING, READS, AWAITED = range(6)
WAIT, TOTAL, DECIDING = range(3)  # positions in `Whole.seconds`
# Columns of `Whole.pools`: the number of its key 0, keys, slots, and where its `slot_of` lies.
FIRST, N_KEYS, N_SLOTS, SLOT_OF = range(4)
_PATIENCE_SECONDS = 3600.0  # a wait is looked at again


class Whole(NamedTuple):
    """The state of an `AtOnce`, numbers of experts in four lists."""

    places: Places
    queue: Queue
    ranges: np.ndarray  # [experts, most, 8] int64: each expert's jobs (see `range_work`)
    n_ranges: np.ndarray  # [experts] int64
    record: np.ndarray  # see `guess_record`
    needed: np.ndarray  # [most experts of a layer] int64: what the event at hand needs
    likely: np.ndarray  # [most experts of a layer] int64: what the one above will
    guessed: np.ndarray  # [experts] int64: guesses that are on their way, or there
    leaving: np.ndarray  # [experts] int64: wrong ones, of which bytes may still come
    pools: np.ndarray  # [layers, 4] int64: of the cache that serves each, see FIRST
    decide: np.ndarray  # [1] int64: the address of `serving.decide`
    counts: np.ndarray  # [6] int64: how many are in each list, and two more
    seconds: np.ndarray  # [3] float64

    @classmethod
    def empty(
        cls,
        places: Places,
        queue: Queue,
        ranges: np.ndarray,
        n_ranges: np.ndarray,
        record: np.ndarray,
    ) -> Whole:
        """Before the first event."""
        n_layers, n_experts = len(places.extent_bytes), len(places.marks)
        most = int(np.diff(places.first).max())
        return cls(
            places=places,
            queue=queue,
            ranges=ranges,
            n_ranges=n_ranges,
            record=record,
            needed=np.zeros(most, np.int64),
            likely=np.zeros(most, np.int64),
            guessed=np.zeros(n_experts, np.int64),
            leaving=np.zeros(n_experts, np.int64),
            pools=np.zeros((n_layers, 4), np.int64),
            decide=np.zeros(1, np.int64),
            counts=np.zeros(6, np.int64),
            seconds=np.zeros(3),
        )


def compiled(whole: Whole) -> Any:
    """Machine code of `work`, for any such state."""
    return c_kernel(work, whole, Policy, 3, also=SOURCES)


def work(at, step, layer, decision):
    """A step of an event of `layer`, of which `needed` and later `likely` tell.

    decision: the address of the table of words of the cache's `Decision`; to BEGIN.
    """
    whole = view(at)
    if step == BEGIN:
        return _begin(whole, layer, decision)
    if step == GUESS:
        _guess(whole, layer)
        return READY
    if step == NOTE:
        _note_residents(whole, layer)
        return READY
    return _await_early(whole, layer) if step == EARLY else _finish(whole, layer)


@helper
def _begin(whole, layer, decision):
    """Start all reads that the event needs; tell the cache while the drive is busy."""
    if not _collect(whole, layer):
        return SPOILT
    counts, places = whole.counts, whole.places
    counts[READS] = 0
    for number in whole.needed[: counts[N_NEEDED]]:
        places.marks[number] |= NEEDED
    _end_guesses(whole, layer)
    _start_reads(whole, layer, False)
    clock = np.zeros(2, np.int64)
    started = seconds_now(clock)
    call(whole.decide[0], (decision,))
    _note_residents(whole, layer)
    whole.seconds[DECIDING] += seconds_now(clock) - started
    # what is missing still takes what the cache gave up, or in a prompt what others lend
    if not _start_reads(whole, layer, True):
        for number in whole.leaving[: counts[N_LEAVING]]:
            _settle(whole, number, LEFT)
        if not _collect(whole, -1):
            return FAILED
        _start_reads(whole, layer, True)
    return READY


@helper
def _note_residents(whole, layer):
    """Mark whom the cache that serves `layer` now counts as resident."""
    first, n_keys = whole.pools[layer, FIRST], whole.pools[layer, N_KEYS]
    slot_of = numba.carray(pointer(whole.pools[layer, SLOT_OF]), (n_keys,), np.int64)
    marks = whole.places.marks[first : first + n_keys]
    for key in range(n_keys):
        if slot_of[key] >= 0:
            marks[key] |= RESIDENT
        else:
            marks[key] &= ~np.uint8(RESIDENT)


@helper
def _start_reads(whole, layer, lend):
    """Begin to read what is missing, as far as there is room for it; whether there was.

    lend: make room for all. There is room for any layer's experts, but for what wrong guesses
    still take.
    """
    places, counts = whole.places, whole.counts
    search = seek(layer, lend)
    for number in whole.needed[: counts[N_NEEDED]]:
        if not places.marks[number] & FILLED:
            if not fill(places, layer, number, search):
                return False
            start(whole.queue, whole.ranges[number, : whole.n_ranges[number]], False)
            counts[READS] += 1
    return True


@helper
def _guess(whole, layer):
    """Begin to read what is `likely` to be needed above `layer`, where there is room for it."""
    places, counts, above = whole.places, whole.counts, layer + 1
    likely = whole.likely[: counts[N_LIKELY]]
    for number in likely:
        places.marks[number] |= LIKELY
    lends = counts[N_NEEDED] > whole.pools[layer, N_SLOTS]
    search, extent_bytes = seek(layer, lends), places.extent_bytes[above]
    room = extent_bytes * len(likely) if lends else room_to_guess(places)
    for number in likely:
        if not places.marks[number] & FILLED:
            if room < extent_bytes or not fill(places, above, number, search):
                break
            room -= extent_bytes
            start(whole.queue, whole.ranges[number, : whole.n_ranges[number]], True)
            places.marks[number] |= GUESSED
            whole.guessed[counts[N_GUESSED]] = number
            counts[N_GUESSED] += 1
    for number in likely:
        places.marks[number] &= ~np.uint8(LIKELY)


@helper
def _end_guesses(whole, layer):
    """What was guessed and is needed becomes a demand; what was wrong is cancelled."""
    marks, counts, queue = whole.places.marks, whole.counts, whole.queue
    for number in whole.guessed[: counts[N_GUESSED]]:
        marks[number] &= ~np.uint8(GUESSED)
        ticket, done = queue.tickets[number], is_done(queue, number, LEFT, 0.0)
        if marks[number] & NEEDED:
            if ticket[BYTES]:
                add_right(whole.record)
            counts[READS] += 1
            take_back(queue, number, True)
        elif done and not ticket[FAILURE]:
            add_wrong(whole.record, ticket[BYTES])  # but the layer's next token may need it
        else:
            take_back(queue, number, False)
            marks[number] |= LEAVING
            whole.leaving[counts[N_LEAVING]] = number
            counts[N_LEAVING] += 1
    counts[N_GUESSED] = 0


@helper
def _collect(whole, layer):
    """Empty the places of wrong guesses that nothing is written to any more; False: one failed.

    Waits for those of `layer`, of which somebody may read again.
    """
    places, counts = whole.places, whole.counts
    kept, good = 0, True
    for number in whole.leaving[: counts[N_LEAVING]]:
        of = np.searchsorted(places.first, number, "right") - 1
        if of == layer:
            _settle(whole, number, LEFT)
        ticket = whole.queue.tickets[number]
        done = is_done(whole.queue, number, LEFT, 0.0)
        if not done or ticket[FAILURE]:
            good &= not done
            whole.leaving[kept] = number
            kept += 1
            continue
        places.marks[number] &= ~np.uint8(LEAVING)
        empty(places, of, number)
        if ticket[BYTES]:
            add_wrong(whole.record, ticket[BYTES])
    counts[N_LEAVING] = kept
    return good


@helper
def _settle(whole, number, left):
    """Wait until nothing is written to an expert's place any more, or not by early reads."""
    while not is_done(whole.queue, number, left, _PATIENCE_SECONDS):
        pass


@helper
def _await_early(whole, layer):
    """Wait for all but late reads; as `_finish` where none of those is on its way then."""
    counts, marks, tickets = whole.counts, whole.places.marks, whole.queue.tickets
    clock = np.zeros(2, np.int64)
    started = seconds_now(clock)
    bad, late = 0, 0
    for number in whole.needed[: counts[N_NEEDED]]:
        _settle(whole, number, EARLY_LEFT)
        if not marks[number] & FILLED or tickets[number, FAILURE]:
            bad += 1
        late += tickets[number, LEFT]
    whole.seconds[WAIT] += seconds_now(clock) - started
    if bad or not late:
        return _finish(whole, layer)
    if not _collect(whole, layer):
        return SPOILT
    counts[AWAITED] = layer + 1
    return PART


@helper
def _finish(whole, layer):
    """Wait for all that the event needs; what then may not be computed."""
    counts, marks, tickets = whole.counts, whole.places.marks, whole.queue.tickets
    counts[AWAITED] = 0
    needed = whole.needed[: counts[N_NEEDED]]
    clock = np.zeros(2, np.int64)
    started = seconds_now(clock)
    answer = READY
    for number in needed:
        _settle(whole, number, LEFT)
        if tickets[number, FAILURE] and marks[number] & FILLED:
            answer = FAILED
        marks[number] &= ~np.uint8(NEEDED)
    whole.seconds[WAIT] += seconds_now(clock) - started
    if answer == FAILED:
        return FAILED
    if not _collect(whole, layer):  # nothing is written to this layer's pages while it computes
        return SPOILT
    for number in needed:
        if not marks[number] & FILLED:
            return NO_ROOM
    return READY
