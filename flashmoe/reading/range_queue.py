"""Reads ranges of files in threads that never wait for Python's lock.

The order is that of `read_queue`: demands first, and guesses only while no demand is there.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading import drives
from flashmoe.reading.pread import ENDED
from flashmoe.reading.range_work import (
    BUSY,
    LEFT,
    READ_BYTES,
    SOURCES,
    Queue,
    end,
    is_done,
    start,
    take_back,
    work,
)
from flashmoe.reading.threads import start_missing

logger = logging.getLogger(__name__)

_ONE_DRIVE = np.full((1, 1), -1)  # nobody chooses
_PATIENCE_SECONDS = 0.2  # how long a wait keeps Ctrl-C from Python


class RangeQueue:
    """Threads, and the jobs of which each ticket's are counted. Thread-safe.

    At most one set of jobs of a ticket is under way.
    """

    def __init__(
        self,
        threads: int,
        tickets: int,
        jobs_a_ticket: int,
        copies: np.ndarray = _ONE_DRIVE,
        places: Sequence[object] = ("",),
    ) -> None:
        """copies: [files, drives] descriptors, see `Queue`. places: what warnings call drives."""
        self._n_threads = threads
        self._places, self._said = places, [0] * len(places)  # failures that were told
        self._telling = threading.Lock()
        self._threads: list[threading.Thread] = []
        # what machine code takes that adds jobs of its own, once `start_threads` was called
        self.shared = Queue.empty(tickets, tickets * jobs_a_ticket + 1, copies)
        self.tickets = self.shared.tickets
        self._run: dict[str, Any] = {
            f.__name__: kernel(f, Policy, SOURCES) for f in (work, start, take_back, is_done, end)
        }

    @property
    def bytes_read(self) -> int:
        return int(self.shared.state[READ_BYTES])

    @property
    def busy_seconds(self) -> float:
        """Time with at least one read in flight."""
        return float(self.shared.times[BUSY])

    def reset_counts(self) -> None:
        self.shared.state[READ_BYTES] = self.shared.times[BUSY] = 0

    def demand(self, jobs: np.ndarray) -> None:
        """Run `jobs` [n, 8] as soon as a thread is free, in order, late ones last."""
        self.start_threads()
        self._run["start"](self.shared, jobs, False)

    def cancel(self, ticket: int) -> None:
        """What still waits of a guess is not read."""
        self._run["take_back"](self.shared, ticket, False)

    def is_done(self, ticket: int) -> bool:
        done: bool = self._run["is_done"](self.shared, ticket, LEFT, 0.0)
        return done

    def wait(self, ticket: int) -> None:
        """Until nothing is written any more of what the ticket's jobs read."""
        while not self._run["is_done"](self.shared, ticket, LEFT, _PATIENCE_SECONDS):
            pass

    def start_threads(self) -> None:
        """Those that read, if they do not run. Raises FlashMoEError where not one can start."""
        start_missing(self._threads, self._n_threads, self._work)

    def _work(self) -> None:
        while self._run["work"](self.shared):
            self._tell_failures()

    def _tell_failures(self) -> None:
        for drive, place in enumerate(self._places):
            with self._telling:
                errors = int(self.shared.drives.errors[drive])
                before, self._said[drive] = self._said[drive], errors
            number = int(self.shared.drives.last_failure[drive])
            why = "the file ends too early" if number == ENDED else os.strerror(number)
            for count in range(before + 1, errors + 1):
                if what := drives.what_happens(place, why, count):
                    logger.warning("%s", what)

    @property
    def bytes_by_drive(self) -> list[int]:
        """Since it was opened; empty where there is but one."""
        read_bytes: list[int] = self.shared.drives.read_bytes.tolist()
        return read_bytes if len(read_bytes) > 1 else []

    def close(self) -> None:
        """Run what was demanded, forget the guesses, end the threads."""
        self._run["end"](self.shared)
        for thread in self._threads:
            thread.join()

    def settle(self) -> None:
        """Wait until nothing is under way."""
        for ticket in np.flatnonzero(self.tickets[:, LEFT]).tolist():
            self.wait(ticket)

    def start_over(self) -> None:
        """In a forked child, which has none of the threads."""
        self._threads.clear()
        self._telling = threading.Lock()
        self.shared.start_over()
