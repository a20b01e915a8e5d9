"""What the threads and the owner of a `RangeQueue` do, in machine code."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashmoe.reading import drives as drives_module
from flashmoe.reading import pread
from flashmoe.reading.drives import NONE, Drives, begin, choose
from flashmoe.reading.drives import end as end_read
from flashmoe.reading.pread import in_place_of_pread, read_bytes
from flashmoe.reading.read_queue import GUESS_SECONDS
from flashmoe.util import libc
from flashmoe.util.machine_code import helper

# Columns of a job: which bytes of which file go where. Past NEEDED, of LENGTH, the file may end.
# LATE, 0 or 1: it is used only after all others of its ticket.
DESCRIPTOR, OFFSET, ADDRESS, LENGTH, NEEDED, BUFFERED, LATE, TICKET = range(8)
COLUMNS = 8
# Columns of a ticket: jobs that are LEFT, EARLY_LEFT of those that are not late, and FAILURE: an
# errno, or `pread.ENDED`.
LEFT, EARLY_LEFT, BYTES, FAILURE = range(4)
# Rings of jobs, in the order in which threads take from them; after each, that of its late jobs.
DEMANDS, LATE_DEMANDS, GUESSES, _RINGS = 0, 1, 2, 4
RUNNING, EARLY, GUESSING, CLOSED, READ_BYTES = range(5)  # positions in `Queue.state`
EACH, BUSY, BUSY_SINCE, GUESS_LIMIT = range(4)  # positions in `Queue.times`, seconds
_GUESSES_AT_ONCE = 4
_EARLY_BESIDE_LATE = 1  # a late demand beside more of them would keep them waiting
_LOCK, _WORK, _DONE = 0, 64, 128  # offsets in `Queue.sync`: a mutex, two conditions
_REALTIME, _MONOTONIC = 0, 1  # clocks
_DONTNEED = 4  # POSIX_FADV_DONTNEED
SOURCES = Path(__file__), Path(pread.__file__), Path(drives_module.__file__)


class Queue(NamedTuple):
    """What threads and owner share, all of it under the lock in `sync`."""

    sync: np.ndarray  # [192] uint8
    state: np.ndarray  # [5] int64
    times: np.ndarray  # [4] float64
    rings: np.ndarray  # [4, capacity, 8] int64: jobs
    heads: np.ndarray  # [4] int64: how many were ever taken of each ring, and
    tails: np.ndarray  # [4] int64: put into it
    tickets: np.ndarray  # [tickets, 4] int64
    # [files, drives] int64: descriptors of each file's copies, whose first is that of its jobs
    copies: np.ndarray
    drives: Drives  # a drive for each column of `copies`
    instead: np.ndarray  # [1] int64, see `pread.read_through`

    @classmethod
    def empty(cls, tickets: int, capacity: int, copies: np.ndarray) -> Queue:
        return cls(
            np.zeros(192, np.uint8),
            np.zeros(5, np.int64),
            np.array([0, 0, 0, GUESS_SECONDS]),
            np.zeros((_RINGS, capacity, COLUMNS), np.int64),
            np.zeros(_RINGS, np.int64),
            np.zeros(_RINGS, np.int64),
            np.zeros((tickets, 4), np.int64),
            np.ascontiguousarray(copies, np.int64),
            Drives.arrays(copies.shape[1]),
            in_place_of_pread,
        )

    def start_over(self) -> None:
        """Without jobs, at the same addresses; what became of earlier reads stays known."""
        for array in (self.sync, self.state, self.times, self.heads, self.tails):
            array.fill(0)
        self.drives.waiting_bytes.fill(0)
        self.times[GUESS_LIMIT] = GUESS_SECONDS


@helper
def _at(queue, offset):
    return queue.sync.ctypes.data + offset


@helper
def seconds_now(clock):
    libc.clock(_MONOTONIC, clock.ctypes.data)
    return clock[0] + 1e-9 * clock[1]


@helper
def _read(queue, job):
    """(bytes that came, 0 or why there are no more)."""
    done, failure = read_bytes(
        queue.instead, job[DESCRIPTOR], job[ADDRESS], job[LENGTH], job[NEEDED], job[OFFSET]
    )
    if job[BUFFERED] and not failure:
        libc.advise_file(job[DESCRIPTOR], job[OFFSET], job[LENGTH], _DONTNEED)
    return done, failure


@helper
def _read_any_copy(queue, job, clock):
    """As `_read`, from the drive that is done soonest, and from others where that fails.

    Without the lock. Also returns whether a drive failed.
    """
    file = 0
    while queue.copies[file, 0] != job[DESCRIPTOR]:
        file += 1
    tried, any_failed, done, failure = 0, False, 0, 0
    while True:
        libc.lock(_at(queue, _LOCK))
        drive = choose(queue.drives, job[LENGTH], tried)
        queued = 0
        if drive != NONE:
            queued = begin(queue.drives, drive, job[LENGTH])
        libc.unlock(_at(queue, _LOCK))
        if drive == NONE:
            return done, failure, any_failed
        job[DESCRIPTOR] = queue.copies[file, drive]
        started = seconds_now(clock)
        done, failure = _read(queue, job)
        seconds = seconds_now(clock) - started
        libc.lock(_at(queue, _LOCK))
        came = 0 if failure else job[LENGTH]
        end_read(queue.drives, drive, job[LENGTH], came, queued, seconds)
        if failure:
            queue.drives.errors[drive] += 1
            queue.drives.last_failure[drive] = failure
        libc.unlock(_at(queue, _LOCK))
        if not failure:
            return done, failure, any_failed
        any_failed, tried = True, tried | 1 << drive


@helper
def _waits(queue, kind):
    """A job of DEMANDS or GUESSES waits, late or not."""
    heads, tails = queue.heads, queue.tails
    return heads[kind] < tails[kind] or heads[kind + 1] < tails[kind + 1]


@helper
def _may_guess(queue):
    state = queue.state
    if not _waits(queue, GUESSES) or state[GUESSING] != state[RUNNING]:
        return False
    seconds = state[GUESSING] * queue.times[EACH]
    return state[GUESSING] < _GUESSES_AT_ONCE and seconds < queue.times[GUESS_LIMIT]


@helper
def _may_go_on(queue):
    """A late demand waits, and few early reads are under way."""
    heads, tails = queue.heads, queue.tails
    return heads[LATE_DEMANDS] < tails[LATE_DEMANDS] and queue.state[EARLY] <= _EARLY_BESIDE_LATE


@helper
def _next(queue):
    """The ring of the next job; -1: none may be run now."""
    heads, tails = queue.heads, queue.tails
    if heads[DEMANDS] < tails[DEMANDS]:
        return DEMANDS
    if heads[LATE_DEMANDS] < tails[LATE_DEMANDS]:
        return LATE_DEMANDS if _may_go_on(queue) else -1
    if not _may_guess(queue):
        return -1
    return GUESSES if heads[GUESSES] < tails[GUESSES] else GUESSES + 1


@helper
def _note_demand(queue, clock):
    """The drive is busy from now on, if it was not."""
    if not queue.state[RUNNING] and not _waits(queue, DEMANDS):
        queue.times[BUSY_SINCE] = seconds_now(clock)


@helper
def _push(queue, kind, job):
    ring = kind + job[LATE]
    jobs = queue.rings[ring]
    jobs[queue.tails[ring] % len(jobs)] = job
    queue.tails[ring] += 1


def work(queue):
    """A thread's life: run what comes, until the queue is closed or a drive of several failed.

    Returns whether to come back, once that was told.
    """
    clock, job = np.zeros(2, np.int64), np.zeros(COLUMNS, np.int64)
    state, times = queue.state, queue.times
    libc.lock(_at(queue, _LOCK))
    while True:
        ring = _next(queue)
        if ring < 0:
            if state[CLOSED]:
                libc.unlock(_at(queue, _LOCK))
                return False
            libc.wait(_at(queue, _WORK), _at(queue, _LOCK))
            continue
        job[:] = queue.rings[ring, queue.heads[ring] % queue.rings.shape[1]]
        queue.heads[ring] += 1
        is_guess = ring >= GUESSES
        started = seconds_now(clock)
        if not state[RUNNING] and is_guess:
            times[BUSY_SINCE] = started
        state[RUNNING] += 1
        state[EARLY] += 1 - job[LATE]
        state[GUESSING] += is_guess
        if _may_guess(queue) or _may_go_on(queue):  # each wakes the next one
            libc.signal(_at(queue, _WORK))
        libc.unlock(_at(queue, _LOCK))
        any_failed = False
        if queue.copies.shape[1] > 1:
            count, failure, any_failed = _read_any_copy(queue, job, clock)
        else:
            count, failure = _read(queue, job)
        ended = seconds_now(clock)
        libc.lock(_at(queue, _LOCK))
        shared_seconds = (ended - started) / state[RUNNING]  # with the others in flight
        times[EACH] += (shared_seconds - times[EACH]) / 16
        state[RUNNING] -= 1
        state[EARLY] -= 1 - job[LATE]
        state[GUESSING] -= is_guess
        state[READ_BYTES] += count
        ticket = queue.tickets[job[TICKET]]
        ticket[BYTES] += count
        if failure:
            ticket[FAILURE] = failure
        _count_down(ticket, job)
        if not state[RUNNING] and not _waits(queue, DEMANDS):
            times[BUSY] += ended - times[BUSY_SINCE]
        if not ticket[LEFT] or not (job[LATE] or ticket[EARLY_LEFT]):
            libc.broadcast(_at(queue, _DONE))
        if any_failed:
            libc.unlock(_at(queue, _LOCK))
            return True


@helper
def _count_down(ticket, job):
    ticket[LEFT] -= 1
    ticket[EARLY_LEFT] -= 1 - job[LATE]


@helper
def start(queue, jobs, is_guess):
    """Add `jobs`; their tickets begin anew."""
    clock = np.zeros(2, np.int64)
    libc.lock(_at(queue, _LOCK))
    for job in jobs:
        queue.tickets[job[TICKET]] = 0
    for job in jobs:
        queue.tickets[job[TICKET], LEFT] += 1
        queue.tickets[job[TICKET], EARLY_LEFT] += 1 - job[LATE]
    if not is_guess:
        _note_demand(queue, clock)
    for job in jobs:
        _push(queue, GUESSES if is_guess else DEMANDS, job)
    for _ in range(1 if is_guess else len(jobs)):  # who begins a guess wakes the next one
        libc.signal(_at(queue, _WORK))
    libc.unlock(_at(queue, _LOCK))


@helper
def take_back(queue, number, demand):
    """Take out what still waits of a guess: to `demand` it, or for good."""
    clock = np.zeros(2, np.int64)
    libc.lock(_at(queue, _LOCK))
    for ring in range(GUESSES, _RINGS):
        jobs = queue.rings[ring]
        kept = queue.heads[ring]
        for position in range(queue.heads[ring], queue.tails[ring]):
            job = jobs[position % len(jobs)]
            if job[TICKET] != number:
                jobs[kept % len(jobs)] = job
                kept += 1
            elif demand:
                _note_demand(queue, clock)
                _push(queue, DEMANDS, job)
                libc.signal(_at(queue, _WORK))
            else:
                _count_down(queue.tickets[number], job)
        queue.tails[ring] = kept
    libc.unlock(_at(queue, _LOCK))


@helper
def is_done(queue, number, left, seconds):
    """Whether a ticket's reads have ended, at the latest after so many seconds.

    left: LEFT, or EARLY_LEFT for those that are not late.
    """
    until = np.zeros(2, np.int64)
    libc.lock(_at(queue, _LOCK))
    if queue.tickets[number, left] and seconds > 0:
        libc.clock(_REALTIME, until.ctypes.data)
        until[1] += int(1e9 * seconds)
        until[0] += until[1] // 1_000_000_000
        until[1] %= 1_000_000_000
        while queue.tickets[number, left]:
            if libc.timed_wait(_at(queue, _DONE), _at(queue, _LOCK), until.ctypes.data):
                break
    done = queue.tickets[number, left] == 0
    libc.unlock(_at(queue, _LOCK))
    return done


def end(queue):
    libc.lock(_at(queue, _LOCK))
    queue.state[CLOSED] = 1
    for ring in range(GUESSES, _RINGS):
        for position in range(queue.heads[ring], queue.tails[ring]):
            job = queue.rings[ring, position % queue.rings.shape[1]]
            _count_down(queue.tickets[job[TICKET]], job)
        queue.heads[ring] = queue.tails[ring]
    libc.broadcast(_at(queue, _WORK))
    libc.unlock(_at(queue, _LOCK))
