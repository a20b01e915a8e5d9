"""What an engine did in the last second, and its counts every so often."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from flashmoe.engines.base import Engine

INTERVAL_SECONDS = 1.0


class Second(NamedTuple):
    """An interval of some length. The drive's shares are 0 where nothing was read."""

    at_seconds: float  # since the start
    tokens_per_second: float
    hit_rate: float
    read_bytes_per_second: float
    drive_busy: float  # share of the time with a read in flight
    share_of_roofline: float  # what it read of what the drive gave at most in any interval so far
    resident_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.at_seconds:4.0f} s  {self.tokens_per_second:6.2f} token/s  "
            f"hits {self.hit_rate:6.1%}  {self.read_bytes_per_second / 1e6:6.0f} MB/s, "
            f"{self.share_of_roofline:4.0%} of the drive's best, busy {self.drive_busy:4.0%}  "
            f"{self.resident_bytes / 2**20:6.0f} MiB of experts"
        )


class Telemetry:
    """Watches an engine while it is used as a context manager; `seconds` are what it saw."""

    def __init__(self, engine: Engine, tell: Callable[[Second], object] | None):
        self.engine = engine
        self.tell = tell
        self.seconds: list[Second] = []
        self.tokens = 0  # the owner counts them up
        self._best = 0.0  # bytes a second that the drive gave at most so far
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="flashmoe-stats", daemon=True)

    def __enter__(self) -> Telemetry:
        self._started = self._last = time.perf_counter()
        self._before, self._tokens_before = self.engine.snapshot(), 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            second = self._take()
            if self.tell:
                self.tell(second)
        self._take()

    def _take(self) -> Second:
        stats, now, tokens = self.engine.snapshot(), time.perf_counter(), self.tokens
        before, seconds = self._before, now - self._last
        busy_seconds = stats.read_seconds - before.read_seconds
        bytes_read = stats.bytes_read - before.bytes_read
        if busy_seconds > 0:  # the speed while it read, which no roofline can be below
            self._best = max(self._best, bytes_read / max(busy_seconds, seconds / 100))
        second = Second(
            at_seconds=now - self._started,
            tokens_per_second=(tokens - self._tokens_before) / seconds,
            hit_rate=(stats.hits - before.hits) / max(1, stats.requests - before.requests),
            read_bytes_per_second=bytes_read / seconds,
            drive_busy=min(1.0, busy_seconds / seconds),
            share_of_roofline=bytes_read / seconds / self._best if self._best else 0.0,
            resident_bytes=stats.resident_bytes,
        )
        self.seconds.append(second)
        self._before, self._tokens_before, self._last = stats, tokens, now
        return second


class StatsLines:
    """Writes an engine's counts to stderr while it is used as a context manager.

    Each time one line of JSON: `Engine.stats`, and `at_seconds` since the beginning. Nothing where
    there is no engine yet.
    """

    def __init__(self, every_seconds: float, find_engine: Callable[[], Engine | None]) -> None:
        self._every_seconds = every_seconds
        self._find_engine = find_engine
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="flashmoe-lines", daemon=True)

    def __enter__(self) -> StatsLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(1.0)  # not for ever: nobody may be reading what it writes

    def _write(self) -> None:
        started = time.perf_counter()
        while not self._ended.wait(self._every_seconds):
            if engine := self._find_engine():
                counts = engine.stats()
                at_seconds = round(time.perf_counter() - started, 3)
                # whole lines, since the program writes there too
                sys.stderr.write(json.dumps({"at_seconds": at_seconds} | counts) + "\n")
                sys.stderr.flush()
