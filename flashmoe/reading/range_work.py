"""What the threads and the owner of a `RangeQueue` do, in machine code."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, c_char, c_int, c_int64, c_ssize_t, c_void_p, cast, set_errno
from errno import EINTR, EIO
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flashmoe.policies.parts.compiled import helper
from flashmoe.reading.read_queue import GUESS_SECONDS

# Columns of a job: which bytes of which file go where. Past NEEDED, of LENGTH, the file may end.
DESCRIPTOR, OFFSET, ADDRESS, LENGTH, NEEDED, BUFFERED, TICKET = range(7)
LEFT, BYTES, FAILURE = range(3)  # columns of a ticket; FAILURE: an errno, or ENDED
ENDED = -1  # the file ends too early
# Positions in `Queue.state`; rings are read at HEAD and written at TAIL.
RUNNING, GUESSING, CLOSED, HEAD, TAIL, GUESS_HEAD, GUESS_TAIL, READ_BYTES = range(8)
EACH, BUSY, BUSY_SINCE, GUESS_LIMIT = range(4)  # positions in `Queue.times`, seconds
_GUESSES_AT_ONCE = 4
_LOCK, _WORK, _DONE = 0, 64, 128  # offsets in `Queue.sync`: a mutex, two conditions
_REALTIME, _MONOTONIC = 0, 1  # clocks
_DONTNEED = 4  # POSIX_FADV_DONTNEED

_Pread = CFUNCTYPE(c_ssize_t, c_int, c_void_p, c_ssize_t, c_int64, use_errno=True)
_in_place_of_pread = np.zeros(1, np.int64)  # an address; 0: libc's own
_kept: list[Any] = []


def _external(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


_lock = _external("pthread_mutex_lock", types.int32, types.intp)
_unlock = _external("pthread_mutex_unlock", types.int32, types.intp)
_signal = _external("pthread_cond_signal", types.int32, types.intp)
_broadcast = _external("pthread_cond_broadcast", types.int32, types.intp)
_wait = _external("pthread_cond_wait", types.int32, types.intp, types.intp)
_timed_wait = _external("pthread_cond_timedwait", types.int32, types.intp, types.intp, types.intp)
_clock = _external("clock_gettime", types.int32, types.int32, types.intp)
_pread = _external("pread", types.intp, types.int32, types.intp, types.intp, types.int64)
_advise = _external(
    "posix_fadvise", types.int32, types.int32, types.int64, types.int64, types.int32
)
_errno_location = _external("__errno_location", types.voidptr)


@intrinsic
def _pread_at(typing_context, address, descriptor, memory, length, offset):
    def generate(context, builder, signature, arguments):
        word, number = ir.IntType(64), ir.IntType(32)
        function = ir.FunctionType(word, [number, word, word, word])
        pointer = builder.inttoptr(arguments[0], function.as_pointer())
        descriptor = builder.trunc(arguments[1], number)
        return builder.call(pointer, [descriptor, *arguments[2:]])

    words = (types.int64,) * 5
    return types.int64(*words), generate


def read_through(preadv: Callable[[int, Any, int], int] | None) -> None:
    """Tests put failing drives here: this reads, as os.preadv does, in place of pread.

    None: pread again.
    """
    if preadv is None:
        _in_place_of_pread[0] = 0
        return

    def pread(descriptor: int, address: int, length: int, offset: int) -> int:
        memory = memoryview((c_char * length).from_address(address)).cast("B")
        try:
            return preadv(descriptor, [memory], offset)
        except OSError as error:
            set_errno(error.errno or EIO)
            return -1

    pointer = _Pread(pread)
    _kept.append(pointer)  # a read that has begun may still return to it
    _in_place_of_pread[0] = cast(pointer, c_void_p).value or 0


class Queue(NamedTuple):
    """What threads and owner share, all of it under the lock in `sync`."""

    sync: np.ndarray  # [192] uint8
    state: np.ndarray  # [8] int64
    times: np.ndarray  # [4] float64
    demands: np.ndarray  # [capacity, 7] int64, a ring of jobs
    guesses: np.ndarray  # [capacity, 7] int64, a ring of jobs
    tickets: np.ndarray  # [tickets, 3] int64
    instead: np.ndarray  # [1] int64, see `read_through`

    @classmethod
    def empty(cls, tickets: int, capacity: int) -> Queue:
        return cls(
            np.zeros(192, np.uint8),
            np.zeros(8, np.int64),
            np.array([0, 0, 0, GUESS_SECONDS]),
            np.zeros((capacity, 7), np.int64),
            np.zeros((capacity, 7), np.int64),
            np.zeros((tickets, 3), np.int64),
            _in_place_of_pread,
        )

    def start_over(self) -> None:
        """Without jobs, at the same addresses; what became of earlier reads stays known."""
        for array in (self.sync, self.state, self.times, self.demands, self.guesses):
            array.fill(0)
        self.times[GUESS_LIMIT] = GUESS_SECONDS


@helper
def _at(queue, offset):
    return queue.sync.ctypes.data + offset


@helper
def seconds_now(clock):
    _clock(_MONOTONIC, clock.ctypes.data)
    return clock[0] + 1e-9 * clock[1]


@helper
def _read(instead, job):
    """(bytes that came, 0 or why there are no more)."""
    done = 0
    while done < job[NEEDED]:
        address, length, offset = job[ADDRESS] + done, job[LENGTH] - done, job[OFFSET] + done
        if instead[0]:
            count = _pread_at(instead[0], job[DESCRIPTOR], address, length, offset)
        else:
            count = _pread(job[DESCRIPTOR], address, length, offset)
        if count == 0:
            return done, ENDED
        if count < 0:
            failure = numba.carray(_errno_location(), (1,), np.int32)[0]
            if failure != EINTR:
                return done, failure
        else:
            done += count
    if job[BUFFERED]:
        _advise(job[DESCRIPTOR], job[OFFSET], job[LENGTH], _DONTNEED)
    return done, 0


@helper
def _may_guess(queue):
    state = queue.state
    if state[GUESS_HEAD] == state[GUESS_TAIL] or state[GUESSING] != state[RUNNING]:
        return False
    seconds = state[GUESSING] * queue.times[EACH]
    return state[GUESSING] < _GUESSES_AT_ONCE and seconds < queue.times[GUESS_LIMIT]


@helper
def _note_demand(queue, clock):
    """The drive is busy from now on, if it was not."""
    if not queue.state[RUNNING] and queue.state[HEAD] == queue.state[TAIL]:
        queue.times[BUSY_SINCE] = seconds_now(clock)


@helper
def _push(ring, state, tail, jobs):
    for job in jobs:
        ring[state[tail] % len(ring)] = job
        state[tail] += 1


def work(queue):
    """A thread's life: until the queue is closed, run what comes."""
    clock, job = np.zeros(2, np.int64), np.zeros(7, np.int64)
    state, times = queue.state, queue.times
    _lock(_at(queue, _LOCK))
    while True:
        is_guess = False
        if state[HEAD] < state[TAIL]:
            job[:] = queue.demands[state[HEAD] % len(queue.demands)]
            state[HEAD] += 1
        elif _may_guess(queue):
            is_guess = True
            job[:] = queue.guesses[state[GUESS_HEAD] % len(queue.guesses)]
            state[GUESS_HEAD] += 1
        elif state[CLOSED]:
            break
        else:
            _wait(_at(queue, _WORK), _at(queue, _LOCK))
            continue
        started = seconds_now(clock)
        if not state[RUNNING] and is_guess:
            times[BUSY_SINCE] = started
        state[RUNNING] += 1
        state[GUESSING] += is_guess
        if _may_guess(queue):
            _signal(_at(queue, _WORK))
        _unlock(_at(queue, _LOCK))
        count, failure = _read(queue.instead, job)
        ended = seconds_now(clock)
        _lock(_at(queue, _LOCK))
        shared_seconds = (ended - started) / state[RUNNING]  # with the others in flight
        times[EACH] += (shared_seconds - times[EACH]) / 16
        state[RUNNING] -= 1
        state[GUESSING] -= is_guess
        state[READ_BYTES] += count
        ticket = queue.tickets[job[TICKET]]
        ticket[BYTES] += count
        if failure:
            ticket[FAILURE] = failure
        ticket[LEFT] -= 1
        if not state[RUNNING] and state[HEAD] == state[TAIL]:
            times[BUSY] += ended - times[BUSY_SINCE]
        if not ticket[LEFT]:
            _broadcast(_at(queue, _DONE))
    _unlock(_at(queue, _LOCK))


@helper
def start(queue, jobs, is_guess):
    """Add `jobs`; their tickets begin anew."""
    state = queue.state
    clock = np.zeros(2, np.int64)
    _lock(_at(queue, _LOCK))
    for job in jobs:
        queue.tickets[job[TICKET]] = 0
    for job in jobs:
        queue.tickets[job[TICKET], LEFT] += 1
    if is_guess:
        _push(queue.guesses, state, GUESS_TAIL, jobs)
        _signal(_at(queue, _WORK))  # who begins a guess wakes the next one
    else:
        _note_demand(queue, clock)
        _push(queue.demands, state, TAIL, jobs)
        for _ in range(len(jobs)):
            _signal(_at(queue, _WORK))
    _unlock(_at(queue, _LOCK))


@helper
def take_back(queue, number, demand):
    """Take out what still waits of a guess: to `demand` it, or for good."""
    state, ring = queue.state, queue.guesses
    clock = np.zeros(2, np.int64)
    _lock(_at(queue, _LOCK))
    kept = state[GUESS_HEAD]
    for position in range(state[GUESS_HEAD], state[GUESS_TAIL]):
        job = ring[position % len(ring)]
        if job[TICKET] != number:
            ring[kept % len(ring)] = job
            kept += 1
        elif demand:
            _note_demand(queue, clock)
            queue.demands[state[TAIL] % len(queue.demands)] = job
            state[TAIL] += 1
            _signal(_at(queue, _WORK))
        else:
            queue.tickets[number, LEFT] -= 1
    state[GUESS_TAIL] = kept
    _unlock(_at(queue, _LOCK))


@helper
def is_done(queue, number, seconds):
    """Whether a ticket's reads have ended, at the latest after so many seconds."""
    until = np.zeros(2, np.int64)
    _lock(_at(queue, _LOCK))
    if queue.tickets[number, LEFT] and seconds > 0:
        _clock(_REALTIME, until.ctypes.data)
        until[1] += int(1e9 * seconds)
        until[0] += until[1] // 1_000_000_000
        until[1] %= 1_000_000_000
        while queue.tickets[number, LEFT]:
            if _timed_wait(_at(queue, _DONE), _at(queue, _LOCK), until.ctypes.data):
                break
    done = queue.tickets[number, LEFT] == 0
    _unlock(_at(queue, _LOCK))
    return done


def end(queue):
    _lock(_at(queue, _LOCK))
    queue.state[CLOSED] = 1
    for position in range(queue.state[GUESS_HEAD], queue.state[GUESS_TAIL]):
        queue.tickets[queue.guesses[position % len(queue.guesses), TICKET], LEFT] -= 1
    queue.state[GUESS_HEAD] = queue.state[GUESS_TAIL]
    _broadcast(_at(queue, _WORK))
    _unlock(_at(queue, _LOCK))
