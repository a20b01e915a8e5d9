"""The threads that run reads, and the order in which they do."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from flashmoe.reading.threads import start_missing

Read = Callable[[], None]
Span = tuple[str, float, float]  # what was done, from when, until when; perf_counter's seconds

# Guesses in flight may keep the drive busy for at most this long (docs/speed.md#slow-drives).
GUESS_SECONDS = 3.2e-3


class ReadQueue:
    """Runs reads in threads: demands in order, guesses only while no demand is there.

    A guess that runs when a demand comes delays it, so at most `guesses_at_once` do, and no more
    than take the drive GUESS_SECONDS. A read must not raise. Threads start with the first read,
    and refer to it only while it runs.
    """

    def __init__(self, threads: int, guesses_at_once: int = 4) -> None:
        self.busy_seconds = 0.0  # with at least one read running or demanded
        self.each_seconds = 0.0  # that a read takes of the drive, of late
        self.spans: list[Span] | None = None  # set to a list, it gets every read
        self._guesses_at_once = guesses_at_once
        self._demands: deque[Read] = deque()
        self._guesses: deque[Read] = deque()
        self._running = self._guessing = 0
        self._busy_since = 0.0
        self._closed = False
        self._n_threads = threads
        self._begin()

    def _begin(self) -> None:
        """Locks that nobody has, and no threads."""
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._threads: list[threading.Thread] = []

    def demand(self, reads: Iterable[Read]) -> None:
        """Run `reads` as soon as a thread is free, in order.

        Raises FlashMoEError where no thread can be started.
        """
        with self._changed:
            self._check_ready()
            idle = not (self._running or self._demands)
            self._demands.extend(reads)
            if idle and self._demands:
                self._busy_since = time.perf_counter()
            self._changed.notify(len(self._demands))

    def guess(self, reads: Iterable[Read]) -> None:
        """Run `reads` when nothing is demanded, unless `promote` or `cancel` comes first."""
        with self._changed:
            self._check_ready()
            self._guesses.extend(reads)
            self._changed.notify(self._guesses_at_once)

    def promote(self, reads: Iterable[Read]) -> None:
        """Those of `reads` that still wait as guesses become demands."""
        self.demand(self.cancel(reads))

    def cancel(self, reads: Iterable[Read]) -> list[Read]:
        """Take out those of `reads` that still wait as guesses; returns them."""
        with self._changed:
            unwanted = set(reads)
            waiting = [read for read in self._guesses if read in unwanted]
            if waiting:
                self._guesses = deque(read for read in self._guesses if read not in unwanted)
            return waiting

    def reset_counts(self) -> None:
        with self._changed:
            self.busy_seconds = 0.0

    def close(self) -> None:
        """Run what was demanded, forget the guesses, end the threads."""
        with self._changed:
            self._closed = True
            self._guesses.clear()
            self._changed.notify_all()
            self._idle.notify()
        # one of them may itself collect the garbage that its owner has become
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def stand_still(self) -> None:
        """Run all there is, and then nothing until `go_on`, which the same thread calls."""
        self._changed.acquire()
        while self._running or self._demands or self._guesses:
            self._idle.wait()

    def go_on(self, *, in_child: bool) -> None:
        """In a forked child, which has none of the threads, others start with the next read."""
        if in_child:
            self._begin()
        else:
            self._changed.release()

    def _check_ready(self) -> None:
        if self._closed:
            raise RuntimeError("this reader was closed")
        start_missing(self._threads, self._n_threads, self._work)

    def _next(self) -> tuple[Read, bool] | None:
        """What to run now, and whether it is a guess; None: nothing yet."""
        if self._demands:
            return self._demands.popleft(), False
        if self._guesses and self._guessing == self._running and self._may_guess():
            return self._guesses.popleft(), True
        return None

    def _may_guess(self) -> bool:
        few = self._guessing < self._guesses_at_once
        return few and self._guessing * self.each_seconds < GUESS_SECONDS

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Wait for a read and run it; False when there is no more to come.

        What was read is forgotten on return: a thread that waits must not keep its owner alive.
        """
        with self._changed:
            while (next_read := self._next()) is None:
                if self._closed and not self._demands:
                    return False
                self._changed.wait()
            read, is_guess = next_read
            if not self._running and is_guess:
                self._busy_since = time.perf_counter()
            self._running += 1
            self._guessing += is_guess
        started = time.perf_counter()
        read()
        ended = time.perf_counter()
        if self.spans is not None:
            self.spans.append(("guess" if is_guess else "demand", started, ended))
        with self._changed:
            shared_seconds = (ended - started) / self._running  # with the others in flight
            self.each_seconds += (shared_seconds - self.each_seconds) / 16
            self._running -= 1
            self._guessing -= is_guess
            if not self._running and not self._demands:
                self.busy_seconds += ended - self._busy_since
                self._idle.notify()
            if self._guesses and self._running == self._guessing:
                self._changed.notify(self._guesses_at_once)
        return True
