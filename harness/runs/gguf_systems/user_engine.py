"""A user's own command as a system: it speaks the protocol of docs/engines.md."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from flashmoe.errors import FlashMoEError
from harness.runs.engines.conversation import BrokenProtocolError, OutOfMemoryError, conversation
from harness.runs.gguf_systems import System, Work

WAIT_SECONDS = 600.0  # for any one line
_SAME_CLOCK = 0.05  # clocks that differ by less tell the same


def systems(named_commands: Sequence[str]) -> list[System]:
    """Of `NAME=command ...` each. Raises FlashMoEError for words that are not of that form."""
    return [
        System(name, partial(_run, command), may_fail=True)
        for name, command in map(parse, named_commands)
    ]


def check_distinct(names: Sequence[str]) -> None:
    """Raises FlashMoEError where two systems of a table bear one name."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise FlashMoEError(f"two systems are called {min(twice)!r}: name the engine otherwise")


def parse(named_command: str) -> tuple[str, str]:
    name, equals, command = named_command.partition("=")
    if not (name.strip() and equals and command.strip()):
        raise FlashMoEError(f"{named_command!r} is no engine: write NAME='command ...'")
    return name.strip(), command.strip()


def _run(command: str, work: Work) -> dict[str, Any]:
    """Speeds are by the referee's clock; the engine's own rate where the two differ."""
    limit = work.cap_bytes
    with conversation(command, limit, WAIT_SECONDS) as engine:
        try:
            engine.hello()
            engine.load(work.model, work.threads, work.context_tokens, limit)
            ready_seconds = time.perf_counter() - engine.started
            answer = engine.run(list(work.prompt), work.new_tokens)
            peak_bytes = engine.cap.peak_bytes() if engine.cap else None
            engine.quit()
        except OutOfMemoryError:
            return {"outcome": "out of memory"}
    if work.new_tokens > 1 and math.isinf(answer.seen_rate):
        raise BrokenProtocolError("its tokens came all at once: write each when it is known")
    result: dict[str, Any] = {
        "outcome": "ok",
        "token_ids": answer.token_ids,
        "tokens_per_second": answer.seen_rate,
        "prompt_seconds": answer.seen_seconds[0],
        "ready_seconds": ready_seconds,
        "bytes_per_token": answer.decode_read_bytes / max(work.new_tokens - 1, 1),
        "peak_memory_bytes": peak_bytes,
    }
    own_rate = answer.said_rate
    if math.isfinite(own_rate) and abs(own_rate - answer.seen_rate) > (
        _SAME_CLOCK * answer.seen_rate
    ):
        result["own_tokens_per_second"] = own_rate
    hits, misses = (_count(answer.counters.get(name)) for name in ("hits", "misses"))
    if hits is not None and misses is not None and hits + misses:
        result["hit_rate"] = hits / (hits + misses)
    return result


def _count(said: Any) -> int | None:
    """None where it is no count."""
    sound = isinstance(said, int) and not isinstance(said, bool) and said >= 0
    return said if sound else None
