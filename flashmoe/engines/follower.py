"""Keeps a loaded model's budget to the memory that is free, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Protocol

from flashmoe.errors import FlashMoEError
from flashmoe.memory import following, free_memory
from flashmoe.memory.following import Facts
from flashmoe.memory.pressure import Pressure
from flashmoe.residency import rehearsal

logger = logging.getLogger(__name__)


class Followed(Protocol):
    """The engine, as far as it is followed. Whatever is asked is answered without its lock."""

    reserve_bytes: int
    beside_bytes: int

    @property
    def policy(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def present_bytes(self) -> int: ...
    @property
    def least_bytes(self) -> int: ...
    @property
    def most_bytes(self) -> int: ...

    def adjust(self, memory_bytes: int) -> None:
        """Another budget from now on. Raises FlashMoEError where the memory cannot be had."""


class Follower:
    """Looks at free memory every so often, as long as its engine lives and `stop` is not called."""

    def __init__(self, engine: Followed) -> None:
        self._engine = weakref.ref(engine)
        self._ended = threading.Event()
        self._ended.set()
        self.reset_counts()

    def reset_counts(self) -> None:
        self.grew = self.shrank = 0

    @property
    def follows(self) -> bool:
        return not self._ended.is_set()

    def start(self) -> None:
        """Begin, or begin anew in a forked child, which has no such thread."""
        self._ended.set()
        self._ended = threading.Event()
        self._pressure = Pressure()
        self._short_at = self._grew_at = time.monotonic() - following.CALM_SECONDS
        self._all_bytes = 0  # what was free or the experts' at the last look
        thread = threading.Thread(
            target=self._run, args=(self._ended,), name="flashmoe-memory", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            self._ended.set()
            logger.warning("no thread can be started, so memory='auto' stays what it is now")

    def stop(self) -> None:
        """Change the budget no more; a change that waits for the engine's lock is dropped."""
        self._ended.set()

    def _run(self, ended: threading.Event) -> None:
        seconds = 0.0
        while not ended.wait(seconds):
            engine = self._engine()
            if engine is None:
                return
            if not seconds:
                rehearsal.compile_resize(engine.policy)
            try:
                seconds = self.look(engine)
            except FlashMoEError as error:  # what is free is not told, or more cannot be had
                logger.debug("memory='auto': %s", error)
                self._short_at, seconds = time.monotonic(), following.LATEST_SECONDS
            del engine

    def look(self, engine: Followed) -> float:
        """Adjust the budget where that is due; in how many seconds to look again.

        Raises FlashMoEError as `available_bytes` and `adjust` do.
        """
        available, present = free_memory.available_bytes(), engine.present_bytes
        falling = max(0, self._all_bytes - available - present)
        self._all_bytes = available + present
        pressed, now, at = self._pressure.is_high(), engine.memory_bytes, time.monotonic()
        wanted = following.budget_bytes(
            Facts(
                available_bytes=available,
                falling_bytes=falling,
                present_bytes=present,
                memory_bytes=now,
                least_bytes=engine.least_bytes,
                most_bytes=engine.most_bytes,
                reserve_bytes=engine.reserve_bytes,
                beside_bytes=engine.beside_bytes,
                pressed=pressed,
                calm_seconds=at - self._short_at,
                steady_seconds=at - self._grew_at,
            )
        )
        if pressed or wanted < now:
            self._short_at = at
        if wanted > now:
            self._grew_at = at
        if wanted != now:
            engine.adjust(wanted)
            self.grew += wanted > now
            self.shrank += wanted < now
        return following.look_again_seconds(available)
