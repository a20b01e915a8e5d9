"""Reads ranges of files in threads that never wait for Python's lock.

The order is that of `read_queue`: demands first, and guesses only while no demand is there.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading.range_work import (
    BUSY,
    LEFT,
    READ_BYTES,
    Queue,
    end,
    is_done,
    start,
    take_back,
    work,
)
from flashmoe.reading.threads import start_missing

_PATIENCE_SECONDS = 0.2  # how long a wait keeps Ctrl-C from Python


class RangeQueue:
    """Threads, and the jobs of which each ticket's are counted. Thread-safe.

    At most one set of jobs of a ticket is under way.
    """

    def __init__(self, threads: int, tickets: int, jobs_a_ticket: int) -> None:
        self._n_threads = threads
        self._size = tickets, tickets * jobs_a_ticket + 1
        self._run: dict[str, Any] = {
            f.__name__: kernel(f, Policy) for f in (work, start, take_back, is_done, end)
        }
        self._begin()

    def _begin(self) -> None:
        self._queue = Queue.empty(*self._size)
        self._threads: list[threading.Thread] = []
        self.tickets = self._queue.tickets

    @property
    def bytes_read(self) -> int:
        return int(self._queue.state[READ_BYTES])

    @property
    def busy_seconds(self) -> float:
        """Time with at least one read in flight."""
        return float(self._queue.times[BUSY])

    def reset_counts(self) -> None:
        self._queue.state[READ_BYTES] = self._queue.times[BUSY] = 0

    def demand(self, jobs: np.ndarray) -> None:
        """Run `jobs` [n, 7] as soon as a thread is free, in order."""
        self._start_threads()
        self._run["start"](self._queue, jobs, False)

    def guess(self, jobs: np.ndarray) -> None:
        """Run `jobs` when nothing is demanded, unless `promote` or `cancel` comes first."""
        self._start_threads()
        self._run["start"](self._queue, jobs, True)

    def promote(self, ticket: int) -> None:
        """What still waits of a guess becomes a demand."""
        self._run["take_back"](self._queue, ticket, True)

    def cancel(self, ticket: int) -> None:
        """What still waits of a guess is not read."""
        self._run["take_back"](self._queue, ticket, False)

    def is_done(self, ticket: int) -> bool:
        done: bool = self._run["is_done"](self._queue, ticket, 0.0)
        return done

    def wait(self, ticket: int) -> None:
        """Until nothing is written any more of what the ticket's jobs read."""
        while not self._run["is_done"](self._queue, ticket, _PATIENCE_SECONDS):
            pass

    def _start_threads(self) -> None:
        """Raises FlashMoEError where not one can be started."""
        start_missing(self._threads, self._n_threads, self._run["work"], self._queue)

    def close(self) -> None:
        """Run what was demanded, forget the guesses, end the threads."""
        self._run["end"](self._queue)
        for thread in self._threads:
            thread.join()

    def settle(self) -> None:
        """Wait until nothing is under way."""
        for ticket in np.flatnonzero(self.tickets[:, LEFT]).tolist():
            self.wait(ticket)

    def start_over(self) -> None:
        """In a forked child, which has none of the threads."""
        self._begin()
