"""What an answer costs, as one line: its pace, and what the server's cache did for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress

from flashmoe.chat.conversation import Answer, Piece
from flashmoe.util.sizes import format_bytes

_EVERY_SECONDS = 0.5  # counts are asked for
_MB = 1e6
_NAMES = {
    "hits": "flashmoe_expert_hits_total",
    "misses": "flashmoe_expert_misses_total",
    "read_bytes": "flashmoe_read_bytes_total",
    "resident_bytes": "flashmoe_resident_bytes",
    "budget_bytes": "flashmoe_budget_bytes",
}


class Figures:
    """Of the answer at hand, or of the last one.

    metrics: counts as Prometheus reads them; None where they cannot be had.
    """

    def __init__(self, metrics: Callable[[], str | None]) -> None:
        self._metrics = metrics
        self._clear()

    def _clear(self) -> None:
        self._tokens = 0
        self._first_seconds = self._last_seconds = 0.0  # by time.monotonic, of tokens
        self._before: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._seconds = 0.0  # between the two

    async def watch(self, pieces: Answer) -> Answer:
        """The same pieces, counted."""
        self._clear()
        self._before = await self._counts()
        started = time.monotonic()
        looking = asyncio.create_task(self._look_on(started))
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self._count(piece)
                    yield piece
            await self._look(started)
        finally:
            looking.cancel()

    def text(self) -> str:
        """The line; without the cache's part where the server does not tell."""
        if not self._tokens:
            return "no answer yet"
        parts = [f"{self._rate():.1f} token/s"]
        if self._before and self._now:
            hits, misses, read_bytes = (
                self._now[name] - self._before[name] for name in ("hits", "misses", "read_bytes")
            )
            if hits + misses:
                parts.append(f"hit rate {hits / (hits + misses):.1%}")
            parts.append(f"{read_bytes / _MB / self._seconds:.0f} MB/s read")
        if counts := self._now or self._before:
            resident, budget = counts["resident_bytes"], counts["budget_bytes"]
            parts.append(f"{format_bytes(resident)} of {format_bytes(budget)}")
        return " | ".join(parts)

    def _rate(self) -> float:
        """Tokens a second, from the first one on."""
        seconds = self._last_seconds - self._first_seconds
        return (self._tokens - 1) / seconds if seconds else 0.0

    def _count(self, piece: Piece) -> None:
        if piece.tokens is not None:
            self._tokens = piece.tokens  # a piece may have been several
            return
        self._last_seconds = time.monotonic()
        self._first_seconds = self._first_seconds or self._last_seconds
        self._tokens += 1

    async def _look_on(self, started: float) -> None:
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            await self._look(started)

    async def _look(self, started: float) -> None:
        self._now = await self._counts()
        self._seconds = time.monotonic() - started

    async def _counts(self) -> dict[str, float]:
        """By _NAMES; empty where they cannot be had."""
        text = await asyncio.to_thread(self._metrics)
        try:
            from prometheus_client.parser import text_string_to_metric_families
        except ImportError:
            return {}
        with suppress(ValueError, KeyError):  # no such text, or without a model
            families = text_string_to_metric_families(text or "")
            values = {one.name: one.value for family in families for one in family.samples}
            return {name: values[theirs] for name, theirs in _NAMES.items()}
        return {}
