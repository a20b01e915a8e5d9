"""Reads what lies in several places alike, each time from one, and from another if that fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from flashmoe.reading import drives
from flashmoe.reading.drives import NONE, Drives

logger = logging.getLogger(__name__)


class Copies:
    """The places, one on each drive. Thread-safe."""

    def __init__(self, places: Sequence[object]) -> None:
        """places: what warnings call them."""
        self.places = places
        self.drives = Drives.lists(len(places))
        self._lock = threading.Lock()

    def choose(self, size_bytes: int, among: int) -> int:
        """The place that would be the first to bring so much; NONE: only such as are left alone.

        among: a bit for each that may be chosen.
        """
        with self._lock:
            place = drives.choose(self.drives, size_bytes, ~among)
            is_sound = place != NONE and not drives.is_left_alone(self.drives.errors[place])
        return place if is_sound else NONE

    def read(self, size_bytes: int, read: Callable[[int], object], first: int = NONE) -> int:
        """Let `read` bring so many bytes of the place that it is told; returns its number.

        first: the place to try before others; NONE: whichever is done soonest. An OSError or
        EOFError counts against the place, and another is tried; it is raised where all fail.
        """
        tried, place = 0, first
        while True:
            with self._lock:
                if place == NONE:
                    place = drives.choose(self.drives, size_bytes, tried)
                queued = drives.begin(self.drives, place, size_bytes)
            started, came = time.perf_counter(), 0
            try:
                read(place)
                came = size_bytes
                return place
            except (OSError, EOFError) as error:
                tried |= 1 << place
                self.note_failure(place, str(error) or "the file ends too early")
                if tried == (1 << len(self.places)) - 1:
                    raise
            finally:
                seconds = time.perf_counter() - started
                with self._lock:
                    drives.end(self.drives, place, size_bytes, came, queued, seconds)
            place = NONE

    def note_failure(self, place: int, why: str) -> None:
        """Count a failure of a place; the first is told, and that which makes it left alone."""
        with self._lock:
            self.drives.errors[place] += 1
            errors = self.drives.errors[place]
        if len(self.places) > 1 and (what := drives.what_happens(self.places[place], why, errors)):
            logger.warning("%s", what)
